//! The dispatcher in a process of its own.

use ringback_bus::Bus;
use ringback_service_runtime::blobs::BlobStore;
use ringback_service_runtime::{Host, ServeError};
use ringback_store::secrets::SecretKey;
use ringback_store::{Open, Store};

use crate::{App, Deps};

/// Connects what the dispatcher needs and delivers until the process wants to end. Others may run beside it.
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
        alone: false,
    };
    App::build(&host.config, deps)?.run().await;
    Ok(())
}
