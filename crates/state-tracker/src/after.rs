//! What follows a commit. Everything here is an accelerator: it may be lost, and a sweep of SQL finds the same.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt as _;
use prost::Message as _;
use ringback_bus::{
    Bus, DeliveryAnnouncer, JobPublisher, JobSubject, Lane, Publication, PublishFailure, PublishOutcome,
    Subjects,
};
use ringback_contracts::{job_id_of, v1};
use ringback_domain::{BatchId, EndpointId, JobId, JobStatus};
use ringback_service_runtime::fault;
use ringback_store::{
    Store, StoreError,
    deliveries::partition_of,
    due::endpoint_name,
    inputs::{StoredInput, job_message, open_secret_extra, select_inputs},
    secrets::SecretKey,
};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use crate::fold::{After, Publish};

/// Most bytes of one announcement, well below the server's `max_payload`. A larger one is split; a single delivery
/// that is larger is not sent, and its gap makes the dispatcher read it from SQL.
const ANNOUNCE_MAX_BYTES: usize = 512 * 1024;
/// Transitions in one announcement.
const TRANSITIONS_MAX: usize = 2_000;
/// Tries of a publish before it is left to the reconciler.
const PUBLISH_TRIES: u32 = 3;
const PUBLISH_PAUSE: Duration = Duration::from_millis(200);
/// Messages deleted at once.
const DROPS_IN_FLIGHT: usize = 32;

/// Carries out what follows a commit.
pub(crate) struct Announcer {
    bus: Bus,
    store: Store,
    key: SecretKey,
    publisher: JobPublisher,
    deliveries: DeliveryAnnouncer,
    names: Mutex<HashMap<EndpointId, Arc<str>>>,
    shards: u32,
    partitions: u16,
    /// Batches whose rest is to be cancelled.
    cancel_rest: mpsc::UnboundedSender<BatchId>,
    tasks: TaskTracker,
}

impl Announcer {
    /// An announcer, and the batches that it is told to cancel.
    pub(crate) fn new(
        bus: Bus,
        store: Store,
        key: SecretKey,
        tasks: TaskTracker,
    ) -> (Self, mpsc::UnboundedReceiver<BatchId>) {
        let (cancel_rest, batches) = mpsc::unbounded_channel();
        let (shards, partitions) = (u32::from(store.facts().shards), store.facts().partitions);
        let announcer = Self {
            publisher: bus.job_publisher(),
            deliveries: DeliveryAnnouncer::new(bus.clone(), partitions),
            bus,
            store,
            key,
            names: Mutex::default(),
            shards,
            partitions,
            cancel_rest,
            tasks,
        };
        (announcer, batches)
    }

    /// Announces one commit; what needs answers goes on in the background.
    pub(crate) async fn announce(self: &Arc<Self>, after: After) {
        fault::point("tracker.announce.before");
        for event in &after.transitions {
            note(event);
        }
        for part in after.transitions.chunks(TRANSITIONS_MAX) {
            let message = v1::TransitionEvents { events: part.to_vec() };
            self.bus.announce_transitions(message.encode_to_vec().into()).await;
        }
        self.announce_deliveries(after.deliveries).await;
        for (worker, stop) in after.stops {
            self.bus
                .announce_stop(&worker, v1::StopOrders { stop, artifacts: Vec::new() }.encode_to_vec().into())
                .await;
        }
        for (endpoint, jobs) in after.chunks {
            let job_ids = jobs.iter().map(|id| Bytes::copy_from_slice(id.as_bytes())).collect();
            self.bus.announce_chunks(endpoint, v1::ChunkEvents { job_ids }.encode_to_vec().into()).await;
        }
        for batch in after.cancel_rest {
            // The receiver lives as long as the service; the marker in SQL outlives both.
            let _ = self.cancel_rest.send(batch);
        }
        fault::point("tracker.announce.after");
        if !after.publish.is_empty() {
            let this = Arc::clone(self);
            self.tasks.spawn(async move { this.publish(after.publish).await });
        }
        if !after.drops.is_empty() {
            let this = Arc::clone(self);
            self.tasks.spawn(async move { this.drop_messages(after.drops).await });
        }
    }

    /// Announces deliveries: one message per partition, or a few where they are large.
    pub(crate) async fn announce_deliveries(&self, deliveries: Vec<v1::Delivery>) {
        let mut parts: BTreeMap<u16, Vec<v1::Delivery>> = BTreeMap::new();
        for delivery in deliveries {
            parts.entry(partition_of(&delivery.owner_id, self.partitions)).or_default().push(delivery);
        }
        for (partition, deliveries) in parts {
            let mut message: Vec<v1::Delivery> = Vec::new();
            let mut size = 0;
            for delivery in deliveries {
                let bytes = delivery.encoded_len();
                if size > 0 && size + bytes > ANNOUNCE_MAX_BYTES {
                    self.send_deliveries(partition, std::mem::take(&mut message)).await;
                    size = 0;
                }
                size += bytes;
                message.push(delivery);
            }
            self.send_deliveries(partition, message).await;
        }
    }

    async fn send_deliveries(&self, partition: u16, deliveries: Vec<v1::Delivery>) {
        self.deliveries
            .announce(partition, |publisher, counter| {
                v1::DeliveryEvents { publisher, counter, deliveries }.encode_to_vec().into()
            })
            .await;
    }

    /// Publishes job messages. What fails for good is found by the reconciler: the row is the outbox.
    async fn publish(&self, mut owed: Vec<Publish>) {
        let mut pause = false;
        for attempt in 0..PUBLISH_TRIES {
            if pause {
                tokio::time::sleep(PUBLISH_PAUSE * (1 << attempt)).await;
            }
            pause = true;
            let publications = match self.publications(&owed).await {
                Ok(publications) => publications,
                Err(error) => {
                    tracing::warn!(%error, "messages cannot be made now");
                    continue;
                }
            };
            let outcomes = self.publisher.publish_all(publications).await;
            let failed = outcomes.iter().map(|o| !o.is_stored()).collect::<Vec<_>>();
            pause = !self.made_missing_streams(&owed, &outcomes).await;
            if let Some(PublishOutcome::Failed(error)) = outcomes.into_iter().find(|o| !o.is_stored()) {
                tracing::debug!(%error, "a job message was not stored");
            }
            let mut failed = failed.into_iter();
            owed.retain(|_| failed.next().unwrap_or(false));
            if owed.is_empty() {
                return;
            }
            // What failed may be stored all the same, and even be worked off: its next holder asks.
            owed.iter_mut().for_each(|p| p.must_ask = true);
        }
        metrics::counter!("ringback_tracker_publish_given_up_total").increment(owed.len() as u64);
        tracing::warn!(jobs = owed.len(), "job messages were not stored; the reconciler will publish them");
    }

    /// Makes the streams that were missing; answers whether there is nothing else to wait for.
    async fn made_missing_streams(&self, owed: &[Publish], outcomes: &[PublishOutcome]) -> bool {
        let missing: BTreeSet<u32> = owed
            .iter()
            .zip(outcomes)
            .filter(|(_, o)| matches!(o, PublishOutcome::Failed(PublishFailure::StreamMissing(_))))
            .map(|(p, _)| Subjects::shard_of(p.row.endpoint, self.shards))
            .collect();
        for shard in &missing {
            if let Err(error) = self.bus.ensure_stream(*shard, &self.store.facts().db_epoch).await {
                tracing::debug!(shard, %error, "the work queue's stream cannot be made now");
                return false;
            }
        }
        !missing.is_empty()
    }

    async fn publications(&self, owed: &[Publish]) -> Result<Vec<Publication>, StoreError> {
        let mut ids: Vec<JobId> = owed.iter().map(|p| p.row.job.id).collect();
        ids.sort_unstable();
        ids.dedup();
        let inputs = select_inputs(self.store.read(), &ids).await?;
        let mut publications = Vec::with_capacity(owed.len());
        for p in owed {
            let input =
                inputs.get(&p.row.job.id).ok_or_else(|| StoreError::corrupt("a job without its input"))?;
            publications.push(self.publication(p, input).await?);
        }
        Ok(publications)
    }

    async fn publication(&self, p: &Publish, stored: &StoredInput) -> Result<Publication, StoreError> {
        let row = &p.row;
        let name = self.name_of(row.endpoint).await?;
        let secret = open_secret_extra(&self.key, row.job.id, stored)?;
        let secret = secret.as_ref().map(|s| s.expose().as_slice());
        let epoch = &self.store.facts().db_epoch;
        let message =
            job_message(row, &name, &stored.input, stored.extra.as_ref(), secret, p.must_ask, epoch);
        Ok(Publication {
            subject: JobSubject {
                shard: Subjects::shard_of(row.endpoint, self.shards),
                endpoint: row.endpoint,
                lane: Lane::of(row.low_priority),
                job: row.job.id,
                run: row.job.run,
                publish: row.job.publish,
            },
            payload: message.encode_to_vec().into(),
            traceparent: row.traceparent.clone(),
        })
    }

    async fn name_of(&self, endpoint: EndpointId) -> Result<Arc<str>, StoreError> {
        let known = self.names.lock().unwrap_or_else(PoisonError::into_inner).get(&endpoint).cloned();
        if let Some(name) = known {
            return Ok(name);
        }
        let name: Arc<str> = endpoint_name(self.store.read(), endpoint)
            .await?
            .ok_or_else(|| StoreError::corrupt("a job of an unknown endpoint"))?
            .into();
        self.names.lock().unwrap_or_else(PoisonError::into_inner).insert(endpoint, Arc::clone(&name));
        Ok(name)
    }

    /// Deletes void messages, each by itself. One that stays is dropped by its next holder, who asks.
    async fn drop_messages(&self, drops: Vec<JobSubject>) {
        futures::stream::iter(drops)
            .for_each_concurrent(DROPS_IN_FLIGHT, |subject| async move {
                if let Err(error) = self.bus.delete_job(&subject).await {
                    tracing::debug!(%error, job_id = %subject.job, "a void message was not deleted");
                }
            })
            .await;
    }
}

/// One line per committed transition, named by the job.
fn note(event: &v1::TransitionEvent) {
    if !tracing::enabled!(tracing::Level::DEBUG) {
        return;
    }
    let Ok(job_id) = job_id_of(&event.job_id) else { return };
    let status = JobStatus::from_code(i64::from(event.status)).map_or("unknown", JobStatus::as_str);
    tracing::debug!(%job_id, seq = event.seq, run = event.run, attempt = event.attempt, status, "transition");
}
