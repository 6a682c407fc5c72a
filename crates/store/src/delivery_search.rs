//! Deliveries by filter: for lists and for the feed.
//!
//! Places in lists are `(position, owner, seq, target)`: the order of commits, which never changes.

use ringback_domain::{ProjectId, event::EventType, webhook::message_id};
use sea_orm::{ConnectionTrait, DatabaseBackend, QueryResult, Value};
use uuid::Uuid;

use crate::{
    StoreError,
    deliveries::{DeliveryState, Timings},
    sql::{self, get_u32},
};

/// Which deliveries; what is absent does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeliveryFilter {
    /// Of this job, batch or event.
    pub owner: Option<Uuid>,
    /// With this place among the transitions of its job.
    pub seq: Option<u32>,
    /// To this target.
    pub target: Option<u32>,
    /// Owed since then, Unix ms.
    pub from_ms: Option<i64>,
    /// Owed before then.
    pub to_ms: Option<i64>,
    /// Codes of events; empty = any.
    pub events: Vec<u32>,
    /// About jobs and batches of this endpoint, and about what belongs to them.
    pub endpoint: Option<i64>,
    /// Codes of states; empty = any.
    pub states: Vec<u8>,
}

impl DeliveryFilter {
    /// Exactly one delivery.
    #[must_use]
    pub fn one(owner: Uuid, seq: u32, target: u32) -> Self {
        Self { owner: Some(owner), seq: Some(seq), target: Some(target), ..Self::default() }
    }

    /// The condition on a row `d` of `deliveries`; appends its values to `values`, whose length is the number of
    /// placeholders used so far. Numbers from fixed lists stand in the text.
    #[must_use]
    pub fn condition(&self, backend: DatabaseBackend, values: &mut Vec<Value>) -> String {
        let mut text = String::from("1 = 1");
        let mut and = |values: &mut Vec<Value>, before: &str, value: Value, after: &str| {
            values.push(value);
            text.push_str(&format!(" AND {before}${}{after}", values.len()));
        };
        if let Some(owner) = &self.owner {
            and(values, "d.owner_id = ", sql::id(owner.as_bytes()), "");
        }
        if let Some(seq) = self.seq {
            and(values, "d.seq = ", sql::int(seq), "");
        }
        if let Some(target) = self.target {
            and(values, "d.target = ", sql::int(target), "");
        }
        if let Some(from) = self.from_ms {
            and(values, "d.created_at_ms >= ", Value::from(from), "");
        }
        if let Some(to) = self.to_ms {
            and(values, "d.created_at_ms < ", Value::from(to), "");
        }
        if let Some(endpoint) = self.endpoint {
            values.push(Value::from(endpoint));
            let n = values.len();
            text.push_str(&format!(" AND {}", of_endpoint(backend, n)));
        }
        if !self.events.is_empty() {
            text.push_str(&format!(" AND d.event IN ({})", numbers(&self.events)));
        }
        if !self.states.is_empty() {
            text.push_str(&format!(" AND d.state IN ({})", numbers(&self.states)));
        }
        text
    }
}

/// Whether a row `d` of `deliveries` is about the endpoint whose key is placeholder `n`: its owner is a job or batch, or
/// an event whose subject leads to one.
pub(crate) fn of_endpoint(backend: DatabaseBackend, n: usize) -> String {
    use EventType as E;
    // Only the subjects of known types are read as ids: each of a CASE's arms is looked at only where it is reached.
    let (before, after) = match backend {
        DatabaseBackend::Postgres => ("decode(", ", 'hex')"),
        _ => ("unhex(", ")"),
    };
    let key = |hex: &str| format!("{before}{hex}{after}");
    let codes = |all: &[E]| numbers(&all.iter().map(|e| e.code()).collect::<Vec<_>>());
    let of = |table: &str, key: &str| {
        format!("EXISTS (SELECT 1 FROM {table} o WHERE o.id = {key} AND o.endpoint_id = ${n})")
    };
    // An id behind whatever prefix; and the owner in a delivery's.
    let last = key("substr(replace(e.subject, '-', ''), length(replace(e.subject, '-', '')) - 31)");
    let owner = key("substr(e.subject, 5, 32)");
    format!(
        "({} OR {} OR EXISTS (SELECT 1 FROM events e WHERE e.id = d.owner_id AND CASE WHEN e.type IN ({}) THEN {} \
         WHEN e.type IN ({}) THEN {} WHEN e.type = {} THEN ({} OR {}) ELSE 1 = 0 END))",
        of("jobs", "d.owner_id"),
        of("batches", "d.owner_id"),
        codes(&[E::JobProgress, E::CompletionStreaming]),
        of("jobs", &last),
        codes(&[E::ArtifactReady, E::ArtifactConfirmed, E::ArtifactExpired]),
        of("artifacts", &last),
        E::DeliveryDead.code(),
        of("jobs", &owner),
        of("batches", &owner),
    )
}

fn numbers<N: ToString>(all: &[N]) -> String {
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// A place in the order of commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// `deliveries.position`.
    pub position: i64,
    /// Job, batch or event.
    pub owner: Uuid,
    /// `deliveries.seq`.
    pub seq: u32,
    /// `deliveries.target`.
    pub target: u32,
}

impl Place {
    /// Before everything at `position`.
    #[must_use]
    pub const fn before(position: i64) -> Self {
        Self { position, owner: Uuid::nil(), seq: 0, target: 0 }
    }

    pub(crate) fn values(&self) -> [Value; 4] {
        [
            Value::from(self.position),
            sql::id(self.owner.as_bytes()),
            sql::int(self.seq),
            sql::int(self.target),
        ]
    }

    pub(crate) fn read(row: &QueryResult, from: usize) -> Result<Self, StoreError> {
        Ok(Self {
            position: row.try_get_by_index(from)?,
            owner: Uuid::from_slice(&row.try_get_by_index::<Vec<u8>>(from + 1)?)
                .map_err(|_| StoreError::corrupt("deliveries.owner_id"))?,
            seq: get_u32(row, from + 2, "deliveries.seq")?,
            target: get_u32(row, from + 3, "deliveries.target")?,
        })
    }
}

/// A delivery as lists show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its key and its place.
    pub place: Place,
    /// Code of its event.
    pub event: u32,
    /// Whether it tells of an end.
    pub terminal: bool,
    /// Where it goes, as it was given. Show it redacted.
    pub url: String,
    /// Where it stands.
    pub state: DeliveryState,
    /// Tries made.
    pub attempts: u32,
    /// How often it was replayed.
    pub replays: u32,
    /// Tries made before the last replay.
    pub attempts_before: u32,
    /// When it was owed.
    pub created_at_ms: i64,
    /// When it is due; only while it is pending.
    pub next_attempt_at_ms: Option<i64>,
    /// When it ended.
    pub ended_at_ms: Option<i64>,
    /// Status of the last answer.
    pub last_status: Option<u16>,
    /// Why the last try failed.
    pub last_error: Option<String>,
    /// How long the try that succeeded took.
    pub duration_ms: Option<i64>,
    /// Where the time of that try went.
    pub timings: Timings,
    /// Who answered it.
    pub address: Option<String>,
    /// The beginning of that answer's body.
    pub response: Option<Vec<u8>>,
    /// The job that it is about: its public id has the prefix or not.
    pub sync_id: Option<bool>,
    /// Whether it is about a batch.
    pub of_batch: bool,
}

impl Found {
    /// The `webhook-id`.
    #[must_use]
    pub fn id(&self) -> String {
        message_id(self.place.owner, u64::from(self.place.seq), self.place.target)
    }
}

const COLUMNS: &str = "COALESCE(d.position, 0), d.owner_id, d.seq, d.target, d.event, d.terminal, d.url, d.state, \
                       d.attempts, d.replays, d.created_at_ms, d.next_attempt_at_ms, d.ended_at_ms, d.last_status, \
                       d.last_error, d.duration_ms, d.address, d.response, \
                       d.timings, \
                       (SELECT j.sync_id FROM jobs j WHERE j.id = d.owner_id), \
                       (SELECT 1 FROM batches b WHERE b.id = d.owner_id), d.attempts_before";

fn read(row: &QueryResult) -> Result<Found, StoreError> {
    Ok(Found {
        place: Place::read(row, 0)?,
        event: get_u32(row, 4, "deliveries.event")?,
        terminal: row.try_get_by_index::<i64>(5)? != 0,
        url: row.try_get_by_index(6)?,
        state: DeliveryState::from_code(row.try_get_by_index(7)?)
            .ok_or(StoreError::corrupt("deliveries.state"))?,
        attempts: get_u32(row, 8, "deliveries.attempts")?,
        replays: get_u32(row, 9, "deliveries.replays")?,
        created_at_ms: row.try_get_by_index(10)?,
        next_attempt_at_ms: row.try_get_by_index(11)?,
        ended_at_ms: row.try_get_by_index(12)?,
        last_status: row.try_get_by_index::<Option<i64>>(13)?.and_then(|n| u16::try_from(n).ok()),
        last_error: row.try_get_by_index(14)?,
        duration_ms: row.try_get_by_index(15)?,
        address: row.try_get_by_index(16)?,
        response: row.try_get_by_index(17)?,
        timings: Timings::unpack(row.try_get_by_index(18)?),
        sync_id: row.try_get_by_index::<Option<i64>>(19)?.map(|n| n != 0),
        of_batch: small(row, 20)?.is_some(),
        attempts_before: get_u32(row, 21, "deliveries.attempts_before")?,
    })
}

/// A literal in a SELECT is 32 bits wide on PostgreSQL and 64 on SQLite.
fn small(row: &QueryResult, index: usize) -> Result<Option<i64>, StoreError> {
    match row.try_get_by_index::<Option<i64>>(index) {
        Ok(n) => Ok(n),
        Err(_) => Ok(row.try_get_by_index::<Option<i32>>(index)?.map(i64::from)),
    }
}

/// Deliveries of a project, newest first, before `before`.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn search<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    filter: &DeliveryFilter,
    before: Option<Place>,
    limit: u32,
) -> Result<Vec<Found>, StoreError> {
    let mut values = vec![Value::from(project.0)];
    let condition = filter.condition(conn.get_database_backend(), &mut values);
    let page = match before {
        None => String::new(),
        Some(place) => {
            let n = values.len();
            values.extend(place.values());
            format!(
                " AND d.position <= ${} AND (d.position, d.owner_id, d.seq, d.target) < (${}, ${}, ${}, ${})",
                n + 1,
                n + 1,
                n + 2,
                n + 3,
                n + 4
            )
        }
    };
    values.push(sql::int(limit));
    let rows = sql::query(
        conn,
        &format!(
            "SELECT {COLUMNS} FROM deliveries d WHERE d.project_id = $1 AND d.position IS NOT NULL AND {condition}{page} \
             ORDER BY d.position DESC, d.owner_id DESC, d.seq DESC, d.target DESC LIMIT ${}",
            values.len()
        ),
        values,
    )
    .await?;
    rows.iter().map(read).collect()
}

/// One delivery of a project.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn one<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    owner: Uuid,
    seq: u32,
    target: u32,
) -> Result<Option<Found>, StoreError> {
    let row = sql::query_one(
        conn,
        &format!(
            "SELECT {COLUMNS} FROM deliveries d \
             WHERE d.project_id = $1 AND d.owner_id = $2 AND d.seq = $3 AND d.target = $4"
        ),
        [Value::from(project.0), sql::id(owner.as_bytes()), sql::int(seq), sql::int(target)],
    )
    .await?;
    row.as_ref().map(read).transpose()
}
