//! `purge-queue`, `health` and `requests`: an endpoint as a whole.

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::{
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use ringback_contracts::v1;
use ringback_domain::JobId;
use ringback_store::{
    auth::ScopeSet,
    endpoint_counts, select_jobs,
    views::{JobFilter, list_jobs},
};
use serde_json::json;
use tokio::time::Instant;

use super::{
    control::{refused, unreadable},
    find_endpoint,
};
use crate::{
    catalog::Endpoint,
    error::{ApiError, RunpodError},
    render::{json_value, rfc3339},
    state::Api,
    workers::worker_counts,
};

/// Jobs per command of a purge.
const PURGE_CHUNK: u32 = 500;
/// A purge is answered after this long even where more is left; the rest goes on behind it.
const PURGE_WITHIN: Duration = Duration::from_millis(1_500);

/// `POST /v2/{endpoint}/purge-queue`: cancels what is queued, nothing that runs.
pub(crate) async fn purge_queue(
    State(api): State<Arc<Api>>,
    Path(endpoint): Path<String>,
    headers: HeaderMap,
) -> Result<Response, RunpodError> {
    let who = api.auth.authorize(&headers, ScopeSet::ADMIN).await?;
    let endpoint = find_endpoint(&api, &who, &endpoint)?;
    let (removed, more) = purge(&api, endpoint).await?;
    let status = if more { "in_progress" } else { "completed" };
    Ok(json_value(StatusCode::OK, &json!({"removed": removed, "status": status})))
}

/// Purges chunk by chunk; answers the number removed so far and whether the rest goes on in the background.
pub(crate) async fn purge(api: &Arc<Api>, endpoint: &Arc<Endpoint>) -> Result<(u64, bool), ApiError> {
    let until = Instant::now() + PURGE_WITHIN;
    let mut removed = 0;
    loop {
        let (n, more) = purge_chunk(api, endpoint).await?;
        removed += u64::from(n);
        if !more {
            return Ok((removed, false));
        }
        if Instant::now() >= until {
            break;
        }
    }
    let (api, endpoint) = (Arc::clone(api), Arc::clone(endpoint));
    tokio::spawn(async move {
        while let Ok((_, true)) = purge_chunk(&api, &endpoint).await {
            if api.shutdown.is_triggered() {
                tracing::warn!(endpoint = endpoint.name, "a purge ends early: this process shuts down");
                return;
            }
        }
    });
    Ok((removed, true))
}

async fn purge_chunk(api: &Api, endpoint: &Endpoint) -> Result<(u32, bool), ApiError> {
    let command =
        v1::PurgeQueue { project_id: endpoint.project.0, endpoint_id: endpoint.id.0, limit: PURGE_CHUNK };
    match api.command(v1::command::Command::Purge(command)).await? {
        v1::command_reply::Reply::Count(count) => Ok((count.changed, count.more)),
        v1::command_reply::Reply::Refusal(refusal) => Err(refused(&refusal)),
        v1::command_reply::Reply::Job(_) => Err(unreadable()),
    }
}

/// `GET /v2/{endpoint}/health`
pub(crate) async fn health(
    State(api): State<Arc<Api>>,
    Path(endpoint): Path<String>,
    headers: HeaderMap,
) -> Result<Response, RunpodError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let endpoint = find_endpoint(&api, &who, &endpoint)?;
    let counts = endpoint_counts(api.store.read(), endpoint.id).await?;
    let workers = worker_counts(&api, endpoint.id).await?;
    Ok(json_value(
        StatusCode::OK,
        &json!({
            "jobs": {
                "completed": counts.completed,
                // TIMED_OUT and CANCELLED have no member of their own in RunPod's answer; the former is a failure.
                "failed": counts.failed + counts.timed_out,
                "inProgress": counts.running.max(0),
                "inQueue": counts.queued.max(0),
                "retried": counts.retried,
            },
            "workers": {
                "idle": workers.idle,
                "initializing": workers.initializing,
                "ready": workers.idle + workers.running,
                "running": workers.running,
                "throttled": 0,
                "unhealthy": workers.unhealthy,
            },
        }),
    ))
}

/// Most jobs of one page of `requests`.
const PAGE_MAX: u32 = 200;

/// `GET /v2/{endpoint}/requests`: the newest jobs of the endpoint. RunPod documents no shape; this is
/// `{requests: [{id, status, ...}], next_cursor}`.
pub(crate) async fn requests(
    State(api): State<Arc<Api>>,
    Path(endpoint): Path<String>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Result<Response, RunpodError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let endpoint = find_endpoint(&api, &who, &endpoint)?;
    let limit = match query.get("limit") {
        None => 50,
        Some(text) => text
            .parse::<u32>()
            .ok()
            .filter(|n| (1..=PAGE_MAX).contains(n))
            .ok_or_else(|| ApiError::bad_request(format!("`limit` must be between 1 and {PAGE_MAX}")))?,
    };
    let before = match query.get("cursor") {
        None => None,
        Some(text) => {
            Some(JobId::parse(text).map_err(|_| ApiError::bad_request("`cursor` is not one of ours"))?)
        }
    };
    let filter = JobFilter { endpoint: Some(endpoint.id), before, limit, ..JobFilter::default() };
    let ids = list_jobs(api.store.read(), who.project, &filter).await?;
    let mut rows = select_jobs(api.store.read(), &ids).await?;
    let requests: Vec<_> = ids
        .iter()
        .filter_map(|id| rows.remove(id))
        .map(|row| {
            let ended = row.job.state.ended();
            json!({
                "id": row.public_id(),
                "status": row.job.status().as_str(),
                "submittedAt": rfc3339(row.submitted_at.0),
                "delayTime": ended.map(|e| e.delay_ms),
                "executionTime": ended.map(|e| e.execution_ms),
            })
        })
        .collect();
    let next = if ids.len() == limit as usize { ids.last().map(ToString::to_string) } else { None };
    Ok(json_value(StatusCode::OK, &json!({"requests": requests, "next_cursor": next})))
}
