//! Secrets and headers of registered webhooks, encrypted with the key file.
//!
//! A secret signs until it expires; all live ones sign at once, newest first, so that a receiver may change its key
//! at any moment of the overlap.

use std::collections::BTreeMap;

use ringback_domain::ProjectId;
use ringback_domain::webhook::signature::{SecretError, SecretForm, SigningKey};
use ringback_service_runtime::Redacted;
use sea_orm::{ConnectionTrait, Value};

use super::{bump_registry, crud};
use crate::{StoreError, WriteTx, secrets::SecretKey, sql};

/// Most secrets of one webhook that sign at once: each adds 48 bytes to a header.
pub const MAX_LIVE: usize = 10;

fn purpose(public_id: &str) -> String {
    format!("webhook_secret:{public_id}")
}

fn headers_purpose(public_id: &str) -> String {
    format!("webhook_headers:{public_id}")
}

/// Encrypts a secret for the webhook with this public id.
///
/// # Errors
/// The secret cannot sign.
pub fn seal_secret(
    key: &SecretKey,
    public_id: &str,
    secret: &Redacted<String>,
) -> Result<Vec<u8>, StoreError> {
    SigningKey::parse(secret.expose()).map_err(refused)?;
    key.seal(secret.expose().as_bytes(), &purpose(public_id))
}

/// Encrypts the further headers of a webhook.
///
/// # Errors
/// The cipher's.
pub fn seal_headers(
    key: &SecretKey,
    public_id: &str,
    headers: &BTreeMap<String, String>,
) -> Result<Vec<u8>, StoreError> {
    let plain = serde_json::to_vec(headers).map_err(|e| StoreError::Permanent { detail: e.to_string() })?;
    key.seal(&plain, &headers_purpose(public_id))
}

/// Reads the further headers of a webhook. Their values may be credentials.
///
/// # Errors
/// Another key file, or changed bytes.
pub fn open_headers(
    key: &SecretKey,
    public_id: &str,
    sealed: &[u8],
) -> Result<Redacted<BTreeMap<String, String>>, StoreError> {
    let plain = key.open_sealed(sealed, &headers_purpose(public_id))?;
    let headers = serde_json::from_slice(plain.expose())
        .map_err(|_| StoreError::corrupt("webhooks.headers_encrypted"))?;
    Ok(Redacted::new(headers))
}

fn refused(error: SecretError) -> StoreError {
    StoreError::Permanent { detail: error.to_string() }
}

/// A secret that signs for a webhook.
#[derive(Clone, Debug)]
pub struct WebhookSecret {
    /// Its key.
    pub id: i64,
    /// The text as its owner knows it.
    pub secret: Redacted<String>,
    /// When it was added.
    pub created_at_ms: i64,
    /// When it stops signing.
    pub expires_at_ms: Option<i64>,
}

impl WebhookSecret {
    /// Ready to sign.
    ///
    /// # Errors
    /// It cannot sign.
    pub fn signing_key(&self) -> Result<SigningKey, StoreError> {
        Ok(SigningKey::parse(self.secret.expose()).map_err(refused)?.0)
    }

    /// How it is read.
    #[must_use]
    pub fn form(&self) -> SecretForm {
        SigningKey::parse(self.secret.expose()).map_or(SecretForm::Raw, |(_, form)| form)
    }
}

/// The live secrets of a webhook, newest first.
///
/// # Errors
/// The database's, and a secret that this key file cannot decrypt.
pub async fn live<C: ConnectionTrait>(
    conn: &C,
    key: &SecretKey,
    webhook_id: i64,
    public_id: &str,
    now_ms: i64,
) -> Result<Vec<WebhookSecret>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT id, secret_encrypted, created_at_ms, expires_at_ms FROM webhook_secrets \
         WHERE webhook_id = $1 AND (expires_at_ms IS NULL OR expires_at_ms > $2) ORDER BY id DESC",
        [Value::from(webhook_id), Value::from(now_ms)],
    )
    .await?;
    rows.iter()
        .map(|row| {
            let sealed: Vec<u8> = row.try_get_by_index(1)?;
            let plain = key.open_sealed(&sealed, &purpose(public_id))?.into_inner();
            let secret = String::from_utf8(plain)
                .map_err(|_| StoreError::corrupt("webhook_secrets.secret_encrypted"))?;
            Ok(WebhookSecret {
                id: row.try_get_by_index(0)?,
                secret: Redacted::new(secret),
                created_at_ms: row.try_get_by_index(2)?,
                expires_at_ms: row.try_get_by_index(3)?,
            })
        })
        .collect()
}

/// Inserts the first secret of a webhook that is being made.
pub(super) async fn insert(tx: &WriteTx, webhook_id: i64, sealed: &[u8]) -> Result<i64, StoreError> {
    let row = sql::query_one(
        tx.conn(),
        "INSERT INTO webhook_secrets (webhook_id, secret_encrypted, created_at_ms, expires_at_ms) \
         VALUES ($1, $2, $3, NULL) RETURNING id",
        [Value::from(webhook_id), Value::from(sealed.to_vec()), Value::from(tx.now_ms())],
    )
    .await?;
    Ok(row.ok_or(StoreError::corrupt("webhook_secrets.id"))?.try_get_by_index(0)?)
}

/// What became of a rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotated {
    /// The new secret signs; its key.
    Done(i64),
    /// As many sign already as may.
    TooMany,
    /// No such webhook.
    Absent,
}

/// Adds a secret that becomes the newest; the ones before it sign for `overlap_ms` longer, or as long as they would
/// have anyway.
///
/// # Errors
/// The database's.
pub async fn rotate(
    tx: &WriteTx,
    project: ProjectId,
    public_id: &str,
    sealed: &[u8],
    overlap_ms: u64,
) -> Result<Rotated, StoreError> {
    let now = tx.now_ms();
    let Some(webhook) = lock(tx, project, public_id).await? else { return Ok(Rotated::Absent) };
    if overlap_ms > 0 && count_live(tx, webhook).await? >= MAX_LIVE {
        return Ok(Rotated::TooMany);
    }
    sql::execute(
        tx.conn(),
        "UPDATE webhook_secrets SET expires_at_ms = $2 \
         WHERE webhook_id = $1 AND (expires_at_ms IS NULL OR expires_at_ms > $2)",
        [Value::from(webhook), Value::from(now.saturating_add_unsigned(overlap_ms))],
    )
    .await?;
    // What no longer signs is of no use to anybody.
    sql::execute(
        tx.conn(),
        "DELETE FROM webhook_secrets WHERE webhook_id = $1 AND expires_at_ms <= $2",
        [Value::from(webhook), Value::from(now)],
    )
    .await?;
    let id = insert(tx, webhook, sealed).await?;
    bump_registry(tx).await?;
    Ok(Rotated::Done(id))
}

/// What became of the removal of a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    /// It signs no more.
    Done,
    /// It is the only one, and nothing is sent unsigned.
    Last,
    /// No such secret, or no such webhook.
    Absent,
}

/// Stops a secret at once. One that never expires must remain.
///
/// # Errors
/// The database's.
pub async fn remove(
    tx: &WriteTx,
    project: ProjectId,
    public_id: &str,
    secret: i64,
) -> Result<Removed, StoreError> {
    let Some(webhook) = lock(tx, project, public_id).await? else { return Ok(Removed::Absent) };
    let rows = sql::query(
        tx.conn(),
        "SELECT id, expires_at_ms FROM webhook_secrets \
         WHERE webhook_id = $1 AND (expires_at_ms IS NULL OR expires_at_ms > $2)",
        [Value::from(webhook), Value::from(tx.now_ms())],
    )
    .await?;
    let mut found = false;
    let mut lasting = 0;
    for row in &rows {
        let (id, expires): (i64, Option<i64>) = (row.try_get_by_index(0)?, row.try_get_by_index(1)?);
        found |= id == secret;
        lasting += usize::from(id != secret && expires.is_none());
    }
    if !found {
        return Ok(Removed::Absent);
    }
    if lasting == 0 {
        return Ok(Removed::Last);
    }
    sql::execute(
        tx.conn(),
        "DELETE FROM webhook_secrets WHERE webhook_id = $1 AND id = $2",
        [Value::from(webhook), Value::from(secret)],
    )
    .await?;
    bump_registry(tx).await?;
    Ok(Removed::Done)
}

/// The key of a live webhook; on PostgreSQL its row is locked, so that two changes of its secrets follow each other.
async fn lock(tx: &WriteTx, project: ProjectId, public_id: &str) -> Result<Option<i64>, StoreError> {
    if tx.is_postgres() {
        sql::execute(
            tx.conn(),
            "SELECT id FROM webhooks WHERE project_id = $1 AND public_id = $2 FOR UPDATE",
            [Value::from(project.0), Value::from(public_id)],
        )
        .await?;
    }
    Ok(crud::get(tx.conn(), project, public_id, tx.now_ms()).await?.map(|row| row.id))
}

async fn count_live(tx: &WriteTx, webhook: i64) -> Result<usize, StoreError> {
    let row = sql::query_one(
        tx.conn(),
        "SELECT COUNT(*) FROM webhook_secrets WHERE webhook_id = $1 AND (expires_at_ms IS NULL OR expires_at_ms > $2)",
        [Value::from(webhook), Value::from(tx.now_ms())],
    )
    .await?;
    let n: i64 = row.ok_or(StoreError::corrupt("count"))?.try_get_by_index(0)?;
    Ok(usize::try_from(n).unwrap_or(usize::MAX))
}
