//! From a request body to a committed job.

pub(crate) mod outbound;
pub(crate) mod parse;
pub(crate) mod pipeline;

use std::{sync::Arc, time::Duration};

use axum::http::HeaderMap;
use bytes::Bytes;
use ringback_domain::{
    JobId,
    artifact::{CONFIRM_MEMBER, ConfirmWish, MIN_WAIT_MS},
    event::{EndpointKind, request_id_of},
    target::Target,
};
use ringback_service_runtime::{
    blobs::{BlobError, BlobKey},
    fault,
    json::check_text,
    telemetry::is_exporting,
    trace_context,
};
use ringback_store::{
    Urgency,
    blob_reservations::reserve_blobs,
    submit::{InputAt, Submit},
};
use sha2::{Digest as _, Sha256};

use crate::{
    auth::Principal,
    catalog::{Confirms, Endpoint},
    error::ApiError,
    state::Api,
};
use parse::JobRequest;
use pipeline::{Accepted, Pending};

/// Longest idempotency key.
const KEY_MAX_BYTES: usize = 255;

/// `Idempotency-Key` of a request.
pub(crate) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    let wrong = |reason: String| ApiError::bad_request(format!("the header Idempotency-Key {reason}"));
    let text = std::str::from_utf8(value.as_bytes()).map_err(|_| wrong("is not UTF-8".to_owned()))?.trim();
    if text.is_empty() {
        return Err(wrong("is empty".to_owned()));
    }
    check_text(text, KEY_MAX_BYTES).map_err(|e| wrong(e.to_string()))?;
    Ok(Some(text.to_owned()))
}

/// `X-Request-Id`, where it is a text of a sensible length.
fn request_id_header(headers: &HeaderMap) -> Option<String> {
    let text = headers.get("x-request-id")?.to_str().ok()?.trim();
    (!text.is_empty() && text.len() <= KEY_MAX_BYTES).then(|| text.to_owned())
}

/// What tells a repeated request from another one.
pub(crate) fn request_hash(endpoint: &Endpoint, body: &[u8]) -> Vec<u8> {
    let mut hash = Sha256::new();
    hash.update(endpoint.id.0.to_be_bytes());
    hash.update(body);
    hash.finalize().to_vec()
}

/// The trace of a submit: the caller's, continued, or a new one. The span lasts until the answer.
pub(crate) struct Trace {
    span: tracing::Span,
    pub(crate) traceparent: String,
}

impl Trace {
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let parent = headers.get(trace_context::TRACEPARENT).and_then(|v| v.to_str().ok());
        let span = if is_exporting() {
            tracing::info_span!(target: "ringback_api", "submit", job_id = tracing::field::Empty)
        } else {
            tracing::Span::none()
        };
        trace_context::set_parent(&span, parent);
        let traceparent = trace_context::traceparent_of(&span)
            // Without telemetry the caller's context is handed on as it is.
            .or_else(|| parent.and_then(trace_context::valid).map(str::to_owned))
            .unwrap_or_else(trace_context::current_or_new_traceparent);
        Self { span, traceparent }
    }

    /// Names the job, or the batch, that came of it.
    pub(crate) fn made(&self, id: &impl std::fmt::Display) {
        self.span.record("job_id", tracing::field::display(id));
    }
}

/// A new job id of this moment.
pub(crate) fn new_job_id() -> JobId {
    let now = u64::try_from(ringback_service_runtime::time::now_ms()).unwrap_or(0);
    JobId::from_parts(now, rand::random())
}

/// Checks that submits are taken at all, and counts `n` of them.
pub(crate) fn admit(api: &Api, who: &Principal, n: u64) -> Result<(), ApiError> {
    api.disk.check()?;
    who.rate.take(n)
}

/// What makes one job, beside the request itself.
pub(crate) struct Origin<'a> {
    pub(crate) id: JobId,
    pub(crate) sync: bool,
    pub(crate) headers: &'a HeaderMap,
}

/// Submits one job and answers after its commit (P1). `body` is the whole request, of which `request` is a view.
pub(crate) async fn submit_one(
    api: &Arc<Api>,
    endpoint: &Arc<Endpoint>,
    body: &Bytes,
    request: &JobRequest<'_>,
    origin: &Origin<'_>,
) -> Result<Accepted, ApiError> {
    let key = idempotency_key(origin.headers)?;
    let hash = key.as_ref().map(|_| request_hash(endpoint, body));
    let trace = Trace::of(origin.headers);
    trace.made(&origin.id);
    let mut submit = prepare(api, endpoint, body, request, origin.id, Some(trace.traceparent.clone()))?;
    submit.submit.sync_id = origin.sync;
    if origin.sync {
        submit.submit.retain_completed_ms = endpoint.retention.sync_ms;
        submit.submit.retain_failed_ms = endpoint.retention.sync_ms;
    }
    if endpoint.kind == EndpointKind::Completion && submit.submit.request_id.is_none() {
        submit.submit.request_id = request_id_header(origin.headers);
    }
    submit.submit.idempotency_key = key;
    submit.submit.request_hash = hash;
    let blob = place_input(api, &mut submit.submit).await?;
    let done = api.submits.submit(submit).await;
    if let (Some(blob), Ok(Accepted { new: false, .. }) | Err(_)) = (blob, &done) {
        // After an unknown commit the row may be there: its blob must stay.
        if !matches!(&done, Err(e) if e.status.is_server_error()) {
            let _ = api.blobs.delete(&blob).await;
        }
    }
    if let Ok(accepted) = &done {
        tracing::debug!(
            job_id = accepted.public_id(),
            endpoint = endpoint.name,
            new = accepted.new,
            "accepted"
        );
    }
    done
}

/// Everything of a job but what depends on the route.
pub(crate) fn prepare(
    api: &Api,
    endpoint: &Arc<Endpoint>,
    body: &Bytes,
    request: &JobRequest<'_>,
    id: JobId,
    traceparent: Option<String>,
) -> Result<Pending, ApiError> {
    check_confirm(request.confirm, endpoint)?;
    let secret_extra_encrypted = match &request.secret_extra {
        None => None,
        Some(plain) => Some(api.key.seal(plain, &ringback_store::submit::secret_purpose(id))?),
    };
    let mut targets =
        Target::of_submit(request.webhook.as_deref(), request.webhook_v2.as_deref(), endpoint.all_events);
    targets.extend(request.callback_url.as_deref().map(Target::of_callback));
    let targets = targets.into_iter().map(|target| target.with_profile(endpoint.webhook_profile)).collect();
    let submit = Submit {
        id,
        project: endpoint.project,
        endpoint: endpoint.id,
        low_priority: request.low_priority,
        sync_id: false,
        policy: endpoint.policy,
        ttl_ms: Some(request.ttl_ms.unwrap_or(endpoint.ttl_ms)),
        execution_timeout_ms: request.execution_timeout_ms.unwrap_or(endpoint.execution_timeout_ms),
        retain_completed_ms: endpoint.retention.completed_ms,
        retain_failed_ms: endpoint.retention.failed_ms,
        targets,
        batch: None,
        client_ref: None,
        idempotency_key: None,
        request_hash: None,
        traceparent,
        metadata: request.metadata.map(|text| text.as_bytes().to_vec()),
        request_id: (endpoint.kind == EndpointKind::Completion)
            .then(|| {
                request_id_of(request.input.as_bytes())
                    .or_else(|| request_id_of(request.metadata.unwrap_or_default().as_bytes()))
            })
            .flatten(),
        input: InputAt::Inline(body.slice_ref(request.input.as_bytes())),
        extra: request.extra.clone(),
        secret_extra_encrypted,
        hold_deliveries_ms: 0,
    };
    Ok(Pending::new(submit, Arc::clone(endpoint), request.secret_extra.clone()))
}

/// Holds a job's word on the confirm handshake against what its endpoint offers.
fn check_confirm(wish: Option<ConfirmWish>, endpoint: &Endpoint) -> Result<(), ApiError> {
    let Some(wish) = wish else { return Ok(()) };
    let refused = |reason: String| Err(ApiError::field(format!("/{CONFIRM_MEMBER}"), reason));
    let limit_ms = match &endpoint.confirm {
        Confirms::No if wish.enabled => {
            return refused(
                "asks for a confirmation that this endpoint does not offer; its confirm.mode must be \"platform\" or \"on_request\""
                    .to_owned(),
            );
        }
        Confirms::No => return Ok(()),
        Confirms::Handler => {
            return refused(
                "cannot be set: this endpoint's handler confirms by itself (its confirm.mode)".to_owned(),
            );
        }
        Confirms::Platform { limit_ms } => *limit_ms,
    };
    match wish.timeout_ms {
        Some(ms) if !(MIN_WAIT_MS..=limit_ms).contains(&ms) => Err(ApiError::field(
            format!("/{CONFIRM_MEMBER}/timeout_ms"),
            format!(
                "is {ms} ms, must be between {MIN_WAIT_MS} and {limit_ms} (setting confirm.timeout_ms of the endpoint)"
            ),
        )),
        Some(_) | None => Ok(()),
    }
}

/// Puts a large input into the blob store, before any transaction (P7). Answers its key.
async fn place_input(api: &Api, submit: &mut Submit) -> Result<Option<BlobKey>, ApiError> {
    Ok(place_inputs(api, std::iter::once(submit)).await?.pop())
}

/// [`place_input`] of many; answers the keys.
pub(crate) async fn place_inputs(
    api: &Api,
    submits: impl Iterator<Item = &mut Submit>,
) -> Result<Vec<BlobKey>, ApiError> {
    let failed = |error: BlobError| {
        tracing::warn!(%error, "an input cannot be stored");
        ApiError::unavailable("the blob store is not available now; try again")
    };
    let mut large = Vec::new();
    for submit in submits {
        let InputAt::Inline(bytes) = &submit.input else { continue };
        let size_bytes = bytes.len() as u64;
        if size_bytes > api.blobs.inline_max_bytes() {
            let key = BlobKey::new(format!("in/{}", submit.id.simple())).map_err(failed)?;
            let at = InputAt::Blob { key: key.as_str().to_owned(), size_bytes };
            large.push((key, std::mem::replace(&mut submit.input, at)));
        }
    }
    if large.is_empty() {
        return Ok(Vec::new());
    }
    reserve(api, large.iter().map(|(key, _)| key.as_str().to_owned()).collect()).await?;
    let mut placed = Vec::with_capacity(large.len());
    for (key, input) in large {
        let InputAt::Inline(bytes) = input else { continue };
        fault::point("api.blob.before");
        api.blobs.put(&key, bytes).await.map_err(failed)?;
        fault::point("api.blob.after");
        placed.push(key);
    }
    Ok(placed)
}

/// Writes down what is about to be stored: whatever ends this submit, its blobs are found.
async fn reserve(api: &Api, keys: Vec<String>) -> Result<(), ApiError> {
    let write = api.store.write(Urgency::Now, move |tx| {
        let keys = keys.clone();
        Box::pin(async move { reserve_blobs(tx, &keys).await })
    });
    match tokio::time::timeout(Duration::from_millis(api.limits.submit_timeout_ms), write).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(ApiError::unavailable("the database is not available now; try again")),
    }
}
