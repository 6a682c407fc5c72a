//! What an endpoint decides about the runs of its jobs.

/// How a run of a job is retried. Kept with the job, so that a changed configuration does not rewrite the
/// rules of work already accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Counted failures (lost or crashed workers, and handler errors where they are retried) that end a run.
    /// At least 1.
    pub max_attempts: u32,
    /// Whether an error raised by a handler is tried again. RunPod's users expect it to be final.
    pub retry_errors: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self { max_attempts: 3, retry_errors: false }
    }
}
