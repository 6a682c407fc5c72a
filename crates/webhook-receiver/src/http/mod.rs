//! Verification as an axum extractor and as a tower layer.

mod extract;
mod layer;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::ConnectInfo;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, Request, StatusCode, header};
use ringback_service_runtime::time::now_ms;
use serde_json::json;

use crate::event::ParseError;
use crate::store::StoreError;
use crate::verify::{Proof, Refusal, Trust};

pub use extract::{FromBody, Verified};
pub use layer::{VerifyLayer, VerifyService};

/// Longest time that a sender may take for its body.
const BODY_TIME: Duration = Duration::from_secs(30);

/// Why a request is turned away.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Rejection {
    /// It is not trusted.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It is no JSON.
    #[error("the content type must be application/json")]
    NotJson,
    /// Its body stopped, or came too slowly.
    #[error("the body did not arrive: {0}")]
    Body(String),
    /// It is trusted, and no event that this route takes.
    #[error(transparent)]
    Invalid(#[from] ParseError),
    /// It is another event than the route is for.
    #[error("the event is of type {kind}, this address takes {expected}")]
    WrongRoute {
        /// What it is.
        kind: String,
        /// What the route takes.
        expected: String,
    },
    /// It could not be written down.
    #[error("the event could not be stored; send it again")]
    Store,
}

impl From<StoreError> for Rejection {
    fn from(error: StoreError) -> Self {
        tracing::error!(%error, "an event could not be stored");
        Self::Store
    }
}

impl Rejection {
    /// The status it is answered with.
    #[must_use]
    pub const fn status(&self) -> StatusCode {
        match self {
            Self::Refused(Refusal::TooLarge { .. }) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Refused(Refusal::UnsignedHost { .. } | Refusal::UnsignedThroughProxy(_)) => {
                StatusCode::FORBIDDEN
            }
            Self::Refused(_) => StatusCode::UNAUTHORIZED,
            Self::NotJson => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Body(_) => StatusCode::REQUEST_TIMEOUT,
            Self::Invalid(_) | Self::WrongRoute { .. } => StatusCode::BAD_REQUEST,
            Self::Store => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// A short stable name.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Refused(refusal) => refusal.code(),
            Self::NotJson => "not_json",
            Self::Body(_) => "body_missing",
            Self::Invalid(_) => "invalid_event",
            Self::WrongRoute { .. } => "wrong_route",
            Self::Store => "store_failed",
        }
    }
}

impl IntoResponse for Rejection {
    fn into_response(self) -> Response {
        let mut response = problem(self.status(), self.code(), &self.to_string());
        // For a layer around the routes that tells of it.
        response.extensions_mut().insert(self);
        response
    }
}

/// An answer as RFC 9457 has it.
pub(crate) fn problem(status: StatusCode, code: &str, detail: &str) -> Response {
    let body = json!({
        "type": "about:blank",
        "title": status.canonical_reason().unwrap_or("error"),
        "status": status.as_u16(),
        "detail": detail,
        "code": code,
    });
    let mut response = (status, body.to_string()).into_response();
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/problem+json"));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("5"));
    }
    response
}

/// Reads a request's raw body and judges it.
pub(crate) async fn judge(
    trust: &Arc<Trust>,
    request: Request<Body>,
) -> Result<(Parts, Bytes, Proof), Rejection> {
    let (parts, body) = request.into_parts();
    if !is_json(&parts.headers) {
        return Err(Rejection::NotJson);
    }
    let too_large = Rejection::Refused(Refusal::TooLarge { max_bytes: trust.max_body_bytes });
    let announced =
        parts.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > trust.max_body_bytes as u64) {
        return Err(too_large);
    }
    let body = match tokio::time::timeout(BODY_TIME, to_bytes(body, trust.max_body_bytes)).await {
        Ok(Ok(body)) => body,
        Ok(Err(error)) if is_length_limit(&error) => return Err(too_large),
        Ok(Err(error)) => return Err(Rejection::Body(error.to_string())),
        Err(_) => return Err(Rejection::Body(format!("it took longer than {} s", BODY_TIME.as_secs()))),
    };
    let proof = trust.verify(&parts.headers, &body, peer(&parts), now_ms() / 1000)?;
    Ok((parts, body, proof))
}

/// The sender's address as the listener saw it; headers that claim another are not read.
fn peer(parts: &Parts) -> Option<IpAddr> {
    parts.extensions.get::<ConnectInfo<SocketAddr>>().map(|info| info.0.ip())
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else {
        return false;
    };
    let kind = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
}

fn is_length_limit(error: &axum::Error) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = next {
        if current.to_string().contains("length limit exceeded") {
            return true;
        }
        next = current.source();
    }
    false
}

#[cfg(test)]
mod tests;
