//! Adding to and taking from the secrets that sign a project's job webhooks, while it runs.
//!
//! `project_secrets.disabled_at_ms` in the future is the end of an overlap: until then the secret signs.

use ringback_domain::ProjectId;
use ringback_service_runtime::Redacted;
use sea_orm::Value;

use crate::{
    StoreError, WriteTx,
    secrets::{SecretKey, add_secret, live_secrets},
    sql,
    webhooks::{
        bump_registry,
        secrets::{MAX_LIVE, Removed},
    },
};

/// What became of an addition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// It signs; its key.
    Done(i64),
    /// As many sign already as may.
    TooMany,
}

async fn lock(tx: &WriteTx, project: ProjectId) -> Result<(), StoreError> {
    if tx.is_postgres() {
        sql::execute(tx.conn(), "SELECT id FROM projects WHERE id = $1 FOR UPDATE", [Value::from(project.0)])
            .await?;
    }
    Ok(())
}

/// Adds a secret. With `overlap_ms`, the ones before it stop after that time; without, they sign on.
///
/// # Errors
/// The database's, and a secret that cannot sign.
pub async fn add(
    tx: &WriteTx,
    key: &SecretKey,
    project: ProjectId,
    secret: &Redacted<String>,
    label: Option<&str>,
    overlap_ms: Option<u64>,
) -> Result<Added, StoreError> {
    lock(tx, project).await?;
    let live = live_secrets(tx.conn(), key, project).await?;
    if live.len() >= MAX_LIVE && overlap_ms != Some(0) {
        return Ok(Added::TooMany);
    }
    if let Some(overlap_ms) = overlap_ms {
        let until = tx.now_ms().saturating_add_unsigned(overlap_ms);
        sql::execute(
            tx.conn(),
            "UPDATE project_secrets SET disabled_at_ms = $2 \
             WHERE project_id = $1 AND (disabled_at_ms IS NULL OR disabled_at_ms > $2)",
            [Value::from(project.0), Value::from(until)],
        )
        .await?;
    }
    add_secret(tx, key, project, secret).await?;
    let live = live_secrets(tx.conn(), key, project).await?;
    let id = live
        .iter()
        .find(|s| s.secret == *secret)
        .map(|s| s.id)
        .ok_or(StoreError::corrupt("project_secrets"))?;
    sql::execute(
        tx.conn(),
        "UPDATE project_secrets SET label = $2 WHERE id = $1",
        [Value::from(id), Value::from(label.map(str::to_owned))],
    )
    .await?;
    Ok(Added::Done(id))
}

/// Stops a secret at once. One that lasts must remain.
///
/// # Errors
/// The database's.
pub async fn remove(
    tx: &WriteTx,
    key: &SecretKey,
    project: ProjectId,
    secret: i64,
) -> Result<Removed, StoreError> {
    lock(tx, project).await?;
    let live = live_secrets(tx.conn(), key, project).await?;
    if !live.iter().any(|s| s.id == secret) {
        return Ok(Removed::Absent);
    }
    if !live.iter().any(|s| s.id != secret && s.expires_at_ms.is_none()) {
        return Ok(Removed::Last);
    }
    sql::execute(
        tx.conn(),
        "UPDATE project_secrets SET disabled_at_ms = $2 WHERE id = $1",
        [Value::from(secret), Value::from(tx.now_ms())],
    )
    .await?;
    bump_registry(tx).await?;
    Ok(Removed::Done)
}

/// When a delivery of the project's jobs was last tried, Unix ms: all live secrets sign each of them.
///
/// # Errors
/// The database's.
pub async fn last_used_ms<C: sea_orm::ConnectionTrait>(
    conn: &C,
    project: ProjectId,
) -> Result<Option<i64>, StoreError> {
    let row = sql::query_one(
        conn,
        "SELECT COALESCE(d.ended_at_ms, d.created_at_ms) FROM (SELECT ended_at_ms, created_at_ms, attempts, target \
         FROM deliveries WHERE project_id = $1 ORDER BY position DESC LIMIT 1000) d \
         WHERE d.attempts > 0 AND d.target < 65536 LIMIT 1",
        [Value::from(project.0)],
    )
    .await?;
    row.map(|row| Ok(row.try_get_by_index(0)?)).transpose()
}

/// All projects by name.
///
/// # Errors
/// The database's.
pub async fn projects<C: sea_orm::ConnectionTrait>(
    conn: &C,
) -> Result<std::collections::HashMap<String, ProjectId>, StoreError> {
    let rows = sql::query(conn, "SELECT name, id FROM projects", []).await?;
    rows.iter().map(|row| Ok((row.try_get_by_index(0)?, ProjectId(row.try_get_by_index(1)?)))).collect()
}
