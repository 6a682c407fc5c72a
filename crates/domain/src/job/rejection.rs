//! Why an event changed nothing.

use thiserror::Error;

use super::event::EventKind;
use crate::status::JobStatus;

/// A fact about the job that makes an event void. The tracker answers the sender and keeps late outcomes in the
/// history; it never retries one.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Rejection {
    /// The run has ended. Workers are told to stop; a late outcome goes to the history.
    #[error("the run has ended as {status}")]
    AlreadyTerminal {
        /// Its end.
        status: JobStatus,
    },
    /// The event speaks of a run that is not the current one.
    #[error("run {received} is not the current run {current}")]
    StaleRun {
        /// The job's.
        current: u32,
        /// The event's.
        received: u32,
    },
    /// The event speaks of an attempt that is not the live one.
    #[error("attempt {received} is not the live one (newest is {newest})")]
    StaleAttempt {
        /// Newest attempt of the run.
        newest: u32,
        /// The event's.
        received: u32,
    },
    /// An attempt above 1 that nobody granted.
    #[error("attempt {received} was never granted (newest is {newest})")]
    NeverGranted {
        /// Newest attempt of the run.
        newest: u32,
        /// The event's.
        received: u32,
    },
    /// The lease or limit named by the event has not passed.
    #[error("the limit has not passed yet: {left_ms} ms are left")]
    NotYet {
        /// Time left.
        left_ms: u64,
    },
    /// A newer message of the job is or will be on the queue.
    #[error("message {received} is not the newest one, {current}")]
    StaleMessage {
        /// The job's.
        current: u32,
        /// The event's.
        received: u32,
    },
    /// The event does not fit the state at all.
    #[error("{event:?} is not possible while {status}", event = .event.as_str())]
    NotAllowed {
        /// The state.
        status: JobStatus,
        /// The event.
        event: EventKind,
    },
}
