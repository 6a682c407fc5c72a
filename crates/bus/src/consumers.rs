//! One durable consumer per endpoint and lane.

use crate::api::{CONSUMER_NOT_FOUND, STREAM_NOT_FOUND};
use crate::connection::Bus;
use crate::error::BusError;
use crate::subjects::{Lane, Subjects};
use ringback_domain::EndpointId;
use serde::Deserialize;
use serde_json::{Value, json};
use std::time::Duration;

/// Running jobs of an endpoint's lane, all workers together; beyond it the server delivers nothing more.
const MAX_ACK_PENDING: u32 = 100_000;
/// Pull requests that may wait at one consumer.
const MAX_WAITING: u32 = 2_048;

/// What can be chosen for a consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConsumerSettings {
    /// Time after which an unacknowledged message is delivered again.
    pub ack_wait: Duration,
}

/// How much an endpoint's lane holds. Read in constant time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConsumerDepth {
    /// Messages not yet delivered.
    pub pending: u64,
    /// Messages delivered and not yet acknowledged.
    pub ack_pending: u64,
    /// Pull requests that wait for a message.
    pub waiting: u64,
}

impl ConsumerDepth {
    /// Everything that is not done: the demand for workers.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.pending + self.ack_pending
    }
}

#[derive(Deserialize)]
struct Info {
    num_pending: u64,
    num_ack_pending: u64,
    #[serde(default)]
    num_waiting: u64,
}

impl Bus {
    /// Makes the consumer of an endpoint's lane, or brings an existing one to these settings.
    ///
    /// # Errors
    /// [`BusError::StreamMissing`] when the shard's stream does not exist.
    pub async fn ensure_consumer(
        &self,
        shard: u32,
        endpoint: EndpointId,
        lane: Lane,
        settings: ConsumerSettings,
    ) -> Result<(), BusError> {
        let stream = self.subjects.stream(shard);
        let name = Subjects::consumer(endpoint, lane);
        let filter = self.subjects.lane_jobs(shard, endpoint, lane);
        let body = json!({
            "stream_name": stream,
            "config": {
                "durable_name": name,
                "name": name,
                "filter_subject": filter,
                "ack_policy": "explicit",
                "deliver_policy": "all",
                "replay_policy": "instant",
                // Attempts are counted in SQL; a message that ran out of deliveries would be invisible.
                "max_deliver": -1,
                "ack_wait": u64::try_from(settings.ack_wait.as_nanos()).unwrap_or(u64::MAX),
                "max_ack_pending": MAX_ACK_PENDING,
                "max_waiting": MAX_WAITING,
            },
        });
        match self.api::<Value>(&format!("CONSUMER.CREATE.{stream}.{name}.{filter}"), &body).await? {
            Ok(_) => Ok(()),
            Err(error) => Err(error.into_bus_error(&stream)),
        }
    }

    /// What an endpoint's lane holds; none if it has no consumer yet.
    ///
    /// # Errors
    /// Transient while JetStream is away; [`BusError::StreamMissing`].
    pub async fn consumer_depth(
        &self,
        shard: u32,
        endpoint: EndpointId,
        lane: Lane,
    ) -> Result<Option<ConsumerDepth>, BusError> {
        let stream = self.subjects.stream(shard);
        let name = Subjects::consumer(endpoint, lane);
        match self.api::<Info>(&format!("CONSUMER.INFO.{stream}.{name}"), &Value::Null).await? {
            Ok(info) => Ok(Some(ConsumerDepth {
                pending: info.num_pending,
                ack_pending: info.num_ack_pending,
                waiting: info.num_waiting,
            })),
            Err(error) if error.err_code == CONSUMER_NOT_FOUND => Ok(None),
            Err(error) => Err(error.into_bus_error(&stream)),
        }
    }

    /// Removes the consumer of an endpoint's lane; false if there was none. Its messages stay in the stream.
    ///
    /// # Errors
    /// Transient while JetStream is away.
    pub async fn delete_consumer(
        &self,
        shard: u32,
        endpoint: EndpointId,
        lane: Lane,
    ) -> Result<bool, BusError> {
        let stream = self.subjects.stream(shard);
        let name = Subjects::consumer(endpoint, lane);
        match self.api::<Value>(&format!("CONSUMER.DELETE.{stream}.{name}"), &Value::Null).await? {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.err_code, CONSUMER_NOT_FOUND | STREAM_NOT_FOUND) => Ok(false),
            Err(error) => Err(error.into_bus_error(&stream)),
        }
    }

    /// Endpoints and lanes that have a consumer on a shard.
    ///
    /// # Errors
    /// Transient while JetStream is away; [`BusError::StreamMissing`].
    pub async fn list_consumers(&self, shard: u32) -> Result<Vec<(EndpointId, Lane)>, BusError> {
        #[derive(Deserialize)]
        struct Names {
            total: u64,
            consumers: Option<Vec<String>>,
        }
        let stream = self.subjects.stream(shard);
        let mut found = Vec::new();
        let mut offset = 0;
        loop {
            let page = self
                .api::<Names>(&format!("CONSUMER.NAMES.{stream}"), &json!({"offset": offset}))
                .await?
                .map_err(|error| error.into_bus_error(&stream))?;
            let names = page.consumers.unwrap_or_default();
            found.extend(names.iter().filter_map(|name| Subjects::parse_consumer(name)));
            offset += names.len() as u64;
            if names.is_empty() || offset >= page.total {
                return Ok(found);
            }
        }
    }
}
