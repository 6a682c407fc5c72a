//! Batches: those that were never opened go, cancellations are worked off, counts that do not add up are made anew.

use bytes::Bytes;
use ringback_contracts::v1;
use ringback_domain::BatchId;
use ringback_store::{
    Urgency,
    batches_fold::{recount, stuck_batches, unfinished_cancels},
    due::forgotten_batches,
    retention::remove_unopened,
};
use serde::Serialize;

use crate::context::{Context, PassError};

/// A cancellation, or a batch whose last job just ended, is left to the tracker for this long.
const LEAVE_MS: u64 = 5_000;
/// Jobs of a batch removed in one transaction.
const REMOVE_CHUNK: u32 = 200;

/// What the pass found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Batches that nobody opened, removed.
    pub forgotten: u64,
    /// Batches whose cancellation was not worked off.
    pub cancelled: u64,
    /// Jobs cancelled for them.
    pub jobs_cancelled: u64,
    /// Batches whose counts were wrong.
    pub recounted: u64,
}

pub(crate) async fn run(context: &Context) -> Result<Report, PassError> {
    let mut report = Report::default();
    let now_ms = context.store.now_ms().await?;
    let chunk = context.chunk();
    for batch in forgotten_batches(context.store.read(), now_ms, chunk).await? {
        remove(context, batch).await?;
        report.forgotten += 1;
    }
    let before_ms = now_ms.saturating_sub_unsigned(LEAVE_MS);
    for marked in unfinished_cancels(context.store.read(), before_ms, chunk).await? {
        report.cancelled += 1;
        loop {
            let command = v1::CancelBatch {
                project_id: marked.project.0,
                batch_id: Bytes::copy_from_slice(marked.id.as_bytes()),
                limit: chunk,
                by_request: false,
            };
            let count = context.command(v1::command::Command::CancelBatch(command)).await?;
            report.jobs_cancelled += u64::from(count.changed);
            if !count.more {
                break;
            }
        }
    }
    let mut after = None;
    loop {
        let stuck = stuck_batches(context.store.read(), before_ms, after, chunk).await?;
        for batch in &stuck {
            report.recounted += u64::from(count_anew(context, *batch).await?);
        }
        after = stuck.last().copied();
        if stuck.len() < chunk as usize {
            return Ok(report);
        }
    }
}

async fn remove(context: &Context, batch: BatchId) -> Result<(), PassError> {
    loop {
        let (gone, purged) = context
            .store
            .write(Urgency::Lazy, move |tx| Box::pin(remove_unopened(tx, batch, REMOVE_CHUNK)))
            .await?;
        context.delete_blobs(purged.blobs).await?;
        if gone {
            tracing::info!(batch_id = %batch, "a batch that was never opened is removed");
            return Ok(());
        }
    }
}

async fn count_anew(context: &Context, batch: BatchId) -> Result<bool, PassError> {
    let env = context.batches.clone();
    let counted = context
        .store
        .write(Urgency::Now, move |tx| {
            let env = env.clone();
            Box::pin(async move { recount(tx, batch, &env).await })
        })
        .await?;
    let Some(counted) = counted else { return Ok(false) };
    tracing::error!(batch_id = %batch, "the counts of a batch did not add up; they were made anew");
    context.announce(counted.deliveries).await;
    Ok(true)
}
