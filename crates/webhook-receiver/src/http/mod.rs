//! Verification as an axum extractor and as a tower layer.

mod extract;
mod layer;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use http::request::Parts;
use http::{HeaderMap, Request, StatusCode, header};
use ringback_service_runtime::time::now_ms;
use serde_json::json;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::event::ParseError;
use crate::store::StoreError;
use crate::verify::{LARGEST_MAX_BODY_BYTES, Proof, Refusal, Trust};

pub use extract::{FromBody, Verified};
pub use layer::{VerifyLayer, VerifyService};

/// Longest time that a sender may take for its body.
const BODY_TIME: Duration = Duration::from_secs(30);

/// Memory for bodies that nobody has judged yet, of all requests together: whoever reaches the listener can fill no
/// more, and a slow sender takes as much as it has sent.
static UNJUDGED: Semaphore = Semaphore::const_new(LARGEST_MAX_BODY_BYTES / UNIT_BYTES);
const UNIT_BYTES: usize = 64 * 1024;

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
    /// Too many bodies are on their way in.
    #[error("too many requests at once; send it again")]
    Busy,
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
            Self::Store | Self::Busy => StatusCode::SERVICE_UNAVAILABLE,
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
            Self::Busy => "busy",
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
    let reading = read(body, trust.max_body_bytes);
    let late = |_| Rejection::Body(format!("it took longer than {} s", BODY_TIME.as_secs()));
    let (body, _held) = tokio::time::timeout(BODY_TIME, reading).await.map_err(late)??;
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

/// Reads a body up to the cap. What is read is held by a permit until it has been judged.
async fn read(body: Body, max_bytes: usize) -> Result<(Bytes, Vec<SemaphorePermit<'static>>), Rejection> {
    let mut chunks = body.into_data_stream();
    let (mut all, mut held, mut paid_bytes) = (BytesMut::new(), Vec::new(), 0);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| Rejection::Body(error.to_string()))?;
        if all.len() + chunk.len() > max_bytes {
            return Err(Rejection::Refused(Refusal::TooLarge { max_bytes }));
        }
        all.extend_from_slice(&chunk);
        while paid_bytes < all.len() {
            held.push(UNJUDGED.try_acquire().map_err(|_| Rejection::Busy)?);
            paid_bytes += UNIT_BYTES;
        }
    }
    Ok((all.freeze(), held))
}

#[cfg(test)]
mod tests;
