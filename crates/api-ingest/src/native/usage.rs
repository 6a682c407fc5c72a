//! `/v1/usage`: what a project has used of its quotas.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
    response::Response,
};
use ringback_domain::{TimestampMs, usage::percentage};
use ringback_store::{auth::ScopeSet, usage::usage_of};
use serde_json::{Value, json};

use crate::{error::NativeError, render::json_value, state::Api};

/// `GET /v1/usage`
pub(crate) async fn get(State(api): State<Arc<Api>>, headers: HeaderMap) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let registry = api.store.registry().await?;
    let Some(quota) = registry.quota(who.project) else {
        // Nothing is counted where nothing is limited.
        let shown = json!({"period": null, "period_start": null, "reset_at": null, "usage": []});
        return Ok(json_value(StatusCode::OK, &shown));
    };
    let now = TimestampMs(api.store.now_ms().await?);
    let (start, end) = quota.period.around(now);
    let usage: Vec<Value> = usage_of(api.store.read(), who.project, quota, now)
        .await?
        .into_iter()
        .map(|u| {
            json!({
                "metric": u.metric.as_str(),
                "current_usage": u.used,
                "limit": u.limit,
                "percentage": percentage(u.used, u.limit),
                "reset_at": end.rfc3339(),
            })
        })
        .collect();
    let shown = json!({
        "period": quota.period.as_str(),
        "period_start": start.rfc3339(),
        "reset_at": end.rfc3339(),
        "usage": usage,
    });
    Ok(json_value(StatusCode::OK, &shown))
}
