//! Artefacts: lists for their owners, bytes and confirmations for whoever holds a link.
//!
//! A link carries a capability. A wrong one is answered exactly as an unknown artefact.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use bytes::Bytes;
use ringback_bus::{BusError, Verb};
use ringback_contracts::{Message as _, VERSION, v1};
use ringback_domain::{
    ArtifactId, JobId,
    artifact::{ArtifactState, confirmation_url, download_url, hex, url_segment},
};
use ringback_service_runtime::blobs::{BlobError, BlobKey, BlobStore};
use ringback_store::{
    artifacts::{ArtifactRow, artifact, artifact_by_id, artifacts_of_job},
    auth::ScopeSet,
};
use serde::Deserialize;
use serde_json::{Value, json};
use v1::{artifact_refusal::Why, artifact_reply::Reply, artifact_request::Request as Ask};

use super::{job_view::time, jobs::find};
use crate::{
    body::{BodyLimit, read_body},
    error::{ApiError, NativeError},
    render::{json_value, rfc3339},
    state::Api,
};

/// Size of the pieces of a streamed artefact.
const PIECE_BYTES: u64 = 1024 * 1024;
/// Most bytes of a confirmation.
const CONFIRMATION_BYTES: u64 = 64 * 1024;
/// Longest wait for the tracker: receivers give a confirmation a few seconds.
const ASK_WITHIN: Duration = Duration::from_millis(2_200);
const ASK_PAUSE: Duration = Duration::from_millis(100);

fn unknown() -> ApiError {
    ApiError::not_found("no such artefact: the link is wrong, or the artefact was removed long ago")
}

fn gone() -> ApiError {
    ApiError::new(
        StatusCode::GONE,
        "the artefact's time is over and its bytes are gone; artifacts.keep_ms of the endpoint sets that time",
    )
}

/// The artefact as its owner sees it.
pub(crate) fn artifact_json(api: &Api, row: &ArtifactRow) -> Value {
    let token = api.key.artifact_token(&row.id);
    let live =
        matches!(row.state, ArtifactState::Ready | ArtifactState::Confirmed | ArtifactState::Unconfirmed);
    let link = live.then(|| download_url(&api.base_url, &row.id, &token, &row.name));
    let confirmation = live.then(|| confirmation_url(&api.base_url, &row.id, &token));
    // Unknown where nobody was asked and nobody told.
    let asked = row.wait_until_ms.is_some() || row.confirmed_at_ms.is_some();
    json!({
        "id": row.id.to_string(),
        "job_id": row.public_job_id(),
        "run": row.run,
        "attempt": row.attempt,
        "filename": row.name,
        "content_type": row.content_type,
        "size_bytes": row.size_bytes,
        "sha256": hex(&row.sha256),
        "state": row.state.as_str(),
        "confirmed": asked.then_some(row.confirmed_at_ms.is_some()),
        "confirmed_in_time": asked.then_some(row.confirmed_at_ms.is_some() && row.given_up_at_ms.is_none()),
        "confirmed_at": time(row.confirmed_at_ms),
        "sha256_confirmed": row.confirmed_sha256,
        "wait_until": time(row.wait_until_ms),
        "given_up_at": time(row.given_up_at_ms),
        "created_at": rfc3339(row.created_at_ms),
        "ready_at": time(row.ready_at_ms),
        "expires_at": rfc3339(row.expires_at_ms),
        "download_url": link,
        "confirmation_url": confirmation,
    })
}

/// The artefacts of the job's current run that can be or could be fetched.
pub(crate) async fn of_job(
    api: &Api,
    project: ringback_domain::ProjectId,
    job: JobId,
    run: u32,
) -> Result<Vec<Value>, ApiError> {
    let rows = artifacts_of_job(api.store.read(), project, job).await?;
    Ok(rows
        .iter()
        .filter(|row| row.run == run && row.state != ArtifactState::Uploading)
        .map(|row| artifact_json(api, row))
        .collect())
}

/// `GET /v1/jobs/{id}/artifacts`: of all runs and attempts.
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let row = find(&api, &who, &id).await?;
    let rows = artifacts_of_job(api.store.read(), who.project, row.job.id).await?;
    let all: Vec<_> = rows
        .iter()
        .filter(|row| row.state != ArtifactState::Uploading)
        .map(|row| artifact_json(&api, row))
        .collect();
    Ok(json_value(StatusCode::OK, &json!({"artifacts": all})))
}

async fn owned(api: &Api, headers: &HeaderMap, scope: ScopeSet, id: &str) -> Result<ArtifactRow, ApiError> {
    let who = api.auth.authorize(headers, scope).await?;
    let absent = || ApiError::not_found("artefact not found: this project has no artefact with this id");
    let id = ArtifactId::parse(id).map_err(|_| absent())?;
    let row = artifact(api.store.read(), who.project, id).await?;
    row.filter(|row| row.state != ArtifactState::Uploading).ok_or_else(absent)
}

/// `GET /v1/artifacts/{id}`
pub(crate) async fn get(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let row = owned(&api, &headers, ScopeSet::READ, &id).await?;
    Ok(json_value(StatusCode::OK, &artifact_json(&api, &row)))
}

/// `GET /v1/artifacts/{id}/content`: the bytes, for the owner's key.
pub(crate) async fn content(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let row = owned(&api, &headers, ScopeSet::READ, &id).await?;
    Ok(serve(&api, &row, &headers).await?)
}

/// `DELETE /v1/artifacts/{id}`: its time is over now. Idempotent.
pub(crate) async fn delete(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let row = owned(&api, &headers, ScopeSet::SUBMIT, &id).await?;
    let id = Bytes::copy_from_slice(row.id.as_bytes());
    ask(&api, Ask::Remove(v1::RemoveArtifact { project_id: row.project.0, id })).await?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    Ok(response)
}

/// The artefact that a link opens.
async fn opened(api: &Api, id: &str, token: &str) -> Result<ArtifactRow, ApiError> {
    let id = ArtifactId::parse(id).map_err(|_| unknown())?;
    if !api.key.is_artifact_token(&id, token) {
        return Err(unknown());
    }
    let row = artifact_by_id(api.store.read(), id).await?;
    row.filter(|row| row.state != ArtifactState::Uploading).ok_or_else(unknown)
}

/// `GET /artifacts/{id}/{token}/{filename}`: no key, the link is the capability. The name is for people only.
pub(crate) async fn download(
    State(api): State<Arc<Api>>,
    Path((id, token, _filename)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let row = opened(&api, &id, &token).await?;
    tracing::info!(artifact_id = %row.id, job_id = row.public_job_id(), size_bytes = row.size_bytes, "artefact fetched");
    metrics::counter!("ringback_artifact_downloads_total").increment(1);
    Ok(serve(&api, &row, &headers).await?)
}

#[derive(Deserialize)]
struct Confirmation {
    job_id: Option<String>,
    status: Option<String>,
    #[serde(default)]
    timestamp: Option<serde_json::Number>,
    #[serde(default)]
    sha256: Option<String>,
}

/// `POST /artifacts/{id}/{token}/confirm`: the receiver has the file. Saying so twice is fine.
pub(crate) async fn confirm(
    State(api): State<Arc<Api>>,
    Path((id, token)): Path<(String, String)>,
    request: Request,
) -> Result<Response, NativeError> {
    let row = opened(&api, &id, &token).await?;
    let (head, body) = request.into_parts();
    let limit =
        BodyLimit { max_bytes: CONFIRMATION_BYTES.min(api.limits.max_body_bytes), setting: "max_body_bytes" };
    let body = read_body(&head.headers, body, limit).await?;
    let told: Confirmation = serde_json::from_slice(&body).map_err(|error| {
        ApiError::bad_request(format!(
            "the body must be JSON like {{\"job_id\", \"status\": \"downloaded\", \"timestamp\"}}: {error}"
        ))
    })?;
    let sha256 = check(&told, &row)?;
    let id = Bytes::copy_from_slice(row.id.as_bytes());
    ask(&api, Ask::Confirm(v1::ConfirmArtifact { id, sha256: sha256.into() })).await?;
    let receivers_clock_ms = told.timestamp.as_ref().and_then(serde_json::Number::as_i64);
    tracing::debug!(artifact_id = %row.id, receivers_clock_ms, "confirmation taken");
    let answer = json!({
        "success": true,
        "acknowledged": true,
        "job_id": row.public_job_id(),
        "artifact_id": row.id.to_string(),
        "status": "confirmed",
    });
    Ok(json_value(StatusCode::OK, &answer))
}

/// The hash that the receiver told, if any.
fn check(told: &Confirmation, row: &ArtifactRow) -> Result<Vec<u8>, ApiError> {
    match told.job_id.as_deref() {
        Some(job) if job == row.public_job_id() => {}
        Some(_) => return Err(ApiError::field("/job_id", "is not the job of this artefact")),
        None => {
            return Err(ApiError::field("/job_id", "is missing: send back the job_id of the notification"));
        }
    }
    match told.status.as_deref() {
        Some("downloaded") => {}
        Some(_) => return Err(ApiError::field("/status", "must be \"downloaded\"")),
        None => return Err(ApiError::field("/status", "is missing: it must be \"downloaded\"")),
    }
    let Some(text) = &told.sha256 else { return Ok(Vec::new()) };
    unhex(text).ok_or_else(|| ApiError::field("/sha256", "must be 64 hex digits"))
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    digits
        .chunks(2)
        .map(|pair| std::str::from_utf8(pair).ok().filter(|p| !p.starts_with('+')))
        .map(|pair| u8::from_str_radix(pair?, 16).ok())
        .collect()
}

/// Asks the tracker, whose answer comes after its commit; 503 inside 2.5 s.
async fn ask(api: &Api, request: Ask) -> Result<Reply, ApiError> {
    let payload: Bytes =
        v1::ArtifactRequest { version: VERSION, request: Some(request) }.encode_to_vec().into();
    let began = tokio::time::Instant::now();
    let away = || ApiError::unavailable("the state tracker does not answer now; try again");
    loop {
        let left = ASK_WITHIN.saturating_sub(began.elapsed());
        if left.is_zero() {
            return Err(away());
        }
        match api.bus.request(Verb::Artifacts, payload.clone(), left).await {
            Ok(answer) => match v1::ArtifactReply::decode(answer).ok().and_then(|r| r.reply) {
                Some(Reply::Refusal(refusal)) if refusal.why() == Why::Unavailable => {}
                Some(Reply::Refusal(refusal)) => return Err(refused(refusal)),
                Some(reply) => return Ok(reply),
                None => return Err(ApiError::unavailable("the state tracker's answer cannot be read")),
            },
            Err(BusError::Permanent(error)) => {
                tracing::error!(error, "a request about an artefact cannot be sent");
                return Err(away());
            }
            Err(_) => {}
        }
        tokio::time::sleep(ASK_PAUSE.min(left)).await;
    }
}

fn refused(refusal: v1::ArtifactRefusal) -> ApiError {
    match refusal.why() {
        Why::OtherBytes => ApiError::conflict(refusal.detail),
        Why::Expired => gone(),
        Why::NotFound | Why::Obsolete | Why::Unspecified | Why::Unavailable => unknown(),
    }
}

/// What a request wants of the bytes.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    Whole,
    Range(u64, u64),
    Unsatisfiable,
}

/// Reads `Range` (RFC 9110 section 14): one range of bytes. Several, or another unit, mean the whole.
fn part_of(headers: &HeaderMap, etag: &str, size: u64) -> Part {
    let text = |name| headers.get(name).and_then(|v: &HeaderValue| v.to_str().ok());
    if text(header::IF_RANGE).is_some_and(|tag| tag != etag) {
        return Part::Whole;
    }
    let Some(range) = text(header::RANGE).and_then(|r| r.strip_prefix("bytes=")) else { return Part::Whole };
    let Some((from, to)) = range.trim().split_once('-') else { return Part::Whole };
    let number =
        |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
    match (from, to) {
        ("", last) => match number(last) {
            None => Part::Whole,
            Some(0) => Part::Unsatisfiable,
            Some(_) if size == 0 => Part::Unsatisfiable,
            Some(n) => Part::Range(size.saturating_sub(n), size),
        },
        (from, to) => match (number(from), if to.is_empty() { Some(u64::MAX) } else { number(to) }) {
            (Some(from), Some(to)) if from <= to => {
                if from >= size {
                    Part::Unsatisfiable
                } else {
                    Part::Range(from, to.saturating_add(1).min(size))
                }
            }
            _ => Part::Whole,
        },
    }
}

/// The bytes of an artefact as a download that no browser runs.
async fn serve(api: &Api, row: &ArtifactRow, headers: &HeaderMap) -> Result<Response, ApiError> {
    let key = match (&row.blob_key, row.state) {
        (Some(key), ArtifactState::Ready | ArtifactState::Confirmed | ArtifactState::Unconfirmed) => key,
        _ => return Err(gone()),
    };
    let away = |error: BlobError| {
        tracing::warn!(%error, artifact_id = %row.id, "an artefact cannot be read");
        match error {
            BlobError::Transient(_) => {
                ApiError::unavailable("the blob store is not available now; try again")
            }
            _ => ApiError::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the artefact's bytes are missing; the server's log has the reason",
            ),
        }
    };
    let key = BlobKey::new(key.as_str()).map_err(away)?;
    let size = api.blobs.size(&key).await.map_err(away)?;
    let etag = format!("\"{}\"", hex(&row.sha256));
    let known = headers.get(header::IF_NONE_MATCH).and_then(|v| v.to_str().ok());
    let part = part_of(headers, &etag, size);
    let mut response = match part {
        _ if known.is_some_and(|known| known.split(',').any(|tag| tag.trim() == etag)) => {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            response
        }
        Part::Unsatisfiable => {
            let mut response =
                ApiError::new(StatusCode::RANGE_NOT_SATISFIABLE, format!("the artefact has {size} bytes"))
                    .problem();
            insert(&mut response, header::CONTENT_RANGE, &format!("bytes */{size}"));
            return Ok(response);
        }
        Part::Whole => bytes_of(&api.blobs, key, 0, size),
        Part::Range(from, to) => {
            let mut response = bytes_of(&api.blobs, key, from, to);
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            insert(&mut response, header::CONTENT_RANGE, &format!("bytes {from}-{}/{size}", to - 1));
            response
        }
    };
    let plain: String = row
        .name
        .chars()
        .map(|c| if c.is_ascii_graphic() && c != '"' && c != '\\' { c } else { '_' })
        .collect();
    // Not the URL's form of the name, in which one name has a meaning.
    let encoded = url_segment(&format!("x{}", row.name)).split_off(1);
    for (name, value) in [
        (header::CONTENT_TYPE, row.content_type.as_str()),
        (
            header::CONTENT_DISPOSITION,
            &format!("attachment; filename=\"{plain}\"; filename*=UTF-8''{encoded}"),
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; sandbox"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "private, no-transform"),
        (header::ACCEPT_RANGES, "bytes"),
        (header::ETAG, &etag),
    ] {
        insert(&mut response, name, value);
    }
    Ok(response)
}

fn insert(response: &mut Response, name: header::HeaderName, value: &str) {
    // A type that a handler made up and no header can carry is left out: then it is plain bytes.
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

/// A part of a blob, piece by piece.
fn bytes_of(blobs: &BlobStore, key: BlobKey, from: u64, to: u64) -> Response {
    let start = (blobs.clone(), key, from);
    let pieces = futures::stream::try_unfold(start, move |(blobs, key, at)| async move {
        if at >= to {
            return Ok::<_, BlobError>(None);
        }
        let piece = blobs.get_range(&key, at..to.min(at + PIECE_BYTES)).await.inspect_err(|error| {
            tracing::warn!(%error, "a download is broken off: its blob cannot be read");
        })?;
        if piece.is_empty() {
            return Err(BlobError::NotFound(key));
        }
        let at = at + piece.len() as u64;
        Ok(Some((piece, (blobs, key, at))))
    });
    let mut response = Response::new(Body::from_stream(pieces));
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(to - from));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_rfc_says() {
        let part = |range: &str, size| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RANGE, HeaderValue::from_str(range).unwrap());
            part_of(&headers, "\"e\"", size)
        };
        assert_eq!(part("bytes=0-0", 10), Part::Range(0, 1));
        assert_eq!(part("bytes=5-", 10), Part::Range(5, 10));
        assert_eq!(part("bytes=5-99", 10), Part::Range(5, 10));
        assert_eq!(part("bytes=-3", 10), Part::Range(7, 10));
        assert_eq!(part("bytes=-30", 10), Part::Range(0, 10));
        assert_eq!(part("bytes=10-", 10), Part::Unsatisfiable);
        assert_eq!(part("bytes=-0", 10), Part::Unsatisfiable);
        assert_eq!(part("bytes=-1", 0), Part::Unsatisfiable);
        for whole in ["bytes=3-1", "bytes=0-1,4-5", "items=0-1", "bytes=a-b", "bytes=", "bytes=+1-2"] {
            assert_eq!(part(whole, 10), Part::Whole, "{whole}");
        }
        let mut headers = HeaderMap::new();
        headers.insert(header::RANGE, HeaderValue::from_static("bytes=1-2"));
        headers.insert(header::IF_RANGE, HeaderValue::from_static("\"old\""));
        assert_eq!(part_of(&headers, "\"e\"", 10), Part::Whole);
    }

    #[test]
    fn hashes_are_64_hex_digits() {
        assert_eq!(unhex(&"aB".repeat(32)), Some(vec![0xab; 32]));
        for bad in ["", "ab", &"zz".repeat(32), &"+1".repeat(32), &"a".repeat(63), &"é".repeat(32)] {
            assert_eq!(unhex(bad), None, "{bad}");
        }
    }
}
