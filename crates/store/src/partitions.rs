//! Who owns a partition of deliveries: leases on the database's clock, fenced by an epoch.
//!
//! The epoch rises with every change of owner. What a former owner still wants to write carries its old epoch and is
//! refused by [`crate::deliveries::record_outcomes`].

use sea_orm::{ConnectionTrait, Value};
use sha2::{Digest as _, Sha256};

pub use crate::deliveries::Claim;
use crate::{
    StoreError, WriteTx,
    sql::{self, Rows},
};

/// A lease as everybody sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The partition.
    pub partition: u16,
    /// Its owner; empty when it was given back.
    pub owner: String,
    /// Rises with every change of owner.
    pub epoch: i64,
    /// When it ends unless it is renewed, on the database's clock.
    pub expires_at_ms: i64,
}

/// All leases, in the order of partitions. A partition that never had an owner has none.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn leases<C: ConnectionTrait>(conn: &C) -> Result<Vec<Lease>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT partition, owner, epoch, expires_at_ms FROM partition_leases WHERE partition >= 0 ORDER BY partition",
        [],
    )
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Lease {
                partition: u16::try_from(row.try_get_by_index::<i64>(0)?)
                    .map_err(|_| StoreError::corrupt("partition_leases.partition"))?,
                owner: row.try_get_by_index(1)?,
                epoch: row.try_get_by_index(2)?,
                expires_at_ms: row.try_get_by_index(3)?,
            })
        })
        .collect()
}

/// When a lease that somebody else holds may be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// Only when it was given back, or never taken.
    GivenBack,
    /// Once it has run out.
    Expired,
    /// At once: the caller knows that no other dispatcher lives, because it holds the lock of the data folder.
    Always,
}

/// Takes the lease of `partition` if it is free. Answers the new claim, or `None` while another owner holds it.
///
/// # Errors
/// The database's.
pub async fn acquire(
    tx: &WriteTx,
    me: &str,
    partition: u16,
    lease_ms: u64,
    take: Take,
) -> Result<Option<Claim>, StoreError> {
    let expired_at = match take {
        Take::GivenBack => i64::MIN,
        Take::Expired => tx.now_ms(),
        Take::Always => i64::MAX,
    };
    // One statement: on PostgreSQL the second of two askers waits for the first and then sees its lease.
    let row = sql::query_one(
        tx.conn(),
        "INSERT INTO partition_leases (partition, owner, epoch, expires_at_ms) VALUES ($1, $2, 1, $3) \
         ON CONFLICT (partition) DO UPDATE SET owner = excluded.owner, epoch = partition_leases.epoch + 1, \
         expires_at_ms = excluded.expires_at_ms \
         WHERE partition_leases.expires_at_ms <= $4 OR partition_leases.owner = '' RETURNING epoch",
        [
            sql::int(partition),
            Value::from(me),
            Value::from(tx.now_ms().saturating_add_unsigned(lease_ms)),
            Value::from(expired_at),
        ],
    )
    .await?;
    row.map(|row| Ok(Claim { partition, epoch: row.try_get_by_index(0)? })).transpose()
}

const RENEW: Rows = Rows {
    name: "partition_leases.renew",
    before: "WITH v (partition, epoch, owner, expires) AS (VALUES ",
    casts: &["bigint", "bigint", "text", "bigint"],
    after: ") UPDATE partition_leases SET expires_at_ms = v.expires FROM v \
            WHERE partition_leases.partition = v.partition AND partition_leases.epoch = v.epoch \
            AND partition_leases.owner = v.owner RETURNING partition_leases.partition, partition_leases.epoch",
};

/// Renews leases; answers those that are still the caller's. A lease that ran out and that nobody took is still the
/// caller's, because nobody else has written anything.
///
/// # Errors
/// The database's.
pub async fn renew(
    tx: &WriteTx,
    me: &str,
    claims: &[Claim],
    lease_ms: u64,
) -> Result<Vec<Claim>, StoreError> {
    let expires = tx.now_ms().saturating_add_unsigned(lease_ms);
    let rows = RENEW
        .query(tx.conn(), claims, |claim, v| {
            v.extend([
                sql::int(claim.partition),
                Value::from(claim.epoch),
                Value::from(me),
                Value::from(expires),
            ]);
        })
        .await?;
    rows.iter()
        .map(|row| {
            Ok(Claim {
                partition: u16::try_from(row.try_get_by_index::<i64>(0)?)
                    .map_err(|_| StoreError::corrupt("partition_leases.partition"))?,
                epoch: row.try_get_by_index(1)?,
            })
        })
        .collect()
}

/// Gives a lease back, so that the next owner need not wait. Nothing happens if it is no longer the caller's.
///
/// # Errors
/// The database's.
pub async fn release(tx: &WriteTx, me: &str, claim: Claim) -> Result<(), StoreError> {
    sql::execute(
        tx.conn(),
        "UPDATE partition_leases SET owner = '', expires_at_ms = 0 \
         WHERE partition = $1 AND epoch = $2 AND owner = $3",
        [sql::int(claim.partition), Value::from(claim.epoch), Value::from(me)],
    )
    .await
    .map(drop)
}

/// What a dispatcher learns when it renews.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Membership {
    /// The caller's claims that still hold.
    pub held: Vec<Claim>,
    /// Partitions that somebody holds, the caller included.
    pub taken: Vec<u16>,
    /// Partitions whose lease has run out without being given back: their owner is dead, or cut off.
    pub lapsed: Vec<u16>,
    /// Dispatchers that live, the caller included.
    pub members: usize,
}

/// Renews the caller's leases and shows that it lives, in one command. Members are rows with negative numbers: they
/// share the table and its clock, and no partition has such a number.
///
/// # Errors
/// The database's.
pub async fn keep_alive(
    tx: &WriteTx,
    me: &str,
    claims: &[Claim],
    lease_ms: u64,
) -> Result<Membership, StoreError> {
    let now_ms = tx.now_ms();
    sql::execute(
        tx.conn(),
        "INSERT INTO partition_leases (partition, owner, epoch, expires_at_ms) VALUES ($1, $2, 0, $3) \
         ON CONFLICT (partition) DO UPDATE SET owner = excluded.owner, expires_at_ms = excluded.expires_at_ms",
        [
            Value::from(member_number(me)),
            Value::from(me),
            Value::from(now_ms.saturating_add_unsigned(lease_ms)),
        ],
    )
    .await?;
    sql::execute(
        tx.conn(),
        "DELETE FROM partition_leases WHERE partition < 0 AND expires_at_ms < $1",
        [Value::from(now_ms)],
    )
    .await?;
    let held = renew(tx, me, claims, lease_ms).await?;
    let rows =
        sql::query(tx.conn(), "SELECT partition, expires_at_ms FROM partition_leases WHERE owner <> ''", [])
            .await?;
    let mut membership = Membership { held, ..Membership::default() };
    for row in &rows {
        let lapsed = row.try_get_by_index::<i64>(1)? <= now_ms;
        match u16::try_from(row.try_get_by_index::<i64>(0)?) {
            Ok(partition) if lapsed => membership.lapsed.push(partition),
            Ok(partition) => membership.taken.push(partition),
            Err(_) => membership.members += usize::from(!lapsed),
        }
    }
    Ok(membership)
}

/// Says that the caller lives no more, so that the others take its share at once.
///
/// # Errors
/// The database's.
pub async fn depart(tx: &WriteTx, me: &str) -> Result<(), StoreError> {
    sql::execute(
        tx.conn(),
        "DELETE FROM partition_leases WHERE partition = $1 AND owner = $2",
        [Value::from(member_number(me)), Value::from(me)],
    )
    .await
    .map(drop)
}

/// A negative number made from the name, which is random: two members have the same one about never, and then they
/// count as one.
fn member_number(me: &str) -> i64 {
    let hash = Sha256::digest(me.as_bytes());
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash[..8]);
    -1 - (i64::from_be_bytes(bytes) & i64::MAX >> 1)
}
