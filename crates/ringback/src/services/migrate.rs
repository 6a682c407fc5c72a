//! `ringback migrate`: bring the database's schema up to date.

use super::load_config;
use crate::error::CliError;
use crate::exit::Exit;
use ringback_service_runtime::RingbackConfig;
use ringback_store::{Open, Store};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  ringback migrate --config ringback.toml

Run it before the services of a new release start; running it again changes nothing. `ringback dev` does it by itself.";

/// Bring the database's schema up to date
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct MigrateArgs {
    /// Configuration file [default: no file, SQLite in ./ringback-data]
    #[arg(long, value_name = "FILE", env = "RINGBACK_CONFIG")]
    config: Option<PathBuf>,
}

/// Runs the verb.
pub(crate) async fn run(args: MigrateArgs) -> Result<Exit, CliError> {
    let config = match &args.config {
        Some(path) => load_config(path)?,
        None => RingbackConfig::default(),
    };
    migrate(&config).await?;
    eprintln!("the schema is current");
    Ok(Exit::Ok)
}

/// Brings the schema up to date; makes SQLite's folder.
pub(crate) async fn migrate(config: &RingbackConfig) -> Result<(), CliError> {
    ringback_service_runtime::crypto_provider::install();
    let open = Open::from_config(config).map_err(|error| CliError::Config(error.to_string()))?;
    if open.url.expose().starts_with("sqlite:") {
        super::make_private_dir(&config.data.dir)?;
    }
    Store::migrate(&open).await.map_err(|error| CliError::Service(format!("the database: {error}")))
}
