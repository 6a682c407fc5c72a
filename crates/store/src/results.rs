//! How runs and attempts ended: rows written by the state-tracker in the transaction of the transition (P2, P3).

use std::sync::Arc;

use bytes::Bytes;
use ringback_domain::{
    JobId, JobStatus, Nonce, TimestampMs,
    event::Completion,
    job::{EndReason, Ended},
};
use sea_orm::Value;

use crate::{
    StoreError, WriteTx,
    sql::{self, Rows},
};

/// A payload as it is stored: in the row, or in the blob store by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredPayload {
    /// The bytes, where they are small.
    pub inline: Option<Bytes>,
    /// The key of the blob, where they are not.
    pub blob_key: Option<String>,
    /// Their number in either place.
    pub size_bytes: u64,
    /// What an output in a blob says of a completion, as its worker told. It is not stored.
    pub said: Option<Arc<Completion>>,
}

/// The result of a run.
#[derive(Clone, Debug)]
pub struct NewResult {
    /// The job.
    pub job: JobId,
    /// The run.
    pub run: u32,
    /// The terminal state.
    pub status: JobStatus,
    /// How it ended.
    pub end: Ended,
    /// Who ran the recorded attempt.
    pub worker: Option<String>,
    /// When the recorded attempt started.
    pub started_at: Option<TimestampMs>,
    /// What the handler gave back.
    pub output: StoredPayload,
    /// Why it did not complete.
    pub error: Option<String>,
    /// Class of the error, where the handler told one.
    pub error_type: Option<String>,
    /// Captured log.
    pub logs: StoredPayload,
}

const INSERT_RESULT: Rows = Rows {
    name: "results.insert",
    before: "INSERT INTO results (job_id, run, state, reason, attempt, worker_id, started_at_ms, ended_at_ms, \
             delay_ms, execution_ms, output, output_blob_key, output_bytes, error, error_type, logs, logs_blob_key) \
             VALUES ",
    casts: &[""; 17],
    after: " ON CONFLICT (job_id, run) DO NOTHING",
};

/// Inserts results. One that exists is never changed (P2).
///
/// # Errors
/// The database's.
pub async fn insert_results(tx: &WriteTx, rows: &[NewResult]) -> Result<(), StoreError> {
    INSERT_RESULT
        .execute(tx.conn(), rows, |r, v| {
            v.extend([
                sql::id(r.job.as_bytes()),
                sql::int(r.run),
                sql::int(r.status.code()),
                sql::int(r.end.reason.code()),
                sql::opt_int(r.end.attempt),
                Value::from(r.worker.clone()),
                Value::from(r.started_at.map(|t| t.0)),
                Value::from(r.end.at.0),
                sql::int(r.end.delay_ms),
                sql::int(r.end.execution_ms),
                Value::from(r.output.inline.as_ref().map(|b| b.to_vec())),
                Value::from(r.output.blob_key.clone()),
                sql::int(r.output.size_bytes),
                Value::from(r.error.clone()),
                Value::from(r.error_type.clone()),
                Value::from(r.logs.inline.as_ref().map(|b| b.to_vec())),
                Value::from(r.logs.blob_key.clone()),
            ]);
        })
        .await?;
    Ok(())
}

/// An attempt that did not end its run well, or whose word came too late.
#[derive(Clone, Debug)]
pub struct NewAttempt {
    /// The job.
    pub job: JobId,
    /// The run.
    pub run: u32,
    /// The attempt.
    pub attempt: u32,
    /// Its random number.
    pub nonce: Nonce,
    /// How it ended, by its own word or by ours.
    pub reason: EndReason,
    /// Who ran it.
    pub worker: String,
    /// When it was written down.
    pub at: TimestampMs,
    /// How long it ran, 0 where nobody knows.
    pub execution_ms: u64,
    /// For people.
    pub detail: Option<String>,
    /// Captured log.
    pub logs: Option<Bytes>,
}

const INSERT_ATTEMPT: Rows = Rows {
    name: "attempts.insert",
    before: "INSERT INTO attempts (job_id, run, attempt, nonce, reason, late, worker_id, ended_at_ms, execution_ms, \
             detail, logs) VALUES ",
    casts: &[""; 11],
    after: " ON CONFLICT (job_id, run, attempt, nonce, late) DO NOTHING",
};

/// What is told late is written once, and not at all where it only repeats what was recorded in time: the sender of
/// an outcome repeats it until it hears the answer.
const INSERT_LATE: Rows = Rows {
    name: "attempts.insert_late",
    before: "INSERT INTO attempts (job_id, run, attempt, nonce, reason, late, worker_id, ended_at_ms, execution_ms, \
             detail, logs) \
             SELECT v.column1, v.column2, v.column3, v.column4, v.column5, v.column6, v.column7, v.column8, \
             v.column9, v.column10, v.column11 FROM (VALUES ",
    casts: &[
        "bytea", "bigint", "bigint", "bigint", "bigint", "bigint", "text", "bigint", "bigint", "text",
        "bytea",
    ],
    after: ") AS v WHERE NOT EXISTS (SELECT 1 FROM attempts a WHERE a.job_id = v.column1 AND a.run = v.column2 \
            AND a.attempt = v.column3 AND a.nonce = v.column4 AND a.reason = v.column5) \
            AND NOT EXISTS (SELECT 1 FROM results r WHERE r.job_id = v.column1 AND r.run = v.column2 \
            AND r.attempt = v.column3 AND r.reason = v.column5) \
            ON CONFLICT (job_id, run, attempt, nonce, late) DO NOTHING",
};

/// Inserts closed attempts.
///
/// # Errors
/// The database's.
pub async fn insert_attempts(tx: &WriteTx, rows: &[NewAttempt]) -> Result<(), StoreError> {
    INSERT_ATTEMPT.execute(tx.conn(), rows, |r, v| attempt_values(r, false, v)).await?;
    Ok(())
}

/// Inserts words that came too late (P3).
///
/// # Errors
/// The database's.
pub async fn insert_late(tx: &WriteTx, rows: &[NewAttempt]) -> Result<(), StoreError> {
    INSERT_LATE.execute(tx.conn(), rows, |r, v| attempt_values(r, true, v)).await?;
    Ok(())
}

fn attempt_values(r: &NewAttempt, late: bool, v: &mut Vec<Value>) {
    v.extend([
        sql::id(r.job.as_bytes()),
        sql::int(r.run),
        sql::int(r.attempt),
        Value::from(r.nonce.0.cast_signed()),
        sql::int(r.reason.code()),
        Value::from(i64::from(late)),
        Value::from(r.worker.clone()),
        Value::from(r.at.0),
        sql::int(r.execution_ms),
        Value::from(r.detail.clone()),
        Value::from(r.logs.as_ref().map(|b| b.to_vec())),
    ]);
}
