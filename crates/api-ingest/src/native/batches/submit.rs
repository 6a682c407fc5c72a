//! `POST /v1/batches`: what a request says, checked as a whole before anything is made.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    response::Response,
};
use bytes::Bytes;
use ringback_service_runtime::json::check_text;
use ringback_store::{
    auth::ScopeSet,
    batches::{NewBatch, batch_job_ids},
};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{batch_json, find};
use crate::{
    auth::Principal,
    batches::{BatchAccepted, BatchRequest, create, job_ids, new_batch_id},
    body::{BodyLimit, read_body},
    catalog::Endpoint,
    error::{ApiError, NativeError},
    render::json_value,
    state::Api,
    submit::{
        Trace, admit, idempotency_key,
        parse::{
            RawJob, check_job, member, metadata_member, not_json, parse_object, text_member, url_member,
        },
        prepare, request_hash,
    },
};

const CLIENT_REF_MAX_BYTES: usize = 255;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawBatch<'a> {
    #[serde(borrow)]
    endpoint: Option<&'a RawValue>,
    /// `owner/model`: Runflow's way to name an endpoint; the batch's one body is Runflow's then.
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    #[serde(borrow)]
    items: Option<&'a RawValue>,
    #[serde(borrow)]
    webhook: Option<&'a RawValue>,
    #[serde(borrow)]
    webhookv2: Option<&'a RawValue>,
    #[serde(borrow, rename = "webhookV2")]
    webhook_v2: Option<&'a RawValue>,
    #[serde(borrow)]
    callback_url: Option<&'a RawValue>,
    #[serde(borrow)]
    on_failure: Option<&'a RawValue>,
    #[serde(borrow)]
    policy: Option<&'a RawValue>,
    #[serde(borrow, rename = "s3Config")]
    s3_config: Option<&'a RawValue>,
    #[serde(borrow)]
    metadata: Option<&'a RawValue>,
    #[serde(borrow)]
    artifact_confirm: Option<&'a RawValue>,
}

impl<'a> RawBatch<'a> {
    /// An item with what it inherits from its batch.
    fn inherit(&self, item: RawJob<'a>) -> RawJob<'a> {
        // The two spellings of one setting are inherited as one.
        let own_v2 = item.webhookv2.is_some() || item.webhook_v2.is_some();
        RawJob {
            webhook: item.webhook.or(self.webhook),
            webhookv2: if own_v2 { item.webhookv2 } else { self.webhookv2 },
            webhook_v2: if own_v2 { item.webhook_v2 } else { self.webhook_v2 },
            policy: item.policy.or(self.policy),
            s3_config: item.s3_config.or(self.s3_config),
            metadata: item.metadata.or(self.metadata),
            artifact_confirm: item.artifact_confirm.or(self.artifact_confirm),
            ..item
        }
    }

    fn cancel_rest(&self) -> Result<bool, ApiError> {
        let Some(raw) = self.on_failure else { return Ok(false) };
        match &*text_member("/on_failure", raw)? {
            "continue" => Ok(false),
            "cancel_rest" => Ok(true),
            _ => Err(ApiError::field("/on_failure", "must be \"continue\" or \"cancel_rest\"")),
        }
    }
}

/// One item: its members, and where an error in it is.
pub(super) struct Item<'a> {
    pub(super) raw: RawJob<'a>,
    pub(super) pointer: String,
    pub(super) client_ref: Option<String>,
}

/// `POST /v1/batches`: a JSON object, or JSON lines (first the object without `items`, then one item per line).
pub(crate) async fn post(State(api): State<Arc<Api>>, request: Request) -> Result<Response, NativeError> {
    let (head, body) = request.into_parts();
    let who = api.auth.authorize(&head.headers, ScopeSet::SUBMIT).await?;
    let limit = BodyLimit { max_bytes: api.limits.max_batch_body_bytes, setting: "max_batch_body_bytes" };
    let body = read_body(&head.headers, body, limit).await?;
    let (raw, items) =
        if is_json_lines(&head.headers) { parse_lines(&api, &body)? } else { parse_json(&api, &body)? };
    let endpoint = match (raw.endpoint, raw.model) {
        (Some(name), None) => api.catalog.find(who.project, &text_member("/endpoint", name)?)?,
        (None, Some(model)) => api.catalog.find_model(who.project, &text_member("/model", model)?)?,
        (Some(_), Some(_)) => {
            return Err(ApiError::field("/model", "and `endpoint` name the same thing: give one").into());
        }
        (None, None) => {
            return Err(ApiError::field(
                "/endpoint",
                "is missing: name an endpoint, or its alias as `model`",
            )
            .into());
        }
    };
    let call = Call { headers: &head.headers, body: &body, inputs: &body, template: None };
    let accepted = accept(&api, &who, endpoint, call, &raw, items).await?;
    let row = find(&api, &who, &accepted.id.to_string()).await?;
    let ids = batch_job_ids(api.store.read(), accepted.id).await?;
    let mut shown = batch_json(&api, &row);
    shown["job_ids"] = ids.iter().map(ToString::to_string).collect();
    let status = if accepted.new { StatusCode::CREATED } else { StatusCode::OK };
    Ok(json_value(status, &shown))
}

fn is_json_lines(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    matches!(
        kind,
        "application/x-ndjson" | "application/jsonl" | "application/x-jsonlines" | "application/json-lines"
    )
}

fn parse_json<'a>(api: &Api, body: &'a Bytes) -> Result<(RawBatch<'a>, Vec<Item<'a>>), ApiError> {
    let raw: RawBatch<'_> = parse_object(body, &api.rules)?;
    let list = raw.items.ok_or_else(|| ApiError::field("/items", "is missing: send a list of items"))?;
    let list: Vec<&RawValue> = member("/items", list, "a list")?;
    check_count(api, list.len())?;
    let items = list.into_iter().enumerate().map(|(n, item)| item_of(item.get(), format!("/items/{n}")));
    Ok((raw, items.collect::<Result<_, _>>()?))
}

fn parse_lines<'a>(api: &Api, body: &'a Bytes) -> Result<(RawBatch<'a>, Vec<Item<'a>>), ApiError> {
    let text =
        std::str::from_utf8(body).map_err(|_| ApiError::bad_request("the request body is not UTF-8"))?;
    let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let (_, first) = lines.next().ok_or_else(|| {
        ApiError::bad_request(
            "the request body is empty; the first line is the batch without `items`, then one item per line",
        )
    })?;
    let raw: RawBatch<'_> = parse_object(first.as_bytes(), &api.rules)?;
    if raw.items.is_some() {
        return Err(ApiError::field(
            "/items",
            "must not be in the first of JSON lines: each further line is an item",
        ));
    }
    let mut items = Vec::new();
    for (n, line) in lines {
        ringback_service_runtime::json::check_depth(line.as_bytes(), api.rules.max_json_depth).map_err(
            |e| ApiError::bad_request(format!("line {} {e} (setting server.max_json_depth)", n + 1)),
        )?;
        items.push(item_of(line.trim(), format!("/line-{}", n + 1))?);
    }
    check_count(api, items.len())?;
    Ok((raw, items))
}

fn check_count(api: &Api, n: usize) -> Result<(), ApiError> {
    let max = api.limits.max_batch_items;
    if n == 0 {
        return Err(ApiError::field("/items", "must not be empty"));
    }
    if n > max as usize {
        return Err(ApiError::field(
            "/items",
            format!(
                "has {n} items, at most {max} are allowed (setting server.max_batch_items); send several batches"
            ),
        ));
    }
    Ok(())
}

fn item_of<'a>(text: &'a str, pointer: String) -> Result<Item<'a>, ApiError> {
    if !text.starts_with('{') {
        return Err(ApiError::field(pointer, "must be an object"));
    }
    let raw: RawJob<'_> = serde_json::from_str(text).map_err(|e| not_json(&e).below(&pointer))?;
    let client_ref = match raw.client_ref {
        None => None,
        Some(value) => {
            let text = text_member("/client_ref", value).map_err(|e| e.below(&pointer))?;
            check_text(&text, CLIENT_REF_MAX_BYTES)
                .map_err(|e| ApiError::field("/client_ref", e.to_string()).below(&pointer))?;
            Some(text.into_owned())
        }
    };
    Ok(Item { raw, pointer, client_ref })
}

/// The request that makes a batch.
pub(super) struct Call<'a> {
    pub(super) headers: &'a HeaderMap,
    /// The body as it came.
    pub(super) body: &'a Bytes,
    /// The bytes that the items' inputs lie in: the body, or what a template made of it.
    pub(super) inputs: &'a Bytes,
    pub(super) template: Option<&'a str>,
}

/// Checks everything, then makes the batch.
pub(super) async fn accept(
    api: &Arc<Api>,
    who: &Principal,
    endpoint: &Arc<Endpoint>,
    call: Call<'_>,
    raw: &RawBatch<'_>,
    items: Vec<Item<'_>>,
) -> Result<BatchAccepted, ApiError> {
    let Call { headers, body, inputs, template } = call;
    let total = u32::try_from(items.len()).unwrap_or(u32::MAX);
    let callback_url =
        url_member("/callback_url", raw.callback_url, &api.rules)?.map(std::borrow::Cow::into_owned);
    let cancel_rest = raw.cancel_rest()?;
    // Its items inherit them: the error names the place where they stand.
    metadata_member(raw.metadata)?;
    let key = idempotency_key(headers)?;
    let trace = Trace::of(headers);
    let mut jobs = Vec::with_capacity(items.len());
    for (item, id) in items.into_iter().zip(job_ids(total as usize)) {
        let request = check_job(&raw.inherit(item.raw), &api.rules).map_err(|e| e.below(&item.pointer))?;
        let mut job = prepare(api, endpoint, inputs, &request, id, Some(trace.traceparent.clone()))?;
        job.submit.client_ref = item.client_ref;
        jobs.push(job);
    }
    admit(api, who, u64::from(total))?;
    let id = new_batch_id();
    trace.made(&id);
    let new = NewBatch {
        id,
        project: endpoint.project,
        endpoint: endpoint.id,
        total,
        cancel_rest,
        callback_url,
        callback_runflow: raw.model.is_some(),
        template: template.map(str::to_owned),
        metadata: raw.metadata.map(|m| m.get().as_bytes().to_vec()),
        request_hash: key.as_ref().map(|_| request_hash(endpoint, body)),
        idempotency_key: key,
        traceparent: Some(trace.traceparent.clone()),
    };
    let accepted = create(api, BatchRequest { new, jobs }).await?;
    tracing::debug!(batch_id = %accepted.id, total, endpoint = endpoint.name, new = accepted.new, "accepted");
    Ok(accepted)
}
