//! Pieces of output and progress values, written by the state-tracker for live attempts.

use bytes::Bytes;
use ringback_domain::JobId;
use sea_orm::Value;

use crate::{
    StoreError, WriteTx,
    sql::{self, Rows},
};

/// A piece of output.
#[derive(Clone, Debug)]
pub struct NewChunk {
    /// The job.
    pub job: JobId,
    /// The run.
    pub run: u32,
    /// The attempt.
    pub attempt: u32,
    /// From 0, without gaps within the attempt.
    pub n: u32,
    /// Verbatim JSON.
    pub output: Bytes,
}

const INSERT: Rows = Rows {
    name: "chunks.insert",
    before: "INSERT INTO chunks (job_id, run, attempt, n, output, at_ms) VALUES ",
    casts: &[""; 6],
    after: " ON CONFLICT (job_id, run, attempt, n) DO NOTHING",
};

/// Inserts pieces; those that are there already stay as they are.
///
/// # Errors
/// The database's.
pub async fn insert_chunks(tx: &WriteTx, rows: &[NewChunk]) -> Result<(), StoreError> {
    let now = tx.now_ms();
    INSERT
        .execute(tx.conn(), rows, |r, v| {
            v.extend([
                sql::id(r.job.as_bytes()),
                sql::int(r.run),
                sql::int(r.attempt),
                sql::int(r.n),
                Value::from(r.output.to_vec()),
                Value::from(now),
            ]);
        })
        .await?;
    Ok(())
}

/// A progress value.
#[derive(Clone, Debug)]
pub struct NewProgress {
    /// The job.
    pub job: JobId,
    /// The run.
    pub run: u32,
    /// The attempt.
    pub attempt: u32,
    /// Verbatim JSON.
    pub value: Bytes,
}

const UPSERT: Rows = Rows {
    name: "job_progress.upsert",
    before: "INSERT INTO job_progress (job_id, run, attempt, value, at_ms) VALUES ",
    casts: &[""; 5],
    after: " ON CONFLICT (job_id) DO UPDATE SET run = excluded.run, attempt = excluded.attempt, \
            value = excluded.value, at_ms = excluded.at_ms",
};

/// Keeps the newest progress value of each job. `rows` must name each job once.
///
/// # Errors
/// The database's.
pub async fn upsert_progress(tx: &WriteTx, rows: &[NewProgress]) -> Result<(), StoreError> {
    let now = tx.now_ms();
    UPSERT
        .execute(tx.conn(), rows, |r, v| {
            v.extend([
                sql::id(r.job.as_bytes()),
                sql::int(r.run),
                sql::int(r.attempt),
                Value::from(r.value.to_vec()),
                Value::from(now),
            ]);
        })
        .await?;
    Ok(())
}
