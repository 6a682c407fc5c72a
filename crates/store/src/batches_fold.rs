//! Counting the jobs of batches as they end, and ending the batch with its last one. Written by the state-tracker.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use ringback_contracts::{batch_id_of, job_id_of, v1};
use ringback_domain::{
    BatchId, EndpointId, JobId, JobStatus, ProjectId, TimestampMs,
    batch::{BatchCounts, BatchFile, BatchStatus, CancelMarker},
    event::{EventType, event_id, of_batch},
    target::{FORMAT_RUNFLOW, WebhookFormat},
    webhook::runflow_body::BatchItem as RunflowItem,
    webhook::{
        body::{self, BatchEnd, Body},
        envelope::{self, BatchFacts},
    },
};
use sea_orm::{ConnectionTrait, QueryResult, Value};

use crate::{
    StoreError, WriteTx,
    deliveries::{batch_delivery, body_to_wire, insert_deliveries},
    secrets::SecretKey,
    sql::{self, LIST, Rows, get_u32},
    webhooks::{EventFacts, Registry, registry::parse_metadata},
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
    endpoint: EndpointId,
    opened_at_ms: Option<i64>,
    created_at_ms: i64,
    metadata: Option<Vec<u8>>,
    processing_told: bool,
    /// Its one body is Runflow's.
    callback_runflow: bool,
    /// Its runs, where Runflow's body tells them.
    items: Option<Vec<RunflowItem>>,
}

macro_rules! columns {
    () => {
        "SELECT id, project_id, revision, seq, status, total, completed, failed, cancelled, cancel_rest, \
         cancel_marker, cancel_done, callback_url, next_check_at_ms, ended_at_ms, owed, traceparent, endpoint_id, \
         opened_at_ms, created_at_ms, metadata, processing_told, callback_format FROM batches \
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
        endpoint: EndpointId(row.try_get_by_index(17)?),
        opened_at_ms: row.try_get_by_index(18)?,
        created_at_ms: row.try_get_by_index(19)?,
        metadata: row.try_get_by_index(20)?,
        processing_told: row.try_get_by_index::<i64>(21)? != 0,
        callback_runflow: row.try_get_by_index::<i64>(22)? != 0,
        items: None,
    })
}

async fn lock(tx: &WriteTx, ids: &[BatchId]) -> Result<Vec<Row>, StoreError> {
    debug_assert!(ids.is_sorted(), "rows are locked in sorted order");
    let rows = if tx.is_postgres() { &LOCK } else { &SELECT };
    rows.query(tx.conn(), ids, |id, v| v.push(sql::id(id.as_bytes()))).await?.iter().map(read).collect()
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

/// What telling of batches needs.
struct Telling<'a> {
    registry: &'a Registry,
    now: TimestampMs,
    /// None while the batch cannot end: then nothing names a link.
    env: Option<&'a BatchEnv>,
}

impl Telling<'_> {
    fn link(&self, file: BatchFile, row: &Row) -> Option<String> {
        let env = self.env.filter(|_| row.status != BatchStatus::InProgress)?;
        Some(env.link(file, &row.id))
    }
}

fn tell_processing(row: &mut Row, telling: &Telling<'_>, counted: &mut Counted) {
    if row.processing_told || row.status != BatchStatus::InProgress {
        return;
    }
    row.processing_told = true;
    let seq = row.seq + 1;
    let told = registered(row, seq, EventType::BatchProcessing, telling);
    if !told.is_empty() {
        row.seq = seq;
        row.owed += count(&told);
        counted.deliveries.extend(told);
    }
}

fn count(deliveries: &[v1::Delivery]) -> u32 {
    u32::try_from(deliveries.len()).unwrap_or(u32::MAX)
}

/// What registered webhooks are owed for an event of a batch.
fn registered(row: &Row, seq: u32, event: EventType, telling: &Telling<'_>) -> Vec<v1::Delivery> {
    let Telling { registry, now, .. } = telling;
    if !registry.listens(row.project) {
        return Vec::new();
    }
    let metadata = parse_metadata(row.metadata.as_deref());
    let facts = EventFacts {
        names: event.into(),
        endpoint: Some(row.endpoint),
        metadata: metadata.as_ref(),
        now_ms: now.0,
    };
    let mut bodies: [Option<v1::BodyParts>; 2] = [None, None];
    registry
        .matching(row.project, facts)
        .map(|(target, webhook, name)| {
            let runflow = webhook.format == WebhookFormat::Runflow;
            let body = bodies[usize::from(runflow)].get_or_insert_with(|| {
                body_to_wire(if runflow {
                    runflow_body(row, telling)
                } else {
                    standard_body(row, seq, name, telling)
                })
            });
            v1::Delivery {
                owner_id: Bytes::copy_from_slice(row.id.as_bytes()),
                seq,
                target,
                project_id: row.project.0,
                url: webhook.url.clone().unwrap_or_default(),
                terminal: EventType::is_terminal(name),
                event: name.code(),
                body: Some(body.clone()),
                created_at_ms: now.0,
                traceparent: row.traceparent.clone().unwrap_or_default(),
                run: 1,
                format: if runflow { FORMAT_RUNFLOW } else { 0 },
                ..v1::Delivery::default()
            }
        })
        .collect()
}

fn standard_body(row: &Row, seq: u32, event: EventType, telling: &Telling<'_>) -> Body {
    let ended = row.status != BatchStatus::InProgress;
    let (output, errors) = (FileKind::Output.id(row.id), FileKind::Errors.id(row.id));
    let (output_url, errors_url) =
        (telling.link(BatchFile::Output, row), telling.link(BatchFile::Errors, row));
    let since = TimestampMs(row.opened_at_ms.unwrap_or(row.created_at_ms));
    let data = envelope::batch(&BatchFacts {
        batch_id: &row.id.to_string(),
        endpoint: telling.registry.endpoint(row.endpoint).map_or("", |e| &e.name),
        status: row.status,
        counts: row.counts,
        processing_ms: telling.now.since_ms(since),
        output_file_id: ended.then_some(&output),
        error_file_id: ended.then_some(&errors),
        output_file_url: output_url.as_deref(),
        error_file_url: errors_url.as_deref(),
        metadata: row.metadata.as_deref(),
    });
    let id = event_id(uuid::Uuid::from_bytes(*row.id.as_bytes()), seq);
    envelope::standard(&id, event, telling.now, data)
}

/// Most runs that Runflow's body of a batch tells one by one; the others are behind its `result_url`.
const RUNFLOW_ITEMS_MAX: u32 = 1_000;

/// The runs of a batch that has ended.
async fn runflow_items(tx: &WriteTx, row: &Row) -> Result<Option<Vec<RunflowItem>>, StoreError> {
    if row.counts.total > RUNFLOW_ITEMS_MAX {
        return Ok(None);
    }
    let items = crate::batches::batch_items(tx.conn(), row.id, 0, RUNFLOW_ITEMS_MAX, false).await?;
    let item = |i: crate::batches::BatchItem| RunflowItem {
        index: i.index,
        run_id: i.job.to_string(),
        status: i.status,
        client_ref: i.client_ref,
    };
    Ok(Some(items.into_iter().map(item).collect()))
}

fn runflow_body(row: &Row, telling: &Telling<'_>) -> Body {
    ringback_domain::webhook::runflow_body::batch_end(&ringback_domain::webhook::runflow_body::BatchEnd {
        batch_id: &row.id.to_string(),
        status: row.status,
        counts: row.counts,
        items: row.items.as_deref(),
        result_url: &telling.link(BatchFile::Results, row).unwrap_or_default(),
        created_at: TimestampMs(row.created_at_ms),
        completed_at: telling.now,
        metadata: row.metadata.as_deref(),
    })
}

/// A file that a batch leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// The jobs that completed, one line each.
    Output,
    /// The jobs that did not, one line each.
    Errors,
}

impl FileKind {
    const fn word(self) -> &'static str {
        match self {
            Self::Output => "output",
            Self::Errors => "errors",
        }
    }

    /// The file's id: `file_<batch>_output`.
    #[must_use]
    pub fn id(self, batch: BatchId) -> String {
        format!("file_{}_{}", batch.simple(), self.word())
    }

    /// Reads [`Self::id`] back.
    #[must_use]
    pub fn parse(id: &str) -> Option<(BatchId, Self)> {
        let (batch, word) = id.strip_prefix("file_")?.split_once('_')?;
        let kind = [Self::Output, Self::Errors].into_iter().find(|kind| kind.word() == word)?;
        Some((BatchId::parse_simple(batch).ok()?, kind))
    }
}

/// Tells registered webhooks that a batch was accepted, in the transaction that opens it.
pub(crate) async fn tell_created(
    tx: &WriteTx,
    partitions: u16,
    id: BatchId,
) -> Result<Vec<v1::Delivery>, StoreError> {
    let registry = tx.registry().await?;
    let Some(mut row) = lock(tx, &[id]).await?.pop() else { return Ok(Vec::new()) };
    let telling = Telling { registry: &registry, now: TimestampMs(tx.now_ms()), env: None };
    let seq = row.seq + 1;
    let told = registered(&row, seq, EventType::BatchCreated, &telling);
    if told.is_empty() {
        return Ok(told);
    }
    row.seq = seq;
    row.owed += count(&told);
    let counted = Counted { deliveries: told, ..Counted::default() };
    write(tx, &[row], partitions, &counted).await?;
    Ok(counted.deliveries)
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

const UPDATE: Rows = Rows {
    name: "batches.update",
    before: "UPDATE batches SET revision = batches.revision + 1, seq = v.column3, status = v.column4, \
             completed = v.column5, failed = v.column6, cancelled = v.column7, cancel_marker = v.column8, \
             cancel_done = v.column9, ended_at_ms = v.column10, next_check_at_ms = v.column11, owed = v.column12, \
             processing_told = v.column13 \
             FROM (VALUES ",
    casts: &[
        "bytea", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint",
        "bigint", "bigint", "bigint",
    ],
    after: ") AS v WHERE batches.id = v.column1 AND batches.revision = v.column2",
};

async fn write(tx: &WriteTx, rows: &[Row], partitions: u16, counted: &Counted) -> Result<(), StoreError> {
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
                Value::from(i64::from(r.processing_told)),
            ]);
        })
        .await?;
    if written != rows.len() as u64 {
        return Err(StoreError::transient("a batch changed while it was counted"));
    }
    insert_deliveries(tx, partitions, &counted.deliveries).await?;
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
    let registry = tx.registry().await?;
    let telling = Telling { registry: &registry, now: TimestampMs(tx.now_ms()), env: Some(env) };
    if row.callback_runflow && row.counts.ended() == row.counts.total {
        row.items = runflow_items(tx, &row).await?;
    }
    settle(&mut row, &telling, &mut counted);
    write(tx, &[row], env.partitions, &counted).await?;
    Ok(Some(counted))
}
