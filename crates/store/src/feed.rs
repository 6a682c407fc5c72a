//! The feed: every delivery of a project in the order of commits, with its bytes.
//!
//! A reader that goes on from its cursor misses nothing, whoever writes at the same time: a page ends before the
//! first place that a transaction still running could fill ([`horizon`]).

use bytes::Bytes;
use prost::Message as _;
use ringback_contracts::v1;
use ringback_domain::{ProjectId, target::FORMAT_RUNFLOW};
use sea_orm::{ConnectionTrait, DatabaseBackend, QueryResult, Value};

use crate::{
    StoreError,
    deliveries::DeliveryState,
    delivery_search::{DeliveryFilter, Place},
    sql::{self, get_u32},
    webhooks::registry::feed_horizon,
};

/// Rows that one page looks through at most; a filter that matches few of them gives a short page.
const LOOK_THROUGH: u32 = 20_000;

/// A delivery in the feed.
#[derive(Clone, Debug)]
pub struct FeedItem {
    /// Its key and its place.
    pub place: Place,
    /// Code of its event.
    pub event: u32,
    /// Whether it carries Runflow's signature.
    pub runflow: bool,
    /// Where it stands.
    pub state: DeliveryState,
    /// How often it was replayed.
    pub replays: u32,
    /// When it was owed.
    pub created_at_ms: i64,
    /// Its bytes.
    pub body: v1::BodyParts,
}

/// A page of the feed.
#[derive(Clone, Debug)]
pub struct FeedPage {
    /// In order.
    pub items: Vec<FeedItem>,
    /// Where the next page begins.
    pub next: Place,
    /// Whether more is there already.
    pub more: bool,
}

/// The first place that may still change: everything before it is committed and visible to whoever asks after this
/// answer.
///
/// # Errors
/// The database's.
pub async fn horizon<C: ConnectionTrait>(conn: &C) -> Result<i64, StoreError> {
    if conn.get_database_backend() != DatabaseBackend::Sqlite {
        return feed_horizon(conn).await;
    }
    // One writer at a time: whatever has a number is committed, and later ones get higher numbers.
    let row = sql::query_one(conn, "SELECT value FROM meta WHERE key = 'feed_position'", []).await?;
    let last: i64 = match row {
        None => 0,
        Some(row) => row
            .try_get_by_index::<String>(0)?
            .parse()
            .map_err(|_| StoreError::corrupt("meta.feed_position"))?,
    };
    Ok(last.saturating_add(1))
}

const COLUMNS: &str = "d.position, d.owner_id, d.seq, d.target, d.event, d.format, d.state, d.replays, \
                       d.created_at_ms, COALESCE(o.body, d.body) FROM deliveries d LEFT JOIN deliveries o \
                       ON o.owner_id = d.owner_id AND o.seq = d.seq AND o.target = d.body_target";

fn read(row: &QueryResult) -> Result<FeedItem, StoreError> {
    let body: Vec<u8> = row.try_get_by_index(9)?;
    Ok(FeedItem {
        place: Place::read(row, 0)?,
        event: get_u32(row, 4, "deliveries.event")?,
        runflow: get_u32(row, 5, "deliveries.format")? & FORMAT_RUNFLOW != 0,
        state: DeliveryState::from_code(row.try_get_by_index(6)?)
            .ok_or(StoreError::corrupt("deliveries.state"))?,
        replays: get_u32(row, 7, "deliveries.replays")?,
        created_at_ms: row.try_get_by_index(8)?,
        body: v1::BodyParts::decode(Bytes::from(body)).map_err(|_| StoreError::corrupt("deliveries.body"))?,
    })
}

/// One page of a project's feed after `after`.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn page<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    filter: &DeliveryFilter,
    after: Place,
    limit: u32,
) -> Result<FeedPage, StoreError> {
    let horizon = horizon(conn).await?;
    let (upto, cut) = match look_through(conn, project, after, horizon).await? {
        Some(position) => (position, true),
        None => (horizon, false),
    };
    let mut values = vec![Value::from(project.0)];
    values.extend(after.values());
    values.push(Value::from(upto));
    let condition = filter.condition(conn.get_database_backend(), &mut values);
    values.push(sql::int(limit));
    let rows = sql::query(
        conn,
        &format!(
            "SELECT {COLUMNS} WHERE d.project_id = $1 AND d.position >= $2 \
             AND (d.position, d.owner_id, d.seq, d.target) > ($2, $3, $4, $5) AND d.position < $6 AND {condition} \
             ORDER BY d.position, d.owner_id, d.seq, d.target LIMIT ${}",
            values.len()
        ),
        values,
    )
    .await?;
    let items = rows.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let full = items.len() >= limit as usize;
    let next = match items.last() {
        Some(last) if full => last.place,
        // All before it was looked at. It never goes back: a cursor may lie beyond what this replica sees.
        _ => Place::before(upto).max(after),
    };
    Ok(FeedPage { items, next, more: full || cut })
}

/// The place where a page that would look at too many rows ends.
async fn look_through<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    after: Place,
    horizon: i64,
) -> Result<Option<i64>, StoreError> {
    // The rows of one transaction stay together, so the page begins behind its own first place.
    let row = sql::query_one(
        conn,
        "SELECT position FROM deliveries WHERE project_id = $1 AND position > $2 AND position < $3 \
         ORDER BY position LIMIT 1 OFFSET $4",
        [Value::from(project.0), Value::from(after.position), Value::from(horizon), sql::int(LOOK_THROUGH)],
    )
    .await?;
    row.map(|row| Ok(row.try_get_by_index(0)?)).transpose()
}

/// The deliveries of one job (or batch) whose `seq` is above `after_seq`, in order: what a receiver missed.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn after_sequence<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    filter: &DeliveryFilter,
    after_seq: u32,
    limit: u32,
) -> Result<Vec<FeedItem>, StoreError> {
    let mut values = vec![Value::from(project.0), sql::int(after_seq)];
    let condition = filter.condition(conn.get_database_backend(), &mut values);
    values.push(sql::int(limit));
    let rows = sql::query(
        conn,
        &format!(
            "SELECT {COLUMNS} WHERE d.project_id = $1 AND d.seq > $2 AND d.position IS NOT NULL AND {condition} \
             ORDER BY d.seq, d.target LIMIT ${}",
            values.len()
        ),
        values,
    )
    .await?;
    rows.iter().map(read).collect()
}
