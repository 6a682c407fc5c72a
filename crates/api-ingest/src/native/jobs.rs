//! `/v1/jobs`.

use std::{collections::HashMap, sync::Arc};

use axum::{
    extract::{Path, Query, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use ringback_domain::{BatchId, JobId, JobStatus, webhook::body::Part};
use ringback_service_runtime::{blobs::BlobKey, redact_url};
use ringback_store::{
    JobRow,
    auth::ScopeSet,
    deliveries::{AttemptView, attempts_of, deliveries_of},
    select_jobs,
    views::{JobFilter, StoredJson, list_jobs, logs_of, result_of, visible_job},
};
use serde_json::json;
use uuid::Uuid;

use super::{
    job_view::{job_json, jobs_json, time},
    limit_of, parameter,
};
use crate::{
    auth::Principal,
    body::{BodyLimit, read_body},
    error::{ApiError, NativeError},
    render::{json_bytes, json_value, part_of, parts_response, rfc3339},
    runpod::control::{cancel_job, retry_job},
    state::Api,
    submit::{
        Origin, admit, new_job_id,
        parse::{RawJob, check_job, parse_object, text_member},
        submit_one,
    },
};

/// A job by its public id, if the asker's project owns it.
pub(crate) async fn find(api: &Api, who: &Principal, id: &str) -> Result<JobRow, ApiError> {
    let absent = || {
        ApiError::not_found(
            "job not found: this project has no job with this id, or its retention time is over",
        )
    };
    let (job, sync) = JobId::parse_public(id).map_err(|_| absent())?;
    let row = visible_job(api.store.read(), who.project, job).await?;
    row.filter(|row| row.sync_id == sync).ok_or_else(absent)
}

/// `POST /v1/jobs`
pub(crate) async fn create(State(api): State<Arc<Api>>, request: Request) -> Result<Response, NativeError> {
    let (head, body) = request.into_parts();
    let who = api.auth.authorize(&head.headers, ScopeSet::SUBMIT).await?;
    admit(&api, &who, 1)?;
    let limit = BodyLimit { max_bytes: api.limits.max_body_bytes, setting: "max_body_bytes" };
    let body = read_body(&head.headers, body, limit).await?;
    let raw: RawJob<'_> = parse_object(&body, &api.rules)?;
    let name = raw.endpoint.ok_or_else(|| ApiError::field("/endpoint", "is missing: name an endpoint"))?;
    let endpoint = api.catalog.find(who.project, &text_member("/endpoint", name)?)?;
    let job = check_job(&raw, &api.rules)?;
    let origin = Origin { id: new_job_id(), sync: false, headers: &head.headers };
    let accepted = submit_one(&api, endpoint, &body, &job, &origin).await?;
    let status = if accepted.new { StatusCode::CREATED } else { StatusCode::OK };
    let row = find(&api, &who, &accepted.public_id()).await?;
    let mut response = json_bytes(status, job_json(&api, &row).await?);
    if let Ok(location) = HeaderValue::from_str(&format!("{}/v1/jobs/{}", api.base_url, accepted.public_id()))
    {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

/// `GET /v1/jobs?endpoint=&status=&batch=&limit=&cursor=`: newest first.
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let endpoint = match query.get("endpoint").filter(|name| !name.is_empty()) {
        None => None,
        Some(name) => Some(api.catalog.find(who.project, name)?.id),
    };
    let limit = limit_of(&query)?;
    let filter = JobFilter {
        endpoint,
        status: parameter(&query, "status", "one of the six states, such as COMPLETED", JobStatus::parse)?,
        batch: parameter(&query, "batch", "a batch's id", |text| BatchId::parse(text).ok())?,
        before: parameter(&query, "cursor", "the next_cursor of a former page", |text| {
            JobId::parse(text).ok()
        })?,
        limit,
    };
    let ids = list_jobs(api.store.read(), who.project, &filter).await?;
    let mut found = select_jobs(api.store.read(), &ids).await?;
    let rows: Vec<JobRow> = ids.iter().filter_map(|id| found.remove(id)).collect();
    let next = if ids.len() == limit as usize { ids.last().map(ToString::to_string) } else { None };
    Ok(json_value(StatusCode::OK, &json!({"jobs": jobs_json(&api, &rows).await?, "next_cursor": next})))
}

/// `GET /v1/jobs/{id}`
pub(crate) async fn get(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let row = find(&api, &who, &id).await?;
    Ok(json_bytes(StatusCode::OK, job_json(&api, &row).await?))
}

/// `GET /v1/jobs/{id}/output`: the handler's output as it came, of any size.
pub(crate) async fn output(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let row = find(&api, &who, &id).await?;
    if !row.job.status().is_terminal() {
        Err(ApiError::conflict(format!("the job is {}; its output comes with its end", row.job.status())))?;
    }
    let result = result_of(api.store.read(), row.job.id, row.job.run).await?;
    let output = result
        .and_then(|r| r.output)
        .ok_or_else(|| ApiError::not_found(format!("the job is {} and has no output", row.job.status())))?;
    Ok(parts_response(&api.blobs, vec![part_of(output)], "application/json"))
}

/// `GET /v1/jobs/{id}/logs`: captured lines of all attempts.
pub(crate) async fn logs(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let row = find(&api, &who, &id).await?;
    let mut parts = Vec::new();
    for log in logs_of(api.store.read(), row.job.id).await? {
        parts.push(match log {
            StoredJson::Inline(mut bytes) => {
                if bytes.last().is_some_and(|b| *b != b'\n') {
                    bytes.push(b'\n');
                }
                Part::Inline(bytes)
            }
            StoredJson::Blob { key, .. } => {
                let size = match BlobKey::new(key.as_str()) {
                    Ok(checked) => api.blobs.size(&checked).await,
                    Err(error) => Err(error),
                };
                let size_bytes = size.map_err(|error| {
                    tracing::warn!(%error, "logs cannot be read");
                    ApiError::unavailable("the blob store is not available now; try again")
                })?;
                Part::Blob { key, size_bytes }
            }
        });
    }
    if parts.is_empty() {
        parts.push(Part::Inline(Vec::new()));
    }
    Ok(parts_response(&api.blobs, parts, "text/plain; charset=utf-8"))
}

/// `POST /v1/jobs/{id}/cancel`: idempotent; answers the job as committed.
pub(crate) async fn cancel(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::SUBMIT).await?;
    let row = find(&api, &who, &id).await?;
    cancel_job(&api, who.project, row.job.id).await?;
    let row = find(&api, &who, &id).await?;
    Ok(json_bytes(StatusCode::OK, job_json(&api, &row).await?))
}

/// `POST /v1/jobs/{id}/retry`: another run of a FAILED, TIMED_OUT or CANCELLED job.
pub(crate) async fn retry(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::SUBMIT).await?;
    let row = find(&api, &who, &id).await?;
    retry_job(&api, &row, true).await?;
    let row = find(&api, &who, &id).await?;
    Ok(json_bytes(StatusCode::OK, job_json(&api, &row).await?))
}

/// `GET /v1/jobs/{id}/deliveries`: what is owed to receivers, with each failed try.
pub(crate) async fn deliveries(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let row = find(&api, &who, &id).await?;
    let owner = Uuid::from_bytes(*row.job.id.as_bytes());
    let deliveries = deliveries_json(&api, &who, owner).await?;
    Ok(json_value(StatusCode::OK, &json!({"deliveries": deliveries})))
}

/// The deliveries of a job or batch.
pub(crate) async fn deliveries_json(
    api: &Api,
    who: &Principal,
    owner: Uuid,
) -> Result<Vec<serde_json::Value>, ApiError> {
    let conn = api.store.read();
    let all = deliveries_of(conn, who.project, owner).await?;
    let tries = attempts_of(conn, who.project, owner).await?;
    Ok(all
        .into_iter()
        .map(|d| {
            let failed: Vec<_> = tries
                .iter()
                .filter(|t| (t.seq, t.target) == (d.seq, d.target) && !t.is_delivered())
                .map(attempt_json)
                .collect();
            json!({
                "id": d.id,
                "seq": d.seq,
                "target": d.target,
                "event": d.event,
                "url": redact_url(&d.url),
                "state": d.state.as_str(),
                "attempts": d.attempts,
                "created_at": rfc3339(d.created_at_ms),
                "next_attempt_at": time(d.next_attempt_at_ms),
                "last_status": d.last_status,
                "last_error": d.last_error,
                "delivered_at": time(d.delivered_at_ms()),
                "failed_attempts": failed,
            })
        })
        .collect())
}

/// A logged try.
pub(super) fn attempt_json(t: &AttemptView) -> serde_json::Value {
    json!({
        "n": t.n,
        "outcome": if t.is_delivered() { "delivered" } else { "failed" },
        "at": rfc3339(t.at_ms),
        "duration_ms": t.duration_ms,
        "dns_ms": t.timings.dns_ms,
        "connect_ms": t.timings.connect_ms,
        "first_byte_ms": t.timings.first_byte_ms,
        "status": t.status,
        "error": t.error,
        "address": t.address,
        "response": t.response.as_ref().map(|r| String::from_utf8_lossy(r).into_owned()),
    })
}
