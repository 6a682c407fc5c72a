//! Events of a job whose run has ended.

use super::{Applied, Effect, Job, JobEvent, JobState, Rejection, TimestampMs, already, enter, not_allowed};
use crate::status::JobStatus;

pub(super) fn apply(job: &Job, event: &JobEvent, now: TimestampMs) -> Result<Applied, Rejection> {
    let status = job.status();
    match event {
        JobEvent::Retry { native } => match status {
            JobStatus::Failed | JobStatus::TimedOut => Ok(retry(job, now)),
            JobStatus::Cancelled if *native => Ok(retry(job, now)),
            JobStatus::Cancelled | JobStatus::Completed | JobStatus::InQueue | JobStatus::InProgress => {
                Err(not_allowed(job, event))
            }
        },
        JobEvent::Started { .. }
        | JobEvent::Granted { .. }
        | JobEvent::Heartbeat { .. }
        | JobEvent::Progressed { .. }
        | JobEvent::Chunk { .. }
        | JobEvent::Succeeded { .. }
        | JobEvent::Failed { .. }
        | JobEvent::Crashed { .. }
        | JobEvent::Overran { .. }
        | JobEvent::LeaseExpired { .. }
        | JobEvent::HandedBack { .. }
        | JobEvent::TtlExpired
        | JobEvent::Cancel { .. }
        | JobEvent::MessageLost { .. } => Err(already(status)),
    }
}

/// The next run begins from nothing: its attempts, failures and messages are counted anew.
fn retry(job: &Job, now: TimestampMs) -> Applied {
    let mut next = job.clone();
    next.run += 1;
    next.publish = 0;
    next.last_attempt = 0;
    next.failures = 0;
    next.queued_at = now;
    next.ttl_at = job.ttl_ms.map(|ttl| now.plus_ms(ttl));
    let mut effects = vec![Effect::Publish { run: next.run, publish: 0, must_ask: false }];
    enter(&mut next, JobState::InQueue, &mut effects);
    Applied::Changed { next, effects }
}
