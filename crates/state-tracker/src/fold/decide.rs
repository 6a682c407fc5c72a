//! What each thing said about a job means for it, and what its sender is told.

use std::collections::HashSet;

use ringback_contracts::v1::{self, Verdict, grant_reply};
use ringback_domain::{
    AttemptRef, JobId, JobStatus, ProjectId,
    job::{CancelReason, EndReason, Grant, JobEvent, JobState, Live, Rejection, decide_grant, expand},
};
use ringback_store::{
    chunks_write::{NewChunk, NewProgress},
    results::{NewAttempt, StoredPayload},
};

use super::{
    Context, Entry, Out,
    advance::{Step, Told, advance},
};
use crate::unit::{Answer, Beat, Chunk, JobAnswer, Outcome, Told as Word, Unit, What};

/// When a holder asks again whose answer depends on a lease that nobody may judge now.
const ASK_AGAIN_MS: u64 = 1_000;

/// A beat whose lease was renewed by key.
pub(super) fn renewed(unit: &Unit, out: &mut Out) -> Answer {
    if let What::Beat(beat) = &unit.what {
        keep_progress(unit.job, beat, out);
    }
    Answer::Stop(None)
}

fn keep_progress(job: JobId, beat: &Beat, out: &mut Out) {
    if let Some(value) = &beat.progress {
        let (run, attempt) = (beat.attempt.run, beat.attempt.attempt);
        out.progress.insert(job, NewProgress { job, run, attempt, value: value.clone() });
    }
}

/// Decides one unit. `entry` is absent where the job is unknown (or long gone).
pub(super) fn decide(unit: &Unit, entry: Option<&mut Entry>, out: &mut Out, context: &Context<'_>) -> Answer {
    let Some(entry) = entry else { return unknown_job(&unit.what) };
    match &unit.what {
        What::Outcome(outcome) => Answer::Verdict(self::outcome(entry, outcome, out, context)),
        What::Beat(beat) => Answer::Stop(self::beat(entry, beat, out, context)),
        What::WorkersGone { workers, kept } => workers_gone(entry, workers, kept, out, context),
        What::Ask { worker, run, publish, nonce } => {
            let opened = AttemptRef { run: *run, attempt: 0, nonce: *nonce };
            Answer::Grant(ask(entry, worker, *publish, opened, out, context))
        }
        What::Chunk(chunk) => Answer::Verdict(self::chunk(entry, chunk, out, context)),
        What::Cancel { project, reason } => cancel(entry, *project, *reason, out, context),
        What::Retry { project, native, expected_run } => {
            retry(entry, *project, *native, *expected_run, out, context)
        }
        What::Due => due(entry, out, context),
        What::TellProgress => {
            out.due_news.insert(unit.job);
            job_answer(entry, false)
        }
        What::MessageLost { run, publish } => message_lost(entry, *run, *publish, out, context),
    }
}

fn unknown_job(what: &What) -> Answer {
    match what {
        What::Outcome(_) | What::Chunk(_) => Answer::Verdict(Verdict::Obsolete),
        What::Beat(_) => Answer::Stop(Some("unknown")),
        What::Ask { .. } => Answer::Grant(drop_it("the job is unknown")),
        What::WorkersGone { .. }
        | What::Cancel { .. }
        | What::Retry { .. }
        | What::Due
        | What::TellProgress
        | What::MessageLost { .. } => Answer::NotFound,
    }
}

fn job_answer(entry: &Entry, changed: bool) -> Answer {
    let job = &entry.row.job;
    Answer::Job(JobAnswer { job: job.id, status: job.status(), seq: job.seq, run: job.run, changed })
}

fn outcome(entry: &mut Entry, o: &Outcome, out: &mut Out, context: &Context<'_>) -> Verdict {
    let (attempt, execution_ms, started_at) = (o.attempt, o.execution_ms, o.started_at);
    let event = match &o.told {
        Word::Succeeded { .. } => JobEvent::Succeeded { attempt, started_at, execution_ms },
        Word::Failed { .. } => JobEvent::Failed { attempt, execution_ms },
        Word::Crashed { .. } => JobEvent::Crashed { attempt, execution_ms },
        Word::Overran => JobEvent::Overran { attempt, execution_ms },
        Word::HandedBack { .. } => JobEvent::HandedBack { attempt },
    };
    let told = word_of(o, entry, context);
    for event in expand(&entry.row.job, event, &o.worker, started_at, context.lease_until()) {
        if let Err(why) = advance(entry, &event, &told, out, context) {
            return too_late(entry, o, &why, out, context);
        }
    }
    match entry.row.job.status() {
        // The worker keeps its message and gives it back to the queue.
        JobStatus::InQueue => Verdict::Requeued,
        JobStatus::InProgress
        | JobStatus::Completed
        | JobStatus::Failed
        | JobStatus::Cancelled
        | JobStatus::TimedOut => Verdict::Committed,
    }
}

fn word_of<'a>(o: &'a Outcome, entry: &Entry, context: &Context<'_>) -> Told<'a> {
    let (output, error, error_type) = match &o.told {
        Word::Succeeded { output } => (Some(output), None, None),
        Word::Failed { error, error_type, output } => {
            (Some(output), Some(error.as_str()), error_type.as_deref())
        }
        Word::Crashed { error } => (None, Some(error.as_str()), None),
        Word::Overran => (None, None, None),
        Word::HandedBack { reason } => (None, Some(reason.as_str()), None),
    };
    // The worker's word about a moment counts only between queueing and now.
    let queued_at = entry.row.job.queued_at;
    Told {
        worker: Some(&o.worker),
        started_at: Some(o.started_at.max(queued_at).min(context.now.max(queued_at))),
        execution_ms: Some(o.execution_ms),
        output,
        error,
        error_type,
        logs: Some(&o.logs),
    }
}

/// An outcome that changes nothing is kept in the history (P3).
///
/// While the job waits in the queue, the sender may hold its only message: it gives it back, and whoever gets it asks
/// for a grant. Otherwise the message is void, or another attempt has the job and its lease.
fn too_late(entry: &Entry, o: &Outcome, why: &Rejection, out: &mut Out, context: &Context<'_>) -> Verdict {
    metrics::counter!("ringback_tracker_late_outcomes_total").increment(1);
    let (reason, detail) = match &o.told {
        Word::Succeeded { output } => (EndReason::Succeeded, describe(output)),
        Word::Failed { error, .. } => (EndReason::HandlerError, error.clone()),
        Word::Crashed { error } => (EndReason::Crashed, error.clone()),
        Word::Overran => (EndReason::ExecutionTimeout, String::new()),
        Word::HandedBack { reason } => (EndReason::HandedBack, reason.clone()),
    };
    out.late.push(NewAttempt {
        job: entry.row.job.id,
        run: o.attempt.run,
        attempt: o.attempt.attempt,
        nonce: o.attempt.nonce,
        reason,
        worker: o.worker.to_string(),
        at: context.now,
        execution_ms: o.execution_ms,
        detail: Some(if detail.is_empty() { why.to_string() } else { format!("{why}; {detail}") }),
        logs: o.logs.inline.clone(),
    });
    let waits = entry.row.job.run == o.attempt.run && entry.row.job.status() == JobStatus::InQueue;
    if waits { Verdict::Requeued } else { Verdict::Obsolete }
}

fn describe(output: &StoredPayload) -> String {
    match &output.blob_key {
        Some(key) => format!("its output of {} bytes is blob {key}", output.size_bytes),
        None => format!("its output of {} bytes is dropped", output.size_bytes),
    }
}

/// The first word about an ungranted attempt starts it; later ones renew its lease. Answers the reason to stop.
fn beat(entry: &mut Entry, beat: &Beat, out: &mut Out, context: &Context<'_>) -> Option<&'static str> {
    let event = JobEvent::Started {
        attempt: beat.attempt,
        worker: beat.worker.to_string(),
        started_at: beat.started_at,
        lease_until: context.lease_until(),
    };
    let job = entry.row.job.id;
    match advance(entry, &event, &Told::default(), out, context) {
        Ok(_) => {
            keep_progress(job, beat, out);
            None
        }
        Err(Rejection::AlreadyTerminal { .. }) => {
            Some(entry.row.job.state.ended().map_or("unknown", |e| e.reason.as_str()))
        }
        Err(_) => Some(EndReason::Superseded.as_str()),
    }
}

/// The worker is known to be dead, so its lease need not run out first.
fn workers_gone(
    entry: &mut Entry,
    workers: &[String],
    kept: &HashSet<(JobId, AttemptRef)>,
    out: &mut Out,
    context: &Context<'_>,
) -> Answer {
    let (id, run) = (entry.row.job.id, entry.row.job.run);
    let JobState::InProgress(live) = &mut entry.row.job.state else { return job_answer(entry, false) };
    let attempt = AttemptRef { run, attempt: live.attempt, nonce: live.nonce };
    if !workers.contains(&live.worker) || kept.contains(&(id, attempt)) {
        return job_answer(entry, false);
    }
    live.lease_until = live.lease_until.min(context.now);
    let changed = advance(entry, &JobEvent::LeaseExpired { attempt }, &Told::default(), out, context);
    job_answer(entry, changed == Ok(Step::Changed))
}

fn drop_it(reason: &str) -> grant_reply::Answer {
    grant_reply::Answer::Drop(grant_reply::Drop { reason: reason.to_owned() })
}

/// `opened` carries run and nonce; its number is decided here.
fn ask(
    entry: &mut Entry,
    worker: &str,
    publish: u32,
    opened: AttemptRef,
    out: &mut Out,
    context: &Context<'_>,
) -> grant_reply::Answer {
    // An expired lease leads to one more decision, never to two.
    for _ in 0..2 {
        match decide_grant(&entry.row.job, opened.run, publish, context.now) {
            Grant::Run { attempt } => {
                let opened = AttemptRef { attempt, ..opened };
                let lease_until = context.lease_until();
                let event = JobEvent::Granted { attempt: opened, worker: worker.to_owned(), lease_until };
                return match advance(entry, &event, &Told::default(), out, context) {
                    Ok(_) => run_it(attempt, opened.nonce.0),
                    Err(why) => drop_it(&why.to_string()),
                };
            }
            Grant::Wait { after_ms } => {
                return match entry.row.job.state.live() {
                    Some(live) if was_granted(live, worker, context) => run_it(live.attempt, live.nonce.0),
                    _ => wait(after_ms),
                };
            }
            Grant::ExpireFirst { .. } if !context.steady => return wait(ASK_AGAIN_MS),
            Grant::ExpireFirst { attempt } => {
                let event = JobEvent::LeaseExpired { attempt };
                if let Err(why) = advance(entry, &event, &Told::default(), out, context) {
                    return drop_it(&why.to_string());
                }
            }
            Grant::Drop => return drop_it("another message of the job counts, or its run has ended"),
        }
    }
    wait(ASK_AGAIN_MS)
}

/// The same worker asks again because it did not hear the answer: its grant is as it was given, no heartbeat has
/// renewed it. Attempt 1 is never granted.
fn was_granted(live: &Live, worker: &str, context: &Context<'_>) -> bool {
    live.attempt > 1
        && live.worker == worker
        && live.lease_until == live.started_at.plus_ms(context.env.lease_ms)
}

const fn run_it(attempt: u32, nonce: u64) -> grant_reply::Answer {
    grant_reply::Answer::Run(grant_reply::Run { attempt, nonce })
}

const fn wait(retry_after_ms: u64) -> grant_reply::Answer {
    grant_reply::Answer::Wait(grant_reply::Wait { retry_after_ms })
}

fn chunk(entry: &mut Entry, c: &Chunk, out: &mut Out, context: &Context<'_>) -> Verdict {
    let event = JobEvent::Chunk { attempt: c.attempt };
    for event in expand(&entry.row.job, event, &c.worker, c.started_at, context.lease_until()) {
        if advance(entry, &event, &Told::default(), out, context).is_err() {
            return Verdict::Obsolete;
        }
    }
    let (job, r) = (entry.row.job.id, c.attempt);
    out.chunks.push(NewChunk { job, run: r.run, attempt: r.attempt, n: c.n, output: c.output.clone() });
    out.after.chunks.entry(entry.row.endpoint).or_default().insert(job);
    Verdict::Committed
}

fn cancel(
    entry: &mut Entry,
    project: Option<ProjectId>,
    reason: CancelReason,
    out: &mut Out,
    context: &Context<'_>,
) -> Answer {
    if project.is_some_and(|p| p != entry.row.project) {
        return Answer::NotFound;
    }
    // Cancelling is idempotent: an ended job answers its end.
    let changed = advance(entry, &JobEvent::Cancel { reason }, &Told::default(), out, context);
    job_answer(entry, changed == Ok(Step::Changed))
}

fn retry(
    entry: &mut Entry,
    project: ProjectId,
    native: bool,
    expected_run: u32,
    out: &mut Out,
    context: &Context<'_>,
) -> Answer {
    if project != entry.row.project {
        return Answer::NotFound;
    }
    if expected_run > 0 && entry.row.job.run > expected_run {
        // Asked before, and committed: only the answer was lost.
        return job_answer(entry, false);
    }
    match advance(entry, &JobEvent::Retry { native }, &Told::default(), out, context) {
        Ok(step) => job_answer(entry, step == Step::Changed),
        Err(_) => {
            let status = entry.row.job.status();
            let detail = format!("a job that is {status} cannot be retried");
            Answer::Conflict { status, detail }
        }
    }
}

/// Judges limits and lease again, in the transaction that ends the job.
///
/// A running job is judged only by an observer that saw everything for a lease: its outcome may wait in a spool.
fn due(entry: &mut Entry, out: &mut Out, context: &Context<'_>) -> Answer {
    let (job, now) = (&entry.row.job, context.now);
    let ttl_passed = job.ttl_at.is_some_and(|at| at <= now);
    let event = match &job.state {
        JobState::InQueue => ttl_passed.then_some(JobEvent::TtlExpired),
        JobState::InProgress(_) if !context.steady => None,
        JobState::InProgress(live) => {
            let attempt = AttemptRef { run: job.run, attempt: live.attempt, nonce: live.nonce };
            let limit_ms = job.execution_timeout_ms.saturating_add(context.env.grace_ms);
            if ttl_passed {
                Some(JobEvent::TtlExpired)
            } else if live.started_at.plus_ms(limit_ms) <= now {
                Some(JobEvent::Overran { attempt, execution_ms: now.since_ms(live.started_at) })
            } else if live.lease_until <= now {
                Some(JobEvent::LeaseExpired { attempt })
            } else {
                None
            }
        }
        JobState::Completed(_) | JobState::Failed(_) | JobState::Cancelled(_) | JobState::TimedOut(_) => None,
    };
    let changed = match event {
        Some(event) => advance(entry, &event, &Told::default(), out, context) == Ok(Step::Changed),
        None => false,
    };
    job_answer(entry, changed)
}

fn message_lost(entry: &mut Entry, run: u32, publish: u32, out: &mut Out, context: &Context<'_>) -> Answer {
    if run != entry.row.job.run {
        return job_answer(entry, false);
    }
    let sent = advance(entry, &JobEvent::MessageLost { publish }, &Told::default(), out, context);
    job_answer(entry, sent.is_ok())
}

/// The wire form of an attempt, for stop orders.
pub(crate) fn stop_order(job: JobId, r: &AttemptRef, reason: &str) -> v1::StopOrder {
    v1::StopOrder { attempt: Some(ringback_contracts::attempt_to_wire(&job, r)), reason: reason.to_owned() }
}
