//! Workers: their last word, and the leases that their heartbeats renew.

use std::collections::HashMap;

use ringback_contracts::job_id_of;
use ringback_domain::{AttemptRef, JobId, Nonce, TimestampMs};
use sea_orm::{ConnectionTrait, QueryResult, Value};

use crate::{
    StoreError, WriteTx,
    sql::{self, LIST, Rows},
};

const RENEW_POSTGRES: Rows = Rows {
    name: "jobs.renew.postgres",
    before: "UPDATE jobs SET lease_until_ms = v.column5, revision = jobs.revision + 1, \
             next_check_at_ms = LEAST(COALESCE(jobs.ttl_at_ms, v.column5), \
             jobs.started_at_ms + jobs.execution_timeout_ms + v.column6, v.column5) FROM (VALUES ",
    casts: RENEW_CASTS,
    after: RENEW_WHERE,
};

const RENEW_SQLITE: Rows = Rows {
    name: "jobs.renew.sqlite",
    before: "UPDATE jobs SET lease_until_ms = v.column5, revision = jobs.revision + 1, \
             next_check_at_ms = MIN(COALESCE(jobs.ttl_at_ms, v.column5), \
             jobs.started_at_ms + jobs.execution_timeout_ms + v.column6, v.column5) FROM (VALUES ",
    casts: RENEW_CASTS,
    after: RENEW_WHERE,
};

const RENEW_CASTS: &[&str] = &["bytea", "bigint", "bigint", "bigint", "bigint", "bigint"];

const RENEW_WHERE: &str = ") AS v WHERE jobs.id = v.column1 AND jobs.state = 1 AND jobs.run = v.column2 \
                           AND jobs.attempt = v.column3 AND jobs.nonce = v.column4 \
                           AND jobs.lease_until_ms <= v.column5 RETURNING id, run, attempt, nonce";

/// Renews the leases of live attempts; answers those that are live. The condition is the fence of P3,
/// so this equals `JobEvent::Heartbeat` of the state machine; everything it does not hit is left to that.
///
/// # Errors
/// The database's.
pub async fn renew_leases(
    tx: &WriteTx,
    attempts: &[(JobId, AttemptRef)],
    lease_until: TimestampMs,
    grace_ms: u64,
) -> Result<HashMap<JobId, AttemptRef>, StoreError> {
    let rows = if tx.is_postgres() { &RENEW_POSTGRES } else { &RENEW_SQLITE };
    let renewed = rows
        .query(tx.conn(), attempts, |(job, r), v| {
            v.extend([
                sql::id(job.as_bytes()),
                sql::int(r.run),
                sql::int(r.attempt),
                Value::from(r.nonce.0.cast_signed()),
                Value::from(lease_until.0),
                sql::int(grace_ms),
            ]);
        })
        .await?;
    renewed
        .iter()
        .map(|row| {
            let r = AttemptRef {
                run: sql::get_u32(row, 1, "jobs.run")?,
                attempt: sql::get_u32(row, 2, "jobs.attempt")?,
                nonce: Nonce(row.try_get_by_index::<i64>(3)?.cast_unsigned()),
            };
            Ok((first_id(row)?, r))
        })
        .collect()
}

fn first_id(row: &QueryResult) -> Result<JobId, StoreError> {
    Ok(job_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?)
}

const LIVE_OF: Rows = Rows {
    name: "jobs.live_of_workers",
    before: "SELECT id FROM jobs WHERE state < 2 AND state = 1 AND worker_id IN (",
    casts: LIST,
    after: ") ORDER BY id",
};

/// Jobs whose live attempt is held by one of these workers. Reads all live rows: for the start of a worker, not for
/// each of its heartbeats.
///
/// # Errors
/// The database's.
pub async fn live_jobs_of<C: ConnectionTrait>(
    conn: &C,
    workers: &[String],
) -> Result<Vec<JobId>, StoreError> {
    let rows = LIVE_OF.query(conn, workers, |w, v| v.push(Value::from(w.as_str()))).await?;
    rows.iter().map(first_id).collect()
}

/// What a full heartbeat says about its worker.
#[derive(Clone, Debug)]
pub struct WorkerBeat {
    /// Its id.
    pub id: String,
    /// Whether it takes no more jobs.
    pub draining: bool,
    /// What it computes on.
    pub device: String,
    /// Its slots per endpoint, a JSON array.
    pub slots: String,
}

const UPSERT: Rows = Rows {
    name: "workers.upsert",
    before: "INSERT INTO workers (id, last_beat_ms, draining, device, slots) VALUES ",
    casts: &[""; 5],
    after: " ON CONFLICT (id) DO UPDATE SET last_beat_ms = excluded.last_beat_ms, draining = excluded.draining, \
            device = excluded.device, slots = excluded.slots",
};

/// Writes down that workers live. `beats` must name each worker once.
///
/// # Errors
/// The database's.
pub async fn upsert_workers(tx: &WriteTx, beats: &[WorkerBeat]) -> Result<(), StoreError> {
    let now = tx.now_ms();
    UPSERT
        .execute(tx.conn(), beats, |b, v| {
            v.extend([
                Value::from(b.id.as_str()),
                Value::from(now),
                Value::from(i64::from(b.draining)),
                Value::from(b.device.as_str()),
                Value::from(b.slots.as_str()),
            ]);
        })
        .await?;
    Ok(())
}

/// Removes workers that were not heard of since `before_ms`; answers how many.
///
/// # Errors
/// The database's.
pub async fn forget_workers(tx: &WriteTx, before_ms: i64) -> Result<u64, StoreError> {
    sql::execute(tx.conn(), "DELETE FROM workers WHERE last_beat_ms < $1", [Value::from(before_ms)]).await
}

/// Workers that were heard of since `since_ms`.
///
/// # Errors
/// The database's.
pub async fn living_workers<C: ConnectionTrait>(conn: &C, since_ms: i64) -> Result<u64, StoreError> {
    let row = sql::query_one(
        conn,
        "SELECT COUNT(*) FROM workers WHERE last_beat_ms >= $1",
        [Value::from(since_ms)],
    )
    .await?;
    row.map_or(Ok(0), |row| sql::get_u64(&row, 0, "count"))
}

/// When a worker was last heard of, if it is known.
///
/// # Errors
/// The database's.
pub async fn last_beat_ms<C: ConnectionTrait>(conn: &C, worker: &str) -> Result<Option<i64>, StoreError> {
    let row =
        sql::query_one(conn, "SELECT last_beat_ms FROM workers WHERE id = $1", [Value::from(worker)]).await?;
    row.map(|row| Ok(row.try_get_by_index(0)?)).transpose()
}
