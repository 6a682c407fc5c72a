//! `ringback serve ROLE`: one service in this process.

use crate::error::CliError;
use crate::exit::Exit;
use ringback_service_runtime::host::{self, HostError};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  ringback migrate --config ringback.toml
  ringback serve api --config ringback.toml
  ringback serve worker --config ringback.toml

Each role scales on its own; all of them share NATS, SQL and the blob folder of the configuration.
SIGTERM drains; a second signal ends at once. Health and metrics: [server] ops_listen.";

/// Run one service in this process
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct ServeArgs {
    /// The service
    role: Role,
    /// Configuration file
    #[arg(long, value_name = "FILE", env = "RINGBACK_CONFIG")]
    config: PathBuf,
}

/// A service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Role {
    /// The HTTP API: takes jobs, answers clients
    Api,
    /// The state tracker: the only one that changes a job's state
    Tracker,
    /// Runs jobs
    Worker,
    /// Sends webhooks
    Dispatcher,
    /// Finds what should be on its way and is not
    Reconciler,
}

/// Runs the verb.
pub(crate) async fn run(args: ServeArgs) -> Result<Exit, CliError> {
    let failed = |error: HostError| {
        let text = error.to_string();
        if error.is_configuration() { CliError::Config(text) } else { CliError::Service(text) }
    };
    let config = host::load(&args.config).map_err(failed)?;
    let ended = match args.role {
        Role::Api => host::run("ringback-api", config, ringback_api_ingest::serve).await,
        Role::Tracker => host::run("ringback-tracker", config, ringback_state_tracker::serve).await,
        Role::Worker => host::run("ringback-worker", config, ringback_gpu_worker::serve).await,
        Role::Dispatcher => {
            host::run("ringback-dispatcher", config, ringback_webhook_dispatcher::serve).await
        }
        Role::Reconciler => host::run("ringback-reconciler", config, ringback_reconciler::serve).await,
    };
    ended.map(|()| Exit::Ok).map_err(failed)
}
