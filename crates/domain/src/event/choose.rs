//! Which event a transition is.

use serde::{Deserialize, Serialize};

use super::EventType;
use crate::{batch::BatchStatus, status::JobStatus};

/// What an endpoint's jobs are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointKind {
    /// Any work.
    #[default]
    Job,
    /// Completions of a language model: their events tell tokens and text.
    Completion,
}

impl EndpointKind {
    /// The word in the configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Job => "job",
            Self::Completion => "completion",
        }
    }

    /// Reads [`Self::as_str`] back.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Job, Self::Completion].into_iter().find(|k| k.as_str() == word)
    }
}

/// The names of one fact, the more precise one first. A webhook hears of the fact once, under the first name that
/// its filter matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidates {
    first: EventType,
    second: Option<EventType>,
}

impl Candidates {
    /// A fact with one name.
    #[must_use]
    pub const fn one(name: EventType) -> Self {
        Self { first: name, second: None }
    }

    const fn two(first: EventType, second: EventType) -> Self {
        Self { first, second: Some(second) }
    }

    /// The names, the more precise one first.
    pub fn iter(self) -> impl Iterator<Item = EventType> {
        [Some(self.first), self.second].into_iter().flatten()
    }
}

impl From<EventType> for Candidates {
    fn from(name: EventType) -> Self {
        Self::one(name)
    }
}

/// What a job's transition into `status` is. `again` where the job was in the queue before: a retry by request, or
/// after an attempt that failed, was lost or was handed back.
#[must_use]
pub const fn of_transition(kind: EndpointKind, status: JobStatus, again: bool) -> Candidates {
    use EventType as E;
    let completion = matches!(kind, EndpointKind::Completion);
    match status {
        JobStatus::InQueue if again => Candidates::two(E::JobRetried, E::JobQueued),
        JobStatus::InQueue => Candidates::one(E::JobQueued),
        JobStatus::InProgress if completion => Candidates::two(E::CompletionStarted, E::JobStarted),
        JobStatus::InProgress => Candidates::one(E::JobStarted),
        JobStatus::Completed if completion => Candidates::two(E::CompletionFinished, E::JobCompleted),
        JobStatus::Completed => Candidates::one(E::JobCompleted),
        JobStatus::Failed if completion => Candidates::two(E::CompletionFailed, E::JobFailed),
        JobStatus::Failed => Candidates::one(E::JobFailed),
        JobStatus::Cancelled if completion => Candidates::two(E::CompletionFailed, E::JobCancelled),
        JobStatus::Cancelled => Candidates::one(E::JobCancelled),
        JobStatus::TimedOut if completion => Candidates::two(E::CompletionFailed, E::JobTimedOut),
        JobStatus::TimedOut => Candidates::one(E::JobTimedOut),
    }
}

/// What a batch's transition into `status` is. That it was accepted is another fact: [`EventType::BatchCreated`].
#[must_use]
pub const fn of_batch(status: BatchStatus) -> EventType {
    match status {
        BatchStatus::InProgress => EventType::BatchProcessing,
        BatchStatus::Completed => EventType::BatchCompleted,
        BatchStatus::Failed => EventType::BatchFailed,
        BatchStatus::Cancelled => EventType::BatchCancelled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_transition_ends_in_the_name_of_its_status() {
        for status in JobStatus::ALL {
            for kind in [EndpointKind::Job, EndpointKind::Completion] {
                for again in [false, true] {
                    let last = of_transition(kind, status, again).iter().last().unwrap();
                    assert_eq!(last.code(), u32::from(status.code()), "{kind:?} {status} {again}");
                }
            }
        }
        for status in BatchStatus::ALL {
            assert_eq!(of_batch(status).code(), 100 + u32::from(status.code()));
        }
    }
}
