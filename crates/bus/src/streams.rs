//! The work queue streams and their incarnation.

use crate::api::{STREAM_NAME_EXISTS, STREAM_NOT_FOUND};
use crate::connection::Bus;
use crate::error::BusError;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;

const INCARNATION: &str = "incarnation";
const DB_EPOCH: &str = "db_epoch";
/// Consumers of one stream; each costs the others time (about 300 is where a fetch passes one millisecond).
const MAX_CONSUMERS: u32 = 400;

/// A stream as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamState {
    /// Its shard.
    pub shard: u32,
    /// Random id of this creation. Another one means that the content of the former is gone (P6).
    pub incarnation: String,
    /// Epoch of the database that the stream was made for. Another one than the database's means that the database
    /// was restored: the stream's content belongs to another history.
    pub db_epoch: String,
    /// Messages in it.
    pub messages: u64,
    /// Sequence of the last message ever stored.
    pub last_sequence: u64,
    /// Consumers it has.
    pub consumers: u64,
    /// Whether this call has created it.
    pub created: bool,
}

#[derive(Deserialize)]
struct Info {
    config: InfoConfig,
    state: InfoState,
}

#[derive(Deserialize)]
struct InfoConfig {
    #[serde(default)]
    metadata: HashMap<String, String>,
    #[serde(default)]
    num_replicas: u32,
}

#[derive(Deserialize)]
struct InfoState {
    messages: u64,
    last_seq: u64,
    #[serde(default)]
    consumer_count: u64,
}

impl Bus {
    /// Makes the stream of a shard if it does not exist, with a new incarnation. An existing one is left as it is,
    /// except that its number of replicas follows the configuration.
    ///
    /// # Errors
    /// Transient while JetStream is away; permanent when the name is taken by something else.
    pub async fn ensure_stream(&self, shard: u32, db_epoch: &str) -> Result<StreamState, BusError> {
        if let Some(info) = self.stream_info(shard).await? {
            return self.follow_replicas(shard, info).await;
        }
        let stream = self.subjects.stream(shard);
        let incarnation = format!("{:032x}", rand::random::<u128>());
        let config = self.stream_config(shard, &incarnation, db_epoch);
        match self.api::<Info>(&format!("STREAM.CREATE.{stream}"), &config).await? {
            Ok(info) => {
                tracing::info!(stream, incarnation, "work queue stream created");
                Ok(state_of(shard, &info, true))
            }
            // Somebody else has created it in the meantime, with another incarnation.
            Err(error) if error.err_code == STREAM_NAME_EXISTS => match self.stream_info(shard).await? {
                Some(info) => Ok(state_of(shard, &info, false)),
                None => Err(BusError::Transient(format!("stream {stream} comes and goes"))),
            },
            Err(error) => Err(error.into_bus_error(&stream)),
        }
    }

    /// [`Bus::ensure_stream`] for the shards `0..shards`.
    ///
    /// # Errors
    /// The first error.
    pub async fn ensure_streams(&self, shards: u32, db_epoch: &str) -> Result<Vec<StreamState>, BusError> {
        let mut states = Vec::new();
        for shard in 0..shards {
            states.push(self.ensure_stream(shard, db_epoch).await?);
        }
        Ok(states)
    }

    /// The stream of a shard; none if it does not exist.
    ///
    /// # Errors
    /// Transient while JetStream is away.
    pub async fn stream_state(&self, shard: u32) -> Result<Option<StreamState>, BusError> {
        Ok(self.stream_info(shard).await?.map(|info| state_of(shard, &info, false)))
    }

    /// Deletes the stream of a shard with all its messages; false if there was none. Only for a stream of another
    /// database epoch, which is rebuilt from SQL, and for tests.
    ///
    /// # Errors
    /// Transient while JetStream is away.
    pub async fn delete_stream(&self, shard: u32) -> Result<bool, BusError> {
        let stream = self.subjects.stream(shard);
        match self.api::<Value>(&format!("STREAM.DELETE.{stream}"), &Value::Null).await? {
            Ok(_) => Ok(true),
            Err(error) if error.err_code == STREAM_NOT_FOUND => Ok(false),
            Err(error) => Err(error.into_bus_error(&stream)),
        }
    }

    /// Shards of this installation that have a stream, beyond the configured ones too (for orphans).
    ///
    /// # Errors
    /// Transient while JetStream is away.
    pub async fn list_streams(&self) -> Result<Vec<u32>, BusError> {
        #[derive(Deserialize)]
        struct Names {
            total: u64,
            streams: Option<Vec<String>>,
        }
        let filter = format!("rb.{}.jobs.>", self.subjects.install());
        let mut shards = Vec::new();
        let mut offset = 0;
        loop {
            let page = self
                .api::<Names>("STREAM.NAMES", &json!({"offset": offset, "subject": filter}))
                .await?
                .map_err(|error| error.into_bus_error("*"))?;
            let names = page.streams.unwrap_or_default();
            shards.extend(names.iter().filter_map(|name| self.subjects.parse_stream(name)));
            offset += names.len() as u64;
            if names.is_empty() || offset >= page.total {
                return Ok(shards);
            }
        }
    }

    async fn stream_info(&self, shard: u32) -> Result<Option<Info>, BusError> {
        let stream = self.subjects.stream(shard);
        match self.api::<Info>(&format!("STREAM.INFO.{stream}"), &Value::Null).await? {
            Ok(info) => Ok(Some(info)),
            Err(error) if error.err_code == STREAM_NOT_FOUND => Ok(None),
            Err(error) => Err(error.into_bus_error(&stream)),
        }
    }

    async fn follow_replicas(&self, shard: u32, info: Info) -> Result<StreamState, BusError> {
        let state = state_of(shard, &info, false);
        if info.config.num_replicas == self.replicas {
            return Ok(state);
        }
        let stream = self.subjects.stream(shard);
        let config = self.stream_config(shard, &state.incarnation, &state.db_epoch);
        match self.api::<Info>(&format!("STREAM.UPDATE.{stream}"), &config).await? {
            Ok(info) => Ok(state_of(shard, &info, false)),
            Err(error) => Err(error.into_bus_error(&stream)),
        }
    }

    fn stream_config(&self, shard: u32, incarnation: &str, db_epoch: &str) -> Value {
        json!({
            "name": self.subjects.stream(shard),
            "subjects": [self.subjects.shard_jobs(shard)],
            "retention": "workqueue",
            "discard": "new",
            "storage": "file",
            "max_consumers": MAX_CONSUMERS,
            "max_msgs": -1,
            "max_bytes": -1,
            "max_age": 0,
            "max_msgs_per_subject": -1,
            "max_msg_size": -1,
            "num_replicas": self.replicas,
            "allow_direct": true,
            "metadata": { INCARNATION: incarnation, DB_EPOCH: db_epoch },
        })
    }
}

fn state_of(shard: u32, info: &Info, created: bool) -> StreamState {
    let metadata = |key| info.config.metadata.get(key).cloned().unwrap_or_default();
    StreamState {
        shard,
        incarnation: metadata(INCARNATION),
        db_epoch: metadata(DB_EPOCH),
        messages: info.state.messages,
        last_sequence: info.state.last_seq,
        consumers: info.state.consumer_count,
        created,
    }
}
