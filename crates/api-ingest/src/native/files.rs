//! `/v1/files`: what a batch leaves, one JSON line per job. `batch.completed` names both files; they are rendered on
//! demand and live as long as the batch.

use std::sync::Arc;

use axum::{
    extract::{Path, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use ringback_domain::batch::BatchStatus;
use ringback_store::{
    auth::ScopeSet,
    batches::{BatchRow, batch},
    batches_fold::FileKind,
};
use serde_json::json;

use super::batches::{Lines, item_lines};
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
    if row.status == BatchStatus::InProgress {
        return Err(ApiError::conflict(format!(
            "the batch is IN_PROGRESS ({} of {} jobs have ended); its files come with its end",
            row.counts.ended(),
            row.counts.total
        )));
    }
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
    let lines = match kind {
        FileKind::Output => Lines::Completed,
        FileKind::Errors => Lines::Others,
    };
    let name = format!("attachment; filename=\"{}.jsonl\"", kind.id(row.id));
    let mut response = item_lines(&api, row.id, lines);
    if let Ok(name) = HeaderValue::from_str(&name) {
        response.headers_mut().insert(header::CONTENT_DISPOSITION, name);
    }
    Ok(response)
}
