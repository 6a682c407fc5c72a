//! One try: sign, POST, judge.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderName, HeaderValue, header};
use ringback_domain::ProjectId;
use ringback_domain::target::{FORMAT_RUNFLOW, REGISTERED_TARGET_BASE};
use ringback_domain::webhook::response::{
    Profile, Reason, TransportFault, Verdict, judge_fault, judge_status,
};
use ringback_domain::webhook::runflow;
use ringback_domain::webhook::signature::{ID_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER, sign};
use ringback_domain::webhook::url::UrlError;
use ringback_egress::{Answer, EgressError, Permit, Post, Posted};
use ringback_service_runtime::blobs::BlobError;
use ringback_service_runtime::{fault, trace_context};
use ringback_store::deliveries::{Timings, event_name};
use tokio::sync::watch;
use tracing::Instrument as _;

use crate::book::{Flight, Flow, Standing, Tried};
use crate::keyring::Signer;
use crate::lease::Lease;
use crate::notice::{self, Notice};
use crate::shared::Shared;

const SEQUENCE: HeaderName = HeaderName::from_static("webhook-sequence");
const ID: HeaderName = HeaderName::from_static(ID_HEADER);
const TIMESTAMP: HeaderName = HeaderName::from_static(TIMESTAMP_HEADER);
const SIGNATURE: HeaderName = HeaderName::from_static(SIGNATURE_HEADER);
const TRACEPARENT: HeaderName = HeaderName::from_static(trace_context::TRACEPARENT);
const RUNFLOW_SIGNATURE: HeaderName = HeaderName::from_static(runflow::SIGNATURE_HEADER);
/// For the logs of both sides: names this very try.
const RUNFLOW_REQUEST_ID: HeaderName = HeaderName::from_static("runflow-request-id");
const REPLAY: HeaderName = HeaderName::from_static("webhook-replay");
const USER_AGENT: HeaderValue = HeaderValue::from_static(concat!("Ringback/", env!("CARGO_PKG_VERSION")));
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// What is kept of the answer to a try that succeeded: it lies in the delivery's row.
const ACKNOWLEDGEMENT_BYTES: usize = 512;

/// How a flight came back.
pub(crate) enum Landing {
    /// The receiver, or the way to it, said something.
    Tried(Tried),
    /// Something of ours was not there: no try was made.
    NotBegun(String),
}

/// Makes one try, if the lease allows it until the POST begins.
pub(crate) async fn fly(
    shared: Arc<Shared>,
    flight: Flight,
    lease: watch::Receiver<Lease>,
) -> (Flight, Landing) {
    let span = span_of(&flight);
    let landing = try_once(&shared, &flight, lease, &span).instrument(span.clone()).await;
    (flight, landing)
}

/// The try's span, a child of the job's trace; none where the trace is not recorded.
fn span_of(flight: &Flight) -> tracing::Span {
    let owed = &flight.owed;
    if !trace_context::is_sampled(&owed.traceparent) {
        return tracing::Span::none();
    }
    let span = tracing::info_span!(
        "webhook.post",
        otel.kind = "client",
        webhook_id = owed.key.webhook_id(owed.seq),
        job_id = owed.job_id().map(tracing::field::display),
        event = event_name(owed.event),
        attempt = flight.n,
    );
    trace_context::set_parent(&span, Some(owed.traceparent.as_str()));
    span
}

async fn try_once(
    shared: &Shared,
    flight: &Flight,
    lease: watch::Receiver<Lease>,
    span: &tracing::Span,
) -> Landing {
    let owed = &*flight.owed;
    let view = shared.directory.view();
    // As it is now: what waited for its turn may have outlived a change.
    let served = view.served(owed.key.target);
    if owed.key.target >= REGISTERED_TARGET_BASE
        && (served.is_none() || view.standing(owed.key.target, owed.event) != Some(Standing::Live))
    {
        return Landing::NotBegun("its webhook takes nothing now".to_owned());
    }
    let url = served.and_then(|served| served.webhook.url.as_deref()).unwrap_or(&owed.url);
    let url = match shared.client.check(url) {
        Ok(url) => url,
        // It was accepted under other rules.
        Err(error) => return Landing::Tried(refused(&error, shared.clock.now_ms())),
    };
    match notice::before(shared, owed).await {
        Ok(Notice::Send) => {}
        Ok(Notice::Over(verdict, why)) => {
            return Landing::Tried(Tried {
                verdict,
                ..ours(TransportFault::Body, why.to_owned(), shared.clock.now_ms())
            });
        }
        Err(why) => return Landing::NotBegun(why),
    }
    let signer = match served {
        Some(served) => Signer::Webhook(Arc::clone(&served.webhook), view.revision()),
        None => Signer::Project(ProjectId(owed.place.project), view.revision()),
    };
    let keys = match shared.keyring.keys(&signer).await {
        Ok(keys) => keys,
        Err(error) => return Landing::NotBegun(format!("webhook secrets: {error}")),
    };
    let body = match shared.bodies.whole(&owed.body).await {
        Ok(body) => body,
        Err(error @ BlobError::Transient(_)) => return Landing::NotBegun(error.to_string()),
        Err(error) => return Landing::Tried(without_body(&error, shared.clock.now_ms())),
    };
    fault::point("dispatcher.post.before");
    let (began, began_at_ms) = (Instant::now(), shared.clock.now_ms());
    let id = owed.key.webhook_id(owed.seq);
    // Stamped just before sending: receivers allow five minutes.
    let timestamp_s = began_at_ms / 1000;
    let signature = sign(&keys.standard, &id, timestamp_s, &body.bytes);
    let traceparent = trace_context::traceparent_of(span);
    let mut headers = served.map(|served| served.headers.clone()).unwrap_or_default();
    headers.insert(header::CONTENT_TYPE, JSON);
    headers.insert(header::USER_AGENT, USER_AGENT);
    headers.insert(TIMESTAMP, HeaderValue::from(timestamp_s));
    headers.insert(SEQUENCE, HeaderValue::from(owed.seq));
    if owed.replays > 0 {
        headers.insert(REPLAY, HeaderValue::from(owed.replays));
    }
    let runflow = (owed.format & FORMAT_RUNFLOW != 0).then(|| runflow::sign(&keys.runflow, &body.bytes));
    let request_id = runflow.as_ref().map(|_| format!("{id}.{}", flight.n));
    for (name, value) in [
        (ID, Some(id.as_str())),
        (SIGNATURE, Some(signature.as_str())),
        (RUNFLOW_SIGNATURE, runflow.as_deref()),
        (RUNFLOW_REQUEST_ID, request_id.as_deref()),
        (TRACEPARENT, traceparent.as_deref().or_else(|| trace_context::valid(&owed.traceparent))),
    ] {
        // All of these are plain ASCII made by us.
        if let Some(value) = value.and_then(|value| HeaderValue::from_str(value).ok()) {
            headers.insert(name, value);
        }
    }
    let deadline = served.and_then(|served| served.deadline).or_else(|| notice::deadline(owed));
    let post = Post { url, headers, body: body.bytes.clone(), deadline };
    // Another dispatcher may have taken the partition over while this one did not get to run.
    let permit = Permit::new(move || lease.borrow().allows());
    let posted = shared.client.post_while(post, permit).await;
    fault::point("dispatcher.post.after");
    if let Err(EgressError::Withdrawn) = posted.result {
        return Landing::NotBegun("its partition's lease is over, or has to be renewed first".to_owned());
    }
    let duration_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let mut tried = judge(owed.rules.profile, posted, began_at_ms, duration_ms);
    notice::after(shared, owed, &mut tried).await;
    shared.meters.tried(&tried.verdict, duration_ms);
    Landing::Tried(tried)
}

fn judge(profile: Profile, posted: Posted, began_at_ms: i64, duration_ms: u64) -> Tried {
    let ms = |part: Option<Duration>| part.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    let mut tried = Tried {
        verdict: Verdict::Delivered,
        flow: Flow::Good,
        began_at_ms,
        duration_ms,
        status: None,
        detail: None,
        address: None,
        response: None,
        timings: Timings {
            dns_ms: ms(posted.timings.dns),
            connect_ms: ms(posted.timings.connect),
            first_byte_ms: ms(posted.timings.first_byte),
        },
    };
    match posted.result {
        Ok(answer) => {
            let now_s = (began_at_ms.saturating_add_unsigned(duration_ms) / 1000).max(0).cast_unsigned();
            let Answer { status, retry_after, remote, .. } = &answer;
            tried.verdict = judge_status(profile, *status, retry_after.as_deref(), now_s);
            tried.status = Some(*status);
            tried.address = remote.map(|address| address.to_string());
            if tried.verdict == Verdict::Delivered {
                let kept = &answer.body[..answer.body.len().min(ACKNOWLEDGEMENT_BYTES)];
                tried.response = (!kept.is_empty()).then(|| kept.to_vec());
            } else {
                tried.flow = Flow::Bad;
                tried.response = Some(answer.body.to_vec());
            }
        }
        Err(error) => {
            let fault = error.fault();
            tried.verdict = judge_fault(fault);
            tried.flow = flow_of(fault);
            tried.detail = Some(error.to_string());
        }
    }
    tried
}

/// Only what the network said counts against a host.
fn flow_of(fault: TransportFault) -> Flow {
    match fault {
        TransportFault::Dns
        | TransportFault::Tls
        | TransportFault::Connect
        | TransportFault::Timeout
        | TransportFault::Closed
        | TransportFault::Protocol => Flow::Dead,
        TransportFault::Blocked | TransportFault::Url | TransportFault::Body => Flow::Neutral,
    }
}

fn refused(error: &UrlError, now_ms: i64) -> Tried {
    let fault = match error {
        UrlError::Address { .. } => TransportFault::Blocked,
        UrlError::TooLong(_)
        | UrlError::BadCharacter
        | UrlError::Malformed(_)
        | UrlError::Scheme(_)
        | UrlError::NoHost
        | UrlError::Port(_) => TransportFault::Url,
    };
    ours(fault, error.to_string(), now_ms)
}

fn without_body(error: &BlobError, now_ms: i64) -> Tried {
    ours(TransportFault::Body, error.to_string(), now_ms)
}

fn ours(fault: TransportFault, detail: String, began_at_ms: i64) -> Tried {
    debug_assert!(matches!(judge_fault(fault), Verdict::Retry(Reason::Transport(_), _)));
    Tried {
        verdict: judge_fault(fault),
        flow: Flow::Neutral,
        began_at_ms,
        duration_ms: 0,
        status: None,
        detail: Some(detail),
        address: None,
        response: None,
        timings: Timings::default(),
    }
}
