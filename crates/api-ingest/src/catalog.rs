//! The endpoints of the configuration with their keys in SQL.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use ringback_bus::Subjects;
use ringback_domain::webhook::response::Profile;
use ringback_domain::{EndpointId, Name, ProjectId, event::EndpointKind, policy::Policy};
use ringback_service_runtime::{
    RingbackConfig,
    config::{ConfirmMode, EndpointConfig, ExecutorConfig, Retention, WebhookEvents, WebhookProfile},
};
use ringback_store::endpoints::EndpointRow;

use crate::error::ApiError;

/// An endpoint that takes jobs.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    pub(crate) id: EndpointId,
    pub(crate) project: ProjectId,
    pub(crate) name: String,
    pub(crate) alias: Option<String>,
    pub(crate) slots: u32,
    pub(crate) shard: u32,
    /// The plain `webhook` hears of every transition.
    pub(crate) all_events: bool,
    /// Rules of acknowledgement and retry of its jobs' webhooks, if they are its own.
    pub(crate) webhook_profile: Option<Profile>,
    pub(crate) kind: EndpointKind,
    pub(crate) policy: Policy,
    pub(crate) execution_timeout_ms: u64,
    pub(crate) ttl_ms: u64,
    pub(crate) retention: Retention,
    pub(crate) confirm: Confirms,
}

/// What an endpoint offers its jobs of the confirm handshake.
#[derive(Clone, Debug)]
pub(crate) enum Confirms {
    /// Nothing.
    No,
    /// Its handler does it.
    Handler,
    /// Ringback does it, for all jobs or for those that ask, and waits no longer than this.
    Platform { limit_ms: u64 },
}

impl Confirms {
    fn of(endpoint: &EndpointConfig) -> Self {
        let env = match &endpoint.executor {
            Some(ExecutorConfig::Process(process)) => &process.env,
            _ => &BTreeMap::new(),
        };
        match endpoint.confirm.mode {
            None => Self::No,
            Some(ConfirmMode::Handler) => Self::Handler,
            Some(ConfirmMode::Platform | ConfirmMode::OnRequest) => {
                Self::Platform { limit_ms: endpoint.confirm.wait_ms(env) }
            }
        }
    }
}

/// All endpoints. Fixed at start, as the configuration is.
#[derive(Debug, Default)]
pub(crate) struct Catalog {
    by_name: HashMap<ProjectId, HashMap<String, Arc<Endpoint>>>,
    names: HashMap<EndpointId, Arc<str>>,
    projects: HashMap<String, ProjectId>,
}

impl Catalog {
    /// Joins configuration and rows. A row that the configuration no longer names keeps its name for lists.
    pub(crate) fn new(config: &RingbackConfig, rows: &[EndpointRow], shards: u16) -> Self {
        let mut catalog = Self::default();
        for row in rows {
            catalog.names.insert(row.id, row.name.as_str().into());
            catalog.projects.insert(row.project_name.clone(), row.project);
            let configured =
                config.endpoints.iter().find(|e| e.name == row.name && e.project == row.project_name);
            let Some(e) = configured else { continue };
            let endpoint = Endpoint {
                id: row.id,
                project: row.project,
                name: row.name.clone(),
                alias: e.alias.clone(),
                slots: e.slots(),
                shard: Subjects::shard_of(row.id, u32::from(shards)),
                all_events: e.webhook_events == WebhookEvents::All,
                webhook_profile: e.webhook_profile.map(WebhookProfile::profile),
                kind: e.kind,
                policy: Policy { max_attempts: e.max_attempts, retry_errors: e.retry_errors },
                execution_timeout_ms: e.execution_timeout_ms,
                ttl_ms: e.ttl_ms,
                retention: e.retention.resolve(),
                confirm: Confirms::of(e),
            };
            catalog.by_name.entry(row.project).or_default().insert(row.name.clone(), Arc::new(endpoint));
        }
        catalog
    }

    /// An endpoint of a project by its name in a URL or body.
    pub(crate) fn find(&self, project: ProjectId, name: &str) -> Result<&Arc<Endpoint>, ApiError> {
        if let Some(found) = self.by_name.get(&project).and_then(|all| all.get(name)) {
            return Ok(found);
        }
        Err(match Name::parse(name) {
            Err(reason) => ApiError::not_found(format!("endpoint not found: an endpoint's name {reason}")),
            Ok(name) => ApiError::not_found(format!(
                "endpoint not found: this project has no endpoint `{name}`; endpoints come from the server's configuration"
            )),
        })
    }

    /// An endpoint of a project by its alias `owner/model`.
    pub(crate) fn find_model(&self, project: ProjectId, model: &str) -> Result<&Arc<Endpoint>, ApiError> {
        let mut all = self.by_name.get(&project).into_iter().flat_map(HashMap::values);
        all.find(|e| e.alias.as_deref() == Some(model)).ok_or_else(|| {
            ApiError::not_found(
                "model not found: no endpoint of this project has this alias; aliases come from the server's \
                 configuration (setting endpoints.alias)",
            )
        })
    }

    /// The endpoint with this key, if it still takes jobs.
    pub(crate) fn by_id(&self, project: ProjectId, id: EndpointId) -> Option<&Arc<Endpoint>> {
        self.by_name.get(&project)?.values().find(|e| e.id == id)
    }

    /// The endpoints of a project in the order of their names.
    pub(crate) fn of_project(&self, project: ProjectId) -> Vec<&Arc<Endpoint>> {
        let mut all: Vec<_> = self.by_name.get(&project).into_iter().flat_map(HashMap::values).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// The name of an endpoint, also of one that takes no more jobs.
    pub(crate) fn name_of(&self, id: EndpointId) -> Arc<str> {
        self.names.get(&id).cloned().unwrap_or_else(|| format!("endpoint-{id}").into())
    }

    /// A project by its name, if it has an endpoint.
    pub(crate) fn project(&self, name: &str) -> Option<ProjectId> {
        self.projects.get(name).copied()
    }
}
