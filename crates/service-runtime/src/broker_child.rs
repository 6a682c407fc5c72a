//! The embedded broker of the all-in-one: a `nats-server` of our own, loopback only, with a random credential and no
//! monitoring port. It ends with this process however that ends, keeps its port over restarts, and one left behind
//! by an earlier process is stopped first.

mod binary;
mod process;

pub use binary::{MIN_VERSION, find_nats_server};

use crate::Redacted;
use crate::config::NatsConfig;
use process::{Running, random_hex, stop_stale};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Why the broker cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// No program.
    #[error(
        "nats-server was not found (looked at RINGBACK_NATS_SERVER, PATH and .tools/); install NATS 2.10 or newer, \
         run tools/setup nats, or set nats.url to a running server"
    )]
    NotFound,
    /// Too old, or not a NATS server.
    #[error("{path} is not a nats-server of version 2.10 or newer: {found}")]
    Version {
        /// The program.
        path: PathBuf,
        /// What it said of itself.
        found: String,
    },
    /// Files or processes cannot be made.
    #[error("cannot start nats-server in {dir}: {source}")]
    Io {
        /// Its folder.
        dir: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It does not become ready.
    #[error("nats-server did not become ready within {timeout_ms} ms: {detail}")]
    NotReady {
        /// The time waited.
        timeout_ms: u64,
        /// Last log lines or connect error.
        detail: String,
    },
}

/// Largest message: an inline payload of 256 KiB with its envelope, batches of outcomes, and room.
const MAX_PAYLOAD_BYTES: u32 = 8 * 1024 * 1024;
const READY_WITHIN: Duration = Duration::from_secs(10);
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
/// A free port may be taken between choosing and binding it.
const PORT_TRIES: u32 = 5;
const USER: &str = "ringback";

/// What a broker process needs; fixed for the life of a [`BrokerChild`].
#[derive(Debug, Clone)]
struct Plan {
    program: PathBuf,
    dir: PathBuf,
    port: u16,
    server_name: String,
    password: Redacted<String>,
}

/// A running broker. It is restarted on the same port when it dies. Dropping it stops it without waiting.
#[derive(Debug)]
pub struct BrokerChild {
    plan: Plan,
    stop: CancellationToken,
    up: watch::Receiver<Option<u32>>,
    keeper: Option<JoinHandle<()>>,
}

impl BrokerChild {
    /// Starts a broker whose files lie in `dir` and waits until it takes connections. The caller holds the lock on
    /// the data folder around `dir`.
    ///
    /// # Errors
    /// See [`BrokerError`].
    pub async fn start(dir: &Path) -> Result<Self, BrokerError> {
        let program = find_nats_server()?;
        let io = |source| BrokerError::Io { dir: dir.to_owned(), source };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
        let dir = dir.canonicalize().map_err(io)?;
        stop_stale(&dir).await;
        let mut plan = Plan {
            program,
            port: 0,
            server_name: format!("ringback-{}", random_hex(8).map_err(io)?),
            password: Redacted::new(random_hex(24).map_err(io)?),
            dir: dir.clone(),
        };
        let mut tries = 0;
        let running = loop {
            tries += 1;
            plan.port = free_port().map_err(io)?;
            write_config(&plan).map_err(io)?;
            match Running::start(&plan, READY_WITHIN).await {
                Ok(running) => break running,
                Err(error @ BrokerError::NotReady { .. }) if tries < PORT_TRIES => {
                    tracing::debug!(%error, "trying another port");
                }
                Err(error) => return Err(error),
            }
        };
        let (up_in, up) = watch::channel(running.pid());
        let stop = CancellationToken::new();
        let keeper = tokio::spawn(keep(plan.clone(), running, up_in, stop.clone()));
        Ok(Self { plan, stop, up, keeper: Some(keeper) })
    }

    /// `nats://127.0.0.1:<port>`, without credential.
    #[must_use]
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.plan.port)
    }

    /// `base` with this broker's address and credential.
    #[must_use]
    pub fn nats_config(&self, base: &NatsConfig) -> NatsConfig {
        NatsConfig {
            url: Some(self.url()),
            user: Some(USER.to_owned()),
            password: Some(self.plan.password.clone()),
            password_env: None,
            password_file: None,
            creds_file: None,
            ca_file: None,
            replicas: 1,
            ..base.clone()
        }
    }

    /// Process id of nats-server; none while it is being restarted.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        *self.up.borrow()
    }

    /// The process id, to be watched over restarts.
    #[must_use]
    pub fn watch_pid(&self) -> watch::Receiver<Option<u32>> {
        self.up.clone()
    }

    /// Folder of JetStream's files. Deleting it loses no job (P6).
    #[must_use]
    pub fn store_dir(&self) -> PathBuf {
        self.plan.dir.join("jetstream")
    }

    /// Stops the broker and waits for its end.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Some(keeper) = self.keeper.take() {
            // Err means that the keeper panicked; the broker then ended with its pipe.
            let _ = keeper.await;
        }
    }
}

impl Drop for BrokerChild {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn keep(plan: Plan, mut running: Running, up: watch::Sender<Option<u32>>, stop: CancellationToken) {
    let mut backoff = FIRST_BACKOFF;
    loop {
        tokio::select! {
            status = running.wait() => {
                up.send_replace(None);
                tracing::warn!(%status, "nats-server ended; starting it again");
            }
            () = stop.cancelled() => {
                running.stop().await;
                up.send_replace(None);
                return;
            }
        }
        running = loop {
            tokio::select! {
                () = tokio::time::sleep(backoff) => {}
                () = stop.cancelled() => return,
            }
            stop_stale(&plan.dir).await;
            match Running::start(&plan, READY_WITHIN).await {
                Ok(running) => break running,
                Err(error) => {
                    tracing::error!(%error, "nats-server cannot be started again");
                    backoff = (backoff * 2).min(LONGEST_BACKOFF);
                }
            }
        };
        backoff = FIRST_BACKOFF;
        up.send_replace(running.pid());
    }
}

fn free_port() -> std::io::Result<u16> {
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    listener.local_addr().map(|address| address.port())
}

fn config_path(dir: &Path) -> PathBuf {
    dir.join("nats-server.conf")
}

fn pid_path(dir: &Path) -> PathBuf {
    dir.join("nats-server.pid")
}

fn write_config(plan: &Plan) -> std::io::Result<()> {
    use std::io::Write;
    let text = format!(
        "server_name: \"{name}\"\nlisten: \"127.0.0.1:{port}\"\nmax_payload: {MAX_PAYLOAD_BYTES}\npid_file: {pid}\n\
         authorization {{\n  user: \"{USER}\"\n  password: \"{password}\"\n}}\n\
         jetstream {{\n  store_dir: {store}\n}}\n",
        name = plan.server_name,
        port = plan.port,
        pid = quoted(&pid_path(&plan.dir)),
        password = plan.password.expose(),
        store = quoted(&plan.dir.join("jetstream")),
    );
    let path = config_path(&plan.dir);
    // Made anew so that it never has wider permissions than these.
    let _ = std::fs::remove_file(&path);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

/// NATS reads backslash escapes inside double quotes.
fn quoted(path: &Path) -> String {
    format!("\"{}\"", path.display().to_string().replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests;
