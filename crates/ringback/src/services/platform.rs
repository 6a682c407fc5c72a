//! What the services of one process share: connections, health, the wish to end.

use crate::error::CliError;
use ringback_bus::Bus;
use ringback_service_runtime::blobs::BlobStore;
use ringback_service_runtime::telemetry::{self, TelemetryGuard};
use ringback_service_runtime::{Readiness, RingbackConfig, Shutdown};
use ringback_store::secrets::SecretKey;
use ringback_store::{Open, Store};
use std::sync::Arc;

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
        let blobs =
            BlobStore::open(&config.blobs, &config.data.dir).map_err(|error| service("blobs", &error))?;
        Ok(Self { config: Arc::new(config), bus, blobs, readiness: Readiness::new() })
    }
}

impl Sql {
    /// Opens the database, whose schema must be current, and the key file. A database that is just starting is
    /// waited for.
    pub(crate) async fn open(config: &RingbackConfig) -> Result<Self, CliError> {
        let key = SecretKey::open(&config.data.secret_key_path())
            .map_err(|error| service("the key file", &error))?;
        let open = Open::from_config(config).map_err(|error| CliError::Config(error.to_string()))?;
        let store = Store::open_patiently(&open).await.map_err(|error| service("the database", &error))?;
        Ok(Self { store, key })
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
