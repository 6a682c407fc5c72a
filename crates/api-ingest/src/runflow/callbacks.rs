//! The callback of a run or batch: its history, and sending it again.

use std::sync::Arc;

use axum::{
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use ringback_domain::{
    TimestampMs,
    batch::BatchStatus,
    target::BodyFormat,
    webhook::{response::Profile, runflow_body::time, schedule::Schedule},
};
use ringback_service_runtime::redact_url;
use ringback_store::{
    auth::ScopeSet,
    deliveries::{AttemptView, DeliveryState, attempts_of},
    delivery_search::{DeliveryFilter, Found, search},
    feed::after_sequence,
    replays_api::Redelivery,
    secrets::live_secrets,
};
use serde_json::{Value, json};
use uuid::Uuid;

use super::RunflowError;
use crate::{
    auth::Principal,
    error::ApiError,
    native::{batches, deliveries::redeliver_one, jobs},
    render::json_value,
    state::Api,
};

/// Ends of one job that are looked through: it has one per run.
const RUNS_MAX: u32 = 100;

/// What a callback belongs to.
struct Subject {
    owner: Uuid,
    target: u32,
    callback_url: Option<String>,
    profile: Option<Profile>,
    ended: bool,
    kind: &'static str,
}

async fn run(api: &Api, who: &Principal, id: &str) -> Result<Subject, ApiError> {
    let row = jobs::find(api, who, id).await?;
    let place = row.targets.iter().position(|t| t.format == BodyFormat::Runflow);
    Ok(Subject {
        owner: Uuid::from_bytes(*row.job.id.as_bytes()),
        target: place.and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
        callback_url: place.and_then(|n| row.targets.get(n)).map(|t| t.url.clone()),
        profile: place.and_then(|n| row.targets.get(n)).and_then(|t| t.profile),
        ended: row.job.status().is_terminal(),
        kind: "run",
    })
}

async fn batch(api: &Api, who: &Principal, id: &str) -> Result<Subject, ApiError> {
    let row = batches::find(api, who, id).await?;
    Ok(Subject {
        owner: Uuid::from_bytes(*row.id.as_bytes()),
        target: 0,
        callback_url: row.callback_url.clone(),
        profile: None,
        ended: row.status != BatchStatus::InProgress,
        kind: "batch",
    })
}

/// The deliveries of the callback, newest first.
async fn owed(api: &Api, who: &Principal, of: &Subject) -> Result<Vec<Found>, ApiError> {
    if of.callback_url.is_none() {
        return Ok(Vec::new());
    }
    let filter =
        DeliveryFilter { owner: Some(of.owner), target: Some(of.target), ..DeliveryFilter::default() };
    let mut all = search(api.store.read(), who.project, &filter, None, RUNS_MAX).await?;
    all.retain(|d| d.terminal);
    all.sort_by_key(|d| std::cmp::Reverse(d.place.seq));
    Ok(all)
}

fn moment(ms: Option<i64>) -> Value {
    ms.map_or(Value::Null, |ms| time(TimestampMs(ms)).into())
}

/// Why a delivery has failed so far, in one word.
fn reason(state: DeliveryState, status: Option<u16>, error: Option<&str>) -> Option<String> {
    if state == DeliveryState::Delivered {
        return None;
    }
    match (status, error) {
        (Some(status), _) => Some(format!("http_{status}")),
        (None, Some(_)) => Some("connection_error".to_owned()),
        (None, None) => None,
    }
}

/// The try that was acknowledged, whose facts are the delivery's.
pub(super) fn acknowledged_json(d: &Found) -> Value {
    let took = d.duration_ms.unwrap_or_default();
    json!({
        "attempt_number": d.attempts,
        "attempted_at": moment(d.ended_at_ms.map(|at| at.saturating_sub(took))),
        "status_code": d.last_status,
        "response_body": d.response.as_ref().map(|r| String::from_utf8_lossy(r).into_owned()),
        "response_time_ms": d.duration_ms,
        "error_message": null,
    })
}

pub(super) fn attempt_json(t: &AttemptView) -> Value {
    json!({
        "attempt_number": t.n,
        "attempted_at": time(TimestampMs(t.at_ms)),
        "status_code": t.status,
        "response_body": t.response.as_ref().map(|r| String::from_utf8_lossy(r).into_owned()),
        "response_time_ms": t.duration_ms,
        "error_message": t.error,
    })
}

/// What a delivery did before it was sent again. A life ends with its success; one that ended without any is told
/// together with the one after it.
fn former(d: &Found, tries: &[&AttemptView], automatic: bool) -> Value {
    let last = tries.last();
    let delivered = last.is_some_and(|t| t.is_delivered());
    let state = if delivered { DeliveryState::Delivered } else { DeliveryState::Dead };
    let created_at_ms =
        if automatic { d.created_at_ms } else { tries.first().map_or(d.created_at_ms, |t| t.at_ms) };
    json!({
        "status": state.as_str(),
        "is_automatic": automatic,
        "attempt_count": tries.len(),
        "next_attempt_at": null,
        "failure_reason_code": last.and_then(|t| reason(state, t.status, t.error.as_deref())),
        "created_at": time(TimestampMs(created_at_ms)),
        "completed_at": moment(last.map(|t| t.at_ms.saturating_add_unsigned(t.duration_ms))),
        "attempts": tries.iter().map(|t| attempt_json(t)).collect::<Vec<_>>(),
    })
}

async fn history(api: &Api, who: &Principal, of: &Subject) -> Result<Value, ApiError> {
    let secret =
        live_secrets(api.store.read(), &api.key, who.project).await?.first().map(|s| s.id.to_string());
    let tries = attempts_of(api.store.read(), who.project, of.owner).await?;
    let max_attempts = Schedule::of(of.profile.unwrap_or(api.webhook_profile)).max_tries(true);
    let mut deliveries = Vec::new();
    for d in owed(api, who, of).await? {
        let filter = DeliveryFilter::one(d.place.owner, d.place.seq, d.place.target);
        let item =
            after_sequence(api.store.read(), who.project, &filter, d.place.seq.saturating_sub(1), 1).await?;
        let bytes: u64 = item.iter().flat_map(|i| &i.body.parts).map(|p| p.size_bytes).sum();
        let logged: Vec<&AttemptView> =
            tries.iter().filter(|t| (t.seq, t.target) == (d.place.seq, d.place.target)).collect();
        let (before, now) = logged.split_at(logged.partition_point(|t| t.n <= d.attempts_before));
        let mut attempts: Vec<Value> = now.iter().map(|t| attempt_json(t)).collect();
        if d.state == DeliveryState::Delivered {
            attempts.push(acknowledged_json(&d));
        }
        let earlier = before
            .split_inclusive(|t| t.is_delivered())
            .enumerate()
            .map(|(n, life)| former(&d, life, n == 0));
        let current = json!({
            "status": d.state.as_str(),
            "is_automatic": d.replays == 0,
            "attempt_count": d.attempts.saturating_sub(d.attempts_before),
            "next_attempt_at": moment(d.next_attempt_at_ms),
            "failure_reason_code": reason(d.state, d.last_status, d.last_error.as_deref()),
            "created_at": time(TimestampMs(d.created_at_ms)),
            "completed_at": moment(d.ended_at_ms),
            "attempts": attempts,
        });
        let mut lives: Vec<Value> = earlier.chain([current]).collect();
        for life in &mut lives {
            life["id"] = d.id().into();
            life["signing_secret_id"] = secret.clone().into();
            life["max_attempts"] = max_attempts.into();
            life["payload_bytes"] = bytes.into();
        }
        deliveries.extend(lives.into_iter().rev());
    }
    Ok(json!({"callback_url": of.callback_url.as_deref().map(redact_url), "deliveries": deliveries}))
}

/// `GET /v1/runs/{id}/callback`
pub(crate) async fn of_run(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, RunflowError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let subject = run(&api, &who, &id).await?;
    Ok(json_value(StatusCode::OK, &history(&api, &who, &subject).await?))
}

/// `GET /v1/batches/{id}/callback`
pub(crate) async fn of_batch(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, RunflowError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let subject = batch(&api, &who, &id).await?;
    Ok(json_value(StatusCode::OK, &history(&api, &who, &subject).await?))
}

/// Sends the newest end's callback again. Unlike Runflow's, the body is the one that was sent before, byte for byte,
/// under the same webhook-id.
async fn again(api: &Api, who: &Principal, of: &Subject, id: &str) -> Result<Response, RunflowError> {
    let kind = of.kind;
    if of.callback_url.is_none() {
        return Err(RunflowError::validation(
            "no_callback_url",
            format!("this {kind} has no callback_url; give one when you submit it"),
        ));
    }
    if !of.ended {
        return Err(RunflowError::validation(
            "not_terminal",
            format!("this {kind} has not ended; its callback goes out with its end"),
        ));
    }
    let in_flight = || {
        RunflowError::validation(
            "conflict",
            format!("a callback of this {kind} is on its way already; see GET /v1/{kind}s/{id}/callback"),
        )
    };
    let newest = owed(api, who, of).await?.into_iter().next().ok_or_else(|| {
        RunflowError::validation("not_terminal", format!("nothing is kept of the callback of this {kind}"))
    })?;
    let place = newest.place;
    let (_, done) = redeliver_one(api, who, (place.owner, place.seq, place.target)).await?;
    match done {
        Redelivery::Made => Ok(json_value(
            StatusCode::ACCEPTED,
            &json!({
                "id": newest.id(),
                (format!("{kind}_id")): id,
                "status": "pending",
                "is_automatic": false,
                "created_at": time(TimestampMs(api.store.now_ms().await?)),
            }),
        )),
        Redelivery::Pending | Redelivery::Running => Err(in_flight()),
        Redelivery::Absent => Err(ApiError::no_job().into()),
    }
}

/// `POST /v1/runs/{id}/callback-redeliveries`
pub(crate) async fn redeliver_run(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, RunflowError> {
    let who = api.auth.authorize(&headers, ScopeSet::SUBMIT).await?;
    let subject = run(&api, &who, &id).await?;
    again(&api, &who, &subject, &id).await
}

/// `POST /v1/batches/{id}/callback-redeliveries`
pub(crate) async fn redeliver_batch(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, RunflowError> {
    let who = api.auth.authorize(&headers, ScopeSet::SUBMIT).await?;
    let subject = batch(&api, &who, &id).await?;
    again(&api, &who, &subject, &id).await
}
