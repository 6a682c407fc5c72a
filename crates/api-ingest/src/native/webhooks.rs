//! `/v1/webhooks`: places that hear of many jobs (row C6; also under `/webhooks`).
//!
//! Changing them needs the scope `admin`: whoever may, sees everything that the project does.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use ringback_contracts::catalogue::catalogue;
use ringback_domain::{
    JobId,
    event::{EventType, event_id, event_key},
    webhook::{
        body::Body,
        message_id,
        signature::{SecretForm, SigningKey, format_secret},
    },
};
use ringback_service_runtime::{REDACTED, Redacted, redact_url};
use ringback_store::{
    StoreError, Urgency,
    auth::ScopeSet,
    events::{Audience, NewEvent, emit},
    webhooks::{
        crud::{self, Created, NewWebhook, Settings, Updated, WebhookRow},
        secrets::{open_headers, seal_headers, seal_secret},
    },
};
use serde_json::{Map, Value, json};

use super::{
    job_view::time,
    webhook_fields::{Fields, expires_in_ms},
};
use crate::{
    auth::Principal,
    body::{BodyLimit, read_body},
    error::{ApiError, NativeError},
    render::{json_bytes, json_value, rfc3339},
    state::Api,
    submit::parse::parse_object,
};

/// Most webhooks of one project: each is asked about each of its events.
const PER_PROJECT_MAX: u32 = 200;
/// How often a change is tried again when another one came between.
const RACES: usize = 5;

/// The body of a request as an object.
pub(crate) async fn object(
    api: &Api,
    headers: &HeaderMap,
    body: axum::body::Body,
) -> Result<Map<String, Value>, ApiError> {
    let limit = BodyLimit { max_bytes: api.limits.max_body_bytes, setting: "max_body_bytes" };
    let body = read_body(headers, body, limit).await?;
    parse_object(&body, &api.rules)
}

/// Unknown, malformed, of another project, deleted, expired: all the same to the asker.
pub(super) fn absent() -> ApiError {
    ApiError::not_found(
        "webhook not found: this project has no webhook with this id, or it was deleted or has expired",
    )
}

/// A webhook of the asker's project.
pub(super) async fn find(api: &Api, who: &Principal, id: &str) -> Result<WebhookRow, ApiError> {
    let now = api.store.now_ms().await?;
    crud::get(api.store.read(), who.project, id, now).await?.ok_or_else(absent)
}

/// A secret that somebody sent, or a new random one.
pub(crate) fn secret_of(value: Option<&Value>) -> Result<Redacted<String>, ApiError> {
    let text = match value {
        None | Some(Value::Null) => format_secret(&rand::random::<[u8; 32]>()),
        Some(Value::String(text)) => text.clone(),
        Some(_) => {
            return Err(ApiError::field("/secret", "must be a text, or null to have one made"));
        }
    };
    // The reason names lengths only, never the text.
    SigningKey::parse(&text).map_err(|e| ApiError::field("/secret", format!("is refused: {e}")))?;
    Ok(Redacted::new(text))
}

/// How a secret is read, told to whoever sets it.
pub(super) fn form_json(secret: &Redacted<String>, into: &mut Value) {
    let form = SigningKey::parse(secret.expose()).map_or(SecretForm::Raw, |(_, form)| form);
    into["secret_form"] = match form {
        SecretForm::Standard => "standard",
        SecretForm::Raw => "raw",
    }
    .into();
    if form == SecretForm::Raw {
        into["secret_note"] =
            "the secret is not `whsec_` and base64, so the bytes of its text are the key: give the \
                               verifying library these bytes, not the text"
                .into();
    }
}

/// A webhook as a client sees it. URLs may hold credentials: only `admin` sees them whole; header values nobody does.
fn webhook_json(api: &Api, who: &Principal, row: &WebhookRow) -> Value {
    let filter: Value = serde_json::from_str(&row.filter).unwrap_or_default();
    let headers: Map<String, Value> = match &row.headers_encrypted {
        None => Map::new(),
        Some(sealed) => match open_headers(&api.key, &row.public_id, sealed) {
            Ok(all) => all.expose().keys().map(|name| (name.clone(), REDACTED.into())).collect(),
            Err(error) => {
                tracing::error!(webhook = row.public_id, %error, "the headers of a webhook cannot be read");
                Map::new()
            }
        },
    };
    let whole = who.scopes.allows(ScopeSet::ADMIN);
    let url = row.url.as_ref().map(|url| if whole { url.clone() } else { redact_url(url) });
    let health = &row.health;
    let state = match (&health.disabled, row.paused) {
        (Some(_), _) => "disabled",
        (None, true) => "paused",
        (None, false) => "active",
    };
    let fares = match (&health.disabled, health.failing_since_ms, health.last_success_at_ms) {
        (Some(_), _, _) => "disabled",
        (None, Some(_), _) => "failing",
        (None, None, Some(_)) => "healthy",
        (None, None, None) => "unknown",
    };
    json!({
        "id": row.public_id,
        "label": row.label,
        "url": url,
        "state": state,
        "format": row.format.as_str(),
        "events": filter.get("events").cloned().unwrap_or_default(),
        "endpoints": filter.get("endpoints").cloned().unwrap_or_else(|| json!([])),
        "metadata": filter.get("metadata").cloned().unwrap_or_else(|| json!({})),
        "headers": headers,
        "retry": row.retry.as_deref().and_then(|text| serde_json::from_str::<Value>(text).ok()),
        "rate_per_second": row.rate_per_second,
        "deadline_ms": row.deadline_ms,
        "strict_order": row.strict_order,
        "paused": row.paused,
        "disabled_at": time(health.disabled.as_ref().map(|(at, _)| *at)),
        "health": {
            "state": fares,
            "failing_since": time(health.failing_since_ms),
            "last_success_at": time(health.last_success_at_ms),
            "disabled_at": time(health.disabled.as_ref().map(|(at, _)| *at)),
            "disabled_reason": health.disabled.as_ref().map(|(_, reason)| reason),
        },
        "expires_at": time(row.expires_at_ms),
        "created_at": rfc3339(row.created_at_ms),
        "updated_at": rfc3339(row.updated_at_ms),
    })
}

/// The settings as they are stored.
fn sealed(api: &Api, public_id: &str, fields: &Fields) -> Result<Settings, ApiError> {
    let headers = fields.headers.expose();
    Ok(Settings {
        label: fields.label.clone(),
        url: fields.url.clone(),
        format: fields.format,
        filter: Value::Object(fields.filter.clone()).to_string(),
        headers_encrypted: if headers.is_empty() {
            None
        } else {
            Some(seal_headers(&api.key, public_id, headers)?)
        },
        retry: fields.retry.clone(),
        rate_per_second: fields.rate_per_second,
        deadline_ms: fields.deadline_ms,
        strict_order: fields.strict_order,
        paused: fields.paused,
    })
}

fn fields_of(api: &Api, row: &WebhookRow) -> Result<Fields, ApiError> {
    let headers = match &row.headers_encrypted {
        None => Redacted::new(BTreeMap::new()),
        Some(sealed) => open_headers(&api.key, &row.public_id, sealed)?,
    };
    let filter = match serde_json::from_str(&row.filter) {
        Ok(Value::Object(filter)) => filter,
        _ => Map::new(),
    };
    Ok(Fields {
        label: row.label.clone(),
        url: row.url.clone(),
        format: row.format,
        filter,
        headers,
        retry: row.retry.clone(),
        rate_per_second: row.rate_per_second,
        deadline_ms: row.deadline_ms,
        strict_order: row.strict_order,
        paused: row.paused,
    })
}

fn unix_ms() -> u64 {
    u64::try_from(ringback_service_runtime::time::now_ms()).unwrap_or(0)
}

/// `POST /v1/webhooks`
pub(crate) async fn create(State(api): State<Arc<Api>>, request: Request) -> Result<Response, NativeError> {
    let (head, body) = request.into_parts();
    let who = api.auth.authorize(&head.headers, ScopeSet::ADMIN).await?;
    api.disk.check()?;
    let object = object(&api, &head.headers, body).await?;
    let fields = Fields::of_new(&object, &api.rules)?;
    let secret = secret_of(object.get("secret"))?;
    let public_id = format!("wh_{}", JobId::from_parts(unix_ms(), rand::random()).simple());
    let new = NewWebhook {
        settings: sealed(&api, &public_id, &fields)?,
        secret_encrypted: seal_secret(&api.key, &public_id, &secret)?,
        expires_in_ms: expires_in_ms(&object)?.flatten(),
        project: who.project,
        public_id,
    };
    let row = insert(&api, &who, new).await?;
    tracing::info!(webhook = row.public_id, project = who.project.0, "registered a webhook");
    let mut shown = webhook_json(&api, &who, &row);
    // The only time that it is shown.
    shown["secret"] = secret.expose().as_str().into();
    form_json(&secret, &mut shown);
    let mut response = json_value(StatusCode::CREATED, &shown);
    if let Ok(location) = HeaderValue::from_str(&format!("{}/v1/webhooks/{}", api.base_url, row.public_id)) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

async fn insert(api: &Api, who: &Principal, new: NewWebhook) -> Result<WebhookRow, ApiError> {
    let id = new.public_id.clone();
    let written = api
        .store
        .write(Urgency::Now, move |tx| {
            let new = new.clone();
            Box::pin(async move { crud::create(tx, &new, PER_PROJECT_MAX).await })
        })
        .await;
    match written {
        Ok(Created::Made(row)) => Ok(*row),
        Ok(Created::TooMany) => Err(ApiError::conflict(format!(
            "this project has {PER_PROJECT_MAX} webhooks, the most that it may have; delete one, or give one webhook \
             more events"
        ))),
        // The commit's answer was lost, or a second run of it found the first: what SQL says counts.
        Err(StoreError::CommitUnknown { .. } | StoreError::Duplicate { .. }) => {
            find(api, who, &id).await.map_err(|e| {
                if e.status == StatusCode::NOT_FOUND {
                    ApiError::unavailable("the webhook was not committed; try again")
                } else {
                    e
                }
            })
        }
        Err(error) => Err(error.into()),
    }
}

/// `GET /v1/webhooks`
pub(crate) async fn list(State(api): State<Arc<Api>>, headers: HeaderMap) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let now = api.store.now_ms().await?;
    let rows = crud::list(api.store.read(), who.project, now).await?;
    let all: Vec<Value> = rows.iter().map(|row| webhook_json(&api, &who, row)).collect();
    Ok(json_value(StatusCode::OK, &json!({"webhooks": all})))
}

/// `GET /v1/webhooks/event-types`: each with when it happens, a JSON schema and an example.
pub(crate) async fn event_types(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    api.auth.authorize(&headers, ScopeSet::READ).await?;
    let mut body = String::from("{\"event_types\":[");
    for (n, (_, text)) in catalogue().enumerate() {
        if n > 0 {
            body.push(',');
        }
        body.push_str(text.trim_end());
    }
    body.push_str("]}");
    Ok(json_bytes(StatusCode::OK, body))
}

/// `GET /v1/webhooks/{id}`
pub(crate) async fn get(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let row = find(&api, &who, &id).await?;
    Ok(json_value(StatusCode::OK, &webhook_json(&api, &who, &row)))
}

/// `PATCH /v1/webhooks/{id}`: only what is named changes. Pausing holds deliveries, resuming sends them in order.
pub(crate) async fn patch(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, NativeError> {
    let (head, body) = request.into_parts();
    let who = api.auth.authorize(&head.headers, ScopeSet::ADMIN).await?;
    let object = object(&api, &head.headers, body).await?;
    if object.contains_key("secret") {
        return Err(ApiError::field(
            "/secret",
            format!("cannot be changed here: POST /v1/webhooks/{id}/secrets adds one and lets the old one sign for a while"),
        )
        .into());
    }
    for _ in 0..RACES {
        let row = find(&api, &who, &id).await?;
        let mut fields = fields_of(&api, &row)?;
        fields.change(&object, &api.rules)?;
        let mut settings = sealed(&api, &row.public_id, &fields)?;
        if !object.contains_key("headers") {
            settings.headers_encrypted.clone_from(&row.headers_encrypted);
        }
        let expires = match expires_in_ms(&object)? {
            None => row.expires_at_ms,
            Some(None) => None,
            Some(Some(ms)) => Some(api.store.now_ms().await?.saturating_add_unsigned(ms)),
        };
        let updated = api
            .store
            .write(Urgency::Now, move |tx| {
                let (row, settings) = (row.clone(), settings.clone());
                Box::pin(async move { crud::update(tx, &row, &settings, expires).await })
            })
            .await;
        match updated {
            Ok(Updated::Done(row)) => return Ok(json_value(StatusCode::OK, &webhook_json(&api, &who, &row))),
            Ok(Updated::Absent) => return Err(absent().into()),
            // Read it again: either it is changed already, or somebody else came between.
            Ok(Updated::Raced) | Err(StoreError::CommitUnknown { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(ApiError::conflict("the webhook is being changed by others; try again").into())
}

/// `DELETE /v1/webhooks/{id}`: what it is still owed is cancelled.
pub(crate) async fn delete(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::ADMIN).await?;
    let project = who.project;
    let name = id.clone();
    let gone = api
        .store
        .write(Urgency::Now, move |tx| {
            let id = name.clone();
            Box::pin(async move { crud::delete(tx, project, &id).await })
        })
        .await?;
    if !gone {
        return Err(absent().into());
    }
    tracing::info!(webhook = id, project = project.0, "deleted a webhook");
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// `POST /v1/webhooks/{id}/enable`: after it was disabled by its failures.
pub(crate) async fn enable(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::ADMIN).await?;
    let project = who.project;
    let enabled = api
        .store
        .write(Urgency::Now, move |tx| {
            let id = id.clone();
            Box::pin(async move { crud::enable(tx, project, &id).await })
        })
        .await?;
    let row = enabled.ok_or_else(absent)?;
    Ok(json_value(StatusCode::OK, &webhook_json(&api, &who, &row)))
}

/// `POST /v1/webhooks/{id}/test`: an event `webhook.test` to this webhook only, whatever it listens to.
pub(crate) async fn test(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::ADMIN).await?;
    api.disk.check()?;
    let row = find(&api, &who, &id).await?;
    let key = u32::try_from(row.id).map_err(|_| StoreError::corrupt("webhooks.id"))?;
    let event = event_key(unix_ms(), rand::random(), None);
    let (project, partitions) = (who.project, api.store.facts().partitions);
    let data = json!({"webhook_id": row.public_id, "label": row.label,
                      "message": "a test of this webhook, sent on request"});
    let written = api
        .store
        .write(Urgency::Now, move |tx| {
            let (id, data) = (row.public_id.clone(), data.to_string().into_bytes());
            Box::pin(async move {
                let new = NewEvent {
                    id: event,
                    project,
                    names: EventType::WebhookTest.into(),
                    subject: &id,
                    endpoint: None,
                    metadata: None,
                    data: Body::of_json(data),
                    audience: Audience::Only { webhook: key },
                    traceparent: None,
                };
                emit(tx, partitions, new).await
            })
        })
        .await?;
    if written.is_empty() {
        return Err(absent().into());
    }
    api.outbound.announce_deliveries(&written).await;
    let id = written.first().map(|d| message_id(event, u64::from(d.seq), d.target)).unwrap_or_default();
    Ok(json_value(
        StatusCode::ACCEPTED,
        &json!({
            "delivery_id": id,
            "event_id": event_id(event, 1),
            "type": EventType::WebhookTest.name(),
            "delivery_url": format!("{}/v1/deliveries/{id}", api.base_url),
        }),
    ))
}
