//! Projects, keys, secrets and endpoints of the operator's configuration, brought into SQL at start.

use std::{collections::BTreeMap, sync::Arc};

use ringback_domain::{
    EndpointId, ProjectId,
    event::{EventType, event_key_of},
    usage::Quota,
    webhook::body::Body,
};
use ringback_service_runtime::{
    Redacted, RingbackConfig,
    config::{DEFAULT_PROJECT, Scope, SecretError},
};
use sea_orm::{ConnectionTrait, Value};
use serde_json::{Map, Value as Json};
use thiserror::Error;

use crate::{
    Store, StoreError, Urgency, WriteTx,
    auth::ScopeSet,
    events::{Audience, NewEvent, emit},
    secrets::{SecretKey, set_secrets},
    sql,
    usage::set_quota,
    webhooks::bump_registry,
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
    quota: Option<Quota>,
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
    let partitions = store.facts().partitions;
    // Two processes that insert the same row at once on PostgreSQL: the loser tries again and finds it.
    let mut tries = 0;
    loop {
        let (wanted, key) = (Arc::clone(&wanted), key.clone());
        let done = store
            .write(Urgency::Now, move |tx| {
                let (wanted, key) = (Arc::clone(&wanted), key.clone());
                Box::pin(async move { write(tx, partitions, &wanted, &key).await })
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
        let quota =
            project.quota.as_ref().map(|q| Quota { period: q.period, jobs: q.jobs, tokens: q.tokens });
        projects.push(WantedProject { name: name.to_owned(), quota, keys, secrets });
    }
    let endpoints =
        config.endpoints.iter().map(|e| (e.project.clone(), e.name.clone(), e.shared_json())).collect();
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

async fn write(tx: &WriteTx, partitions: u16, wanted: &Wanted, key: &SecretKey) -> Result<(), StoreError> {
    let mut ids = BTreeMap::new();
    let mut changed = false;
    for project in &wanted.projects {
        let id = project_id(tx, &project.name).await?;
        ids.insert(project.name.as_str(), id);
        changed |= set_quota(tx, id, project.quota.as_ref()).await?;
        write_keys(tx, id, &project.keys).await?;
        if set_secrets(tx, key, id, &project.secrets).await? {
            tracing::info!(project = project.name, "made a webhook secret");
        }
    }
    for (project, name, shown) in &wanted.endpoints {
        let project =
            ids.get(project.as_str()).ok_or(StoreError::corrupt("endpoint of an unknown project"))?;
        changed |= write_endpoint(tx, partitions, *project, name, shown).await?;
    }
    if changed {
        bump_registry(tx).await?;
    }
    Ok(())
}

/// Writes an endpoint and tells of a change of its model, once: the row is locked before it is compared. Answers
/// whether it changed.
async fn write_endpoint(
    tx: &WriteTx,
    partitions: u16,
    project: ProjectId,
    name: &str,
    shown: &str,
) -> Result<bool, StoreError> {
    let lock = if tx.is_postgres() { " FOR UPDATE" } else { "" };
    let known = sql::query_one(
        tx.conn(),
        &format!("SELECT id, config FROM endpoints WHERE project_id = $1 AND name = $2{lock}"),
        [Value::from(project.0), Value::from(name)],
    )
    .await?;
    let before = match &known {
        None => None,
        Some(row) => Some((EndpointId(row.try_get_by_index(0)?), row.try_get_by_index::<String>(1)?)),
    };
    if before.as_ref().is_some_and(|(_, config)| config == shown) {
        return Ok(false);
    }
    sql::execute(
        tx.conn(),
        "INSERT INTO endpoints (project_id, name, config, created_at_ms, updated_at_ms) VALUES ($1, $2, $3, $4, $4) \
         ON CONFLICT (project_id, name) DO UPDATE SET config = excluded.config, \
         updated_at_ms = excluded.updated_at_ms WHERE endpoints.config <> excluded.config",
        [Value::from(project.0), Value::from(name), Value::from(shown), Value::from(tx.now_ms())],
    )
    .await?;
    if let Some((id, config)) = before {
        let (old, new) = (read_config(&config), read_config(shown));
        for (event, data) in model_events(name, &old, &new) {
            let now_ms = u64::try_from(tx.now_ms()).unwrap_or(0);
            let event = NewEvent {
                id: event_key_of(now_ms, &format!("{event}:{id}:{shown}")),
                project,
                names: event.into(),
                subject: name,
                endpoint: Some(id),
                metadata: None,
                data: Body::of_json(data.to_string().into_bytes()),
                audience: Audience::Matching,
                traceparent: None,
            };
            // The dispatcher's sweep finds what is owed: there is no broker here.
            emit(tx, partitions, event).await?;
        }
    }
    Ok(true)
}

fn read_config(config: &str) -> Map<String, Json> {
    serde_json::from_str(config).unwrap_or_default()
}

/// Settings that say that a model goes, not what it is.
const FAREWELL: [&str; 2] = ["deprecated_at", "successor"];

/// What the change of an endpoint's configuration is told as. An absent setting is an unset one.
fn model_events(name: &str, old: &Map<String, Json>, new: &Map<String, Json>) -> Vec<(EventType, Json)> {
    let value = |config: &Map<String, Json>, key: &str| config.get(key).cloned().unwrap_or_default();
    let mut changed: Vec<&String> = new
        .keys()
        .chain(old.keys().filter(|key| !new.contains_key(*key)))
        .filter(|key| value(old, key) != value(new, key))
        .collect();
    changed.sort_unstable();
    let (farewell, others): (Vec<&String>, Vec<&String>) =
        changed.into_iter().partition(|key| FAREWELL.contains(&key.as_str()));
    let mut events = Vec::new();
    if !others.is_empty() {
        let data = serde_json::json!({
            "model": value(new, "model"),
            "endpoint": name,
            "previous_model": value(old, "model"),
            "changed": others,
        });
        events.push((EventType::ModelUpdated, data));
    }
    if farewell.iter().any(|key| !value(new, key).is_null()) {
        let data = serde_json::json!({
            "model": value(new, "model"),
            "endpoint": name,
            "deprecated_at": value(new, "deprecated_at"),
            "successor": value(new, "successor"),
        });
        events.push((EventType::ModelDeprecated, data));
    }
    events
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn told(old: Json, new: Json) -> Vec<(&'static str, Json)> {
        let object = |value: Json| value.as_object().cloned().unwrap_or_default();
        model_events("chat", &object(old), &object(new)).into_iter().map(|(e, d)| (e.name(), d)).collect()
    }

    #[test]
    fn a_change_of_the_model_and_its_farewell_are_two_facts() {
        // A release that knows more settings changes nothing.
        assert!(told(json!({"slots": 1}), json!({"slots": 1, "model": null, "successor": null})).is_empty());
        let updated = told(json!({"model": "a", "slots": 1}), json!({"model": "b", "slots": 2}));
        assert_eq!(
            updated,
            [(
                "model.updated",
                json!({"model": "b", "endpoint": "chat", "previous_model": "a", "changed": ["model", "slots"]})
            )]
        );
        let deprecated = told(json!({"model": "a"}), json!({"model": "a", "deprecated_at": "2026-12-31"}));
        assert_eq!(
            deprecated,
            [(
                "model.deprecated",
                json!({"model": "a", "endpoint": "chat", "deprecated_at": "2026-12-31", "successor": null})
            )]
        );
        assert!(told(json!({"deprecated_at": "2026-12-31"}), json!({})).is_empty(), "it stays after all");
        assert_eq!(told(json!({"model": "a"}), json!({"model": "b", "successor": "c"})).len(), 2);
    }
}
