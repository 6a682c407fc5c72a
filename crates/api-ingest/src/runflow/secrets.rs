//! `/v1/callback-secrets`: the project's secrets, the way Runflow manages them: make the second, let receivers know
//! both, delete the old one. All live ones sign `webhook-signature`; the newest one signs `Runflow-Signature`.

use std::sync::Arc;

use axum::{
    extract::{Path, Request, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse as _, Response},
};
use ringback_domain::{TimestampMs, webhook::runflow_body::time};
use ringback_store::{
    Urgency,
    auth::ScopeSet,
    project_secrets::{last_used_ms, remove},
    secrets::{ProjectSecret, live_secrets},
    webhooks::secrets::Removed,
};
use serde_json::{Value, json};

use super::RunflowError;
use crate::{
    auth::Principal,
    error::ApiError,
    native::{
        webhook_fields::label_of,
        webhook_secrets::{add_to_project, refuse_configured},
        webhooks::{object, secret_of},
    },
    render::json_value,
    state::Api,
};

/// Characters of a secret that lists show.
const PREFIX_CHARS: usize = 10;

fn secret_json(n: usize, s: &ProjectSecret, last_used: Option<i64>) -> Value {
    let moment = |ms: Option<i64>| ms.map(|ms| time(TimestampMs(ms)));
    json!({
        "id": s.id.to_string(),
        "label": s.label,
        "key_prefix": s.secret.expose().chars().take(PREFIX_CHARS).collect::<String>(),
        "is_current": n == 0,
        "created_at": time(TimestampMs(s.created_at_ms)),
        "disabled_at": moment(s.expires_at_ms),
        "last_used_at": moment(last_used.filter(|at| *at >= s.created_at_ms)),
    })
}

async fn all(api: &Api, who: &Principal) -> Result<Vec<(i64, Value)>, ApiError> {
    let live = live_secrets(api.store.read(), &api.key, who.project).await?;
    let used = last_used_ms(api.store.read(), who.project).await?;
    Ok(live.iter().enumerate().map(|(n, s)| (s.id, secret_json(n, s, used))).collect())
}

/// `POST /v1/callback-secrets {label?}`: the only answer with `plain_secret`.
pub(crate) async fn create(State(api): State<Arc<Api>>, request: Request) -> Result<Response, RunflowError> {
    let (head, body) = request.into_parts();
    let who = api.auth.authorize(&head.headers, ScopeSet::ADMIN).await?;
    let object = match object(&api, &head.headers, body).await {
        Err(error) if error.detail.contains("body is empty") => serde_json::Map::new(),
        other => other?,
    };
    let label = label_of(object.get("label").unwrap_or(&Value::Null), "/label")?;
    let secret = secret_of(None)?;
    let made = add_to_project(&api, &who, &secret, label, None).await?;
    let found = all(&api, &who).await?.into_iter().find(|(id, _)| *id == made);
    let (_, mut shown) = found.ok_or_else(|| ApiError::unavailable("the secret was taken away meanwhile"))?;
    shown["plain_secret"] = secret.expose().as_str().into();
    Ok(json_value(StatusCode::CREATED, &shown))
}

/// `GET /v1/callback-secrets`
pub(crate) async fn list(State(api): State<Arc<Api>>, headers: HeaderMap) -> Result<Response, RunflowError> {
    let who = api.auth.authorize(&headers, ScopeSet::ADMIN).await?;
    let all: Vec<Value> = all(&api, &who).await?.into_iter().map(|(_, shown)| shown).collect();
    Ok(json_value(StatusCode::OK, &json!({"data": all, "callback_secrets": all})))
}

/// `DELETE /v1/callback-secrets/{id}`: it stops signing at once.
pub(crate) async fn delete(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, RunflowError> {
    let who = api.auth.authorize(&headers, ScopeSet::ADMIN).await?;
    refuse_configured(&api, &who)?;
    let none =
        || ApiError::not_found("callback secret not found: this project has no live secret with this id");
    let id: i64 = id.parse().map_err(|_| none())?;
    let (project, key) = (who.project, api.key.clone());
    let removed = api
        .store
        .write(Urgency::Now, move |tx| {
            let key = key.clone();
            Box::pin(async move { remove(tx, &key, project, id).await })
        })
        .await?;
    match removed {
        Removed::Done => Ok(StatusCode::NO_CONTENT.into_response()),
        Removed::Absent => Err(none().into()),
        Removed::Last => Err(RunflowError::validation(
            "conflict",
            "this is the only secret, and nothing is sent unsigned; make another one first",
        )),
    }
}
