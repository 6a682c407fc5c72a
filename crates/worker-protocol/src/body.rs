//! Reading request bodies with a cap, without ever refusing one.

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;

/// A body that was read to its end.
pub(crate) enum ReadBody {
    /// Within the cap.
    Whole(Bytes),
    /// Larger than the cap; its bytes are gone.
    TooLarge {
        /// How many bytes came.
        bytes: u64,
    },
}

/// Reads to the end even above the cap: the SDK drops a result whose connection breaks, and would then
/// look like a healthy worker that lost its job.
///
/// # Errors
/// The connection broke before the end.
pub(crate) async fn read(body: Body, announced: Option<u64>, cap: usize) -> Result<ReadBody, axum::Error> {
    let reserve = announced.and_then(|n| usize::try_from(n).ok()).unwrap_or(0).min(cap);
    let mut whole = BytesMut::with_capacity(reserve);
    let mut total: u64 = 0;
    let mut stream = body.into_data_stream();
    while let Some(piece) = stream.next().await {
        let piece = piece?;
        total += piece.len() as u64;
        if total <= cap as u64 {
            whole.extend_from_slice(&piece);
        } else {
            whole = BytesMut::new();
        }
    }
    if total > cap as u64 {
        return Ok(ReadBody::TooLarge { bytes: total });
    }
    Ok(ReadBody::Whole(whole.freeze()))
}
