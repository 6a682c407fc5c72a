//! Executors: the ways a job runs. Each takes [`Work`] and tells what becomes of it through [`ExecEvent`]s.

pub(crate) mod encoder;
pub(crate) mod process;
pub(crate) mod sleep;
pub(crate) mod tasks;

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use ringback_domain::{AttemptRef, JobId};
use ringback_worker_protocol::ChunkPermit;
use serde_json::value::RawValue;

/// One attempt of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct JobKey {
    /// The job.
    pub job: JobId,
    /// The fence of the attempt.
    pub attempt: AttemptRef,
}

/// An attempt to execute.
#[derive(Clone, Debug)]
pub struct Work {
    /// Which.
    pub key: JobKey,
    /// Id of the job as its owner knows it; the handler sees it as `job["id"]`.
    pub public_id: String,
    /// The client's `input`, verbatim JSON.
    pub input: Bytes,
    /// Further members for the handler, a JSON object or empty.
    pub extra_json: Bytes,
    /// Longest execution.
    pub timeout: Duration,
}

impl Work {
    /// The job object for a handler.
    pub(crate) fn job_json(&self) -> Bytes {
        // The object was made by us; should it be damaged, the handler still gets its input.
        let extras: BTreeMap<String, &RawValue> =
            serde_json::from_slice(&self.extra_json).unwrap_or_default();
        let extras = extras.iter().map(|(key, raw)| (key.as_str(), raw.get().as_bytes()));
        ringback_worker_protocol::job_json(&self.public_id, &self.input, extras)
    }
}

/// How an attempt ended on this worker.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    /// With an output; `None` = the handler returned nothing.
    Success(Option<Bytes>),
    /// The handler failed it.
    Failure {
        /// Text for the client.
        error: String,
        /// Class of the error, where told.
        error_type: String,
        /// Output beside the error.
        output: Option<Bytes>,
    },
    /// Its process ended.
    Crash {
        /// Exit reason and last lines, for the client.
        error: String,
    },
    /// It ran over its limit.
    Overrun,
    /// It did not end here and may run elsewhere.
    HandBack {
        /// Why.
        reason: &'static str,
    },
    /// It was stopped by an order: the tracker knows its end already.
    Stopped,
}

impl End {
    /// The input cannot be used; the text names its field.
    pub(crate) fn bad_input(error: impl Into<String>) -> Self {
        Self::Failure { error: error.into(), error_type: "BadInput".to_owned(), output: None }
    }
}

/// What an executor tells.
#[derive(Debug)]
pub enum ExecEvent {
    /// The handler holds the job.
    Started {
        /// Which attempt.
        key: JobKey,
    },
    /// Latest progress, verbatim JSON.
    Progress {
        /// Which attempt.
        key: JobKey,
        /// The value.
        output: Bytes,
    },
    /// A piece of output; the executor slows down while permits are held.
    Chunk {
        /// Which attempt.
        key: JobKey,
        /// Verbatim JSON.
        output: Bytes,
        /// Dropped when the chunk is passed on.
        permit: ChunkPermit,
    },
    /// The attempt is over. Sent once per attempt.
    Finished {
        /// Which attempt.
        key: JobKey,
        /// How.
        end: End,
        /// Milliseconds from start to end; 0 when it never started.
        execution_ms: u64,
        /// Captured log lines.
        logs: Bytes,
    },
    /// Nothing of the attempt is left running. Sent once, with or after `Finished`.
    Released {
        /// Which attempt.
        key: JobKey,
    },
    /// The number of open slots may have changed.
    Capacity,
}
