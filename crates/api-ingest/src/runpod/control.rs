//! `cancel` and `retry`: commands to the state-tracker, answered after its commit.

use std::sync::Arc;

use axum::{
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use bytes::Bytes;
use ringback_contracts::v1;
use ringback_domain::{JobId, JobStatus, ProjectId};
use ringback_store::{JobRow, auth::ScopeSet};

use super::{find_endpoint, find_job};
use crate::{
    error::{ApiError, RunpodError},
    render::json_bytes,
    state::Api,
};

/// `POST /v2/{endpoint}/cancel/{id}`. Idempotent: 200 with the state as committed.
pub(crate) async fn cancel(
    State(api): State<Arc<Api>>,
    Path((endpoint, id)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, RunpodError> {
    let who = api.auth.authorize(&headers, ScopeSet::SUBMIT).await?;
    let endpoint = find_endpoint(&api, &who, &endpoint)?;
    let row = find_job(&api, &who, endpoint, &id).await?;
    let status = cancel_job(&api, who.project, row.job.id).await?;
    Ok(json_bytes(StatusCode::OK, format!(r#"{{"id":"{}","status":"{status}"}}"#, row.public_id())))
}

/// `POST /v2/{endpoint}/retry/{id}`. FAILED and TIMED_OUT only, as RunPod documents.
pub(crate) async fn retry(
    State(api): State<Arc<Api>>,
    Path((endpoint, id)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, RunpodError> {
    let who = api.auth.authorize(&headers, ScopeSet::SUBMIT).await?;
    let endpoint = find_endpoint(&api, &who, &endpoint)?;
    let row = find_job(&api, &who, endpoint, &id).await?;
    let status = retry_job(&api, &row, false).await?;
    Ok(json_bytes(StatusCode::OK, format!(r#"{{"id":"{}","status":"{status}"}}"#, row.public_id())))
}

/// Cancels a job; answers its state after the commit.
pub(crate) async fn cancel_job(api: &Api, project: ProjectId, job: JobId) -> Result<JobStatus, ApiError> {
    let command = v1::CancelJob { project_id: project.0, job_id: Bytes::copy_from_slice(job.as_bytes()) };
    status_of(api.command(v1::command::Command::Cancel(command)).await?)
}

/// Starts the run after the one that was read; answers the state after the commit. Asking twice starts one run.
pub(crate) async fn retry_job(api: &Api, row: &JobRow, native: bool) -> Result<JobStatus, ApiError> {
    let command = v1::RetryJob {
        project_id: row.project.0,
        job_id: Bytes::copy_from_slice(row.job.id.as_bytes()),
        native,
        expected_run: row.job.run,
    };
    status_of(api.command(v1::command::Command::Retry(command)).await?).map_err(|e| {
        if e.status != StatusCode::CONFLICT {
            return e;
        }
        let allowed = if native { "FAILED, TIMED_OUT or CANCELLED" } else { "FAILED or TIMED_OUT" };
        ApiError::conflict(format!("only a job that is {allowed} can be retried: {}", e.detail))
    })
}

fn status_of(reply: v1::command_reply::Reply) -> Result<JobStatus, ApiError> {
    match reply {
        v1::command_reply::Reply::Job(job) => {
            JobStatus::from_code(i64::from(job.status)).ok_or_else(unreadable)
        }
        v1::command_reply::Reply::Count(_) => Err(unreadable()),
        v1::command_reply::Reply::Refusal(refusal) => Err(refused(&refusal)),
    }
}

pub(crate) fn refused(refusal: &v1::Refusal) -> ApiError {
    match refusal.why() {
        v1::refusal::Why::NotFound => ApiError::no_job(),
        v1::refusal::Why::Conflict => {
            let state = JobStatus::from_code(i64::from(refusal.status)).map_or("changed", JobStatus::as_str);
            ApiError::conflict(format!("the job is {state}"))
        }
        v1::refusal::Why::Unavailable | v1::refusal::Why::Unspecified => {
            ApiError::unavailable("the state tracker cannot do this now; try again")
        }
    }
}

pub(crate) fn unreadable() -> ApiError {
    ApiError::unavailable("the state tracker's answer cannot be read")
}
