//! `/stream`: pieces of output and how far they were given out. The cursor is the only thing api-ingest updates.
//!
//! Reading pieces and moving the cursor are two steps, with the answer to the client between them.

use ringback_domain::JobId;
use sea_orm::{ConnectionTrait, Value};

use crate::{
    StoreError, WriteTx,
    sql::{self, get_u32},
};

/// What one call of `/stream` gives out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pieces {
    /// Verbatim JSON, in order.
    pub chunks: Vec<Vec<u8>>,
    /// Whether pieces of an earlier attempt were given out before: the client must start again.
    pub reset: bool,
    /// Whether more pieces wait already.
    pub more: bool,
    /// What the cursor becomes once they were given out.
    pub step: Option<CursorStep>,
}

/// A move of a cursor: made only if it still stands where the pieces were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CursorStep {
    job: JobId,
    from: Position,
    to: Position,
}

/// Everything below `next_n` of this attempt was given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    run: u32,
    attempt: u32,
    next_n: u32,
}

/// Most pieces of one answer, and the size after which no more are added.
const MAX_CHUNKS: usize = 500;
const MAX_BYTES: usize = 4 * 1024 * 1024;

async fn position<C: ConnectionTrait>(conn: &C, job: JobId) -> Result<Option<Position>, StoreError> {
    let row = sql::query_one(
        conn,
        "SELECT run, attempt, next_n FROM stream_cursors WHERE job_id = $1",
        [sql::id(job.as_bytes())],
    )
    .await?;
    row.map(|row| {
        Ok(Position {
            run: get_u32(&row, 0, "stream_cursors.run")?,
            attempt: get_u32(&row, 1, "stream_cursors.attempt")?,
            next_n: get_u32(&row, 2, "stream_cursors.next_n")?,
        })
    })
    .transpose()
}

/// The pieces of an attempt that were not given out yet.
pub async fn next_pieces<C: ConnectionTrait>(
    conn: &C,
    job: JobId,
    run: u32,
    attempt: u32,
) -> Result<Pieces, StoreError> {
    let start = Position { run, attempt, next_n: 0 };
    let from = position(conn, job).await?.unwrap_or(start);
    let same = (from.run, from.attempt) == (run, attempt);
    let mut to = if same { from } else { start };
    let (rows, more) = pieces_after(conn, job, run, attempt, to.next_n).await?;
    let mut pieces = Pieces { reset: !same && from.next_n > 0, more, ..Pieces::default() };
    for (n, output) in rows {
        to.next_n = n + 1;
        pieces.chunks.push(output);
    }
    // Without a piece nothing is given out: the mark of a reset is kept for the first one.
    pieces.step = (!pieces.chunks.is_empty()).then_some(CursorStep { job, from, to });
    Ok(pieces)
}

/// Pieces of an attempt with their numbers, from `next_n` on, and whether more wait already. For readers that keep their
/// position themselves.
pub async fn pieces_after<C: ConnectionTrait>(
    conn: &C,
    job: JobId,
    run: u32,
    attempt: u32,
    next_n: u32,
) -> Result<(Vec<(u32, Vec<u8>)>, bool), StoreError> {
    let rows = sql::query(
        conn,
        "SELECT n, output FROM chunks WHERE job_id = $1 AND run = $2 AND attempt = $3 AND n >= $4 ORDER BY n LIMIT $5",
        [
            sql::id(job.as_bytes()),
            sql::int(run),
            sql::int(attempt),
            sql::int(next_n),
            sql::int(MAX_CHUNKS as u64 + 1),
        ],
    )
    .await?;
    let (mut pieces, mut bytes) = (Vec::new(), 0);
    for row in &rows {
        let output: Vec<u8> = row.try_get_by_index(1)?;
        if pieces.len() == MAX_CHUNKS || (bytes > 0 && bytes + output.len() > MAX_BYTES) {
            return Ok((pieces, true));
        }
        bytes += output.len();
        pieces.push((get_u32(row, 0, "chunks.n")?, output));
    }
    Ok((pieces, false))
}

/// Moves a cursor past pieces that were given out. False if it was moved meanwhile.
pub async fn advance(tx: &WriteTx, step: CursorStep) -> Result<bool, StoreError> {
    let CursorStep { job, from, to } = step;
    let moved = sql::execute(
        tx.conn(),
        "INSERT INTO stream_cursors (job_id, run, attempt, next_n, told_end) VALUES ($1, $2, $3, $4, 0) \
         ON CONFLICT (job_id) DO UPDATE SET run = excluded.run, attempt = excluded.attempt, next_n = excluded.next_n \
         WHERE stream_cursors.run = $5 AND stream_cursors.attempt = $6 AND stream_cursors.next_n = $7",
        [
            sql::id(job.as_bytes()),
            sql::int(to.run),
            sql::int(to.attempt),
            sql::int(to.next_n),
            sql::int(from.run),
            sql::int(from.attempt),
            sql::int(from.next_n),
        ],
    )
    .await?;
    Ok(moved == 1)
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

/// Whether [`next_pieces`] would find anything.
pub async fn has_new_chunks<C: ConnectionTrait>(
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
