//! Announcements after a commit: core NATS, at most once. A sweep of SQL finds whatever they miss.

use crate::connection::{Bus, trace_headers, traceparent_of};
use crate::error::BusError;
use async_nats::Subscriber;
use bytes::Bytes;
use futures::StreamExt;
use ringback_domain::EndpointId;
use std::time::Duration;
use tokio::sync::Mutex;

/// An announcement may wait this long for room in the client's buffer; then it is dropped. A commit must not hang
/// on what is only an accelerator.
const PATIENCE: Duration = Duration::from_millis(250);

/// What was announced.
#[derive(Debug, Clone)]
pub struct Announcement {
    /// The subject.
    pub subject: String,
    /// The encoded message.
    pub payload: Bytes,
    /// Trace context of the publisher.
    pub traceparent: Option<String>,
}

/// A subscription to announcements. It survives reconnects, but what was sent meanwhile is lost: watch
/// [`Bus::connectivity`] and read SQL anew when its epoch changes.
#[derive(Debug)]
pub struct Announcements {
    subscriber: Subscriber,
}

impl Announcements {
    /// The next announcement; none after the connection was closed for good.
    pub async fn next(&mut self) -> Option<Announcement> {
        let message = self.subscriber.next().await?;
        Some(Announcement {
            subject: message.subject.to_string(),
            traceparent: traceparent_of(message.headers.as_ref()),
            payload: message.payload,
        })
    }
}

impl Bus {
    /// Announces transitions (`TransitionEvents`). False when it was not sent.
    pub async fn announce_transitions(&self, payload: Bytes) -> bool {
        self.announce(self.subjects.transitions(), payload, None).await
    }

    /// Announces new chunks of an endpoint's jobs (`ChunkEvents`). False when it was not sent.
    pub async fn announce_chunks(&self, endpoint: EndpointId, payload: Bytes) -> bool {
        self.announce(self.subjects.chunks(endpoint), payload, None).await
    }

    /// Tells a worker to stop attempts (`StopOrders`); the reply to its next heartbeat repeats it.
    pub async fn announce_stop(&self, worker_id: &str, payload: Bytes) -> bool {
        self.announce(self.subjects.stop(worker_id), payload, None).await
    }

    /// Announcements of transitions.
    ///
    /// # Errors
    /// Transient when the subscription cannot be made.
    pub async fn subscribe_transitions(&self) -> Result<Announcements, BusError> {
        self.subscribe(self.subjects.transitions()).await
    }

    /// Announcements of a partition's deliveries (`DeliveryEvents`).
    ///
    /// # Errors
    /// Transient when the subscription cannot be made.
    pub async fn subscribe_deliveries(&self, partition: u16) -> Result<Announcements, BusError> {
        self.subscribe(self.subjects.deliveries(partition)).await
    }

    /// Announcements of all partitions' deliveries (`DeliveryEvents`).
    ///
    /// # Errors
    /// Transient when the subscription cannot be made.
    pub async fn subscribe_all_deliveries(&self) -> Result<Announcements, BusError> {
        self.subscribe(self.subjects.all_deliveries()).await
    }

    /// Says that a replay was made or cancelled: a dispatcher looks for it at once. False when it was not sent.
    pub async fn announce_replays(&self) -> bool {
        self.announce(self.subjects.replays(), Bytes::new(), None).await
    }

    /// Announcements that replays were made or cancelled; their payload is empty.
    ///
    /// # Errors
    /// Transient when the subscription cannot be made.
    pub async fn subscribe_replays(&self) -> Result<Announcements, BusError> {
        self.subscribe(self.subjects.replays()).await
    }

    /// Announcements of an endpoint's chunks; of all endpoints with none.
    ///
    /// # Errors
    /// Transient when the subscription cannot be made.
    pub async fn subscribe_chunks(&self, endpoint: Option<EndpointId>) -> Result<Announcements, BusError> {
        let subject =
            endpoint.map_or_else(|| self.subjects.all_chunks(), |endpoint| self.subjects.chunks(endpoint));
        self.subscribe(subject).await
    }

    /// Stop orders for a worker.
    ///
    /// # Errors
    /// Transient when the subscription cannot be made.
    pub async fn subscribe_stop(&self, worker_id: &str) -> Result<Announcements, BusError> {
        self.subscribe(self.subjects.stop(worker_id)).await
    }

    async fn subscribe(&self, subject: String) -> Result<Announcements, BusError> {
        let subscriber =
            self.client.subscribe(subject).await.map_err(|error| BusError::Transient(error.to_string()))?;
        Ok(Announcements { subscriber })
    }

    pub(crate) async fn announce(&self, subject: String, payload: Bytes, traceparent: Option<&str>) -> bool {
        if !self.is_connected() {
            return false;
        }
        let sent = tokio::time::timeout(PATIENCE, async {
            match trace_headers(traceparent) {
                Some(headers) => self.client.publish_with_headers(subject, headers, payload).await,
                None => self.client.publish(subject, payload).await,
            }
        });
        match sent.await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::debug!(%error, "announcement not sent");
                false
            }
            Err(_) => false,
        }
    }
}

/// Announces deliveries with this process's publisher id and a counter per partition, so that receivers notice what
/// they missed ([`crate::GapTracker`]). Make one per process.
#[derive(Debug)]
pub struct DeliveryAnnouncer {
    bus: Bus,
    publisher: u64,
    counters: Vec<Mutex<u64>>,
}

impl DeliveryAnnouncer {
    /// An announcer for the partitions `0..partitions`, with a random publisher id.
    #[must_use]
    pub fn new(bus: Bus, partitions: u16) -> Self {
        let counters = (0..partitions.max(1)).map(|_| Mutex::new(0)).collect();
        Self { bus, publisher: rand::random(), counters }
    }

    /// The random id of this publisher.
    #[must_use]
    pub fn publisher(&self) -> u64 {
        self.publisher
    }

    /// Announces one message on a partition. `encode` gets publisher id and counter and returns the encoded
    /// `DeliveryEvents`. What is not sent still counts, so that receivers notice. False when it was not sent.
    pub async fn announce(&self, partition: u16, encode: impl FnOnce(u64, u64) -> Bytes) -> bool {
        let Some(counter) = self.counters.get(usize::from(partition)) else {
            tracing::error!(partition, "no such partition");
            return false;
        };
        // Held while sending: messages leave in the order of their counters.
        let mut counter = counter.lock().await;
        *counter += 1;
        let payload = encode(self.publisher, *counter);
        self.bus.announce(self.bus.subjects.deliveries(partition), payload, None).await
    }
}
