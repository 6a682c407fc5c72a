//! `stream`: pieces of output, each given out once. Held until something is new, so that the JavaScript SDK, which
//! never sleeps, does not spin; under 10 s, so that Python's does not give up.

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::{
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use ringback_domain::{JobStatus, job::JobState};
use ringback_store::{
    JobRow, Urgency,
    auth::ScopeSet,
    cursors::{Drained, drain_chunks, tell_end_once},
};
use tokio::time::Instant;

use super::{find_endpoint, find_job, wait_ms};
use crate::{
    error::{ApiError, RunpodError},
    render::json_bytes,
    state::Api,
    waiters::Wants,
};

/// RunPod's Python client gives up after 10 s and asks again; pieces that were drained into a lost answer are gone for
/// it. Half of that leaves time for a slow database.
const HOLD_MAX_MS: u64 = 5_000;

/// `GET /v2/{endpoint}/stream/{id}`
pub(crate) async fn stream(
    State(api): State<Arc<Api>>,
    Path((endpoint, id)): Path<(String, String)>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Result<Response, RunpodError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let endpoint = find_endpoint(&api, &who, &endpoint)?;
    let hold = Duration::from_millis(wait_ms(&query, HOLD_MAX_MS, HOLD_MAX_MS)?);
    let row = find_job(&api, &who, endpoint, &id).await?;
    let until = Instant::now() + hold;
    let waiter = api.waiters.join(who.project, row.job.id, Wants::Anything)?;
    loop {
        let row = find_job(&api, &who, endpoint, &id).await?;
        let status = row.job.status();
        if status == JobStatus::Cancelled {
            return Ok(cancelled(&api, &row).await?);
        }
        let drained = drain(&api, &row).await?;
        let over = status.is_terminal() || Instant::now() >= until || api.shutdown.is_triggered();
        if !drained.chunks.is_empty() || over {
            return Ok(answer(&row, status, &drained));
        }
        tokio::select! {
            () = waiter.woken() => {}
            () = tokio::time::sleep_until(until) => {}
            () = api.shutdown.triggered() => {}
        }
    }
}

/// The attempt whose pieces a reader gets: the live one, or the recorded one of an ended run.
fn attempt_of(row: &JobRow) -> Option<u32> {
    match &row.job.state {
        JobState::InQueue => None,
        JobState::InProgress(live) => Some(live.attempt),
        JobState::Completed(e) | JobState::Failed(e) | JobState::Cancelled(e) | JobState::TimedOut(e) => {
            e.attempt
        }
    }
}

async fn drain(api: &Api, row: &JobRow) -> Result<Drained, ApiError> {
    let Some(attempt) = attempt_of(row) else { return Ok(Drained::default()) };
    let (job, run) = (row.job.id, row.job.run);
    // Most looks find nothing: a read is cheaper than a transaction.
    if !ringback_store::cursors::has_new_chunks(api.store.read(), job, run, attempt).await? {
        return Ok(Drained::default());
    }
    Ok(api
        .store
        .write(Urgency::Now, move |tx| Box::pin(async move { drain_chunks(tx, job, run, attempt).await }))
        .await?)
}

/// Once CANCELLED with nothing in it, then 410: Python's `stream()` would go on for ever otherwise.
async fn cancelled(api: &Api, row: &JobRow) -> Result<Response, ApiError> {
    let (job, run) = (row.job.id, row.job.run);
    let first = api
        .store
        .write(Urgency::Now, move |tx| Box::pin(async move { tell_end_once(tx, job, run).await }))
        .await?;
    if !first {
        return Err(ApiError::new(StatusCode::GONE, "the job was cancelled; its stream is over"));
    }
    Ok(answer(row, JobStatus::Cancelled, &Drained::default()))
}

fn answer(row: &JobRow, status: JobStatus, drained: &Drained) -> Response {
    // The JavaScript SDK stops at a final status: it is told with the last pieces only.
    let status = if drained.more && status.is_terminal() { JobStatus::InProgress } else { status };
    let mut body = format!(r#"{{"id":"{}","status":"{status}","stream":["#, row.public_id()).into_bytes();
    for (n, chunk) in drained.chunks.iter().enumerate() {
        if n > 0 {
            body.push(b',');
        }
        body.extend_from_slice(br#"{"output":"#);
        body.extend_from_slice(chunk);
        if n == 0 && drained.reset {
            // A new attempt yields from the beginning; what was given out before is void.
            body.extend_from_slice(br#","reset":true"#);
        }
        body.push(b'}');
    }
    body.extend_from_slice(b"]}");
    json_bytes(StatusCode::OK, body)
}
