//! P5, from two independent sides: what jobs, batches and events say they owe, and the deliveries that exist.
//!
//! Deliveries are inserted in the transaction that raises `owed`, so one statement, which sees one snapshot, finds
//! both sides equal at any moment. Windows of UUIDv7 time keep each statement small.

use ringback_domain::{BatchId, JobId};
use sea_orm::{ConnectionTrait, QueryResult, Value};
use uuid::Uuid;

use crate::{
    StoreError,
    sql::{self},
};

/// Ids of a stretch of time: from `from_ms` up to but without `to_ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First millisecond, Unix ms.
    pub from_ms: u64,
    /// First millisecond after it.
    pub to_ms: u64,
}

impl Window {
    fn keys(self) -> [Value; 2] {
        [key(self.from_ms), key(self.to_ms)]
    }
}

/// The lowest id of a moment: 48 bits of time in front, zeros behind.
pub(crate) fn key(ms: u64) -> Value {
    let mut bytes = [0; 16];
    bytes[..6].copy_from_slice(&ms.to_be_bytes()[2..]);
    sql::id(&bytes)
}

/// Both sides of a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Books {
    /// Sum of what jobs, batches and events say they owe.
    pub owed: i64,
    /// Deliveries by state: pending, delivered, dead, superseded, cancelled.
    pub by_state: [i64; 5],
}

impl Books {
    /// Deliveries that exist.
    #[must_use]
    pub fn deliveries(&self) -> i64 {
        self.by_state.iter().sum()
    }

    /// Whether both sides agree.
    #[must_use]
    pub fn balance(&self) -> bool {
        self.owed == self.deliveries()
    }

    /// Adds another window.
    pub fn add(&mut self, other: &Self) {
        self.owed += other.owed;
        for (sum, n) in self.by_state.iter_mut().zip(other.by_state) {
            *sum += n;
        }
    }
}

/// Both sides of one window, from one snapshot.
///
/// # Errors
/// The database's.
pub async fn books_of<C: ConnectionTrait>(conn: &C, window: Window) -> Result<Books, StoreError> {
    let [from, to] = window.keys();
    let rows = sql::query(
        conn,
        "SELECT -1 AS side, CAST(COALESCE(SUM(owed), 0) AS BIGINT) AS n FROM jobs WHERE id >= $1 AND id < $2 \
         UNION ALL SELECT -1, CAST(COALESCE(SUM(owed), 0) AS BIGINT) FROM batches WHERE id >= $1 AND id < $2 \
         UNION ALL SELECT -1, CAST(COALESCE(SUM(owed), 0) AS BIGINT) FROM events WHERE id >= $1 AND id < $2 \
         UNION ALL SELECT state, COUNT(*) FROM deliveries WHERE owner_id >= $1 AND owner_id < $2 GROUP BY state",
        [from, to],
    )
    .await?;
    let mut books = Books::default();
    for row in &rows {
        let n: i64 = row.try_get_by_index(1)?;
        match side(row)? {
            None => books.owed += n,
            Some(state) => {
                *books.by_state.get_mut(state).ok_or(StoreError::corrupt("deliveries.state"))? += n;
            }
        }
    }
    Ok(books)
}

/// `-1` is a constant of 32 bits on PostgreSQL unless it stands beside 64-bit columns; read either.
fn side(row: &QueryResult) -> Result<Option<usize>, StoreError> {
    let n = match row.try_get_by_index::<i64>(0) {
        Ok(n) => n,
        Err(_) => i64::from(row.try_get_by_index::<i32>(0)?),
    };
    Ok(usize::try_from(n).ok())
}

/// Somebody whose books do not balance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offender {
    /// The job, batch or event.
    pub owner: Uuid,
    /// What it says it owes; `None` where the row is gone.
    pub owed: Option<i64>,
    /// Deliveries that exist.
    pub deliveries: i64,
}

/// Names those in a window whose two sides differ.
///
/// # Errors
/// The database's.
pub async fn offenders<C: ConnectionTrait>(
    conn: &C,
    window: Window,
    limit: u32,
) -> Result<Vec<Offender>, StoreError> {
    let [from, to] = window.keys();
    let rows = sql::query(
        conn,
        "SELECT o.id, o.owed, o.n FROM (\
           SELECT j.id AS id, j.owed AS owed, (SELECT COUNT(*) FROM deliveries d WHERE d.owner_id = j.id) AS n \
             FROM jobs j WHERE j.id >= $1 AND j.id < $2 \
           UNION ALL \
           SELECT b.id, b.owed, (SELECT COUNT(*) FROM deliveries d WHERE d.owner_id = b.id) \
             FROM batches b WHERE b.id >= $1 AND b.id < $2 \
           UNION ALL \
           SELECT e.id, e.owed, (SELECT COUNT(*) FROM deliveries d WHERE d.owner_id = e.id) \
             FROM events e WHERE e.id >= $1 AND e.id < $2 \
           UNION ALL \
           SELECT d.owner_id, NULL, COUNT(*) FROM deliveries d WHERE d.owner_id >= $1 AND d.owner_id < $2 \
             AND NOT EXISTS (SELECT 1 FROM jobs j WHERE j.id = d.owner_id) \
             AND NOT EXISTS (SELECT 1 FROM batches b WHERE b.id = d.owner_id) \
             AND NOT EXISTS (SELECT 1 FROM events e WHERE e.id = d.owner_id) GROUP BY d.owner_id\
         ) AS o WHERE o.owed IS NULL OR o.owed <> o.n ORDER BY o.id LIMIT $3",
        [from, to, sql::int(limit)],
    )
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Offender {
                owner: Uuid::from_slice(&row.try_get_by_index::<Vec<u8>>(0)?)
                    .map_err(|_| StoreError::corrupt("deliveries.owner_id"))?,
                owed: row.try_get_by_index(1)?,
                deliveries: row.try_get_by_index(2)?,
            })
        })
        .collect()
}

/// The oldest moment that any job, batch, event or delivery belongs to, Unix ms.
///
/// # Errors
/// The database's.
pub async fn oldest_ms<C: ConnectionTrait>(conn: &C) -> Result<Option<u64>, StoreError> {
    oldest_from_ms(conn, 0).await
}

/// The oldest moment not before `from_ms` that any job, batch, event or delivery belongs to, Unix ms: empty stretches are
/// skipped in one step.
///
/// # Errors
/// The database's.
pub async fn oldest_from_ms<C: ConnectionTrait>(conn: &C, from_ms: u64) -> Result<Option<u64>, StoreError> {
    let mut oldest: Option<u64> = None;
    for query in [
        "SELECT id FROM jobs WHERE id >= $1 ORDER BY id LIMIT 1",
        "SELECT id FROM batches WHERE id >= $1 ORDER BY id LIMIT 1",
        "SELECT id FROM events WHERE id >= $1 ORDER BY id LIMIT 1",
        "SELECT owner_id FROM deliveries WHERE owner_id >= $1 ORDER BY owner_id LIMIT 1",
    ] {
        if let Some(row) = sql::query_one(conn, query, [key(from_ms)]).await? {
            let id = JobId::from_slice(&row.try_get_by_index::<Vec<u8>>(0)?)
                .map_err(|_| StoreError::corrupt("id"))?;
            oldest = Some(oldest.map_or(id.unix_ms(), |o| o.min(id.unix_ms())));
        }
    }
    Ok(oldest)
}

/// What retention removed so far: owed by the jobs' count, and deliveries counted one by one.
///
/// # Errors
/// The database's.
pub async fn purged_totals<C: ConnectionTrait>(conn: &C) -> Result<(i64, i64), StoreError> {
    let row = sql::query_one(conn, "SELECT owed, deliveries FROM purged_totals WHERE id = 1", []).await?;
    row.map_or(Ok((0, 0)), |row| Ok((row.try_get_by_index(0)?, row.try_get_by_index(1)?)))
}

/// Whether a batch of that id exists: tells a batch's offender from a job's.
///
/// # Errors
/// The database's.
pub async fn is_batch<C: ConnectionTrait>(conn: &C, id: BatchId) -> Result<bool, StoreError> {
    let row = sql::query_one(conn, "SELECT 1 FROM batches WHERE id = $1", [sql::id(id.as_bytes())]).await?;
    Ok(row.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_holds_the_ids_of_its_time_and_no_others() {
        let bytes = |v: Value| match v {
            Value::Bytes(Some(b)) => b,
            other => panic!("{other:?}"),
        };
        let id = |ms, fill| JobId::from_parts(ms, [fill; 10]).as_bytes().to_vec();
        let (from, to) = (bytes(key(1_000)).to_vec(), bytes(key(2_000)).to_vec());
        assert!(id(999, 255) < from && from <= id(1_000, 0));
        assert!(id(1_999, 255) < to && to <= id(2_000, 0));
    }
}
