//! Writing down what became of tries. Only the owner of a partition may do so: each write proves its lease.

use std::collections::HashMap;

use sea_orm::Value;
use uuid::Uuid;

use super::{DeliveryState, Timings};
use crate::{
    StoreError, WriteTx,
    sql::{self, LIST, Rows},
};

/// A lease that the writer believes to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    /// The partition.
    pub partition: u16,
    /// The epoch in which it was acquired.
    pub epoch: i64,
}

/// What became of a delivery's try, or of the delivery without one.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// By which right.
    pub claim: Claim,
    /// Job or batch.
    pub owner: Uuid,
    /// Place among its transitions.
    pub seq: u32,
    /// Which of its targets.
    pub target: u32,
    /// Where the delivery stands now.
    pub state: DeliveryState,
    /// Tries made so far.
    pub attempts: u32,
    /// When it is due again; only while it is pending.
    pub next_attempt_at_ms: Option<i64>,
    /// When it ended; only when it is not pending.
    pub ended_at_ms: Option<i64>,
    /// Status of the last answer, if there was one.
    pub last_status: Option<u16>,
    /// Why the last try failed: one word, then details for people.
    pub last_error: Option<String>,
    /// The try itself, if it failed.
    pub failed: Option<FailedAttempt>,
    /// How long the try that succeeded took.
    pub duration_ms: Option<u64>,
    /// Where the time of that try went.
    pub timings: Timings,
    /// Who acknowledged it.
    pub address: Option<String>,
    /// The beginning of that answer's body.
    pub response: Option<Vec<u8>>,
    /// Which life of the delivery this is about: a replay that began meanwhile is not ended by it.
    pub replays: u32,
}

/// A try that failed, for the attempts log.
#[derive(Clone, Debug, PartialEq)]
pub struct FailedAttempt {
    /// When it began, Unix ms.
    pub at_ms: i64,
    /// How long it took.
    pub duration_ms: u64,
    /// Status of the answer, if there was one.
    pub status: Option<u16>,
    /// Why it failed.
    pub error: Option<String>,
    /// Who answered.
    pub address: Option<String>,
    /// The beginning of the answer's body.
    pub response: Option<Vec<u8>>,
    /// Where the time went.
    pub timings: Timings,
}

/// What [`record_outcomes`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Rows changed.
    pub changed: u64,
    /// Claims that are no longer true: the partition belongs to somebody else, nothing of it was written.
    pub lost: Vec<Claim>,
    /// Deliveries that died by this very call: owner, seq, target.
    pub died: Vec<(Uuid, u32, u32)>,
}

const CLAIMS: Rows = Rows {
    name: "partition_leases.claims",
    before: "SELECT partition, epoch FROM partition_leases WHERE partition IN (",
    casts: LIST,
    after: ")",
};

macro_rules! update {
    ($name:literal, $returning:literal) => {
        Rows {
            name: $name,
            before: "WITH v (owner_id, seq, target, state, attempts, next_at, ended_at, status, error, duration, \
                     address, response, timings, replays) AS (VALUES ",
            casts: &[
                "bytea", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "text", "bigint",
                "text", "bytea", "bigint", "bigint",
            ],
            // `+` keeps SQLite from walking the index of pending rows instead of looking up each key.
            after: concat!(
                ") UPDATE deliveries SET state = v.state, attempts = v.attempts, next_attempt_at_ms = v.next_at, \
                 ended_at_ms = v.ended_at, last_status = v.status, last_error = v.error, \
                 duration_ms = v.duration, address = v.address, response = v.response, timings = v.timings FROM v \
                 WHERE deliveries.owner_id = v.owner_id AND deliveries.seq = v.seq \
                 AND deliveries.target = v.target AND deliveries.replays = v.replays AND +deliveries.state = 0",
                $returning
            ),
        }
    };
}

const UPDATE: Rows = update!("deliveries.record", "");
const UPDATE_DEAD: Rows =
    update!("deliveries.record_dead", " RETURNING deliveries.owner_id, deliveries.seq, deliveries.target");

const ATTEMPTS: Rows = Rows {
    name: "delivery_attempts.insert",
    before: "INSERT INTO delivery_attempts (owner_id, seq, target, n, at_ms, duration_ms, status, error, address, \
             response, dns_ms, connect_ms, first_byte_ms) VALUES ",
    casts: &[""; 13],
    after: " ON CONFLICT (owner_id, seq, target, n) DO NOTHING",
};

/// Writes outcomes whose claims still hold; a delivery that is no longer pending is left as it is. Safe to repeat.
///
/// # Errors
/// The database's.
pub async fn record_outcomes(tx: &WriteTx, outcomes: &[Outcome]) -> Result<Recorded, StoreError> {
    let mut claims: Vec<Claim> = Vec::new();
    for outcome in outcomes {
        if !claims.contains(&outcome.claim) {
            claims.push(outcome.claim);
        }
    }
    claims.sort_by_key(|claim| claim.partition);
    // Not locked: a lease that changes hands within this very transaction lets one true fact through, and the new
    // owner's own facts come later and only touch what is pending.
    let rows = CLAIMS.query(tx.conn(), &claims, |claim, v| v.push(sql::int(claim.partition))).await?;
    let mut epochs: HashMap<i64, i64> = HashMap::with_capacity(rows.len());
    for row in &rows {
        epochs.insert(row.try_get_by_index(0)?, row.try_get_by_index(1)?);
    }
    let holds = |claim: &Claim| epochs.get(&i64::from(claim.partition)) == Some(&claim.epoch);
    let lost: Vec<Claim> = claims.iter().copied().filter(|claim| !holds(claim)).collect();
    let mine: Vec<&Outcome> = outcomes.iter().filter(|outcome| holds(&outcome.claim)).collect();
    let (dead, others): (Vec<&Outcome>, Vec<&Outcome>) =
        mine.iter().partition(|outcome| outcome.state == DeliveryState::Dead);
    let mut changed = UPDATE.execute(tx.conn(), &others, |o, v| values(o, v)).await?;
    let mut died = Vec::with_capacity(dead.len());
    for row in &UPDATE_DEAD.query(tx.conn(), &dead, |o, v| values(o, v)).await? {
        died.push((
            super::load::read_owner(row, 0)?,
            sql::get_u32(row, 1, "deliveries.seq")?,
            sql::get_u32(row, 2, "deliveries.target")?,
        ));
        changed += 1;
    }
    let failed: Vec<(&Outcome, &FailedAttempt)> =
        mine.iter().filter_map(|o| o.failed.as_ref().map(|failed| (*o, failed))).collect();
    ATTEMPTS
        .execute(tx.conn(), &failed, |(o, f), v| {
            v.extend([
                sql::id(o.owner.as_bytes()),
                sql::int(o.seq),
                sql::int(o.target),
                sql::int(o.attempts),
                Value::from(f.at_ms),
                sql::int(f.duration_ms),
                sql::opt_int(f.status),
                Value::from(f.error.clone()),
                Value::from(f.address.clone()),
                Value::from(f.response.clone()),
                sql::opt_int(f.timings.dns_ms),
                sql::opt_int(f.timings.connect_ms),
                sql::opt_int(f.timings.first_byte_ms),
            ]);
        })
        .await?;
    Ok(Recorded { changed, lost, died })
}

fn values(o: &Outcome, v: &mut Vec<Value>) {
    v.extend([
        sql::id(o.owner.as_bytes()),
        sql::int(o.seq),
        sql::int(o.target),
        sql::int(o.state.code()),
        sql::int(o.attempts),
        Value::BigInt(o.next_attempt_at_ms),
        Value::BigInt(o.ended_at_ms),
        sql::opt_int(o.last_status),
        Value::from(o.last_error.clone()),
        sql::opt_int(o.duration_ms),
        Value::from(o.address.clone()),
        Value::from(o.response.clone()),
        Value::BigInt(o.timings.pack()),
        sql::int(o.replays),
    ]);
}
