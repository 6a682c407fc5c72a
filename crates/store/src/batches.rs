//! Batches: made in chunks by api-ingest and opened at once; counted and ended by the state-tracker (P8).

use ringback_contracts::{batch_id_of, job_id_of, v1};
use ringback_domain::{
    BatchId, EndpointId, JobId, JobStatus, ProjectId, TimestampMs,
    batch::{BatchCounts, BatchStatus, CancelMarker},
    usage::Metric,
};
use sea_orm::{ConnectionTrait, QueryResult, Value};

use crate::{
    StoreError, WriteTx, batches_fold,
    sql::{self, get_u32},
    submit::{Refused, uses_tokens},
    usage::Counting,
};

/// A batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchRow {
    /// Its id.
    pub id: BatchId,
    /// Owner.
    pub project: ProjectId,
    /// Queue of its jobs.
    pub endpoint: EndpointId,
    /// When it was accepted; `None` while its jobs are being inserted.
    pub opened_at: Option<TimestampMs>,
    /// Its counts.
    pub counts: BatchCounts,
    /// Its status.
    pub status: BatchStatus,
    /// Whether a failure cancels the rest.
    pub cancel_rest: bool,
    /// Why the rest is being cancelled.
    pub cancel_marker: CancelMarker,
    /// Where its one body goes.
    pub callback_url: Option<String>,
    /// Route of the template that made it.
    pub template: Option<String>,
    /// The client's `metadata`, verbatim JSON.
    pub metadata: Option<Vec<u8>>,
    /// When its first row was written.
    pub created_at: TimestampMs,
    /// When the last of its jobs ended.
    pub ended_at: Option<TimestampMs>,
    /// Hash of the request that made it.
    pub request_hash: Option<Vec<u8>>,
}

const COLUMNS: &str = "id, project_id, endpoint_id, opened_at_ms, status, total, completed, failed, cancelled, \
                       cancel_rest, cancel_marker, callback_url, template, metadata, created_at_ms, ended_at_ms, \
                       request_hash";

fn read_batch(row: &QueryResult) -> Result<BatchRow, StoreError> {
    Ok(BatchRow {
        id: batch_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?.ok_or(StoreError::corrupt("batches.id"))?,
        project: ProjectId(row.try_get_by_index(1)?),
        endpoint: EndpointId(row.try_get_by_index(2)?),
        opened_at: row.try_get_by_index::<Option<i64>>(3)?.map(TimestampMs),
        status: BatchStatus::from_code(row.try_get_by_index(4)?)
            .ok_or(StoreError::corrupt("batches.status"))?,
        counts: BatchCounts {
            total: get_u32(row, 5, "batches.total")?,
            completed: get_u32(row, 6, "batches.completed")?,
            failed: get_u32(row, 7, "batches.failed")?,
            cancelled: get_u32(row, 8, "batches.cancelled")?,
        },
        cancel_rest: row.try_get_by_index::<i64>(9)? != 0,
        cancel_marker: CancelMarker::from_code(row.try_get_by_index(10)?)
            .ok_or(StoreError::corrupt("batches.cancel_marker"))?,
        callback_url: row.try_get_by_index(11)?,
        template: row.try_get_by_index(12)?,
        metadata: row.try_get_by_index(13)?,
        created_at: TimestampMs(row.try_get_by_index(14)?),
        ended_at: row.try_get_by_index::<Option<i64>>(15)?.map(TimestampMs),
        request_hash: row.try_get_by_index(16)?,
    })
}

/// A batch to be made.
#[derive(Clone, Debug)]
pub struct NewBatch {
    /// New id.
    pub id: BatchId,
    /// Owner.
    pub project: ProjectId,
    /// Queue of its jobs.
    pub endpoint: EndpointId,
    /// Number of its jobs.
    pub total: u32,
    /// Whether a failure cancels the rest.
    pub cancel_rest: bool,
    /// Where its one body goes.
    pub callback_url: Option<String>,
    /// Whether that body is Runflow's.
    pub callback_runflow: bool,
    /// Route of the template that made it.
    pub template: Option<String>,
    /// The client's `metadata`, verbatim JSON.
    pub metadata: Option<Vec<u8>>,
    /// Makes a repeated submit harmless; unique per project.
    pub idempotency_key: Option<String>,
    /// Hash of the request.
    pub request_hash: Option<Vec<u8>>,
    /// W3C traceparent of the submit.
    pub traceparent: Option<String>,
}

/// How long an unopened batch may live: then whoever was inserting its jobs is gone and the reconciler removes it.
pub const UNOPENED_LIFE_MS: u64 = 600_000;

/// What became of a new batch.
#[derive(Clone, Debug)]
pub enum BatchStart {
    /// Its row is there; nobody sees it yet. With what webhooks are owed for quotas.
    Made(Vec<v1::Delivery>),
    /// A batch has its idempotency key already; nothing was inserted.
    Known(Box<BatchRow>),
    /// Its project has no room for all of its jobs in a quota; nothing was inserted.
    Refused(Box<Refused>),
}

/// Makes the row of a batch that nobody sees yet, and counts all its jobs against the quotas of its project.
///
/// # Errors
/// [`StoreError::Duplicate`] when another process inserted the key meanwhile: try again.
pub async fn insert_batch(tx: &WriteTx, partitions: u16, new: &NewBatch) -> Result<BatchStart, StoreError> {
    if let Some(key) = &new.idempotency_key
        && let Some(known) = batch_by_key(tx.conn(), new.project, key).await?
    {
        return Ok(BatchStart::Known(Box::new(known)));
    }
    let registry = tx.registry().await?;
    let mut counting = Counting::open(tx, Metric::ALL.into_iter().map(|m| (new.project, m))).await?;
    let room = counting.take_jobs(new.project, u64::from(new.total), uses_tokens(&registry, new.endpoint));
    let told = counting.close(tx, partitions).await?;
    if let Err(over) = room {
        return Ok(BatchStart::Refused(Box::new(Refused { over, deliveries: told })));
    }
    let now = TimestampMs(tx.now_ms());
    sql::execute(
        tx.conn(),
        "INSERT INTO batches (id, project_id, endpoint_id, opened_at_ms, revision, seq, status, total, completed, \
         failed, cancelled, cancel_rest, cancel_marker, cancel_done, callback_url, template, metadata, created_at_ms, \
         ended_at_ms, next_check_at_ms, idempotency_key, request_hash, owed, traceparent, callback_format) \
         VALUES ($1, $2, $3, NULL, 1, 0, $4, $5, 0, 0, 0, $6, $7, 0, $8, $9, $10, $11, NULL, $12, $13, $14, 0, $15, $16)",
        [
            sql::id(new.id.as_bytes()),
            Value::from(new.project.0),
            Value::from(new.endpoint.0),
            sql::int(BatchStatus::InProgress.code()),
            sql::int(new.total),
            Value::from(i64::from(new.cancel_rest)),
            sql::int(CancelMarker::None.code()),
            Value::from(new.callback_url.clone()),
            Value::from(new.template.clone()),
            Value::from(new.metadata.clone()),
            Value::from(now.0),
            Value::from(now.plus_ms(UNOPENED_LIFE_MS).0),
            Value::from(new.idempotency_key.clone()),
            Value::from(new.request_hash.clone()),
            Value::from(new.traceparent.clone()),
            Value::from(i64::from(new.callback_runflow)),
        ],
    )
    .await?;
    Ok(BatchStart::Made(told))
}

/// Opens a batch: from this commit on it is accepted (P1) and its jobs exist for clients. Answers what is announced
/// after the commit, or `None` where the batch was opened before or is given up (its life is over or somebody took its
/// idempotency key): some of its jobs may be removed already, so it must never open.
pub async fn open_batch(
    tx: &WriteTx,
    partitions: u16,
    id: BatchId,
) -> Result<Option<Vec<v1::Delivery>>, StoreError> {
    let opened = sql::execute(
        tx.conn(),
        "UPDATE batches SET opened_at_ms = $2, next_check_at_ms = NULL, revision = revision + 1 \
         WHERE id = $1 AND opened_at_ms IS NULL AND next_check_at_ms > $2",
        [sql::id(id.as_bytes()), Value::from(tx.now_ms())],
    )
    .await?;
    if opened != 1 {
        return Ok(None);
    }
    // Held until now: nobody has sent them. Released here, they are found in SQL even if their announcement is lost or
    // comes after that of a later transition.
    sql::execute(
        tx.conn(),
        "UPDATE deliveries SET next_attempt_at_ms = $2, position = $3 \
         WHERE owner_id IN (SELECT id FROM jobs WHERE batch_id = $1) AND state = 0 AND next_attempt_at_ms > $2",
        [sql::id(id.as_bytes()), Value::from(tx.now_ms()), Value::from(tx.position().await?)],
    )
    .await?;
    batches_fold::tell_created(tx, partitions, id).await.map(Some)
}

/// Gives an unopened batch up: its idempotency key is free again, and the reconciler removes its rows. Answers false
/// where it was opened meanwhile.
pub async fn give_up_batch(tx: &WriteTx, id: BatchId) -> Result<bool, StoreError> {
    let given_up = sql::execute(
        tx.conn(),
        "UPDATE batches SET idempotency_key = NULL, next_check_at_ms = $2, revision = revision + 1 \
         WHERE id = $1 AND opened_at_ms IS NULL",
        [sql::id(id.as_bytes()), Value::from(tx.now_ms())],
    )
    .await?;
    Ok(given_up == 1)
}

/// A batch by its id.
pub async fn batch<C: ConnectionTrait>(conn: &C, id: BatchId) -> Result<Option<BatchRow>, StoreError> {
    let row = sql::query_one(
        conn,
        &format!("SELECT {COLUMNS} FROM batches WHERE id = $1"),
        [sql::id(id.as_bytes())],
    )
    .await?;
    row.as_ref().map(read_batch).transpose()
}

/// The batch of an idempotency key.
pub async fn batch_by_key<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    key: &str,
) -> Result<Option<BatchRow>, StoreError> {
    let row = sql::query_one(
        conn,
        &format!("SELECT {COLUMNS} FROM batches WHERE project_id = $1 AND idempotency_key = $2"),
        [Value::from(project.0), Value::from(key)],
    )
    .await?;
    row.as_ref().map(read_batch).transpose()
}

/// Whether a batch was opened; `None` where it does not exist.
pub async fn is_open<C: ConnectionTrait>(conn: &C, id: BatchId) -> Result<Option<bool>, StoreError> {
    let row =
        sql::query_one(conn, "SELECT opened_at_ms FROM batches WHERE id = $1", [sql::id(id.as_bytes())])
            .await?;
    row.map(|r| Ok(r.try_get_by_index::<Option<i64>>(0)?.is_some())).transpose()
}

/// How many of a batch's jobs there are still: retention takes them one by one.
pub async fn jobs_left<C: ConnectionTrait>(conn: &C, id: BatchId) -> Result<u64, StoreError> {
    let row = sql::query_one(conn, "SELECT COUNT(*) FROM jobs WHERE batch_id = $1", [sql::id(id.as_bytes())])
        .await?;
    row.map_or(Ok(0), |row| sql::get_u64(&row, 0, "count"))
}

/// One job of a batch with its result, for lists and result files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchItem {
    /// Place in the batch, from 0.
    pub index: u32,
    /// The job.
    pub job: JobId,
    /// The client's name for it.
    pub client_ref: Option<String>,
    /// Where it stands.
    pub status: JobStatus,
    /// `delayTime`.
    pub delay_ms: u64,
    /// `executionTime`.
    pub execution_ms: u64,
    /// Result of the newest run, where it ended.
    pub result: Option<ItemResult>,
}

/// The result part of a [`BatchItem`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ItemResult {
    /// Output in the row.
    pub output: Option<Vec<u8>>,
    /// Output in the blob store.
    pub output_blob_key: Option<String>,
    /// Length of the output.
    pub output_bytes: u64,
    /// Why it did not complete.
    pub error: Option<String>,
}

/// Items of a batch from place `from` on, in order. Without `with_output`, outputs are left out.
pub async fn batch_items<C: ConnectionTrait>(
    conn: &C,
    id: BatchId,
    from: u32,
    limit: u32,
    with_output: bool,
) -> Result<Vec<BatchItem>, StoreError> {
    let output = if with_output { "r.output" } else { "NULL" };
    let rows = sql::query(
        conn,
        &format!(
            "SELECT j.batch_index, j.id, j.client_ref, j.state, j.delay_ms, j.execution_ms, r.job_id, \
             {output} AS output, r.output_blob_key, r.output_bytes, r.error \
             FROM jobs j LEFT JOIN results r ON r.job_id = j.id AND r.run = j.run \
             WHERE j.batch_id = $1 AND j.batch_index >= $2 ORDER BY j.batch_index LIMIT $3"
        ),
        [sql::id(id.as_bytes()), sql::int(from), sql::int(limit)],
    )
    .await?;
    rows.iter().map(|row| read_item(row, with_output)).collect()
}

fn read_item(row: &QueryResult, with_output: bool) -> Result<BatchItem, StoreError> {
    let unsigned = |index, what| sql::get_u64(row, index, what);
    let result = match row.try_get_by_index::<Option<Vec<u8>>>(6)? {
        None => None,
        Some(_) => Some(ItemResult {
            output: if with_output { row.try_get_by_index(7)? } else { None },
            output_blob_key: row.try_get_by_index(8)?,
            output_bytes: unsigned(9, "results.output_bytes")?,
            error: row.try_get_by_index(10)?,
        }),
    };
    Ok(BatchItem {
        index: get_u32(row, 0, "jobs.batch_index")?,
        job: job_id_of(&row.try_get_by_index::<Vec<u8>>(1)?)?,
        client_ref: row.try_get_by_index(2)?,
        status: JobStatus::from_code(row.try_get_by_index(3)?).ok_or(StoreError::corrupt("jobs.state"))?,
        delay_ms: unsigned(4, "jobs.delay_ms")?,
        execution_ms: unsigned(5, "jobs.execution_ms")?,
        result,
    })
}

/// Ids of a batch's jobs in order.
pub async fn batch_job_ids<C: ConnectionTrait>(conn: &C, id: BatchId) -> Result<Vec<JobId>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT id FROM jobs WHERE batch_id = $1 ORDER BY batch_index",
        [sql::id(id.as_bytes())],
    )
    .await?;
    rows.iter().map(|row| Ok(job_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?)).collect()
}
