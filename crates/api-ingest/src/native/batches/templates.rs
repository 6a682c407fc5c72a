//! The routes of batch templates: their own item shape becomes a batch.

use std::sync::Arc;

use axum::{
    extract::{OriginalUri, Path, Request, State},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use bytes::Bytes;
use ringback_service_runtime::config::BatchTemplate;
use ringback_store::auth::ScopeSet;
use serde_json::{Map, Value, json, value::RawValue};

use super::{
    find, result_url,
    submit::{Call, Item, RawBatch, accept},
};
use crate::{
    body::{BodyLimit, read_body},
    error::{ApiError, NativeError},
    render::json_value,
    state::Api,
    submit::parse::{RawJob, not_json, parse_object},
};

/// `POST` on the route of a batch template: its own item shape becomes a batch.
pub(crate) async fn template_post(
    State(api): State<Arc<Api>>,
    OriginalUri(uri): OriginalUri,
    request: Request,
) -> Result<Response, NativeError> {
    let (head, body) = request.into_parts();
    let who = api.auth.authorize(&head.headers, ScopeSet::SUBMIT).await?;
    let route = uri.path().trim_end_matches('/');
    let (template, endpoint) = api.templates.find(route, who.project)?;
    let limit = BodyLimit { max_bytes: api.limits.max_batch_body_bytes, setting: "max_batch_body_bytes" };
    let body = read_body(&head.headers, body, limit).await?;
    let settings: RawBatch<'_> = parse_object(&body, &api.rules)?;
    let (inputs, places) = template_inputs(&api, template, &body)?;
    let mut items = Vec::with_capacity(places.len());
    for (n, (range, client_ref)) in places.into_iter().enumerate() {
        let text = std::str::from_utf8(&inputs[range])
            .map_err(|_| ApiError::bad_request("the input is not UTF-8"))?;
        let input: &RawValue = serde_json::from_str(text).map_err(|e| not_json(&e))?;
        let raw = RawJob { input: Some(input), ..RawJob::default() };
        items.push(Item {
            raw,
            pointer: format!("/{}/{n}", template.items_field),
            client_ref: Some(client_ref),
        });
    }
    let call = Call { headers: &head.headers, body: &body, inputs: &inputs, template: Some(&template.route) };
    let accepted = accept(&api, &who, endpoint, call, &settings, items).await?;
    Ok(json_value(StatusCode::OK, &json!({"batch_id": accepted.id.to_string(), "job_count": accepted.total})))
}

type Places = Vec<(std::ops::Range<usize>, String)>;

/// Makes the inputs of a template's items, one after the other in one buffer.
fn template_inputs(api: &Api, template: &BatchTemplate, body: &Bytes) -> Result<(Bytes, Places), ApiError> {
    let object: Map<String, Value> = serde_json::from_slice(body).map_err(|e| not_json(&e))?;
    let jobs = template.map(&object).map_err(|e| ApiError::field(e.pointer, e.detail))?;
    let max = api.limits.max_batch_items;
    if jobs.len() > max as usize {
        let pointer = format!("/{}", template.items_field);
        let reason =
            format!("has {} items, at most {max} are allowed (setting server.max_batch_items)", jobs.len());
        return Err(ApiError::field(pointer, reason));
    }
    let (mut inputs, mut places) = (Vec::new(), Vec::with_capacity(jobs.len()));
    for job in jobs {
        let from = inputs.len();
        inputs.extend_from_slice(Value::Object(job.input).to_string().as_bytes());
        places.push((from..inputs.len(), job.client_ref));
    }
    Ok((inputs.into(), places))
}

/// `GET` on the route of a batch template with a batch's id: its counts, for polling clients.
pub(crate) async fn template_get(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let route = uri.path().rsplit_once('/').map_or("", |(route, _)| route);
    api.templates.find(route, who.project)?;
    let row = find(&api, &who, &id).await?;
    if row.template.as_deref() != Some(route) {
        Err(ApiError::not_found("batch not found: no batch of this route has this id"))?;
    }
    let mut shown = json!({
        "batch_id": row.id.to_string(),
        "total": row.counts.total,
        "completed": row.counts.completed,
        "failed": row.counts.failed,
        "status": row.status.as_str(),
    });
    if row.counts.cancelled > 0 {
        shown["cancelled"] = row.counts.cancelled.into();
    }
    if let Some(url) = result_url(&api, &row) {
        shown["result_url"] = url.into();
    }
    Ok(json_value(StatusCode::OK, &shown))
}
