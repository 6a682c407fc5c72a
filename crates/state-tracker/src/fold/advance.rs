//! One event applied to one job, and its effects turned into rows and messages.

use bytes::Bytes;
use ringback_bus::{JobSubject, Lane, Subjects};
use ringback_contracts::v1;
use ringback_domain::{
    JobStatus, TimestampMs,
    job::{Applied, AttemptEnd, Effect, EndReason, Ended, JobEvent, JobState, Live, Rejection, apply},
};
use ringback_store::{
    JobRow,
    results::{NewAttempt, NewResult, StoredPayload},
};

use super::{Changed, Context, Entry, Lost, Out, Owed, Publish};

/// What came along with an event and belongs into its rows.
#[derive(Clone, Debug, Default)]
pub(super) struct Told<'a> {
    pub(super) worker: Option<&'a str>,
    pub(super) started_at: Option<TimestampMs>,
    pub(super) execution_ms: Option<u64>,
    pub(super) output: Option<&'a StoredPayload>,
    pub(super) error: Option<&'a str>,
    pub(super) error_type: Option<&'a str>,
    pub(super) logs: Option<&'a StoredPayload>,
}

/// Whether an event changed the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Changed,
    Kept,
}

/// Applies `event` to the job. On a rejection nothing has changed.
pub(super) fn advance(
    entry: &mut Entry,
    event: &JobEvent,
    told: &Told<'_>,
    out: &mut Out,
    context: &Context<'_>,
) -> Result<Step, Rejection> {
    let row = &mut entry.row;
    let applied = apply(&row.job, event, context.now, &row.policy)?;
    let (next, effects, step) = match applied {
        Applied::Unchanged => return Ok(Step::Kept),
        Applied::Renewed { next, effects } => (next, effects, Step::Kept),
        Applied::Changed { next, effects } => (next, effects, Step::Changed),
    };
    entry.dirty = true;
    let from = row.job.status();
    let before = std::mem::replace(&mut row.job, next);
    let live = match before.state {
        JobState::InProgress(live) => Some(live),
        JobState::InQueue
        | JobState::Completed(_)
        | JobState::Failed(_)
        | JobState::Cancelled(_)
        | JobState::TimedOut(_) => None,
    };
    if let (JobEvent::LeaseExpired { .. }, Step::Changed, Some(live)) = (event, step, &live) {
        out.lost.push(Lost { job: row.job.id, worker: live.worker.clone() });
    }
    let result = record_result(row, &effects, live.as_ref(), told, out);
    if step == Step::Changed {
        row.log_transition(context.now);
        note_transition(row, from, event, result, out, context);
    }
    for effect in effects {
        carry_out(row, effect, live.as_ref(), told, result, out, context);
    }
    Ok(step)
}

fn note_transition(
    row: &JobRow,
    from: JobStatus,
    event: &JobEvent,
    result: Option<usize>,
    out: &mut Out,
    context: &Context<'_>,
) {
    let to = row.job.status();
    let counters = out.counters.entry(row.endpoint).or_default();
    counters.moved(Some(from), to);
    let again = match event {
        JobEvent::Retry { .. } => true,
        JobEvent::Granted { attempt, .. } => attempt.attempt > 1,
        _ => false,
    };
    counters.retried += i64::from(again);
    metrics::counter!("ringback_job_transitions_total", "status" => to.as_str()).increment(1);
    let (attempt, delay_ms, execution_ms) = times(row);
    out.changed.push(Changed {
        job: row.job.id,
        seq: row.job.seq,
        run: row.job.run,
        attempt,
        status: to,
        delay_ms,
        execution_ms,
        result,
    });
    out.after.transitions.push(v1::TransitionEvent {
        job_id: Bytes::copy_from_slice(row.job.id.as_bytes()),
        project_id: row.project.0,
        endpoint_id: row.endpoint.0,
        seq: row.job.seq,
        run: row.job.run,
        attempt,
        status: u32::from(to.code()),
        at_ms: context.now.0,
        sync_id: row.sync_id,
        batch_id: row.batch.map(|(id, _)| Bytes::copy_from_slice(id.as_bytes())).unwrap_or_default(),
        delay_ms,
        execution_ms,
    });
}

/// Attempt, `delayTime` and `executionTime` as they stand.
fn times(row: &JobRow) -> (u32, u64, u64) {
    match (row.job.state.live(), row.job.state.ended()) {
        (Some(live), _) => (live.attempt, live.delay_ms, 0),
        (_, Some(end)) => (end.attempt.unwrap_or(0), end.delay_ms, end.execution_ms),
        (None, None) => (0, 0, 0),
    }
}

fn carry_out(
    row: &JobRow,
    effect: Effect,
    live: Option<&Live>,
    told: &Told<'_>,
    result: Option<usize>,
    out: &mut Out,
    context: &Context<'_>,
) {
    match effect {
        Effect::Deliver { target, seq, status } => {
            let (_, delay_ms, execution_ms) = times(row);
            let (job, run) = (row.job.id, row.job.run);
            out.owed.push(Owed { job, target, seq, run, status, delay_ms, execution_ms, result });
        }
        // Written by `record_result`, because the bodies need it.
        Effect::RecordResult { .. } => {}
        Effect::CloseAttempt(end) => {
            if let Some(live) = live {
                out.attempts.push(closed(row, &end, live, told, result.is_some(), context.now));
            }
        }
        Effect::CountInBatch { status } => {
            if let Some((batch, _)) = row.batch {
                out.batches.entry(batch).or_default().push(status);
            }
        }
        Effect::Publish { must_ask, .. } => out.after.publish.push(Publish { row: row.clone(), must_ask }),
        Effect::DropMessage { run, publish } => {
            out.after.drops.push(JobSubject {
                shard: Subjects::shard_of(row.endpoint, context.env.shards),
                endpoint: row.endpoint,
                lane: Lane::of(row.low_priority),
                job: row.job.id,
                run,
                publish,
            });
        }
        Effect::Stop { worker, run, attempt, reason } => {
            let nonce = live.filter(|l| l.attempt == attempt).map_or(0, |l| l.nonce.0);
            let job_id = Bytes::copy_from_slice(row.job.id.as_bytes());
            out.after.stops.entry(worker).or_default().push(v1::StopOrder {
                attempt: Some(v1::Attempt { job_id, run, attempt, nonce }),
                reason: reason.as_str().to_owned(),
            });
        }
    }
}

fn closed(
    row: &JobRow,
    end: &AttemptEnd,
    live: &Live,
    told: &Told<'_>,
    has_result: bool,
    now: TimestampMs,
) -> NewAttempt {
    let own_word = matches!(
        end.reason,
        EndReason::HandlerError | EndReason::Crashed | EndReason::HandedBack | EndReason::ExecutionTimeout
    );
    NewAttempt {
        job: row.job.id,
        run: end.run,
        attempt: end.attempt,
        nonce: live.nonce,
        reason: end.reason,
        worker: end.worker.clone(),
        at: now,
        execution_ms: told.execution_ms.filter(|_| own_word).unwrap_or(now.since_ms(live.started_at)),
        detail: told.error.filter(|_| own_word).map(str::to_owned),
        // A run's result carries the log of its recorded attempt.
        logs: if own_word && !has_result { told.logs.and_then(|l| l.inline.clone()) } else { None },
    }
}

/// Drafts the result row of a run that ended with this event.
fn record_result(
    row: &JobRow,
    effects: &[Effect],
    live: Option<&Live>,
    told: &Told<'_>,
    out: &mut Out,
) -> Option<usize> {
    if !effects.iter().any(|e| matches!(e, Effect::RecordResult { .. })) {
        return None;
    }
    let end = row.job.state.ended()?.clone();
    let recorded = live.filter(|l| Some(l.attempt) == end.attempt);
    let (worker, started_at) = match recorded {
        Some(live) => (Some(live.worker.clone()), Some(live.started_at)),
        None if end.attempt.is_some() => (told.worker.map(str::to_owned), told.started_at),
        None => (None, None),
    };
    let owned = |payload: Option<&StoredPayload>| payload.cloned().unwrap_or_default();
    out.results.push(NewResult {
        job: row.job.id,
        run: row.job.run,
        status: row.job.status(),
        worker,
        started_at,
        output: owned(told.output),
        error: error_text(row, &end, told),
        error_type: told.error_type.map(str::to_owned),
        logs: owned(told.logs),
        end,
    });
    Some(out.results.len() - 1)
}

/// The text of `error` for a run that did not complete.
fn error_text(row: &JobRow, end: &Ended, told: &Told<'_>) -> Option<String> {
    let said = |default: &str| Some(told.error.filter(|e| !e.is_empty()).unwrap_or(default).to_owned());
    match end.reason {
        EndReason::Succeeded => None,
        EndReason::HandlerError => said("the handler failed without a message"),
        EndReason::Crashed => said("the process that ran the handler ended"),
        EndReason::WorkerLost => Some(format!(
            "the worker was lost {} times: nothing was heard of it for a whole lease",
            row.policy.max_attempts
        )),
        EndReason::ExecutionTimeout => Some(format!(
            "the job ran longer than its execution timeout of {} ms",
            row.job.execution_timeout_ms
        )),
        EndReason::TtlExpired => Some(format!(
            "the job's time to live of {} ms passed before it ended",
            row.job.ttl_ms.unwrap_or_default()
        )),
        EndReason::CancelRequested => Some("the job was cancelled by request".to_owned()),
        EndReason::QueuePurged => Some("the job was cancelled by a purge of its queue".to_owned()),
        EndReason::BatchCancelled => Some("the job was cancelled with the rest of its batch".to_owned()),
        EndReason::HandedBack | EndReason::Superseded => said("the attempt was given up"),
    }
}
