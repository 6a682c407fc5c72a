//! Running services: one role per process, or all in one.

pub(crate) mod migrate;
pub(crate) mod platform;
pub(crate) mod roles;
pub(crate) mod serve;
mod worker;

use crate::error::CliError;
use ringback_service_runtime::RingbackConfig;
use ringback_store::Open;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

/// One runtime for all services of a process.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("ringback").build()?)
}

/// Reads and checks a configuration file.
pub(crate) fn load_config(path: &Path) -> Result<RingbackConfig, CliError> {
    RingbackConfig::load(path).map_err(|error| CliError::Config(format!("{}: {error}", path.display())))
}

/// How to open the database of a configuration.
pub(crate) fn store_options(config: &RingbackConfig) -> Result<Open, CliError> {
    let url = config
        .database
        .resolve_url(&config.data.dir)
        .map_err(|error| CliError::Config(error.to_string()))?;
    Ok(Open { readers: config.database.max_read_connections, ..Open::url(url.into_inner()) })
}

/// Makes a folder that only its owner can enter.
pub(crate) fn make_private_dir(dir: &Path) -> Result<(), CliError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| CliError::File { action: "make the folder", path: dir.to_owned(), source })
}
