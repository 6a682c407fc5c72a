//! Counts: the deliveries' side of P5, and the summary of one job.

use std::collections::HashMap;

use sea_orm::{ConnectionTrait, QueryResult};
use uuid::Uuid;

use super::{DeliveryState, load::read_owner};
use crate::{
    StoreError,
    sql::{self, LIST, Rows, get_u64},
};

/// Deliveries by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeliveryCounts {
    /// Owed.
    pub pending: u64,
    /// Acknowledged.
    pub delivered: u64,
    /// Given up.
    pub dead: u64,
    /// Overtaken by the end of the job.
    pub superseded: u64,
    /// Taken back.
    pub cancelled: u64,
}

impl DeliveryCounts {
    /// All of them: what must equal the number owed.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.pending + self.delivered + self.dead + self.superseded + self.cancelled
    }

    fn add(&mut self, state: DeliveryState, n: u64) {
        let slot = match state {
            DeliveryState::Pending => &mut self.pending,
            DeliveryState::Delivered => &mut self.delivered,
            DeliveryState::Dead => &mut self.dead,
            DeliveryState::Superseded => &mut self.superseded,
            DeliveryState::Cancelled => &mut self.cancelled,
        };
        *slot += n;
    }
}

/// All deliveries of the database, counted one by one.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn delivery_counts<C: ConnectionTrait>(conn: &C) -> Result<DeliveryCounts, StoreError> {
    sum(sql::query(conn, "SELECT state, COUNT(*) FROM deliveries GROUP BY state", []).await?)
}

/// Deliveries of the owners from `from` up to but without `to`. Owners are UUIDv7, so a range of ids is a window of
/// time: one that is closed on the jobs' side can be compared while others move.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn delivery_counts_between<C: ConnectionTrait>(
    conn: &C,
    from: Uuid,
    to: Uuid,
) -> Result<DeliveryCounts, StoreError> {
    sum(sql::query(
        conn,
        "SELECT state, COUNT(*) FROM deliveries WHERE owner_id >= $1 AND owner_id < $2 GROUP BY state",
        [sql::id(from.as_bytes()), sql::id(to.as_bytes())],
    )
    .await?)
}

fn sum(rows: Vec<QueryResult>) -> Result<DeliveryCounts, StoreError> {
    let mut counts = DeliveryCounts::default();
    for row in &rows {
        counts.add(read_state(row, 0)?, get_u64(row, 1, "count")?);
    }
    Ok(counts)
}

fn read_state(row: &QueryResult, index: usize) -> Result<DeliveryState, StoreError> {
    DeliveryState::from_code(row.try_get_by_index(index)?).ok_or(StoreError::corrupt("deliveries.state"))
}

const OF: Rows = Rows {
    name: "deliveries.counts_of",
    before: "SELECT owner_id, state, COUNT(*) FROM deliveries WHERE owner_id IN (",
    casts: LIST,
    after: ") GROUP BY owner_id, state",
};

/// The counts of each of these jobs and batches; those without deliveries are missing from the map. The caller has
/// checked that they belong to the asking project.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn delivery_counts_of<C: ConnectionTrait>(
    conn: &C,
    owners: &[Uuid],
) -> Result<HashMap<Uuid, DeliveryCounts>, StoreError> {
    let rows = OF.query(conn, owners, |owner, v| v.push(sql::id(owner.as_bytes()))).await?;
    let mut counts: HashMap<Uuid, DeliveryCounts> = HashMap::with_capacity(owners.len());
    for row in &rows {
        counts.entry(read_owner(row, 0)?).or_default().add(read_state(row, 1)?, get_u64(row, 2, "count")?);
    }
    Ok(counts)
}
