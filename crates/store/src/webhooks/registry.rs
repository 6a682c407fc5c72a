//! Who hears of what: all registered webhooks, endpoints and quotas of an installation, kept in memory.
//!
//! A transaction that writes transitions asks [`WriteTx::registry`], which compares one number in SQL with the one
//! that the kept snapshot was read at. Whoever changes webhooks, their health or endpoints raises that number in the
//! same transaction ([`super::bump_registry`]), so a webhook that was made before a transition hears of it, whichever
//! process writes the transition.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError, RwLock},
};

use ringback_domain::{
    EndpointId, ProjectId,
    event::{Candidates, EndpointKind, EventType, Filter},
    target::{REGISTERED_TARGET_BASE, WebhookFormat},
    usage::{Period, Quota},
};
use sea_orm::{ConnectionTrait, QueryResult};
use serde::Deserialize;

use crate::{StoreError, WriteTx, sql};

/// A registered webhook that was not deleted.
#[derive(Clone, Debug, PartialEq)]
pub struct Webhook {
    /// Its key.
    pub id: u32,
    /// Its id in URLs, `wh_…`.
    pub public_id: String,
    /// Owner.
    pub project: ProjectId,
    /// Where it sends; `None` = its deliveries are only read from the feed.
    pub url: Option<String>,
    /// Which bodies.
    pub format: WebhookFormat,
    /// Which events; `None` where the stored filter cannot be read, which matches nothing.
    pub filter: Option<Filter>,
    /// Further headers, for [`super::secrets::open_headers`].
    pub headers_encrypted: Option<Vec<u8>>,
    /// Profile or own waits as JSON.
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
    /// Whether it is disabled in its present epoch: nothing is owed to it.
    pub disabled: bool,
    /// When it ends by itself.
    pub expires_at_ms: Option<i64>,
    /// Since when every try has failed.
    pub failing_since_ms: Option<i64>,
    /// The last try that was acknowledged.
    pub last_success_at_ms: Option<i64>,
}

impl Webhook {
    /// Its number in `deliveries.target`.
    #[must_use]
    pub const fn target(&self) -> u32 {
        REGISTERED_TARGET_BASE.saturating_add(self.id)
    }

    /// Whether its life is over.
    #[must_use]
    pub fn is_expired(&self, now_ms: i64) -> bool {
        self.expires_at_ms.is_some_and(|at| at <= now_ms)
    }

    /// Whether something that happens now is owed to it. A paused one is owed and waits.
    #[must_use]
    pub fn is_owed(&self, now_ms: i64) -> bool {
        !self.disabled && !self.is_expired(now_ms)
    }
}

/// What is known of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointInfo {
    /// Owner.
    pub project: ProjectId,
    /// Its name in URLs.
    pub name: String,
    /// `owner/model`, if it has one.
    pub alias: Option<String>,
    /// What its jobs are.
    pub kind: EndpointKind,
    /// The model that answers there.
    pub model: Option<String>,
}

/// What a fact is about, for filters.
#[derive(Clone, Copy, Debug)]
pub struct EventFacts<'a> {
    /// Its names, the more precise one first.
    pub names: Candidates,
    /// What Runflow calls the end of a batch, which its filters go by.
    pub runflow: Option<&'static str>,
    /// The endpoint that it belongs to.
    pub endpoint: Option<EndpointId>,
    /// Metadata of the job or batch, an object.
    pub metadata: Option<&'a serde_json::Value>,
    /// The database's clock.
    pub now_ms: i64,
}

/// A snapshot of all webhooks and endpoints.
#[derive(Debug, Default)]
pub struct Registry {
    revision: i64,
    webhooks: BTreeMap<u32, Arc<Webhook>>,
    by_project: HashMap<ProjectId, Vec<Arc<Webhook>>>,
    endpoints: HashMap<EndpointId, EndpointInfo>,
    quotas: HashMap<ProjectId, Quota>,
    hears_progress: bool,
}

impl Registry {
    /// Number that rises with every change.
    #[must_use]
    pub const fn revision(&self) -> i64 {
        self.revision
    }

    /// A webhook by its key, also one that is disabled or expired; `None` where it was deleted.
    #[must_use]
    pub fn webhook(&self, id: u32) -> Option<&Arc<Webhook>> {
        self.webhooks.get(&id)
    }

    /// The webhook that a target number means; `None` for a job's own target and for a deleted webhook.
    #[must_use]
    pub fn target(&self, target: u32) -> Option<&Arc<Webhook>> {
        self.webhook(ringback_domain::target::registered_webhook(target)?)
    }

    /// All webhooks that were not deleted, by key.
    pub fn webhooks(&self) -> impl Iterator<Item = &Arc<Webhook>> {
        self.webhooks.values()
    }

    /// Whether anything of a project may be owed to a registered webhook.
    #[must_use]
    pub fn listens(&self, project: ProjectId) -> bool {
        self.by_project.contains_key(&project)
    }

    /// Whether any webhook of the installation may hear of progress or streamed text.
    #[must_use]
    pub const fn hears_progress(&self) -> bool {
        self.hears_progress
    }

    /// Whether a filter of the project asks for metadata.
    #[must_use]
    pub fn needs_metadata(&self, project: ProjectId) -> bool {
        self.of(project).any(|w| w.filter.as_ref().is_some_and(|f| !f.metadata().is_empty()))
    }

    /// An endpoint by its key.
    #[must_use]
    pub fn endpoint(&self, id: EndpointId) -> Option<&EndpointInfo> {
        self.endpoints.get(&id)
    }

    /// How much a project may use; `None` = as much as it likes.
    #[must_use]
    pub fn quota(&self, project: ProjectId) -> Option<&Quota> {
        self.quotas.get(&project)
    }

    /// The webhooks of a project that are not deleted, by key.
    pub fn of(&self, project: ProjectId) -> impl Iterator<Item = &Arc<Webhook>> {
        self.by_project.get(&project).into_iter().flatten()
    }

    /// Who is owed a fact, under which number and name, by key. Each webhook at most once.
    pub fn matching<'a>(
        &'a self,
        project: ProjectId,
        facts: EventFacts<'a>,
    ) -> impl Iterator<Item = (u32, &'a Arc<Webhook>, EventType)> {
        self.of(project).filter_map(move |w| {
            if !w.is_owed(facts.now_ms) {
                return None;
            }
            let filter = w.filter.as_ref()?;
            let name = match facts.runflow {
                Some(told) if w.format == WebhookFormat::Runflow => filter.choose_runflow(facts.names, told),
                _ => filter.choose(facts.names),
            };
            let name = name.filter(|name| can_say(w.format, *name))?;
            let wanted = self.wants_endpoint(filter, facts.endpoint) && filter.wants_metadata(facts.metadata);
            wanted.then(|| (w.target(), w, name))
        })
    }

    fn wants_endpoint(&self, filter: &Filter, endpoint: Option<EndpointId>) -> bool {
        if filter.endpoints().is_empty() {
            return true;
        }
        match endpoint.and_then(|id| self.endpoint(id)) {
            Some(info) => match &info.alias {
                Some(alias) => filter.wants_endpoint(&[&info.name, alias]),
                None => filter.wants_endpoint(&[&info.name]),
            },
            None => false,
        }
    }
}

/// Whether the bodies of a format can tell of an event: RunPod's tell of jobs, Runflow's of the ends of runs and
/// batches.
#[must_use]
pub const fn can_say(format: WebhookFormat, event: EventType) -> bool {
    use EventType as E;
    let end_of_job = matches!(
        event,
        E::JobCompleted
            | E::JobFailed
            | E::JobCancelled
            | E::JobTimedOut
            | E::CompletionFinished
            | E::CompletionFailed
    );
    match format {
        WebhookFormat::Standard => true,
        WebhookFormat::Runflow => {
            end_of_job || matches!(event, E::BatchCompleted | E::BatchFailed | E::BatchCancelled)
        }
        WebhookFormat::Runpod => {
            end_of_job || matches!(event, E::JobQueued | E::JobStarted | E::JobRetried | E::CompletionStarted)
        }
    }
}

/// The snapshot that a process keeps. Only what was committed gets in.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cache(Arc<RwLock<Option<Arc<Registry>>>>);

impl Cache {
    fn at(&self, revision: i64) -> Option<Arc<Registry>> {
        let kept = self.0.read().unwrap_or_else(PoisonError::into_inner);
        kept.as_ref().filter(|r| r.revision == revision).cloned()
    }

    fn keep(&self, registry: &Arc<Registry>) {
        let mut kept = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if kept.as_ref().is_none_or(|k| k.revision < registry.revision) {
            *kept = Some(Arc::clone(registry));
        }
    }

    /// The newest snapshot as `conn` sees it. `committed` = `conn` sees nothing that may still be rolled back.
    pub(crate) async fn read<C: ConnectionTrait>(
        &self,
        conn: &C,
        committed: bool,
    ) -> Result<Arc<Registry>, StoreError> {
        let revision = revision(conn).await?;
        if committed && let Some(kept) = self.at(revision) {
            return Ok(kept);
        }
        // What is read after its number may be newer than it, never older.
        let registry = Arc::new(load(conn, revision).await?);
        if committed {
            self.keep(&registry);
        }
        Ok(registry)
    }
}

async fn revision<C: ConnectionTrait>(conn: &C) -> Result<i64, StoreError> {
    let row = sql::query_one(conn, "SELECT value FROM meta WHERE key = 'registry_revision'", []).await?;
    match row {
        None => Ok(0),
        Some(row) => row
            .try_get_by_index::<String>(0)?
            .parse()
            .map_err(|_| StoreError::corrupt("meta.registry_revision")),
    }
}

/// Says that what is known of webhooks or endpoints has changed.
///
/// # Errors
/// The database's.
pub async fn bump_registry(tx: &WriteTx) -> Result<(), StoreError> {
    tx.forget_registry();
    sql::execute(
        tx.conn(),
        "INSERT INTO meta (key, value) VALUES ('registry_revision', '1') \
         ON CONFLICT (key) DO UPDATE SET value = CAST(CAST(meta.value AS BIGINT) + 1 AS TEXT)",
        [],
    )
    .await
    .map(drop)
}

async fn load<C: ConnectionTrait>(conn: &C, revision: i64) -> Result<Registry, StoreError> {
    let mut registry = Registry { revision, ..Registry::default() };
    let rows = sql::query(
        conn,
        "SELECT w.id, w.public_id, w.project_id, w.url, w.format, w.filter, w.headers_encrypted, w.retry, \
         w.rate_per_second, w.deadline_ms, w.strict_order, w.paused, w.enable_epoch, w.expires_at_ms, \
         h.disabled_epoch, h.failing_since_ms, h.last_success_at_ms \
         FROM webhooks w LEFT JOIN webhook_health h ON h.webhook_id = w.id \
         WHERE w.deleted_at_ms IS NULL ORDER BY w.id",
        [],
    )
    .await?;
    for row in &rows {
        let webhook = Arc::new(read_webhook(row)?);
        let throttled = EventType::ALL.iter().filter(|e| e.is_throttled() && can_say(webhook.format, **e));
        registry.hears_progress |= webhook
            .filter
            .as_ref()
            .is_some_and(|f| throttled.clone().any(|e| f.choose((*e).into()).is_some()));
        registry.by_project.entry(webhook.project).or_default().push(Arc::clone(&webhook));
        registry.webhooks.insert(webhook.id, webhook);
    }
    for row in &sql::query(conn, "SELECT id, project_id, name, config FROM endpoints", []).await? {
        let config: Config = serde_json::from_str(&row.try_get_by_index::<String>(3)?).unwrap_or_default();
        let info = EndpointInfo {
            project: ProjectId(row.try_get_by_index(1)?),
            name: row.try_get_by_index(2)?,
            alias: config.alias,
            kind: config.kind.as_deref().and_then(EndpointKind::parse).unwrap_or_default(),
            model: config.model,
        };
        registry.endpoints.insert(EndpointId(row.try_get_by_index(0)?), info);
    }
    for row in &sql::query(conn, "SELECT project_id, period, jobs, tokens FROM project_quotas", []).await? {
        let limit = |index| -> Result<Option<u64>, StoreError> {
            let n: Option<i64> = row.try_get_by_index(index)?;
            n.map(|n| u64::try_from(n).map_err(|_| StoreError::corrupt("project_quotas"))).transpose()
        };
        let quota = Quota {
            period: Period::parse(&row.try_get_by_index::<String>(1)?)
                .ok_or(StoreError::corrupt("project_quotas.period"))?,
            jobs: limit(2)?,
            tokens: limit(3)?,
        };
        registry.quotas.insert(ProjectId(row.try_get_by_index(0)?), quota);
    }
    Ok(registry)
}

/// What of `endpoints.config` matters here.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    alias: Option<String>,
    kind: Option<String>,
    model: Option<String>,
}

fn read_webhook(row: &QueryResult) -> Result<Webhook, StoreError> {
    let public_id: String = row.try_get_by_index(1)?;
    let filter = Filter::parse(&row.try_get_by_index::<String>(5)?);
    if let Err(error) = &filter {
        // One row that a later release wrote must not stop every transition.
        tracing::error!(webhook = public_id, %error, "the filter of a webhook cannot be read: it hears of nothing");
    }
    let enable_epoch: i64 = row.try_get_by_index(12)?;
    Ok(Webhook {
        id: sql::get_u32(row, 0, "webhooks.id")?,
        public_id,
        project: ProjectId(row.try_get_by_index(2)?),
        url: row.try_get_by_index(3)?,
        format: WebhookFormat::from_code(row.try_get_by_index(4)?)
            .ok_or(StoreError::corrupt("webhooks.format"))?,
        filter: filter.ok(),
        headers_encrypted: row.try_get_by_index(6)?,
        retry: row.try_get_by_index(7)?,
        rate_per_second: row
            .try_get_by_index::<Option<i64>>(8)?
            .map(|n| u32::try_from(n).map_err(|_| StoreError::corrupt("webhooks.rate_per_second")))
            .transpose()?,
        deadline_ms: row
            .try_get_by_index::<Option<i64>>(9)?
            .map(|n| u64::try_from(n).map_err(|_| StoreError::corrupt("webhooks.deadline_ms")))
            .transpose()?,
        strict_order: row.try_get_by_index::<i64>(10)? != 0,
        paused: row.try_get_by_index::<i64>(11)? != 0,
        enable_epoch,
        disabled: row.try_get_by_index::<Option<i64>>(14)? == Some(enable_epoch),
        expires_at_ms: row.try_get_by_index(13)?,
        failing_since_ms: row.try_get_by_index(15)?,
        last_success_at_ms: row.try_get_by_index(16)?,
    })
}

/// A job's or batch's metadata as filters read them. A member that no filter could name, such as a number out of
/// range, is left out and spoils no other.
#[must_use]
pub fn parse_metadata(json: Option<&[u8]>) -> Option<serde_json::Value> {
    let members: HashMap<String, &serde_json::value::RawValue> = serde_json::from_slice(json?).ok()?;
    let read =
        members.into_iter().filter_map(|(key, raw)| Some((key, serde_json::from_str(raw.get()).ok()?)));
    Some(serde_json::Value::Object(read.collect()))
}

/// SQLite's next place in the feed: its transactions follow each other.
pub(crate) async fn next_position<C: ConnectionTrait>(conn: &C) -> Result<i64, StoreError> {
    let row = sql::query_one(
        conn,
        "INSERT INTO meta (key, value) VALUES ('feed_position', '1') \
         ON CONFLICT (key) DO UPDATE SET value = CAST(CAST(meta.value AS INTEGER) + 1 AS TEXT) RETURNING value",
        [],
    )
    .await?;
    row.ok_or(StoreError::corrupt("meta.feed_position"))?
        .try_get_by_index::<String>(0)?
        .parse()
        .map_err(|_| StoreError::corrupt("meta.feed_position"))
}

/// The first place of the feed that may still change: everything before it is committed and visible.
///
/// # Errors
/// The database's.
pub async fn feed_horizon<C: ConnectionTrait>(conn: &C) -> Result<i64, StoreError> {
    if conn.get_database_backend() == sea_orm::DatabaseBackend::Sqlite {
        return Ok(i64::MAX);
    }
    let row =
        sql::query_one(conn, "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint", []).await?;
    Ok(row.ok_or(StoreError::corrupt("pg_current_snapshot"))?.try_get_by_index(0)?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn metadata_that_cannot_be_compared_spoil_no_others() {
        assert_eq!(parse_metadata(Some(b"{\"a\":1,\"b\":1e400}")), Some(json!({"a": 1})));
        assert_eq!(parse_metadata(Some(b"[1]")), None);
        assert_eq!(parse_metadata(None), None);
    }

    #[test]
    fn formats_hear_of_what_their_bodies_can_say() {
        for event in EventType::ALL {
            assert!(can_say(WebhookFormat::Standard, *event));
            let job = matches!(event.family(), "job" | "completion") && !event.is_throttled();
            assert_eq!(can_say(WebhookFormat::Runpod, *event), job, "{event}");
            let end = event.is_terminal() && matches!(event.family(), "job" | "completion" | "batch");
            assert_eq!(can_say(WebhookFormat::Runflow, *event), end, "{event}");
        }
    }
}
