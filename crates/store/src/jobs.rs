//! Rows of `jobs`: read for the state machine, inserted by api-ingest, updated by the state-tracker (P8).

use std::collections::HashMap;

use ringback_contracts::{batch_id_of, history_append, job_id_of, targets_of, targets_to_bytes};
use ringback_domain::{
    BatchId, EndpointId, JobId, JobStatus, Nonce, ProjectId, TimestampMs,
    job::{EndReason, Ended, Job, JobState, Live},
    policy::Policy,
    target::Target,
};
use sea_orm::{ConnectionTrait, QueryResult, Value};

use crate::{
    StoreError, WriteTx,
    sql::{self, LIST, Rows, get_u32, get_u64},
};

/// A job with everything of its row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobRow {
    /// What the state machine works on.
    pub job: Job,
    /// Guards the update: rises with every write of the row.
    pub revision: i64,
    /// Owner.
    pub project: ProjectId,
    /// Queue.
    pub endpoint: EndpointId,
    /// Whether it waits in the slow lane (`policy.lowPriority`).
    pub low_priority: bool,
    /// Whether its public id carries `sync-`.
    pub sync_id: bool,
    /// Retry rules it was accepted with.
    pub policy: Policy,
    /// When it was accepted.
    pub submitted_at: TimestampMs,
    /// How long the row is kept after success.
    pub retain_completed_ms: u64,
    /// How long the row is kept after any other end.
    pub retain_failed_ms: u64,
    /// Where its webhooks go.
    pub targets: Vec<Target>,
    /// Encoded history; see [`Self::log_transition`].
    pub history: Vec<u8>,
    /// Its batch and its place there.
    pub batch: Option<(BatchId, u32)>,
    /// The client's own name for it within a batch.
    pub client_ref: Option<String>,
    /// Kept to answer a repeated submit.
    pub idempotency_key: Option<String>,
    /// Hash of the request that made it.
    pub request_hash: Option<Vec<u8>>,
    /// W3C traceparent of the submit.
    pub traceparent: Option<String>,
    /// The client's metadata, a small JSON object, verbatim.
    pub metadata: Option<Vec<u8>>,
    /// The id that the client gave its request, on endpoints of kind completion.
    pub request_id: Option<String>,
}

impl JobRow {
    /// Appends the newest transition of [`Self::job`] to the history.
    pub fn log_transition(&mut self, at: TimestampMs) {
        let (attempt, reason) = match &self.job.state {
            JobState::InQueue => (0, None),
            JobState::InProgress(live) => (live.attempt, None),
            JobState::Completed(e) | JobState::Failed(e) | JobState::Cancelled(e) | JobState::TimedOut(e) => {
                (e.attempt.unwrap_or(0), Some(e.reason))
            }
        };
        let (seq, run, status) = (self.job.seq, self.job.run, self.job.status());
        history_append(&mut self.history, seq, status, run, attempt, at.0, reason);
    }

    /// When the row is next looked at: limits and lease of a live job, retention of an ended one.
    #[must_use]
    pub fn next_check_at(&self, grace_ms: u64) -> Option<TimestampMs> {
        match self.job.state.ended() {
            None => self.job.next_check_at(grace_ms),
            Some(end) => {
                let keep = match self.job.status() {
                    JobStatus::Completed => self.retain_completed_ms,
                    JobStatus::InQueue
                    | JobStatus::InProgress
                    | JobStatus::Failed
                    | JobStatus::Cancelled
                    | JobStatus::TimedOut => self.retain_failed_ms,
                };
                Some(end.at.plus_ms(keep))
            }
        }
    }

    /// The id as clients see it.
    #[must_use]
    pub fn public_id(&self) -> String {
        self.job.id.public(self.sync_id)
    }
}

/// Columns in the order that [`read_row`] expects.
macro_rules! columns {
    () => {
        "id, project_id, endpoint_id, lane, sync_id, state, seq, revision, run, publish, last_attempt, failures, \
         max_attempts, retry_errors, submitted_at_ms, queued_at_ms, ttl_ms, ttl_at_ms, execution_timeout_ms, \
         attempt, nonce, worker_id, started_at_ms, delay_ms, execution_ms, lease_until_ms, ended_at_ms, end_reason, \
         retain_completed_ms, retain_failed_ms, owed, targets, history, batch_id, batch_index, client_ref, \
         idempotency_key, request_hash, traceparent, metadata, request_id"
    };
}

const SELECT: Rows = Rows {
    name: "jobs.select",
    before: concat!("SELECT ", columns!(), " FROM jobs WHERE id IN ("),
    casts: LIST,
    after: ") ORDER BY id",
};

const LOCK: Rows = Rows {
    name: "jobs.lock",
    before: concat!("SELECT ", columns!(), " FROM jobs WHERE id IN ("),
    casts: LIST,
    after: ") ORDER BY id FOR UPDATE",
};

/// Reads jobs by id; absent ones are missing from the map.
pub async fn select_jobs<C: ConnectionTrait>(
    conn: &C,
    ids: &[JobId],
) -> Result<HashMap<JobId, JobRow>, StoreError> {
    collect(SELECT.query(conn, ids, |id, v| v.push(sql::id(id.as_bytes()))).await?)
}

/// Reads jobs by id and holds their rows until the transaction ends. `ids` must be sorted and without repetition:
/// all writers lock in the same order.
pub async fn lock_jobs(tx: &WriteTx, ids: &[JobId]) -> Result<HashMap<JobId, JobRow>, StoreError> {
    debug_assert!(ids.is_sorted(), "rows are locked in sorted order");
    let rows = if tx.is_postgres() { &LOCK } else { &SELECT };
    collect(rows.query(tx.conn(), ids, |id, v| v.push(sql::id(id.as_bytes()))).await?)
}

fn collect(rows: Vec<QueryResult>) -> Result<HashMap<JobId, JobRow>, StoreError> {
    rows.iter().map(|row| read_row(row).map(|r| (r.job.id, r))).collect()
}

/// Reads one row of `columns!`.
fn read_row(row: &QueryResult) -> Result<JobRow, StoreError> {
    let status =
        JobStatus::from_code(row.try_get_by_index::<i64>(5)?).ok_or(StoreError::corrupt("jobs.state"))?;
    let targets: Vec<Target> = match row.try_get_by_index::<Option<Vec<u8>>>(31)? {
        Some(stored) => targets_of(&stored)?,
        None => Vec::new(),
    };
    let batch_id = batch_id_of(&row.try_get_by_index::<Option<Vec<u8>>>(33)?.unwrap_or_default())?;
    let batch = match batch_id {
        Some(id) => Some((id, get_u32(row, 34, "jobs.batch_index")?)),
        None => None,
    };
    let opt_u64 = |index, what| -> Result<Option<u64>, StoreError> {
        row.try_get_by_index::<Option<i64>>(index)?
            .map(|n| u64::try_from(n).map_err(|_| StoreError::corrupt(what)))
            .transpose()
    };
    let job = Job {
        id: job_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?,
        seq: get_u32(row, 6, "jobs.seq")?,
        run: get_u32(row, 8, "jobs.run")?,
        publish: get_u32(row, 9, "jobs.publish")?,
        last_attempt: get_u32(row, 10, "jobs.last_attempt")?,
        failures: get_u32(row, 11, "jobs.failures")?,
        queued_at: TimestampMs(row.try_get_by_index(15)?),
        ttl_ms: opt_u64(16, "jobs.ttl_ms")?,
        ttl_at: row.try_get_by_index::<Option<i64>>(17)?.map(TimestampMs),
        execution_timeout_ms: get_u64(row, 18, "jobs.execution_timeout_ms")?,
        scopes: targets.iter().map(|t| t.scope).collect(),
        owed: get_u32(row, 30, "jobs.owed")?,
        state: read_state(row, status)?,
    };
    Ok(JobRow {
        job,
        revision: row.try_get_by_index(7)?,
        project: ProjectId(row.try_get_by_index(1)?),
        endpoint: EndpointId(row.try_get_by_index(2)?),
        low_priority: row.try_get_by_index::<i64>(3)? != 0,
        sync_id: row.try_get_by_index::<i64>(4)? != 0,
        policy: Policy {
            max_attempts: get_u32(row, 12, "jobs.max_attempts")?,
            retry_errors: row.try_get_by_index::<i64>(13)? != 0,
        },
        submitted_at: TimestampMs(row.try_get_by_index(14)?),
        retain_completed_ms: get_u64(row, 28, "jobs.retain_completed_ms")?,
        retain_failed_ms: get_u64(row, 29, "jobs.retain_failed_ms")?,
        targets,
        history: row.try_get_by_index(32)?,
        batch,
        client_ref: row.try_get_by_index(35)?,
        idempotency_key: row.try_get_by_index(36)?,
        request_hash: row.try_get_by_index(37)?,
        traceparent: row.try_get_by_index(38)?,
        metadata: row.try_get_by_index(39)?,
        request_id: row.try_get_by_index(40)?,
    })
}

fn read_state(row: &QueryResult, status: JobStatus) -> Result<JobState, StoreError> {
    let live = || -> Result<Live, StoreError> {
        Ok(Live {
            attempt: get_u32(row, 19, "jobs.attempt")?,
            nonce: Nonce(row.try_get_by_index::<i64>(20)?.cast_unsigned()),
            worker: row.try_get_by_index(21)?,
            started_at: TimestampMs(row.try_get_by_index(22)?),
            delay_ms: get_u64(row, 23, "jobs.delay_ms")?,
            lease_until: TimestampMs(row.try_get_by_index(25)?),
        })
    };
    let ended = || -> Result<Ended, StoreError> {
        let attempt = row.try_get_by_index::<Option<i64>>(19)?;
        let attempt = attempt.map(|n| u32::try_from(n).map_err(|_| StoreError::corrupt("jobs.attempt")));
        Ok(Ended {
            attempt: attempt.transpose()?,
            at: TimestampMs(row.try_get_by_index(26)?),
            delay_ms: get_u64(row, 23, "jobs.delay_ms")?,
            execution_ms: get_u64(row, 24, "jobs.execution_ms")?,
            reason: EndReason::from_code(row.try_get_by_index(27)?)
                .ok_or(StoreError::corrupt("jobs.end_reason"))?,
        })
    };
    Ok(match status {
        JobStatus::InQueue => JobState::InQueue,
        JobStatus::InProgress => JobState::InProgress(live()?),
        JobStatus::Completed => JobState::Completed(ended()?),
        JobStatus::Failed => JobState::Failed(ended()?),
        JobStatus::Cancelled => JobState::Cancelled(ended()?),
        JobStatus::TimedOut => JobState::TimedOut(ended()?),
    })
}

/// The columns that depend on the state.
struct StateColumns {
    attempt: Option<i64>,
    nonce: Option<i64>,
    worker_id: Option<String>,
    started_at_ms: Option<i64>,
    delay_ms: u64,
    execution_ms: u64,
    lease_until_ms: Option<i64>,
    ended_at_ms: Option<i64>,
    end_reason: Option<i64>,
}

impl StateColumns {
    /// In the order of the columns.
    fn values(self) -> [Value; 9] {
        [
            Value::from(self.attempt),
            Value::from(self.nonce),
            Value::from(self.worker_id),
            Value::from(self.started_at_ms),
            sql::int(self.delay_ms),
            sql::int(self.execution_ms),
            Value::from(self.lease_until_ms),
            Value::from(self.ended_at_ms),
            Value::from(self.end_reason),
        ]
    }
}

fn state_columns(state: &JobState) -> StateColumns {
    let mut c = StateColumns {
        attempt: None,
        nonce: None,
        worker_id: None,
        started_at_ms: None,
        delay_ms: 0,
        execution_ms: 0,
        lease_until_ms: None,
        ended_at_ms: None,
        end_reason: None,
    };
    match state {
        JobState::InQueue => {}
        JobState::InProgress(live) => {
            c.attempt = Some(i64::from(live.attempt));
            c.nonce = Some(live.nonce.0.cast_signed());
            c.worker_id = Some(live.worker.clone());
            c.started_at_ms = Some(live.started_at.0);
            c.delay_ms = live.delay_ms;
            c.lease_until_ms = Some(live.lease_until.0);
        }
        JobState::Completed(e) | JobState::Failed(e) | JobState::Cancelled(e) | JobState::TimedOut(e) => {
            c.attempt = e.attempt.map(i64::from);
            c.delay_ms = e.delay_ms;
            c.execution_ms = e.execution_ms;
            c.ended_at_ms = Some(e.at.0);
            c.end_reason = Some(i64::from(e.reason.code()));
        }
    }
    c
}

fn nothing_if_empty(targets: &[Target]) -> Option<Vec<u8>> {
    if targets.is_empty() { None } else { Some(targets_to_bytes(targets)) }
}

pub(crate) const INSERT: Rows = Rows {
    name: "jobs.insert",
    before: concat!("INSERT INTO jobs (", columns!(), ", next_check_at_ms) VALUES "),
    casts: &[""; 42],
    after: "",
};

/// Inserts new jobs, each as [`ringback_domain::job::submit`] left it. A known id or idempotency key of any row
/// fails the whole call with [`StoreError::Duplicate`].
pub async fn insert_jobs(tx: &WriteTx, rows: &[JobRow], grace_ms: u64) -> Result<(), StoreError> {
    INSERT.execute(tx.conn(), rows, |r, v| insert_values(r, grace_ms, v)).await?;
    Ok(())
}

/// One row of [`INSERT`].
pub(crate) fn insert_values(r: &JobRow, grace_ms: u64, v: &mut Vec<Value>) {
    let s = state_columns(&r.job.state);
    v.extend([
        sql::id(r.job.id.as_bytes()),
        Value::from(r.project.0),
        Value::from(r.endpoint.0),
        Value::from(i64::from(r.low_priority)),
        Value::from(i64::from(r.sync_id)),
        sql::int(r.job.status().code()),
        sql::int(r.job.seq),
        Value::from(r.revision),
        sql::int(r.job.run),
        sql::int(r.job.publish),
        sql::int(r.job.last_attempt),
        sql::int(r.job.failures),
        sql::int(r.policy.max_attempts),
        Value::from(i64::from(r.policy.retry_errors)),
        Value::from(r.submitted_at.0),
        Value::from(r.job.queued_at.0),
        sql::opt_int(r.job.ttl_ms),
        Value::from(r.job.ttl_at.map(|t| t.0)),
        sql::int(r.job.execution_timeout_ms),
    ]);
    v.extend(s.values());
    v.extend([
        sql::int(r.retain_completed_ms),
        sql::int(r.retain_failed_ms),
        sql::int(r.job.owed),
        Value::from(nothing_if_empty(&r.targets)),
        Value::from(r.history.clone()),
        Value::from(r.batch.map(|(id, _)| id.as_bytes().to_vec())),
        sql::opt_int(r.batch.map(|(_, index)| index)),
        Value::from(r.client_ref.clone()),
        Value::from(r.idempotency_key.clone()),
        Value::from(r.request_hash.clone()),
        Value::from(r.traceparent.clone()),
        Value::from(r.metadata.clone()),
        Value::from(r.request_id.clone()),
        Value::from(r.next_check_at(grace_ms).map(|t| t.0)),
    ]);
}

const UPDATE: Rows = Rows {
    name: "jobs.update",
    before: "UPDATE jobs SET state = v.column3, seq = v.column4, revision = jobs.revision + 1, run = v.column5, \
             publish = v.column6, last_attempt = v.column7, failures = v.column8, queued_at_ms = v.column9, \
             ttl_at_ms = v.column10, attempt = v.column11, nonce = v.column12, worker_id = v.column13, \
             started_at_ms = v.column14, delay_ms = v.column15, execution_ms = v.column16, \
             lease_until_ms = v.column17, ended_at_ms = v.column18, end_reason = v.column19, \
             next_check_at_ms = v.column20, owed = v.column21, history = v.column22 FROM (VALUES ",
    casts: &[
        "bytea", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint",
        "bigint", "bigint", "text", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint",
        "bigint", "bytea",
    ],
    after: ") AS v WHERE jobs.id = v.column1 AND jobs.revision = v.column2",
};

/// Writes jobs that the state machine changed, each guarded by the revision it was read with. Answers whether
/// all rows were written; if not, somebody else wrote one of them and the caller must read and decide again.
pub async fn update_jobs(tx: &WriteTx, rows: &[JobRow], grace_ms: u64) -> Result<bool, StoreError> {
    let written = UPDATE
        .execute(tx.conn(), rows, |r, v| {
            let s = state_columns(&r.job.state);
            v.extend([
                sql::id(r.job.id.as_bytes()),
                Value::from(r.revision),
                sql::int(r.job.status().code()),
                sql::int(r.job.seq),
                sql::int(r.job.run),
                sql::int(r.job.publish),
                sql::int(r.job.last_attempt),
                sql::int(r.job.failures),
                Value::from(r.job.queued_at.0),
                Value::from(r.job.ttl_at.map(|t| t.0)),
            ]);
            v.extend(s.values());
            v.extend([
                Value::from(r.next_check_at(grace_ms).map(|t| t.0)),
                sql::int(r.job.owed),
                Value::from(r.history.clone()),
            ]);
        })
        .await?;
    Ok(written == rows.len() as u64)
}
