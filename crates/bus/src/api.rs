//! JetStream's JSON API (<https://docs.nats.io/reference/reference-protocols/nats_api_reference>), called directly so
//! that every error code is seen.

use crate::connection::{Bus, millis};
use crate::error::BusError;
use async_nats::client::{Request, RequestErrorKind};
use async_nats::{HeaderMap, Message};
use bytes::Bytes;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

pub(crate) const STREAM_NOT_FOUND: u64 = 10059;
pub(crate) const STREAM_NAME_EXISTS: u64 = 10058;
pub(crate) const CONSUMER_NOT_FOUND: u64 = 10014;
pub(crate) const MESSAGE_NOT_FOUND: u64 = 10037;
pub(crate) const SEQUENCE_NOT_FOUND: u64 = 10043;
pub(crate) const WRONG_LAST_SEQUENCE: u64 = 10071;

/// An error that the API answered with.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct ApiError {
    pub(crate) code: u16,
    #[serde(default)]
    pub(crate) err_code: u64,
    #[serde(default)]
    pub(crate) description: String,
}

impl ApiError {
    /// 4xx is our mistake, except for what names a state that changes; 5xx and 503 pass.
    pub(crate) fn into_bus_error(self, stream: &str) -> BusError {
        let text = format!("{} (error {})", self.description, self.err_code);
        match (self.err_code, self.code) {
            (STREAM_NOT_FOUND, _) => BusError::StreamMissing { stream: stream.to_owned() },
            (_, 400..=499) => BusError::Permanent(text),
            _ => BusError::Transient(text),
        }
    }
}

#[derive(Deserialize)]
struct Envelope {
    error: Option<ApiError>,
}

impl Bus {
    /// Sends a request and waits for one answer; waits for the connection first, within the same time.
    pub(crate) async fn ask(
        &self,
        subject: String,
        payload: Bytes,
        headers: Option<HeaderMap>,
        timeout: Duration,
    ) -> Result<Message, BusError> {
        if !self.is_connected() {
            self.connected(timeout).await?;
        }
        let mut request = Request::new().payload(payload).timeout(None);
        if let Some(headers) = headers {
            request = request.headers(headers);
        }
        let answer = tokio::time::timeout(timeout, self.client.send_request(subject.clone(), request)).await;
        match answer {
            Err(_) => Err(BusError::Timeout { subject, timeout_ms: millis(timeout) }),
            Ok(Ok(message)) => Ok(message),
            Ok(Err(error)) => Err(match error.kind() {
                RequestErrorKind::NoResponders => BusError::NoResponders { subject },
                RequestErrorKind::TimedOut => BusError::Timeout { subject, timeout_ms: millis(timeout) },
                RequestErrorKind::InvalidSubject | RequestErrorKind::MaxPayloadExceeded => {
                    BusError::Permanent(error.to_string())
                }
                RequestErrorKind::Other => BusError::Transient(error.to_string()),
            }),
        }
    }

    /// Calls `$JS.API.<method>`. The outer error is transport, the inner one the API's own answer.
    pub(crate) async fn api<T: DeserializeOwned>(
        &self,
        method: &str,
        body: &serde_json::Value,
    ) -> Result<Result<T, ApiError>, BusError> {
        let payload = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
        let message = self.ask(format!("$JS.API.{method}"), payload, None, self.request_timeout).await?;
        let unreadable =
            |error: serde_json::Error| BusError::Transient(format!("unreadable answer of {method}: {error}"));
        let envelope: Envelope = serde_json::from_slice(&message.payload).map_err(unreadable)?;
        match envelope.error {
            Some(error) => Ok(Err(error)),
            None => serde_json::from_slice(&message.payload).map(Ok).map_err(unreadable),
        }
    }
}
