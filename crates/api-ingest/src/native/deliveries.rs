//! `/v1/deliveries`: what is owed to receivers, with every try.

use std::{collections::HashMap, sync::Arc};

use axum::{
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use ringback_domain::{BatchId, JobId, event::event_id};
use ringback_service_runtime::redact_url;
use ringback_store::{
    Urgency,
    auth::ScopeSet,
    deliveries::{DeliveryState, attempts_of, event_name},
    delivery_search::{Found, one, search},
    replays::DeliveryKey,
    replays_api::{self, Redelivery},
    webhooks::crud,
};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    delivery_filter::{of_query, parse_message_id, webhook_name},
    feed::{cursor_of, parse_cursor},
    job_view::time,
    jobs::attempt_json,
    limit_of, parameter,
    replays::new_replay_id,
};
use crate::{
    auth::Principal,
    error::{ApiError, NativeError},
    render::{json_value, rfc3339},
    state::Api,
};

fn delivery_json(names: &HashMap<i64, String>, d: &Found) -> Value {
    let owner = *d.place.owner.as_bytes();
    let job = d.sync_id.map(|sync| JobId::from_uuid(Uuid::from_bytes(owner)).public(sync));
    let batch = d.of_batch.then(|| BatchId::from_uuid(Uuid::from_bytes(owner)).to_string());
    let delivered = d.ended_at_ms.filter(|_| d.state == DeliveryState::Delivered);
    json!({
        "id": d.id(),
        "event_id": event_id(d.place.owner, d.place.seq),
        "type": event_name(d.event),
        "job_id": job,
        "batch_id": batch,
        "sequence": d.place.seq,
        "terminal": d.terminal,
        "webhook": webhook_name(names, d.place.target),
        "url": if d.url.is_empty() { Value::Null } else { redact_url(&d.url).into() },
        "state": d.state.as_str(),
        "attempts": d.attempts,
        "replays": d.replays,
        "created_at": rfc3339(d.created_at_ms),
        "next_attempt_at": time(d.next_attempt_at_ms),
        "ended_at": time(d.ended_at_ms),
        "delivered_at": time(delivered),
        "last_status": d.last_status,
        "last_error": d.last_error,
    })
}

fn absent() -> ApiError {
    ApiError::not_found(
        "delivery not found: this project has no delivery with this webhook-id, or its retention time is over",
    )
}

async fn find(api: &Api, who: &Principal, id: &str) -> Result<Found, ApiError> {
    let (owner, seq, target) = parse_message_id(id).ok_or_else(absent)?;
    one(api.store.read(), who.project, owner, seq, target).await?.ok_or_else(absent)
}

/// `GET /v1/deliveries?state=&type=&endpoint=&webhook=&job=&batch=&from=&to=&limit=&cursor=`: newest first.
/// `state=dead` is the list of dead letters.
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let limit = limit_of(&query)?;
    let filter = of_query(&api, &who, &query).await?;
    let before = parameter(&query, "cursor", "the next_cursor of a former page", |text| {
        parse_cursor(text).map(|(_, place)| place)
    })?;
    let found = search(api.store.read(), who.project, &filter, before, limit).await?;
    let names = crud::names(api.store.read(), who.project).await?;
    let next = match found.last() {
        Some(last) if found.len() == limit as usize => Some(cursor_of(&api, &last.place)),
        _ => None,
    };
    let all: Vec<Value> = found.iter().map(|d| delivery_json(&names, d)).collect();
    Ok(json_value(StatusCode::OK, &json!({"deliveries": all, "next_cursor": next})))
}

/// The tries of a delivery in order: the logged ones, and the one whose success is its state.
async fn tries(api: &Api, who: &Principal, d: &Found) -> Result<Vec<Value>, ApiError> {
    let all = attempts_of(api.store.read(), who.project, d.place.owner).await?;
    let mut shown: Vec<Value> =
        all.iter().filter(|t| (t.seq, t.target) == (d.place.seq, d.place.target)).map(attempt_json).collect();
    if d.state == DeliveryState::Delivered {
        let took = d.duration_ms.unwrap_or_default();
        shown.push(json!({
            "n": d.attempts,
            "outcome": "delivered",
            "at": time(d.ended_at_ms.map(|at| at.saturating_sub(took))),
            "duration_ms": d.duration_ms,
            "dns_ms": d.timings.dns_ms,
            "connect_ms": d.timings.connect_ms,
            "first_byte_ms": d.timings.first_byte_ms,
            "status": d.last_status,
            "error": null,
            "address": d.address,
            "response": d.response.as_ref().map(|r| String::from_utf8_lossy(r).into_owned()),
        }));
    }
    Ok(shown)
}

/// `GET /v1/deliveries/{webhook-id}`
pub(crate) async fn get(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let found = find(&api, &who, &id).await?;
    let names = crud::names(api.store.read(), who.project).await?;
    let mut shown = delivery_json(&names, &found);
    shown["attempt_log"] = tries(&api, &who, &found).await?.into();
    Ok(json_value(StatusCode::OK, &shown))
}

/// `GET /v1/deliveries/{webhook-id}/attempts`
pub(crate) async fn attempts(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let found = find(&api, &who, &id).await?;
    let all = tries(&api, &who, &found).await?;
    Ok(json_value(StatusCode::OK, &json!({"attempts": all})))
}

/// Sends one delivery again, under the same webhook-id and with the same bytes. Answers the replay that does it.
pub(crate) async fn redeliver_one(
    api: &Api,
    who: &Principal,
    (owner, seq, target): (Uuid, u32, u32),
) -> Result<(Uuid, Redelivery), ApiError> {
    let (id, project) = (new_replay_id(), who.project);
    let of = DeliveryKey { owner, seq, target };
    let done = api
        .store
        .write(Urgency::Now, move |tx| {
            Box::pin(async move { replays_api::redeliver(tx, id, project, of).await })
        })
        .await?;
    if done == Redelivery::Made {
        api.bus.announce_replays().await;
    }
    Ok((id, done))
}

/// `POST /v1/deliveries/{webhook-id}/redeliver`
pub(crate) async fn redeliver(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::SUBMIT).await?;
    let of = parse_message_id(&id).ok_or_else(absent)?;
    let (replay, done) = redeliver_one(&api, &who, of).await?;
    match done {
        Redelivery::Made => Ok(json_value(
            StatusCode::ACCEPTED,
            &json!({"delivery_id": id, "replay_id": super::replays::public_id(replay)}),
        )),
        Redelivery::Absent => Err(absent().into()),
        Redelivery::Pending => Err(ApiError::conflict(
            "the delivery is pending: it will be sent anyway; GET it for the time of its next try",
        )
        .into()),
        Redelivery::Running => {
            Err(ApiError::conflict("the delivery is being sent again already; wait for that").into())
        }
    }
}
