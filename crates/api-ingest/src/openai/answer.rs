//! The answer to a request that is no stream: what the handler returned, as the body.
//!
//! A generator that collects its yields (vLLM's worker) returns a list of one value, which is the answer. One that does
//! not collect them left them as pieces. A text is the body itself, whatever it holds.

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use ringback_domain::JobStatus;
use ringback_service_runtime::blobs::{BlobError, BlobKey};
use ringback_store::{
    JobRow,
    cursors::pieces_after,
    views::{ResultView, StoredJson, result_of},
};
use serde_json::value::RawValue;

use super::error::OpenAiError;
use crate::{
    error::ApiError,
    render::{json_bytes, part_of, parts_response},
    runpod::stream::attempt_of,
    state::Api,
};

/// The answer of a job that has ended.
pub(super) async fn of_end(api: &Api, row: &JobRow) -> Result<Response, OpenAiError> {
    let result = result_of(api.store.read(), row.job.id, row.job.run).await?;
    let result = completed(row.job.status(), result)?;
    let Some(output) = result.output else { return of_pieces(api, row).await };
    let output = match output {
        // An object is passed on as it is stored: it need not fit into memory.
        StoredJson::Blob { .. } if starts_object(api, &output).await? => {
            return Ok(parts_response(&api.blobs, vec![part_of(output)], "application/json"));
        }
        stored => load(api, stored).await?,
    };
    match whole(&output) {
        Some(body) => Ok(body.into_response()?),
        None => of_pieces(api, row).await,
    }
}

/// The result of a job that completed.
pub(super) fn completed(status: JobStatus, result: Option<ResultView>) -> Result<ResultView, OpenAiError> {
    match (status, result) {
        (JobStatus::Completed, Some(result)) => Ok(result),
        (JobStatus::Completed, None) => Err(OpenAiError::nothing_returned()),
        (status, result) => Err(OpenAiError::of_job(status, result.as_ref())),
    }
}

/// What the handler yielded and did not return.
async fn of_pieces(api: &Api, row: &JobRow) -> Result<Response, OpenAiError> {
    let mut all = b"[".to_vec();
    let mut next_n = 0;
    while let Some(attempt) = attempt_of(row) {
        let (pieces, more) = pieces_after(api.store.read(), row.job.id, row.job.run, attempt, next_n).await?;
        for (n, piece) in pieces {
            if all.len() > 1 {
                all.push(b',');
            }
            all.extend_from_slice(&piece);
            next_n = n + 1;
        }
        if all.len() as u64 > api.blobs.max_blob_bytes() {
            return Err(ApiError::unavailable(
                "the handler's pieces are too large for one answer; ask with \"stream\": true",
            )
            .into());
        }
        if !more {
            break;
        }
    }
    all.push(b']');
    whole(&all.into()).ok_or_else(OpenAiError::nothing_returned)?.into_response()
}

async fn starts_object(api: &Api, output: &StoredJson) -> Result<bool, ApiError> {
    let StoredJson::Blob { key, size_bytes } = output else { return Ok(false) };
    let key = BlobKey::new(key.clone()).map_err(unreadable)?;
    let first = api.blobs.get_range(&key, 0..(*size_bytes).min(1)).await.map_err(unreadable)?;
    Ok(first.first() == Some(&b'{'))
}

/// An output as bytes.
pub(super) async fn load(api: &Api, stored: StoredJson) -> Result<Bytes, ApiError> {
    match stored {
        StoredJson::Inline(bytes) => Ok(bytes.into()),
        StoredJson::Blob { key, .. } => {
            let key = BlobKey::new(key).map_err(unreadable)?;
            api.blobs.get(&key, api.blobs.max_blob_bytes()).await.map_err(unreadable)
        }
    }
}

// By value: it is what `map_err` hands over.
#[allow(clippy::needless_pass_by_value)]
fn unreadable(error: BlobError) -> ApiError {
    tracing::warn!(%error, "an output cannot be read");
    ApiError::unavailable("the job's output cannot be read now; its status has it later")
}

/// A body with its type.
#[derive(Debug, PartialEq, Eq)]
enum Whole {
    Json(Bytes),
    Text(String),
}

impl Whole {
    fn into_response(self) -> Result<Response, OpenAiError> {
        let (body, content_type) = match self {
            Self::Json(json) => {
                return match OpenAiError::of_output(&json) {
                    Some(error) => Err(error),
                    None => Ok(json_bytes(axum::http::StatusCode::OK, json)),
                };
            }
            Self::Text(text) => {
                let content_type = match text.trim_start().as_bytes().first() {
                    Some(b'{' | b'[') => "application/json",
                    _ if text.starts_with("data:") => "text/event-stream",
                    _ => "text/plain; charset=utf-8",
                };
                (text, content_type)
            }
        };
        let mut response = Response::new(Body::from(body));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        Ok(response)
    }
}

/// The body that an output is; none where it holds nothing.
fn whole(output: &Bytes) -> Option<Whole> {
    let text = std::str::from_utf8(output).ok()?.trim();
    match text.as_bytes().first()? {
        b'[' => {
            let all: Vec<&RawValue> = serde_json::from_str(text).ok()?;
            match all.as_slice() {
                [] => None,
                [one] => one_of(one.get()),
                many => {
                    let texts: Option<Vec<String>> =
                        many.iter().map(|one| serde_json::from_str(one.get()).ok()).collect();
                    Some(
                        texts
                            .map_or_else(|| Whole::Json(output.clone()), |texts| Whole::Text(texts.concat())),
                    )
                }
            }
        }
        _ => one_of(text),
    }
}

fn one_of(json: &str) -> Option<Whole> {
    match json.as_bytes().first()? {
        b'"' => Some(Whole::Text(serde_json::from_str(json).ok()?)),
        b'n' => None,
        _ => Some(Whole::Json(Bytes::copy_from_slice(json.as_bytes()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(output: &str) -> Option<Whole> {
        whole(&Bytes::copy_from_slice(output.as_bytes()))
    }

    fn json(text: &str) -> Option<Whole> {
        Some(Whole::Json(Bytes::copy_from_slice(text.as_bytes())))
    }

    #[test]
    fn the_one_collected_value_is_the_answer() {
        assert_eq!(body(r#"[{"a": 1e400}]"#), json(r#"{"a": 1e400}"#));
        assert_eq!(body(r#" {"a":1} "#), json(r#"{"a":1}"#));
        assert_eq!(
            body(r#"["data: 1\n\n","data: [DONE]\n\n"]"#),
            Some(Whole::Text("data: 1\n\ndata: [DONE]\n\n".into()))
        );
        assert_eq!(body(r#"[{"a":1},"x"]"#), json(r#"[{"a":1},"x"]"#));
        assert_eq!(body(r#""text""#), Some(Whole::Text("text".into())));
        for nothing in ["[]", "null", "[null]", ""] {
            assert_eq!(body(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn a_text_is_told_by_how_it_begins() {
        for (text, content_type) in [
            ("{\"a\":1}", "application/json"),
            ("data: 1\n\n", "text/event-stream"),
            ("WEBVTT", "text/plain; charset=utf-8"),
        ] {
            let response = Whole::Text(text.into()).into_response().unwrap();
            assert_eq!(response.headers()[header::CONTENT_TYPE], content_type);
        }
        assert!(Whole::Json(Bytes::from_static(br#"{"error":{"code":400}}"#)).into_response().is_err());
    }
}
