//! The catalogue of events: what registered webhooks may hear of, and which event a transition is.
//!
//! Names and codes are fixed for good: names stand in bodies and filters, codes in SQL.

mod choose;
mod completion;
mod filter;

pub use choose::{Candidates, EndpointKind, of_batch, of_transition};
pub use completion::{Completion, LARGE_CONTENT_MAX_BYTES, request_id_of};
pub use filter::{Filter, FilterError, MAX_ENTRIES, MAX_TEXT_BYTES, Pattern, RUNFLOW_NAMES};

use std::fmt;

macro_rules! event_types {
    ($($(#[$doc:meta])* $variant:ident = $code:literal $name:literal,)*) => {
        /// What happened.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum EventType {
            $($(#[$doc])* $variant,)*
        }

        impl EventType {
            /// Every type, by code.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Number used in SQL and protobuf.
            #[must_use]
            pub const fn code(self) -> u32 {
                match self { $(Self::$variant => $code,)* }
            }

            /// Reads [`Self::code`] back.
            #[must_use]
            pub const fn from_code(code: u32) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)* _ => None }
            }

            /// The name in bodies and filters.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

event_types! {
    /// A job entered the queue for the first time.
    JobQueued = 0 "job.queued",
    /// An attempt of a job began.
    JobStarted = 1 "job.started",
    /// A run ended with an output.
    JobCompleted = 2 "job.completed",
    /// A run ended with an error.
    JobFailed = 3 "job.failed",
    /// A run was cancelled.
    JobCancelled = 4 "job.cancelled",
    /// A run met a time limit.
    JobTimedOut = 5 "job.timed_out",
    /// A job entered the queue again: an explicit retry, or an attempt that failed or was handed back.
    JobRetried = 6 "job.retried",
    /// A handler told how far it is.
    JobProgress = 7 "job.progress",
    /// A completion began.
    CompletionStarted = 20 "completion.started",
    /// A piece of a completion's text came.
    CompletionStreaming = 21 "completion.streaming",
    /// A completion ended with an output.
    CompletionFinished = 22 "completion.finished",
    /// A completion ended without one.
    CompletionFailed = 23 "completion.failed",
    /// The first job of a batch started.
    BatchProcessing = 100 "batch.processing",
    /// All jobs of a batch ended.
    BatchCompleted = 101 "batch.completed",
    /// A job failed and the rest of its batch was cancelled.
    BatchFailed = 102 "batch.failed",
    /// A batch was cancelled by request.
    BatchCancelled = 103 "batch.cancelled",
    /// A batch was accepted.
    BatchCreated = 110 "batch.created",
    /// A job's file can be fetched.
    ArtifactReady = 200 "artifact.ready",
    /// A receiver confirmed that it has a file.
    ArtifactConfirmed = 201 "artifact.confirmed",
    /// Nobody confirmed a file in time.
    ArtifactExpired = 202 "artifact.expired",
    /// A project nears a quota.
    UsageLimitWarning = 300 "usage.limit_warning",
    /// A project met a quota.
    UsageLimitExceeded = 301 "usage.limit_exceeded",
    /// An endpoint runs another model or another configuration.
    ModelUpdated = 400 "model.updated",
    /// An endpoint's model is to go.
    ModelDeprecated = 401 "model.deprecated",
    /// Nothing was heard of a worker for a whole lease.
    WorkerLost = 500 "worker.lost",
    /// A webhook was switched off after failures.
    WebhookDisabled = 501 "webhook.disabled",
    /// A delivery was given up.
    DeliveryDead = 502 "delivery.dead",
    /// Somebody wants to see whether a webhook works.
    WebhookTest = 503 "webhook.test",
}

impl EventType {
    /// Reads a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|t| t.name() == name)
    }

    /// The part of the name before the dot.
    #[must_use]
    pub fn family(self) -> &'static str {
        self.name().split_once('.').map_or(self.name(), |(family, _)| family)
    }

    /// Whether it tells the end of a run or batch, or stands for itself. What is not an end gives way to the end.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        !matches!(
            self,
            Self::JobQueued
                | Self::JobStarted
                | Self::JobRetried
                | Self::JobProgress
                | Self::CompletionStarted
                | Self::CompletionStreaming
                | Self::BatchCreated
                | Self::BatchProcessing
        )
    }

    /// Whether its delivery belongs to a job's transition, so that its owner is the job.
    #[must_use]
    pub const fn is_transition_of_job(self) -> bool {
        matches!(
            self,
            Self::JobQueued
                | Self::JobStarted
                | Self::JobCompleted
                | Self::JobFailed
                | Self::JobCancelled
                | Self::JobTimedOut
                | Self::JobRetried
                | Self::CompletionStarted
                | Self::CompletionFinished
                | Self::CompletionFailed
        )
    }

    /// Whether it tells of a stretch of work that goes on: sent to a target at most once per half second and job.
    #[must_use]
    pub const fn is_throttled(self) -> bool {
        matches!(self, Self::JobProgress | Self::CompletionStreaming)
    }
}

impl fmt::Display for EventType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The `id` of an event's body: the same for all targets.
#[must_use]
pub fn event_id(owner: uuid::Uuid, seq: u32) -> String {
    format!("evt_{}_{seq}", owner.simple())
}

/// The key of an event that is no transition: a UUIDv7 of that moment. An event about a job, batch or artefact
/// (`subject`) ends in the last seven bytes of the subject's id, so that it lies in the same partition and a
/// dispatcher sees that both belong together.
#[must_use]
pub fn event_key(unix_ms: u64, random: [u8; 10], subject: Option<&[u8; 16]>) -> uuid::Uuid {
    let mut bytes = uuid::Builder::from_unix_timestamp_millis(unix_ms, &random).into_uuid().into_bytes();
    if let Some(subject) = subject {
        bytes[SUBJECT_TAIL..].copy_from_slice(&subject[SUBJECT_TAIL..]);
    }
    uuid::Uuid::from_bytes(bytes)
}

/// The key of an event that must be told once: the same name of that moment gives the same key in every process.
#[must_use]
pub fn event_key_of(unix_ms: u64, name: &str) -> uuid::Uuid {
    use sha2::Digest as _;
    let hash: [u8; 32] = sha2::Sha256::digest(name.as_bytes()).into();
    let mut random = [0; 10];
    random.copy_from_slice(&hash[..10]);
    event_key(unix_ms, random, None)
}

/// Where the bytes begin that an event's key shares with the id of what it is about.
pub const SUBJECT_TAIL: usize = 9;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{batch::BatchStatus, ids::JobId, status::JobStatus};

    #[test]
    fn codes_and_names_read_back_and_are_unique() {
        for (n, t) in EventType::ALL.iter().enumerate() {
            assert_eq!(EventType::from_code(t.code()), Some(*t));
            assert_eq!(EventType::parse(t.name()), Some(*t));
            assert!(EventType::ALL[..n].iter().all(|o| o.code() < t.code() && o.name() != t.name()));
        }
        assert_eq!(EventType::from_code(8), None);
        assert_eq!(EventType::parse("job.*"), None);
        assert_eq!(EventType::JobTimedOut.family(), "job");
    }

    #[test]
    fn codes_of_transitions_are_those_of_their_status() {
        for status in JobStatus::ALL {
            let t = EventType::from_code(u32::from(status.code())).unwrap();
            assert_eq!(t.is_terminal(), status.is_terminal());
        }
        for status in BatchStatus::ALL {
            let t = EventType::from_code(100 + u32::from(status.code())).unwrap();
            assert_eq!(t.is_terminal(), status != BatchStatus::InProgress);
        }
    }

    #[test]
    fn the_key_of_an_event_shares_the_partition_of_its_subject() {
        let job = JobId::from_parts(1_000, [0xab; 10]);
        let key = event_key(2_000, [0xff; 10], Some(job.as_bytes()));
        assert_eq!(key.as_bytes()[SUBJECT_TAIL..], job.as_bytes()[SUBJECT_TAIL..]);
        assert_eq!(JobId::from_uuid(key).unix_ms(), 2_000);
        assert_eq!(key.get_version_num(), 7);
        assert_ne!(key, event_key(2_000, [0x7f; 10], Some(job.as_bytes())));
        assert_eq!(event_id(uuid::Uuid::nil(), 3), "evt_00000000000000000000000000000000_3");
    }
}
