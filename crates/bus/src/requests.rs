//! Request and reply between services. The answer comes after the commit; no answer means: ask again.

use crate::connection::{Bus, trace_headers, traceparent_of};
use crate::error::BusError;
use crate::subjects::Verb;
use async_nats::{Client, Subject, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use ringback_service_runtime::trace_context;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

const TRACKER_GROUP: &str = "tracker";

impl Bus {
    /// Asks the tracker and waits at most `timeout` for its answer. The current span's trace context goes along.
    ///
    /// # Errors
    /// [`BusError::NoResponders`] at once when no tracker runs; [`BusError::Timeout`]; [`BusError::Disconnected`];
    /// [`BusError::Permanent`] when the payload is larger than the server allows.
    pub async fn request(&self, verb: Verb, payload: Bytes, timeout: Duration) -> Result<Bytes, BusError> {
        let headers = trace_headers(trace_context::current_traceparent().as_deref());
        self.ask(self.subjects.tracker(verb), payload, headers, timeout).await.map(|answer| answer.payload)
    }

    /// Receives the requests of one verb, shared with the other replicas. At most `concurrency` requests are out at
    /// once: each counts until it is answered or dropped; further ones wait in memory, unanswered ones are repeated
    /// by their senders.
    ///
    /// # Errors
    /// Transient when the subscription cannot be made.
    pub async fn serve(&self, verb: Verb, concurrency: usize) -> Result<Requests, BusError> {
        let subscriber = self
            .client
            .queue_subscribe(self.subjects.tracker(verb), TRACKER_GROUP.to_owned())
            .await
            .map_err(|error| BusError::Transient(error.to_string()))?;
        Ok(Requests {
            subscriber,
            client: self.client.clone(),
            permits: Arc::new(Semaphore::new(concurrency.max(1))),
        })
    }
}

/// Requests of one verb as they come.
#[derive(Debug)]
pub struct Requests {
    subscriber: Subscriber,
    client: Client,
    permits: Arc<Semaphore>,
}

impl Requests {
    /// The next request, once fewer than `concurrency` are out; none after the connection was closed for good.
    pub async fn next(&mut self) -> Option<Request> {
        let permit = Arc::clone(&self.permits).acquire_owned().await.ok()?;
        loop {
            let message = self.subscriber.next().await?;
            // Without a reply subject nobody waits for an answer: not one of our senders.
            if let Some(reply) = message.reply {
                return Some(Request {
                    payload: message.payload,
                    traceparent: traceparent_of(message.headers.as_ref()),
                    reply,
                    client: self.client.clone(),
                    _permit: permit,
                });
            }
        }
    }

    /// Stops receiving; requests sent from now on go to the other replicas. What has arrived is still given by
    /// [`Requests::next`], which ends after it.
    ///
    /// # Errors
    /// Transient.
    pub async fn drain(&mut self) -> Result<(), BusError> {
        self.subscriber.drain().await.map_err(|error| BusError::Transient(error.to_string()))
    }
}

/// One request.
#[derive(Debug)]
pub struct Request {
    /// The encoded message.
    pub payload: Bytes,
    /// Trace context of the sender.
    pub traceparent: Option<String>,
    reply: Subject,
    client: Client,
    _permit: OwnedSemaphorePermit,
}

impl Request {
    /// Answers. Call it after the commit only.
    ///
    /// # Errors
    /// Transient when the answer cannot be sent; the sender will ask again.
    pub async fn respond(self, payload: Bytes) -> Result<(), BusError> {
        self.client.publish(self.reply, payload).await.map_err(|error| BusError::Transient(error.to_string()))
    }
}
