//! Replays as clients make and watch them. A dispatcher works them off; api-ingest only inserts rows and cancels
//! running ones.

use ringback_domain::ProjectId;
use sea_orm::{ConnectionTrait, QueryResult, Value};
use uuid::Uuid;

use crate::{
    StoreError, WriteTx,
    deliveries::DeliveryState,
    delivery_search::{self, DeliveryFilter, Place},
    sql::{self, get_u32, get_u64},
};

/// Where a replay stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayState {
    /// A dispatcher works on it, or will.
    Running,
    /// Every delivery that it names was queued again.
    Done,
    /// Stopped by a person; what was queued stays queued.
    Cancelled,
}

impl ReplayState {
    const ALL: [Self; 3] = [Self::Running, Self::Done, Self::Cancelled];

    /// Number used in SQL. The partial index of running ones relies on 0.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Running => 0,
            Self::Done => 1,
            Self::Cancelled => 2,
        }
    }

    /// Reads [`Self::code`] back.
    #[must_use]
    pub fn from_code(code: i64) -> Option<Self> {
        usize::try_from(code).ok().and_then(|i| Self::ALL.get(i).copied())
    }

    /// The word in views.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A replay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplayRow {
    /// Its id.
    pub id: Uuid,
    /// Which deliveries.
    pub filter: DeliveryFilter,
    /// How fast they are queued again.
    pub rate_per_second: u32,
    /// Where it stands.
    pub state: ReplayState,
    /// How many there were when it was made.
    pub matched: u64,
    /// How many were queued again so far.
    pub queued: u64,
    /// When it was made.
    pub created_at_ms: i64,
    /// When it moved last.
    pub updated_at_ms: i64,
}

/// A replay to be made.
#[derive(Clone, Debug)]
pub struct NewReplay {
    /// New id.
    pub id: Uuid,
    /// Owner.
    pub project: ProjectId,
    /// Which deliveries.
    pub filter: DeliveryFilter,
    /// How fast they are queued again.
    pub rate_per_second: u32,
    /// Later ones are not part of it.
    pub upto_position: i64,
    /// How many there are.
    pub matched: u64,
}

const COLUMNS: &str =
    "id, filter, rate_per_second, state, matched, queued, created_at_ms, updated_at_ms FROM replays";

fn read(row: &QueryResult) -> Result<ReplayRow, StoreError> {
    Ok(ReplayRow {
        id: Uuid::from_slice(&row.try_get_by_index::<Vec<u8>>(0)?)
            .map_err(|_| StoreError::corrupt("replays.id"))?,
        filter: serde_json::from_str(&row.try_get_by_index::<String>(1)?)
            .map_err(|_| StoreError::corrupt("replays.filter"))?,
        rate_per_second: get_u32(row, 2, "replays.rate_per_second")?,
        state: ReplayState::from_code(row.try_get_by_index(3)?)
            .ok_or(StoreError::corrupt("replays.state"))?,
        matched: get_u64(row, 4, "replays.matched")?,
        queued: get_u64(row, 5, "replays.queued")?,
        created_at_ms: row.try_get_by_index(6)?,
        updated_at_ms: row.try_get_by_index(7)?,
    })
}

/// The last place of the feed that a replay made now may reach: later deliveries are not part of it.
///
/// # Errors
/// The database's.
pub async fn upto_now<C: ConnectionTrait>(conn: &C) -> Result<i64, StoreError> {
    Ok(crate::feed::horizon(conn).await?.saturating_sub(1))
}

/// Makes a replay. Answers false where it is there already: a try before was committed after all.
///
/// # Errors
/// The database's.
pub async fn insert(tx: &WriteTx, new: &NewReplay) -> Result<bool, StoreError> {
    let filter =
        serde_json::to_string(&new.filter).map_err(|e| StoreError::Permanent { detail: e.to_string() })?;
    let start = Place::before(0);
    let [position, owner, seq, target] = start.values();
    let inserted = sql::execute(
        tx.conn(),
        "INSERT INTO replays (id, project_id, filter, rate_per_second, upto_position, after_position, after_owner, \
         after_seq, after_target, state, matched, queued, created_at_ms, updated_at_ms) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 0, $10, 0, $11, $11) ON CONFLICT (id) DO NOTHING",
        [
            sql::id(new.id.as_bytes()),
            Value::from(new.project.0),
            Value::from(filter),
            sql::int(new.rate_per_second),
            Value::from(new.upto_position),
            position,
            owner,
            seq,
            target,
            sql::int(new.matched),
            Value::from(tx.now_ms()),
        ],
    )
    .await?;
    Ok(inserted > 0)
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

/// Makes a replay of one delivery, unless it is on its way. Of two requests at once one makes it.
///
/// # Errors
/// The database's.
pub async fn redeliver(
    tx: &WriteTx,
    id: Uuid,
    project: ProjectId,
    of: (Uuid, u32, u32),
) -> Result<Redelivery, StoreError> {
    if tx.is_postgres() {
        sql::execute(tx.conn(), "SELECT id FROM projects WHERE id = $1 FOR UPDATE", [Value::from(project.0)])
            .await?;
    }
    let (owner, seq, target) = of;
    let Some(found) = delivery_search::one(tx.conn(), project, owner, seq, target).await? else {
        return Ok(Redelivery::Absent);
    };
    let filter = DeliveryFilter::one(owner, seq, target);
    let running = running(tx.conn(), project).await?;
    if let Some(same) = running.iter().find(|r| r.filter == filter) {
        return Ok(if same.id == id { Redelivery::Made } else { Redelivery::Running });
    }
    if found.state == DeliveryState::Pending {
        return Ok(Redelivery::Pending);
    }
    let new = NewReplay {
        id,
        project,
        filter,
        rate_per_second: 0,
        upto_position: found.place.position,
        matched: 1,
    };
    insert(tx, &new).await?;
    Ok(Redelivery::Made)
}

async fn running<C: ConnectionTrait>(conn: &C, project: ProjectId) -> Result<Vec<ReplayRow>, StoreError> {
    let rows = sql::query(
        conn,
        &format!("SELECT {COLUMNS} WHERE project_id = $1 AND state = 0 ORDER BY created_at_ms"),
        [Value::from(project.0)],
    )
    .await?;
    rows.iter().map(read).collect()
}

/// How many replays of a project run.
///
/// # Errors
/// The database's.
pub async fn count_running<C: ConnectionTrait>(conn: &C, project: ProjectId) -> Result<usize, StoreError> {
    Ok(running(conn, project).await?.len())
}

/// A replay of a project.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn get<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    id: Uuid,
) -> Result<Option<ReplayRow>, StoreError> {
    let row = sql::query_one(
        conn,
        &format!("SELECT {COLUMNS} WHERE project_id = $1 AND id = $2"),
        [Value::from(project.0), sql::id(id.as_bytes())],
    )
    .await?;
    row.as_ref().map(read).transpose()
}

/// The replays of a project, newest first, older than `before`.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn list<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    before: Option<Uuid>,
    limit: u32,
) -> Result<Vec<ReplayRow>, StoreError> {
    let before = before.unwrap_or(Uuid::max());
    let rows = sql::query(
        conn,
        &format!("SELECT {COLUMNS} WHERE project_id = $1 AND id < $2 ORDER BY id DESC LIMIT $3"),
        [Value::from(project.0), sql::id(before.as_bytes()), sql::int(limit)],
    )
    .await?;
    rows.iter().map(read).collect()
}

/// Stops a running replay; one that has ended stays as it is. `None` where there is none.
///
/// # Errors
/// The database's.
pub async fn cancel(tx: &WriteTx, project: ProjectId, id: Uuid) -> Result<Option<ReplayRow>, StoreError> {
    sql::execute(
        tx.conn(),
        "UPDATE replays SET state = 2, updated_at_ms = $3 WHERE project_id = $1 AND id = $2 AND state = 0",
        [Value::from(project.0), sql::id(id.as_bytes()), Value::from(tx.now_ms())],
    )
    .await?;
    get(tx.conn(), project, id).await
}
