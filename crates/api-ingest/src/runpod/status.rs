//! `status` and `status-sync`.

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::{
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use ringback_domain::{
    JobStatus,
    job::JobState,
    webhook::body::{Json, Part, Terminal, terminal},
};
use ringback_store::{
    JobRow,
    auth::ScopeSet,
    views::{StoredJson, progress_of, result_of},
};
use serde_json::json;
use tokio::time::Instant;

use super::{find_endpoint, find_job, wait_ms};
use crate::{
    auth::Principal,
    catalog::Endpoint,
    error::{ApiError, RunpodError},
    render::{json_bytes, parts_response},
    state::Api,
    waiters::{Waiter, Wants},
};

/// Longest wait of `/status-sync`, and its default (Go and JavaScript send it always).
const WAIT_MAX_MS: u64 = 300_000;
const WAIT_DEFAULT_MS: u64 = 90_000;

/// `GET /v2/{endpoint}/status/{id}`
pub(crate) async fn status(
    State(api): State<Arc<Api>>,
    Path((endpoint, id)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, RunpodError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let endpoint = find_endpoint(&api, &who, &endpoint)?;
    let row = find_job(&api, &who, endpoint, &id).await?;
    Ok(job_object(&api, &row).await?)
}

/// `GET` and `POST /v2/{endpoint}/status-sync/{id}?wait=ms`
pub(crate) async fn status_sync(
    State(api): State<Arc<Api>>,
    Path((endpoint, id)): Path<(String, String)>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Result<Response, RunpodError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let endpoint = find_endpoint(&api, &who, &endpoint)?;
    let wait = wait_ms(&query, WAIT_DEFAULT_MS, WAIT_MAX_MS)?;
    let row = find_job(&api, &who, endpoint, &id).await?;
    if row.job.status().is_terminal() {
        return Ok(job_object(&api, &row).await?);
    }
    let waiter = api.waiters.join(who.project, row.job.id, Wants::End)?;
    let row = wait_for_end(&api, &who, endpoint, &id, &waiter, Duration::from_millis(wait)).await?;
    Ok(job_object(&api, &row).await?)
}

/// The job when it has ended or when the time is up; at a drain, as it is.
pub(crate) async fn wait_for_end(
    api: &Api,
    who: &Principal,
    endpoint: &Endpoint,
    id: &str,
    waiter: &Waiter,
    wait: Duration,
) -> Result<JobRow, ApiError> {
    let until = Instant::now() + wait;
    loop {
        // The waiter was there before this read: an end after it wakes us.
        let row = find_job(api, who, endpoint, id).await?;
        if row.job.status().is_terminal() || Instant::now() >= until || api.shutdown.is_triggered() {
            return Ok(row);
        }
        tokio::select! {
            () = waiter.woken() => {}
            () = tokio::time::sleep_until(until) => {}
            () = api.shutdown.triggered() => {}
        }
    }
}

/// RunPod's job object: what the webhook of this state says, and the worker.
pub(crate) async fn job_object(api: &Api, row: &JobRow) -> Result<Response, ApiError> {
    let id = row.public_id();
    match &row.job.state {
        JobState::InQueue => {
            Ok(json_bytes(StatusCode::OK, format!(r#"{{"id":"{id}","status":"{}"}}"#, JobStatus::InQueue)))
        }
        JobState::InProgress(live) => {
            let progress = progress_of(api.store.read(), row.job.id, row.job.run, live.attempt).await?;
            let mut body = format!(
                r#"{{"delayTime":{},"id":"{id}","status":"{}","workerId":{}"#,
                live.delay_ms,
                JobStatus::InProgress,
                json!(live.worker)
            )
            .into_bytes();
            if let Some(value) = progress {
                body.extend_from_slice(br#","output":"#);
                body.extend_from_slice(&value);
            }
            body.push(b'}');
            Ok(json_bytes(StatusCode::OK, body))
        }
        JobState::Completed(end)
        | JobState::Failed(end)
        | JobState::Cancelled(end)
        | JobState::TimedOut(end) => {
            let result = result_of(api.store.read(), row.job.id, row.job.run).await?;
            let result = result.as_ref();
            let told = Terminal {
                id: &id,
                status: row.job.status(),
                delay_time_ms: end.delay_ms,
                execution_time_ms: end.execution_ms,
                output: result.and_then(|r| r.output.as_ref()).map(json_of),
                error: result.and_then(|r| r.error.as_deref()),
                echo: None,
            };
            let mut parts = terminal(&told).into_parts();
            if let (Some(worker), Some(Part::Inline(tail))) =
                (result.and_then(|r| r.worker.as_ref()), parts.last_mut())
                && tail.pop() == Some(b'}')
            {
                tail.extend_from_slice(format!(r#","workerId":{}}}"#, json!(worker)).as_bytes());
            }
            Ok(parts_response(&api.blobs, parts, "application/json"))
        }
    }
}

pub(crate) fn json_of(stored: &StoredJson) -> Json<'_> {
    match stored {
        StoredJson::Inline(bytes) => Json::Inline(bytes),
        StoredJson::Blob { key, size_bytes } => Json::Blob { key, size_bytes: *size_bytes },
    }
}
