//! The six job states, spelt as RunPod spells them.

use std::fmt;

/// State of a job as clients see it. The wire words are RunPod's (`IN_QUEUE`, …).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum JobStatus {
    /// Accepted and waiting for a worker.
    InQueue,
    /// An attempt is live on a worker.
    InProgress,
    /// Ended with an output.
    Completed,
    /// Ended with an error.
    Failed,
    /// Ended by request.
    Cancelled,
    /// Ended by a time limit.
    TimedOut,
}

impl JobStatus {
    /// Every state, in the order of [`Self::code`].
    pub const ALL: [Self; 6] =
        [Self::InQueue, Self::InProgress, Self::Completed, Self::Failed, Self::Cancelled, Self::TimedOut];

    /// States that never change again within their run.
    pub const TERMINAL: [Self; 4] = [Self::Completed, Self::Failed, Self::Cancelled, Self::TimedOut];

    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InQueue => "IN_QUEUE",
            Self::InProgress => "IN_PROGRESS",
            Self::Completed => "COMPLETED",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
            Self::TimedOut => "TIMED_OUT",
        }
    }

    /// Whether the run has ended.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        match self {
            Self::InQueue | Self::InProgress => false,
            Self::Completed | Self::Failed | Self::Cancelled | Self::TimedOut => true,
        }
    }

    /// Number used in SQL and protobuf. Live states are below 2: partial indexes rely on it.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::InQueue => 0,
            Self::InProgress => 1,
            Self::Completed => 2,
            Self::Failed => 3,
            Self::Cancelled => 4,
            Self::TimedOut => 5,
        }
    }

    /// Reads [`Self::code`] back.
    #[must_use]
    pub fn from_code(code: i64) -> Option<Self> {
        usize::try_from(code).ok().and_then(|i| Self::ALL.get(i).copied())
    }

    /// Reads the wire word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.as_str() == word)
    }
}

impl fmt::Display for JobStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_words_read_back() {
        for s in JobStatus::ALL {
            assert_eq!(JobStatus::from_code(i64::from(s.code())), Some(s));
            assert_eq!(JobStatus::parse(s.as_str()), Some(s));
            assert_eq!(s.is_terminal(), JobStatus::TERMINAL.contains(&s));
        }
        assert_eq!(JobStatus::from_code(6), None);
        assert_eq!(JobStatus::from_code(-1), None);
        assert_eq!(JobStatus::parse("RUNNING"), None);
    }
}
