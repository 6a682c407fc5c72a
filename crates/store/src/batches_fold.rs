//! Counting the jobs of batches as they end, and ending the batch with its last one. Written by the state-tracker.

mod cancel;
mod row;
mod tell;

use std::collections::{BTreeMap, BTreeSet};

use ringback_contracts::{batch_id_of, v1};
use ringback_domain::{
    BatchId, JobStatus, TimestampMs,
    batch::{BatchCounts, BatchFile, BatchStatus, CancelMarker},
    event::of_batch,
    target::FORMAT_RUNFLOW,
    webhook::body::{self, BatchEnd},
};
use row::{Row, lock, write};
use sea_orm::{ConnectionTrait, Value};
use tell::{Telling, count, registered, runflow_body, runflow_items, tell_processing};

pub use cancel::{CancelMark, MarkedBatch, cancel_worked_off, live_jobs, mark_cancelled, unfinished_cancels};
pub use tell::FileKind;
pub(crate) use tell::tell_created;

use crate::{
    StoreError, WriteTx,
    deliveries::batch_delivery,
    secrets::SecretKey,
    sql::{self, LIST, Rows, get_u32},
};

/// How long an ended batch is kept at least; its row goes after the last of its jobs.
pub const RETAIN_MS: u64 = 72 * 3_600_000;

/// What a batch's end needs besides its row.
#[derive(Clone)]
pub struct BatchEnv {
    /// Base of the links that receivers get, without a trailing slash.
    pub public_url: String,
    /// Partitions of the deliveries.
    pub partitions: u16,
    /// Makes the capability in these links.
    pub key: SecretKey,
}

impl std::fmt::Debug for BatchEnv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BatchEnv").field("public_url", &self.public_url).finish_non_exhaustive()
    }
}

impl BatchEnv {
    /// Where a file of an ended batch is fetched without a key, in every body and every retry the same.
    #[must_use]
    pub fn link(&self, file: BatchFile, batch: &BatchId) -> String {
        file.link(&self.public_url, batch, &self.key.batch_token(batch))
    }
}

/// What counting did.
#[derive(Clone, Debug, Default)]
pub struct Counted {
    /// Batches whose rest is to be cancelled from now on: their marker is in this transaction.
    pub cancel_rest: Vec<BatchId>,
    /// Final deliveries, inserted in this transaction.
    pub deliveries: Vec<v1::Delivery>,
    /// Batches that ended.
    pub ended: Vec<(BatchId, BatchStatus)>,
}

/// What happened to the jobs of batches.
#[derive(Clone, Debug, Default)]
pub struct BatchNews {
    /// Jobs that ended for the first time.
    pub ended: BTreeMap<BatchId, Vec<JobStatus>>,
    /// Batches one of whose jobs started, where registered webhooks may want to hear of the first.
    pub started: BTreeSet<BatchId>,
}

impl BatchNews {
    /// Whether nothing happened.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ended.is_empty() && self.started.is_empty()
    }
}

const UNTOLD: Rows = Rows {
    name: "batches.untold",
    before: "SELECT id FROM batches WHERE processing_told = 0 AND id IN (",
    casts: LIST,
    after: ")",
};

/// Adds ended jobs to the counts of their batches, each batch once. The update that reaches the total ends the batch
/// and inserts its deliveries; the first failure under `cancel_rest` leaves the durable marker. The first start of a
/// job is told once.
///
/// # Errors
/// The database's; transient when somebody else wrote a row meanwhile.
pub async fn count_in_batches(tx: &WriteTx, news: &BatchNews, env: &BatchEnv) -> Result<Counted, StoreError> {
    let registry = tx.registry().await?;
    let started: Vec<BatchId> = news.started.iter().copied().collect();
    let mut ids: BTreeSet<BatchId> = news.ended.keys().copied().collect();
    // Looked at without a lock: of the many starts in a batch only the first one writes its row.
    for row in UNTOLD.query(tx.conn(), &started, |id, v| v.push(sql::id(id.as_bytes()))).await? {
        ids.insert(
            batch_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?.ok_or(StoreError::corrupt("batches.id"))?,
        );
    }
    let ids: Vec<BatchId> = ids.into_iter().collect();
    let mut counted = Counted::default();
    let mut rows = lock(tx, &ids).await?;
    let telling = Telling { registry: &registry, now: TimestampMs(tx.now_ms()), env: Some(env) };
    for row in &mut rows {
        if news.started.contains(&row.id) {
            tell_processing(row, &telling, &mut counted);
        }
        for status in news.ended.get(&row.id).into_iter().flatten() {
            row.counts.count(*status);
        }
        if row.callback_runflow && row.counts.ended() == row.counts.total {
            row.items = runflow_items(tx, row).await?;
        }
        settle(row, &telling, &mut counted);
    }
    write(tx, &rows, env.partitions, &counted).await?;
    Ok(counted)
}

/// Brings marker, status and final delivery in line with the counts.
fn settle(row: &mut Row, telling: &Telling<'_>, counted: &mut Counted) {
    let now = telling.now;
    if row.cancel_rest && row.counts.failed > 0 && row.marker == CancelMarker::None {
        row.marker = CancelMarker::OnFailure;
        row.next_check_at_ms = Some(now.0);
        counted.cancel_rest.push(row.id);
    }
    let status = row.counts.status(row.marker);
    if status == row.status {
        return;
    }
    row.status = status;
    row.seq += 1;
    row.ended_at_ms = Some(now.0);
    row.cancel_done = row.marker != CancelMarker::None;
    row.next_check_at_ms = Some(now.plus_ms(RETAIN_MS).0);
    counted.cancel_rest.retain(|id| *id != row.id);
    counted.ended.push((row.id, status));
    if let Some(url) = &row.callback_url {
        let body = if row.callback_runflow {
            runflow_body(row, telling)
        } else {
            let id = row.id.to_string();
            let result_url = telling.link(BatchFile::Results, row).unwrap_or_default();
            body::batch_end(&BatchEnd { batch_id: &id, status, counts: row.counts, result_url: &result_url })
        };
        let trace = row.traceparent.as_deref();
        let mut owed = batch_delivery(row.id, row.project, row.seq, status, url, body, now, trace);
        if row.callback_runflow {
            owed.format = FORMAT_RUNFLOW;
        }
        row.owed += 1;
        counted.deliveries.push(owed);
    }
    let told = registered(row, row.seq, of_batch(status), telling);
    row.owed += count(&told);
    counted.deliveries.extend(told);
}

/// Open batches whose jobs have all ended once and that have not ended themselves: their counts do not add up.
///
/// # Errors
/// The database's.
pub async fn stuck_batches<C: ConnectionTrait>(
    conn: &C,
    opened_before_ms: i64,
    after: Option<BatchId>,
    limit: u32,
) -> Result<Vec<BatchId>, StoreError> {
    let after = after.map_or_else(Vec::new, |id| id.as_bytes().to_vec());
    let rows = sql::query(
        conn,
        "SELECT b.id FROM batches b WHERE b.status = 0 AND b.opened_at_ms <= $1 AND b.id > $2 AND NOT EXISTS \
         (SELECT 1 FROM jobs j WHERE j.batch_id = b.id AND j.run = 1 AND j.state < 2) ORDER BY b.id LIMIT $3",
        [Value::from(opened_before_ms), Value::from(after), sql::int(limit)],
    )
    .await?;
    rows.iter()
        .map(|row| {
            batch_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?.ok_or(StoreError::corrupt("batches.id"))
        })
        .collect()
}

/// Counts the jobs of a batch anew and settles it. Answers whether something was wrong.
///
/// The first end of each job counts: its state where it is in run 1, else the result of run 1.
///
/// # Errors
/// The database's.
pub async fn recount(tx: &WriteTx, id: BatchId, env: &BatchEnv) -> Result<Option<Counted>, StoreError> {
    let Some(mut row) = lock(tx, &[id]).await?.pop() else { return Ok(None) };
    if row.status != BatchStatus::InProgress {
        return Ok(None);
    }
    let ended = sql::query(
        tx.conn(),
        "SELECT CASE WHEN j.run = 1 THEN j.state ELSE COALESCE(r.state, j.state) END AS first_end, COUNT(*) \
         FROM jobs j LEFT JOIN results r ON r.job_id = j.id AND r.run = 1 \
         WHERE j.batch_id = $1 GROUP BY 1",
        [sql::id(id.as_bytes())],
    )
    .await?;
    let mut counts = BatchCounts { total: row.counts.total, ..BatchCounts::default() };
    let mut found = 0;
    for group in &ended {
        let status =
            JobStatus::from_code(group.try_get_by_index(0)?).ok_or(StoreError::corrupt("jobs.state"))?;
        let jobs = get_u32(group, 1, "count")?;
        found += jobs;
        for _ in 0..jobs {
            counts.count(status);
        }
    }
    // Where rows are missing, the stored counts know more than the rows.
    if found != counts.total || (counts == row.counts && counts.ended() < counts.total) {
        return Ok(None);
    }
    row.counts = counts;
    let mut counted = Counted::default();
    let registry = tx.registry().await?;
    let telling = Telling { registry: &registry, now: TimestampMs(tx.now_ms()), env: Some(env) };
    if row.callback_runflow && row.counts.ended() == row.counts.total {
        row.items = runflow_items(tx, &row).await?;
    }
    settle(&mut row, &telling, &mut counted);
    write(tx, &[row], env.partitions, &counted).await?;
    Ok(Some(counted))
}
