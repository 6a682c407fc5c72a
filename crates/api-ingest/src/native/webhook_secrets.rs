//! Secrets: of one webhook, and those of the project, which sign the webhooks of its jobs.
//!
//! A secret is shown once, in the answer to the request that makes it. Only the project's own are shown again, to
//! keys with the scope `admin`, as Replicate's `default/secret` route does.

use std::sync::Arc;

use axum::{
    extract::{Path, Request, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse as _, Response},
};
use ringback_domain::webhook::signature::SecretForm;
use ringback_service_runtime::Redacted;
use ringback_store::{
    Urgency,
    auth::ScopeSet,
    project_secrets::{self, Added},
    secrets::live_secrets,
    webhooks::secrets::{self, MAX_LIVE, Removed, Rotated, WebhookSecret, seal_secret},
};
use serde_json::{Map, Value, json};

use super::{
    job_view::time,
    webhook_fields::label_of,
    webhooks::{absent, find, form_json, object, secret_of},
};
use crate::{
    auth::Principal,
    error::{ApiError, NativeError},
    render::{json_value, rfc3339},
    state::Api,
};

/// How long a former secret still signs, unless the request says otherwise.
const OVERLAP_DEFAULT_HOURS: f64 = 24.0;
const OVERLAP_MAX_HOURS: f64 = 24.0 * 31.0;

/// `expire_old_after_hours` in ms.
fn overlap_ms(object: &Map<String, Value>) -> Result<u64, ApiError> {
    let hours = match object.get("expire_old_after_hours") {
        None | Some(Value::Null) => OVERLAP_DEFAULT_HOURS,
        Some(value) => value.as_f64().filter(|h| (0.0..=OVERLAP_MAX_HOURS).contains(h)).ok_or_else(|| {
            ApiError::field(
                "/expire_old_after_hours",
                format!("must be a number of hours from 0 (at once) to {OVERLAP_MAX_HOURS}"),
            )
        })?,
    };
    // At most 31 days: it fits.
    Ok((hours * 3_600_000.0) as u64)
}

fn known(object: &Map<String, Value>, names: &[&str]) -> Result<(), ApiError> {
    match object.keys().find(|name| !names.contains(&name.as_str())) {
        None => Ok(()),
        Some(unknown) => Err(ApiError::field(
            format!("/{}", unknown.replace('~', "~0").replace('/', "~1")),
            format!("is unknown here; known are {}", names.join(", ")),
        )),
    }
}

/// An empty body is an empty object: everything has a default.
async fn optional_object(api: &Api, request: Request) -> Result<Map<String, Value>, ApiError> {
    let (head, body) = request.into_parts();
    match object(api, &head.headers, body).await {
        Err(error) if error.detail.contains("body is empty") => Ok(Map::new()),
        other => other,
    }
}

fn secret_json(n: usize, secret: &WebhookSecret) -> Value {
    json!({
        "id": secret.id.to_string(),
        "current": n == 0,
        "form": match secret.form() { SecretForm::Standard => "standard", SecretForm::Raw => "raw" },
        "created_at": rfc3339(secret.created_at_ms),
        "expires_at": time(secret.expires_at_ms),
    })
}

/// `GET /v1/webhooks/{id}/secrets`: which sign now, without their texts.
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::ADMIN).await?;
    let row = find(&api, &who, &id).await?;
    let now = api.store.now_ms().await?;
    let live = secrets::live(api.store.read(), &api.key, row.id, &row.public_id, now).await?;
    let all: Vec<Value> = live.iter().enumerate().map(|(n, s)| secret_json(n, s)).collect();
    Ok(json_value(StatusCode::OK, &json!({"secrets": all})))
}

/// `POST /v1/webhooks/{id}/secrets {secret?, expire_old_after_hours?}`: the new one signs at once, beside the old.
pub(crate) async fn add(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(request.headers(), ScopeSet::ADMIN).await?;
    let row = find(&api, &who, &id).await?;
    let object = optional_object(&api, request).await?;
    known(&object, &["secret", "expire_old_after_hours"])?;
    let secret = secret_of(object.get("secret"))?;
    let overlap = overlap_ms(&object)?;
    let sealed = seal_secret(&api.key, &row.public_id, &secret)?;
    let (project, name) = (who.project, row.public_id.clone());
    let rotated = api
        .store
        .write(Urgency::Now, move |tx| {
            let (name, sealed) = (name.clone(), sealed.clone());
            Box::pin(async move { secrets::rotate(tx, project, &name, &sealed, overlap).await })
        })
        .await?;
    let made = match rotated {
        Rotated::Done(made) => made,
        Rotated::Absent => return Err(absent().into()),
        Rotated::TooMany => {
            return Err(ApiError::conflict(format!(
                "{MAX_LIVE} secrets of this webhook sign already, the most that may; delete one, or use \
                 \"expire_old_after_hours\": 0"
            ))
            .into());
        }
    };
    let now = api.store.now_ms().await?;
    let live = secrets::live(api.store.read(), &api.key, row.id, &row.public_id, now).await?;
    let mut shown = match live.iter().position(|s| s.id == made) {
        Some(n) => secret_json(n, &live[n]),
        None => json!({"id": made.to_string()}),
    };
    shown["secret"] = secret.expose().as_str().into();
    form_json(&secret, &mut shown);
    Ok(json_value(StatusCode::CREATED, &shown))
}

/// `DELETE /v1/webhooks/{id}/secrets/{secret}`: it stops signing at once.
pub(crate) async fn remove(
    State(api): State<Arc<Api>>,
    Path((id, secret)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::ADMIN).await?;
    find(&api, &who, &id).await?;
    let none = || ApiError::not_found("secret not found: no live secret of this webhook has this id");
    let secret: i64 = secret.parse().map_err(|_| none())?;
    let project = who.project;
    let removed = api
        .store
        .write(Urgency::Now, move |tx| {
            let id = id.clone();
            Box::pin(async move { secrets::remove(tx, project, &id, secret).await })
        })
        .await?;
    match removed {
        Removed::Done => Ok(StatusCode::NO_CONTENT.into_response()),
        Removed::Absent => Err(none().into()),
        Removed::Last => Err(ApiError::conflict(
            "no other secret of this webhook stays, and nothing is sent unsigned; add one first",
        )
        .into()),
    }
}

/// `GET /v1/webhooks/default/secret`: the secrets that sign this project's job webhooks, newest first.
pub(crate) async fn project_get(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::ADMIN).await?;
    Ok(json_value(StatusCode::OK, &project_json(&api, &who).await?))
}

async fn project_json(api: &Api, who: &Principal) -> Result<Value, ApiError> {
    let live = live_secrets(api.store.read(), &api.key, who.project).await?;
    let all: Vec<_> = live
        .iter()
        .map(|s| {
            json!({"id": s.id.to_string(), "secret": s.secret.expose(), "label": s.label,
                   "created_at": rfc3339(s.created_at_ms), "expires_at": time(s.expires_at_ms)})
        })
        .collect();
    Ok(json!({"secret": all.first().map(|s| s["secret"].clone()), "secrets": all}))
}

/// The secrets of a project that its configuration names are changed there: at the next start it would undo what was
/// done here.
pub(crate) fn refuse_configured(api: &Api, who: &Principal) -> Result<(), ApiError> {
    if !api.configured_secrets.contains(&who.project) {
        return Ok(());
    }
    Err(ApiError::conflict(
        "the webhook secrets of this project come from the server's configuration (setting \
         projects.<name>.webhook_secrets); rotate them there: list the new one first and keep the old one for a while",
    ))
}

/// Adds a secret to the project; the ones before it sign for `overlap_ms` longer, or on as they do.
pub(crate) async fn add_to_project(
    api: &Api,
    who: &Principal,
    secret: &Redacted<String>,
    label: Option<String>,
    overlap_ms: Option<u64>,
) -> Result<i64, ApiError> {
    refuse_configured(api, who)?;
    let (project, key, secret) = (who.project, api.key.clone(), secret.clone());
    let added = api
        .store
        .write(Urgency::Now, move |tx| {
            let (key, secret, label) = (key.clone(), secret.clone(), label.clone());
            Box::pin(async move {
                project_secrets::add(tx, &key, project, &secret, label.as_deref(), overlap_ms).await
            })
        })
        .await?;
    match added {
        Added::Done(id) => Ok(id),
        Added::TooMany => Err(ApiError::conflict(format!(
            "{MAX_LIVE} secrets of this project sign already, the most that may; delete one first"
        ))),
    }
}

/// `POST /v1/webhooks/default/secret {secret?, expire_old_after_hours?, label?}`
pub(crate) async fn project_rotate(
    State(api): State<Arc<Api>>,
    request: Request,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(request.headers(), ScopeSet::ADMIN).await?;
    let object = optional_object(&api, request).await?;
    known(&object, &["secret", "expire_old_after_hours", "label"])?;
    let secret = secret_of(object.get("secret"))?;
    let label = label_of(object.get("label").unwrap_or(&Value::Null), "/label")?;
    add_to_project(&api, &who, &secret, label, Some(overlap_ms(&object)?)).await?;
    let mut shown = project_json(&api, &who).await?;
    form_json(&secret, &mut shown);
    Ok(json_value(StatusCode::CREATED, &shown))
}
