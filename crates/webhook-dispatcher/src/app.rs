//! The service: built from its configuration and what the process shares.

use std::hash::RandomState;
use std::sync::Arc;

use ringback_bus::{Bus, DeliveryAnnouncer};
use ringback_domain::webhook::response::Profile;
use ringback_domain::webhook::schedule::Schedule;
use ringback_egress::{BuildError, Client, ConfigError, Lookup, SystemLookup};
use ringback_service_runtime::blobs::BlobStore;
use ringback_service_runtime::{Check, Readiness, RingbackConfig, Shutdown};
use ringback_store::Store;
use ringback_store::secrets::SecretKey;

use crate::bodies::Bodies;
use crate::book::{Process, Rules};
use crate::clock::Clock;
use crate::directory::Directory;
use crate::keyring::Keyring;
use crate::meters::Meters;
use crate::ownership::Ownership;
use crate::replayer::Replayer;
use crate::settings::Settings;
use crate::shared::Shared;

/// What the dispatcher needs from its process.
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
    /// Whether this is the only dispatcher that can be alive, as in the all-in-one, which holds the lock of its data
    /// folder: leases of its former life are taken at once instead of after they have run out.
    pub alone: bool,
}

impl std::fmt::Debug for Deps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deps").field("alone", &self.alone).finish_non_exhaustive()
    }
}

/// Why the dispatcher cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// `[webhooks]` holds something that cannot be meant.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The HTTP client cannot be built.
    #[error(transparent)]
    Client(#[from] BuildError),
}

/// The webhook dispatcher.
pub struct App {
    shared: Arc<Shared>,
    shutdown: Shutdown,
    alone: bool,
    check: Check,
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("alone", &self.alone).finish_non_exhaustive()
    }
}

impl App {
    /// Builds the service. A TLS provider must be installed for the process.
    ///
    /// # Errors
    /// The configuration cannot be meant, or the HTTP client cannot be built.
    pub fn build(config: &RingbackConfig, deps: Deps) -> Result<Self, AppError> {
        Self::build_with_lookup(config, deps, Arc::new(SystemLookup))
    }

    /// The same with a resolver of its own.
    ///
    /// # Errors
    /// As [`Self::build`].
    pub fn build_with_lookup(
        config: &RingbackConfig,
        deps: Deps,
        lookup: Arc<dyn Lookup>,
    ) -> Result<Self, AppError> {
        let Deps { store, bus, blobs, key, readiness, shutdown, alone } = deps;
        let settings = Settings::new(&config.webhooks, store.facts().partitions);
        let policy = ringback_egress::webhook_policy(&config.webhooks)?;
        let client = Client::with_lookup(policy, settings.egress, lookup)?;
        let rules_of =
            |profile| Arc::new(Rules { profile, schedule: Schedule::of(profile), strict_order: false });
        let clock = Arc::new(Clock::new());
        let shared = Arc::new(Shared {
            announcer: DeliveryAnnouncer::new(bus.clone(), store.facts().partitions),
            directory: Directory::new(store.clone(), key.clone(), settings.profile, Arc::clone(&clock)),
            process: Arc::new(Process::new(settings.breaker, settings.target_in_flight)),
            rules: rules_of(settings.profile),
            strict: rules_of(Profile::RunpodStrict),
            standard: rules_of(Profile::Standard),
            keyring: Keyring::new(store.clone(), key, Arc::clone(&clock)),
            clock,
            bodies: Bodies::new(blobs),
            meters: Meters::new(),
            hasher: RandomState::new(),
            settings,
            store,
            bus,
            client,
        });
        Ok(Self { shared, shutdown, alone, check: readiness.register("dispatcher") })
    }

    /// Delivers until the shutdown, then ends what flies, writes it down and gives its partitions back.
    pub async fn run(self) {
        let shared = Arc::clone(&self.shared);
        let owned = Ownership::new(self.shared, self.alone, self.check).run(self.shutdown.clone());
        let replayer = Replayer::new(Arc::clone(&shared), self.alone);
        tokio::join!(owned, shared.directory.run(self.shutdown.clone()), replayer.run(self.shutdown));
    }
}
