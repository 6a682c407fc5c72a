//! Counting the jobs of batches as they end, and ending the batch with its last one. Written by the state-tracker.

use std::collections::BTreeMap;

use ringback_contracts::{batch_id_of, job_id_of, v1};
use ringback_domain::{
    BatchId, JobId, JobStatus, ProjectId, TimestampMs,
    batch::{BatchCounts, BatchStatus, CancelMarker},
    webhook::body::{self, BatchEnd},
};
use sea_orm::{ConnectionTrait, QueryResult, Value};

use crate::{
    StoreError, WriteTx,
    deliveries::{batch_delivery, insert_deliveries},
    sql::{self, LIST, Rows, get_u32},
};

/// How long an ended batch is kept at least; its row goes after the last of its jobs.
pub const RETAIN_MS: u64 = 72 * 3_600_000;

/// What a batch's end needs besides its row.
#[derive(Clone, Debug)]
pub struct BatchEnv {
    /// Base of the links that receivers get, without a trailing slash.
    pub public_url: String,
    /// Partitions of the deliveries.
    pub partitions: u16,
}

impl BatchEnv {
    fn result_url(&self, batch: BatchId) -> String {
        format!("{}/v1/batches/{batch}/results", self.public_url)
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

#[derive(Clone, Debug)]
struct Row {
    id: BatchId,
    project: ProjectId,
    revision: i64,
    seq: u32,
    status: BatchStatus,
    counts: BatchCounts,
    cancel_rest: bool,
    marker: CancelMarker,
    cancel_done: bool,
    callback_url: Option<String>,
    next_check_at_ms: Option<i64>,
    ended_at_ms: Option<i64>,
    owed: u32,
    traceparent: Option<String>,
}

macro_rules! columns {
    () => {
        "SELECT id, project_id, revision, seq, status, total, completed, failed, cancelled, cancel_rest, \
         cancel_marker, cancel_done, callback_url, next_check_at_ms, ended_at_ms, owed, traceparent FROM batches \
         WHERE id IN ("
    };
}

const SELECT: Rows = Rows { name: "batches.fold", before: columns!(), casts: LIST, after: ") ORDER BY id" };
const LOCK: Rows =
    Rows { name: "batches.lock", before: columns!(), casts: LIST, after: ") ORDER BY id FOR UPDATE" };

fn read(row: &QueryResult) -> Result<Row, StoreError> {
    Ok(Row {
        id: batch_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?.ok_or(StoreError::corrupt("batches.id"))?,
        project: ProjectId(row.try_get_by_index(1)?),
        revision: row.try_get_by_index(2)?,
        seq: get_u32(row, 3, "batches.seq")?,
        status: BatchStatus::from_code(row.try_get_by_index(4)?)
            .ok_or(StoreError::corrupt("batches.status"))?,
        counts: BatchCounts {
            total: get_u32(row, 5, "batches.total")?,
            completed: get_u32(row, 6, "batches.completed")?,
            failed: get_u32(row, 7, "batches.failed")?,
            cancelled: get_u32(row, 8, "batches.cancelled")?,
        },
        cancel_rest: row.try_get_by_index::<i64>(9)? != 0,
        marker: CancelMarker::from_code(row.try_get_by_index(10)?)
            .ok_or(StoreError::corrupt("batches.cancel_marker"))?,
        cancel_done: row.try_get_by_index::<i64>(11)? != 0,
        callback_url: row.try_get_by_index(12)?,
        next_check_at_ms: row.try_get_by_index(13)?,
        ended_at_ms: row.try_get_by_index(14)?,
        owed: get_u32(row, 15, "batches.owed")?,
        traceparent: row.try_get_by_index(16)?,
    })
}

async fn lock(tx: &WriteTx, ids: &[BatchId]) -> Result<Vec<Row>, StoreError> {
    debug_assert!(ids.is_sorted(), "rows are locked in sorted order");
    let rows = if tx.is_postgres() { &LOCK } else { &SELECT };
    rows.query(tx.conn(), ids, |id, v| v.push(sql::id(id.as_bytes()))).await?.iter().map(read).collect()
}

/// Adds ended jobs to the counts of their batches, each batch once. The update that reaches the total ends the batch
/// and inserts its one delivery; the first failure under `cancel_rest` leaves the durable marker.
///
/// # Errors
/// The database's; transient when somebody else wrote a row meanwhile.
pub async fn count_in_batches(
    tx: &WriteTx,
    ended: &BTreeMap<BatchId, Vec<JobStatus>>,
    env: &BatchEnv,
) -> Result<Counted, StoreError> {
    let ids: Vec<BatchId> = ended.keys().copied().collect();
    let mut counted = Counted::default();
    let mut rows = lock(tx, &ids).await?;
    for row in &mut rows {
        for status in ended.get(&row.id).into_iter().flatten() {
            row.counts.count(*status);
        }
        settle(row, TimestampMs(tx.now_ms()), env, &mut counted);
    }
    write(tx, &rows, env, &counted).await?;
    Ok(counted)
}

/// Brings marker, status and final delivery in line with the counts.
fn settle(row: &mut Row, now: TimestampMs, env: &BatchEnv, counted: &mut Counted) {
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
        let (id, result_url) = (row.id.to_string(), env.result_url(row.id));
        let end = BatchEnd { batch_id: &id, status, counts: row.counts, result_url: &result_url };
        row.owed += 1;
        counted.deliveries.push(batch_delivery(
            row.id,
            row.project,
            row.seq,
            status,
            url,
            body::batch_end(&end),
            now,
            row.traceparent.as_deref(),
        ));
    }
}

const UPDATE: Rows = Rows {
    name: "batches.update",
    before: "UPDATE batches SET revision = batches.revision + 1, seq = v.column3, status = v.column4, \
             completed = v.column5, failed = v.column6, cancelled = v.column7, cancel_marker = v.column8, \
             cancel_done = v.column9, ended_at_ms = v.column10, next_check_at_ms = v.column11, owed = v.column12 \
             FROM (VALUES ",
    casts: &[
        "bytea", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint",
        "bigint", "bigint",
    ],
    after: ") AS v WHERE batches.id = v.column1 AND batches.revision = v.column2",
};

async fn write(tx: &WriteTx, rows: &[Row], env: &BatchEnv, counted: &Counted) -> Result<(), StoreError> {
    let written = UPDATE
        .execute(tx.conn(), rows, |r, v| {
            v.extend([
                sql::id(r.id.as_bytes()),
                Value::from(r.revision),
                sql::int(r.seq),
                sql::int(r.status.code()),
                sql::int(r.counts.completed),
                sql::int(r.counts.failed),
                sql::int(r.counts.cancelled),
                sql::int(r.marker.code()),
                Value::from(i64::from(r.cancel_done)),
                Value::from(r.ended_at_ms),
                Value::from(r.next_check_at_ms),
                sql::int(r.owed),
            ]);
        })
        .await?;
    if written != rows.len() as u64 {
        return Err(StoreError::transient("a batch changed while it was counted"));
    }
    insert_deliveries(tx, env.partitions, &counted.deliveries).await?;
    Ok(())
}

/// What a request to cancel a batch found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelMark {
    /// No such batch of this project, or it was never opened.
    NotFound,
    /// It has ended: nothing is left to cancel.
    Ended(BatchStatus),
    /// Its jobs are to be cancelled.
    Marked,
    /// Nobody asked for a cancellation, and this call did not either.
    NotMarked,
}

/// Leaves the durable marker of a client's request (or, without `by_request`, looks at what marker there is). The
/// first marker stays.
///
/// # Errors
/// The database's.
pub async fn mark_cancelled(
    tx: &WriteTx,
    project: ProjectId,
    id: BatchId,
    by_request: bool,
) -> Result<CancelMark, StoreError> {
    if by_request {
        sql::execute(
            tx.conn(),
            "UPDATE batches SET cancel_marker = $3, next_check_at_ms = $4, revision = revision + 1 \
             WHERE id = $1 AND project_id = $2 AND cancel_marker = 0 AND status = 0 AND opened_at_ms IS NOT NULL",
            [
                sql::id(id.as_bytes()),
                Value::from(project.0),
                sql::int(CancelMarker::ByRequest.code()),
                Value::from(tx.now_ms()),
            ],
        )
        .await?;
    }
    let row = sql::query_one(
        tx.conn(),
        "SELECT status, cancel_marker FROM batches WHERE id = $1 AND project_id = $2 AND opened_at_ms IS NOT NULL",
        [sql::id(id.as_bytes()), Value::from(project.0)],
    )
    .await?;
    let Some(row) = row else { return Ok(CancelMark::NotFound) };
    let status =
        BatchStatus::from_code(row.try_get_by_index(0)?).ok_or(StoreError::corrupt("batches.status"))?;
    Ok(if status != BatchStatus::InProgress {
        CancelMark::Ended(status)
    } else if row.try_get_by_index::<i64>(1)? == 0 {
        CancelMark::NotMarked
    } else {
        CancelMark::Marked
    })
}

/// Jobs of a batch that have not ended, in order.
///
/// # Errors
/// The database's.
pub async fn live_jobs<C: ConnectionTrait>(
    conn: &C,
    id: BatchId,
    limit: u32,
) -> Result<Vec<JobId>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT id FROM jobs WHERE batch_id = $1 AND state < 2 ORDER BY batch_index LIMIT $2",
        [sql::id(id.as_bytes()), sql::int(limit)],
    )
    .await?;
    rows.iter().map(|row| Ok(job_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?)).collect()
}

/// Notes that no live job is left of a batch that is being cancelled.
///
/// # Errors
/// The database's.
pub async fn cancel_worked_off(tx: &WriteTx, id: BatchId) -> Result<(), StoreError> {
    sql::execute(
        tx.conn(),
        "UPDATE batches SET cancel_done = 1, revision = revision + 1, \
         next_check_at_ms = CASE WHEN status = 0 THEN NULL ELSE next_check_at_ms END \
         WHERE id = $1 AND cancel_marker > 0 AND cancel_done = 0",
        [sql::id(id.as_bytes())],
    )
    .await
    .map(drop)
}

/// A batch whose cancellation is not worked off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkedBatch {
    /// Its id.
    pub id: BatchId,
    /// Its owner.
    pub project: ProjectId,
}

/// Batches whose cancellation was asked for before `before_ms` and is not worked off.
///
/// # Errors
/// The database's.
pub async fn unfinished_cancels<C: ConnectionTrait>(
    conn: &C,
    before_ms: i64,
    limit: u32,
) -> Result<Vec<MarkedBatch>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT id, project_id FROM batches WHERE next_check_at_ms <= $1 AND cancel_marker > 0 AND cancel_done = 0 \
         AND opened_at_ms IS NOT NULL ORDER BY next_check_at_ms LIMIT $2",
        [Value::from(before_ms), sql::int(limit)],
    )
    .await?;
    rows.iter()
        .map(|row| {
            Ok(MarkedBatch {
                id: batch_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?
                    .ok_or(StoreError::corrupt("batches.id"))?,
                project: ProjectId(row.try_get_by_index(1)?),
            })
        })
        .collect()
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
    settle(&mut row, TimestampMs(tx.now_ms()), env, &mut counted);
    write(tx, &[row], env, &counted).await?;
    Ok(Some(counted))
}
