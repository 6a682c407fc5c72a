//! Chunks of generators on their way to the tracker: in order, and before the outcome of their attempt.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use ringback_bus::{Bus, Verb};
use ringback_contracts::{Message as _, VERSION, attempt_to_wire, v1};
use ringback_worker_protocol::ChunkPermit;
use tokio::sync::mpsc;

use crate::executor::JobKey;
use crate::outcome::{Finished, Outcomes};

/// Largest chunk: it travels inline, and NATS carries 1 MiB by default. RunPod allows 1 MB.
pub(crate) const MAX_CHUNK_BYTES: usize = 1_000_000;
const MAX_BATCH: usize = 200;
const MAX_BATCH_BYTES: usize = 512 * 1024;
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// One chunk.
#[derive(Debug)]
pub(crate) struct OutChunk {
    pub(crate) key: JobKey,
    pub(crate) n: u32,
    pub(crate) output: Bytes,
    pub(crate) started_at_ms: i64,
    /// Held until the chunk is passed on, so that a slow tracker slows the generator.
    pub(crate) _permit: ChunkPermit,
}

/// What passes through, in order.
#[derive(Debug)]
pub(crate) enum Item {
    Chunk(OutChunk),
    /// The outcome of an attempt whose chunks are all before it.
    Finished(Box<Finished>),
}

/// Forwards until the sender is gone.
pub(crate) async fn run(
    bus: Bus,
    worker_id: String,
    timeout: Duration,
    outcomes: Outcomes,
    mut items: mpsc::UnboundedReceiver<Item>,
) {
    let mut waiting: VecDeque<Item> = VecDeque::new();
    loop {
        if waiting.is_empty() {
            match items.recv().await {
                Some(item) => waiting.push_back(item),
                None => return,
            }
        }
        while let Ok(item) = items.try_recv() {
            waiting.push_back(item);
        }
        let batch = next_batch(&mut waiting);
        if !batch.is_empty() {
            send(&bus, &worker_id, timeout, batch).await;
        } else if let Some(Item::Finished(finished)) = waiting.pop_front() {
            outcomes.send(*finished);
        }
    }
}

/// The chunks before the next outcome, as many as fit one request.
fn next_batch(waiting: &mut VecDeque<Item>) -> Vec<OutChunk> {
    let mut batch = Vec::new();
    let mut bytes = 0;
    while batch.len() < MAX_BATCH {
        match waiting.pop_front() {
            Some(Item::Chunk(chunk)) if batch.is_empty() || bytes + chunk.output.len() <= MAX_BATCH_BYTES => {
                bytes += chunk.output.len();
                batch.push(chunk);
            }
            Some(item) => {
                waiting.push_front(item);
                break;
            }
            None => break,
        }
    }
    batch
}

/// Sends until every chunk is decided.
async fn send(bus: &Bus, worker_id: &str, timeout: Duration, mut batch: Vec<OutChunk>) {
    let mut pause = FIRST_RETRY;
    while !batch.is_empty() {
        let chunks = batch.iter().map(|chunk| v1::Chunk {
            attempt: Some(attempt_to_wire(&chunk.key.job, &chunk.key.attempt)),
            n: chunk.n,
            output: chunk.output.clone(),
            started_at_ms: chunk.started_at_ms,
        });
        let request =
            v1::ChunkBatch { version: VERSION, worker_id: worker_id.to_owned(), chunks: chunks.collect() };
        let answer = bus.request(Verb::Chunks, request.encode_to_vec().into(), timeout).await;
        let verdicts: Vec<v1::Verdict> = match answer.map(v1::ChunkReply::decode) {
            Ok(Ok(reply)) => reply.verdicts().collect(),
            Ok(Err(error)) => {
                tracing::warn!(%error, "unreadable answer about chunks");
                Vec::new()
            }
            Err(error) => {
                tracing::warn!(%error, chunks = batch.len(), "chunks wait for the tracker");
                Vec::new()
            }
        };
        if verdicts.len() == batch.len() {
            let mut verdicts = verdicts.into_iter();
            batch.retain(|_| matches!(verdicts.next(), Some(v1::Verdict::Retry | v1::Verdict::Unspecified)));
        }
        if !batch.is_empty() {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_RETRY);
        }
    }
    // Dropped here: the generators go on.
}
