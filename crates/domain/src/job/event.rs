//! What can be said about a job.

use crate::{ids::AttemptRef, time::TimestampMs};

/// Why a job is cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CancelReason {
    /// A client asked for it.
    Requested,
    /// Its queue is purged: only jobs still in the queue are touched.
    Purged,
    /// Its batch is being ended.
    Batch,
}

/// One thing said about a job. What comes from a worker carries the attempt it speaks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobEvent {
    /// An ungranted attempt (number 1) runs on a worker.
    Started {
        /// Which.
        attempt: AttemptRef,
        /// Who runs it.
        worker: String,
        /// The worker's word; clamped between queueing and now.
        started_at: TimestampMs,
        /// Lease that comes with it.
        lease_until: TimestampMs,
    },
    /// The tracker lets a further attempt run.
    Granted {
        /// Which.
        attempt: AttemptRef,
        /// Who will run it.
        worker: String,
        /// Lease that comes with it.
        lease_until: TimestampMs,
    },
    /// The worker lives and holds the attempt.
    Heartbeat {
        /// Which.
        attempt: AttemptRef,
        /// Renewed lease.
        lease_until: TimestampMs,
    },
    /// The handler told how far it is.
    Progressed {
        /// Which.
        attempt: AttemptRef,
    },
    /// The handler yielded a piece of output.
    Chunk {
        /// Which.
        attempt: AttemptRef,
    },
    /// The handler returned.
    Succeeded {
        /// Which.
        attempt: AttemptRef,
        /// The worker's word; used where the start was not known.
        started_at: TimestampMs,
        /// How long it ran.
        execution_ms: u64,
    },
    /// The handler raised an error.
    Failed {
        /// Which.
        attempt: AttemptRef,
        /// How long it ran.
        execution_ms: u64,
    },
    /// The process that ran the handler ended.
    Crashed {
        /// Which.
        attempt: AttemptRef,
        /// How long it ran.
        execution_ms: u64,
    },
    /// The attempt ran over its limit; told by the worker, or found by the reconciler.
    Overran {
        /// Which.
        attempt: AttemptRef,
        /// How long it ran.
        execution_ms: u64,
    },
    /// The lease of the attempt ended without a word. Void while the lease still runs.
    LeaseExpired {
        /// Which.
        attempt: AttemptRef,
    },
    /// The worker gives the attempt back.
    HandedBack {
        /// Which.
        attempt: AttemptRef,
    },
    /// Its time to live passed. Void before that moment.
    TtlExpired,
    /// Somebody wants it ended.
    Cancel {
        /// Why.
        reason: CancelReason,
    },
    /// A client wants another run.
    Retry {
        /// Asked on a native route, which may also retry a cancelled job.
        native: bool,
    },
    /// The message of a queued job is gone from the work queue; a new one shall be sent.
    MessageLost {
        /// The publish number that was looked for.
        publish: u32,
    },
}

/// [`JobEvent`] without its data, for tables and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names are those of JobEvent")]
pub enum EventKind {
    Started,
    Granted,
    Heartbeat,
    Progressed,
    Chunk,
    Succeeded,
    Failed,
    Crashed,
    Overran,
    LeaseExpired,
    HandedBack,
    TtlExpired,
    Cancel,
    Retry,
    MessageLost,
}

impl EventKind {
    /// Every kind.
    pub const ALL: [Self; 15] = [
        Self::Started,
        Self::Granted,
        Self::Heartbeat,
        Self::Progressed,
        Self::Chunk,
        Self::Succeeded,
        Self::Failed,
        Self::Crashed,
        Self::Overran,
        Self::LeaseExpired,
        Self::HandedBack,
        Self::TtlExpired,
        Self::Cancel,
        Self::Retry,
        Self::MessageLost,
    ];

    /// Word for tables and metric labels.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Granted => "granted",
            Self::Heartbeat => "heartbeat",
            Self::Progressed => "progressed",
            Self::Chunk => "chunk",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Crashed => "crashed",
            Self::Overran => "overran",
            Self::LeaseExpired => "lease_expired",
            Self::HandedBack => "handed_back",
            Self::TtlExpired => "ttl_expired",
            Self::Cancel => "cancel",
            Self::Retry => "retry",
            Self::MessageLost => "message_lost",
        }
    }
}

impl JobEvent {
    /// The kind.
    #[must_use]
    pub const fn kind(&self) -> EventKind {
        match self {
            Self::Started { .. } => EventKind::Started,
            Self::Granted { .. } => EventKind::Granted,
            Self::Heartbeat { .. } => EventKind::Heartbeat,
            Self::Progressed { .. } => EventKind::Progressed,
            Self::Chunk { .. } => EventKind::Chunk,
            Self::Succeeded { .. } => EventKind::Succeeded,
            Self::Failed { .. } => EventKind::Failed,
            Self::Crashed { .. } => EventKind::Crashed,
            Self::Overran { .. } => EventKind::Overran,
            Self::LeaseExpired { .. } => EventKind::LeaseExpired,
            Self::HandedBack { .. } => EventKind::HandedBack,
            Self::TtlExpired => EventKind::TtlExpired,
            Self::Cancel { .. } => EventKind::Cancel,
            Self::Retry { .. } => EventKind::Retry,
            Self::MessageLost { .. } => EventKind::MessageLost,
        }
    }

    /// The attempt it speaks for, where it comes from or concerns one.
    #[must_use]
    pub const fn attempt(&self) -> Option<&AttemptRef> {
        match self {
            Self::Started { attempt, .. }
            | Self::Granted { attempt, .. }
            | Self::Heartbeat { attempt, .. }
            | Self::Progressed { attempt }
            | Self::Chunk { attempt }
            | Self::Succeeded { attempt, .. }
            | Self::Failed { attempt, .. }
            | Self::Crashed { attempt, .. }
            | Self::Overran { attempt, .. }
            | Self::LeaseExpired { attempt }
            | Self::HandedBack { attempt } => Some(attempt),
            Self::TtlExpired | Self::Cancel { .. } | Self::Retry { .. } | Self::MessageLost { .. } => None,
        }
    }
}
