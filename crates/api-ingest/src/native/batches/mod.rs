//! `/v1/batches`, and the routes of batch templates.

mod results;
mod submit;
mod templates;

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::{
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use bytes::Bytes;
use ringback_contracts::v1;
use ringback_domain::{BatchId, batch::BatchStatus, webhook::runflow_body};
use ringback_store::{
    auth::ScopeSet,
    batches::{BatchItem, BatchRow, batch, batch_items},
};
use serde_json::{Value, json};
use tokio::time::Instant;
use uuid::Uuid;

pub(crate) use self::{
    results::{check_ended, item_lines, results},
    submit::post,
    templates::{template_get, template_post},
};
use super::{PAGE_MAX, job_view::time, jobs::deliveries_json, limit_of, parameter};
use crate::{
    auth::Principal,
    error::{ApiError, NativeError},
    render::{json_value, rfc3339},
    runpod::control::{refused, unreadable},
    state::Api,
};

/// Jobs per command of a cancellation, and the time after which its answer is given.
const CANCEL_CHUNK: u32 = 500;
const CANCEL_WITHIN: Duration = Duration::from_millis(1_500);

/// A batch of the asker's project that was opened.
pub(crate) async fn find(api: &Api, who: &Principal, id: &str) -> Result<BatchRow, ApiError> {
    let absent = || {
        ApiError::not_found(
            "batch not found: this project has no batch with this id, or its retention time is over",
        )
    };
    let id = BatchId::parse(id).map_err(|_| absent())?;
    let row = batch(api.store.read(), id).await?;
    row.filter(|row| row.project == who.project && row.opened_at.is_some()).ok_or_else(absent)
}

fn result_url(api: &Api, row: &BatchRow) -> Option<String> {
    (row.status != BatchStatus::InProgress).then(|| format!("{}/v1/batches/{}/results", api.base_url, row.id))
}

fn batch_json(api: &Api, row: &BatchRow) -> Value {
    let mut shown = json!({
        "batch_id": row.id.to_string(),
        "endpoint": &*api.catalog.name_of(row.endpoint),
        "total": row.counts.total,
        "completed": row.counts.completed,
        "failed": row.counts.failed,
        "cancelled": row.counts.cancelled,
        "status": row.status.as_str(),
        "on_failure": if row.cancel_rest { "cancel_rest" } else { "continue" },
        "created_at": rfc3339(row.created_at.0),
        "ended_at": time(row.ended_at.map(|t| t.0)),
    });
    if let Some(url) = result_url(api, row) {
        shown["result_url"] = url.into();
    }
    // Runflow's names for the same facts.
    shown["id"] = row.id.to_string().into();
    shown["status_code"] = runflow_body::batch_status(row.status, &row.counts).into();
    shown["items_total"] = row.counts.total.into();
    shown["items_succeeded"] = row.counts.completed.into();
    shown["items_failed"] = row.counts.failed.into();
    shown["items_cancelled"] = row.counts.cancelled.into();
    if let Some(metadata) = row.metadata.as_deref().and_then(|m| serde_json::from_slice::<Value>(m).ok()) {
        shown["metadata"] = metadata;
    }
    shown
}

/// `GET /v1/batches/{id}?items=true&cursor=&limit=`
pub(crate) async fn get(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let row = find(&api, &who, &id).await?;
    let mut shown = batch_json(&api, &row);
    if parameter(&query, "items", "true or false", |text| text.parse::<bool>().ok())?.unwrap_or(false) {
        let limit = limit_of(&query)?.min(PAGE_MAX);
        let from =
            parameter(&query, "cursor", "the next_cursor of a former page", |text| text.parse::<u32>().ok())?;
        let items = batch_items(api.store.read(), row.id, from.unwrap_or(0), limit, false).await?;
        let next = if items.len() == limit as usize {
            items.last().map(|i| (i.index + 1).to_string())
        } else {
            None
        };
        shown["items"] = items.iter().map(item_json).collect();
        shown["next_cursor"] = next.into();
    }
    Ok(json_value(StatusCode::OK, &shown))
}

fn item_json(item: &BatchItem) -> Value {
    let ended = item.status.is_terminal();
    json!({
        "index": item.index,
        "sequence_index": item.index,
        "job_id": item.job.to_string(),
        "run_id": item.job.to_string(),
        "status_code": runflow_body::run_status(item.status),
        "client_ref": item.client_ref,
        "status": item.status.as_str(),
        "delay_time_ms": ended.then_some(item.delay_ms),
        "execution_time_ms": ended.then_some(item.execution_ms),
        "error": item.result.as_ref().and_then(|r| r.error.as_deref()),
    })
}

/// `GET /v1/batches/{id}/deliveries`: the delivery of its `callback_url`.
pub(crate) async fn deliveries(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let row = find(&api, &who, &id).await?;
    let deliveries = deliveries_json(&api, &who, Uuid::from_bytes(*row.id.as_bytes())).await?;
    Ok(json_value(StatusCode::OK, &json!({"deliveries": deliveries})))
}

/// `POST /v1/batches/{id}/cancel`: cancels the batch's jobs that have not ended.
pub(crate) async fn cancel(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::SUBMIT).await?;
    let row = find(&api, &who, &id).await?;
    let until = Instant::now() + CANCEL_WITHIN;
    loop {
        let command = v1::CancelBatch {
            project_id: who.project.0,
            batch_id: Bytes::copy_from_slice(row.id.as_bytes()),
            limit: CANCEL_CHUNK,
            by_request: true,
        };
        match api.command(v1::command::Command::CancelBatch(command)).await? {
            // What is left after the time is worked off from the durable marker.
            v1::command_reply::Reply::Count(count) if count.more && Instant::now() < until => {}
            v1::command_reply::Reply::Count(_) => break,
            v1::command_reply::Reply::Refusal(refusal) => match refusal.why() {
                // It has ended: nothing is left to cancel, and asking twice is fine.
                v1::refusal::Why::Conflict => break,
                _ => return Err(refused(&refusal).into()),
            },
            v1::command_reply::Reply::Job(_) => return Err(unreadable().into()),
        }
    }
    let row = find(&api, &who, &id).await?;
    Ok(json_value(StatusCode::OK, &batch_json(&api, &row)))
}
