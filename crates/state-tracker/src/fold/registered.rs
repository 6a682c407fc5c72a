//! What registered webhooks are owed for the transitions of a fold.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ringback_contracts::v1;
use ringback_domain::{
    BatchId, EndpointId, JobId, JobStatus, ProjectId, TimestampMs,
    event::{Completion, EndpointKind, EventType, event_key_of},
    webhook::body::Body,
};
use ringback_store::{
    StoreError, WriteTx,
    events::{Audience, NewEvent, emit},
    inputs::StoredInput,
    results::NewResult,
    webhooks::{
        Registry,
        registry::parse_metadata,
        tell::{self, End, Transition},
    },
    workers::last_beat_ms,
};

use super::{
    Changed, Entry, Lost,
    deliver::{input_of, json_of, trace_of},
};

/// Transitions of jobs whose project has registered webhooks.
pub(super) fn heard<'a>(
    changed: &'a [Changed],
    jobs: &HashMap<JobId, Entry>,
    registry: &Registry,
) -> Vec<&'a Changed> {
    changed.iter().filter(|c| jobs.get(&c.job).is_some_and(|e| registry.listens(e.row.project))).collect()
}

/// Batches one of whose jobs started.
pub(super) fn started_batches(heard: &[&Changed], jobs: &HashMap<JobId, Entry>) -> BTreeSet<BatchId> {
    heard
        .iter()
        .filter(|c| c.status == JobStatus::InProgress)
        .filter_map(|c| jobs.get(&c.job)?.row.batch)
        .map(|(batch, _)| batch)
        .collect()
}

/// Jobs whose input is repeated in a body.
pub(super) fn echoed(
    heard: &[&Changed],
    jobs: &HashMap<JobId, Entry>,
    registry: &Registry,
    now: TimestampMs,
) -> Vec<JobId> {
    let wants = |c: &Changed| {
        let Some(entry) = jobs.get(&c.job).filter(|_| c.status.is_terminal()) else { return false };
        let metadata = parse_metadata(entry.row.metadata.as_deref());
        let of = transition(c, entry, now, None);
        tell::wants_input(&of, &tell::owed(registry, &of, metadata.as_ref()))
    };
    heard.iter().filter(|c| wants(c)).map(|c| c.job).collect()
}

/// Makes the deliveries, in order, and raises what each job owes (P5).
pub(super) fn deliveries(
    heard: &[&Changed],
    jobs: &mut HashMap<JobId, Entry>,
    registry: &Registry,
    results: &[NewResult],
    inputs: &HashMap<JobId, StoredInput>,
    now: TimestampMs,
) -> Result<Vec<v1::Delivery>, StoreError> {
    let mut all = Vec::new();
    for c in heard {
        let entry = jobs.get_mut(&c.job).ok_or(StoreError::corrupt("a transition without its job"))?;
        let metadata = parse_metadata(entry.row.metadata.as_deref());
        let trace = trace_of(&entry.row);
        let of = transition(c, entry, now, trace.as_deref());
        let owed = tell::owed(registry, &of, metadata.as_ref());
        if owed.is_empty() {
            continue;
        }
        let result = c.result.and_then(|n| results.get(n));
        let end = End {
            output: result.and_then(|r| json_of(&r.output)),
            said: result.and_then(|r| r.output.said.as_deref()),
            error: result.and_then(|r| r.error.as_deref()),
            error_type: result.and_then(|r| r.error_type.as_deref()),
            input: inputs.get(&c.job).map(input_of),
        };
        let told = tell::deliveries(registry, &of, &end, &owed);
        entry.row.job.owed += u32::try_from(told.len()).unwrap_or(u32::MAX);
        all.extend(told);
    }
    Ok(all)
}

/// Tokens that completions of projects with a quota used in this fold.
pub(super) fn tokens(
    changed: &[Changed],
    jobs: &HashMap<JobId, Entry>,
    registry: &Registry,
    results: &[NewResult],
) -> BTreeMap<ProjectId, u64> {
    let mut used = BTreeMap::new();
    for c in changed {
        let Some(row) = jobs.get(&c.job).map(|e| &e.row) else { continue };
        let counts = registry.quota(row.project).is_some_and(|q| q.tokens.is_some())
            && registry.endpoint(row.endpoint).is_some_and(|e| e.kind == EndpointKind::Completion);
        let output = c.result.filter(|_| counts).and_then(|n| results.get(n)).map(|r| &r.output);
        let total = output.and_then(|output| match (&output.inline, &output.said) {
            (Some(inline), _) => Completion::read(inline).total_tokens,
            (None, said) => said.as_ref()?.total_tokens,
        });
        if let Some(n) = total {
            let sum: &mut u64 = used.entry(row.project).or_default();
            *sum = sum.saturating_add(n);
        }
    }
    used
}

/// Tells of lost workers, once per worker, endpoint and last sign of life, however many of its attempts are found
/// lost in however many commits. Answers the deliveries, which are inserted.
pub(super) async fn lost_workers(
    tx: &WriteTx,
    partitions: u16,
    lost: &[Lost],
    jobs: &HashMap<JobId, Entry>,
    registry: &Registry,
) -> Result<Vec<v1::Delivery>, StoreError> {
    let mut held: BTreeMap<(&str, EndpointId), Vec<&Entry>> = BTreeMap::new();
    for l in lost {
        if let Some(entry) = jobs.get(&l.job).filter(|e| registry.listens(e.row.project)) {
            held.entry((&l.worker, entry.row.endpoint)).or_default().push(entry);
        }
    }
    let mut deliveries = Vec::new();
    for ((worker, endpoint), entries) in held {
        let Some(first) = entries.first() else { continue };
        let last_beat = last_beat_ms(tx.conn(), worker).await?;
        // Without a sign of life every commit is a loss of its own.
        let at = u64::try_from(last_beat.unwrap_or(tx.now_ms())).unwrap_or(0);
        let data = serde_json::json!({
            "worker_id": worker,
            "endpoint": registry.endpoint(endpoint).map_or("", |e| &e.name),
            "last_heartbeat_at": last_beat.map(|ms| TimestampMs(ms).rfc3339()),
            "jobs": entries.iter().map(|e| e.row.public_id()).collect::<Vec<_>>(),
        });
        let event = NewEvent {
            id: event_key_of(at, &format!("worker.lost:{endpoint}:{worker}:{at}")),
            project: first.row.project,
            names: EventType::WorkerLost.into(),
            subject: worker,
            endpoint: Some(endpoint),
            metadata: None,
            data: Body::of_json(data.to_string().into_bytes()),
            audience: Audience::Matching,
            traceparent: None,
        };
        deliveries.extend(emit(tx, partitions, event).await?);
    }
    Ok(deliveries)
}

fn transition<'a>(
    c: &Changed,
    entry: &'a Entry,
    at: TimestampMs,
    traceparent: Option<&'a str>,
) -> Transition<'a> {
    Transition {
        row: &entry.row,
        seq: c.seq,
        run: c.run,
        attempt: c.attempt,
        status: c.status,
        // The first entry into the queue is the submit, which is not folded here.
        again: true,
        delay_ms: c.delay_ms,
        execution_ms: c.execution_ms,
        at,
        traceparent,
    }
}
