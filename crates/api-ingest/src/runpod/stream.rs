//! `stream`: pieces of output, each given out until its answer was sent, see [`super::hand_over`]. Held until something is new, so that the JavaScript SDK, which
//! never sleeps, does not spin; under 10 s, so that Python's does not give up.

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::{
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use bytes::Bytes;
use ringback_domain::{JobStatus, job::JobState};
use ringback_store::{
    JobRow, Urgency,
    auth::ScopeSet,
    cursors::{Pieces, has_new_chunks, next_pieces, tell_end_once},
};
use tokio::time::Instant;

use super::{find_endpoint, find_job, hand_over::HandOver, wait_ms};
use crate::{
    error::{ApiError, RunpodError},
    render::json_bytes,
    state::Api,
    waiters::Wants,
};

/// RunPod's Python client gives up after 10 s and asks again. Half of that leaves time for a slow database.
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
        if has_new(&api, &row).await? {
            match hand_out(&api, &row, until).await? {
                Turn::Pieces(response) => return Ok(response),
                // The reader before has not got its last pieces yet, so this is not the end.
                Turn::NotYet => return Ok(answer(&row, unfinished(status), &Pieces::default())),
                Turn::Taken => {}
            }
        }
        if status.is_terminal() || Instant::now() >= until || api.shutdown.is_triggered() {
            return Ok(answer(&row, status, &Pieces::default()));
        }
        tokio::select! {
            () = waiter.woken() => {}
            () = tokio::time::sleep_until(until) => {}
            () = api.shutdown.triggered() => {}
        }
    }
}

/// The attempt whose pieces a reader gets: the live one, or the recorded one of an ended run.
pub(crate) fn attempt_of(row: &JobRow) -> Option<u32> {
    match &row.job.state {
        JobState::InQueue => None,
        JobState::InProgress(live) => Some(live.attempt),
        JobState::Completed(e) | JobState::Failed(e) | JobState::Cancelled(e) | JobState::TimedOut(e) => {
            e.attempt
        }
    }
}

async fn has_new(api: &Api, row: &JobRow) -> Result<bool, ApiError> {
    let Some(attempt) = attempt_of(row) else { return Ok(false) };
    Ok(has_new_chunks(api.store.read(), row.job.id, row.job.run, attempt).await?)
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
    Ok(answer(row, JobStatus::Cancelled, &Pieces::default()))
}

/// What became of a reader's turn.
enum Turn {
    /// Its answer.
    Pieces(Response),
    /// The reader before was given everything.
    Taken,
    /// The turn did not come in time.
    NotYet,
}

/// Gives out the next pieces as soon as nobody else is being given some.
async fn hand_out(api: &Arc<Api>, row: &JobRow, until: Instant) -> Result<Turn, ApiError> {
    let Some(attempt) = attempt_of(row) else { return Ok(Turn::Taken) };
    let turn = api.stream_turns.of(row.job.id);
    let Ok(turn) = tokio::time::timeout_at(until, turn.lock_owned()).await else { return Ok(Turn::NotYet) };
    let pieces = next_pieces(api.store.read(), row.job.id, row.job.run, attempt).await?;
    let Some(step) = pieces.step else { return Ok(Turn::Taken) };
    let status = row.job.status();
    // The JavaScript SDK stops at a final status: it is told with the last pieces only.
    let status = if pieces.more { unfinished(status) } else { status };
    let hand_over = HandOver::new(Arc::clone(api), body(row, status, &pieces), step, turn);
    Ok(Turn::Pieces(hand_over.into_response()))
}

/// A status that does not end the client's loop.
fn unfinished(status: JobStatus) -> JobStatus {
    if status.is_terminal() { JobStatus::InProgress } else { status }
}

fn answer(row: &JobRow, status: JobStatus, pieces: &Pieces) -> Response {
    json_bytes(StatusCode::OK, body(row, status, pieces))
}

fn body(row: &JobRow, status: JobStatus, pieces: &Pieces) -> Bytes {
    let mut body = format!(r#"{{"id":"{}","status":"{status}","stream":["#, row.public_id()).into_bytes();
    for (n, chunk) in pieces.chunks.iter().enumerate() {
        if n > 0 {
            body.push(b',');
        }
        body.extend_from_slice(br#"{"output":"#);
        body.extend_from_slice(chunk);
        if n == 0 && pieces.reset {
            // A new attempt yields from the beginning; what was given out before is void.
            body.extend_from_slice(br#","reset":true"#);
        }
        body.push(b'}');
    }
    body.extend_from_slice(b"]}");
    body.into()
}
