//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use crate::floor::ServerArgs;

/// Measures Ringback from outside: submits over HTTP, `builtin:echo`, signed webhooks to a counting receiver, and the
/// floor in the same run. Prints figures and never fails because of a slow one; exits 1 when jobs or webhooks were
/// lost or doubled or a signature was wrong, 2 when it could not measure.
#[derive(Debug, clap::Parser)]
#[command(name = "ringback-bench", version)]
pub struct Cli {
    /// What to run instead of the whole bench
    #[command(subcommand)]
    pub command: Option<Sub>,
    /// How to measure
    #[command(flatten)]
    pub options: Options,
}

/// Parts of the bench that run as their own process.
#[derive(Debug, clap::Subcommand)]
pub enum Sub {
    /// The floor's server (started by the bench itself)
    #[command(hide = true)]
    FloorServer(ServerArgs),
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Memory and CPU of an instance that does nothing
    Idle,
    /// Open loop at --rate
    Latency,
    /// Closed loop for --seconds
    Throughput,
    /// The floor, in turns with throughput
    Floor,
    /// Cost per job while the database grows
    Flat,
    /// Cost per job over many endpoints
    Endpoints,
}

/// The bench's options.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// The ringback program [default: `ringback` beside this program, else on PATH]
    #[arg(long, env = "RINGBACK_BIN")]
    pub ringback: Option<PathBuf>,
    /// The nats-server program [default: on PATH]
    #[arg(long, env = "RINGBACK_NATS_SERVER")]
    pub nats_server: Option<PathBuf>,
    /// `sqlite`, `postgres` (starts a temporary server) or a postgres:// URL of an empty database; repeatable
    #[arg(long, default_value = "sqlite")]
    pub database: Vec<String>,
    /// Folder for all data; must lie on the disk that is meant [default: the folder of this program]
    #[arg(long, env = "RINGBACK_BENCH_DATA")]
    pub data: Option<PathBuf>,
    /// What to measure
    #[arg(long, value_enum, value_delimiter = ',',
          default_values_t = [Part::Idle, Part::Latency, Part::Throughput, Part::Floor, Part::Flat, Part::Endpoints])]
    pub parts: Vec<Part>,
    /// About 10 seconds in all: small numbers, for smoke tests, not for figures
    #[arg(long)]
    pub quick: bool,
    /// JSON on stdout; the table goes to stderr
    #[arg(long)]
    pub json: bool,
    /// Length of each throughput round, in seconds
    #[arg(long, default_value_t = 60)]
    pub seconds: u64,
    /// Length of each floor round, in seconds
    #[arg(long, default_value_t = 20)]
    pub floor_seconds: u64,
    /// Rounds of throughput and floor, in turns
    #[arg(long, default_value_t = 2)]
    pub rounds: usize,
    /// Submits in flight in the closed loop
    #[arg(long, default_value_t = 64)]
    pub connections: usize,
    /// Jobs whose webhook has not come, at most, in the closed loop
    #[arg(long, default_value_t = 2000)]
    pub backlog: usize,
    /// Jobs per second in the open loop
    #[arg(long, default_value_t = 200)]
    pub rate: u32,
    /// Length of the open loop, in seconds
    #[arg(long, default_value_t = 30)]
    pub latency_seconds: u64,
    /// Bytes of text in each job's input
    #[arg(long, default_value_t = 128)]
    pub payload_bytes: usize,
    /// Slots of each endpoint
    #[arg(long, default_value_t = 256)]
    pub slots: u32,
    /// Numbers of jobs in the database at which the cost per job is read
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000, 50_000, 190_000, 200_000])]
    pub checkpoints: Vec<u64>,
    /// Numbers of endpoints to spread jobs over
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100, 1000])]
    pub endpoints: Vec<usize>,
    /// Jobs for each number of endpoints
    #[arg(long, default_value_t = 20_000)]
    pub endpoint_jobs: u64,
    /// One signed webhook in so many is verified and parsed in the closed loop
    #[arg(long, default_value_t = 16)]
    pub verify_every: u64,
    /// Without any webhook for so many seconds, what is outstanding counts as lost
    #[arg(long, default_value_t = 30)]
    pub patience: u64,
    /// A further argument for `ringback dev`; repeatable
    #[arg(long, allow_hyphen_values = true)]
    pub ringback_arg: Vec<String>,
}

impl Options {
    /// Applies `--quick`.
    pub fn settled(mut self) -> Self {
        if self.quick {
            self.seconds = self.seconds.min(3);
            self.floor_seconds = self.floor_seconds.min(2);
            self.rounds = 1;
            self.latency_seconds = self.latency_seconds.min(2);
            self.checkpoints = vec![500, 1_000, 2_000];
            self.endpoints.clear();
        }
        self
    }

    /// True if this part is wanted.
    pub fn wants(&self, part: Part) -> bool {
        self.parts.contains(&part)
    }

    /// How long to wait for a webhook before it counts as lost.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.patience)
    }
}
