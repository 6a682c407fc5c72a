//! [`apply`]: one file per group of states.

mod ended;
mod queued;
mod running;

use super::{
    effect::{AttemptEnd, Effect},
    event::JobEvent,
    rejection::Rejection,
    state::{EndReason, Ended, Job, JobState, Live},
};
use crate::{ids::AttemptRef, policy::Policy, status::JobStatus, time::TimestampMs};

/// What an event did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Applied {
    /// The state changed: `seq` rose by one. The effects belong to this change.
    Changed {
        /// The job after it.
        next: Job,
        /// What follows.
        effects: Vec<Effect>,
    },
    /// The state is the same, some of its data is new (a lease, a publish number). No delivery is owed.
    Renewed {
        /// The job after it.
        next: Job,
        /// What follows.
        effects: Vec<Effect>,
    },
    /// A repetition of what is known already.
    Unchanged,
}

/// Decides what `event` does to `job` at `now` under `policy`. Pure and total: an `Err` is a fact about the job.
pub fn apply(job: &Job, event: &JobEvent, now: TimestampMs, policy: &Policy) -> Result<Applied, Rejection> {
    if let Some(r) = event.attempt()
        && r.run != job.run
    {
        return Err(Rejection::StaleRun { current: job.run, received: r.run });
    }
    match &job.state {
        JobState::InQueue => queued::apply(job, event, now),
        JobState::InProgress(live) => running::apply(job, live, event, now, policy),
        JobState::Completed(_) | JobState::Failed(_) | JobState::Cancelled(_) | JobState::TimedOut(_) => {
            ended::apply(job, event, now)
        }
    }
}

/// The job as its submit leaves it: IN_QUEUE, `seq` 1, run 1, with the deliveries that transition owes.
#[must_use]
pub fn submit(
    id: crate::ids::JobId,
    scopes: Vec<crate::target::EventScope>,
    ttl_ms: Option<u64>,
    execution_timeout_ms: u64,
    now: TimestampMs,
) -> (Job, Vec<Effect>) {
    let mut job = Job {
        id,
        seq: 0,
        run: 1,
        publish: 0,
        last_attempt: 0,
        failures: 0,
        queued_at: now,
        ttl_ms,
        ttl_at: ttl_ms.map(|ttl| now.plus_ms(ttl)),
        execution_timeout_ms,
        scopes,
        owed: 0,
        state: JobState::InQueue,
    };
    let mut effects = vec![Effect::Publish { run: 1, publish: 0, must_ask: false }];
    enter(&mut job, JobState::InQueue, &mut effects);
    (job, effects)
}

/// Enters a state: the only place where `seq` rises and deliveries come to be owed.
fn enter(job: &mut Job, state: JobState, effects: &mut Vec<Effect>) {
    job.seq += 1;
    job.state = state;
    let status = job.state.status();
    for (index, scope) in job.scopes.iter().enumerate() {
        if scope.wants(status)
            && let Ok(target) = u16::try_from(index)
        {
            job.owed += 1;
            effects.push(Effect::Deliver { target, seq: job.seq, status });
        }
    }
}

/// Opens an attempt.
fn begin(
    job: &Job,
    attempt: &AttemptRef,
    worker: &str,
    started_at: TimestampMs,
    lease_until: TimestampMs,
    mut effects: Vec<Effect>,
) -> Applied {
    let mut next = job.clone();
    next.last_attempt = attempt.attempt;
    let live = Live {
        attempt: attempt.attempt,
        nonce: attempt.nonce,
        worker: worker.to_owned(),
        started_at,
        delay_ms: started_at.since_ms(job.queued_at),
        lease_until,
    };
    enter(&mut next, JobState::InProgress(live), &mut effects);
    Applied::Changed { next, effects }
}

/// Ends the run.
fn finish(job: &Job, status: Terminal, end: Ended, mut effects: Vec<Effect>) -> Applied {
    let mut next = job.clone();
    let state = match status {
        Terminal::Completed => JobState::Completed(end),
        Terminal::Failed => JobState::Failed(end),
        Terminal::Cancelled => JobState::Cancelled(end),
        Terminal::TimedOut => JobState::TimedOut(end),
    };
    enter(&mut next, state, &mut effects);
    let status = next.status();
    effects.push(Effect::RecordResult { run: next.run, status });
    // Retried jobs were counted when their first run ended; a batch's total is reached once.
    if next.run == 1 {
        effects.push(Effect::CountInBatch { status });
    }
    Applied::Changed { next, effects }
}

/// Puts the run back into the queue.
fn requeue(job: &Job, now: TimestampMs, counted: bool, mut effects: Vec<Effect>) -> Applied {
    let mut next = job.clone();
    next.queued_at = now;
    if counted {
        next.failures += 1;
    }
    enter(&mut next, JobState::InQueue, &mut effects);
    Applied::Changed { next, effects }
}

/// The ends a run can have.
#[derive(Clone, Copy)]
enum Terminal {
    Completed,
    Failed,
    Cancelled,
    TimedOut,
}

/// An end for a run whose recorded attempt is `live`.
fn end_of_live(live: &Live, now: TimestampMs, execution_ms: u64, reason: EndReason) -> Ended {
    Ended { attempt: Some(live.attempt), at: now, delay_ms: live.delay_ms, execution_ms, reason }
}

/// An end for a run that no attempt is recorded of.
const fn end_unstarted(now: TimestampMs, reason: EndReason) -> Ended {
    Ended { attempt: None, at: now, delay_ms: 0, execution_ms: 0, reason }
}

fn close(job: &Job, live: &Live, reason: EndReason) -> Effect {
    Effect::CloseAttempt(AttemptEnd {
        run: job.run,
        attempt: live.attempt,
        worker: live.worker.clone(),
        reason,
    })
}

fn stop(job: &Job, live: &Live, reason: EndReason) -> Effect {
    Effect::Stop { worker: live.worker.clone(), run: job.run, attempt: live.attempt, reason }
}

/// A success of an attempt that is not the live one still ends the run (P3: the first success of any attempt).
fn finish_by_other(
    job: &Job,
    attempt: &AttemptRef,
    started_at: TimestampMs,
    execution_ms: u64,
    now: TimestampMs,
    effects: Vec<Effect>,
) -> Applied {
    let end = Ended {
        attempt: Some(attempt.attempt),
        at: now,
        delay_ms: started_at.since_ms(job.queued_at),
        execution_ms,
        reason: EndReason::Succeeded,
    };
    finish(job, Terminal::Completed, end, effects)
}

/// A worker's word about a moment, brought between queueing and now, so that no clock but the database's counts.
fn clamp(job: &Job, told: TimestampMs, now: TimestampMs) -> TimestampMs {
    told.max(job.queued_at).min(now.max(job.queued_at))
}

fn not_allowed(job: &Job, event: &JobEvent) -> Rejection {
    Rejection::NotAllowed { status: job.status(), event: event.kind() }
}

fn stale(job: &Job, r: &AttemptRef) -> Rejection {
    Rejection::StaleAttempt { newest: job.last_attempt, received: r.attempt }
}

const fn already(status: JobStatus) -> Rejection {
    Rejection::AlreadyTerminal { status }
}
