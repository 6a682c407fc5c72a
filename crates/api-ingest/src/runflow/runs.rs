//! Runs: submit, read, cancel.

use std::sync::Arc;

use axum::{
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use ringback_domain::{
    JobStatus, TimestampMs,
    job::JobState,
    webhook::{
        body::Part,
        runflow_body::{run_status, time},
    },
};
use ringback_store::{
    JobRow,
    auth::ScopeSet,
    views::{ResultView, result_of},
};
use serde_json::{Value, json};

use super::RunflowError;
use crate::{
    body::{BodyLimit, read_body},
    error::ApiError,
    native::jobs::find,
    render::{part_of, parts_response},
    runpod::control::cancel_job,
    state::Api,
    submit::{
        Origin, admit, new_job_id,
        parse::{RawJob, check_job, parse_object},
        submit_one,
    },
};

/// `POST /v1/models/{owner}/{model}/runs {input, callback_url?, metadata?}`
pub(crate) async fn create(
    State(api): State<Arc<Api>>,
    Path((owner, model)): Path<(String, String)>,
    request: Request,
) -> Result<Response, RunflowError> {
    let (head, body) = request.into_parts();
    let who = api.auth.authorize(&head.headers, ScopeSet::SUBMIT).await?;
    let endpoint = api.catalog.find_model(who.project, &format!("{owner}/{model}"))?;
    admit(&api, &who, 1)?;
    let limit = BodyLimit { max_bytes: api.limits.max_body_bytes, setting: "max_body_bytes" };
    let body = read_body(&head.headers, body, limit).await?;
    let raw: RawJob<'_> = parse_object(&body, &api.rules)?;
    // Runflow knows none of RunPod's own members.
    let raw = RawJob {
        input: raw.input,
        callback_url: raw.callback_url,
        metadata: raw.metadata,
        ..RawJob::default()
    };
    let job = check_job(&raw, &api.rules)?;
    let origin = Origin { id: new_job_id(), sync: false, headers: &head.headers };
    let accepted = submit_one(&api, endpoint, &body, &job, &origin).await?;
    let row = find(&api, &who, &accepted.public_id()).await?;
    let mut response = run_response(&api, &row).await?;
    *response.status_mut() = if accepted.new { StatusCode::CREATED } else { StatusCode::OK };
    let location = format!("{}/v1/runs/{}", api.base_url, accepted.public_id());
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

/// `GET /v1/runs/{id}`
pub(crate) async fn get(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, RunflowError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let row = find(&api, &who, &id).await?;
    Ok(run_response(&api, &row).await?)
}

/// `POST /v1/runs/{id}/cancel`: idempotent; answers the run as committed.
pub(crate) async fn cancel(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, RunflowError> {
    let who = api.auth.authorize(&headers, ScopeSet::SUBMIT).await?;
    let row = find(&api, &who, &id).await?;
    cancel_job(&api, who.project, row.job.id).await?;
    let row = find(&api, &who, &id).await?;
    Ok(run_response(&api, &row).await?)
}

fn moment(at: Option<TimestampMs>) -> Value {
    at.map_or(Value::Null, |at| time(at).into())
}

/// The run, with its output verbatim however large it is.
async fn run_response(api: &Api, row: &JobRow) -> Result<Response, ApiError> {
    let status = row.job.status();
    let result =
        if status.is_terminal() { result_of(api.store.read(), row.job.id, row.job.run).await? } else { None };
    let endpoint = api.catalog.by_id(row.project, row.endpoint);
    let model = endpoint
        .and_then(|e| e.alias.clone())
        .unwrap_or_else(|| api.catalog.name_of(row.endpoint).to_string());
    let (mut started, mut completed, mut duration) = (None, None, None);
    match &row.job.state {
        JobState::InQueue => {}
        JobState::InProgress(live) => started = Some(live.started_at),
        JobState::Completed(end)
        | JobState::Failed(end)
        | JobState::Cancelled(end)
        | JobState::TimedOut(end) => {
            started = result.as_ref().and_then(|r| r.started_at_ms).map(TimestampMs);
            completed = Some(end.at);
            duration = Some(end.execution_ms);
        }
    }
    let callback = row
        .targets
        .iter()
        .find(|t| t.format == ringback_domain::target::BodyFormat::Runflow)
        .map(|t| ringback_service_runtime::redact_url(&t.url));
    let mut head = json!({
        "id": row.public_id(),
        "model": model,
        "status_code": run_status(status),
        "status": run_status(status),
        "error": error_of(status, result.as_ref()),
        "duration_ms": duration,
        "created_at": time(row.submitted_at),
        "started_at": moment(started),
        "completed_at": moment(completed),
        "callback_url": callback,
        "batch_id": row.batch.map(|(id, _)| id.to_string()),
        "client_ref": row.client_ref,
    })
    .to_string()
    .into_bytes();
    head.pop();
    head.extend_from_slice(b",\"metadata\":");
    head.extend_from_slice(row.metadata.as_deref().unwrap_or(b"null"));
    head.extend_from_slice(b",\"output\":");
    let output = result.and_then(|r| r.output).filter(|_| status == JobStatus::Completed);
    let parts = match output.map(part_of) {
        Some(Part::Inline(bytes)) => {
            head.extend_from_slice(&bytes);
            head.push(b'}');
            vec![Part::Inline(head)]
        }
        Some(blob @ Part::Blob { .. }) => vec![Part::Inline(head), blob, Part::Inline(b"}".to_vec())],
        None => {
            head.extend_from_slice(b"null}");
            vec![Part::Inline(head)]
        }
    };
    Ok(parts_response(&api.blobs, parts, "application/json"))
}

fn error_of(status: JobStatus, result: Option<&ResultView>) -> Value {
    match status {
        JobStatus::Failed | JobStatus::TimedOut => {
            let usual = if status == JobStatus::TimedOut { "timeout" } else { "execution_error" };
            json!({
                "type": result.and_then(|r| r.error_type.as_deref()).unwrap_or(usual),
                "message": result.and_then(|r| r.error.as_deref()),
            })
        }
        JobStatus::InQueue | JobStatus::InProgress | JobStatus::Completed | JobStatus::Cancelled => {
            Value::Null
        }
    }
}
