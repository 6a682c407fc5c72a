//! `ringback serve ROLE`: one service in this process.

use super::platform::{self, Platform, Sql};
use super::{load_config, roles};
use crate::error::CliError;
use crate::exit::Exit;
use ringback_service_runtime::ops;
use std::path::PathBuf;
use std::time::Duration;

const OPS_END: Duration = Duration::from_secs(1);

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

impl Role {
    const fn word(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Tracker => "tracker",
            Self::Worker => "worker",
            Self::Dispatcher => "dispatcher",
            Self::Reconciler => "reconciler",
        }
    }
}

/// Runs the verb.
pub(crate) async fn run(args: ServeArgs) -> Result<Exit, CliError> {
    let config = load_config(&args.config)?;
    if config.nats.url.is_none() {
        return Err(CliError::Config(format!(
            "{}: nats.url is not set; only `ringback dev` starts a server of its own",
            args.config.display()
        )));
    }
    let name = format!("ringback-{}", args.role.word());
    let _telemetry = platform::observe(&name, &config)?;
    let shutdown = platform::on_signals()?;
    super::make_private_dir(&config.data.dir)?;
    let sql = tokio::select! {
        opened = Sql::open(&config) => opened?,
        () = shutdown.triggered() => return Ok(Exit::Ok),
    };
    let ops_listen = config.server.ops_listen;
    let platform = Platform::new(config, &name).await?;
    let ops = match ops_listen {
        Some(address) => {
            let served = ops::serve(address, platform.readiness.clone(), shutdown.clone()).await;
            Some(served.map_err(|error| CliError::Service(format!("server.ops_listen {address}: {error}")))?)
        }
        None => None,
    };
    tracing::info!(role = args.role.word(), "starting");
    let ended = match args.role {
        Role::Api => roles::api(platform, sql, shutdown.clone()).await,
        Role::Tracker => roles::tracker(platform, sql, shutdown.clone()).await,
        Role::Worker => roles::worker(platform, sql, shutdown.clone()).await,
        Role::Dispatcher => roles::dispatcher(platform, sql, shutdown.clone(), false).await,
        Role::Reconciler => roles::reconciler(platform, sql, shutdown.clone()).await,
    };
    shutdown.finish();
    if let Some((_, task)) = ops {
        // Probes were answered during the drain; a probe that hangs does not hold the end.
        let _ = tokio::time::timeout(OPS_END, task).await;
    }
    tracing::info!(role = args.role.word(), "ended");
    ended.map(|()| Exit::Ok)
}
