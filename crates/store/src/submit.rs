//! New jobs: one call inserts what many clients submitted at once (P1, P4), and knows repeated submits.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use ringback_contracts::v1;
use ringback_domain::{
    BatchId, EndpointId, JobId, JobStatus, ProjectId, TimestampMs, event::EndpointKind, job, job::Effect,
    policy::Policy, target::Target, usage::Metric, webhook::body,
};
use sea_orm::{ConnectionTrait, Value};

use crate::{
    CounterDelta, JobRow, StoreError, WriteTx,
    blob_reservations::keep_blobs,
    deliveries::{JobTransition, insert_deliveries, job_delivery},
    inputs::StoredInput,
    jobs::{self, insert_values},
    sql::{self, LIST, Rows},
    usage::{Counting, OverQuota},
    webhooks::{
        Registry,
        registry::parse_metadata,
        tell::{self, End, Transition},
    },
};

/// Longest metadata of a job: they are repeated in every event.
pub const METADATA_MAX_BYTES: usize = 4_096;

/// Where a job's input lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InputAt {
    /// In the row, verbatim JSON.
    Inline(Bytes),
    /// In the blob store, stored under a reservation ([`crate::blob_reservations`]).
    Blob {
        /// Its key.
        key: String,
        /// Its length.
        size_bytes: u64,
    },
}

impl InputAt {
    /// Its key in the blob store, where it lies there.
    fn blob_key(&self) -> Option<&str> {
        match self {
            Self::Inline(_) => None,
            Self::Blob { key, .. } => Some(key),
        }
    }
}

/// A job as its client wants it. Everything but the moment of acceptance, which the transaction gives.
#[derive(Clone, Debug)]
pub struct Submit {
    /// New id.
    pub id: JobId,
    /// Owner.
    pub project: ProjectId,
    /// Queue.
    pub endpoint: EndpointId,
    /// `policy.lowPriority`.
    pub low_priority: bool,
    /// Whether the public id carries `sync-`.
    pub sync_id: bool,
    /// Retry rules of the endpoint.
    pub policy: Policy,
    /// Life of a run.
    pub ttl_ms: Option<u64>,
    /// Longest execution of one attempt.
    pub execution_timeout_ms: u64,
    /// How long the row is kept after success.
    pub retain_completed_ms: u64,
    /// How long the row is kept after any other end.
    pub retain_failed_ms: u64,
    /// Where its webhooks go.
    pub targets: Vec<Target>,
    /// Its batch and its place there.
    pub batch: Option<(BatchId, u32)>,
    /// The client's own name for it within a batch.
    pub client_ref: Option<String>,
    /// Makes a repeated submit harmless; unique per project.
    pub idempotency_key: Option<String>,
    /// Hash of the request.
    pub request_hash: Option<Vec<u8>>,
    /// W3C traceparent of the submit.
    pub traceparent: Option<String>,
    /// The client's metadata: a JSON object of at most [`METADATA_MAX_BYTES`], for filters and events.
    pub metadata: Option<Vec<u8>>,
    /// The id that the client gave its request, on endpoints of kind completion.
    pub request_id: Option<String>,
    /// The input.
    pub input: InputAt,
    /// Further members of the job object as one JSON object; no secrets.
    pub extra: Option<Bytes>,
    /// Further members that are secret, encrypted.
    pub secret_extra_encrypted: Option<Vec<u8>>,
    /// Nobody sends the first deliveries before this long after the insert: the jobs of a batch that is not open yet
    /// were not accepted. 0 = at once.
    pub hold_deliveries_ms: u64,
}

impl Submit {
    /// A job that asks for nothing beyond its input: nobody is told, no deadline but one second of work, its result kept
    /// for a second.
    #[must_use]
    pub fn new(id: JobId, project: ProjectId, endpoint: EndpointId, input: InputAt) -> Self {
        Self {
            id,
            project,
            endpoint,
            low_priority: false,
            sync_id: false,
            policy: Policy::default(),
            ttl_ms: None,
            execution_timeout_ms: 1_000,
            retain_completed_ms: 1_000,
            retain_failed_ms: 1_000,
            targets: Vec::new(),
            batch: None,
            client_ref: None,
            idempotency_key: None,
            request_hash: None,
            traceparent: None,
            metadata: None,
            request_id: None,
            input,
            extra: None,
            secret_extra_encrypted: None,
            hold_deliveries_ms: 0,
        }
    }

    fn stored_input(&self) -> StoredInput {
        StoredInput {
            input: self.input.clone(),
            extra: self.extra.clone(),
            secret_extra_encrypted: self.secret_extra_encrypted.clone(),
        }
    }
}

/// What became of one submit.
#[derive(Clone, Debug)]
pub enum Admission {
    /// It is a new row.
    Inserted(Box<Inserted>),
    /// A job with its idempotency key exists already; nothing was inserted.
    Existing(Existing),
    /// Its project has used up a quota; nothing was inserted.
    Refused(Box<Refused>),
}

/// A submit beyond a quota, with what is announced after the commit.
#[derive(Clone, Debug)]
pub struct Refused {
    /// Which quota.
    pub over: OverQuota,
    /// What webhooks are owed for that: the first of a period only.
    pub deliveries: Vec<v1::Delivery>,
}

/// What is to be done with one submit.
enum Plan {
    Existing(Existing),
    Refused(OverQuota),
    /// A new row with so many deliveries.
    New(usize),
}

/// A new row, with what is announced after the commit.
#[derive(Clone, Debug)]
pub struct Inserted {
    /// The row.
    pub row: JobRow,
    /// Its first deliveries.
    pub deliveries: Vec<v1::Delivery>,
}

/// The job that an idempotency key names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Existing {
    /// Its id.
    pub id: JobId,
    /// Whether its public id carries `sync-`.
    pub sync_id: bool,
    /// Where it stands.
    pub status: JobStatus,
    /// Whether it was made by the same request.
    pub same_request: bool,
}

const INSERT_INPUT: Rows = Rows {
    name: "job_inputs.insert",
    before: "INSERT INTO job_inputs (job_id, input, input_blob_key, input_bytes, extra, secret_extra_encrypted) VALUES ",
    casts: &["", "", "", "", "", ""],
    after: "",
};

/// Inserts jobs with their inputs, their first deliveries and the counts of their endpoints; answers one
/// [`Admission`] per submit, in order. Submits whose idempotency key is known, from SQL or from earlier in the
/// list, are not inserted.
///
/// `counter_row` is [`crate::Store::counter_row`], `partitions` [`crate::Facts::partitions`].
///
/// # Errors
/// [`StoreError::Duplicate`] when another process inserted the same id or idempotency key meanwhile: nothing of this
/// call is inserted; try again. Any other error of SQL.
pub async fn insert_submits(
    tx: &WriteTx,
    counter_row: i64,
    partitions: u16,
    submits: &[&Submit],
) -> Result<Vec<Admission>, StoreError> {
    let mut known = existing_keys(tx, submits).await?;
    let registry = tx.registry().await?;
    let now = TimestampMs(tx.now_ms());
    let mut counting = Counting::open(tx, quotas_of(&registry, submits)).await?;
    let mut plan: Vec<Plan> = Vec::with_capacity(submits.len());
    let mut rows = Vec::with_capacity(submits.len());
    let mut inputs = Vec::with_capacity(submits.len());
    let mut deliveries = Vec::new();
    let mut deltas: BTreeMap<EndpointId, CounterDelta> = BTreeMap::new();
    for submit in submits {
        if let Some(existing) = known_submit(&known, submit) {
            plan.push(Plan::Existing(existing));
            continue;
        }
        // The jobs of a batch were counted with it.
        if submit.batch.is_none()
            && let Err(over) = counting.take_jobs(submit.project, 1, uses_tokens(&registry, submit.endpoint))
        {
            plan.push(Plan::Refused(over));
            continue;
        }
        let (mut row, mut first) = begin(submit, now)?;
        tell_registered(&registry, &mut row, &mut first);
        if let Some(key) = &submit.idempotency_key {
            known.insert((submit.project, key.clone()), Known::of(&row));
        }
        deltas.entry(submit.endpoint).or_default().moved(None, JobStatus::InQueue);
        plan.push(Plan::New(first.len()));
        deliveries.extend(first);
        rows.push(row);
        inputs.push(*submit);
    }
    if !rows.is_empty() {
        // Whether an expired row is looked at a moment later does not matter for a queued job.
        let both: Vec<(&JobRow, &Submit)> = rows.iter().zip(inputs.iter().copied()).collect();
        let job = |(row, _): &(&JobRow, &Submit), v: &mut Vec<Value>| insert_values(row, 0, v);
        let input = |(_, submit): &(&JobRow, &Submit), v: &mut Vec<Value>| input_values(submit, v);
        jobs::INSERT.execute_both(&INSERT_INPUT, tx.conn(), &both, job, input).await?;
        keep_blobs(tx, &inputs.iter().filter_map(|s| s.input.blob_key()).collect::<Vec<_>>()).await?;
        insert_deliveries(tx, partitions, &deliveries).await?;
        hold_deliveries(tx, &inputs, &rows).await?;
        tx.count(counter_row, &deltas);
        for (row, submit) in rows.iter().zip(&inputs) {
            tx.remember(row.clone(), Some(submit.stored_input()));
        }
    }
    let told = counting.close(tx, partitions).await?;
    Ok(admissions(plan, rows, deliveries, told))
}

/// Which quotas the submits may touch; none where no project has one.
fn quotas_of(registry: &Registry, submits: &[&Submit]) -> impl Iterator<Item = (ProjectId, Metric)> {
    submits
        .iter()
        .filter(|s| s.batch.is_none() && registry.quota(s.project).is_some())
        .flat_map(|s| Metric::ALL.map(|metric| (s.project, metric)))
}

/// Whether the jobs of an endpoint use tokens.
pub(crate) fn uses_tokens(registry: &Registry, endpoint: EndpointId) -> bool {
    registry.endpoint(endpoint).is_some_and(|e| e.kind == EndpointKind::Completion)
}

/// Joins the plan with its rows. What is owed for quotas goes along with the first of them that can carry it.
fn admissions(
    plan: Vec<Plan>,
    rows: Vec<JobRow>,
    all: Vec<v1::Delivery>,
    mut told: Vec<v1::Delivery>,
) -> Vec<Admission> {
    let (mut rows, mut all) = (rows.into_iter(), all.into_iter());
    plan.into_iter()
        .filter_map(|entry| match entry {
            Plan::Existing(existing) => Some(Admission::Existing(existing)),
            Plan::Refused(over) => {
                let deliveries = std::mem::take(&mut told);
                Some(Admission::Refused(Box::new(Refused { over, deliveries })))
            }
            // As many rows as entries of this kind.
            Plan::New(n) => rows.next().map(|row| {
                let mut deliveries: Vec<v1::Delivery> = all.by_ref().take(n).collect();
                deliveries.append(&mut told);
                Admission::Inserted(Box::new(Inserted { row, deliveries }))
            }),
        })
        .collect()
}

const HOLD: Rows = Rows {
    name: "deliveries.hold",
    before: "UPDATE deliveries SET next_attempt_at_ms = created_at_ms + v.column2, position = NULL FROM (VALUES ",
    casts: &["bytea", "bigint"],
    after: ") AS v WHERE deliveries.owner_id = v.column1",
};

/// In the transaction of the insert, so nobody has seen the rows (P8). What is held has no place in the feed: the
/// opening of its batch gives it one.
async fn hold_deliveries(tx: &WriteTx, submits: &[&Submit], rows: &[JobRow]) -> Result<(), StoreError> {
    let held: Vec<&&Submit> = submits
        .iter()
        .zip(rows)
        .filter(|(s, row)| s.hold_deliveries_ms > 0 && row.job.owed > 0)
        .map(|(s, _)| s)
        .collect();
    HOLD.execute(tx.conn(), &held, |s, v| {
        v.extend([sql::id(s.id.as_bytes()), sql::int(s.hold_deliveries_ms)])
    })
    .await?;
    Ok(())
}

fn input_values(s: &Submit, v: &mut Vec<Value>) {
    let (inline, key, size_bytes) = match &s.input {
        InputAt::Inline(bytes) => (Some(bytes.to_vec()), None, bytes.len() as u64),
        InputAt::Blob { key, size_bytes } => (None, Some(key.clone()), *size_bytes),
    };
    v.extend([
        sql::id(s.id.as_bytes()),
        Value::from(inline),
        Value::from(key),
        sql::int(size_bytes),
        Value::from(s.extra.as_ref().map(|b| b.to_vec())),
        Value::from(s.secret_extra_encrypted.clone()),
    ]);
}

/// The row and the deliveries of a submit that was accepted at `now`.
fn begin(s: &Submit, now: TimestampMs) -> Result<(JobRow, Vec<v1::Delivery>), StoreError> {
    let scopes = s.targets.iter().map(|t| t.scope).collect();
    let (job, effects) = job::submit(s.id, scopes, s.ttl_ms, s.execution_timeout_ms, now);
    let mut row = JobRow {
        job,
        revision: 1,
        project: s.project,
        endpoint: s.endpoint,
        low_priority: s.low_priority,
        sync_id: s.sync_id,
        policy: s.policy,
        submitted_at: now,
        retain_completed_ms: s.retain_completed_ms,
        retain_failed_ms: s.retain_failed_ms,
        targets: s.targets.clone(),
        history: Vec::with_capacity(24),
        batch: s.batch,
        client_ref: s.client_ref.clone(),
        idempotency_key: s.idempotency_key.clone(),
        request_hash: s.request_hash.clone(),
        traceparent: s.traceparent.clone(),
        metadata: s.metadata.clone(),
        request_id: s.request_id.clone(),
    };
    row.log_transition(now);
    let mut deliveries = Vec::new();
    for effect in effects {
        if let Effect::Deliver { target, seq, status } = effect {
            deliveries.push(first_delivery(&row, target, seq, status, now)?);
        }
    }
    Ok((row, deliveries))
}

/// Adds what registered webhooks are owed for the submit.
fn tell_registered(registry: &Registry, row: &mut JobRow, deliveries: &mut Vec<v1::Delivery>) {
    if !registry.listens(row.project) {
        return;
    }
    let of = Transition {
        row,
        seq: row.job.seq,
        run: row.job.run,
        attempt: 0,
        status: row.job.status(),
        again: false,
        delay_ms: 0,
        execution_ms: 0,
        at: row.submitted_at,
        traceparent: row.traceparent.as_deref(),
    };
    let metadata = parse_metadata(row.metadata.as_deref());
    let owed = tell::owed(registry, &of, metadata.as_ref());
    let told = tell::deliveries(registry, &of, &End::default(), &owed);
    row.job.owed += u32::try_from(told.len()).unwrap_or(u32::MAX);
    deliveries.extend(told);
}

fn first_delivery(
    row: &JobRow,
    target: u16,
    seq: u32,
    status: JobStatus,
    at: TimestampMs,
) -> Result<v1::Delivery, StoreError> {
    let to = row.targets.get(usize::from(target)).ok_or(StoreError::corrupt("target index"))?;
    let id = row.public_id();
    let told = body::Terminal {
        id: &id,
        status,
        delay_time_ms: 0,
        execution_time_ms: 0,
        output: None,
        error: None,
        echo: None,
    };
    let of = JobTransition {
        job: row.job.id,
        project: row.project,
        seq,
        run: row.job.run,
        status,
        at,
        traceparent: row.traceparent.as_deref(),
    };
    Ok(job_delivery(&of, u32::from(target), to, body::of_transition(to.format, &told)))
}

/// A job that an idempotency key names.
struct Known {
    id: JobId,
    sync_id: bool,
    status: JobStatus,
    request_hash: Option<Vec<u8>>,
}

impl Known {
    fn of(row: &JobRow) -> Self {
        Self {
            id: row.job.id,
            sync_id: row.sync_id,
            status: row.job.status(),
            request_hash: row.request_hash.clone(),
        }
    }
}

type KnownKeys = HashMap<(ProjectId, String), Known>;

fn known_submit(known: &KnownKeys, s: &Submit) -> Option<Existing> {
    let key = s.idempotency_key.as_ref()?;
    let found = known.get(&(s.project, key.clone()))?;
    Some(Existing {
        id: found.id,
        sync_id: found.sync_id,
        status: found.status,
        same_request: found.request_hash == s.request_hash,
    })
}

const SELECT_KEYS: Rows = Rows {
    name: "jobs.idempotency",
    before: "SELECT project_id, idempotency_key, id, sync_id, state, request_hash FROM jobs WHERE idempotency_key IN (",
    casts: LIST,
    after: ")",
};

async fn existing_keys(tx: &WriteTx, submits: &[&Submit]) -> Result<KnownKeys, StoreError> {
    let keys: Vec<&String> = submits.iter().filter_map(|s| s.idempotency_key.as_ref()).collect();
    let mut known = KnownKeys::new();
    if keys.is_empty() {
        return Ok(known);
    }
    let rows = SELECT_KEYS.query(tx.conn(), &keys, |k, v| v.push(Value::from((*k).clone()))).await?;
    for row in rows {
        let found = Known {
            id: ringback_contracts::job_id_of(&row.try_get_by_index::<Vec<u8>>(2)?)?,
            sync_id: row.try_get_by_index::<i64>(3)? != 0,
            status: JobStatus::from_code(row.try_get_by_index(4)?)
                .ok_or(StoreError::corrupt("jobs.state"))?,
            request_hash: row.try_get_by_index(5)?,
        };
        known.insert((ProjectId(row.try_get_by_index(0)?), row.try_get_by_index(1)?), found);
    }
    Ok(known)
}

const SELECT_IDS: Rows =
    Rows { name: "jobs.ids", before: "SELECT id FROM jobs WHERE id IN (", casts: LIST, after: ")" };

/// Which of these jobs exist: what a submit reads back after an unknown commit.
pub async fn committed_ids<C: ConnectionTrait>(conn: &C, ids: &[JobId]) -> Result<Vec<JobId>, StoreError> {
    let rows = SELECT_IDS.query(conn, ids, |id, v| v.push(sql::id(id.as_bytes()))).await?;
    rows.iter().map(|row| Ok(ringback_contracts::job_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?)).collect()
}

/// What [`Submit::secret_extra_encrypted`] is sealed for: see [`crate::secrets::SecretKey`].
#[must_use]
pub fn secret_purpose(job: JobId) -> String {
    format!("job_extra:{}", job.simple())
}

/// Joins the open and the secret members of a job object into the one JSON object that the handler's job gets; empty
/// where there are none.
#[must_use]
pub fn merge_extra(extra: Option<&[u8]>, secret: Option<&[u8]>) -> Bytes {
    let members = |object: Option<&[u8]>| -> Vec<u8> {
        let inside = object.map(<[u8]>::trim_ascii).and_then(|o| o.strip_prefix(b"{")?.strip_suffix(b"}"));
        inside.map(<[u8]>::trim_ascii).unwrap_or_default().to_vec()
    };
    let (a, b) = (members(extra), members(secret));
    if a.is_empty() && b.is_empty() {
        return Bytes::new();
    }
    let comma: &[u8] = if a.is_empty() || b.is_empty() { b"" } else { b"," };
    [b"{", a.as_slice(), comma, b.as_slice(), b"}"].concat().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extras_are_joined_as_they_are() {
        let joined = |a: Option<&str>, b: Option<&str>| {
            String::from_utf8(merge_extra(a.map(str::as_bytes), b.map(str::as_bytes)).to_vec()).unwrap()
        };
        assert_eq!(joined(None, None), "");
        assert_eq!(joined(Some("{}"), None), "");
        assert_eq!(joined(Some(r#"{"a": 1e400}"#), None), r#"{"a": 1e400}"#);
        assert_eq!(joined(None, Some(r#" {"s":{}} "#)), r#"{"s":{}}"#);
        assert_eq!(joined(Some(r#"{"a":1}"#), Some(r#"{"s":2}"#)), r#"{"a":1,"s":2}"#);
    }
}
