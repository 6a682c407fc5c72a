//! What could not be read or applied, kept for people (P9).

use sea_orm::Value;

use crate::{StoreError, WriteTx, sql};

/// Most bytes of a payload that are kept.
const KEEP_BYTES: usize = 64 * 1024;

/// Keeps one thing. Safe to repeat: it is kept again.
///
/// # Errors
/// The database's.
pub async fn insert(tx: &WriteTx, kind: &str, error: &str, payload: &[u8]) -> Result<(), StoreError> {
    let payload = &payload[..payload.len().min(KEEP_BYTES)];
    sql::execute(
        tx.conn(),
        "INSERT INTO quarantine (at_ms, kind, error, payload) VALUES ($1, $2, $3, $4)",
        [Value::from(tx.now_ms()), Value::from(kind), Value::from(error), Value::from(payload.to_vec())],
    )
    .await
    .map(drop)
}
