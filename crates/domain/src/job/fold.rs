//! From what a worker says to the events that [`super::apply`] takes.

use super::{
    event::JobEvent,
    state::{Job, JobState},
};
use crate::{ids::AttemptRef, time::TimestampMs};

/// Splits an outcome whose start was never told into start and outcome, so that even a job of one millisecond
/// passes through IN_PROGRESS with its delivery. Every other event comes back alone.
///
/// A hand-back of an attempt that was never opened needs no start: the job never left the queue.
#[must_use]
pub fn expand(
    job: &Job,
    event: JobEvent,
    worker: &str,
    started_at: TimestampMs,
    lease_until: TimestampMs,
) -> Vec<JobEvent> {
    let start = match &event {
        JobEvent::Succeeded { attempt, .. }
        | JobEvent::Failed { attempt, .. }
        | JobEvent::Crashed { attempt, .. }
        | JobEvent::Overran { attempt, .. }
        | JobEvent::Progressed { attempt }
        | JobEvent::Chunk { attempt } => opens_first_attempt(job, attempt).then(|| JobEvent::Started {
            attempt: *attempt,
            worker: worker.to_owned(),
            started_at,
            lease_until,
        }),
        JobEvent::Started { .. }
        | JobEvent::Granted { .. }
        | JobEvent::Heartbeat { .. }
        | JobEvent::LeaseExpired { .. }
        | JobEvent::HandedBack { .. }
        | JobEvent::TtlExpired
        | JobEvent::Cancel { .. }
        | JobEvent::Retry { .. }
        | JobEvent::MessageLost { .. } => None,
    };
    match start {
        Some(start) => vec![start, event],
        None => vec![event],
    }
}

fn opens_first_attempt(job: &Job, r: &AttemptRef) -> bool {
    matches!(job.state, JobState::InQueue) && r.run == job.run && r.attempt == 1 && job.last_attempt == 0
}

/// Answer to a worker that holds a redelivered or republished message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Run it as this attempt, once the grant is committed.
    Run {
        /// The number to commit.
        attempt: u32,
    },
    /// Another attempt is live; ask again later.
    Wait {
        /// When to ask again.
        after_ms: u64,
    },
    /// The lease of the live attempt is over: commit [`JobEvent::LeaseExpired`] first, then decide again.
    ExpireFirst {
        /// The attempt that was live.
        attempt: AttemptRef,
    },
    /// The message is void: acknowledge it and forget it.
    Drop,
}

/// Longest time between two questions about the same message.
const MAX_WAIT_MS: u64 = 5_000;

/// Decides what the holder of message (`run`, `publish`) shall do.
///
/// Granted numbers start at 2: attempt 1 may be running unreported on a worker that got the first delivery.
#[must_use]
pub fn decide_grant(job: &Job, run: u32, publish: u32, now: TimestampMs) -> Grant {
    if run != job.run || publish != job.publish {
        return Grant::Drop;
    }
    match &job.state {
        JobState::InQueue => Grant::Run { attempt: job.last_attempt.max(1) + 1 },
        JobState::InProgress(live) if live.lease_until > now => {
            Grant::Wait { after_ms: live.lease_until.since_ms(now).clamp(1, MAX_WAIT_MS) }
        }
        JobState::InProgress(live) => Grant::ExpireFirst {
            attempt: AttemptRef { run: job.run, attempt: live.attempt, nonce: live.nonce },
        },
        JobState::Completed(_) | JobState::Failed(_) | JobState::Cancelled(_) | JobState::TimedOut(_) => {
            Grant::Drop
        }
    }
}
