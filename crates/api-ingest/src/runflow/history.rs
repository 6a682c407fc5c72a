//! The tries of registered webhooks' deliveries, as Runflow's organisation sees them: `any` stands for every webhook or
//! delivery.

use std::sync::Arc;

use axum::{
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use ringback_domain::event::EventType;
use ringback_store::{
    auth::ScopeSet,
    deliveries::{DeliveryState, attempts_of},
    delivery_search::{DeliveryFilter, Found, one, search},
};
use serde_json::{Value, json};

use super::{
    RunflowError,
    callbacks::{acknowledged_json, attempt_json},
};
use crate::{
    auth::Principal,
    error::ApiError,
    native::delivery_filter::{parse_message_id, target_of},
    render::json_value,
    state::Api,
};

/// Deliveries that `any` looks at, the newest first.
const DELIVERIES_MAX: u32 = 50;
const ANY: &str = "any";

async fn tries(api: &Api, who: &Principal, d: &Found) -> Result<Vec<Value>, ApiError> {
    let all = attempts_of(api.store.read(), who.project, d.place.owner).await?;
    let mut shown: Vec<Value> =
        all.iter().filter(|t| (t.seq, t.target) == (d.place.seq, d.place.target)).map(attempt_json).collect();
    if d.state == DeliveryState::Delivered {
        shown.push(acknowledged_json(d));
    }
    for one in &mut shown {
        one["delivery_id"] = d.id().into();
        one["event"] = EventType::from_code(d.event).map_or("unknown", EventType::name).into();
    }
    Ok(shown)
}

/// `GET /v1/webhooks/{id or any}/deliveries/{webhook-id or any}/attempts`
pub(crate) async fn attempts(
    State(api): State<Arc<Api>>,
    Path((webhook, delivery)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, RunflowError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let target = if webhook == ANY { None } else { Some(target_of(&api, &who, &webhook).await?) };
    let found = if delivery == ANY {
        let filter = DeliveryFilter { target, ..DeliveryFilter::default() };
        search(api.store.read(), who.project, &filter, None, DELIVERIES_MAX).await?
    } else {
        let absent = || ApiError::not_found("delivery not found: this webhook has no delivery with this id");
        let (owner, seq, to) = parse_message_id(&delivery).ok_or_else(absent)?;
        let found = one(api.store.read(), who.project, owner, seq, to).await?;
        vec![found.filter(|_| target.is_none_or(|t| t == to)).ok_or_else(absent)?]
    };
    let mut all = Vec::new();
    for d in &found {
        all.extend(tries(&api, &who, d).await?);
    }
    Ok(json_value(StatusCode::OK, &json!({"attempts": all})))
}
