//! `/stream`: pieces of output, each given out once. The cursor is the only thing api-ingest updates.

use ringback_domain::JobId;
use sea_orm::Value;

use crate::{
    StoreError, WriteTx,
    sql::{self, get_u32},
};

/// What one call of `/stream` gives out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Pieces, verbatim JSON, in order.
    pub chunks: Vec<Vec<u8>>,
    /// Whether pieces of an earlier attempt were given out before: the client must start again.
    pub reset: bool,
    /// Whether more pieces wait already.
    pub more: bool,
}

/// Most pieces of one answer, and the size after which no more are added.
const MAX_CHUNKS: usize = 500;
const MAX_BYTES: usize = 4 * 1024 * 1024;

struct Cursor {
    run: u32,
    attempt: u32,
    next_n: u32,
}

async fn lock_cursor(tx: &WriteTx, job: JobId) -> Result<Option<Cursor>, StoreError> {
    let lock = if tx.is_postgres() { " FOR UPDATE" } else { "" };
    let row = sql::query_one(
        tx.conn(),
        &format!("SELECT run, attempt, next_n FROM stream_cursors WHERE job_id = $1{lock}"),
        [sql::id(job.as_bytes())],
    )
    .await?;
    row.map(|row| {
        Ok(Cursor {
            run: get_u32(&row, 0, "stream_cursors.run")?,
            attempt: get_u32(&row, 1, "stream_cursors.attempt")?,
            next_n: get_u32(&row, 2, "stream_cursors.next_n")?,
        })
    })
    .transpose()
}

/// Takes the pieces of an attempt that no call has taken before, and moves the cursor past them.
pub async fn drain_chunks(tx: &WriteTx, job: JobId, run: u32, attempt: u32) -> Result<Drained, StoreError> {
    // The row exists before it is locked, so that two first calls on PostgreSQL wait for each other.
    sql::execute(
        tx.conn(),
        "INSERT INTO stream_cursors (job_id, run, attempt, next_n, told_end) VALUES ($1, $2, $3, 0, 0) \
         ON CONFLICT (job_id) DO NOTHING",
        [sql::id(job.as_bytes()), sql::int(run), sql::int(attempt)],
    )
    .await?;
    let cursor = lock_cursor(tx, job).await?.ok_or(StoreError::corrupt("stream_cursors"))?;
    let same = (cursor.run, cursor.attempt) == (run, attempt);
    let from = if same { cursor.next_n } else { 0 };
    let rows = sql::query(
        tx.conn(),
        "SELECT n, output FROM chunks WHERE job_id = $1 AND run = $2 AND attempt = $3 AND n >= $4 ORDER BY n LIMIT $5",
        [
            sql::id(job.as_bytes()),
            sql::int(run),
            sql::int(attempt),
            sql::int(from),
            sql::int(MAX_CHUNKS as u64 + 1),
        ],
    )
    .await?;
    let mut drained = Drained { reset: !same && cursor.next_n > 0, ..Drained::default() };
    let (mut next_n, mut bytes) = (from, 0);
    for row in &rows {
        let n = get_u32(row, 0, "chunks.n")?;
        let output: Vec<u8> = row.try_get_by_index(1)?;
        if drained.chunks.len() == MAX_CHUNKS || (bytes > 0 && bytes + output.len() > MAX_BYTES) {
            drained.more = true;
            break;
        }
        bytes += output.len();
        next_n = n + 1;
        drained.chunks.push(output);
    }
    if drained.chunks.is_empty() {
        // Nothing was given out: the mark of a reset is kept for the first piece.
        return Ok(drained);
    }
    sql::execute(
        tx.conn(),
        "UPDATE stream_cursors SET run = $2, attempt = $3, next_n = $4 WHERE job_id = $1",
        [sql::id(job.as_bytes()), sql::int(run), sql::int(attempt), sql::int(next_n)],
    )
    .await?;
    Ok(drained)
}

/// Tells the end of a cancelled run once: true at the first call for this run, false afterwards.
pub async fn tell_end_once(tx: &WriteTx, job: JobId, run: u32) -> Result<bool, StoreError> {
    let told = sql::execute(
        tx.conn(),
        "INSERT INTO stream_cursors (job_id, run, attempt, next_n, told_end) VALUES ($1, $2, 0, 0, $2) \
         ON CONFLICT (job_id) DO UPDATE SET told_end = excluded.told_end \
         WHERE stream_cursors.told_end < excluded.told_end",
        [sql::id(job.as_bytes()), Value::from(i64::from(run))],
    )
    .await?;
    Ok(told == 1)
}

/// Whether [`drain_chunks`] would give out anything.
pub async fn has_new_chunks<C: sea_orm::ConnectionTrait>(
    conn: &C,
    job: JobId,
    run: u32,
    attempt: u32,
) -> Result<bool, StoreError> {
    let row = sql::query_one(
        conn,
        "SELECT 1 FROM chunks c LEFT JOIN stream_cursors s \
         ON s.job_id = c.job_id AND s.run = c.run AND s.attempt = c.attempt \
         WHERE c.job_id = $1 AND c.run = $2 AND c.attempt = $3 AND c.n >= COALESCE(s.next_n, 0) LIMIT 1",
        [sql::id(job.as_bytes()), sql::int(run), sql::int(attempt)],
    )
    .await?;
    Ok(row.is_some())
}
