//! Reading what a partition still owes, page by page.

use prost::Message as _;
use ringback_contracts::v1;
use sea_orm::{ConnectionTrait, QueryResult, Value};
use uuid::Uuid;

use super::DeliveryState;
use crate::{
    StoreError,
    sql::{self, LIST, Rows, get_u32},
};

/// Where a page begins: after this row in the order of (due time, owner).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DueAfter {
    /// `next_attempt_at_ms` of the last row of the former page.
    pub at_ms: i64,
    /// Its owner.
    pub owner: Uuid,
}

impl DueAfter {
    /// Before the first row.
    pub const START: Self = Self { at_ms: i64::MIN, owner: Uuid::nil() };
}

/// Jobs and batches with a pending delivery that is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DuePage {
    /// Each owner once, the longest due first.
    pub owners: Vec<Uuid>,
    /// Where the next page begins; `None` when this was the last.
    pub next: Option<DueAfter>,
}

/// One page of owners whose deliveries of `partition` are due at `due_ms`.
///
/// # Errors
/// The database's.
pub async fn due_page<C: ConnectionTrait>(
    conn: &C,
    partition: u16,
    due_ms: i64,
    after: DueAfter,
    limit: u32,
) -> Result<DuePage, StoreError> {
    due_page_but(conn, partition, due_ms, after, limit, &[]).await
}

/// Targets that a page can leave out.
const SKIPPED: usize = 8;

/// The same without what is owed to the first few of `held`: targets that take nothing now but test sends (503), so that
/// a heap of theirs is not read again and again.
///
/// # Errors
/// The database's.
pub async fn due_page_but<C: ConnectionTrait>(
    conn: &C,
    partition: u16,
    due_ms: i64,
    after: DueAfter,
    limit: u32,
    held: &[u32],
) -> Result<DuePage, StoreError> {
    let mut values = vec![
        sql::int(partition),
        Value::from(due_ms),
        Value::from(after.at_ms),
        sql::id(after.owner.as_bytes()),
        sql::int(limit),
    ];
    let held = held.iter().map(|target| i64::from(*target)).chain(std::iter::repeat(-1));
    values.extend(held.take(SKIPPED).map(Value::from));
    let rows = sql::query(
        conn,
        "SELECT next_attempt_at_ms, owner_id FROM deliveries \
         WHERE partition = $1 AND state = 0 AND next_attempt_at_ms <= $2 \
         AND (next_attempt_at_ms > $3 OR (next_attempt_at_ms = $3 AND owner_id > $4)) \
         AND next_attempt_at_ms >= $3 AND (target NOT IN ($6, $7, $8, $9, $10, $11, $12, $13) OR event = 503) \
         ORDER BY next_attempt_at_ms, owner_id LIMIT $5",
        values,
    )
    .await?;
    read_page(&rows, after, limit)
}

/// One page of owners with any pending delivery of `partition` to one target, due or not.
///
/// # Errors
/// The database's.
pub async fn target_page<C: ConnectionTrait>(
    conn: &C,
    partition: u16,
    target: u32,
    after: DueAfter,
    limit: u32,
) -> Result<DuePage, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT next_attempt_at_ms, owner_id FROM deliveries \
         WHERE partition = $1 AND state = 0 AND target = $2 \
         AND (next_attempt_at_ms > $3 OR (next_attempt_at_ms = $3 AND owner_id > $4)) \
         AND next_attempt_at_ms >= $3 \
         ORDER BY next_attempt_at_ms, owner_id LIMIT $5",
        [
            sql::int(partition),
            sql::int(target),
            Value::from(after.at_ms),
            sql::id(after.owner.as_bytes()),
            sql::int(limit),
        ],
    )
    .await?;
    read_page(&rows, after, limit)
}

fn read_page(rows: &[QueryResult], after: DueAfter, limit: u32) -> Result<DuePage, StoreError> {
    let mut owners: Vec<Uuid> = Vec::with_capacity(rows.len());
    let mut last = after;
    for row in rows {
        let owner = read_owner(row, 1)?;
        last = DueAfter { at_ms: row.try_get_by_index(0)?, owner };
        owners.push(owner);
    }
    let full = owners.len() >= limit as usize;
    let mut seen = std::collections::HashSet::with_capacity(owners.len());
    owners.retain(|owner| seen.insert(*owner));
    Ok(DuePage { owners, next: full.then_some(last) })
}

/// A delivery as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// The delivery; its URL and body are empty unless it is pending.
    pub delivery: v1::Delivery,
    /// Where it stands.
    pub state: DeliveryState,
    /// Tries made so far.
    pub attempts: u32,
    /// When it is due, if it is pending.
    pub next_attempt_at_ms: Option<i64>,
    /// Status of the last answer, if there was one.
    pub last_status: Option<u16>,
}

const STORED: Rows = Rows {
    name: "deliveries.stored",
    before: "SELECT d.owner_id, d.seq, d.target, d.project_id, d.event, d.terminal, d.state, d.attempts, \
             d.created_at_ms, d.next_attempt_at_ms, d.last_status, \
             CASE WHEN d.state = 0 THEN d.url END, CASE WHEN d.state = 0 THEN COALESCE(s.body, d.body) END, \
             COALESCE(j.traceparent, b.traceparent), d.format, d.replays, d.attempts_before, \
             CASE WHEN d.state = 0 AND d.event IN (7, 21) THEN \
             (SELECT e.overtaken FROM events e WHERE e.id = d.owner_id) END \
             FROM deliveries d LEFT JOIN deliveries s ON d.body_target IS NOT NULL AND d.state = 0 \
             AND s.owner_id = d.owner_id AND s.seq = d.seq AND s.target = d.body_target \
             LEFT JOIN jobs j ON j.id = d.owner_id LEFT JOIN batches b ON b.id = d.owner_id \
             WHERE d.owner_id IN (",
    casts: LIST,
    after: ") ORDER BY d.owner_id, d.target, d.seq",
};

/// All deliveries of these jobs and batches, in the order of (owner, target, seq). Those that are no longer pending
/// come along, without their bytes, because what may be sent depends on what was.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn stored_of<C: ConnectionTrait>(conn: &C, owners: &[Uuid]) -> Result<Vec<Stored>, StoreError> {
    let rows = STORED.query(conn, owners, |owner, v| v.push(sql::id(owner.as_bytes()))).await?;
    rows.iter().map(read_stored).collect()
}

fn read_stored(row: &QueryResult) -> Result<Stored, StoreError> {
    let state =
        DeliveryState::from_code(row.try_get_by_index(6)?).ok_or(StoreError::corrupt("deliveries.state"))?;
    let body: Option<Vec<u8>> = row.try_get_by_index(12)?;
    let body = body
        .map(|bytes| v1::BodyParts::decode(bytes::Bytes::from(bytes)))
        .transpose()
        .map_err(|_| StoreError::corrupt("deliveries.body"))?;
    let delivery = v1::Delivery {
        owner_id: bytes::Bytes::from(row.try_get_by_index::<Vec<u8>>(0)?),
        seq: get_u32(row, 1, "deliveries.seq")?,
        target: get_u32(row, 2, "deliveries.target")?,
        project_id: row.try_get_by_index(3)?,
        event: get_u32(row, 4, "deliveries.event")?,
        terminal: row.try_get_by_index::<i64>(5)? != 0,
        created_at_ms: row.try_get_by_index(8)?,
        url: row.try_get_by_index::<Option<String>>(11)?.unwrap_or_default(),
        body,
        traceparent: row.try_get_by_index::<Option<String>>(13)?.unwrap_or_default(),
        // The rows before it were read along, so that nobody needs to ask.
        run: 1,
        format: get_u32(row, 14, "deliveries.format")?,
        replays: get_u32(row, 15, "deliveries.replays")?,
        attempts_before: get_u32(row, 16, "deliveries.attempts_before")?,
        overtaken: row.try_get_by_index::<Option<i64>>(17)?.is_some_and(|overtaken| overtaken != 0),
    };
    let last_status = row.try_get_by_index::<Option<i64>>(10)?;
    Ok(Stored {
        delivery,
        state,
        attempts: get_u32(row, 7, "deliveries.attempts")?,
        next_attempt_at_ms: row.try_get_by_index(9)?,
        last_status: last_status.and_then(|code| u16::try_from(code).ok()),
    })
}

pub(super) fn read_owner(row: &QueryResult, index: usize) -> Result<Uuid, StoreError> {
    Uuid::from_slice(&row.try_get_by_index::<Vec<u8>>(index)?)
        .map_err(|_| StoreError::corrupt("deliveries.owner_id"))
}
