//! Blobs that are stored before the row that names them.
//!
//! Whoever stores such a blob writes its key into `blob_trash` first, due in [`RESERVED_MS`]; the transaction that
//! inserts the row strikes it out. A process that dies in between leaves a key that the sweep finds, and never a blob
//! that nobody knows. A reservation that is due counts no more: the sweep may be at its blob already.

use sea_orm::Value;

use crate::{StoreError, WriteTx, sql::LIST, sql::Rows};

/// How long after the reservation a row may be inserted, in ms. The sweep comes a minute later at the earliest.
pub const RESERVED_MS: i64 = 3_600_000;

const RESERVE: Rows = Rows {
    name: "blob_trash.reserve",
    before: "INSERT INTO blob_trash (blob_key, added_at_ms) VALUES ",
    casts: &["", ""],
    // After an unknown commit the same keys are reserved again.
    after: " ON CONFLICT (blob_key) DO UPDATE SET added_at_ms = excluded.added_at_ms",
};

/// Reserves keys of blobs that are about to be stored.
///
/// # Errors
/// The database's.
pub async fn reserve_blobs(tx: &WriteTx, keys: &[String]) -> Result<(), StoreError> {
    let due_ms = tx.now_ms() + RESERVED_MS;
    RESERVE
        .execute(tx.conn(), keys, |key, v| v.extend([Value::from(key.as_str()), Value::from(due_ms)]))
        .await
        .map(drop)
}

const STRIKE_OUT: Rows = Rows {
    name: "blob_trash.strike_out",
    before: "DELETE FROM blob_trash WHERE blob_key IN (",
    casts: LIST,
    after: ") RETURNING added_at_ms",
};

/// Rows of this transaction name these blobs from now on.
///
/// # Errors
/// [`StoreError::Permanent`] where one of them is not reserved any more; the database's.
pub(crate) async fn keep_blobs(tx: &WriteTx, keys: &[&str]) -> Result<(), StoreError> {
    let mut held = 0;
    for row in STRIKE_OUT.query(tx.conn(), keys, |key, v| v.push(Value::from(*key))).await? {
        held += usize::from(row.try_get_by_index::<i64>(0)? > tx.now_ms());
    }
    if held == keys.len() {
        return Ok(());
    }
    let detail = "a blob was stored too long before its row, or without a reservation".to_owned();
    Err(StoreError::Permanent { detail })
}
