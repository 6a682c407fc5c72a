//! What follows from a transition, as values.

use super::state::EndReason;
use crate::status::JobStatus;

/// Something the tracker does because of a transition: rows in the same transaction, messages after the commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// A delivery is owed (P4). In the transaction.
    Deliver {
        /// Index of the target in the job's list.
        target: u16,
        /// The transition's number.
        seq: u32,
        /// The state told of.
        status: JobStatus,
    },
    /// The run has ended: its result row is written. In the transaction.
    RecordResult {
        /// The run.
        run: u32,
        /// Its end.
        status: JobStatus,
    },
    /// An attempt was closed without ending the run well: kept in history. In the transaction.
    CloseAttempt(AttemptEnd),
    /// The first end of a job of a batch counts. In the transaction.
    CountInBatch {
        /// How it ended.
        status: JobStatus,
    },
    /// A message is put on the work queue. After the commit; the row is its outbox.
    Publish {
        /// The run.
        run: u32,
        /// Number of the message.
        publish: u32,
        /// Whether its holder must ask for a grant before running it.
        must_ask: bool,
    },
    /// The job's message on the work queue is void and may be deleted. After the commit.
    DropMessage {
        /// The run.
        run: u32,
        /// Number of the message.
        publish: u32,
    },
    /// The worker is told to stop. After the commit; the answer to its heartbeat repeats it.
    Stop {
        /// Who runs it.
        worker: String,
        /// The run.
        run: u32,
        /// The attempt.
        attempt: u32,
        /// Why.
        reason: EndReason,
    },
}

/// A closed attempt, for the history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttemptEnd {
    /// The run.
    pub run: u32,
    /// The attempt.
    pub attempt: u32,
    /// Who ran it.
    pub worker: String,
    /// How it ended.
    pub reason: EndReason,
}
