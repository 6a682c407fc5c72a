//! The service: built from a configuration and the shared handles, run until the shutdown.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use ringback_bus::Bus;
use ringback_service_runtime::{Check, Readiness, RingbackConfig, Shutdown, blobs::BlobStore, listener};
use ringback_store::{
    Store, StoreError,
    endpoints::{self, SyncError},
    project_secrets::projects,
    secrets::SecretKey,
};
use thiserror::Error;
use tokio::net::TcpListener;

use crate::{
    auth::Auth,
    batches::Templates,
    catalog::Catalog,
    disk::DiskFloor,
    routes,
    state::Api,
    submit::{outbound::Outbound, parse::Rules, pipeline::Submits},
    waiters::Waiters,
};

/// Handles that a process shares between its services.
#[derive(Debug, Clone)]
pub struct Deps {
    /// SQL.
    pub store: Store,
    /// NATS.
    pub bus: Bus,
    /// Large payloads.
    pub blobs: BlobStore,
    /// The key of secrets at rest.
    pub key: SecretKey,
    /// Where the service says whether it works.
    pub readiness: Readiness,
    /// When the process wants to end.
    pub shutdown: Shutdown,
}

/// Why the service cannot start.
#[derive(Debug, Error)]
pub enum AppError {
    /// The address cannot be bound.
    #[error("cannot listen on {address} (setting server.listen): {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The configuration cannot be brought into SQL.
    #[error(transparent)]
    Sync(#[from] SyncError),
    /// SQL.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The rules for webhooks contradict each other.
    #[error("{0}")]
    Webhooks(String),
}

/// The API service.
pub struct App {
    api: Arc<Api>,
    listener: TcpListener,
    local_addr: SocketAddr,
    readiness: Readiness,
    check: Check,
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("local_addr", &self.local_addr).finish_non_exhaustive()
    }
}

/// How long open requests may take to end after the drain began.
const DRAIN_WITHIN: Duration = Duration::from_secs(10);

impl App {
    /// Brings the configuration into SQL and binds the listener. Serves nothing yet.
    ///
    /// # Errors
    /// See [`AppError`].
    pub async fn build(config: &RingbackConfig, deps: Deps) -> Result<Self, AppError> {
        let Deps { store, bus, blobs, key, readiness, shutdown } = deps;
        let check = readiness.register("api");
        let urls = ringback_egress::webhook_policy(&config.webhooks)
            .map_err(|e| AppError::Webhooks(e.to_string()))?;
        let rows = endpoints::sync(&store, config, &key).await?;
        let projects = projects(store.read()).await?;
        let named = config.projects.iter().filter(|(_, p)| !p.webhook_secrets.is_empty());
        let configured_secrets = named.filter_map(|(name, _)| projects.get(name).copied()).collect();
        let catalog = Catalog::new(config, &rows, store.facts().shards);
        let address = config.server.listen;
        let listen = |source| AppError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let local_addr = listener.local_addr().map_err(listen)?;
        let outbound = Outbound::new(bus.clone(), store.facts().clone());
        let timeout = Duration::from_millis(config.server.submit_timeout_ms);
        let api = Arc::new(Api {
            submits: Submits::new(store.clone(), Arc::clone(&outbound), timeout),
            outbound,
            stream_turns: Default::default(),
            waiters: Waiters::new(
                bus.clone(),
                config.server.max_waiters,
                config.server.max_waiters_per_project,
            ),
            disk: Arc::new(DiskFloor::new(config.data.dir.clone(), config.server.disk_floor_bytes)),
            templates: Templates::new(config, &catalog),
            auth: Auth::new(store.clone(), config),
            rules: Rules::new(&config.server, urls),
            limits: config.server.clone(),
            base_url: config.server.base_url(local_addr),
            worker_silence_ms: config.worker.lease_ms.max(2 * config.worker.heartbeat_ms),
            configured_secrets,
            webhook_profile: config.webhooks.profile.profile(),
            catalog,
            store,
            bus,
            blobs,
            key,
            shutdown,
        });
        Ok(Self { api, listener, local_addr, readiness, check })
    }

    /// The address bound.
    #[must_use]
    pub const fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves until the shutdown given to [`App::build`] is triggered and open requests have ended.
    pub async fn run(self) {
        let Self { api, listener, local_addr: _, readiness, check } = self;
        let shutdown = api.shutdown.clone();
        let background = tokio::spawn(background(Arc::clone(&api), check));
        let router = routes::router(Arc::clone(&api), readiness);
        let serve = listener::serve(listener, router, api.limits.listener_limits(), shutdown.triggered());
        let served = shutdown.drain(serve, DRAIN_WITHIN).await;
        shutdown.trigger();
        let _ = background.await;
        drain_outbound(&api).await;
        if let Err(late) = served {
            tracing::warn!(%late, "open requests are broken off");
        }
    }
}

/// What was committed is published before the process ends, where NATS is there; else the reconciler does it.
async fn drain_outbound(api: &Api) {
    let wait = async {
        while api.outbound.backlog() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(3), wait).await;
    let _ = api.bus.flush().await;
}

async fn background(api: Arc<Api>, check: Check) {
    let shutdown = api.shutdown.clone();
    tokio::join!(
        Arc::clone(&api.waiters).listen(shutdown.clone()),
        api.disk.watch(shutdown.clone()),
        watch_sql(&api, &check, &shutdown),
        make_streams(&api, &shutdown),
    );
}

/// Ready while SQL answers. NATS may be away: submits are accepted all the same, their rows are the outbox.
async fn watch_sql(api: &Api, check: &Check, shutdown: &Shutdown) {
    let mut failures = 0;
    loop {
        let pause = match api.store.ping().await {
            Ok(()) => {
                failures = 0;
                check.ok();
                Duration::from_secs(2)
            }
            Err(error) => {
                failures += 1;
                // One slow answer is not an outage.
                if failures >= 2 {
                    check.fail(format!("SQL: {error}"));
                }
                Duration::from_millis(500)
            }
        };
        metrics::gauge!("ringback_api_waiters").set(api.waiters.count() as f64);
        metrics::gauge!("ringback_api_publish_backlog").set(api.outbound.backlog() as f64);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.triggered() => return,
        }
    }
}

/// The streams of the work queue exist before the first job where NATS is there at start.
async fn make_streams(api: &Api, shutdown: &Shutdown) {
    let facts = api.store.facts();
    loop {
        match api.bus.ensure_streams(u32::from(facts.shards), &facts.db_epoch).await {
            Ok(_) => return,
            Err(error) => tracing::debug!(%error, "the work queue's streams cannot be made now"),
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
            () = shutdown.triggered() => return,
        }
    }
}
