//! The only writer of job state: folds events through the domain, commits, announces.
//!
//! Every request is answered after its commit and may be repeated. While SQL or broker are away, senders wait; what
//! was committed and not announced is found by sweeps. Any number of replicas may run: rows are locked in sorted
//! order and written under their revision.

mod after;
mod artifacts;
mod batcher;
mod commands;
mod convert;
mod fold;
mod process;
mod serve;
mod unit;

use std::{sync::Arc, time::Duration};

use ringback_bus::{Bus, BusError, Verb};
use ringback_domain::BatchId;
use ringback_service_runtime::{Check, Readiness, RingbackConfig, Shutdown};
use ringback_store::{
    Store, batches_fold::BatchEnv, observer::Observer, progress::waiting, sea_orm::DatabaseBackend,
    secrets::SecretKey,
};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::task::TaskTracker;

use crate::{
    after::Announcer,
    artifacts::Artifacts,
    batcher::{Batcher, Parts},
    commands::Commands,
    fold::Env,
    serve::Server,
};

pub use process::serve;

/// What a worker gets beyond an execution limit before the tracker ends the job itself.
pub const EXECUTION_GRACE_MS: u64 = 15_000;
/// Transactions at once on PostgreSQL.
const PARALLEL_POSTGRES: usize = 4;
/// How long a drain waits for requests in hand.
const DRAIN: Duration = Duration::from_secs(5);
/// Jobs of a batch cancelled per transaction.
const CANCEL_CHUNK: u32 = 500;
/// Jobs of which something waits to be told, looked at in one go.
const WAITING_MAX: u32 = 500;

/// What the services of a process share.
#[derive(Debug)]
pub struct Handles {
    /// The database.
    pub store: Store,
    /// The broker.
    pub bus: Bus,
    /// The key of secrets at rest: messages carry the secret members of a job.
    pub secret_key: SecretKey,
    /// Base of the links that receivers get (`result_url`), without a trailing slash.
    pub public_url: String,
    /// Where the tracker says whether it is ready.
    pub readiness: Readiness,
}

/// Why the tracker ended.
#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    /// Its subscriptions cannot be made.
    #[error("the tracker cannot serve: {0}")]
    Bus(#[from] BusError),
    /// A part of it panicked.
    #[error("a part of the tracker ended: {0}")]
    Part(String),
}

/// The state-tracker.
pub struct App {
    store: Store,
    observer: Observer,
    announcer: Arc<Announcer>,
    cancel_rest: mpsc::UnboundedReceiver<BatchId>,
    commands: Commands,
    server: Arc<Server>,
    bus: Bus,
    check: Check,
    tasks: TaskTracker,
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("state_tracker::App").finish_non_exhaustive()
    }
}

impl App {
    /// Puts the tracker together. Must be called inside a tokio runtime: its batcher starts at once.
    #[must_use]
    pub fn build(config: &RingbackConfig, handles: Handles) -> Self {
        let Handles { store, bus, secret_key, public_url, readiness } = handles;
        let lease_ms = config.worker.lease_ms;
        let facts = store.facts().clone();
        let env = Arc::new(Env {
            lease_ms,
            grace_ms: EXECUTION_GRACE_MS,
            counter_row: store.counter_row(),
            shards: u32::from(facts.shards),
            batch: BatchEnv {
                public_url: public_url.clone(),
                partitions: facts.partitions,
                key: secret_key.clone(),
            },
        });
        let connectivity = bus.connectivity();
        let observer = Observer::new(Duration::from_millis(lease_ms), move || {
            let now = *connectivity.borrow();
            now.connected_since.filter(|_| now.connected)
        });
        let tasks = TaskTracker::new();
        let (announcer, cancel_rest) =
            Announcer::new(bus.clone(), store.clone(), secret_key.clone(), tasks.clone());
        let announcer = Arc::new(announcer);
        let postgres = store.read().get_database_backend() == DatabaseBackend::Postgres;
        let parts = Parts {
            store: store.clone(),
            env,
            observer: observer.clone(),
            announcer: Arc::clone(&announcer),
            max_events: config.tracker.max_events_per_commit as usize,
            parallel: if postgres { PARALLEL_POSTGRES } else { 1 },
        };
        let batcher = Batcher::start(parts, &tasks);
        let commands = Commands { store: store.clone(), batcher: batcher.clone() };
        let artifacts = Artifacts::new(
            store.clone(),
            bus.clone(),
            batcher.clone(),
            Arc::clone(&announcer),
            secret_key,
            public_url,
        );
        let server = Arc::new(Server::new(
            bus.clone(),
            store.clone(),
            batcher,
            commands.clone(),
            artifacts,
            lease_ms,
            config.tracker.max_requests_in_flight as usize,
        ));
        let check = readiness.register("state-tracker");
        Self { store, observer, announcer, cancel_rest, commands, server, bus, check, tasks }
    }

    /// Serves until the shutdown, then answers what is in hand.
    ///
    /// # Errors
    /// When a subscription cannot be made or a part panics; run it again.
    pub async fn run(self, shutdown: Shutdown) -> Result<(), TrackerError> {
        let Self { store, observer, announcer, cancel_rest, commands, server, bus, check, tasks } = self;
        let mut verbs = JoinSet::new();
        for verb in Verb::ALL {
            verbs.spawn(Arc::clone(&server).serve(verb, shutdown.clone(), tasks.clone()));
        }
        drop(server);
        let watching = async {
            tokio::join!(
                observer.watch(&store),
                report(&store, &bus, &check),
                cancel_batches(&commands, cancel_rest),
                tell_waiting(&store, &commands),
            )
        };
        let serving = async {
            while let Some(ended) = verbs.join_next().await {
                match ended {
                    Ok(result) => result?,
                    Err(join) => return Err(TrackerError::Part(join.to_string())),
                }
            }
            Ok(())
        };
        let result = tokio::select! {
            result = serving => result,
            _ = watching => Ok(()),
        };
        // The batcher ends with its last sender, and with it everything that it started.
        drop(commands);
        drop(announcer);
        batcher::until_drained(&tasks, &shutdown, DRAIN).await;
        result
    }
}

/// Keeps the readiness check up to date.
async fn report(store: &Store, bus: &Bus, check: &Check) {
    let mut every = tokio::time::interval(Duration::from_millis(500));
    loop {
        every.tick().await;
        if !bus.is_connected() {
            check.fail("not connected to NATS");
            continue;
        }
        match store.ping().await {
            Ok(()) => check.ok(),
            Err(_) => check.fail("the database does not answer"),
        }
    }
}

/// Tells webhooks of progress that had to wait. While no webhook wants to hear of any, it reads one number.
async fn tell_waiting(store: &Store, commands: &Commands) {
    let period = Duration::from_millis(fold::progress::EVERY_MS.unsigned_abs());
    let mut every = tokio::time::interval(period);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        let told = async {
            if !store.registry().await?.hears_progress() {
                return Ok(());
            }
            let before_ms = store.now_ms().await?.saturating_sub(fold::progress::EVERY_MS);
            let due = waiting(store.read(), before_ms, WAITING_MAX).await?;
            let units =
                due.into_iter().map(|job| unit::Unit { job, what: unit::What::TellProgress }).collect();
            // Where it is not told now, it still waits.
            let _ = commands.batcher.submit(units).await;
            Ok::<_, ringback_store::StoreError>(())
        };
        if let Err(error) = told.await {
            tracing::debug!(%error, "what waits to be told cannot be read now");
        }
    }
}

/// Works off batches whose rest is to be cancelled. What fails here is found by the reconciler: the marker is in SQL.
async fn cancel_batches(commands: &Commands, mut batches: mpsc::UnboundedReceiver<BatchId>) {
    while let Some(batch) = batches.recv().await {
        loop {
            match commands.cancel_chunk(batch, CANCEL_CHUNK).await {
                Ok((_, true)) => {}
                Ok((_, false)) => break,
                Err(error) => {
                    tracing::warn!(batch_id = %batch, %error, "the rest of a batch is not cancelled yet");
                    break;
                }
            }
        }
    }
    // The announcer holds the sender for as long as the tracker runs.
    std::future::pending::<()>().await;
}
