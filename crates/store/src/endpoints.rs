//! Projects, keys, secrets and endpoints of the operator's configuration, brought into SQL at start.

use std::{collections::BTreeMap, sync::Arc};

use ringback_domain::{EndpointId, ProjectId};
use ringback_service_runtime::{
    Redacted, RingbackConfig,
    config::{DEFAULT_PROJECT, Scope, SecretError},
};
use sea_orm::{ConnectionTrait, Value};
use thiserror::Error;

use crate::{
    Store, StoreError, Urgency, WriteTx,
    auth::ScopeSet,
    secrets::{SecretKey, set_secrets},
    sql,
};

/// An endpoint as SQL knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointRow {
    /// Its key; the token in subjects.
    pub id: EndpointId,
    /// Owner.
    pub project: ProjectId,
    /// The owner's name.
    pub project_name: String,
    /// Its name in URLs.
    pub name: String,
    /// The configuration last seen, as JSON, for people. Commands' environments are left out.
    pub config: String,
}

/// The configuration cannot be brought into SQL.
#[derive(Debug, Error)]
pub enum SyncError {
    /// A key or secret that the configuration refers to cannot be read.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// SQL.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What the configuration says, resolved.
#[derive(Debug)]
struct Wanted {
    projects: Vec<WantedProject>,
    endpoints: Vec<(String, String, String)>,
}

#[derive(Debug)]
struct WantedProject {
    name: String,
    keys: Vec<(String, [u8; 32], ScopeSet)>,
    secrets: Vec<Redacted<String>>,
}

/// Brings projects, keys, secrets and endpoints into SQL. Keys of a project that the configuration no longer names
/// are disabled; endpoints stay, because jobs refer to them. Safe to repeat and to run in several processes at once.
///
/// # Errors
/// See [`SyncError`].
pub async fn sync(
    store: &Store,
    config: &RingbackConfig,
    key: &SecretKey,
) -> Result<Vec<EndpointRow>, SyncError> {
    let wanted = Arc::new(resolve(config)?);
    let key = key.clone();
    // Two processes that insert the same row at once on PostgreSQL: the loser tries again and finds it.
    let mut tries = 0;
    loop {
        let (wanted, key) = (Arc::clone(&wanted), key.clone());
        let done = store
            .write(Urgency::Now, move |tx| {
                let (wanted, key) = (Arc::clone(&wanted), key.clone());
                Box::pin(async move { write(tx, &wanted, &key).await })
            })
            .await;
        tries += 1;
        match done {
            Ok(()) => break,
            Err(e) if tries < 5 && (e.is_transient() || matches!(e, StoreError::Duplicate { .. })) => {
                tokio::time::sleep(std::time::Duration::from_millis(50 * tries)).await;
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(list(store.read()).await?)
}

/// All endpoints of all projects, also those that the configuration no longer names.
pub async fn list<C: ConnectionTrait>(conn: &C) -> Result<Vec<EndpointRow>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT e.id, e.project_id, p.name, e.name, e.config FROM endpoints e JOIN projects p ON p.id = e.project_id \
         ORDER BY e.id",
        [],
    )
    .await?;
    rows.iter()
        .map(|row| {
            Ok(EndpointRow {
                id: EndpointId(row.try_get_by_index(0)?),
                project: ProjectId(row.try_get_by_index(1)?),
                project_name: row.try_get_by_index(2)?,
                name: row.try_get_by_index(3)?,
                config: row.try_get_by_index(4)?,
            })
        })
        .collect()
}

fn resolve(config: &RingbackConfig) -> Result<Wanted, SecretError> {
    let mut projects = Vec::new();
    let empty = ringback_service_runtime::config::ProjectConfig::default();
    let mut all: BTreeMap<&str, _> = config.projects.iter().map(|(name, p)| (name.as_str(), p)).collect();
    all.entry(DEFAULT_PROJECT).or_insert(&empty);
    for (name, project) in all {
        let mut keys = Vec::new();
        for (n, key) in project.api_keys.iter().enumerate() {
            let hash = key.resolve_sha256(&format!("projects.{name}.api_keys[{n}]"))?;
            let scopes = key.scopes.iter().fold(ScopeSet(0), |set, scope| set.with(scope_of(*scope)));
            keys.push((key.name.clone(), hash, scopes));
        }
        let mut secrets = Vec::new();
        for (n, secret) in project.webhook_secrets.iter().enumerate() {
            secrets.push(secret.resolve(&format!("projects.{name}.webhook_secrets[{n}]"))?);
        }
        projects.push(WantedProject { name: name.to_owned(), keys, secrets });
    }
    let endpoints = config
        .endpoints
        .iter()
        .map(|e| {
            let shown = serde_json::json!({
                "alias": e.alias,
                "slots": e.slots,
                "execution_timeout_ms": e.execution_timeout_ms,
                "ttl_ms": e.ttl_ms,
                "max_attempts": e.max_attempts,
                "retry_errors": e.retry_errors,
                "webhook_events": e.webhook_events,
                "retention": e.retention.resolve(),
            });
            (e.project.clone(), e.name.clone(), shown.to_string())
        })
        .collect();
    Ok(Wanted { projects, endpoints })
}

const fn scope_of(scope: Scope) -> ScopeSet {
    match scope {
        Scope::Submit => ScopeSet::SUBMIT,
        Scope::Read => ScopeSet::READ,
        Scope::Admin => ScopeSet::ADMIN,
        Scope::Worker => ScopeSet::WORKER,
        Scope::Metrics => ScopeSet::METRICS,
    }
}

async fn write(tx: &WriteTx, wanted: &Wanted, key: &SecretKey) -> Result<(), StoreError> {
    let mut ids = BTreeMap::new();
    for project in &wanted.projects {
        let id = project_id(tx, &project.name).await?;
        ids.insert(project.name.as_str(), id);
        write_keys(tx, id, &project.keys).await?;
        if set_secrets(tx, key, id, &project.secrets).await? {
            tracing::info!(project = project.name, "made a webhook secret");
        }
    }
    for (project, name, shown) in &wanted.endpoints {
        let project =
            ids.get(project.as_str()).ok_or(StoreError::corrupt("endpoint of an unknown project"))?;
        sql::execute(
            tx.conn(),
            "INSERT INTO endpoints (project_id, name, config, created_at_ms, updated_at_ms) VALUES ($1, $2, $3, $4, $4) \
             ON CONFLICT (project_id, name) DO UPDATE SET config = excluded.config, \
             updated_at_ms = excluded.updated_at_ms WHERE endpoints.config <> excluded.config",
            [
                Value::from(project.0),
                Value::from(name.as_str()),
                Value::from(shown.as_str()),
                Value::from(tx.now_ms()),
            ],
        )
        .await?;
    }
    Ok(())
}

async fn project_id(tx: &WriteTx, name: &str) -> Result<ProjectId, StoreError> {
    sql::execute(
        tx.conn(),
        "INSERT INTO projects (name, created_at_ms) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING",
        [Value::from(name), Value::from(tx.now_ms())],
    )
    .await?;
    let row =
        sql::query_one(tx.conn(), "SELECT id FROM projects WHERE name = $1", [Value::from(name)]).await?;
    Ok(ProjectId(row.ok_or(StoreError::corrupt("projects"))?.try_get_by_index(0)?))
}

async fn write_keys(
    tx: &WriteTx,
    project: ProjectId,
    keys: &[(String, [u8; 32], ScopeSet)],
) -> Result<(), StoreError> {
    let rows = sql::query(
        tx.conn(),
        "SELECT id, key_hash FROM api_keys WHERE project_id = $1 AND disabled_at_ms IS NULL",
        [Value::from(project.0)],
    )
    .await?;
    for row in &rows {
        let hash: Vec<u8> = row.try_get_by_index(1)?;
        if keys.iter().all(|(_, wanted, _)| wanted.as_slice() != hash) {
            sql::execute(
                tx.conn(),
                "UPDATE api_keys SET disabled_at_ms = $1 WHERE id = $2",
                [Value::from(tx.now_ms()), Value::from(row.try_get_by_index::<i64>(0)?)],
            )
            .await?;
        }
    }
    for (name, hash, scopes) in keys {
        sql::execute(
            tx.conn(),
            "INSERT INTO api_keys (project_id, name, key_hash, scopes, created_at_ms) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (key_hash) DO UPDATE SET project_id = excluded.project_id, name = excluded.name, \
             scopes = excluded.scopes, disabled_at_ms = NULL",
            [
                Value::from(project.0),
                Value::from(name.as_str()),
                Value::from(hash.to_vec()),
                Value::from(scopes.0),
                Value::from(tx.now_ms()),
            ],
        )
        .await?;
    }
    Ok(())
}
