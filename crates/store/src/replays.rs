//! Deliveries sent again by request: a window with a filter, or a single one.
//!
//! api-ingest makes a row and takes it back; a dispatcher with a lease on the row works it off (P8), page by page in
//! the order of the feed. The place it has reached moves in the transaction that opens the page's deliveries again,
//! so a crash neither skips nor repeats one. Only what has ended is opened: what is still owed comes anyway. A success
//! moves from its delivery's row into the log of attempts then.

use ringback_domain::ProjectId;
use sea_orm::{ConnectionTrait, DatabaseBackend, QueryResult, Value};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    StoreError, WriteTx,
    delivery_search::of_endpoint,
    sql::{self, Rows, get_u32},
};

/// Which deliveries. What is empty or missing leaves nothing out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReplayFilter {
    /// This one, and nothing of the rest matters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delivery: Option<DeliveryKey>,
    /// Owed at or after this Unix time in ms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_ms: Option<i64>,
    /// Owed before this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_ms: Option<i64>,
    /// Codes of event types.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<u32>,
    /// Key of the endpoint whose jobs and batches, or what belongs to those, they are about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint_id: Option<i64>,
    /// Number of the target; a registered webhook is 65536 plus its key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<u32>,
    /// Codes of states; pending is never one of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub states: Vec<u8>,
}

/// The key of one delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DeliveryKey {
    /// Job, batch or event.
    pub owner: Uuid,
    /// Place among its transitions.
    pub seq: u32,
    /// Which target.
    pub target: u32,
}

/// Where a replay stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayState {
    /// Being worked off.
    Running,
    /// All of it was opened again.
    Done,
    /// Taken back; what was opened before goes on.
    Cancelled,
}

impl ReplayState {
    const ALL: [Self; 3] = [Self::Running, Self::Done, Self::Cancelled];

    /// The word in views.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
        }
    }

    const fn code(self) -> i64 {
        match self {
            Self::Running => 0,
            Self::Done => 1,
            Self::Cancelled => 2,
        }
    }
}

/// A replay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// Its key.
    pub id: Uuid,
    /// Owner.
    pub project: ProjectId,
    /// Which deliveries.
    pub filter: ReplayFilter,
    /// How many are opened again per second.
    pub rate_per_second: u32,
    /// Where it stands.
    pub state: ReplayState,
    /// How many there were when it was made.
    pub matched: u64,
    /// How many have been opened again.
    pub queued: u64,
    /// When it was made.
    pub created_at_ms: i64,
    /// When it moved last.
    pub updated_at_ms: i64,
    /// The last place of the feed that belongs to it.
    pub upto_position: i64,
    /// The place it has reached.
    pub after: Place,
}

/// A place in the feed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// `deliveries.position`.
    pub position: i64,
    /// Key of the delivery there.
    pub key: DeliveryKey,
}

impl Place {
    fn values(&self) -> [Value; 4] {
        [
            Value::from(self.position),
            sql::id(self.key.owner.as_bytes()),
            sql::int(self.key.seq),
            sql::int(self.key.target),
        ]
    }

    fn read(row: &QueryResult, from: usize) -> Result<Self, StoreError> {
        let owner = Uuid::from_slice(&row.try_get_by_index::<Vec<u8>>(from + 1)?)
            .map_err(|_| StoreError::corrupt("replays.after_owner"))?;
        let (seq, target) =
            (get_u32(row, from + 2, "replays.after_seq")?, get_u32(row, from + 3, "replays.after_target")?);
        Ok(Self { position: row.try_get_by_index(from)?, key: DeliveryKey { owner, seq, target } })
    }
}

const COLUMNS: &str = "id, project_id, filter, rate_per_second, state, matched, queued, created_at_ms, updated_at_ms, \
                       upto_position, after_position, after_owner, after_seq, after_target";

fn read(row: &QueryResult) -> Result<Replay, StoreError> {
    let state: i64 = row.try_get_by_index(4)?;
    Ok(Replay {
        id: Uuid::from_slice(&row.try_get_by_index::<Vec<u8>>(0)?)
            .map_err(|_| StoreError::corrupt("replays.id"))?,
        project: ProjectId(row.try_get_by_index(1)?),
        filter: serde_json::from_str(&row.try_get_by_index::<String>(2)?)
            .map_err(|_| StoreError::corrupt("replays.filter"))?,
        rate_per_second: get_u32(row, 3, "replays.rate_per_second")?,
        state: ReplayState::ALL
            .into_iter()
            .find(|s| s.code() == state)
            .ok_or(StoreError::corrupt("replays.state"))?,
        matched: sql::get_u64(row, 5, "replays.matched")?,
        queued: sql::get_u64(row, 6, "replays.queued")?,
        created_at_ms: row.try_get_by_index(7)?,
        updated_at_ms: row.try_get_by_index(8)?,
        upto_position: row.try_get_by_index(9)?,
        after: Place::read(row, 10)?,
    })
}

/// A question about deliveries: its text after `WHERE`, and its values.
struct Where {
    text: String,
    values: Vec<Value>,
}

impl Where {
    fn of(backend: DatabaseBackend, project: ProjectId, filter: &ReplayFilter, upto_position: i64) -> Self {
        let text = "d.project_id = $1 AND d.state <> 0".to_owned();
        let mut w = Self { text, values: vec![project.0.into()] };
        if let Some(key) = filter.delivery {
            w.and("d.owner_id = ", sql::id(key.owner.as_bytes()));
            w.and("d.seq = ", sql::int(key.seq));
            w.and("d.target = ", sql::int(key.target));
            return w;
        }
        w.and("d.position <= ", Value::from(upto_position));
        if let Some(from) = filter.from_ms {
            w.and("d.created_at_ms >= ", Value::from(from));
        }
        if let Some(to) = filter.to_ms {
            w.and("d.created_at_ms < ", Value::from(to));
        }
        if let Some(target) = filter.target {
            w.and("d.target = ", sql::int(target));
        }
        w.one_of("d.event", filter.events.iter().map(|&event| i64::from(event)));
        w.one_of("d.state", filter.states.iter().map(|&state| i64::from(state)));
        if let Some(endpoint) = filter.endpoint_id {
            w.values.push(Value::from(endpoint));
            let n = w.values.len();
            w.text.push_str(&format!(" AND {}", of_endpoint(backend, n)));
        }
        w
    }

    fn and(&mut self, what: &str, value: Value) {
        self.values.push(value);
        self.text.push_str(&format!(" AND {what}${}", self.values.len()));
    }

    /// Numbers of ours only, so that they may stand in the text.
    fn one_of(&mut self, what: &str, codes: impl Iterator<Item = i64>) {
        let codes: Vec<String> = codes.map(|code| code.to_string()).collect();
        if !codes.is_empty() {
            self.text.push_str(&format!(" AND {what} IN ({})", codes.join(",")));
        }
    }
}

/// How many deliveries a replay up to this place of the feed would open again.
///
/// # Errors
/// The database's.
pub async fn count<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    filter: &ReplayFilter,
    upto_position: i64,
) -> Result<u64, StoreError> {
    let w = Where::of(conn.get_database_backend(), project, filter, upto_position);
    let text = format!("SELECT COUNT(*) FROM deliveries d WHERE {}", w.text);
    sql::query_one(conn, &text, w.values).await?.map_or(Ok(0), |row| sql::get_u64(&row, 0, "count"))
}

/// One replay of a project.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn get<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    id: Uuid,
) -> Result<Option<Replay>, StoreError> {
    let row = sql::query_one(
        conn,
        &format!("SELECT {COLUMNS} FROM replays WHERE id = $1 AND project_id = $2"),
        [sql::id(id.as_bytes()), Value::from(project.0)],
    )
    .await?;
    row.as_ref().map(read).transpose()
}

/// Takes a replay back: nothing more of it is opened. Answers whether it was still running.
///
/// # Errors
/// The database's.
pub async fn cancel(tx: &WriteTx, project: ProjectId, id: Uuid) -> Result<bool, StoreError> {
    let changed = sql::execute(
        tx.conn(),
        "UPDATE replays SET state = 2, updated_at_ms = $3 WHERE id = $1 AND project_id = $2 AND state = 0",
        [sql::id(id.as_bytes()), Value::from(project.0), Value::from(tx.now_ms())],
    )
    .await?;
    Ok(changed > 0)
}

/// Whether any replay runs.
///
/// # Errors
/// The database's.
pub async fn any_running<C: ConnectionTrait>(conn: &C) -> Result<bool, StoreError> {
    Ok(sql::query_one(conn, "SELECT 1 FROM replays WHERE state = 0 LIMIT 1", []).await?.is_some())
}

/// Takes the leases of running replays that nobody works on, of all where the caller is `alone`, and renews the
/// caller's own. Answers all that are the caller's now, the oldest first.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn lease(
    tx: &WriteTx,
    me: &str,
    lease_ms: u64,
    limit: u32,
    alone: bool,
) -> Result<Vec<Replay>, StoreError> {
    let expired_at = if alone { i64::MAX } else { tx.now_ms() };
    let lock = if tx.is_postgres() { " FOR UPDATE SKIP LOCKED" } else { "" };
    let rows = sql::query(
        tx.conn(),
        &format!(
            "UPDATE replays SET owner = $1, lease_until_ms = $2 WHERE id IN (SELECT id FROM replays WHERE state = 0 \
             AND (owner IS NULL OR owner = $1 OR lease_until_ms <= $3) ORDER BY created_at_ms, id LIMIT $4{lock}) \
             RETURNING {COLUMNS}"
        ),
        [
            Value::from(me),
            Value::from(tx.now_ms().saturating_add_unsigned(lease_ms)),
            Value::from(expired_at),
            sql::int(limit),
        ],
    )
    .await?;
    let mut replays = rows.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    replays.sort_by_key(|replay| (replay.created_at_ms, replay.id));
    Ok(replays)
}

/// The next ended deliveries of a replay, at most `limit`, and whether there may be more behind them.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn next_page<C: ConnectionTrait>(
    conn: &C,
    replay: &Replay,
    limit: u32,
) -> Result<(Vec<Place>, bool), StoreError> {
    let mut w = Where::of(conn.get_database_backend(), replay.project, &replay.filter, replay.upto_position);
    let single = replay.filter.delivery.is_some();
    if !single {
        w.and("d.position >= ", Value::from(replay.after.position));
        let n = w.values.len();
        w.text.push_str(&format!(
            " AND (d.position, d.owner_id, d.seq, d.target) > (${}, ${}, ${}, ${})",
            n + 1,
            n + 2,
            n + 3,
            n + 4
        ));
        w.values.extend(replay.after.values());
    }
    w.values.push(sql::int(limit));
    let text = format!(
        "SELECT COALESCE(d.position, 0), d.owner_id, d.seq, d.target FROM deliveries d WHERE {} \
         ORDER BY d.position, d.owner_id, d.seq, d.target LIMIT ${}",
        w.text,
        w.values.len()
    );
    let rows = sql::query(conn, &text, w.values).await?;
    let page = rows.iter().map(|row| Place::read(row, 0)).collect::<Result<Vec<_>, _>>()?;
    let more = !single && page.len() >= limit as usize;
    Ok((page, more))
}

/// Where the facts of a success go before its delivery is opened again: the columns that hold them will tell of the
/// next try. On PostgreSQL the rows are locked, so that they are still these when they are opened.
macro_rules! keep {
    ($name:literal, $lock:literal) => {
        Rows {
            name: $name,
            before: "WITH v (owner_id, seq, target) AS (VALUES ",
            casts: &["bytea", "bigint", "bigint"],
            after: concat!(
                ") INSERT INTO delivery_attempts (owner_id, seq, target, n, at_ms, duration_ms, status, error, \
                 address, response, dns_ms, connect_ms, first_byte_ms) \
                 SELECT d.owner_id, d.seq, d.target, d.attempts, \
                 COALESCE(d.ended_at_ms, d.created_at_ms) - COALESCE(d.duration_ms, 0), COALESCE(d.duration_ms, 0), \
                 d.last_status, NULL, d.address, d.response, ",
                // `Timings::pack`.
                "NULLIF((d.timings >> 42) & 2097151, 0) - 1, NULLIF((d.timings >> 21) & 2097151, 0) - 1, \
                 NULLIF(d.timings & 2097151, 0) - 1 FROM v JOIN deliveries d \
                 ON d.owner_id = v.owner_id AND d.seq = v.seq AND d.target = v.target \
                 WHERE +d.state = 1 AND d.attempts > 0",
                $lock,
                " ON CONFLICT (owner_id, seq, target, n) DO NOTHING"
            ),
        }
    };
}

const KEEP: Rows = keep!("delivery_attempts.keep", "");
const KEEP_LOCKED: Rows = keep!("delivery_attempts.keep_locked", " FOR UPDATE OF d");

const REOPEN: Rows = Rows {
    name: "deliveries.reopen",
    before: "WITH v (owner_id, seq, target, now) AS (VALUES ",
    casts: &["bytea", "bigint", "bigint", "bigint"],
    after: ") UPDATE deliveries SET state = 0, replays = deliveries.replays + 1, \
            attempts_before = deliveries.attempts, next_attempt_at_ms = v.now, ended_at_ms = NULL FROM v \
            WHERE deliveries.owner_id = v.owner_id AND deliveries.seq = v.seq AND deliveries.target = v.target \
            AND +deliveries.state <> 0",
};

/// Opens a page again and moves the replay past it; it ends where there is no more. Answers how many were opened, or
/// `None` where the replay is no longer the caller's, was taken back, or stands elsewhere: nothing was written then.
///
/// # Errors
/// The database's.
pub async fn reopen(
    tx: &WriteTx,
    me: &str,
    replay: &Replay,
    page: &[Place],
    more: bool,
    lease_ms: u64,
) -> Result<Option<u64>, StoreError> {
    let state = if more { ReplayState::Running } else { ReplayState::Done };
    let mut values = Vec::with_capacity(13);
    values.extend(page.last().unwrap_or(&replay.after).values());
    values.extend(replay.after.values());
    values.extend([
        sql::id(replay.id.as_bytes()),
        Value::from(me),
        Value::from(state.code()),
        Value::from(tx.now_ms()),
        Value::from(tx.now_ms().saturating_add_unsigned(lease_ms)),
    ]);
    let moved = sql::execute(
        tx.conn(),
        "UPDATE replays SET after_position = $1, after_owner = $2, after_seq = $3, after_target = $4, state = $11, \
         updated_at_ms = $12, lease_until_ms = $13 WHERE id = $9 AND owner = $10 AND state = 0 \
         AND after_position = $5 AND after_owner = $6 AND after_seq = $7 AND after_target = $8",
        values,
    )
    .await?;
    if moved == 0 {
        return Ok(None);
    }
    // Everybody locks in one order.
    let mut keys: Vec<DeliveryKey> = page.iter().map(|place| place.key).collect();
    keys.sort_by_key(|key| (key.owner, key.seq, key.target));
    let keep = if tx.is_postgres() { KEEP_LOCKED } else { KEEP };
    keep.execute(tx.conn(), &keys, |key, v| {
        v.extend([sql::id(key.owner.as_bytes()), sql::int(key.seq), sql::int(key.target)]);
    })
    .await?;
    let now = tx.now_ms();
    let opened = REOPEN
        .execute(tx.conn(), &keys, |key, v| {
            v.extend([
                sql::id(key.owner.as_bytes()),
                sql::int(key.seq),
                sql::int(key.target),
                Value::from(now),
            ]);
        })
        .await?;
    sql::execute(
        tx.conn(),
        "UPDATE replays SET queued = queued + $2 WHERE id = $1",
        [sql::id(replay.id.as_bytes()), sql::int(opened)],
    )
    .await?;
    Ok(Some(opened))
}
