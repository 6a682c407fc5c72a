//! Errors of the API: one value, told in the shape of the route it happened on (P10).

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use ringback_store::StoreError;
use serde_json::json;

/// A refused or failed request. Its text says what to do and holds no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) detail: String,
    /// JSON pointer and reason of each field that is wrong.
    pub(crate) fields: Vec<(String, String)>,
    pub(crate) retry_after_s: Option<u64>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), fields: Vec::new(), retry_after_s: None }
    }

    pub(crate) fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    /// A field of the body is wrong.
    pub(crate) fn field(pointer: impl Into<String>, reason: impl Into<String>) -> Self {
        let (pointer, reason) = (pointer.into(), reason.into());
        let name = pointer.trim_start_matches('/').replace('/', ".");
        let detail = if name.is_empty() { reason.clone() } else { format!("`{name}` {reason}") };
        Self { fields: vec![(pointer, reason)], ..Self::bad_request(detail) }
    }

    /// Puts the fields below `prefix`: for an item of a list.
    pub(crate) fn below(mut self, prefix: &str) -> Self {
        for (pointer, _) in &mut self.fields {
            *pointer = format!("{prefix}{pointer}");
        }
        let at = prefix.trim_start_matches('/').replace('/', ".");
        self.detail = format!("{at}: {}", self.detail);
        self
    }

    pub(crate) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    /// Unknown, malformed, of another project, removed by retention: all the same to the asker.
    pub(crate) fn no_job() -> Self {
        Self::not_found(
            "job not found: no job of this project and endpoint has this id, or its retention time is over",
        )
    }

    pub(crate) fn conflict(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, detail)
    }

    pub(crate) fn unavailable(detail: impl Into<String>) -> Self {
        Self { retry_after_s: Some(1), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, detail) }
    }

    pub(crate) fn too_many(detail: impl Into<String>, retry_after_s: u64) -> Self {
        Self { retry_after_s: Some(retry_after_s), ..Self::new(StatusCode::TOO_MANY_REQUESTS, detail) }
    }

    /// The headers that belong to a status, in every shape.
    pub(crate) fn headers(&self, response: &mut Response) {
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
    }

    /// RunPod's shape.
    pub(crate) fn runpod(self) -> Response {
        let body = json!({"error": self.detail}).to_string();
        let mut response = (self.status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
        self.headers(&mut response);
        response
    }

    /// RFC 9457.
    pub(crate) fn problem(self) -> Response {
        let errors: Vec<_> = self
            .fields
            .iter()
            .map(|(pointer, detail)| json!({"pointer": pointer, "detail": detail}))
            .collect();
        let mut body = json!({
            "type": "about:blank",
            "title": self.status.canonical_reason().unwrap_or("Error"),
            "status": self.status.as_u16(),
            "detail": self.detail,
        });
        if !errors.is_empty() {
            body["errors"] = errors.into();
        }
        let mut response =
            (self.status, [(header::CONTENT_TYPE, "application/problem+json")], body.to_string())
                .into_response();
        self.headers(&mut response);
        response
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        if error.is_transient() {
            tracing::warn!(%error, "SQL is not available");
            Self::unavailable("the database is not available now; try again")
        } else {
            // Its text may quote stored values: it goes to the log only.
            tracing::error!(%error, "SQL refused");
            Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal error; the server's log has the reason")
        }
    }
}

/// An error on a route of RunPod's surface.
#[derive(Debug)]
pub(crate) struct RunpodError(pub(crate) ApiError);

impl<E: Into<ApiError>> From<E> for RunpodError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for RunpodError {
    fn into_response(self) -> Response {
        self.0.runpod()
    }
}

/// An error on a native route.
#[derive(Debug)]
pub(crate) struct NativeError(pub(crate) ApiError);

impl<E: Into<ApiError>> From<E> for NativeError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for NativeError {
    fn into_response(self) -> Response {
        self.0.problem()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_error_names_its_place_in_both_shapes() {
        let error = ApiError::field("/webhook", "must be a text").below("/items/3");
        assert_eq!(error.fields, [("/items/3/webhook".to_owned(), "must be a text".to_owned())]);
        assert_eq!(error.detail, "items.3: `webhook` must be a text");
        let response = ApiError::too_many("slow down", 4).runpod();
        assert_eq!(response.headers()[header::RETRY_AFTER], "4");
        assert_eq!(ApiError::no_job().problem().headers()[header::CONTENT_TYPE], "application/problem+json");
    }
}
