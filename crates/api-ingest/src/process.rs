//! The API in a process of its own.

use ringback_bus::Bus;
use ringback_service_runtime::{Host, ServeError, blobs::BlobStore};
use ringback_store::{Open, Store, secrets::SecretKey};

use crate::{App, Deps};

/// Connects what the API needs and serves until the process wants to end.
///
/// # Errors
/// Something of the configuration cannot be used.
pub async fn serve(host: Host) -> Result<(), ServeError> {
    let open = Open::from_config(&host.config)?;
    let Some(store) = host.starting(Store::open_patiently(&open)).await else { return Ok(()) };
    let deps = Deps {
        store: store?,
        bus: Bus::connect(&host.config.nats, host.name).await?,
        blobs: BlobStore::open(&host.config.blobs, &host.config.data.dir)?,
        key: SecretKey::open(&host.config.data.secret_key_path())?,
        readiness: host.readiness,
        shutdown: host.shutdown,
    };
    App::build(&host.config, deps).await?.run().await;
    Ok(())
}
