//! Runflow-compatible routes under `/v1` (reference/webhooks.md section 2). A run is a job; a model is an endpoint by
//! its alias `owner/model`. Times end in `+00:00`.

pub(crate) mod callbacks;
pub(crate) mod history;
pub(crate) mod runs;
pub(crate) mod secrets;

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;

use crate::error::ApiError;

/// An error on one of these routes: problem+json with Runflow's `code`, `error_type` and `message` beside it.
#[derive(Debug)]
pub(crate) struct RunflowError {
    error: ApiError,
    error_type: Option<&'static str>,
}

impl RunflowError {
    /// 422 `validation_error` of a kind.
    pub(crate) fn validation(error_type: &'static str, detail: impl Into<String>) -> Self {
        Self { error: ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, detail), error_type: Some(error_type) }
    }
}

impl<E: Into<ApiError>> From<E> for RunflowError {
    fn from(error: E) -> Self {
        Self { error: error.into(), error_type: None }
    }
}

impl IntoResponse for RunflowError {
    fn into_response(self) -> Response {
        let Self { error, error_type } = self;
        let (code, usual) = match error.status.as_u16() {
            400 | 413 | 422 => ("validation_error", "invalid_request"),
            401 => ("authentication_error", "invalid_api_key"),
            403 => ("permission_error", "missing_scope"),
            404 => ("not_found", "not_found"),
            409 => ("validation_error", "conflict"),
            429 => ("rate_limit_error", "rate_limited"),
            _ => ("server_error", "unavailable"),
        };
        let errors: Vec<_> = error
            .fields
            .iter()
            .map(|(pointer, detail)| json!({"pointer": pointer, "detail": detail}))
            .collect();
        let body = json!({
            "type": "about:blank",
            "title": error.status.canonical_reason().unwrap_or("Error"),
            "status": error.status.as_u16(),
            "detail": error.detail,
            "code": code,
            "error_type": error_type.unwrap_or(usual),
            "message": error.detail,
            "errors": errors,
        });
        let mut response =
            (error.status, [(header::CONTENT_TYPE, "application/problem+json")], body.to_string())
                .into_response();
        if let Some(seconds) = error.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if error.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
