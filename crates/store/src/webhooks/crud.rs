//! Registered webhooks: what api-ingest writes and shows. Every question names the project.
//!
//! A deleted or expired webhook does not exist for clients; its row stays while deliveries name it. What the
//! dispatcher finds out about a webhook lies in `webhook_health` and is only read here (P8).

use ringback_domain::{ProjectId, target::WebhookFormat};
use sea_orm::{ConnectionTrait, QueryResult, Value};

use super::bump_registry;
use crate::{
    StoreError, WriteTx,
    sql::{self, LIST, Rows},
};

/// A webhook as its owner sees it. Headers and secrets stay encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebhookRow {
    /// Its key; the number of its target is 65536 more.
    pub id: i64,
    /// Its id in URLs, `wh_…`.
    pub public_id: String,
    /// Owner.
    pub project: ProjectId,
    /// The owner's name for it.
    pub label: String,
    /// Where it sends; `None` = its deliveries are only read from the feed.
    pub url: Option<String>,
    /// Which bodies.
    pub format: WebhookFormat,
    /// Which events, as JSON.
    pub filter: String,
    /// Further headers as JSON, encrypted.
    pub headers_encrypted: Option<Vec<u8>>,
    /// Profile or own waits as JSON; `None` = the operator's profile.
    pub retry: Option<String>,
    /// Most tries per second.
    pub rate_per_second: Option<u32>,
    /// Longest try.
    pub deadline_ms: Option<u64>,
    /// Whether an event waits until the earlier ones of its job have ended.
    pub strict_order: bool,
    /// Whether its deliveries are held.
    pub paused: bool,
    /// Rises when a person enables it again.
    pub enable_epoch: i64,
    /// When it ends by itself.
    pub expires_at_ms: Option<i64>,
    /// When it was made.
    pub created_at_ms: i64,
    /// When its owner changed it last.
    pub updated_at_ms: i64,
    /// How it fares.
    pub health: Health,
}

/// What the dispatcher found out about a webhook.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Since when every try has failed.
    pub failing_since_ms: Option<i64>,
    /// The last try that was acknowledged.
    pub last_success_at_ms: Option<i64>,
    /// When and why it was disabled, if that holds now.
    pub disabled: Option<(i64, String)>,
}

/// A webhook to be made.
#[derive(Clone, Debug)]
pub struct NewWebhook {
    /// Its id in URLs.
    pub public_id: String,
    /// Owner.
    pub project: ProjectId,
    /// What its owner decides.
    pub settings: Settings,
    /// The first secret, encrypted by [`super::secrets::seal_secret`].
    pub secret_encrypted: Vec<u8>,
    /// Life, if it is limited.
    pub expires_in_ms: Option<u64>,
}

/// What the owner of a webhook decides about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// See [`WebhookRow::label`].
    pub label: String,
    /// See [`WebhookRow::url`].
    pub url: Option<String>,
    /// See [`WebhookRow::format`].
    pub format: WebhookFormat,
    /// See [`WebhookRow::filter`].
    pub filter: String,
    /// See [`WebhookRow::headers_encrypted`].
    pub headers_encrypted: Option<Vec<u8>>,
    /// See [`WebhookRow::retry`].
    pub retry: Option<String>,
    /// See [`WebhookRow::rate_per_second`].
    pub rate_per_second: Option<u32>,
    /// See [`WebhookRow::deadline_ms`].
    pub deadline_ms: Option<u64>,
    /// See [`WebhookRow::strict_order`].
    pub strict_order: bool,
    /// See [`WebhookRow::paused`].
    pub paused: bool,
}

impl WebhookRow {
    /// What its owner decided.
    #[must_use]
    pub fn settings(&self) -> Settings {
        Settings {
            label: self.label.clone(),
            url: self.url.clone(),
            format: self.format,
            filter: self.filter.clone(),
            headers_encrypted: self.headers_encrypted.clone(),
            retry: self.retry.clone(),
            rate_per_second: self.rate_per_second,
            deadline_ms: self.deadline_ms,
            strict_order: self.strict_order,
            paused: self.paused,
        }
    }
}

/// What became of a create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Created {
    /// It is there; its row.
    Made(Box<WebhookRow>),
    /// The project has as many as it may have.
    TooMany,
}

/// What became of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Updated {
    /// Done; the row as it is now.
    Done(Box<WebhookRow>),
    /// Somebody else changed it meanwhile: read it again.
    Raced,
    /// No such webhook.
    Absent,
}

const SELECT: &str = "SELECT w.id, w.public_id, w.project_id, w.label, w.url, w.format, w.filter, \
                      w.headers_encrypted, w.retry, w.rate_per_second, w.deadline_ms, w.strict_order, w.paused, \
                      w.enable_epoch, w.expires_at_ms, w.created_at_ms, w.updated_at_ms, h.failing_since_ms, \
                      h.last_success_at_ms, h.disabled_epoch, h.disabled_at_ms, h.disabled_reason \
                      FROM webhooks w LEFT JOIN webhook_health h ON h.webhook_id = w.id \
                      WHERE w.project_id = $1 AND w.deleted_at_ms IS NULL \
                      AND (w.expires_at_ms IS NULL OR w.expires_at_ms > $2)";

fn read(row: &QueryResult) -> Result<WebhookRow, StoreError> {
    let enable_epoch: i64 = row.try_get_by_index(13)?;
    let disabled_epoch: Option<i64> = row.try_get_by_index(19)?;
    let disabled = if disabled_epoch == Some(enable_epoch) {
        let at: Option<i64> = row.try_get_by_index(20)?;
        let reason: Option<String> = row.try_get_by_index(21)?;
        Some((at.unwrap_or_default(), reason.unwrap_or_default()))
    } else {
        None
    };
    let small = |index, what| {
        row.try_get_by_index::<Option<i64>>(index)?
            .map(|n| u32::try_from(n).map_err(|_| StoreError::corrupt(what)))
            .transpose()
    };
    Ok(WebhookRow {
        id: row.try_get_by_index(0)?,
        public_id: row.try_get_by_index(1)?,
        project: ProjectId(row.try_get_by_index(2)?),
        label: row.try_get_by_index(3)?,
        url: row.try_get_by_index(4)?,
        format: WebhookFormat::from_code(row.try_get_by_index(5)?)
            .ok_or(StoreError::corrupt("webhooks.format"))?,
        filter: row.try_get_by_index(6)?,
        headers_encrypted: row.try_get_by_index(7)?,
        retry: row.try_get_by_index(8)?,
        rate_per_second: small(9, "webhooks.rate_per_second")?,
        deadline_ms: small(10, "webhooks.deadline_ms")?.map(u64::from),
        strict_order: row.try_get_by_index::<i64>(11)? != 0,
        paused: row.try_get_by_index::<i64>(12)? != 0,
        enable_epoch,
        expires_at_ms: row.try_get_by_index(14)?,
        created_at_ms: row.try_get_by_index(15)?,
        updated_at_ms: row.try_get_by_index(16)?,
        health: Health {
            failing_since_ms: row.try_get_by_index(17)?,
            last_success_at_ms: row.try_get_by_index(18)?,
            disabled,
        },
    })
}

/// The webhooks of a project, oldest first.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn list<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    now_ms: i64,
) -> Result<Vec<WebhookRow>, StoreError> {
    let rows =
        sql::query(conn, &format!("{SELECT} ORDER BY w.id"), [Value::from(project.0), Value::from(now_ms)])
            .await?;
    rows.iter().map(read).collect()
}

/// One webhook of a project.
///
/// # Errors
/// As [`list`].
pub async fn get<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    public_id: &str,
    now_ms: i64,
) -> Result<Option<WebhookRow>, StoreError> {
    let row = sql::query_one(
        conn,
        &format!("{SELECT} AND w.public_id = $3"),
        [Value::from(project.0), Value::from(now_ms), Value::from(public_id)],
    )
    .await?;
    row.as_ref().map(read).transpose()
}

/// The public ids of all webhooks of a project that deliveries may name, gone ones included, by their key.
///
/// # Errors
/// The database's.
pub async fn names<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
) -> Result<std::collections::HashMap<i64, String>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT id, public_id FROM webhooks WHERE project_id = $1",
        [Value::from(project.0)],
    )
    .await?;
    rows.iter().map(|row| Ok((row.try_get_by_index(0)?, row.try_get_by_index(1)?))).collect()
}

/// The key of a webhook of a project, whether it still exists or not: its deliveries may outlive it.
///
/// # Errors
/// The database's.
pub async fn key_of<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    public_id: &str,
) -> Result<Option<i64>, StoreError> {
    let row = sql::query_one(
        conn,
        "SELECT id FROM webhooks WHERE project_id = $1 AND public_id = $2",
        [Value::from(project.0), Value::from(public_id)],
    )
    .await?;
    row.map(|row| Ok(row.try_get_by_index(0)?)).transpose()
}

/// Makes a webhook with its first secret, unless the project has `max` of them.
///
/// # Errors
/// [`StoreError::Duplicate`] where the public id exists: a try before was committed after all.
pub async fn create(tx: &WriteTx, new: &NewWebhook, max: u32) -> Result<Created, StoreError> {
    if tx.is_postgres() {
        // Two requests at once shall not make one more than allowed.
        sql::execute(
            tx.conn(),
            "SELECT id FROM projects WHERE id = $1 FOR UPDATE",
            [Value::from(new.project.0)],
        )
        .await?;
    }
    let now = tx.now_ms();
    let live = list(tx.conn(), new.project, now).await?;
    if live.len() >= max as usize {
        return Ok(Created::TooMany);
    }
    let s = &new.settings;
    let row = sql::query_one(
        tx.conn(),
        "INSERT INTO webhooks (public_id, project_id, label, url, format, filter, headers_encrypted, retry, \
         rate_per_second, deadline_ms, strict_order, paused, enable_epoch, expires_at_ms, created_at_ms, updated_at_ms) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, 1, $13, $14, $14) RETURNING id",
        [
            Value::from(new.public_id.as_str()),
            Value::from(new.project.0),
            Value::from(s.label.as_str()),
            Value::from(s.url.clone()),
            sql::int(s.format.code()),
            Value::from(s.filter.as_str()),
            Value::from(s.headers_encrypted.clone()),
            Value::from(s.retry.clone()),
            sql::opt_int(s.rate_per_second),
            sql::opt_int(s.deadline_ms),
            Value::from(i64::from(s.strict_order)),
            Value::from(i64::from(s.paused)),
            sql::opt_int(new.expires_in_ms.map(|ms| now.saturating_add_unsigned(ms))),
            Value::from(now),
        ],
    )
    .await?;
    let id: i64 = row.ok_or(StoreError::corrupt("webhooks.id"))?.try_get_by_index(0)?;
    super::secrets::insert(tx, id, &new.secret_encrypted).await?;
    bump_registry(tx).await?;
    let made = get(tx.conn(), new.project, &new.public_id, now).await?;
    // A webhook that expires within its own transaction was not worth making.
    Ok(Created::Made(Box::new(made.ok_or(StoreError::corrupt("webhooks"))?)))
}

/// A webhook that is gone keeps its row, name and secrets for so long: its deliveries are shown and replayed with them.
pub const KEEP_GONE_MS: u64 = 31 * 86_400_000;

const PURGE: [Rows; 3] = [
    Rows {
        name: "webhooks.purge.secrets",
        before: "DELETE FROM webhook_secrets WHERE webhook_id IN (",
        casts: LIST,
        after: ")",
    },
    Rows {
        name: "webhooks.purge.health",
        before: "DELETE FROM webhook_health WHERE webhook_id IN (",
        casts: LIST,
        after: ")",
    },
    Rows { name: "webhooks.purge", before: "DELETE FROM webhooks WHERE id IN (", casts: LIST, after: ")" },
];

/// Removes the rows of a few webhooks that went longer ago than [`KEEP_GONE_MS`]; answers how many. Keys are never given
/// out again, so an old delivery cannot be taken for one of another webhook.
///
/// # Errors
/// The database's.
pub async fn purge_gone(tx: &WriteTx, limit: u32) -> Result<u64, StoreError> {
    let before = tx.now_ms().saturating_sub_unsigned(KEEP_GONE_MS);
    let rows = sql::query(
        tx.conn(),
        "SELECT id FROM webhooks WHERE deleted_at_ms < $1 OR expires_at_ms < $1 ORDER BY id LIMIT $2",
        [Value::from(before), sql::int(limit)],
    )
    .await?;
    let gone: Vec<i64> =
        rows.iter().map(|row| Ok(row.try_get_by_index(0)?)).collect::<Result<_, StoreError>>()?;
    if gone.is_empty() {
        return Ok(0);
    }
    for rows in &PURGE {
        rows.execute(tx.conn(), &gone, |id, v| v.push(Value::from(*id))).await?;
    }
    bump_registry(tx).await?;
    Ok(gone.len() as u64)
}

/// Writes what the owner decided, if nobody changed it since `seen`. Safe to repeat: a change that is there already
/// counts as done.
///
/// # Errors
/// The database's.
pub async fn update(
    tx: &WriteTx,
    seen: &WebhookRow,
    to: &Settings,
    expires_at_ms: Option<i64>,
) -> Result<Updated, StoreError> {
    let now = tx.now_ms();
    let written = sql::execute(
        tx.conn(),
        "UPDATE webhooks SET label = $3, url = $4, format = $5, filter = $6, headers_encrypted = $7, retry = $8, \
         rate_per_second = $9, deadline_ms = $10, strict_order = $11, paused = $12, expires_at_ms = $13, \
         updated_at_ms = CASE WHEN updated_at_ms < $14 THEN $14 ELSE updated_at_ms + 1 END \
         WHERE project_id = $1 AND id = $2 AND updated_at_ms = $15 AND deleted_at_ms IS NULL",
        [
            Value::from(seen.project.0),
            Value::from(seen.id),
            Value::from(to.label.as_str()),
            Value::from(to.url.clone()),
            sql::int(to.format.code()),
            Value::from(to.filter.as_str()),
            Value::from(to.headers_encrypted.clone()),
            Value::from(to.retry.clone()),
            sql::opt_int(to.rate_per_second),
            sql::opt_int(to.deadline_ms),
            Value::from(i64::from(to.strict_order)),
            Value::from(i64::from(to.paused)),
            Value::from(expires_at_ms),
            Value::from(now),
            Value::from(seen.updated_at_ms),
        ],
    )
    .await?;
    let Some(row) = get(tx.conn(), seen.project, &seen.public_id, now).await? else {
        return Ok(Updated::Absent);
    };
    if written == 0 {
        let same = row.settings() == *to && row.expires_at_ms == expires_at_ms;
        return Ok(if same { Updated::Done(Box::new(row)) } else { Updated::Raced });
    }
    bump_registry(tx).await?;
    Ok(Updated::Done(Box::new(row)))
}

/// Takes a webhook out of use. What it is still owed is ended by the dispatcher. Answers false where there is none.
///
/// # Errors
/// The database's.
pub async fn delete(tx: &WriteTx, project: ProjectId, public_id: &str) -> Result<bool, StoreError> {
    let gone = sql::execute(
        tx.conn(),
        "UPDATE webhooks SET deleted_at_ms = $3, updated_at_ms = $3 \
         WHERE project_id = $1 AND public_id = $2 AND deleted_at_ms IS NULL \
         AND (expires_at_ms IS NULL OR expires_at_ms > $3)",
        [Value::from(project.0), Value::from(public_id), Value::from(tx.now_ms())],
    )
    .await?;
    if gone > 0 {
        bump_registry(tx).await?;
    }
    Ok(gone > 0)
}

/// Enables a webhook that was disabled; one that works is left as it is. `None` where there is none.
///
/// # Errors
/// The database's.
pub async fn enable(
    tx: &WriteTx,
    project: ProjectId,
    public_id: &str,
) -> Result<Option<WebhookRow>, StoreError> {
    let Some(row) = get(tx.conn(), project, public_id, tx.now_ms()).await? else { return Ok(None) };
    if row.health.disabled.is_none() {
        return Ok(Some(row));
    }
    sql::execute(
        tx.conn(),
        "UPDATE webhooks SET enable_epoch = enable_epoch + 1, updated_at_ms = $3 WHERE id = $1 AND enable_epoch = $2",
        [Value::from(row.id), Value::from(row.enable_epoch), Value::from(tx.now_ms())],
    )
    .await?;
    bump_registry(tx).await?;
    get(tx.conn(), project, public_id, tx.now_ms()).await
}
