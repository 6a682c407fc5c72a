//! What clients see of jobs and workers. Every question of a client names the project.

use std::collections::HashMap;

use ringback_contracts::job_id_of;
use ringback_domain::{BatchId, EndpointId, JobId, JobStatus, ProjectId};
use sea_orm::{ConnectionTrait, QueryResult, Value};

use crate::{
    JobRow, StoreError,
    batches::is_open,
    select_jobs,
    sql::{self, LIST, Rows, get_u32, get_u64},
};

/// A job of a project that clients may see: one of a batch that is not open yet does not exist for them.
pub async fn visible_job<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    id: JobId,
) -> Result<Option<JobRow>, StoreError> {
    let Some(row) = select_jobs(conn, &[id]).await?.remove(&id).filter(|row| row.project == project) else {
        return Ok(None);
    };
    if let Some((batch, _)) = row.batch
        && is_open(conn, batch).await? != Some(true)
    {
        return Ok(None);
    }
    Ok(Some(row))
}

/// A payload: in the row or in the blob store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredJson {
    /// Verbatim JSON.
    Inline(Vec<u8>),
    /// Key and length.
    Blob {
        /// Its key.
        key: String,
        /// Its length.
        size_bytes: u64,
    },
}

fn stored(inline: Option<Vec<u8>>, key: Option<String>, size_bytes: u64) -> Option<StoredJson> {
    match (inline, key) {
        (_, Some(key)) => Some(StoredJson::Blob { key, size_bytes }),
        (Some(bytes), None) => Some(StoredJson::Inline(bytes)),
        (None, None) => None,
    }
}

/// What an ended run left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResultView {
    /// The handler's output.
    pub output: Option<StoredJson>,
    /// Why it did not complete.
    pub error: Option<String>,
    /// Class of the error.
    pub error_type: Option<String>,
    /// Who ran the recorded attempt.
    pub worker: Option<String>,
    /// When the recorded attempt started, Unix ms.
    pub started_at_ms: Option<i64>,
}

/// The result of a run.
pub async fn result_of<C: ConnectionTrait>(
    conn: &C,
    job: JobId,
    run: u32,
) -> Result<Option<ResultView>, StoreError> {
    let row = sql::query_one(
        conn,
        "SELECT output, output_blob_key, output_bytes, error, error_type, worker_id, started_at_ms FROM results \
         WHERE job_id = $1 AND run = $2",
        [sql::id(job.as_bytes()), sql::int(run)],
    )
    .await?;
    row.map(|row| {
        Ok(ResultView {
            output: stored(
                row.try_get_by_index(0)?,
                row.try_get_by_index(1)?,
                get_u64(&row, 2, "results.output_bytes")?,
            ),
            error: row.try_get_by_index(3)?,
            error_type: row.try_get_by_index(4)?,
            worker: row.try_get_by_index(5)?,
            started_at_ms: row.try_get_by_index(6)?,
        })
    })
    .transpose()
}

const BRIEF: Rows = Rows {
    name: "results.brief",
    before: "SELECT job_id, run, error, error_type, worker_id, started_at_ms FROM results WHERE job_id IN (",
    casts: LIST,
    after: ")",
};

/// Results without their outputs, by job and run, for lists.
pub async fn results_brief<C: ConnectionTrait>(
    conn: &C,
    jobs: &[JobId],
) -> Result<HashMap<(JobId, u32), ResultView>, StoreError> {
    let rows = BRIEF.query(conn, jobs, |id, v| v.push(sql::id(id.as_bytes()))).await?;
    rows.iter()
        .map(|row| {
            let key = (job_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?, get_u32(row, 1, "results.run")?);
            let view = ResultView {
                output: None,
                error: row.try_get_by_index(2)?,
                error_type: row.try_get_by_index(3)?,
                worker: row.try_get_by_index(4)?,
                started_at_ms: row.try_get_by_index(5)?,
            };
            Ok((key, view))
        })
        .collect()
}

/// The last progress value of a live attempt, verbatim JSON.
pub async fn progress_of<C: ConnectionTrait>(
    conn: &C,
    job: JobId,
    run: u32,
    attempt: u32,
) -> Result<Option<Vec<u8>>, StoreError> {
    let row = sql::query_one(
        conn,
        "SELECT value FROM job_progress WHERE job_id = $1 AND run = $2 AND attempt = $3",
        [sql::id(job.as_bytes()), sql::int(run), sql::int(attempt)],
    )
    .await?;
    row.map(|row| Ok(row.try_get_by_index(0)?)).transpose()
}

/// Captured log lines: of each attempt that ended badly, then of the result, in order.
pub async fn logs_of<C: ConnectionTrait>(conn: &C, job: JobId) -> Result<Vec<StoredJson>, StoreError> {
    let mut logs = Vec::new();
    let attempts = sql::query(
        conn,
        "SELECT run, attempt, logs FROM attempts WHERE job_id = $1 AND logs IS NOT NULL ORDER BY run, attempt, late",
        [sql::id(job.as_bytes())],
    )
    .await?;
    for row in &attempts {
        let order = (row.try_get_by_index::<i64>(0)?, row.try_get_by_index::<i64>(1)?);
        logs.push((order, StoredJson::Inline(row.try_get_by_index(2)?)));
    }
    let results = sql::query(
        conn,
        "SELECT run, attempt, logs, logs_blob_key FROM results \
         WHERE job_id = $1 AND (logs IS NOT NULL OR logs_blob_key IS NOT NULL) ORDER BY run",
        [sql::id(job.as_bytes())],
    )
    .await?;
    for row in &results {
        let attempt = row.try_get_by_index::<Option<i64>>(1)?.unwrap_or(i64::MAX);
        // The size of a log blob is not kept; readers go to its end.
        if let Some(found) = stored(row.try_get_by_index(2)?, row.try_get_by_index(3)?, u64::MAX) {
            logs.push(((row.try_get_by_index(0)?, attempt), found));
        }
    }
    // An attempt that failed its run is in both tables; its lines are told once.
    logs.sort_by_key(|(order, _)| *order);
    logs.dedup_by(|b, a| a.0 == b.0);
    Ok(logs.into_iter().map(|(_, log)| log).collect())
}

/// Which jobs a list shows.
#[derive(Clone, Debug, Default)]
pub struct JobFilter {
    /// Of one endpoint.
    pub endpoint: Option<EndpointId>,
    /// In one state.
    pub status: Option<JobStatus>,
    /// Of one batch.
    pub batch: Option<BatchId>,
    /// Older than this job.
    pub before: Option<JobId>,
    /// At most so many.
    pub limit: u32,
}

/// Ids of a project's jobs, newest first. Jobs of batches that are not open are left out.
pub async fn list_jobs<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    filter: &JobFilter,
) -> Result<Vec<JobId>, StoreError> {
    let mut text = String::from("SELECT id FROM jobs WHERE project_id = $1");
    let mut values = vec![Value::from(project.0)];
    let mut add = |condition: &str, value: Value| {
        values.push(value);
        text.push_str(" AND ");
        text.push_str(&condition.replace('?', &format!("${}", values.len())));
    };
    if let Some(endpoint) = filter.endpoint {
        add("endpoint_id = ?", Value::from(endpoint.0));
    }
    if let Some(status) = filter.status {
        // The bound lets the partial index of live rows serve the question.
        let condition = if status.is_terminal() { "state = ?" } else { "state = ? AND state < 2" };
        add(condition, sql::int(status.code()));
    }
    if let Some(batch) = filter.batch {
        add("batch_id = ?", sql::id(batch.as_bytes()));
    }
    if let Some(before) = filter.before {
        add("id < ?", sql::id(before.as_bytes()));
    }
    values.push(sql::int(filter.limit));
    text.push_str(&format!(
        " AND (batch_id IS NULL OR EXISTS (SELECT 1 FROM batches b WHERE b.id = jobs.batch_id \
         AND b.opened_at_ms IS NOT NULL)) ORDER BY id DESC LIMIT ${}",
        values.len()
    ));
    let rows = sql::query(conn, &text, values).await?;
    rows.iter().map(|row| Ok(job_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?)).collect()
}

/// A worker as it last described itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerView {
    /// Its id.
    pub id: String,
    /// Last heartbeat, Unix ms of the database's clock.
    pub last_beat_ms: i64,
    /// Whether it takes no more jobs.
    pub draining: bool,
    /// Its device.
    pub device: String,
    /// Its slots, as JSON: see the state-tracker, which writes them.
    pub slots: String,
}

/// Workers heard of since `since_ms`, in the order of their ids.
pub async fn list_workers<C: ConnectionTrait>(
    conn: &C,
    since_ms: i64,
) -> Result<Vec<WorkerView>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT id, last_beat_ms, draining, device, slots FROM workers WHERE last_beat_ms >= $1 ORDER BY id",
        [Value::from(since_ms)],
    )
    .await?;
    rows.iter().map(read_worker).collect()
}

fn read_worker(row: &QueryResult) -> Result<WorkerView, StoreError> {
    Ok(WorkerView {
        id: row.try_get_by_index(0)?,
        last_beat_ms: row.try_get_by_index(1)?,
        draining: row.try_get_by_index::<i64>(2)? != 0,
        device: row.try_get_by_index(3)?,
        slots: row.try_get_by_index(4)?,
    })
}

/// Attempts of a job that did not end their run well, and late outcomes, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttemptRow {
    /// The run.
    pub run: u32,
    /// The attempt.
    pub attempt: u32,
    /// domain::job::EndReason::code
    pub reason: i64,
    /// Whether its outcome came too late.
    pub late: bool,
    /// Who ran it.
    pub worker: String,
    /// When it ended, Unix ms.
    pub ended_at_ms: i64,
    /// What it said.
    pub detail: Option<String>,
}

/// See [`AttemptRow`].
pub async fn attempts_of<C: ConnectionTrait>(conn: &C, job: JobId) -> Result<Vec<AttemptRow>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT run, attempt, reason, late, worker_id, ended_at_ms, detail FROM attempts WHERE job_id = $1 \
         ORDER BY run, attempt, ended_at_ms",
        [sql::id(job.as_bytes())],
    )
    .await?;
    rows.iter()
        .map(|row| {
            Ok(AttemptRow {
                run: get_u32(row, 0, "attempts.run")?,
                attempt: get_u32(row, 1, "attempts.attempt")?,
                reason: row.try_get_by_index(2)?,
                late: row.try_get_by_index::<i64>(3)? != 0,
                worker: row.try_get_by_index(4)?,
                ended_at_ms: row.try_get_by_index(5)?,
                detail: row.try_get_by_index(6)?,
            })
        })
        .collect()
}
