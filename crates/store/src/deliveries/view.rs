//! What users see of deliveries. Every question names the project.

use ringback_domain::ProjectId;
use sea_orm::{ConnectionTrait, QueryResult, Value};
use uuid::Uuid;

use super::{DeliveryState, Timings, event_name};
use crate::{
    StoreError,
    sql::{self, get_u32, get_u64},
};

/// A delivery in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeliveryView {
    /// The `webhook-id`.
    pub id: String,
    /// Place among the transitions of its job.
    pub seq: u32,
    /// Which of the job's targets.
    pub target: u32,
    /// `job.completed`, ….
    pub event: &'static str,
    /// Where it goes, as it was given. Show it redacted.
    pub url: String,
    /// Where it stands.
    pub state: DeliveryState,
    /// Tries made.
    pub attempts: u32,
    /// When it was owed, Unix ms.
    pub created_at_ms: i64,
    /// When it is due; only while it is pending.
    pub next_attempt_at_ms: Option<i64>,
    /// When it ended.
    pub ended_at_ms: Option<i64>,
    /// Status of the last answer.
    pub last_status: Option<u16>,
    /// Why the last try failed.
    pub last_error: Option<String>,
}

impl DeliveryView {
    /// When the receiver acknowledged it.
    #[must_use]
    pub fn delivered_at_ms(&self) -> Option<i64> {
        self.ended_at_ms.filter(|_| self.state == DeliveryState::Delivered)
    }
}

/// The deliveries of one job or batch, in the order of (seq, target). Empty for another project's.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn deliveries_of<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    owner: Uuid,
) -> Result<Vec<DeliveryView>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT seq, target, event, url, state, attempts, created_at_ms, next_attempt_at_ms, ended_at_ms, \
         last_status, last_error FROM deliveries WHERE owner_id = $1 AND project_id = $2 ORDER BY seq, target",
        [sql::id(owner.as_bytes()), Value::from(project.0)],
    )
    .await?;
    rows.iter()
        .map(|row| {
            let (seq, target) = (get_u32(row, 0, "deliveries.seq")?, get_u32(row, 1, "deliveries.target")?);
            let state = DeliveryState::from_code(row.try_get_by_index(4)?)
                .ok_or(StoreError::corrupt("deliveries.state"))?;
            Ok(DeliveryView {
                id: ringback_domain::webhook::message_id(owner, u64::from(seq), target),
                seq,
                target,
                event: event_name(get_u32(row, 2, "deliveries.event")?),
                url: row.try_get_by_index(3)?,
                state,
                attempts: get_u32(row, 5, "deliveries.attempts")?,
                created_at_ms: row.try_get_by_index(6)?,
                next_attempt_at_ms: row.try_get_by_index(7)?,
                ended_at_ms: row.try_get_by_index(8)?,
                last_status: row.try_get_by_index::<Option<i64>>(9)?.and_then(|n| u16::try_from(n).ok()),
                last_error: row.try_get_by_index(10)?,
            })
        })
        .collect()
}

/// A try in the attempts log: one that failed, or a success whose delivery was opened again later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttemptView {
    /// Of which delivery: its seq.
    pub seq: u32,
    /// Of which delivery: its target.
    pub target: u32,
    /// Number of the try, from 1.
    pub n: u32,
    /// When it began, Unix ms.
    pub at_ms: i64,
    /// How long it took.
    pub duration_ms: u64,
    /// Status of the answer, if there was one.
    pub status: Option<u16>,
    /// Why it failed; nothing for a success.
    pub error: Option<String>,
    /// Who answered.
    pub address: Option<String>,
    /// The beginning of the answer's body.
    pub response: Option<Vec<u8>>,
    /// Where the time went.
    pub timings: Timings,
}

impl AttemptView {
    /// Whether the receiver acknowledged it.
    #[must_use]
    pub fn is_delivered(&self) -> bool {
        self.error.is_none() && self.status.is_some_and(|status| (200..300).contains(&status))
    }
}

/// The logged tries of all deliveries of one job or batch, in order; the success of one that is delivered is in its
/// own row. Empty for another project's.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn attempts_of<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    owner: Uuid,
) -> Result<Vec<AttemptView>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT a.seq, a.target, a.n, a.at_ms, a.duration_ms, a.status, a.error, a.address, a.response, \
         a.dns_ms, a.connect_ms, a.first_byte_ms FROM delivery_attempts a JOIN deliveries d \
         ON d.owner_id = a.owner_id AND d.seq = a.seq AND d.target = a.target \
         WHERE a.owner_id = $1 AND d.project_id = $2 ORDER BY a.seq, a.target, a.n",
        [sql::id(owner.as_bytes()), Value::from(project.0)],
    )
    .await?;
    rows.iter()
        .map(|row| {
            Ok(AttemptView {
                seq: get_u32(row, 0, "delivery_attempts.seq")?,
                target: get_u32(row, 1, "delivery_attempts.target")?,
                n: get_u32(row, 2, "delivery_attempts.n")?,
                at_ms: row.try_get_by_index(3)?,
                duration_ms: get_u64(row, 4, "delivery_attempts.duration_ms")?,
                status: row.try_get_by_index::<Option<i64>>(5)?.and_then(|n| u16::try_from(n).ok()),
                error: row.try_get_by_index(6)?,
                address: row.try_get_by_index(7)?,
                response: row.try_get_by_index(8)?,
                timings: Timings {
                    dns_ms: part(row, 9)?,
                    connect_ms: part(row, 10)?,
                    first_byte_ms: part(row, 11)?,
                },
            })
        })
        .collect()
}

fn part(row: &QueryResult, index: usize) -> Result<Option<u64>, StoreError> {
    Ok(row.try_get_by_index::<Option<i64>>(index)?.and_then(|ms| u64::try_from(ms).ok()))
}

/// How long the delivery that is due for longest has been waiting, over all partitions: an alarm's input.
///
/// # Errors
/// The database's.
pub async fn pending_age_ms<C: ConnectionTrait>(
    conn: &C,
    partitions: u16,
    now_ms: i64,
) -> Result<Option<u64>, StoreError> {
    let mut oldest: Option<i64> = None;
    for partition in 0..partitions {
        let row = sql::query_one(
            conn,
            "SELECT MIN(next_attempt_at_ms) FROM deliveries WHERE partition = $1 AND state = 0",
            [sql::int(partition)],
        )
        .await?;
        let due: Option<i64> = row.map(|row| row.try_get_by_index(0)).transpose()?.flatten();
        oldest = [oldest, due].into_iter().flatten().min();
    }
    Ok(oldest.map(|due| u64::try_from(now_ms.saturating_sub(due)).unwrap_or(0)))
}
