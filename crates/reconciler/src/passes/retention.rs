//! Retention: what is past its time goes in small chunks that let others in between.

use std::time::Duration;

use ringback_store::{
    Urgency,
    retention::{
        Events, Purged, ended_batches, ended_events, ended_jobs, purge_batch, purge_delivery_attempts,
        purge_events, purge_jobs, trash,
    },
    webhooks::crud::purge_gone,
};
use serde::Serialize;

use crate::context::{Context, PassError};

/// Jobs removed in one transaction: short enough that nobody waits for it.
const JOBS_PER_CHUNK: u32 = 100;
/// Chunks of one pass; the next pass goes on.
const CHUNKS_PER_PASS: u32 = 100;
/// Between two chunks, so that a long purge takes no more than a part of the writer's time.
const PAUSE: Duration = Duration::from_millis(20);

/// A blob that should be gone for so long is left from a crash or a fault of the blob store.
const LEFT_MS: u64 = 60_000;

/// What the pass removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Jobs.
    pub jobs: u64,
    /// Batches.
    pub batches: u64,
    /// Events that are no transition.
    pub events: u64,
    /// Deliveries.
    pub deliveries: u64,
    /// Rows of the log of delivery attempts.
    pub delivery_attempts: u64,
    /// Registered webhooks that went long ago.
    pub webhooks: u64,
    /// Blobs.
    pub blobs: u64,
    /// Blobs that an earlier pass had left.
    pub blobs_left: u64,
    /// Jobs and batches that stay for deliveries which are pending or dead.
    pub postponed: u64,
}

impl Report {
    fn add(&mut self, purged: &Purged) {
        self.jobs += purged.jobs;
        self.batches += purged.batches;
        self.events += purged.events;
        self.deliveries += u64::try_from(purged.deliveries).unwrap_or(0);
        self.blobs += purged.blobs.len() as u64;
        self.postponed += purged.postponed;
    }
}

pub(crate) async fn run(context: &Context) -> Result<Report, PassError> {
    let mut report = Report::default();
    let limit = JOBS_PER_CHUNK.min(context.chunk());
    for _ in 0..CHUNKS_PER_PASS {
        let now_ms = context.store.now_ms().await?;
        let ids = ended_jobs(context.store.read(), now_ms, limit).await?;
        let last = ids.len() < limit as usize;
        if !ids.is_empty() {
            let purged = context
                .store
                .write(Urgency::Lazy, move |tx| {
                    let ids = ids.clone();
                    Box::pin(async move { purge_jobs(tx, &ids).await })
                })
                .await?;
            report.add(&purged);
            // After the commit: a crash in between leaves a blob in the trash, never a row without its blob.
            context.delete_blobs(purged.blobs).await?;
        }
        if last {
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    let now_ms = context.store.now_ms().await?;
    let left = trash(context.store.read(), now_ms.saturating_sub_unsigned(LEFT_MS), limit).await?;
    report.blobs_left = context.delete_blobs(left).await?;
    for batch in ended_batches(context.store.read(), now_ms, limit).await? {
        let purged = context.store.write(Urgency::Lazy, move |tx| Box::pin(purge_batch(tx, batch))).await?;
        report.add(&purged);
    }
    events(context, Events::All, context.config.events_retention_ms, &mut report).await?;
    events(context, Events::Passing, context.config.progress_retention_ms, &mut report).await?;
    report.webhooks = context.store.write(Urgency::Lazy, move |tx| Box::pin(purge_gone(tx, limit))).await?;
    let before_ms = now_ms.saturating_sub_unsigned(context.delivery_attempts_ms);
    report.delivery_attempts = context
        .store
        .write(Urgency::Lazy, move |tx| Box::pin(purge_delivery_attempts(tx, before_ms, limit)))
        .await?;
    Ok(report)
}

/// Events past their time, with their deliveries.
async fn events(
    context: &Context,
    which: Events,
    kept_ms: u64,
    report: &mut Report,
) -> Result<(), PassError> {
    let limit = JOBS_PER_CHUNK.min(context.chunk());
    for _ in 0..CHUNKS_PER_PASS {
        let now_ms = context.store.now_ms().await?;
        let before_ms = now_ms.saturating_sub_unsigned(kept_ms);
        let ids = ended_events(context.store.read(), which, before_ms, now_ms, limit).await?;
        let last = ids.len() < limit as usize;
        if !ids.is_empty() {
            let purged = context
                .store
                .write(Urgency::Lazy, move |tx| {
                    let ids = ids.clone();
                    Box::pin(async move { purge_events(tx, &ids).await })
                })
                .await?;
            report.add(&purged);
        }
        if last {
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}
