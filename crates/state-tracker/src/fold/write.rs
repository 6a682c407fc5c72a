//! Everything that a fold decided, written with statements of fixed size.

use std::{collections::HashMap, sync::Arc};

use ringback_domain::JobId;
use ringback_store::{
    JobRow, StoreError, WriteTx,
    batches_fold::{BatchNews, count_in_batches},
    chunks_write::{insert_chunks, upsert_progress},
    deliveries::insert_deliveries,
    inputs::{StoredInput, select_inputs},
    results::{insert_attempts, insert_late, insert_results},
    update_jobs,
    usage::count_tokens,
};

use super::{After, Context, Entry, Out, deliver, progress, registered};

/// Writes; fails as transient where somebody else wrote one of the rows meanwhile, so that all is decided again.
pub(super) async fn write(
    tx: &WriteTx,
    mut jobs: HashMap<JobId, Entry>,
    out: Out,
    context: &Context<'_>,
) -> Result<After, StoreError> {
    let quiet =
        out.changed.is_empty() && out.progress.is_empty() && out.chunks.is_empty() && out.due_news.is_empty();
    let registry = if quiet { Arc::default() } else { tx.registry().await? };
    let heard = registered::heard(&out.changed, &jobs, &registry);
    let mut echoed = deliver::echoed(&out.owed, &jobs);
    if !heard.is_empty() {
        echoed.extend(registered::echoed(&heard, &jobs, &registry, context.now));
        echoed.sort_unstable();
        echoed.dedup();
    }
    let inputs = inputs_of(tx, &echoed, &jobs).await?;
    let mut deliveries = deliver::deliveries(&out.owed, &jobs, &out.results, &inputs, context.now)?;
    let batches = BatchNews { ended: out.batches, started: registered::started_batches(&heard, &jobs) };
    deliveries.extend(registered::deliveries(
        &heard,
        &mut jobs,
        &registry,
        &out.results,
        &inputs,
        context.now,
    )?);
    let tokens = registered::tokens(&out.changed, &jobs, &registry, &out.results);
    let news = progress::News {
        changed: &out.changed,
        progress: &out.progress,
        chunks: &out.chunks,
        due: &out.due_news,
    };
    let mut told = if registry.hears_progress() {
        progress::tell(tx, &news, &jobs, &registry, context).await?
    } else {
        Vec::new()
    };
    if !out.lost.is_empty() {
        let partitions = context.env.batch.partitions;
        told.extend(registered::lost_workers(tx, partitions, &out.lost, &jobs, &registry).await?);
    }
    let (dirty, at_hand): (Vec<JobRow>, Vec<Option<StoredInput>>) =
        jobs.into_values().filter(|e| e.dirty).map(|e| (e.row, e.input)).unzip();
    if !dirty.is_empty() && !update_jobs(tx, &dirty, context.env.grace_ms).await? {
        metrics::counter!("ringback_tracker_conflicts_total").increment(1);
        return Err(StoreError::Transient { detail: "a job changed while it was folded".to_owned() });
    }
    for (mut row, input) in dirty.into_iter().zip(at_hand) {
        row.revision += 1;
        tx.remember(row, input);
    }
    if !out.results.is_empty() {
        insert_results(tx, &out.results).await?;
    }
    if !out.attempts.is_empty() {
        insert_attempts(tx, &out.attempts).await?;
    }
    if !out.late.is_empty() {
        insert_late(tx, &out.late).await?;
    }
    if !out.chunks.is_empty() {
        insert_chunks(tx, &out.chunks).await?;
    }
    if !out.progress.is_empty() {
        let newest: Vec<_> = out.progress.into_values().collect();
        upsert_progress(tx, &newest).await?;
    }
    let mut after = out.after;
    after.deliveries = deliveries;
    insert_deliveries(tx, context.env.batch.partitions, &after.deliveries).await?;
    // Inserted with their events.
    after.deliveries.extend(told);
    if !batches.is_empty() {
        let counted = count_in_batches(tx, &batches, &context.env.batch).await?;
        after.cancel_rest = counted.cancel_rest;
        // Inserted with the counts; announced with the others.
        after.deliveries.extend(counted.deliveries);
    }
    if !tokens.is_empty() {
        after.deliveries.extend(count_tokens(tx, context.env.batch.partitions, &tokens).await?);
    }
    tx.count(context.env.counter_row, &out.counters);
    Ok(after)
}

/// The inputs that bodies repeat: those at hand, else read.
async fn inputs_of(
    tx: &WriteTx,
    ids: &[JobId],
    jobs: &HashMap<JobId, Entry>,
) -> Result<HashMap<JobId, StoredInput>, StoreError> {
    let mut inputs: HashMap<JobId, StoredInput> =
        ids.iter().filter_map(|id| Some((*id, jobs.get(id)?.input.clone()?))).collect();
    let absent: Vec<JobId> = ids.iter().copied().filter(|id| !inputs.contains_key(id)).collect();
    if !absent.is_empty() {
        inputs.extend(select_inputs(tx.conn(), &absent).await?);
    }
    Ok(inputs)
}
