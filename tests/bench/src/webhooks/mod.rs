//! The dispatcher alone: deliveries owed in SQL, dispatchers as processes, a receiver that counts.

mod copies;
mod count;
mod ledger;
mod neighbours;
mod owed;
mod posts;
mod setup;
mod speed;

use std::path::PathBuf;

use crate::error::BenchError;

/// Measures and counts what dispatchers send. Exits 1 when anything was lost, altered, out of order, or came twice
/// without a crash that explains it; 2 when it could not run.
#[derive(Debug, clap::Parser)]
#[command(name = "ringback-count", version)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Sub,
    /// The dispatcher's program [default: `ringback-webhook-dispatcher` beside this program, else on PATH]
    #[arg(long, global = true, env = "RINGBACK_DISPATCHER_BIN")]
    pub dispatcher: Option<PathBuf>,
    /// The nats-server program [default: on PATH, else .tools/bin]
    #[arg(long, global = true, env = "RINGBACK_NATS_SERVER")]
    pub nats_server: Option<PathBuf>,
    /// A postgres:// URL of an empty database instead of a fresh SQLite file
    #[arg(long, global = true)]
    pub database: Option<String>,
    /// Folder for all data; must lie on the disk that is meant [default: the folder of this program]
    #[arg(long, global = true, env = "RINGBACK_BENCH_DATA")]
    pub data: Option<PathBuf>,
    /// Without any webhook for so many seconds, what is outstanding counts as lost
    #[arg(long, global = true, default_value_t = 60)]
    pub patience: u64,
}

/// The programs.
#[derive(Debug, clap::Subcommand)]
pub enum Sub {
    /// Webhooks of many jobs while dispatchers are killed at random: what arrives, in which order, how often
    Count(count::Args),
    /// How fast one dispatcher sends what is owed in SQL, beside bare POSTs by the same client, and in how much memory
    Speed(speed::Args),
    /// Whether one dead and one dripping receiver delay 98 good ones
    Neighbours(neighbours::Args),
    /// How much memory a dispatcher takes while very many deliveries are owed: first to a dead receiver, then to a good one
    Owed(owed::Args),
    /// Bare POSTs by the dispatcher's HTTP client (started by `speed` itself)
    #[command(hide = true)]
    Posts(posts::Args),
}

/// Runs one of them. True: nothing lost, doubled without reason, altered or out of order.
///
/// # Errors
/// It cannot run.
pub async fn run(cli: Cli) -> Result<bool, BenchError> {
    match &cli.command {
        Sub::Count(args) => count::run(&cli, args).await,
        Sub::Speed(args) => speed::run(&cli, args).await,
        Sub::Neighbours(args) => neighbours::run(&cli, args).await,
        Sub::Owed(args) => owed::run(&cli, args).await,
        Sub::Posts(args) => posts::run(args).await,
    }
}

fn failed(what: impl std::fmt::Display) -> BenchError {
    BenchError::System(std::io::Error::other(what.to_string()))
}
