//! `run` and `runsync`.

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::{
    extract::{Path, Query, Request, State},
    http::StatusCode,
    response::Response,
};
use ringback_store::auth::ScopeSet;

use super::{find_endpoint, status, wait_ms};
use crate::{
    body::{BodyLimit, read_body},
    error::RunpodError,
    render::json_bytes,
    state::Api,
    submit::{
        Origin, admit, new_job_id,
        parse::{RawJob, check_job, parse_object},
        pipeline::Accepted,
        submit_one,
    },
    waiters::Wants,
};

/// RunPod's default and longest wait of `/runsync`.
const WAIT_DEFAULT_MS: u64 = 90_000;
const WAIT_MIN_MS: u64 = 1_000;
const WAIT_MAX_MS: u64 = 300_000;

/// `POST /v2/{endpoint}/run`
pub(crate) async fn run(
    State(api): State<Arc<Api>>,
    Path(endpoint): Path<String>,
    request: Request,
) -> Result<Response, RunpodError> {
    let (head, body) = request.into_parts();
    let who = api.auth.authorize(&head.headers, ScopeSet::SUBMIT).await?;
    let endpoint = find_endpoint(&api, &who, &endpoint)?;
    admit(&api, &who, 1)?;
    let limit = BodyLimit { max_bytes: api.limits.max_body_bytes, setting: "max_body_bytes" };
    let body = read_body(&head.headers, body, limit).await?;
    // RunPod knows no `callback_url`: like every other unknown key it is ignored.
    let raw = RawJob { callback_url: None, ..parse_object::<RawJob<'_>>(&body, &api.rules)? };
    let job = check_job(&raw, &api.rules)?;
    let origin = Origin { id: new_job_id(), sync: false, headers: &head.headers };
    let accepted = submit_one(&api, endpoint, &body, &job, &origin).await?;
    Ok(short(&accepted))
}

/// `POST /v2/{endpoint}/runsync?wait=ms`
pub(crate) async fn runsync(
    State(api): State<Arc<Api>>,
    Path(endpoint): Path<String>,
    Query(query): Query<HashMap<String, String>>,
    request: Request,
) -> Result<Response, RunpodError> {
    let (head, body) = request.into_parts();
    let who = api.auth.authorize(&head.headers, ScopeSet::SUBMIT).await?;
    let endpoint = find_endpoint(&api, &who, &endpoint)?;
    let wait = wait_ms(&query, WAIT_DEFAULT_MS, WAIT_MAX_MS)?.max(WAIT_MIN_MS);
    admit(&api, &who, 1)?;
    let limit = BodyLimit { max_bytes: api.limits.max_runsync_body_bytes, setting: "max_runsync_body_bytes" };
    let body = read_body(&head.headers, body, limit).await?;
    // RunPod knows no `callback_url`: like every other unknown key it is ignored.
    let raw = RawJob { callback_url: None, ..parse_object::<RawJob<'_>>(&body, &api.rules)? };
    let job = check_job(&raw, &api.rules)?;
    let id = new_job_id();
    // A place among the waiters first: a job that nobody can wait for is not made.
    let mut waiter = api.waiters.join(who.project, id, Wants::End)?;
    let origin = Origin { id, sync: true, headers: &head.headers };
    let accepted = submit_one(&api, endpoint, &body, &job, &origin).await?;
    drop(body);
    if accepted.id != id {
        // A repeated request waits for the job that the first one made.
        waiter = api.waiters.join(who.project, accepted.id, Wants::End)?;
    }
    let public_id = accepted.public_id();
    let row =
        status::wait_for_end(&api, &who, endpoint, &public_id, &waiter, Duration::from_millis(wait)).await?;
    Ok(status::job_object(&api, &row).await?)
}

/// `{id, status}`
fn short(accepted: &Accepted) -> Response {
    // Neither holds a character that JSON escapes.
    let body = format!(r#"{{"id":"{}","status":"{}"}}"#, accepted.public_id(), accepted.status);
    json_bytes(StatusCode::OK, body)
}
