//! Endpoints and workers of a project.

use std::sync::Arc;

use axum::{
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use ringback_store::{auth::ScopeSet, endpoint_counts};
use serde_json::json;

use crate::{
    error::NativeError,
    render::{json_value, rfc3339},
    runpod::queue::purge,
    state::Api,
    workers::{live_workers, worker_counts},
};

/// `GET /v1/endpoints`
pub(crate) async fn endpoints(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let mut all = Vec::new();
    for endpoint in api.catalog.of_project(who.project) {
        let jobs = endpoint_counts(api.store.read(), endpoint.id).await?;
        let workers = worker_counts(&api, endpoint.id).await?;
        all.push(json!({
            "name": endpoint.name,
            "alias": endpoint.alias,
            "slots": endpoint.slots,
            "execution_timeout_ms": endpoint.execution_timeout_ms,
            "ttl_ms": endpoint.ttl_ms,
            "max_attempts": endpoint.policy.max_attempts,
            "retry_errors": endpoint.policy.retry_errors,
            "webhook_events": if endpoint.all_events { "all" } else { "terminal" },
            "jobs": {
                "queued": jobs.queued.max(0),
                "running": jobs.running.max(0),
                "completed": jobs.completed,
                "failed": jobs.failed,
                "cancelled": jobs.cancelled,
                "timed_out": jobs.timed_out,
                "retried": jobs.retried,
            },
            "workers": {"idle": workers.idle, "running": workers.running, "initializing": workers.initializing,
                        "unhealthy": workers.unhealthy},
        }));
    }
    Ok(json_value(StatusCode::OK, &json!({"endpoints": all})))
}

/// `POST /v1/endpoints/{name}/purge`: cancels what is queued.
pub(crate) async fn purge_endpoint(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::ADMIN).await?;
    let endpoint = api.catalog.find(who.project, &name)?;
    let (removed, more) = purge(&api, endpoint).await?;
    let status = if more { "in_progress" } else { "completed" };
    Ok(json_value(StatusCode::OK, &json!({"removed": removed, "status": status})))
}

/// `GET /v1/workers`: workers that serve endpoints of this project.
pub(crate) async fn workers(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let mine = api.catalog.of_project(who.project);
    let mut all = Vec::new();
    for worker in live_workers(&api).await? {
        let slots: Vec<_> = worker
            .slots
            .iter()
            .filter_map(|s| {
                let endpoint = mine.iter().find(|e| e.id.0 == s.endpoint_id)?;
                let unavailable = if s.unavailable.is_empty() { None } else { Some(&s.unavailable) };
                Some(json!({"endpoint": endpoint.name, "total": s.total, "busy": s.busy, "unavailable": unavailable}))
            })
            .collect();
        if !slots.is_empty() {
            all.push(json!({
                "id": worker.row.id,
                "device": worker.row.device,
                "draining": worker.row.draining,
                "last_heartbeat_at": rfc3339(worker.row.last_beat_ms),
                "slots": slots,
            }));
        }
    }
    Ok(json_value(StatusCode::OK, &json!({"workers": all})))
}
