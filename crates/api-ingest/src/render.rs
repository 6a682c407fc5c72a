//! JSON answers. Outputs are verbatim bytes from SQL or the blob store and are never parsed; a large one is streamed.

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use bytes::Bytes;
use futures::stream;
use ringback_domain::webhook::body::Part;
use ringback_service_runtime::blobs::{BlobError, BlobKey, BlobStore};
use ringback_store::views::StoredJson;

/// Size of the pieces of a streamed blob.
const PIECE_BYTES: u64 = 1024 * 1024;

/// A JSON answer of bytes.
pub(crate) fn json_bytes(status: StatusCode, body: impl Into<Bytes>) -> Response {
    let mut response = Response::new(Body::from(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A JSON answer of a value.
pub(crate) fn json_value(status: StatusCode, value: &serde_json::Value) -> Response {
    json_bytes(status, value.to_string())
}

/// A 200 of parts, some of which may lie in the blob store.
pub(crate) fn parts_response(blobs: &BlobStore, parts: Vec<Part>, content_type: &'static str) -> Response {
    let size_bytes: u64 = parts
        .iter()
        .map(|part| match part {
            Part::Inline(bytes) => bytes.len() as u64,
            Part::Blob { size_bytes, .. } => *size_bytes,
        })
        .sum();
    let mut response = match <[Part; 1]>::try_from(parts) {
        Ok([Part::Inline(bytes)]) => Response::new(Body::from(bytes)),
        Ok([blob]) => Response::new(Body::from_stream(pieces(blobs.clone(), vec![blob]))),
        Err(parts) => Response::new(Body::from_stream(pieces(blobs.clone(), parts))),
    };
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(size_bytes));
    response
}

/// The bytes of parts in order. An error in the middle breaks the connection off: the client sees that the answer is
/// not whole.
pub(crate) fn pieces(
    blobs: BlobStore,
    parts: Vec<Part>,
) -> impl futures::Stream<Item = Result<Bytes, BlobError>> + Send + 'static {
    let start = (blobs, parts.into_iter(), None::<(BlobKey, u64, u64)>);
    stream::try_unfold(start, async |(blobs, mut parts, open)| {
        let (key, from, size) = match open {
            Some(open) => open,
            None => match parts.next() {
                None => return Ok(None),
                Some(Part::Inline(bytes)) => return Ok(Some((Bytes::from(bytes), (blobs, parts, None)))),
                Some(Part::Blob { key, size_bytes }) => (BlobKey::new(key)?, 0, size_bytes),
            },
        };
        let to = size.min(from + PIECE_BYTES);
        let piece = blobs.get_range(&key, from..to).await.inspect_err(|error| {
            tracing::warn!(%error, "an answer is broken off: its blob cannot be read");
        })?;
        // A blob that is shorter than its row says ends where it ends.
        let next = if to < size && piece.len() as u64 == to - from { Some((key, to, size)) } else { None };
        Ok(Some((piece, (blobs, parts, next))))
    })
}

/// A stored payload as a part.
pub(crate) fn part_of(stored: StoredJson) -> Part {
    match stored {
        StoredJson::Inline(bytes) => Part::Inline(bytes),
        StoredJson::Blob { key, size_bytes } => Part::Blob { key, size_bytes },
    }
}

/// Milliseconds since 1970 as RFC 3339 in UTC with milliseconds.
pub(crate) fn rfc3339(ms: i64) -> String {
    let (days, of_day) = (ms.div_euclid(86_400_000), ms.rem_euclid(86_400_000));
    // Howard Hinnant's days_to_civil: exact over the whole range of days.
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + i64::from(month <= 2);
    let (h, m, s, milli) = (of_day / 3_600_000, of_day / 60_000 % 60, of_day / 1_000 % 60, of_day % 1_000);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{milli:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_people_write_them() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_123, "2000-02-29T00:00:00.123Z"),
            (1_795_224_338_007, "2026-11-21T01:25:38.007Z"),
            (-1, "1969-12-31T23:59:59.999Z"),
            (4_102_444_799_999, "2099-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(rfc3339(ms), text);
        }
    }
}
