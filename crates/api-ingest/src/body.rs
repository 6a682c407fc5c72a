//! Reading a request body up to a limit.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode, header},
};
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;

use ringback_service_runtime::listener::BodyTooSlow;

use crate::error::ApiError;

/// A limit and the setting that changes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BodyLimit {
    pub(crate) max_bytes: u64,
    pub(crate) setting: &'static str,
}

/// After a body turned out too large, so much of it is still read and thrown away, so that the client gets to read
/// the answer instead of a broken connection.
const DISCARD_MAX_BYTES: u64 = 64 * 1024 * 1024;
const DISCARD_TIME: Duration = Duration::from_secs(2);

/// Reads a body, counting as it comes. A body of one piece is not copied.
pub(crate) async fn read_body(headers: &HeaderMap, body: Body, limit: BodyLimit) -> Result<Bytes, ApiError> {
    let told =
        headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
    let mut pieces = body.into_data_stream();
    if told.is_some_and(|n| n > limit.max_bytes) {
        discard(&mut pieces).await;
        return Err(too_large(limit));
    }
    let mut first: Option<Bytes> = None;
    let mut all: Option<BytesMut> = None;
    let mut total = 0_u64;
    loop {
        let Some(piece) = pieces.next().await else { break };
        let piece = piece.map_err(broken)?;
        total += piece.len() as u64;
        if total > limit.max_bytes {
            discard(&mut pieces).await;
            return Err(too_large(limit));
        }
        match (&mut all, &first) {
            (Some(all), _) => all.extend_from_slice(&piece),
            (None, None) => first = Some(piece),
            (None, Some(begun)) => {
                let expected = told.unwrap_or(0).max((begun.len() + piece.len()) as u64);
                let mut joined = BytesMut::with_capacity(usize::try_from(expected).unwrap_or(0));
                joined.extend_from_slice(begun);
                joined.extend_from_slice(&piece);
                all = Some(joined);
            }
        }
    }
    Ok(all.map(BytesMut::freeze).or(first).unwrap_or_default())
}

fn broken(error: axum::Error) -> ApiError {
    match BodyTooSlow::find(&error) {
        Some(slow) => ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("{slow} (setting server.body_timeout_ms); send it again over a faster connection"),
        ),
        None => ApiError::bad_request("the request body ended before it was complete"),
    }
}

async fn discard(pieces: &mut axum::body::BodyDataStream) {
    let mut left = DISCARD_MAX_BYTES;
    // What is not read in time stays unread: the connection is closed then.
    let _ = tokio::time::timeout(DISCARD_TIME, async {
        while let Some(Ok(piece)) = pieces.next().await {
            left = left.saturating_sub(piece.len() as u64);
            if left == 0 {
                break;
            }
        }
    })
    .await;
}

fn too_large(limit: BodyLimit) -> ApiError {
    ApiError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        format!(
            "the request body is larger than {} bytes (setting server.{}); send less, or put large data where the \
             job can download it",
            limit.max_bytes, limit.setting
        ),
    )
}
