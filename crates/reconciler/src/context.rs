//! What the passes share: the database, the broker, and the way to the tracker.

use std::time::Duration;

use prost::Message as _;
use ringback_bus::{Bus, BusError, DeliveryAnnouncer, Verb};
use ringback_contracts::{VERSION, v1};
use ringback_service_runtime::{
    blobs::{BlobError, BlobKey, BlobStore},
    config::ReconcilerConfig,
    fault,
};
use ringback_store::{
    Store, StoreError, Urgency, batches_fold::BatchEnv, observer::Observer, retention::forget_trash,
};
use v1::{command::Command, command_reply::Reply};

/// How long the tracker may take for one command.
const COMMAND_WITHIN: Duration = Duration::from_secs(10);
/// Blobs of one listing.
const LIST_BLOBS: usize = 1_000;

/// Why a pass ended early. The next one does the rest.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// SQL.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// NATS.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The blob store.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The tracker did not carry out a command.
    #[error("the tracker refused: {0}")]
    Refused(String),
}

/// Shared by all passes.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) store: Store,
    pub(crate) bus: Bus,
    pub(crate) blobs: BlobStore,
    pub(crate) config: ReconcilerConfig,
    pub(crate) observer: Observer,
    pub(crate) announcer: DeliveryAnnouncer,
    pub(crate) batches: BatchEnv,
    pub(crate) lease_ms: u64,
    /// Log of delivery attempts, kept this long.
    pub(crate) delivery_attempts_ms: u64,
}

impl Context {
    /// Rows of one step.
    pub(crate) fn chunk(&self) -> u32 {
        self.config.chunk_rows
    }

    /// Sends a command that changes jobs; answers how many changed and whether more are left.
    pub(crate) async fn command(&self, command: Command) -> Result<v1::CountReply, PassError> {
        fault::point("reconciler.command.before");
        let message = v1::Command { version: VERSION, command: Some(command) };
        let answer = self.bus.request(Verb::Command, message.encode_to_vec().into(), COMMAND_WITHIN).await?;
        fault::point("reconciler.command.after");
        let reply = v1::CommandReply::decode(answer)
            .map_err(|error| PassError::Refused(format!("its answer cannot be read: {error}")))?;
        match reply.reply {
            Some(Reply::Count(count)) => Ok(count),
            Some(Reply::Refusal(refusal)) => Err(PassError::Refused(refusal.detail)),
            Some(Reply::Job(_)) | None => Err(PassError::Refused("an answer of another kind".to_owned())),
        }
    }

    /// Deletes blobs that no row names any more, and then their rows in the trash. What stays is found there later.
    /// Answers how many keys are done with.
    pub(crate) async fn delete_blobs(&self, keys: Vec<String>) -> Result<u64, PassError> {
        if keys.is_empty() {
            return Ok(0);
        }
        fault::point("reconciler.blobs.before");
        let mut gone = Vec::with_capacity(keys.len());
        for key in keys {
            match self.delete_blob(&key).await {
                Ok(()) => gone.push(key),
                Err(error) => {
                    metrics::counter!("ringback_reconciler_blobs_left_total").increment(1);
                    tracing::warn!(%error, "a blob of a removed job was not deleted");
                }
            }
        }
        fault::point("reconciler.blobs.after");
        let forgotten = self
            .store
            .write(Urgency::Lazy, move |tx| {
                let gone = gone.clone();
                Box::pin(async move { forget_trash(tx, &gone).await })
            })
            .await?;
        Ok(forgotten)
    }

    async fn delete_blob(&self, key: &str) -> Result<(), BlobError> {
        let Some(folder) = key.strip_suffix('/') else { return self.blobs.delete(&BlobKey::new(key)?).await };
        let folder = BlobKey::new(folder)?;
        loop {
            let found = self.blobs.list(&folder, LIST_BLOBS).await?;
            for blob in &found {
                self.blobs.delete(&blob.key).await?;
            }
            if found.len() < LIST_BLOBS {
                return Ok(());
            }
        }
    }

    /// Announces deliveries that a pass inserted.
    pub(crate) async fn announce(&self, deliveries: Vec<v1::Delivery>) {
        for delivery in deliveries {
            let partition =
                ringback_store::deliveries::partition_of(&delivery.owner_id, self.batches.partitions);
            self.announcer
                .announce(partition, |publisher, counter| {
                    let deliveries = vec![delivery];
                    v1::DeliveryEvents { publisher, counter, deliveries }.encode_to_vec().into()
                })
                .await;
        }
    }

    /// Makes the owner of a partition read it again from SQL: an unknown publisher whose first counter is not 1 has
    /// been missed.
    pub(crate) async fn poke(&self, partition: u16) {
        self.announcer
            .announce(partition, |_, _| {
                v1::DeliveryEvents { publisher: rand::random(), counter: 2, deliveries: Vec::new() }
                    .encode_to_vec()
                    .into()
            })
            .await;
    }
}
