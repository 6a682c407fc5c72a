//! Batches: counts and status of a set of jobs.

use crate::BatchId;
use crate::status::JobStatus;

/// Status of a batch on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BatchStatus {
    /// Some job has not ended.
    InProgress,
    /// All jobs have ended, even where some failed.
    Completed,
    /// A job failed and the batch was told to cancel the rest.
    Failed,
    /// Cancelled by request.
    Cancelled,
}

impl BatchStatus {
    /// Every status, in the order of [`Self::code`].
    pub const ALL: [Self; 4] = [Self::InProgress, Self::Completed, Self::Failed, Self::Cancelled];

    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InProgress => "IN_PROGRESS",
            Self::Completed => "COMPLETED",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
        }
    }

    /// Number used in SQL.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::InProgress => 0,
            Self::Completed => 1,
            Self::Failed => 2,
            Self::Cancelled => 3,
        }
    }

    /// Reads [`Self::code`] back.
    #[must_use]
    pub fn from_code(code: i64) -> Option<Self> {
        usize::try_from(code).ok().and_then(|i| Self::ALL.get(i).copied())
    }
}

/// Why the rest of a batch is being cancelled: the durable marker from which the work goes on after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CancelMarker {
    /// Nothing is being cancelled.
    None,
    /// A job failed under `on_failure: "cancel_rest"`.
    OnFailure,
    /// A client asked.
    ByRequest,
}

impl CancelMarker {
    /// Number used in SQL.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::OnFailure => 1,
            Self::ByRequest => 2,
        }
    }

    /// Reads [`Self::code`] back; unknown numbers are `None` the option, not the marker.
    #[must_use]
    pub const fn from_code(code: i64) -> Option<Self> {
        match code {
            0 => Some(Self::None),
            1 => Some(Self::OnFailure),
            2 => Some(Self::ByRequest),
            _ => None,
        }
    }
}

/// A file that a batch leaves: one JSON line per job, in the order of its items.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BatchFile {
    /// All jobs.
    Results,
    /// The jobs that completed.
    Output,
    /// The jobs that did not.
    Errors,
}

impl BatchFile {
    /// Every file.
    pub const ALL: [Self; 3] = [Self::Results, Self::Output, Self::Errors];

    /// Its name in links.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Results => "results.jsonl",
            Self::Output => "output.jsonl",
            Self::Errors => "errors.jsonl",
        }
    }

    /// Reads [`Self::name`] back.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|file| file.name() == name)
    }

    /// Whether it has a line for a job that ended so.
    #[must_use]
    pub const fn has(self, status: JobStatus) -> bool {
        let completed = matches!(status, JobStatus::Completed);
        match self {
            Self::Results => true,
            Self::Output => completed,
            Self::Errors => !completed,
        }
    }

    /// Where it is fetched without a key. `token` is the capability: who has the link may read the batch's files.
    #[must_use]
    pub fn link(self, public_url: &str, id: &BatchId, token: &str) -> String {
        format!("{}/batches/{id}/{token}/{}", public_url.trim_end_matches('/'), self.name())
    }
}

/// Counts of a batch. `failed` includes timed-out jobs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchCounts {
    /// Jobs in the batch.
    pub total: u32,
    /// Ended with an output.
    pub completed: u32,
    /// Ended with an error or by a time limit.
    pub failed: u32,
    /// Ended by request.
    pub cancelled: u32,
}

impl BatchCounts {
    /// Jobs that have ended.
    #[must_use]
    pub const fn ended(&self) -> u32 {
        self.completed + self.failed + self.cancelled
    }

    /// Counts one job that ended as `status`; a live status changes nothing.
    pub const fn count(&mut self, status: JobStatus) {
        match status {
            JobStatus::InQueue | JobStatus::InProgress => {}
            JobStatus::Completed => self.completed += 1,
            JobStatus::Failed | JobStatus::TimedOut => self.failed += 1,
            JobStatus::Cancelled => self.cancelled += 1,
        }
    }

    /// The status these counts give.
    #[must_use]
    pub const fn status(&self, marker: CancelMarker) -> BatchStatus {
        if self.ended() < self.total {
            return BatchStatus::InProgress;
        }
        match marker {
            CancelMarker::None => BatchStatus::Completed,
            CancelMarker::OnFailure => BatchStatus::Failed,
            CancelMarker::ByRequest => BatchStatus::Cancelled,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_ends_with_its_last_job_and_not_before() {
        let mut c = BatchCounts { total: 3, ..BatchCounts::default() };
        for (s, want) in [
            (JobStatus::Completed, BatchStatus::InProgress),
            (JobStatus::TimedOut, BatchStatus::InProgress),
            (JobStatus::InProgress, BatchStatus::InProgress),
            (JobStatus::Failed, BatchStatus::Completed),
        ] {
            c.count(s);
            assert_eq!(c.status(CancelMarker::None), want);
        }
        assert_eq!((c.completed, c.failed, c.cancelled), (1, 2, 0));
        assert_eq!(c.status(CancelMarker::OnFailure), BatchStatus::Failed);
        assert_eq!(c.status(CancelMarker::ByRequest), BatchStatus::Cancelled);
    }

    #[test]
    fn files_have_a_name_and_a_link_each() {
        let id = BatchId::from_parts(0, [0; 10]);
        for file in BatchFile::ALL {
            assert_eq!(BatchFile::of_name(file.name()), Some(file));
            let link = file.link("https://x.test/", &id, "tok");
            assert_eq!(link, format!("https://x.test/batches/{id}/tok/{}", file.name()));
        }
        assert_eq!(BatchFile::of_name("results"), None);
        let of = |status| BatchFile::ALL.map(|file| file.has(status));
        assert_eq!(of(JobStatus::Completed), [true, true, false]);
        assert_eq!(of(JobStatus::TimedOut), [true, false, true]);
    }

    #[test]
    fn codes_read_back() {
        for s in BatchStatus::ALL {
            assert_eq!(BatchStatus::from_code(i64::from(s.code())), Some(s));
        }
        for m in [CancelMarker::None, CancelMarker::OnFailure, CancelMarker::ByRequest] {
            assert_eq!(CancelMarker::from_code(i64::from(m.code())), Some(m));
        }
        assert_eq!(CancelMarker::from_code(9), None);
    }
}
