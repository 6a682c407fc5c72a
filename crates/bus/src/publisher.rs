//! Publishing jobs: create-once per subject, many in flight, each with its own outcome.

use crate::api::{ApiError, WRONG_LAST_SEQUENCE};
use crate::connection::Bus;
use crate::error::BusError;
use crate::subjects::JobSubject;
use async_nats::HeaderMap;
use bytes::Bytes;
use futures::StreamExt;
use ringback_service_runtime::trace_context::TRACEPARENT;
use serde::Deserialize;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Only stored if no message has this subject (ADR-4; error 10071 otherwise).
const EXPECTED_LAST_SUBJECT_SEQUENCE: &str = "Nats-Expected-Last-Subject-Sequence";

/// A job message to store.
#[derive(Debug, Clone)]
pub struct Publication {
    /// Its identity.
    pub subject: JobSubject,
    /// Encoded `JobMessage`.
    pub payload: Bytes,
    /// Trace context of the job.
    pub traceparent: Option<String>,
}

/// What became of a publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PublishOutcome {
    /// Stored now.
    Stored {
        /// Its sequence in the stream.
        sequence: u64,
    },
    /// A message with this subject is stored already: an earlier try succeeded.
    AlreadyThere,
    /// Not known to be stored.
    Failed(PublishFailure),
}

impl PublishOutcome {
    /// Whether the message is in the stream.
    #[must_use]
    pub const fn is_stored(&self) -> bool {
        matches!(self, Self::Stored { .. } | Self::AlreadyThere)
    }
}

/// Why a publish failed. Whatever may have been stored must be marked `must_ask` on the next try.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishFailure {
    /// No connection: certainly nothing was sent.
    #[error("not connected to NATS")]
    NotSent,
    /// Sent, but no answer came: it may be stored, and may even have been worked off already.
    #[error("no answer in time")]
    Unknown,
    /// The stream does not exist (or JetStream is just starting): certainly not stored.
    #[error("stream {0} does not exist")]
    StreamMissing(String),
    /// The server refused it for now (full, no leader).
    #[error("refused: {0}")]
    Refused(String),
    /// It can never be stored as it is, for example because it is too large.
    #[error("cannot be published: {0}")]
    Impossible(String),
}

impl PublishFailure {
    /// Whether the message may be in the stream all the same, or may have been worked off already.
    #[must_use]
    pub const fn may_be_stored(&self) -> bool {
        match self {
            Self::NotSent | Self::StreamMissing(_) => false,
            Self::Unknown | Self::Refused(_) | Self::Impossible(_) => true,
        }
    }
}

/// Publishes jobs with a bound on what awaits its answer (cheap to clone; clones share the bound).
#[derive(Debug, Clone)]
pub struct JobPublisher {
    bus: Bus,
    permits: Arc<Semaphore>,
}

#[derive(Deserialize)]
struct PubAck {
    #[serde(default)]
    seq: u64,
    error: Option<ApiError>,
}

impl Bus {
    /// A publisher with `nats.max_publishes_in_flight` as its bound. Make one per process.
    #[must_use]
    pub fn job_publisher(&self) -> JobPublisher {
        JobPublisher { bus: self.clone(), permits: Arc::new(Semaphore::new(self.publishes_in_flight)) }
    }
}

impl JobPublisher {
    /// Stores one message and waits for the answer.
    pub async fn publish(&self, publication: Publication) -> PublishOutcome {
        let Ok(_permit) = self.permits.acquire().await else {
            // Never closed by us; without a permit nothing was sent.
            return PublishOutcome::Failed(PublishFailure::NotSent);
        };
        if !self.bus.is_connected() {
            return PublishOutcome::Failed(PublishFailure::NotSent);
        }
        let mut headers = HeaderMap::new();
        headers.insert(EXPECTED_LAST_SUBJECT_SEQUENCE, "0");
        if let Some(traceparent) = &publication.traceparent {
            headers.insert(TRACEPARENT, traceparent.as_str());
        }
        let subject = self.bus.subjects.job(&publication.subject);
        let answer =
            self.bus.ask(subject, publication.payload, Some(headers), self.bus.request_timeout).await;
        let stream = || self.bus.subjects.stream(publication.subject.shard);
        match answer {
            Ok(message) => match serde_json::from_slice::<PubAck>(&message.payload) {
                Ok(PubAck { error: None, seq }) => PublishOutcome::Stored { sequence: seq },
                Ok(PubAck { error: Some(error), .. }) => refused(error),
                Err(_) => PublishOutcome::Failed(PublishFailure::Unknown),
            },
            Err(BusError::NoResponders { .. }) => {
                PublishOutcome::Failed(PublishFailure::StreamMissing(stream()))
            }
            Err(BusError::Disconnected) => PublishOutcome::Failed(PublishFailure::NotSent),
            Err(BusError::Permanent(text)) => PublishOutcome::Failed(PublishFailure::Impossible(text)),
            Err(BusError::Timeout { .. } | BusError::Transient(_) | BusError::StreamMissing { .. }) => {
                PublishOutcome::Failed(PublishFailure::Unknown)
            }
        }
    }

    /// Stores many messages, pipelined, and gives their outcomes in the same order.
    pub async fn publish_all(&self, publications: Vec<Publication>) -> Vec<PublishOutcome> {
        let in_flight = self.bus.publishes_in_flight;
        futures::stream::iter(publications.into_iter().map(|publication| self.publish(publication)))
            .buffered(in_flight)
            .collect()
            .await
    }
}

fn refused(error: ApiError) -> PublishOutcome {
    if error.err_code == WRONG_LAST_SEQUENCE {
        PublishOutcome::AlreadyThere
    } else {
        PublishOutcome::Failed(PublishFailure::Refused(format!(
            "{} (error {})",
            error.description, error.err_code
        )))
    }
}
