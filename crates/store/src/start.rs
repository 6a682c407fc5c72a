//! Opening the database that an operator's configuration names.

use std::time::{Duration, Instant};

use ringback_service_runtime::{RingbackConfig, config::SecretError};

use crate::{Open, Store, StoreError};

/// A database that is starting beside us gets this long.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(500);

impl Open {
    /// What the configuration says.
    ///
    /// # Errors
    /// The URL's environment variable or file cannot be read.
    pub fn from_config(config: &RingbackConfig) -> Result<Self, SecretError> {
        let url = config.database.resolve_url(&config.data.dir)?;
        Ok(Self {
            readers: config.database.max_read_connections,
            acquire_timeout: Duration::from_millis(config.database.acquire_timeout_ms),
            ..Self::url(url.into_inner())
        })
    }
}

impl Store {
    /// [`Self::open`], for a process that may start before its database: waits up to 30 s for it.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_patiently(open: &Open) -> Result<Self, StoreError> {
        let began = Instant::now();
        loop {
            match Self::open(open).await {
                Err(error) if error.is_transient() && began.elapsed() < PATIENCE => {
                    tracing::warn!(%error, "waiting for the database");
                    tokio::time::sleep(PAUSE).await;
                }
                opened => return opened,
            }
        }
    }
}
