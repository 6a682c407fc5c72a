//! Counts per endpoint: O(1) to read however many jobs there are.
//!
//! Each writing process has its own row per endpoint, so that writers on PostgreSQL do not wait for each other.

use std::collections::BTreeMap;

use ringback_domain::{EndpointId, JobStatus};
use sea_orm::{ConnectionTrait, Value};

use crate::{
    StoreError, WriteTx,
    sql::{self, Rows},
};

/// What a transaction changes in an endpoint's counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CounterDelta {
    /// Jobs in the queue.
    pub queued: i64,
    /// Jobs in progress.
    pub running: i64,
    /// Ended with an output, ever.
    pub completed: i64,
    /// Ended with an error, ever.
    pub failed: i64,
    /// Ended by request, ever.
    pub cancelled: i64,
    /// Ended by a limit, ever.
    pub timed_out: i64,
    /// Runs started by an explicit retry and attempts after the first, ever.
    pub retried: i64,
}

/// Counts of an endpoint.
pub type EndpointCounts = CounterDelta;

impl CounterDelta {
    /// Counts a job that leaves `from` (`None` = it is new) and enters `to`.
    pub const fn moved(&mut self, from: Option<JobStatus>, to: JobStatus) {
        match from {
            Some(JobStatus::InQueue) => self.queued -= 1,
            Some(JobStatus::InProgress) => self.running -= 1,
            // Ends are counted for ever: a retry does not take them back.
            None
            | Some(JobStatus::Completed | JobStatus::Failed | JobStatus::Cancelled | JobStatus::TimedOut) => {
            }
        }
        match to {
            JobStatus::InQueue => self.queued += 1,
            JobStatus::InProgress => self.running += 1,
            JobStatus::Completed => self.completed += 1,
            JobStatus::Failed => self.failed += 1,
            JobStatus::Cancelled => self.cancelled += 1,
            JobStatus::TimedOut => self.timed_out += 1,
        }
    }

    pub(crate) const fn add(&mut self, more: &Self) {
        self.queued += more.queued;
        self.running += more.running;
        self.completed += more.completed;
        self.failed += more.failed;
        self.cancelled += more.cancelled;
        self.timed_out += more.timed_out;
        self.retried += more.retried;
    }

    fn is_zero(&self) -> bool {
        *self == Self::default()
    }
}

const ADD: Rows = Rows {
    name: "counters.add",
    before: "INSERT INTO endpoint_counters (endpoint_id, writer, queued, running, completed, failed, cancelled, \
             timed_out, retried) VALUES ",
    casts: &["", "", "", "", "", "", "", "", ""],
    after: " ON CONFLICT (endpoint_id, writer) DO UPDATE SET queued = endpoint_counters.queued + excluded.queued, \
            running = endpoint_counters.running + excluded.running, \
            completed = endpoint_counters.completed + excluded.completed, \
            failed = endpoint_counters.failed + excluded.failed, \
            cancelled = endpoint_counters.cancelled + excluded.cancelled, \
            timed_out = endpoint_counters.timed_out + excluded.timed_out, \
            retried = endpoint_counters.retried + excluded.retried",
};

/// Adds to the rows of a writer at once. What follows from jobs' transitions goes through [`WriteTx::count`].
pub async fn add_counters(
    tx: &WriteTx,
    writer: i64,
    deltas: &BTreeMap<EndpointId, CounterDelta>,
) -> Result<(), StoreError> {
    let rows: Vec<(EndpointId, CounterDelta)> =
        deltas.iter().filter(|(_, d)| !d.is_zero()).map(|(e, d)| (*e, *d)).collect();
    ADD.execute(tx.conn(), &rows, |(endpoint, d), v| {
        v.extend(
            [
                endpoint.0,
                writer,
                d.queued,
                d.running,
                d.completed,
                d.failed,
                d.cancelled,
                d.timed_out,
                d.retried,
            ]
            .map(Value::from),
        );
    })
    .await?;
    Ok(())
}

/// The counts of one endpoint.
pub async fn endpoint_counts<C: ConnectionTrait>(
    conn: &C,
    endpoint: EndpointId,
) -> Result<EndpointCounts, StoreError> {
    // SUM over BIGINT is NUMERIC on PostgreSQL.
    let rows = sql::query(
        conn,
        "SELECT queued, running, completed, failed, cancelled, timed_out, retried FROM endpoint_counters \
         WHERE endpoint_id = $1",
        [Value::from(endpoint.0)],
    )
    .await?;
    let mut sum = EndpointCounts::default();
    for row in rows {
        sum.queued += row.try_get_by_index::<i64>(0)?;
        sum.running += row.try_get_by_index::<i64>(1)?;
        sum.completed += row.try_get_by_index::<i64>(2)?;
        sum.failed += row.try_get_by_index::<i64>(3)?;
        sum.cancelled += row.try_get_by_index::<i64>(4)?;
        sum.timed_out += row.try_get_by_index::<i64>(5)?;
        sum.retried += row.try_get_by_index::<i64>(6)?;
    }
    Ok(sum)
}

/// Folds the rows of former processes into row 0, so that their number stays small. Answers the rows folded.
/// Rows of living processes may be folded as well: they begin again from zero, the sum is the same.
pub async fn fold_counters(tx: &WriteTx, endpoint: EndpointId) -> Result<u64, StoreError> {
    let lock = if tx.is_postgres() { " FOR UPDATE" } else { "" };
    let rows = sql::query(
        tx.conn(),
        &format!(
            "SELECT queued, running, completed, failed, cancelled, timed_out, retried FROM endpoint_counters \
             WHERE endpoint_id = $1 AND writer <> 0{lock}"
        ),
        [Value::from(endpoint.0)],
    )
    .await?;
    if rows.is_empty() {
        return Ok(0);
    }
    let mut sum = [0_i64; 7];
    for row in &rows {
        for (i, s) in sum.iter_mut().enumerate() {
            *s += row.try_get_by_index::<i64>(i)?;
        }
    }
    let [queued, running, completed, failed, cancelled, timed_out, retried] = sum;
    let removed = sql::execute(
        tx.conn(),
        "DELETE FROM endpoint_counters WHERE endpoint_id = $1 AND writer <> 0",
        [Value::from(endpoint.0)],
    )
    .await?;
    if removed != rows.len() as u64 {
        return Err(StoreError::transient("counters changed while they were folded"));
    }
    let delta = CounterDelta { queued, running, completed, failed, cancelled, timed_out, retried };
    add_counters(tx, 0, &BTreeMap::from([(endpoint, delta)])).await?;
    Ok(removed)
}
