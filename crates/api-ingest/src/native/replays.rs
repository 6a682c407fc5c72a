//! `/v1/replays`: deliveries sent again by filter, under the same ids and with the same bytes. A dispatcher works a
//! replay off; this side makes, shows and cancels it.

use std::{collections::HashMap, sync::Arc};

use axum::{
    extract::{Path, Query, Request, State},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use ringback_domain::BatchId;
use ringback_store::{
    StoreError, Urgency,
    auth::ScopeSet,
    deliveries::DeliveryState,
    replays::{self, Replay, ReplayFilter, ReplayState},
    replays_api::{self, NewReplay},
    webhooks::crud,
};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{
    delivery_filter::{events_of, moment, shown, state_of, target_of},
    limit_of, parameter,
    webhooks::object,
};
use crate::{
    auth::Principal,
    error::{ApiError, NativeError},
    render::{json_value, rfc3339},
    state::Api,
};

const RATE_DEFAULT: u32 = 50;
const RATE_MAX: u64 = 1_000;
/// Replays of one project that run at once.
const RUNNING_MAX: usize = 20;
const KNOWN: [&str; 8] =
    ["from", "to", "types", "endpoint", "webhook", "states", "rate_per_second", "dry_run"];

/// A new replay's key.
pub(super) fn new_replay_id() -> Uuid {
    let now = u64::try_from(ringback_service_runtime::time::now_ms()).unwrap_or(0);
    Uuid::from_bytes(*BatchId::from_parts(now, rand::random()).as_bytes())
}

/// A replay's id in URLs.
pub(super) fn public_id(id: Uuid) -> String {
    format!("rp_{}", id.simple())
}

fn parse_id(text: &str) -> Option<Uuid> {
    let id = BatchId::parse_simple(text.strip_prefix("rp_")?).ok()?;
    Some(Uuid::from_bytes(*id.as_bytes()))
}

fn absent() -> ApiError {
    ApiError::not_found("replay not found: this project has no replay with this id")
}

fn replay_json(api: &Api, names: &HashMap<i64, String>, row: &Replay) -> Value {
    let progress = match (row.state, row.matched) {
        (ReplayState::Done, _) => 1.0,
        (_, 0) => 0.0,
        (_, matched) => (row.queued as f64 / matched as f64).min(1.0),
    };
    json!({
        "id": public_id(row.id),
        "state": row.state.as_str(),
        "matched": row.matched,
        "queued": row.queued,
        "progress": progress,
        "rate_per_second": row.rate_per_second,
        "filter": shown(api, names, &row.filter),
        "created_at": rfc3339(row.created_at_ms),
        "updated_at": rfc3339(row.updated_at_ms),
    })
}

fn list_of<'a>(object: &'a Map<String, Value>, name: &str) -> Result<Vec<&'a str>, ApiError> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(all)) if all.iter().all(Value::is_string) => {
            Ok(all.iter().filter_map(Value::as_str).collect())
        }
        Some(_) => Err(ApiError::field(format!("/{name}"), "must be a list of texts")),
    }
}

async fn filter_of(
    api: &Api,
    who: &Principal,
    object: &Map<String, Value>,
) -> Result<ReplayFilter, ApiError> {
    if let Some(unknown) = object.keys().find(|name| !KNOWN.contains(&name.as_str())) {
        return Err(ApiError::field(
            format!("/{}", unknown.replace('~', "~0").replace('/', "~1")),
            format!("is not a member of a replay; known are {}", KNOWN.join(", ")),
        ));
    }
    let text = |name: &str| match object.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(_) => Err(ApiError::field(format!("/{name}"), "must be a text")),
    };
    let now = api.store.now_ms().await?;
    let at = |name: &str| -> Result<Option<i64>, ApiError> {
        let Some(text) = text(name)? else { return Ok(None) };
        moment(text, now).map(Some).ok_or_else(|| {
            ApiError::field(
                format!("/{name}"),
                "must be a time such as 2026-11-21T12:00:00Z, or a time ago such as 24h",
            )
        })
    };
    let (from_ms, to_ms) = (at("from")?, at("to")?);
    if let (Some(from), Some(to)) = (from_ms, to_ms)
        && from >= to
    {
        return Err(ApiError::field("/to", "must be later than `from`"));
    }
    let types: Vec<String> = list_of(object, "types")?.into_iter().map(str::to_owned).collect();
    let mut states = Vec::new();
    for (n, word) in list_of(object, "states")?.into_iter().enumerate() {
        let state = state_of(word).filter(|s| *s != DeliveryState::Pending).ok_or_else(|| {
            ApiError::field(
                format!("/states/{n}"),
                "must be delivered, dead, superseded or cancelled; what is pending is sent anyway",
            )
        })?;
        states.push(state.code());
    }
    if states.is_empty() {
        states = vec![DeliveryState::Delivered.code(), DeliveryState::Dead.code()];
    }
    Ok(ReplayFilter {
        delivery: None,
        target: match text("webhook")? {
            None => None,
            Some(id) => {
                Some(target_of(api, who, id).await.map_err(|e| ApiError::field("/webhook", e.detail))?)
            }
        },
        endpoint_id: match text("endpoint")? {
            None => None,
            Some(name) => {
                let found = api.catalog.find(who.project, name);
                Some(found.map_err(|e| ApiError::field("/endpoint", e.detail))?.id.0)
            }
        },
        events: if types.is_empty() { Vec::new() } else { events_of(&types, "/types")? },
        from_ms,
        to_ms,
        states,
    })
}

/// `POST /v1/replays {from?, to?, types?, endpoint?, webhook?, job?, states?, rate_per_second?, dry_run?}`
pub(crate) async fn create(State(api): State<Arc<Api>>, request: Request) -> Result<Response, NativeError> {
    let (head, body) = request.into_parts();
    let who = api.auth.authorize(&head.headers, ScopeSet::SUBMIT).await?;
    let object = object(&api, &head.headers, body).await?;
    let filter = filter_of(&api, &who, &object).await?;
    let rate = match object.get("rate_per_second") {
        None | Some(Value::Null) => RATE_DEFAULT,
        Some(value) => value
            .as_u64()
            .filter(|n| (1..=RATE_MAX).contains(n))
            .and_then(|n| u32::try_from(n).ok())
            .ok_or_else(|| {
                ApiError::field("/rate_per_second", format!("must be a whole number from 1 to {RATE_MAX}"))
            })?,
    };
    let dry = match object.get("dry_run") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(dry)) => *dry,
        Some(_) => return Err(ApiError::field("/dry_run", "must be true or false").into()),
    };
    // Counted outside of the write, which others share: in a large window it takes a while.
    let upto = replays_api::upto_now(api.store.read()).await?;
    let matched = replays::count(api.store.read(), who.project, &filter, upto).await?;
    let names = crud::names(api.store.read(), who.project).await?;
    if dry {
        let shown = json!({"dry_run": true, "matched": matched, "filter": shown(&api, &names, &filter)});
        return Ok(json_value(StatusCode::OK, &shown));
    }
    if replays_api::running(api.store.read(), who.project).await?.len() >= RUNNING_MAX {
        return Err(ApiError::conflict(format!(
            "{RUNNING_MAX} replays of this project run already; wait for one of them, or cancel it"
        ))
        .into());
    }
    let new = NewReplay {
        id: new_replay_id(),
        project: who.project,
        filter,
        rate_per_second: rate,
        upto_position: upto,
        matched,
    };
    let id = new.id;
    let written = api
        .store
        .write(Urgency::Now, move |tx| {
            let new = new.clone();
            Box::pin(async move { replays_api::insert(tx, &new).await })
        })
        .await;
    match written {
        // After a commit whose answer was lost, SQL says what became of it.
        Ok(_) | Err(StoreError::CommitUnknown { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let row = replays::get(api.store.read(), who.project, id)
        .await?
        .ok_or_else(|| ApiError::unavailable("the replay was not committed; try again"))?;
    api.bus.announce_replays().await;
    Ok(json_value(StatusCode::CREATED, &replay_json(&api, &names, &row)))
}

/// `GET /v1/replays?limit=&cursor=`: newest first.
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let limit = limit_of(&query)?;
    let before = parameter(&query, "cursor", "the next_cursor of a former page", parse_id)?;
    let rows = replays_api::page(api.store.read(), who.project, before, limit).await?;
    let names = crud::names(api.store.read(), who.project).await?;
    let next = if rows.len() == limit as usize { rows.last().map(|row| public_id(row.id)) } else { None };
    let all: Vec<Value> = rows.iter().map(|row| replay_json(&api, &names, row)).collect();
    Ok(json_value(StatusCode::OK, &json!({"replays": all, "next_cursor": next})))
}

/// `GET /v1/replays/{id}`
pub(crate) async fn get(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let id = parse_id(&id).ok_or_else(absent)?;
    let row = replays::get(api.store.read(), who.project, id).await?.ok_or_else(absent)?;
    let names = crud::names(api.store.read(), who.project).await?;
    Ok(json_value(StatusCode::OK, &replay_json(&api, &names, &row)))
}

/// `DELETE /v1/replays/{id}`: what was queued stays queued, nothing more is.
pub(crate) async fn cancel(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::SUBMIT).await?;
    let id = parse_id(&id).ok_or_else(absent)?;
    let project = who.project;
    api.store
        .write(Urgency::Now, move |tx| Box::pin(async move { replays::cancel(tx, project, id).await }))
        .await?;
    // One that had ended stays as it was.
    let row = replays::get(api.store.read(), who.project, id).await?.ok_or_else(absent)?;
    api.bus.announce_replays().await;
    let names = crud::names(api.store.read(), who.project).await?;
    Ok(json_value(StatusCode::OK, &replay_json(&api, &names, &row)))
}
