//! A job and its state. States carry their data.

use crate::{
    ids::{AttemptRef, JobId, Nonce},
    status::JobStatus,
    target::EventScope,
    time::TimestampMs,
};

/// What the state machine needs to know of a job; the rest of the row (input, URLs, …) it never looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its id.
    pub id: JobId,
    /// Rises by one with each committed change of state; 1 at submit.
    pub seq: u32,
    /// 1 at submit, +1 at each explicit retry.
    pub run: u32,
    /// Number of the newest message of this run on the work queue, from 0. Older messages are void.
    pub publish: u32,
    /// Highest attempt number of this run that was ever opened; 0 before the first.
    pub last_attempt: u32,
    /// Counted failures of this run.
    pub failures: u32,
    /// When this run was last put into the queue; `delayTime` counts from here.
    pub queued_at: TimestampMs,
    /// Life of a run in ms from its submit or retry; `None` = unlimited.
    pub ttl_ms: Option<u64>,
    /// When the run expires.
    pub ttl_at: Option<TimestampMs>,
    /// Longest execution of one attempt, in ms.
    pub execution_timeout_ms: u64,
    /// Which transitions each target hears of, by target index.
    pub scopes: Vec<EventScope>,
    /// Deliveries owed so far: transitions × targets. One side of P5.
    pub owed: u32,
    /// Where it stands.
    pub state: JobState,
}

/// State of a job, with the data of that state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobState {
    /// Waiting for a worker.
    InQueue,
    /// An attempt is live.
    InProgress(Live),
    /// The run ended with an output.
    Completed(Ended),
    /// The run ended with an error.
    Failed(Ended),
    /// The run ended by request.
    Cancelled(Ended),
    /// The run ended by a limit.
    TimedOut(Ended),
}

/// The live attempt of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Live {
    /// Its number within the run.
    pub attempt: u32,
    /// Tells it from another holder of the same number.
    pub nonce: Nonce,
    /// Who runs it.
    pub worker: String,
    /// When it started, on the database's clock (the worker's word, clamped).
    pub started_at: TimestampMs,
    /// `delayTime`: ms from (re)queueing to start.
    pub delay_ms: u64,
    /// Until when the worker need not be heard of again.
    pub lease_until: TimestampMs,
}

impl Live {
    /// Whether `r` names this attempt of run `run`.
    #[must_use]
    pub fn is(&self, run: u32, r: &AttemptRef) -> bool {
        run == r.run && self.attempt == r.attempt && self.nonce == r.nonce
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The attempt whose outcome is recorded; `None` where none ever started.
    pub attempt: Option<u32>,
    /// When.
    pub at: TimestampMs,
    /// `delayTime` of the recorded attempt, 0 where none started.
    pub delay_ms: u64,
    /// `executionTime` of the recorded attempt, 0 where none started.
    pub execution_ms: u64,
    /// Why.
    pub reason: EndReason,
}

/// Why a run ended or an attempt was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EndReason {
    /// An attempt succeeded.
    Succeeded,
    /// The handler raised an error.
    HandlerError,
    /// The process that ran the handler ended.
    Crashed,
    /// The worker was not heard of for a lease.
    WorkerLost,
    /// The attempt ran longer than its limit.
    ExecutionTimeout,
    /// The run's time to live passed.
    TtlExpired,
    /// A client cancelled the job.
    CancelRequested,
    /// The queue was purged.
    QueuePurged,
    /// Another job of its batch failed, or the batch was cancelled.
    BatchCancelled,
    /// The worker gave it back (drain, sick device).
    HandedBack,
    /// A newer attempt took its place.
    Superseded,
}

impl EndReason {
    /// Every reason, in the order of [`Self::code`].
    pub const ALL: [Self; 11] = [
        Self::Succeeded,
        Self::HandlerError,
        Self::Crashed,
        Self::WorkerLost,
        Self::ExecutionTimeout,
        Self::TtlExpired,
        Self::CancelRequested,
        Self::QueuePurged,
        Self::BatchCancelled,
        Self::HandedBack,
        Self::Superseded,
    ];

    /// Number used in SQL.
    #[must_use]
    pub fn code(self) -> u8 {
        // Position in ALL; the test below keeps both in step.
        Self::ALL.iter().position(|r| *r == self).map_or(0, |i| u8::try_from(i).unwrap_or(0))
    }

    /// Reads [`Self::code`] back.
    #[must_use]
    pub fn from_code(code: i64) -> Option<Self> {
        usize::try_from(code).ok().and_then(|i| Self::ALL.get(i).copied())
    }

    /// Word for people and machines.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::HandlerError => "handler_error",
            Self::Crashed => "worker_crashed",
            Self::WorkerLost => "worker_lost",
            Self::ExecutionTimeout => "execution_timeout",
            Self::TtlExpired => "ttl_expired",
            Self::CancelRequested => "cancel_requested",
            Self::QueuePurged => "queue_purged",
            Self::BatchCancelled => "batch_cancelled",
            Self::HandedBack => "handed_back",
            Self::Superseded => "superseded",
        }
    }
}

impl JobState {
    /// The state without its data.
    #[must_use]
    pub const fn status(&self) -> JobStatus {
        match self {
            Self::InQueue => JobStatus::InQueue,
            Self::InProgress(_) => JobStatus::InProgress,
            Self::Completed(_) => JobStatus::Completed,
            Self::Failed(_) => JobStatus::Failed,
            Self::Cancelled(_) => JobStatus::Cancelled,
            Self::TimedOut(_) => JobStatus::TimedOut,
        }
    }

    /// How the run ended, where it has.
    #[must_use]
    pub const fn ended(&self) -> Option<&Ended> {
        match self {
            Self::InQueue | Self::InProgress(_) => None,
            Self::Completed(e) | Self::Failed(e) | Self::Cancelled(e) | Self::TimedOut(e) => Some(e),
        }
    }

    /// The live attempt, where there is one.
    #[must_use]
    pub const fn live(&self) -> Option<&Live> {
        match self {
            Self::InProgress(live) => Some(live),
            Self::InQueue | Self::Completed(_) | Self::Failed(_) | Self::Cancelled(_) | Self::TimedOut(_) => {
                None
            }
        }
    }
}

impl Job {
    /// The state without its data.
    #[must_use]
    pub const fn status(&self) -> JobStatus {
        self.state.status()
    }

    /// When the live attempt overruns its limit.
    #[must_use]
    pub fn execution_deadline(&self) -> Option<TimestampMs> {
        self.state.live().map(|live| live.started_at.plus_ms(self.execution_timeout_ms))
    }

    /// When somebody should look at a live job if nobody spoke of it before: the earliest of its time to live,
    /// its lease, and its execution limit plus `grace_ms` (the worker enforces the limit first). `None` for an
    /// ended job and for a queued one that never expires.
    #[must_use]
    pub fn next_check_at(&self, grace_ms: u64) -> Option<TimestampMs> {
        match &self.state {
            JobState::InQueue => self.ttl_at,
            JobState::InProgress(live) => {
                let overrun = live.started_at.plus_ms(self.execution_timeout_ms.saturating_add(grace_ms));
                let soonest = overrun.min(live.lease_until);
                Some(self.ttl_at.map_or(soonest, |ttl| ttl.min(soonest)))
            }
            JobState::Completed(_) | JobState::Failed(_) | JobState::Cancelled(_) | JobState::TimedOut(_) => {
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reason_codes_read_back() {
        for (i, r) in EndReason::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(r.code()), i);
            assert_eq!(EndReason::from_code(i64::from(r.code())), Some(r));
        }
        assert_eq!(EndReason::from_code(11), None);
    }
}
