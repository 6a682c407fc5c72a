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
    let (after_ms, after_id) =
        after.map_or((i64::MIN, Vec::new()), |a| (a.at.0, a.id.as_bytes().to_vec()));
    let rows = sql::query(
        conn,
        "SELECT id, next_check_at_ms FROM jobs WHERE next_check_at_ms <= $1 AND next_check_at_ms >= $2 \
         AND state < 2 AND (next_check_at_ms > $2 OR id > $3) ORDER BY next_check_at_ms, id LIMIT $4",
        [Value::from(now_ms), Value::from(after_ms), Value::from(after_id), sql::int(limit)],
    )
    .await?;
    rows.iter()
        .map(|row| Ok(DueJob { id: job_id(row, 0)?, at: TimestampMs(row.try_get_by_index(1)?) }))
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
pub async fn endpoint_name<C: ConnectionTrait>(conn: &C, id: EndpointId) -> Result<Option<String>, StoreError> {
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
        .map(|row| batch_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?.ok_or(StoreError::corrupt("batches.id")))
        .collect()
}

/// Partitions with pending deliveries and no living owner: when their oldest delivery became due.
///
/// # Errors
/// The database's.
pub async fn unowned_partitions<C: ConnectionTrait>(
    conn: &C,
    now_ms: i64,
    partitions: u16,
) -> Result<Vec<(u16, i64)>, StoreError> {
    let mut unowned = Vec::new();
    for partition in 0..partitions.max(1) {
        let row = sql::query_one(
            conn,
            "SELECT MIN(next_attempt_at_ms) FROM deliveries WHERE partition = $1 AND state = 0 \
             AND NOT EXISTS (SELECT 1 FROM partition_leases l WHERE l.partition = $1 AND l.owner <> '' \
             AND l.expires_at_ms > $2)",
            [sql::int(partition), Value::from(now_ms)],
        )
        .await?;
        let oldest: Option<i64> = row.map(|row| row.try_get_by_index(0)).transpose()?.flatten();
        if let Some(oldest) = oldest {
            unowned.push((partition, oldest));
        }
    }
    Ok(unowned)
}
