//! `/v1/batches`, and the routes of batch templates.

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{OriginalUri, Path, Query, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use ringback_contracts::v1;
use ringback_domain::{
    BatchId,
    batch::{BatchFile, BatchStatus},
    webhook::{body::Part, runflow_body},
};
use ringback_service_runtime::{config::BatchTemplate, json::check_text};
use ringback_store::{
    auth::ScopeSet,
    batches::{BatchItem, BatchRow, NewBatch, batch, batch_items, batch_job_ids},
};
use serde::Deserialize;
use serde_json::{Map, Value, json, value::RawValue};
use tokio::time::Instant;
use uuid::Uuid;

use super::{PAGE_MAX, job_view::time, jobs::deliveries_json, limit_of, parameter};
use crate::{
    auth::Principal,
    batches::{BatchAccepted, BatchRequest, create, job_ids, new_batch_id},
    body::{BodyLimit, read_body},
    catalog::Endpoint,
    error::{ApiError, NativeError},
    render::{json_value, pieces, rfc3339},
    runpod::control::{refused, unreadable},
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
/// Jobs per command of a cancellation, and the time after which its answer is given.
const CANCEL_CHUNK: u32 = 500;
const CANCEL_WITHIN: Duration = Duration::from_millis(1_500);
/// Items of a result file that are read at once.
const RESULT_PAGE: u32 = 20;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawBatch<'a> {
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
struct Item<'a> {
    raw: RawJob<'a>,
    pointer: String,
    client_ref: Option<String>,
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
struct Call<'a> {
    headers: &'a HeaderMap,
    /// The body as it came.
    body: &'a Bytes,
    /// The bytes that the items' inputs lie in: the body, or what a template made of it.
    inputs: &'a Bytes,
    template: Option<&'a str>,
}

/// Checks everything, then makes the batch.
async fn accept(
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

/// A batch of the asker's project that was opened.
pub(crate) async fn find(api: &Api, who: &Principal, id: &str) -> Result<BatchRow, ApiError> {
    let absent = || {
        ApiError::not_found(
            "batch not found: this project has no batch with this id, or its retention time is over",
        )
    };
    let id = BatchId::parse(id).map_err(|_| absent())?;
    let row = batch(api.store.read(), id).await?;
    row.filter(|row| row.project == who.project && row.opened_at.is_some()).ok_or_else(absent)
}

fn result_url(api: &Api, row: &BatchRow) -> Option<String> {
    (row.status != BatchStatus::InProgress).then(|| format!("{}/v1/batches/{}/results", api.base_url, row.id))
}

fn batch_json(api: &Api, row: &BatchRow) -> Value {
    let mut shown = json!({
        "batch_id": row.id.to_string(),
        "endpoint": &*api.catalog.name_of(row.endpoint),
        "total": row.counts.total,
        "completed": row.counts.completed,
        "failed": row.counts.failed,
        "cancelled": row.counts.cancelled,
        "status": row.status.as_str(),
        "on_failure": if row.cancel_rest { "cancel_rest" } else { "continue" },
        "created_at": rfc3339(row.created_at.0),
        "ended_at": time(row.ended_at.map(|t| t.0)),
    });
    if let Some(url) = result_url(api, row) {
        shown["result_url"] = url.into();
    }
    // Runflow's names for the same facts.
    shown["id"] = row.id.to_string().into();
    shown["status_code"] = runflow_body::batch_status(row.status, &row.counts).into();
    shown["items_total"] = row.counts.total.into();
    shown["items_succeeded"] = row.counts.completed.into();
    shown["items_failed"] = row.counts.failed.into();
    shown["items_cancelled"] = row.counts.cancelled.into();
    if let Some(metadata) = row.metadata.as_deref().and_then(|m| serde_json::from_slice::<Value>(m).ok()) {
        shown["metadata"] = metadata;
    }
    shown
}

/// `GET /v1/batches/{id}?items=true&cursor=&limit=`
pub(crate) async fn get(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let row = find(&api, &who, &id).await?;
    let mut shown = batch_json(&api, &row);
    if parameter(&query, "items", "true or false", |text| text.parse::<bool>().ok())?.unwrap_or(false) {
        let limit = limit_of(&query)?.min(PAGE_MAX);
        let from =
            parameter(&query, "cursor", "the next_cursor of a former page", |text| text.parse::<u32>().ok())?;
        let items = batch_items(api.store.read(), row.id, from.unwrap_or(0), limit, false).await?;
        let next = if items.len() == limit as usize {
            items.last().map(|i| (i.index + 1).to_string())
        } else {
            None
        };
        shown["items"] = items.iter().map(item_json).collect();
        shown["next_cursor"] = next.into();
    }
    Ok(json_value(StatusCode::OK, &shown))
}

fn item_json(item: &BatchItem) -> Value {
    let ended = item.status.is_terminal();
    json!({
        "index": item.index,
        "sequence_index": item.index,
        "job_id": item.job.to_string(),
        "run_id": item.job.to_string(),
        "status_code": runflow_body::run_status(item.status),
        "client_ref": item.client_ref,
        "status": item.status.as_str(),
        "delay_time_ms": ended.then_some(item.delay_ms),
        "execution_time_ms": ended.then_some(item.execution_ms),
        "error": item.result.as_ref().and_then(|r| r.error.as_deref()),
    })
}

/// `GET /v1/batches/{id}/deliveries`: the delivery of its `callback_url`.
pub(crate) async fn deliveries(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let row = find(&api, &who, &id).await?;
    let deliveries = deliveries_json(&api, &who, Uuid::from_bytes(*row.id.as_bytes())).await?;
    Ok(json_value(StatusCode::OK, &json!({"deliveries": deliveries})))
}

/// `GET /v1/batches/{id}/results`: one JSON line per item, in order, once the batch has ended.
pub(crate) async fn results(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let row = find(&api, &who, &id).await?;
    check_ended(&row)?;
    Ok(item_lines(&api, row.id, BatchFile::Results))
}

/// The files of a batch come with its end.
pub(crate) fn check_ended(row: &BatchRow) -> Result<(), ApiError> {
    if row.status != BatchStatus::InProgress {
        return Ok(());
    }
    Err(ApiError::conflict(format!(
        "the batch is IN_PROGRESS ({} of {} jobs have ended); its results come with its end",
        row.counts.ended(),
        row.counts.total
    )))
}

/// JSON lines of a batch's items, in order, read page by page while they are sent.
pub(crate) fn item_lines(api: &Arc<Api>, batch: BatchId, file: BatchFile) -> Response {
    let (api, blobs) = (Arc::clone(api), api.blobs.clone());
    let pages = stream::try_unfold(Some(0), move |from| {
        let api = Arc::clone(&api);
        async move {
            let Some(from) = from else { return Ok::<_, Broken>(None) };
            let items = batch_items(api.store.read(), batch, from, RESULT_PAGE, true).await?;
            let next =
                if items.len() < RESULT_PAGE as usize { None } else { items.last().map(|i| i.index + 1) };
            let shown = items.into_iter().filter(|item| file.has(item.status)).flat_map(result_line);
            Ok(Some((shown.collect::<Vec<Part>>(), next)))
        }
    });
    let lines = pages.map_ok(move |parts| pieces(blobs.clone(), parts).map_err(Broken::from)).try_flatten();
    let mut response = Response::new(Body::from_stream(lines.boxed()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    response
}

/// A result file that broke off in the middle.
type Broken = Box<dyn std::error::Error + Send + Sync>;

/// The line of an item: what `items` shows, and its output.
fn result_line(item: BatchItem) -> Vec<Part> {
    let mut head = item_json(&item).to_string().into_bytes();
    let result = item.result;
    head.pop();
    match result {
        Some(r) if r.output_blob_key.is_some() => {
            head.extend_from_slice(b",\"output\":");
            let blob = Part::Blob { key: r.output_blob_key.unwrap_or_default(), size_bytes: r.output_bytes };
            vec![Part::Inline(head), blob, Part::Inline(b"}\n".to_vec())]
        }
        other => {
            if let Some(output) = other.and_then(|r| r.output) {
                head.extend_from_slice(b",\"output\":");
                // A line break inside of a verbatim output would split the line; between tokens it means nothing.
                head.extend(output.into_iter().map(|b| if matches!(b, b'\n' | b'\r') { b' ' } else { b }));
            }
            head.extend_from_slice(b"}\n");
            vec![Part::Inline(head)]
        }
    }
}

/// `POST /v1/batches/{id}/cancel`: cancels the batch's jobs that have not ended.
pub(crate) async fn cancel(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::SUBMIT).await?;
    let row = find(&api, &who, &id).await?;
    let until = Instant::now() + CANCEL_WITHIN;
    loop {
        let command = v1::CancelBatch {
            project_id: who.project.0,
            batch_id: Bytes::copy_from_slice(row.id.as_bytes()),
            limit: CANCEL_CHUNK,
            by_request: true,
        };
        match api.command(v1::command::Command::CancelBatch(command)).await? {
            // What is left after the time is worked off from the durable marker.
            v1::command_reply::Reply::Count(count) if count.more && Instant::now() < until => {}
            v1::command_reply::Reply::Count(_) => break,
            v1::command_reply::Reply::Refusal(refusal) => match refusal.why() {
                // It has ended: nothing is left to cancel, and asking twice is fine.
                v1::refusal::Why::Conflict => break,
                _ => return Err(refused(&refusal).into()),
            },
            v1::command_reply::Reply::Job(_) => return Err(unreadable().into()),
        }
    }
    let row = find(&api, &who, &id).await?;
    Ok(json_value(StatusCode::OK, &batch_json(&api, &row)))
}

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
