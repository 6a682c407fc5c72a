//! Finds what SQL says should be on its way and is not, and repairs it through the tracker.
//!
//! Every pass is idempotent, woken by a timer and by the broker's return, and reads only what is due. Several
//! replicas may run. Only the tracker changes jobs (P8): the passes send it commands; what they remove or recount they
//! do through the store's functions for exactly that.

mod context;
mod passes;
mod process;

use std::{future::Future, sync::Arc, time::Duration};

use ringback_bus::{Bus, BusError, DeliveryAnnouncer};
use ringback_service_runtime::{Check, Readiness, RingbackConfig, Shutdown, blobs::BlobStore};
use ringback_store::{Store, batches_fold::BatchEnv, observer::Observer, secrets::SecretKey};
use serde::Serialize;
use tokio::{
    sync::{Mutex, watch},
    task::JoinSet,
};

pub use context::PassError;
pub use passes::{
    artifacts::Report as ArtifactsReport, batches::Report as BatchesReport,
    counters::Report as CountersReport, deliveries::Report as DeliveriesReport, due::Report as DueReport,
    identity::Report as IdentityReport, orphans::Report as OrphansReport,
    retention::Report as RetentionReport, streams::Report as StreamsReport, workers::Report as WorkersReport,
};
pub use process::serve;

use context::Context;

/// What the services of a process share.
#[derive(Debug)]
pub struct Handles {
    /// The database.
    pub store: Store,
    /// The broker.
    pub bus: Bus,
    /// Large payloads: retention deletes them with their jobs.
    pub blobs: BlobStore,
    /// Makes the capability in links.
    pub secret_key: SecretKey,
    /// Base of the links that receivers get, without a trailing slash.
    pub public_url: String,
    /// Where the reconciler says whether it is ready.
    pub readiness: Readiness,
}

/// Why the reconciler ended.
#[derive(Debug, thiserror::Error)]
pub enum ReconcilerError {
    /// A pass panicked.
    #[error("a pass of the reconciler panicked: {0}")]
    Pass(String),
}

/// The reconciler. Each pass may also be run by hand, for tests and tools.
#[derive(Debug)]
pub struct App {
    context: Arc<Context>,
    streams: Mutex<passes::streams::Memory>,
    identity: Mutex<passes::identity::Memory>,
    check: Check,
}

impl App {
    /// Puts the reconciler together.
    #[must_use]
    pub fn build(config: &RingbackConfig, handles: Handles) -> Self {
        let Handles { store, bus, blobs, secret_key, public_url, readiness } = handles;
        let partitions = store.facts().partitions;
        let connectivity = bus.connectivity();
        let observer = Observer::new(Duration::from_millis(config.worker.lease_ms), move || {
            let now = *connectivity.borrow();
            now.connected_since.filter(|_| now.connected)
        });
        let kept =
            |e: &ringback_service_runtime::config::EndpointConfig| e.retention.resolve().delivery_attempts_ms;
        let default_ms =
            ringback_service_runtime::config::RetentionConfig::default().resolve().delivery_attempts_ms;
        let context = Context {
            announcer: DeliveryAnnouncer::new(bus.clone(), partitions),
            batches: BatchEnv { public_url, partitions, key: secret_key },
            config: config.reconciler.clone(),
            lease_ms: config.worker.lease_ms,
            // The log is not kept per endpoint: the longest wish counts.
            delivery_attempts_ms: config.endpoints.iter().map(kept).max().unwrap_or(default_ms),
            store,
            bus,
            blobs,
            observer,
        };
        Self {
            context: Arc::new(context),
            streams: Mutex::default(),
            identity: Mutex::default(),
            check: readiness.register("reconciler"),
        }
    }

    /// Runs the passes until the shutdown.
    ///
    /// # Errors
    /// When a pass panics; run it again.
    pub async fn run(self, shutdown: Shutdown) -> Result<(), ReconcilerError> {
        let this = Arc::new(self);
        let mut loops = JoinSet::new();
        let config = this.context.config.clone();
        let ms = Duration::from_millis;
        macro_rules! pass {
            ($name:ident, $every:expr, $on_reconnect:expr) => {{
                let this = Arc::clone(&this);
                let shutdown = shutdown.clone();
                loops.spawn(async move {
                    let app = Arc::clone(&this);
                    repeat(stringify!($name), $every, $on_reconnect, &this, shutdown, move || {
                        let app = Arc::clone(&app);
                        async move { app.$name().await }
                    })
                    .await;
                });
            }};
        }
        pass!(due, ms(config.due_interval_ms), true);
        pass!(streams, ms(config.stream_interval_ms), true);
        pass!(deliveries, ms(config.deliveries_interval_ms), true);
        pass!(batches, ms(config.batches_interval_ms), true);
        pass!(identity, ms(config.identity_interval_ms), false);
        pass!(retention, ms(config.retention_interval_ms), false);
        pass!(counters, ms(config.retention_interval_ms), false);
        pass!(orphans, ms(config.orphans_interval_ms), false);
        pass!(artifacts, ms(config.artifacts_interval_ms), false);
        pass!(workers, ms(config.retention_interval_ms), false);
        let watched = Arc::clone(&this);
        let watching = async {
            tokio::join!(watched.context.observer.watch(&watched.context.store), report(&watched));
        };
        let passes = async {
            while let Some(ended) = loops.join_next().await {
                ended.map_err(|join| ReconcilerError::Pass(join.to_string()))?;
            }
            Ok(())
        };
        tokio::select! {
            result = passes => result,
            () = watching => Ok(()),
        }
    }

    /// Live jobs whose time came.
    ///
    /// # Errors
    /// See [`PassError`].
    pub async fn due(&self) -> Result<DueReport, PassError> {
        passes::due::run(&self.context).await
    }

    /// The work queue against SQL.
    ///
    /// # Errors
    /// See [`PassError`].
    pub async fn streams(&self) -> Result<StreamsReport, PassError> {
        passes::streams::run(&self.context, &mut *self.streams.lock().await).await
    }

    /// Deliveries that nobody sends.
    ///
    /// # Errors
    /// See [`PassError`].
    pub async fn deliveries(&self) -> Result<DeliveriesReport, PassError> {
        passes::deliveries::run(&self.context).await
    }

    /// Batches that do not come to their end by themselves.
    ///
    /// # Errors
    /// See [`PassError`].
    pub async fn batches(&self) -> Result<BatchesReport, PassError> {
        passes::batches::run(&self.context).await
    }

    /// Artefacts whose time came.
    ///
    /// # Errors
    /// See [`PassError`].
    pub async fn artifacts(&self) -> Result<ArtifactsReport, PassError> {
        passes::artifacts::run(&self.context).await
    }

    /// The identity P5.
    ///
    /// # Errors
    /// See [`PassError`].
    pub async fn identity(&self) -> Result<IdentityReport, PassError> {
        passes::identity::run(&self.context, &mut *self.identity.lock().await).await
    }

    /// Retention.
    ///
    /// # Errors
    /// See [`PassError`].
    pub async fn retention(&self) -> Result<RetentionReport, PassError> {
        passes::retention::run(&self.context).await
    }

    /// Counters of former processes.
    ///
    /// # Errors
    /// See [`PassError`].
    pub async fn counters(&self) -> Result<CountersReport, PassError> {
        passes::counters::run(&self.context).await
    }

    /// Consumers and streams of nobody.
    ///
    /// # Errors
    /// See [`PassError`].
    pub async fn orphans(&self) -> Result<OrphansReport, PassError> {
        passes::orphans::run(&self.context).await
    }

    /// Rows of workers that are gone.
    ///
    /// # Errors
    /// See [`PassError`].
    pub async fn workers(&self) -> Result<WorkersReport, PassError> {
        passes::workers::run(&self.context).await
    }
}

/// How often and how long, at the start, a pass waits for a tracker that starts beside it.
const TRACKER_WAITS: u32 = 10;
const TRACKER_WAIT: Duration = Duration::from_secs(1);

/// Runs one pass again and again: every `every`, spread by up to a tenth so that replicas do not walk in step, and
/// when the broker comes back.
async fn repeat<R, F, Fut>(
    name: &'static str,
    every: Duration,
    on_reconnect: bool,
    app: &App,
    shutdown: Shutdown,
    run: F,
) where
    R: Serialize + Default + PartialEq,
    F: Fn() -> Fut,
    Fut: Future<Output = Result<R, PassError>>,
{
    let mut connectivity = app.context.bus.connectivity();
    let mut waits = 0;
    loop {
        let mut pause = every.mul_f64(rand::random_range(0.9..1.1));
        let began = std::time::Instant::now();
        let result = tokio::select! {
            result = run() => result,
            () = shutdown.triggered() => return,
        };
        metrics::histogram!("ringback_reconciler_pass_seconds", "pass" => name).record(began.elapsed());
        match result {
            Ok(report) => {
                waits = TRACKER_WAITS;
                tell(name, &report);
            }
            // Services start side by side.
            Err(PassError::Bus(error @ BusError::NoResponders { .. })) if waits < TRACKER_WAITS => {
                waits += 1;
                pause = pause.min(TRACKER_WAIT);
                tracing::debug!(pass = name, %error, "a pass waits for the tracker");
            }
            Err(error) => {
                metrics::counter!("ringback_reconciler_errors_total", "pass" => name).increment(1);
                tracing::warn!(pass = name, %error, "a pass ended early; the next one does the rest");
                if let PassError::Store(_) = error {
                    app.context.observer.cut_off("a pass failed");
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = reconnected(&mut connectivity), if on_reconnect => {}
            () = shutdown.triggered() => return,
        }
    }
}

/// Returns when the broker was away and is back.
async fn reconnected(connectivity: &mut watch::Receiver<ringback_bus::Connectivity>) {
    let epoch = connectivity.borrow_and_update().epoch;
    if connectivity.wait_for(|now| now.connected && now.epoch > epoch).await.is_err() {
        // The bus is gone for good; the timer goes on.
        std::future::pending::<()>().await;
    }
}

fn tell<R: Serialize + Default + PartialEq>(name: &'static str, report: &R) {
    let text = || serde_json::to_string(report).unwrap_or_default();
    if *report == R::default() {
        tracing::trace!(pass = name, report = %text(), "pass");
    } else {
        tracing::debug!(pass = name, report = %text(), "pass");
    }
}

/// Keeps the readiness check up to date.
async fn report(app: &App) {
    let mut every = tokio::time::interval(Duration::from_millis(500));
    loop {
        every.tick().await;
        if !app.context.bus.is_connected() {
            app.check.fail("not connected to NATS");
            continue;
        }
        match app.context.store.ping().await {
            Ok(()) => app.check.ok(),
            Err(_) => app.check.fail("the database does not answer"),
        }
    }
}
