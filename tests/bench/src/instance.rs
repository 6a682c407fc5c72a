//! One `ringback dev` on loopback, with a fresh data folder.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode, Uri};
use tokio::process::Command;

use crate::children::{Running, free_port};
use crate::client::Connection;
use crate::error::BenchError;
use crate::procs::{self, Group};

/// The API key that each instance of the bench is given.
pub const API_KEY: &str = "rb_bench_0123456789abcdef0123456789abcdef";
/// The secret that each instance signs with. Fixed: it guards nothing but this loopback.
pub const WEBHOOK_SECRET: &str = "whsec_cmluZ2JhY2stYmVuY2gtc2lnbmluZy1rZXktMzI=";

const READY_LIMIT: Duration = Duration::from_secs(60);
const STOP_GRACE: Duration = Duration::from_secs(15);

/// How instances are started.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The `ringback` program.
    pub program: PathBuf,
    /// The nats-server program, if it is known: instance and floor use the same one.
    pub nats_server: Option<PathBuf>,
    /// Slots of each endpoint.
    pub slots: u32,
    /// Further arguments of `ringback dev`.
    pub extra: Vec<String>,
}

/// A running all-in-one.
pub struct Instance {
    /// Host and port of the client API.
    pub address: String,
    /// Its endpoints, all `builtin:echo`.
    pub endpoints: Vec<String>,
    /// From start to ready.
    pub start_ms: f64,
    running: Running,
    brokers: Brokers,
}

/// Process ids of the instance's brokers, killed when dropped.
struct Brokers(Vec<u32>);

impl Instance {
    /// Starts it with its data in `folder/data` and waits until it is ready.
    pub async fn start(
        settings: &Settings,
        folder: &Path,
        database: Option<&str>,
        endpoint_count: usize,
    ) -> Result<Self, BenchError> {
        let address = format!("127.0.0.1:{}", free_port()?);
        let endpoints: Vec<String> = (0..endpoint_count.max(1)).map(|k| format!("bench-{k}")).collect();
        let mut command = Command::new(&settings.program);
        command.args(["dev", "--listen", &address, "--api-key", API_KEY, "--webhook-secret", WEBHOOK_SECRET]);
        command.arg("--data").arg(folder.join("data"));
        if let Some(url) = database {
            command.args(["--database", url]);
        }
        for name in &endpoints {
            command.arg("--endpoint").arg(format!("{name}=builtin:echo,slots={}", settings.slots));
        }
        command.args(&settings.extra);
        if let Some(program) = &settings.nats_server {
            command.env("RINGBACK_NATS_SERVER", program);
        }
        // One line per transition on a terminal is a convenience; here it would be measured.
        let (log, quiet) = (folder.join("ringback.log"), Some(std::process::Stdio::null()));
        let hint = "build it with `cargo build --release -p ringback` or name it with --ringback";
        let mut running = Running::start("ringback dev", command, log, quiet, hint)?;
        let ready = async || is_ready(&address).await;
        let took = running.until_ready("200 from /healthz/ready", READY_LIMIT, ready).await?;
        let pid = running.pid().unwrap_or_default();
        // Not its child: a guard stands between, which ends the broker when the program is killed.
        let brokers = procs::descendants(pid)
            .into_iter()
            .filter(|(_, name)| name.starts_with("nats"))
            .map(|(pid, _)| pid);
        let brokers = Brokers(brokers.collect());
        Ok(Self { address, endpoints, start_ms: took.as_secs_f64() * 1000.0, running, brokers })
    }

    /// Its processes: the program itself, its broker, and what else it started.
    pub fn groups(&self) -> Vec<Group> {
        let own = self.running.pid().map(|pid| Group::single("ringback", pid));
        own.into_iter().chain(self.brokers.0.iter().map(|pid| Group::single("nats-server", *pid))).collect()
    }

    /// What the server says about a job, for jobs whose webhook never came.
    pub async fn status_of(&self, n: u64, id: &str) -> String {
        let endpoint = &self.endpoints[n as usize % self.endpoints.len()];
        let asked = async {
            let path: Uri = format!("/v2/{endpoint}/status/{id}").parse().map_err(|_| {
                BenchError::Option { option: "status", reason: format!("`{endpoint}` cannot stand in a URL") }
            })?;
            let mut connection = Connection::open(&self.address, Some(API_KEY)).await?;
            connection.send(Method::GET, &path, Bytes::new()).await
        };
        match asked.await {
            Ok((status, body)) => format!("{} {}", status.as_u16(), String::from_utf8_lossy(&body)),
            Err(error) => error.to_string(),
        }
    }

    /// Ends it as a user would, with SIGTERM.
    pub async fn stop(self) {
        self.running.stop(STOP_GRACE).await;
    }
}

impl Drop for Brokers {
    /// A broker ends with its parent; only one that outlived a killed parent is left here.
    fn drop(&mut self) {
        let still_nats = |pid: &&u32| {
            std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("nats"))
        };
        for pid in self.0.iter().filter(still_nats) {
            if let Some(pid) = i32::try_from(*pid).ok().and_then(rustix::process::Pid::from_raw) {
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
            }
        }
    }
}

async fn is_ready(address: &str) -> bool {
    let path = Uri::from_static("/healthz/ready");
    let Ok(mut connection) = Connection::open(address, None).await else { return false };
    matches!(connection.send(Method::GET, &path, Bytes::new()).await, Ok((StatusCode::OK, _)))
}
