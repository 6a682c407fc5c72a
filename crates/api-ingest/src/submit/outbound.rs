//! After the commit: messages on the work queue and announcements. The rows are the outbox (P6): whatever is not
//! sent here, the reconciler and the dispatcher's sweep find in SQL.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use ringback_bus::{
    Bus, DeliveryAnnouncer, JobPublisher, JobSubject, Lane, Publication, PublishFailure, PublishOutcome,
};
use ringback_contracts::{Message as _, VERSION, v1};
use ringback_service_runtime::fault;
use ringback_store::{
    Facts, JobRow,
    deliveries::partition_of,
    submit::{InputAt, merge_extra},
};

use super::pipeline::Pending;

/// A job that was committed.
pub(crate) struct Sent {
    pub(crate) pending: Arc<Pending>,
    pub(crate) row: JobRow,
    pub(crate) deliveries: Vec<v1::Delivery>,
}

/// Bytes of inputs and number of jobs that may wait for their publish; more is left to the reconciler, so that a slow
/// broker does not fill the memory.
const BACKLOG_MAX_BYTES: i64 = 128 * 1024 * 1024;
const BACKLOG_MAX_JOBS: i64 = 20_000;
/// Pauses before the second and third try of a publish.
const TRIES: [Duration; 2] = [Duration::from_millis(200), Duration::from_millis(1_000)];

/// Sends what follows from commits.
pub(crate) struct Outbound {
    bus: Bus,
    publisher: JobPublisher,
    announcer: DeliveryAnnouncer,
    facts: Facts,
    backlog_jobs: AtomicI64,
    backlog_bytes: AtomicI64,
}

impl Outbound {
    pub(crate) fn new(bus: Bus, facts: Facts) -> Arc<Self> {
        let announcer = DeliveryAnnouncer::new(bus.clone(), facts.partitions);
        let publisher = bus.job_publisher();
        Arc::new(Self {
            bus,
            publisher,
            announcer,
            facts,
            backlog_jobs: AtomicI64::new(0),
            backlog_bytes: AtomicI64::new(0),
        })
    }

    /// Jobs whose publish is not over.
    pub(crate) fn backlog(&self) -> i64 {
        self.backlog_jobs.load(Ordering::Relaxed)
    }

    /// Publishes and announces in the background.
    pub(crate) fn send(self: Arc<Self>, sent: Vec<Sent>) {
        tokio::spawn(async move { self.send_all(sent).await });
    }

    /// Publishes and announces, and returns when that is over.
    pub(crate) async fn send_all(self: &Arc<Self>, sent: Vec<Sent>) {
        let jobs = i64::try_from(sent.len()).unwrap_or(i64::MAX);
        let size = |s: &Sent| match &s.pending.submit.input {
            InputAt::Inline(bytes) => i64::try_from(bytes.len()).unwrap_or(i64::MAX),
            InputAt::Blob { .. } => 0,
        };
        let bytes: i64 = sent.iter().map(size).sum();
        let before = self.backlog_jobs.fetch_add(jobs, Ordering::Relaxed);
        let bytes_before = self.backlog_bytes.fetch_add(bytes, Ordering::Relaxed);
        let publish = async {
            if before > BACKLOG_MAX_JOBS || bytes_before > BACKLOG_MAX_BYTES {
                metrics::counter!("ringback_api_publishes_left_to_reconciler_total")
                    .increment(sent.len() as u64);
            } else {
                fault::point("api.publish.before");
                self.publish(&sent).await;
                fault::point("api.publish.after");
            }
            self.backlog_jobs.fetch_sub(jobs, Ordering::Relaxed);
            self.backlog_bytes.fetch_sub(bytes, Ordering::Relaxed);
        };
        tokio::join!(publish, self.announce(&sent));
    }

    async fn publish(&self, sent: &[Sent]) {
        // With each job: whether a try before may have stored its message. Then it may have been run and acknowledged,
        // and the next one must ask; a try that certainly stored nothing costs the job no grant.
        let mut open: Vec<(&Sent, bool)> = sent.iter().map(|s| (s, false)).collect();
        for attempt in 0..=TRIES.len() {
            let publications = open.iter().map(|(s, must_ask)| self.publication(s, *must_ask)).collect();
            let outcomes = self.publisher.publish_all(publications).await;
            let mut failed = Vec::new();
            let mut asks = Vec::new();
            for ((s, must_ask), outcome) in open.into_iter().zip(outcomes) {
                match outcome {
                    PublishOutcome::Stored { .. } | PublishOutcome::AlreadyThere => {}
                    PublishOutcome::Failed(PublishFailure::Impossible(error)) => {
                        tracing::error!(job_id = %s.row.public_id(), error, "the job's message cannot be published");
                    }
                    PublishOutcome::Failed(failure) => {
                        asks.push(must_ask || failure.may_be_stored());
                        failed.push((s, failure));
                    }
                }
            }
            let Some((_, failure)) = failed.first() else { return };
            let Some(pause) = TRIES.get(attempt) else {
                tracing::warn!(jobs = failed.len(), error = %failure, "not published; the reconciler will");
                metrics::counter!("ringback_api_publishes_left_to_reconciler_total")
                    .increment(failed.len() as u64);
                return;
            };
            self.make_missing_streams(&failed).await;
            tokio::time::sleep(*pause).await;
            open = failed.into_iter().map(|(s, _)| s).zip(asks).collect();
        }
    }

    async fn make_missing_streams(&self, failed: &[(&Sent, PublishFailure)]) {
        let mut shards: Vec<u32> = failed
            .iter()
            .filter(|(_, failure)| matches!(failure, PublishFailure::StreamMissing(_)))
            .map(|(s, _)| s.pending.endpoint.shard)
            .collect();
        shards.sort_unstable();
        shards.dedup();
        for shard in shards {
            if let Err(error) = self.bus.ensure_stream(shard, &self.facts.db_epoch).await {
                tracing::debug!(shard, %error, "the work queue's stream cannot be made now");
            }
        }
    }

    fn publication(&self, s: &Sent, must_ask: bool) -> Publication {
        let (submit, endpoint, row) = (&s.pending.submit, &s.pending.endpoint, &s.row);
        let input = match &submit.input {
            InputAt::Inline(bytes) => v1::Payload {
                size_bytes: bytes.len() as u64,
                at: Some(v1::payload::At::Inline(bytes.clone())),
            },
            InputAt::Blob { key, size_bytes } => {
                v1::Payload { size_bytes: *size_bytes, at: Some(v1::payload::At::BlobKey(key.clone())) }
            }
        };
        let extra = merge_extra(submit.extra.as_deref(), s.pending.secret_extra.as_deref());
        let message = v1::JobMessage {
            version: VERSION,
            job_id: Bytes::copy_from_slice(row.job.id.as_bytes()),
            run: row.job.run,
            publish: row.job.publish,
            project_id: row.project.0,
            endpoint_id: row.endpoint.0,
            endpoint: endpoint.name.clone(),
            sync_id: row.sync_id,
            must_ask,
            input: Some(input),
            extra_json: extra,
            execution_timeout_ms: row.job.execution_timeout_ms,
            ttl_at_ms: row.job.ttl_at.map_or(0, |t| t.0),
            queued_at_ms: row.job.queued_at.0,
            traceparent: row.traceparent.clone().unwrap_or_default(),
            db_epoch: self.facts.db_epoch.clone(),
        };
        Publication {
            subject: JobSubject {
                shard: endpoint.shard,
                endpoint: row.endpoint,
                lane: if row.low_priority { Lane::Lo } else { Lane::Hi },
                job: row.job.id,
                run: row.job.run,
                publish: row.job.publish,
            },
            payload: message.encode_to_vec().into(),
            traceparent: row.traceparent.clone(),
        }
    }

    /// Announces deliveries that were committed.
    pub(crate) async fn announce_deliveries(&self, deliveries: &[v1::Delivery]) {
        self.announce_all(deliveries.iter()).await;
    }

    async fn announce_all(&self, deliveries: impl Iterator<Item = &v1::Delivery>) {
        let mut by_partition: BTreeMap<u16, Vec<v1::Delivery>> = BTreeMap::new();
        for delivery in deliveries {
            let partition = partition_of(&delivery.owner_id, self.facts.partitions);
            by_partition.entry(partition).or_default().push(delivery.clone());
        }
        for (partition, deliveries) in by_partition {
            self.announcer
                .announce(partition, |publisher, counter| {
                    v1::DeliveryEvents { publisher, counter, deliveries }.encode_to_vec().into()
                })
                .await;
        }
    }

    async fn announce(&self, sent: &[Sent]) {
        self.announce_all(sent.iter().flat_map(|s| &s.deliveries)).await;
        let events = sent.iter().map(|s| queued_event(&s.row)).collect();
        self.bus.announce_transitions(v1::TransitionEvents { events }.encode_to_vec().into()).await;
    }
}

/// The first transition of a job.
fn queued_event(row: &JobRow) -> v1::TransitionEvent {
    v1::TransitionEvent {
        job_id: Bytes::copy_from_slice(row.job.id.as_bytes()),
        project_id: row.project.0,
        endpoint_id: row.endpoint.0,
        seq: row.job.seq,
        run: row.job.run,
        attempt: 0,
        status: u32::from(row.job.status().code()),
        at_ms: row.submitted_at.0,
        sync_id: row.sync_id,
        batch_id: row.batch.map(|(id, _)| Bytes::copy_from_slice(id.as_bytes())).unwrap_or_default(),
        delay_ms: 0,
        execution_ms: 0,
    }
}
