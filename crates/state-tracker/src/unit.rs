//! What the tracker is told, one thing at a time, and what it answers.

use std::{collections::HashSet, sync::Arc};

use bytes::Bytes;
use ringback_contracts::v1;
use ringback_domain::{AttemptRef, JobId, JobStatus, Nonce, ProjectId, TimestampMs, job::CancelReason};
use ringback_store::results::StoredPayload;

/// One thing said or asked about one job.
#[derive(Clone, Debug)]
pub(crate) struct Unit {
    pub(crate) job: JobId,
    pub(crate) what: What,
}

#[derive(Clone, Debug)]
pub(crate) enum What {
    /// A worker tells how an attempt ended.
    Outcome(Outcome),
    /// A worker lives and holds the attempt.
    Beat(Beat),
    /// These workers are gone for certain; so are the attempts they held, except the listed ones.
    WorkersGone { workers: Arc<[String]>, kept: Arc<HashSet<(JobId, AttemptRef)>> },
    /// The holder of a message asks whether it may run it. The nonce is drawn before the transaction, so that the
    /// answer is the same however often the transaction is tried.
    Ask { worker: Arc<str>, run: u32, publish: u32, nonce: Nonce },
    /// A piece of output.
    Chunk(Chunk),
    /// Somebody wants it ended; `project` where the asker must own it.
    Cancel { project: Option<ProjectId>, reason: CancelReason },
    /// A client wants another run after this one; 0 where it did not say.
    Retry { project: ProjectId, native: bool, expected_run: u32 },
    /// Its time came: limits and lease are judged.
    Due,
    /// Something that registered webhooks may hear now waits.
    TellProgress,
    /// Its message is gone from the work queue.
    MessageLost { run: u32, publish: u32 },
}

impl What {
    /// Label for metrics and quarantine.
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Self::Outcome(_) => "outcome",
            Self::Beat(_) => "beat",
            Self::WorkersGone { .. } => "workers_gone",
            Self::Ask { .. } => "grant",
            Self::Chunk(_) => "chunk",
            Self::Cancel { .. } => "cancel",
            Self::Retry { .. } => "retry",
            Self::Due => "due",
            Self::TellProgress => "tell_progress",
            Self::MessageLost { .. } => "message_lost",
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) worker: Arc<str>,
    pub(crate) attempt: AttemptRef,
    pub(crate) told: Told,
    /// The worker's clock.
    pub(crate) started_at: TimestampMs,
    pub(crate) execution_ms: u64,
    pub(crate) logs: StoredPayload,
}

#[derive(Clone, Debug)]
pub(crate) enum Told {
    Succeeded { output: StoredPayload },
    Failed { error: String, error_type: Option<String>, output: StoredPayload },
    Crashed { error: String },
    Overran,
    HandedBack { reason: String },
}

#[derive(Clone, Debug)]
pub(crate) struct Beat {
    pub(crate) worker: Arc<str>,
    pub(crate) attempt: AttemptRef,
    pub(crate) started_at: TimestampMs,
    pub(crate) progress: Option<Bytes>,
}

#[derive(Clone, Debug)]
pub(crate) struct Chunk {
    pub(crate) worker: Arc<str>,
    pub(crate) attempt: AttemptRef,
    pub(crate) n: u32,
    pub(crate) output: Bytes,
    pub(crate) started_at: TimestampMs,
}

/// The answer to one [`Unit`], valid once its transaction is committed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Answer {
    Verdict(v1::Verdict),
    /// To a beat: the reason to stop, if there is one.
    Stop(Option<&'static str>),
    Grant(v1::grant_reply::Answer),
    Job(JobAnswer),
    NotFound,
    Conflict {
        status: JobStatus,
        detail: String,
    },
    /// It could not be applied and is kept for people.
    Quarantined,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct JobAnswer {
    pub(crate) job: JobId,
    pub(crate) status: JobStatus,
    pub(crate) seq: u32,
    pub(crate) run: u32,
    pub(crate) changed: bool,
}
