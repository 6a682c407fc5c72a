//! The reconciler in a process of its own.

use ringback_bus::Bus;
use ringback_service_runtime::{Host, ServeError, blobs::BlobStore};
use ringback_store::{Open, Store, secrets::SecretKey};

use crate::{App, Handles};

/// Connects what the reconciler needs and runs its passes until the process wants to end. Others may run beside it.
///
/// # Errors
/// Something of the configuration cannot be used, or a pass panicked.
pub async fn serve(host: Host) -> Result<(), ServeError> {
    let open = Open::from_config(&host.config)?;
    let Some(store) = host.starting(Store::open_patiently(&open)).await else { return Ok(()) };
    let handles = Handles {
        store: store?,
        bus: Bus::connect(&host.config.nats, host.name).await?,
        blobs: BlobStore::open(&host.config.blobs, &host.config.data.dir)?,
        secret_key: SecretKey::open(&host.config.data.secret_key_path())?,
        public_url: host.config.server.base_url(host.config.server.listen),
        readiness: host.readiness,
    };
    App::build(&host.config, handles).run(host.shutdown).await?;
    Ok(())
}
