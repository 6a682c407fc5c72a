//! Replays as clients make and list them; [`crate::replays`] works them off (P8).

use ringback_domain::ProjectId;
use sea_orm::{ConnectionTrait, Value};
use uuid::Uuid;

use crate::{
    StoreError, WriteTx,
    deliveries::DeliveryState,
    delivery_search::{self, Place},
    replays::{self, DeliveryKey, Replay, ReplayFilter},
    sql,
};

/// A replay to be made.
#[derive(Clone, Debug)]
pub struct NewReplay {
    /// New id.
    pub id: Uuid,
    /// Owner.
    pub project: ProjectId,
    /// Which deliveries.
    pub filter: ReplayFilter,
    /// How fast they are opened again.
    pub rate_per_second: u32,
    /// Later ones are not part of it.
    pub upto_position: i64,
    /// How many there are.
    pub matched: u64,
}

/// The last place of the feed that a replay made now may reach: later deliveries are not part of it.
///
/// # Errors
/// The database's.
pub async fn upto_now<C: ConnectionTrait>(conn: &C) -> Result<i64, StoreError> {
    Ok(crate::feed::horizon(conn).await?.saturating_sub(1))
}

/// Makes a replay whose deliveries were counted before: in a large window that takes longer than a transaction that
/// others share should. Safe to repeat.
///
/// # Errors
/// The database's.
pub async fn insert(tx: &WriteTx, new: &NewReplay) -> Result<(), StoreError> {
    let filter =
        serde_json::to_string(&new.filter).map_err(|e| StoreError::Permanent { detail: e.to_string() })?;
    let [position, owner, seq, target] = Place::before(0).values();
    sql::execute(
        tx.conn(),
        "INSERT INTO replays (id, project_id, filter, rate_per_second, upto_position, after_position, after_owner, \
         after_seq, after_target, state, matched, queued, created_at_ms, updated_at_ms) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 0, $10, 0, $11, $11) ON CONFLICT (id) DO NOTHING",
        [
            sql::id(new.id.as_bytes()),
            Value::from(new.project.0),
            Value::from(filter),
            sql::int(new.rate_per_second.max(1)),
            Value::from(new.upto_position),
            position,
            owner,
            seq,
            target,
            sql::int(new.matched),
            Value::from(tx.now_ms()),
        ],
    )
    .await
    .map(drop)
}

/// What became of the wish to send one delivery again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redelivery {
    /// A replay of it was made.
    Made,
    /// It has not ended: it will be sent anyway.
    Pending,
    /// A replay of it runs.
    Running,
    /// No such delivery.
    Absent,
}

/// Makes a replay of one delivery, unless it is on its way. Of two requests at once one makes it; safe to repeat with
/// the same id.
///
/// # Errors
/// The database's.
pub async fn redeliver(
    tx: &WriteTx,
    id: Uuid,
    project: ProjectId,
    key: DeliveryKey,
) -> Result<Redelivery, StoreError> {
    if tx.is_postgres() {
        sql::execute(tx.conn(), "SELECT id FROM projects WHERE id = $1 FOR UPDATE", [Value::from(project.0)])
            .await?;
    }
    let Some(found) = delivery_search::one(tx.conn(), project, key.owner, key.seq, key.target).await? else {
        return Ok(Redelivery::Absent);
    };
    let filter = ReplayFilter { delivery: Some(key), ..ReplayFilter::default() };
    for other in running(tx.conn(), project).await? {
        if other == id {
            return Ok(Redelivery::Made);
        }
        if replays::get(tx.conn(), project, other).await?.is_some_and(|r| r.filter == filter) {
            return Ok(Redelivery::Running);
        }
    }
    if found.state == DeliveryState::Pending {
        return Ok(Redelivery::Pending);
    }
    let upto_position = found.place.position;
    insert(tx, &NewReplay { id, project, filter, rate_per_second: 1, upto_position, matched: 1 }).await?;
    Ok(Redelivery::Made)
}

/// The replays of a project that run, oldest first.
///
/// # Errors
/// The database's.
pub async fn running<C: ConnectionTrait>(conn: &C, project: ProjectId) -> Result<Vec<Uuid>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT id FROM replays WHERE project_id = $1 AND state = 0 ORDER BY created_at_ms",
        [Value::from(project.0)],
    )
    .await?;
    rows.iter().map(|row| key(&row.try_get_by_index::<Vec<u8>>(0)?)).collect()
}

fn key(bytes: &[u8]) -> Result<Uuid, StoreError> {
    Uuid::from_slice(bytes).map_err(|_| StoreError::corrupt("replays.id"))
}

/// The replays of a project, newest first, older than `before`.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn page<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    before: Option<Uuid>,
    limit: u32,
) -> Result<Vec<Replay>, StoreError> {
    let before = before.unwrap_or(Uuid::max());
    let ids = sql::query(
        conn,
        "SELECT id FROM replays WHERE project_id = $1 AND id < $2 ORDER BY id DESC LIMIT $3",
        [Value::from(project.0), sql::id(before.as_bytes()), sql::int(limit)],
    )
    .await?;
    let mut all = Vec::with_capacity(ids.len());
    for row in &ids {
        all.extend(replays::get(conn, project, key(&row.try_get_by_index::<Vec<u8>>(0)?)?).await?);
    }
    Ok(all)
}
