//! What the reconciler looks for: live rows whose time came, and what is on the queue according to SQL.

use ringback_contracts::{batch_id_of, job_id_of};
use ringback_domain::{BatchId, EndpointId, JobId, TimestampMs};
use sea_orm::{ConnectionTrait, QueryResult, Value};

use crate::{
    StoreError,
    sql::{self, get_u32},
};

fn job_id(row: &QueryResult, index: usize) -> Result<JobId, StoreError> {
    Ok(job_id_of(&row.try_get_by_index::<Vec<u8>>(index)?)?)
}

/// A live job whose time came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DueJob {
    /// The job.
    pub id: JobId,
    /// When it was to be looked at.
    pub at: TimestampMs,
    /// Whether an attempt is live.
    pub running: bool,
}

/// Live jobs that are due at `now_ms`, the longest due first, after `after`.
///
/// # Errors
/// The database's.
pub async fn due_jobs<C: ConnectionTrait>(
    conn: &C,
    now_ms: i64,
    after: Option<DueJob>,
    limit: u32,
) -> Result<Vec<DueJob>, StoreError> {
    let (after_ms, after_id) = after.map_or((i64::MIN, Vec::new()), |a| (a.at.0, a.id.as_bytes().to_vec()));
    let rows = sql::query(
        conn,
        "SELECT id, next_check_at_ms, state FROM jobs WHERE next_check_at_ms <= $1 AND next_check_at_ms >= $2 \
         AND state < 2 AND (next_check_at_ms > $2 OR id > $3) ORDER BY next_check_at_ms, id LIMIT $4",
        [Value::from(now_ms), Value::from(after_ms), Value::from(after_id), sql::int(limit)],
    )
    .await?;
    rows.iter()
        .map(|row| {
            Ok(DueJob {
                id: job_id(row, 0)?,
                at: TimestampMs(row.try_get_by_index(1)?),
                running: row.try_get_by_index::<i64>(2)? != 0,
            })
        })
        .collect()
}

/// A job that waits in the queue, and the message that it should have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuedJob {
    /// The job.
    pub id: JobId,
    /// Its run.
    pub run: u32,
    /// The newest message of the run.
    pub publish: u32,
    /// Whether it waits in the slow lane.
    pub low_priority: bool,
}

/// Jobs of an endpoint that wait since before `queued_before_ms`, in order of their ids after `after`. Jobs of a
/// batch that is not open yet were not accepted and have no message.
///
/// # Errors
/// The database's.
pub async fn queued_jobs<C: ConnectionTrait>(
    conn: &C,
    endpoint: EndpointId,
    queued_before_ms: i64,
    after: Option<JobId>,
    limit: u32,
) -> Result<Vec<QueuedJob>, StoreError> {
    let after = after.map_or_else(Vec::new, |id| id.as_bytes().to_vec());
    let rows = sql::query(
        conn,
        "SELECT id, run, publish, lane FROM jobs WHERE endpoint_id = $1 AND state < 2 AND state = 0 \
         AND queued_at_ms <= $2 AND id > $3 AND (batch_id IS NULL OR EXISTS (SELECT 1 FROM batches b \
         WHERE b.id = jobs.batch_id AND b.opened_at_ms IS NOT NULL)) ORDER BY id LIMIT $4",
        [Value::from(endpoint.0), Value::from(queued_before_ms), Value::from(after), sql::int(limit)],
    )
    .await?;
    rows.iter()
        .map(|row| {
            Ok(QueuedJob {
                id: job_id(row, 0)?,
                run: get_u32(row, 1, "jobs.run")?,
                publish: get_u32(row, 2, "jobs.publish")?,
                low_priority: row.try_get_by_index::<i64>(3)? != 0,
            })
        })
        .collect()
}

/// Queued jobs of an endpoint for a purge by its project.
///
/// # Errors
/// The database's.
pub async fn purgeable_jobs<C: ConnectionTrait>(
    conn: &C,
    project: i64,
    endpoint: EndpointId,
    limit: u32,
) -> Result<Vec<JobId>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT id FROM jobs WHERE endpoint_id = $1 AND state < 2 AND state = 0 AND project_id = $2 \
         AND (batch_id IS NULL OR EXISTS (SELECT 1 FROM batches b WHERE b.id = jobs.batch_id \
         AND b.opened_at_ms IS NOT NULL)) ORDER BY id LIMIT $3",
        [Value::from(endpoint.0), Value::from(project), sql::int(limit)],
    )
    .await?;
    rows.iter().map(|row| job_id(row, 0)).collect()
}

/// Live rows of an endpoint: how many wait since before `queued_before_ms`, and how many run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LiveCounts {
    /// Jobs in the queue for a while.
    pub queued: u64,
    /// Jobs in progress.
    pub running: u64,
}

/// Live rows of every endpoint that has any, counted from the rows.
///
/// # Errors
/// The database's.
pub async fn live_counts<C: ConnectionTrait>(
    conn: &C,
    queued_before_ms: i64,
) -> Result<Vec<(EndpointId, LiveCounts)>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT endpoint_id, SUM(CASE WHEN state = 0 AND queued_at_ms <= $1 THEN 1 ELSE 0 END), \
         SUM(CASE WHEN state = 1 THEN 1 ELSE 0 END) FROM jobs WHERE state < 2 GROUP BY endpoint_id",
        [Value::from(queued_before_ms)],
    )
    .await?;
    rows.iter()
        .map(|row| {
            let counts = LiveCounts {
                queued: sql::get_u64(row, 1, "count")?,
                running: sql::get_u64(row, 2, "count")?,
            };
            Ok((EndpointId(row.try_get_by_index(0)?), counts))
        })
        .collect()
}

/// Every endpoint's id.
///
/// # Errors
/// The database's.
pub async fn endpoint_ids<C: ConnectionTrait>(conn: &C) -> Result<Vec<EndpointId>, StoreError> {
    let rows = sql::query(conn, "SELECT id FROM endpoints ORDER BY id", []).await?;
    rows.iter().map(|row| Ok(EndpointId(row.try_get_by_index(0)?))).collect()
}

/// The name of an endpoint.
///
/// # Errors
/// The database's.
pub async fn endpoint_name<C: ConnectionTrait>(
    conn: &C,
    id: EndpointId,
) -> Result<Option<String>, StoreError> {
    let row = sql::query_one(conn, "SELECT name FROM endpoints WHERE id = $1", [Value::from(id.0)]).await?;
    row.map(|row| Ok(row.try_get_by_index(0)?)).transpose()
}

/// Batches that were never opened and whose maker must be gone by `now_ms`.
///
/// # Errors
/// The database's.
pub async fn forgotten_batches<C: ConnectionTrait>(
    conn: &C,
    now_ms: i64,
    limit: u32,
) -> Result<Vec<BatchId>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT id FROM batches WHERE next_check_at_ms <= $1 AND opened_at_ms IS NULL \
         ORDER BY next_check_at_ms LIMIT $2",
        [Value::from(now_ms), sql::int(limit)],
    )
    .await?;
    rows.iter()
        .map(|row| {
            batch_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?.ok_or(StoreError::corrupt("batches.id"))
        })
        .collect()
}

/// A partition that owes something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwingPartition {
    /// Its number.
    pub partition: u16,
    /// When its longest due delivery was due, Unix ms.
    pub oldest_due_ms: i64,
    /// Whether a dispatcher holds its lease.
    pub owned: bool,
}

/// Partitions with pending deliveries that were due before `due_before_ms`.
///
/// # Errors
/// The database's.
pub async fn owing_partitions<C: ConnectionTrait>(
    conn: &C,
    partitions: u16,
    now_ms: i64,
    due_before_ms: i64,
) -> Result<Vec<OwingPartition>, StoreError> {
    let mut owing = Vec::new();
    for partition in 0..partitions.max(1) {
        let row = sql::query_one(
            conn,
            "SELECT MIN(next_attempt_at_ms), (SELECT COUNT(*) FROM partition_leases l WHERE l.partition = $1 \
             AND l.owner <> '' AND l.expires_at_ms > $2) FROM deliveries \
             WHERE partition = $1 AND state = 0 AND next_attempt_at_ms <= $3",
            [sql::int(partition), Value::from(now_ms), Value::from(due_before_ms)],
        )
        .await?;
        let Some(row) = row else { continue };
        if let Some(oldest_due_ms) = row.try_get_by_index::<Option<i64>>(0)? {
            owing.push(OwingPartition {
                partition,
                oldest_due_ms,
                owned: row.try_get_by_index::<i64>(1)? > 0,
            });
        }
    }
    Ok(owing)
}

/// Live jobs of every endpoint according to the counters: cheap, and right unless a counter drifted.
///
/// # Errors
/// The database's.
pub async fn counted_live<C: ConnectionTrait>(conn: &C) -> Result<Vec<(EndpointId, LiveCounts)>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT endpoint_id, CAST(SUM(queued) AS BIGINT), CAST(SUM(running) AS BIGINT) FROM endpoint_counters \
         GROUP BY endpoint_id ORDER BY endpoint_id",
        [],
    )
    .await?;
    rows.iter()
        .map(|row| {
            let positive = |i| -> Result<u64, StoreError> {
                Ok(u64::try_from(row.try_get_by_index::<i64>(i)?).unwrap_or(0))
            };
            let counts = LiveCounts { queued: positive(1)?, running: positive(2)? };
            Ok((EndpointId(row.try_get_by_index(0)?), counts))
        })
        .collect()
}

/// Endpoints whose counters are spread over more than `rows` rows of former and living processes.
///
/// # Errors
/// The database's.
pub async fn scattered_counters<C: ConnectionTrait>(
    conn: &C,
    rows: u32,
) -> Result<Vec<EndpointId>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT endpoint_id FROM endpoint_counters WHERE writer <> 0 GROUP BY endpoint_id HAVING COUNT(*) > $1",
        [sql::int(rows)],
    )
    .await?;
    rows.iter().map(|row| Ok(EndpointId(row.try_get_by_index(0)?))).collect()
}
