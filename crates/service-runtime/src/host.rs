//! A process that runs one service: configuration, logs, health, signals. `ringback serve` and each service's own
//! program share it.

use crate::config::{ConfigError, RingbackConfig};
use crate::telemetry::{self, TelemetryError};
use crate::{Readiness, Shutdown, crypto_provider, metrics, ops};
use std::error::Error;
use std::future::Future;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// What a service that cannot start or go on says.
pub type ServeError = Box<dyn Error + Send + Sync>;

/// What a service is given by its process.
#[derive(Debug)]
pub struct Host {
    /// Name of the process, for connections and logs.
    pub name: &'static str,
    /// The operator's configuration.
    pub config: RingbackConfig,
    /// Where the service says whether it works.
    pub readiness: Readiness,
    /// When the process wants to end.
    pub shutdown: Shutdown,
}

impl Host {
    /// Waits for something at the start; none when the process wants to end before it is there.
    pub async fn starting<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            done = work => Some(done),
            () = self.shutdown.triggered() => None,
        }
    }
}

/// Why a process ended.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The configuration file.
    #[error("{}", config_text(path, source))]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ConfigError,
    },
    /// Only the all-in-one starts a broker of its own.
    #[error("nats.url is not set; only `ringback dev` starts a server of its own")]
    NoBroker,
    /// Logs and traces.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// The system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The service.
    #[error("{name}: {source}")]
    Service {
        /// Its name.
        name: &'static str,
        /// Its reason.
        source: ServeError,
    },
}

/// A file that cannot be read is named by its error already.
fn config_text(path: &Path, source: &ConfigError) -> String {
    match source {
        ConfigError::Read { .. } => source.to_string(),
        ConfigError::Parse { .. } | ConfigError::Invalid(_) => format!("{}: {source}", path.display()),
    }
}

impl HostError {
    /// Whether the operator's input is at fault rather than the machine or another service.
    #[must_use]
    pub const fn is_configuration(&self) -> bool {
        matches!(self, Self::Config { .. } | Self::NoBroker | Self::Telemetry(_))
    }
}

/// Probes are answered to the end of the drain; one that hangs holds the process no longer than this.
const OPS_END: Duration = Duration::from_secs(1);
/// Exit code of a process that was given a configuration that cannot work.
const EXIT_CONFIGURATION: u8 = 2;

/// `main` of a service's own program: `NAME --config FILE`.
pub fn main<F, Fut>(name: &'static str, about: &'static str, serve: F) -> ExitCode
where
    F: FnOnce(Host) -> Fut,
    Fut: Future<Output = Result<(), ServeError>>,
{
    let config = clap::Arg::new("config")
        .long("config")
        .value_name("FILE")
        .env("RINGBACK_CONFIG")
        .required(true)
        .value_parser(clap::value_parser!(PathBuf))
        .help("Configuration file");
    let arguments =
        clap::Command::new(name).about(about).version(env!("CARGO_PKG_VERSION")).arg(config).get_matches();
    // clap has refused a command line without it.
    let path = arguments.get_one::<PathBuf>("config").cloned().unwrap_or_default();
    let ended = load(&path).and_then(|config| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let runtime = runtime.map_err(|source| HostError::Io { what: "the runtime".to_owned(), source })?;
        runtime.block_on(run(name, config, serve))
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if error.is_configuration() { ExitCode::from(EXIT_CONFIGURATION) } else { ExitCode::FAILURE }
        }
    }
}

/// Reads the configuration of a process that runs apart.
///
/// # Errors
/// [`HostError::Config`] or [`HostError::NoBroker`].
pub fn load(path: &Path) -> Result<RingbackConfig, HostError> {
    let config =
        RingbackConfig::load(path).map_err(|source| HostError::Config { path: path.to_owned(), source })?;
    if config.nats.url.is_none() {
        return Err(HostError::NoBroker);
    }
    Ok(config)
}

/// Runs a service until it ends: by itself, or after the drain that a signal began.
///
/// # Errors
/// See [`HostError`].
pub async fn run<F, Fut>(name: &'static str, config: RingbackConfig, serve: F) -> Result<(), HostError>
where
    F: FnOnce(Host) -> Fut,
    Fut: Future<Output = Result<(), ServeError>>,
{
    crypto_provider::install();
    metrics::install();
    let _telemetry = telemetry::init(name, &config.telemetry)?;
    let shutdown =
        Shutdown::on_signals().map_err(|source| HostError::Io { what: "signals".to_owned(), source })?;
    let dir = &config.data.dir;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| HostError::Io { what: format!("data.dir {}", dir.display()), source })?;
    let readiness = Readiness::new();
    let ops = match config.server.ops_listen {
        None => None,
        Some(address) => Some(serve_ops(address, &readiness, &shutdown).await?),
    };
    tracing::info!(service = name, "starting");
    let ended = serve(Host { name, config, readiness, shutdown: shutdown.clone() }).await;
    shutdown.finish();
    if let Some(ops) = ops {
        let _ = tokio::time::timeout(OPS_END, ops).await;
    }
    tracing::info!(service = name, "ended");
    ended.map_err(|source| HostError::Service { name, source })
}

async fn serve_ops(
    address: SocketAddr,
    readiness: &Readiness,
    shutdown: &Shutdown,
) -> Result<tokio::task::JoinHandle<()>, HostError> {
    let served = ops::serve(address, readiness.clone(), shutdown.clone()).await;
    let (_, task) =
        served.map_err(|source| HostError::Io { what: format!("server.ops_listen {address}"), source })?;
    Ok(task)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_apart_needs_a_broker() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ringback.toml");
        std::fs::write(&file, "").unwrap();
        assert!(matches!(load(&file), Err(HostError::NoBroker)));
        std::fs::write(&file, "[nats]\nurl = \"nats://127.0.0.1:4222\"\n").unwrap();
        assert!(load(&file).is_ok());
        let missing = load(&dir.path().join("none.toml")).unwrap_err();
        assert!(missing.is_configuration() && missing.to_string().contains("none.toml"), "{missing}");
    }
}
