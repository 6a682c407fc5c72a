//! `/v1/files`: what a batch leaves, one JSON line per job. `batch.completed` names both files; they are rendered on
//! demand and live as long as the batch. Bodies also carry links to them that need no key: such a link is a capability,
//! the same in every body and every retry, and only retention ends it.

use std::sync::Arc;

use axum::{
    extract::{Path, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use ringback_domain::BatchId;
use ringback_domain::batch::BatchFile;
use ringback_store::{
    auth::ScopeSet,
    batches::{BatchRow, batch, jobs_left},
    batches_fold::FileKind,
};
use serde_json::json;

use super::batches::{check_ended, item_lines};
use crate::{
    auth::Principal,
    error::{ApiError, NativeError},
    render::{json_value, rfc3339},
    state::Api,
};

/// A file of a batch of the asker's project that has ended.
async fn find(api: &Api, who: &Principal, id: &str) -> Result<(BatchRow, FileKind), ApiError> {
    let absent =
        || ApiError::not_found("file not found: this project has no file with this id, or its time is over");
    let (id, kind) = FileKind::parse(id).ok_or_else(absent)?;
    let row = batch(api.store.read(), id).await?;
    let row = row.filter(|row| row.project == who.project && row.opened_at.is_some()).ok_or_else(absent)?;
    check_ended(&row)?;
    Ok((row, kind))
}

/// `GET /v1/files/{id}`
pub(crate) async fn get(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let (row, kind) = find(&api, &who, &id).await?;
    let (purpose, lines) = match kind {
        FileKind::Output => ("batch_output", row.counts.completed),
        FileKind::Errors => ("batch_errors", row.counts.failed + row.counts.cancelled),
    };
    Ok(json_value(
        StatusCode::OK,
        &json!({
            "id": kind.id(row.id),
            "object": "file",
            "purpose": purpose,
            "filename": format!("{}.jsonl", kind.id(row.id)),
            "lines": lines,
            "batch_id": row.id.to_string(),
            "created_at": row.ended_at.map(|at| rfc3339(at.0)),
            "content_url": format!("{}/v1/files/{}/content", api.base_url, kind.id(row.id)),
        }),
    ))
}

/// `GET /v1/files/{id}/content`: the lines of `/v1/batches/{id}/results` whose job completed, or did not.
pub(crate) async fn content(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let (row, kind) = find(&api, &who, &id).await?;
    let file = match kind {
        FileKind::Output => BatchFile::Output,
        FileKind::Errors => BatchFile::Errors,
    };
    Ok(attachment(item_lines(&api, row.id, file), &format!("{}.jsonl", kind.id(row.id))))
}

/// A download that no browser runs.
fn attachment(mut response: Response, filename: &str) -> Response {
    let headers = response.headers_mut();
    if let Ok(name) = HeaderValue::from_str(&format!("attachment; filename=\"{filename}\"")) {
        headers.insert(header::CONTENT_DISPOSITION, name);
    }
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; sandbox"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "private, no-transform"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// `GET /batches/{id}/{token}/{file}`: no key, the link is the capability. A wrong one is answered exactly as an unknown
/// batch; a right one whose batch is not there any more proves that it was.
pub(crate) async fn linked(
    State(api): State<Arc<Api>>,
    Path((id, token, file)): Path<(String, String, String)>,
) -> Result<Response, NativeError> {
    let unknown = || ApiError::not_found("no such file: the link is wrong");
    let id = BatchId::parse(&id).map_err(|_| unknown())?;
    if !api.key.is_batch_token(&id, &token) {
        return Err(unknown().into());
    }
    let file = BatchFile::of_name(&file).ok_or_else(unknown)?;
    let gone = || {
        ApiError::new(
            StatusCode::GONE,
            "the batch's time is over and results of it are gone; retention of the endpoint sets that time",
        )
    };
    let row = batch(api.store.read(), id).await?.filter(|row| row.opened_at.is_some()).ok_or_else(gone)?;
    check_ended(&row)?;
    // A file with holes would pass for a whole one.
    if jobs_left(api.store.read(), id).await? < u64::from(row.counts.total) {
        return Err(gone().into());
    }
    tracing::info!(batch_id = %id, file = file.name(), "batch file fetched");
    Ok(attachment(item_lines(&api, id, file), &format!("{}-{}", id.simple(), file.name())))
}
