//! Artefacts: written by the state-tracker only (P8). A row exists before its blob and outlives it, so that no blob is
//! forgotten; the bytes themselves are never touched inside a transaction (P7).

use ringback_contracts::job_id_of;
use ringback_domain::artifact::ArtifactState;
use ringback_domain::{ArtifactId, AttemptRef, EndpointId, JobId, ProjectId};
use sea_orm::{QueryResult, Value};

use crate::{
    StoreError, WriteTx,
    sql::{self, LIST, Rows},
};

pub use crate::artifacts_held::held_artifacts;
pub use crate::artifacts_view::{artifact, artifact_by_id, artifacts_of_job, artifacts_of_jobs};

/// A file that was announced and not stored is given up after this time.
pub const UPLOAD_WITHIN_MS: i64 = 24 * 3_600_000;
/// How long the row of an expired artefact answers "expired" instead of "unknown".
pub const EXPIRED_KEPT_MS: i64 = 7 * 24 * 3_600_000;

/// An artefact as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArtifactRow {
    /// Its id.
    pub id: ArtifactId,
    /// Its owner.
    pub project: ProjectId,
    /// The queue that it came through.
    pub endpoint: EndpointId,
    /// The job that made it.
    pub job: JobId,
    /// Whether the job's public id carries `sync-`.
    pub sync_id: bool,
    /// The run.
    pub run: u32,
    /// The attempt.
    pub attempt: u32,
    /// The worker that may wait for its confirmation.
    pub worker: String,
    /// Its file name, harmless.
    pub name: String,
    /// Its type, as told or guessed.
    pub content_type: String,
    /// Its size; 0 until it is stored.
    pub size_bytes: u64,
    /// SHA-256 of its bytes; empty until it is stored.
    pub sha256: Vec<u8>,
    /// Where its bytes lie, until they are deleted.
    pub blob_key: Option<String>,
    /// Where it stands.
    pub state: ArtifactState,
    /// When it was announced, Unix ms.
    pub created_at_ms: i64,
    /// When it could be fetched.
    pub ready_at_ms: Option<i64>,
    /// When the wait for its confirmation ends or ended; none: nobody waits.
    pub wait_until_ms: Option<i64>,
    /// When the wait ended without a confirmation.
    pub given_up_at_ms: Option<i64>,
    /// When its receiver confirmed it.
    pub confirmed_at_ms: Option<i64>,
    /// Whether the receiver told the right hash.
    pub confirmed_sha256: bool,
    /// When its bytes go.
    pub expires_at_ms: i64,
}

impl ArtifactRow {
    /// The job's id as its client knows it.
    #[must_use]
    pub fn public_job_id(&self) -> String {
        self.job.public(self.sync_id)
    }
}

pub(crate) const COLUMNS: &str = "id, project_id, job_id, sync_id, run, attempt, worker_id, name, content_type, \
    size_bytes, sha256, blob_key, state, created_at_ms, ready_at_ms, wait_until_ms, given_up_at_ms, confirmed_at_ms, \
    confirmed_sha256, expires_at_ms, endpoint_id";

pub(crate) fn row_of(row: &QueryResult) -> Result<ArtifactRow, StoreError> {
    let id: Vec<u8> = row.try_get_by_index(0)?;
    let size: Option<i64> = row.try_get_by_index(9)?;
    Ok(ArtifactRow {
        id: ArtifactId::from_slice(&id).map_err(|_| StoreError::corrupt("artifacts.id"))?,
        project: ProjectId(row.try_get_by_index(1)?),
        job: job_id_of(&row.try_get_by_index::<Vec<u8>>(2)?)?,
        sync_id: row.try_get_by_index::<i64>(3)? != 0,
        run: sql::get_u32(row, 4, "artifacts.run")?,
        attempt: sql::get_u32(row, 5, "artifacts.attempt")?,
        worker: row.try_get_by_index(6)?,
        name: row.try_get_by_index(7)?,
        content_type: row.try_get_by_index(8)?,
        size_bytes: u64::try_from(size.unwrap_or(0))
            .map_err(|_| StoreError::corrupt("artifacts.size_bytes"))?,
        sha256: row.try_get_by_index::<Option<Vec<u8>>>(10)?.unwrap_or_default(),
        blob_key: row.try_get_by_index(11)?,
        state: ArtifactState::from_code(row.try_get_by_index(12)?)
            .ok_or(StoreError::corrupt("artifacts.state"))?,
        created_at_ms: row.try_get_by_index(13)?,
        ready_at_ms: row.try_get_by_index(14)?,
        wait_until_ms: row.try_get_by_index(15)?,
        given_up_at_ms: row.try_get_by_index(16)?,
        confirmed_at_ms: row.try_get_by_index(17)?,
        confirmed_sha256: row.try_get_by_index::<i64>(18)? != 0,
        expires_at_ms: row.try_get_by_index(19)?,
        endpoint: EndpointId(row.try_get_by_index(20)?),
    })
}

/// A job as an attempt that may still add to it sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fenced {
    /// Its owner.
    pub project: ProjectId,
    /// Its queue.
    pub endpoint: EndpointId,
    /// Whether its public id carries `sync-`.
    pub sync_id: bool,
}

/// Whether this attempt may still end its job: it is the live one, or was closed as lost while the run has no end (a
/// success of any attempt of the current run counts, P3). The row stays locked on PostgreSQL, so the answer holds until
/// the commit.
///
/// # Errors
/// The database's.
pub async fn fence(tx: &WriteTx, job: JobId, of: &AttemptRef) -> Result<Option<Fenced>, StoreError> {
    let lock = if tx.is_postgres() { " FOR UPDATE" } else { "" };
    let row = sql::query_one(
        tx.conn(),
        &format!(
            "SELECT project_id, endpoint_id, sync_id, state, run, attempt, nonce FROM jobs WHERE id = $1{lock}"
        ),
        [sql::id(job.as_bytes())],
    )
    .await?;
    let Some(row) = row else { return Ok(None) };
    if row.try_get_by_index::<i64>(3)? > 1 || sql::get_u32(&row, 4, "jobs.run")? != of.run {
        return Ok(None);
    }
    let (live, nonce): (Option<i64>, Option<i64>) = (row.try_get_by_index(5)?, row.try_get_by_index(6)?);
    let is_live = live == Some(i64::from(of.attempt)) && nonce == Some(of.nonce.0.cast_signed());
    if !is_live && !was_closed(tx, job, of).await? {
        return Ok(None);
    }
    Ok(Some(Fenced {
        project: ProjectId(row.try_get_by_index(0)?),
        endpoint: EndpointId(row.try_get_by_index(1)?),
        sync_id: row.try_get_by_index::<i64>(2)? != 0,
    }))
}

async fn was_closed(tx: &WriteTx, job: JobId, of: &AttemptRef) -> Result<bool, StoreError> {
    let row = sql::query_one(
        tx.conn(),
        "SELECT 1 FROM attempts WHERE job_id = $1 AND run = $2 AND attempt = $3 AND nonce = $4 LIMIT 1",
        [
            sql::id(job.as_bytes()),
            sql::int(of.run),
            sql::int(of.attempt),
            Value::from(of.nonce.0.cast_signed()),
        ],
    )
    .await?;
    Ok(row.is_some())
}

/// A file that is about to be stored.
#[derive(Clone, Debug)]
pub struct NewArtifact {
    /// Its id, made by the worker so that a repeated request names the same.
    pub id: ArtifactId,
    /// Its file name, harmless.
    pub name: String,
    /// Its type.
    pub content_type: String,
    /// Where its bytes will lie.
    pub blob_key: String,
}

const INSERT: Rows = Rows {
    name: "artifacts.insert",
    before: "INSERT INTO artifacts (id, project_id, job_id, sync_id, run, attempt, nonce, worker_id, name, content_type, \
             blob_key, state, created_at_ms, confirmed_sha256, expires_at_ms, check_at_ms, endpoint_id) VALUES ",
    casts: &[""; 17],
    after: " ON CONFLICT (id) DO NOTHING",
};

/// Notes files before they are stored. Known ids stay as they are.
///
/// # Errors
/// The database's.
pub async fn reserve(
    tx: &WriteTx,
    job: JobId,
    of: &AttemptRef,
    fenced: &Fenced,
    worker: &str,
    keep_ms: u64,
    new: &[NewArtifact],
) -> Result<(), StoreError> {
    let now = tx.now_ms();
    INSERT
        .execute(tx.conn(), new, |a, v| {
            v.extend([
                sql::id(a.id.as_bytes()),
                Value::from(fenced.project.0),
                sql::id(job.as_bytes()),
                sql::int(u8::from(fenced.sync_id)),
                sql::int(of.run),
                sql::int(of.attempt),
                Value::from(of.nonce.0.cast_signed()),
                Value::from(worker),
                Value::from(a.name.as_str()),
                Value::from(a.content_type.as_str()),
                Value::from(a.blob_key.as_str()),
                sql::int(ArtifactState::Uploading.code()),
                Value::from(now),
                sql::int(0_u8),
                Value::from(now.saturating_add_unsigned(keep_ms)),
                Value::from(now + UPLOAD_WITHIN_MS),
                Value::from(fenced.endpoint.0),
            ]);
        })
        .await
        .map(drop)
}

/// A stored file.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its id.
    pub id: ArtifactId,
    /// Its size.
    pub size_bytes: u64,
    /// SHA-256 of its bytes.
    pub sha256: Vec<u8>,
}

/// Locks the rows of ids, in order of id; unknown ones are missing.
///
/// # Errors
/// The database's.
pub async fn lock(tx: &WriteTx, ids: &[ArtifactId]) -> Result<Vec<ArtifactRow>, StoreError> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    let mut rows = Vec::with_capacity(ids.len());
    let statement = if tx.is_postgres() { &LOCK_POSTGRES } else { &LOCK };
    for row in statement.query(tx.conn(), &ids, |id, v| v.push(sql::id(id.as_bytes()))).await? {
        rows.push(row_of(&row)?);
    }
    rows.sort_unstable_by_key(|row| row.id);
    Ok(rows)
}

const LOCK: Rows = Rows {
    name: "artifacts.lock",
    before: "SELECT id, project_id, job_id, sync_id, run, attempt, worker_id, name, content_type, size_bytes, sha256, \
             blob_key, state, created_at_ms, ready_at_ms, wait_until_ms, given_up_at_ms, confirmed_at_ms, \
             confirmed_sha256, expires_at_ms, endpoint_id FROM artifacts WHERE id IN (",
    casts: LIST,
    after: ")",
};
const LOCK_POSTGRES: Rows = Rows {
    name: "artifacts.lock_postgres",
    before: LOCK.before,
    casts: LIST,
    after: ") ORDER BY id FOR UPDATE",
};

/// A stored file can be fetched from now on. `wait_ms`: its receiver is waited for.
///
/// # Errors
/// The database's.
pub async fn make_ready(
    tx: &WriteTx,
    row: &mut ArtifactRow,
    stored: &Stored,
    keep_ms: u64,
    wait_ms: Option<u64>,
) -> Result<(), StoreError> {
    let now = tx.now_ms();
    row.state = ArtifactState::Ready;
    row.size_bytes = stored.size_bytes;
    row.sha256.clone_from(&stored.sha256);
    row.ready_at_ms = Some(now);
    row.wait_until_ms = wait_ms.map(|ms| now.saturating_add_unsigned(ms));
    row.expires_at_ms = now.saturating_add_unsigned(keep_ms);
    sql::execute(
        tx.conn(),
        "UPDATE artifacts SET state = $2, size_bytes = $3, sha256 = $4, ready_at_ms = $5, wait_until_ms = $6, \
         expires_at_ms = $7, check_at_ms = $8 WHERE id = $1",
        [
            sql::id(row.id.as_bytes()),
            sql::int(row.state.code()),
            sql::int(row.size_bytes),
            Value::from(row.sha256.clone()),
            Value::from(row.ready_at_ms),
            Value::from(row.wait_until_ms),
            Value::from(row.expires_at_ms),
            Value::from(next_check(row)),
        ],
    )
    .await
    .map(drop)
}

/// When the row is due next.
fn next_check(row: &ArtifactRow) -> i64 {
    match (row.state, row.wait_until_ms) {
        (ArtifactState::Ready, Some(until)) => until.min(row.expires_at_ms),
        _ => row.expires_at_ms,
    }
}

/// The receiver has it. `sha256`: it told the right hash.
///
/// # Errors
/// The database's.
pub async fn confirm(tx: &WriteTx, row: &mut ArtifactRow, sha256: bool) -> Result<(), StoreError> {
    row.state = ArtifactState::Confirmed;
    row.confirmed_at_ms = Some(tx.now_ms());
    row.confirmed_sha256 = sha256;
    set_state(tx, row).await
}

/// The wait is over without a confirmation.
///
/// # Errors
/// The database's.
pub async fn give_up(tx: &WriteTx, row: &mut ArtifactRow) -> Result<(), StoreError> {
    row.state = ArtifactState::Unconfirmed;
    row.given_up_at_ms = Some(tx.now_ms());
    set_state(tx, row).await
}

/// Its time is over. The blob is deleted afterwards; until then the row is due again at once.
///
/// # Errors
/// The database's.
pub async fn expire(tx: &WriteTx, row: &mut ArtifactRow) -> Result<(), StoreError> {
    row.state = ArtifactState::Expired;
    row.expires_at_ms = row.expires_at_ms.min(tx.now_ms());
    set_state(tx, row).await
}

/// A delivery still needs its bytes: they stay until then at least.
///
/// # Errors
/// The database's.
pub async fn postpone(tx: &WriteTx, row: &mut ArtifactRow, until_ms: i64) -> Result<(), StoreError> {
    row.expires_at_ms = until_ms;
    set_state(tx, row).await
}

async fn set_state(tx: &WriteTx, row: &ArtifactRow) -> Result<(), StoreError> {
    sql::execute(
        tx.conn(),
        "UPDATE artifacts SET state = $2, given_up_at_ms = $3, confirmed_at_ms = $4, confirmed_sha256 = $5, \
         expires_at_ms = $6, check_at_ms = $7 WHERE id = $1",
        [
            sql::id(row.id.as_bytes()),
            sql::int(row.state.code()),
            Value::from(row.given_up_at_ms),
            Value::from(row.confirmed_at_ms),
            sql::int(u8::from(row.confirmed_sha256)),
            Value::from(row.expires_at_ms),
            Value::from(next_check(row)),
        ],
    )
    .await
    .map(drop)
}

/// Rows that are due, the longest due first, locked; rows that somebody else works on are left out on PostgreSQL.
///
/// # Errors
/// The database's.
pub async fn lock_due(tx: &WriteTx, limit: u32) -> Result<Vec<ArtifactRow>, StoreError> {
    let lock = if tx.is_postgres() { " FOR UPDATE SKIP LOCKED" } else { "" };
    let rows = sql::query(
        tx.conn(),
        &format!(
            "SELECT {COLUMNS} FROM artifacts WHERE check_at_ms <= $1 ORDER BY check_at_ms, id LIMIT $2{lock}"
        ),
        [Value::from(tx.now_ms()), sql::int(limit)],
    )
    .await?;
    rows.iter().map(row_of).collect()
}

const BLOBS_GONE: Rows = Rows {
    name: "artifacts.blobs_gone",
    before: "UPDATE artifacts SET blob_key = NULL, check_at_ms = expires_at_ms + 604800000 WHERE state = 3 AND id IN (",
    casts: LIST,
    after: ")",
};

/// The blobs of expired artefacts are deleted. Their rows stay for [`EXPIRED_KEPT_MS`].
///
/// # Errors
/// The database's.
pub async fn blobs_gone(tx: &WriteTx, ids: &[ArtifactId]) -> Result<u64, StoreError> {
    BLOBS_GONE.execute(tx.conn(), ids, |id, v| v.push(sql::id(id.as_bytes()))).await
}

const FORGET: Rows = Rows {
    name: "artifacts.forget",
    before: "DELETE FROM artifacts WHERE state = 3 AND blob_key IS NULL AND id IN (",
    casts: LIST,
    after: ")",
};

/// Forgets expired artefacts whose blobs are gone.
///
/// # Errors
/// The database's.
pub async fn forget(tx: &WriteTx, ids: &[ArtifactId]) -> Result<u64, StoreError> {
    FORGET.execute(tx.conn(), ids, |id, v| v.push(sql::id(id.as_bytes()))).await
}
