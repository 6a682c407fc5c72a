//! What the services of one process share: connections, health, the wish to end.

use super::store_options;
use crate::error::CliError;
use ringback_bus::Bus;
use ringback_service_runtime::blobs::BlobStore;
use ringback_service_runtime::telemetry::{self, TelemetryGuard};
use ringback_service_runtime::{Readiness, RingbackConfig, Shutdown};
use ringback_store::Store;
use ringback_store::secrets::SecretKey;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A database that is starting beside us gets this long.
const DATABASE_WITHIN: Duration = Duration::from_secs(30);
const DATABASE_PAUSE: Duration = Duration::from_millis(500);

/// Shared by all services of a process. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Platform {
    /// The configuration.
    pub(crate) config: Arc<RingbackConfig>,
    /// NATS.
    pub(crate) bus: Bus,
    /// Large payloads.
    pub(crate) blobs: BlobStore,
    /// Where services say whether they work.
    pub(crate) readiness: Readiness,
}

/// SQL and what is needed to read its secrets.
#[derive(Clone, Debug)]
pub(crate) struct Sql {
    /// SQL.
    pub(crate) store: Store,
    /// The key of secrets at rest.
    pub(crate) key: SecretKey,
}

impl Platform {
    /// Connects what all services need. NATS may be away: the connection is made when it comes.
    pub(crate) async fn new(config: RingbackConfig, client_name: &str) -> Result<Self, CliError> {
        let bus = Bus::connect(&config.nats, client_name).await.map_err(|error| service("nats", &error))?;
        let blobs = BlobStore::open(&config.blobs, &config.data.dir).map_err(|error| service("blobs", &error))?;
        Ok(Self { config: Arc::new(config), bus, blobs, readiness: Readiness::new() })
    }
}

impl Sql {
    /// Opens the database, whose schema must be current, and the key file. A database that is just starting is
    /// waited for.
    pub(crate) async fn open(config: &RingbackConfig) -> Result<Self, CliError> {
        let key = SecretKey::open(&config.data.secret_key_path()).map_err(|error| service("the key file", &error))?;
        let open = store_options(config)?;
        let began = Instant::now();
        loop {
            match Store::open(&open).await {
                Ok(store) => return Ok(Self { store, key }),
                Err(error) if error.is_transient() && began.elapsed() < DATABASE_WITHIN => {
                    tracing::warn!(%error, "the database does not answer yet");
                    tokio::time::sleep(DATABASE_PAUSE).await;
                }
                Err(error) => return Err(service("the database", &error)),
            }
        }
    }
}

/// Logs, traces and metrics of the process.
pub(crate) fn observe(name: &str, config: &RingbackConfig) -> Result<TelemetryGuard, CliError> {
    ringback_service_runtime::crypto_provider::install();
    ringback_service_runtime::metrics::install();
    telemetry::init(name, &config.telemetry).map_err(|error| CliError::Config(error.to_string()))
}

/// The wish to end, told by signals.
pub(crate) fn on_signals() -> Result<Shutdown, CliError> {
    Ok(Shutdown::on_signals()?)
}

/// A part that cannot start.
pub(crate) fn service(part: &str, error: &dyn std::fmt::Display) -> CliError {
    CliError::Service(format!("{part}: {error}"))
}
