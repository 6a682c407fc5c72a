//! Events of a job that waits in the queue.

use super::{
    Applied, Effect, EndReason, Job, JobEvent, Rejection, Terminal, TimestampMs, begin, clamp, end_unstarted,
    finish, finish_by_other, not_allowed, stale,
};
use crate::{ids::AttemptRef, job::event::CancelReason};

pub(super) fn apply(job: &Job, event: &JobEvent, now: TimestampMs) -> Result<Applied, Rejection> {
    match event {
        JobEvent::Started { attempt, worker, started_at, lease_until } => {
            opens(job, attempt)?;
            Ok(begin(job, attempt, worker, clamp(job, *started_at, now), *lease_until, Vec::new()))
        }
        JobEvent::Granted { attempt, worker, lease_until } => {
            if attempt.attempt <= job.last_attempt {
                return Err(stale(job, attempt));
            }
            Ok(begin(job, attempt, worker, now.max(job.queued_at), *lease_until, Vec::new()))
        }
        // A lost attempt that succeeded after all: the run's message is void now.
        JobEvent::Succeeded { attempt, started_at, execution_ms } => {
            known(job, attempt)?;
            let started = clamp(job, *started_at, now);
            Ok(finish_by_other(job, attempt, started, *execution_ms, now, vec![drop_message(job)]))
        }
        // What an attempt says that was never opened means nothing here: its outcome comes with its start
        // (see `expand`), and what it hands back never left the queue.
        JobEvent::HandedBack { attempt } if attempt.attempt > job.last_attempt => {
            known(job, attempt).map(|()| Applied::Unchanged)
        }
        JobEvent::Failed { attempt, .. }
        | JobEvent::Crashed { attempt, .. }
        | JobEvent::Overran { attempt, .. }
        | JobEvent::LeaseExpired { attempt }
        | JobEvent::HandedBack { attempt }
        | JobEvent::Heartbeat { attempt, .. }
        | JobEvent::Progressed { attempt }
        | JobEvent::Chunk { attempt } => Err(stale(job, attempt)),
        JobEvent::TtlExpired => match job.ttl_at {
            Some(ttl_at) if ttl_at <= now => Ok(finish(
                job,
                Terminal::TimedOut,
                end_unstarted(now, EndReason::TtlExpired),
                vec![drop_message(job)],
            )),
            Some(ttl_at) => Err(Rejection::NotYet { left_ms: ttl_at.since_ms(now) }),
            None => Err(not_allowed(job, event)),
        },
        JobEvent::Cancel { reason } => {
            let reason = match reason {
                CancelReason::Requested => EndReason::CancelRequested,
                CancelReason::Purged => EndReason::QueuePurged,
                CancelReason::Batch => EndReason::BatchCancelled,
            };
            Ok(finish(job, Terminal::Cancelled, end_unstarted(now, reason), vec![drop_message(job)]))
        }
        JobEvent::Retry { .. } => Err(not_allowed(job, event)),
        JobEvent::MessageLost { publish } => {
            if *publish != job.publish {
                return Err(Rejection::StaleMessage { current: job.publish, received: *publish });
            }
            let mut next = job.clone();
            next.publish += 1;
            let effects = vec![Effect::Publish { run: next.run, publish: next.publish, must_ask: true }];
            Ok(Applied::Renewed { next, effects })
        }
    }
}

/// An ungranted start is attempt 1 and nothing else; every later number comes from a grant.
fn opens(job: &Job, r: &AttemptRef) -> Result<(), Rejection> {
    if r.attempt <= job.last_attempt { Err(stale(job, r)) } else { known(job, r) }
}

fn known(job: &Job, r: &AttemptRef) -> Result<(), Rejection> {
    if r.attempt > job.last_attempt.max(1) {
        return Err(Rejection::NeverGranted { newest: job.last_attempt, received: r.attempt });
    }
    Ok(())
}

const fn drop_message(job: &Job) -> Effect {
    Effect::DropMessage { run: job.run, publish: job.publish }
}
