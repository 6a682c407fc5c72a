//! Events of a job with a live attempt.

use super::{
    Applied, Effect, EndReason, Job, JobEvent, JobState, Live, Rejection, Terminal, TimestampMs, begin,
    clamp, close, end_of_live, finish, finish_by_other, not_allowed, requeue, stale, stop,
};
use crate::{ids::AttemptRef, job::event::CancelReason, policy::Policy};

pub(super) fn apply(
    job: &Job,
    live: &Live,
    event: &JobEvent,
    now: TimestampMs,
    policy: &Policy,
) -> Result<Applied, Rejection> {
    let ran_ms = now.since_ms(live.started_at);
    match event {
        JobEvent::Started { attempt, lease_until, .. } | JobEvent::Heartbeat { attempt, lease_until } => {
            fence(job, live, attempt)?;
            Ok(renew(job, live, *lease_until))
        }
        JobEvent::Progressed { attempt } | JobEvent::Chunk { attempt } => {
            fence(job, live, attempt)?;
            Ok(Applied::Unchanged)
        }
        JobEvent::Granted { attempt, worker, lease_until } => {
            if attempt.attempt <= job.last_attempt {
                return Err(stale(job, attempt));
            }
            let effects =
                vec![close(job, live, EndReason::Superseded), stop(job, live, EndReason::Superseded)];
            Ok(begin(job, attempt, worker, now.max(job.queued_at), *lease_until, effects))
        }
        JobEvent::Succeeded { attempt, execution_ms, .. } if live.is(job.run, attempt) => Ok(finish(
            job,
            Terminal::Completed,
            end_of_live(live, now, *execution_ms, EndReason::Succeeded),
            Vec::new(),
        )),
        JobEvent::Succeeded { attempt, started_at, execution_ms } => {
            if attempt.attempt > job.last_attempt {
                return Err(Rejection::NeverGranted { newest: job.last_attempt, received: attempt.attempt });
            }
            let effects =
                vec![close(job, live, EndReason::Superseded), stop(job, live, EndReason::Superseded)];
            let started = clamp(job, *started_at, now);
            Ok(finish_by_other(job, attempt, started, *execution_ms, now, effects))
        }
        JobEvent::Failed { attempt, execution_ms } => {
            fence(job, live, attempt)?;
            Ok(failed(job, live, now, *execution_ms, EndReason::HandlerError, policy.retry_errors, policy))
        }
        JobEvent::Crashed { attempt, execution_ms } => {
            fence(job, live, attempt)?;
            Ok(failed(job, live, now, *execution_ms, EndReason::Crashed, true, policy))
        }
        JobEvent::Overran { attempt, execution_ms } => {
            fence(job, live, attempt)?;
            let effects = vec![
                close(job, live, EndReason::ExecutionTimeout),
                stop(job, live, EndReason::ExecutionTimeout),
            ];
            let end = end_of_live(live, now, *execution_ms, EndReason::ExecutionTimeout);
            Ok(finish(job, Terminal::TimedOut, end, effects))
        }
        JobEvent::LeaseExpired { attempt } => {
            fence(job, live, attempt)?;
            if live.lease_until > now {
                return Err(Rejection::NotYet { left_ms: live.lease_until.since_ms(now) });
            }
            Ok(lost(job, live, now, ran_ms, policy))
        }
        JobEvent::HandedBack { attempt } => {
            fence(job, live, attempt)?;
            Ok(requeue(job, now, false, vec![close(job, live, EndReason::HandedBack)]))
        }
        JobEvent::TtlExpired => match job.ttl_at {
            Some(ttl_at) if ttl_at <= now => {
                Ok(end_by_force(job, live, now, ran_ms, Terminal::TimedOut, EndReason::TtlExpired))
            }
            Some(ttl_at) => Err(Rejection::NotYet { left_ms: ttl_at.since_ms(now) }),
            None => Err(not_allowed(job, event)),
        },
        JobEvent::Cancel { reason } => match reason {
            CancelReason::Requested => {
                Ok(end_by_force(job, live, now, ran_ms, Terminal::Cancelled, EndReason::CancelRequested))
            }
            CancelReason::Batch => {
                Ok(end_by_force(job, live, now, ran_ms, Terminal::Cancelled, EndReason::BatchCancelled))
            }
            // A purge removes queued jobs only, as RunPod documents.
            CancelReason::Purged => Err(not_allowed(job, event)),
        },
        JobEvent::Retry { .. } | JobEvent::MessageLost { .. } => Err(not_allowed(job, event)),
    }
}

fn fence(job: &Job, live: &Live, r: &AttemptRef) -> Result<(), Rejection> {
    if live.is(job.run, r) {
        Ok(())
    } else if r.attempt > job.last_attempt {
        Err(Rejection::NeverGranted { newest: job.last_attempt, received: r.attempt })
    } else {
        Err(stale(job, r))
    }
}

fn renew(job: &Job, live: &Live, lease_until: TimestampMs) -> Applied {
    if lease_until <= live.lease_until {
        return Applied::Unchanged;
    }
    let mut next = job.clone();
    next.state = JobState::InProgress(Live { lease_until, ..live.clone() });
    Applied::Renewed { next, effects: Vec::new() }
}

/// A counted failure told by the worker. It keeps its message and gives it back to the queue by itself, so no
/// further one is published.
fn failed(
    job: &Job,
    live: &Live,
    now: TimestampMs,
    execution_ms: u64,
    reason: EndReason,
    retried: bool,
    policy: &Policy,
) -> Applied {
    let effects = vec![close(job, live, reason)];
    if retried && job.failures + 1 < policy.max_attempts {
        requeue(job, now, true, effects)
    } else {
        finish(job, Terminal::Failed, end_of_live(live, now, execution_ms, reason), effects)
    }
}

/// A worker that is gone cannot give its message back; a new one goes out at once and the old one is void.
fn lost(job: &Job, live: &Live, now: TimestampMs, ran_ms: u64, policy: &Policy) -> Applied {
    let mut effects = vec![close(job, live, EndReason::WorkerLost), stop(job, live, EndReason::WorkerLost)];
    if job.failures + 1 >= policy.max_attempts {
        return finish(job, Terminal::Failed, end_of_live(live, now, ran_ms, EndReason::WorkerLost), effects);
    }
    let mut next = job.clone();
    next.publish += 1;
    effects.push(Effect::Publish { run: next.run, publish: next.publish, must_ask: true });
    requeue(&next, now, true, effects)
}

fn end_by_force(
    job: &Job,
    live: &Live,
    now: TimestampMs,
    ran_ms: u64,
    status: Terminal,
    reason: EndReason,
) -> Applied {
    let effects = vec![close(job, live, reason), stop(job, live, reason)];
    finish(job, status, end_of_live(live, now, ran_ms, reason), effects)
}
