//! Exit codes: part of the interface, documented in `docs/CLI.md`.

use ringback_domain::JobStatus;

/// How the program ends. Scripts branch on the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Done; a job that was waited for is COMPLETED.
    Ok = 0,
    /// Something else went wrong: the server's own fault, a file that cannot be read.
    Error = 1,
    /// Refused: bad arguments, bad input, a limit.
    Usage = 2,
    /// No such job, batch or endpoint.
    NotFound = 3,
    /// The key is missing, wrong or lacks a scope.
    Denied = 4,
    /// The state does not allow it.
    Conflict = 5,
    /// No answer, or the server cannot serve now.
    Unreachable = 6,
    /// `--timeout` ran out while waiting; the job goes on.
    WaitTimedOut = 7,
    /// The job is FAILED; some job of the batch failed.
    JobFailed = 10,
    /// The job or batch is CANCELLED.
    JobCancelled = 11,
    /// The job is TIMED_OUT.
    JobTimedOut = 12,
    /// Ctrl-C while waiting; the job goes on.
    Interrupted = 130,
}

impl Exit {
    /// The number.
    pub(crate) const fn code(self) -> u8 {
        self as u8
    }

    /// What a waited-for job's end means for the exit code.
    pub(crate) const fn of_job(status: JobStatus) -> Self {
        match status {
            JobStatus::InQueue | JobStatus::InProgress | JobStatus::Completed => Self::Ok,
            JobStatus::Failed => Self::JobFailed,
            JobStatus::Cancelled => Self::JobCancelled,
            JobStatus::TimedOut => Self::JobTimedOut,
        }
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}
