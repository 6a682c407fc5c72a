//! The bytes of deliveries, fixed in the transaction of the transition (P4).

use std::collections::HashMap;

use ringback_contracts::v1;
use ringback_domain::{
    JobId, TimestampMs,
    target::BodyFormat,
    webhook::{
        body::{self, Body, Echo, Json, Terminal},
        runflow_body::{self, RunEnd},
    },
};
use ringback_service_runtime::trace_context;
use ringback_store::{
    JobRow, StoreError,
    deliveries::{JobTransition, job_delivery},
    inputs::StoredInput,
    results::{NewResult, StoredPayload},
    submit::InputAt,
};

use super::{Entry, Owed};

/// Jobs whose input is repeated in a body.
pub(super) fn echoed(owed: &[Owed], jobs: &HashMap<JobId, Entry>) -> Vec<JobId> {
    let mut ids: Vec<JobId> = owed
        .iter()
        .filter(|o| jobs.get(&o.job).is_some_and(|e| repeats_input(&e.row, o)))
        .map(|o| o.job)
        .collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn repeats_input(row: &JobRow, o: &Owed) -> bool {
    o.status.is_terminal()
        && row.targets.get(usize::from(o.target)).is_some_and(|t| t.format == BodyFormat::RunpodWebhook)
}

/// Makes the deliveries of all transitions of a fold, in order.
pub(super) fn deliveries(
    owed: &[Owed],
    jobs: &HashMap<JobId, Entry>,
    results: &[NewResult],
    inputs: &HashMap<JobId, StoredInput>,
    now: TimestampMs,
) -> Result<Vec<v1::Delivery>, StoreError> {
    let mut all = Vec::with_capacity(owed.len());
    // Transitions of one job stand together, so its id and trace are made once.
    let mut last: Option<(JobId, String, Option<String>)> = None;
    for o in owed {
        let row = &jobs.get(&o.job).ok_or(StoreError::corrupt("a transition without its job"))?.row;
        if last.as_ref().is_none_or(|(id, _, _)| *id != o.job) {
            last = Some((o.job, row.public_id(), trace_of(row)));
        }
        let Some((_, public_id, trace)) = &last else { continue };
        let target = row
            .targets
            .get(usize::from(o.target))
            .ok_or(StoreError::corrupt("a delivery without its target"))?;
        let transition = JobTransition {
            job: o.job,
            project: row.project,
            seq: o.seq,
            run: o.run,
            status: o.status,
            at: now,
            traceparent: trace.as_deref(),
        };
        let result = o.result.and_then(|n| results.get(n));
        let input = inputs.get(&o.job).filter(|_| repeats_input(row, o));
        let body = match target.format {
            BodyFormat::Runflow => runflow_of(o, public_id, row, result, now),
            format @ (BodyFormat::RunpodWebhook | BodyFormat::RunpodWebhookV2) => {
                body_of(o, public_id, format, &target.url, result, input)
            }
        };
        all.push(job_delivery(&transition, u32::from(o.target), target, body));
    }
    Ok(all)
}

fn body_of(
    o: &Owed,
    public_id: &str,
    format: BodyFormat,
    url: &str,
    result: Option<&NewResult>,
    input: Option<&StoredInput>,
) -> Body {
    body::of_transition(
        format,
        &Terminal {
            id: public_id,
            status: o.status,
            delay_time_ms: o.delay_ms,
            execution_time_ms: o.execution_ms,
            output: result.and_then(|r| json_of(&r.output)),
            error: result.and_then(|r| r.error.as_deref()),
            echo: input.map(|stored| Echo { input: input_of(stored), webhook: url }),
        },
    )
}

/// The body of a `callback_url`.
fn runflow_of(o: &Owed, public_id: &str, row: &JobRow, result: Option<&NewResult>, now: TimestampMs) -> Body {
    runflow_body::run_end(&RunEnd {
        run_id: public_id,
        status: o.status,
        output: result.and_then(|r| json_of(&r.output)),
        error: result.and_then(|r| r.error.as_deref()),
        error_type: result.and_then(|r| r.error_type.as_deref()),
        duration_ms: o.execution_ms,
        created_at: row.submitted_at,
        completed_at: now,
        metadata: row.metadata.as_deref(),
    })
}

/// An empty payload is no JSON: it counts as absent.
pub(super) fn json_of(payload: &StoredPayload) -> Option<Json<'_>> {
    match (&payload.inline, &payload.blob_key) {
        (Some(bytes), _) if !bytes.is_empty() => Some(Json::Inline(bytes)),
        (_, Some(key)) => Some(Json::Blob { key, size_bytes: payload.size_bytes }),
        (_, None) => None,
    }
}

pub(super) fn input_of(stored: &StoredInput) -> Json<'_> {
    match &stored.input {
        InputAt::Inline(bytes) => Json::Inline(bytes),
        InputAt::Blob { key, size_bytes } => Json::Blob { key, size_bytes: *size_bytes },
    }
}

/// The trace that the POSTs of a job belong to: its own. A sampled one gets a span for the tracker's part.
pub(super) fn trace_of(row: &JobRow) -> Option<String> {
    let trace = row.traceparent.as_deref()?;
    if !trace_context::is_sampled(trace) {
        return Some(trace.to_owned());
    }
    let span =
        tracing::info_span!("commit transition", job_id = %row.job.id, status = row.job.status().as_str());
    trace_context::set_parent(&span, Some(trace));
    trace_context::traceparent_of(&span).or_else(|| Some(trace.to_owned()))
}
