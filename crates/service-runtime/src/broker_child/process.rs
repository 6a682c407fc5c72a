//! The broker's process: started behind a guard that ends it with us, recognised when it was left behind.

use super::{BrokerError, Plan, config_path, pid_path};
use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process};
use std::collections::VecDeque;
use std::io::Read;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStderr, ChildStdin, Command};
use tokio::time::Instant;

/// Starts the server and a guard. The guard reads our end of a pipe: when this process ends in any way, even by
/// SIGKILL, the pipe closes and the guard ends the server. (PR_SET_PDEATHSIG would follow the thread, not the
/// process, and needs unsafe code.)
const GUARD: &str = r#"exec 3<&0
"$1" -c "$2" </dev/null 3<&- &
server=$!
( read -r _; kill -TERM "$server" ) <&3 >/dev/null 2>&1 &
guard=$!
exec 3<&-
wait "$server"
code=$?
kill "$guard" 2>/dev/null
exit "$code""#;

const STOP_WITHIN: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(10);
/// Log lines kept to explain a failed start.
const KEPT_LINES: usize = 5;

type LastLines = Arc<Mutex<VecDeque<String>>>;

/// A running server with its guard.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    /// Open as long as the server shall live.
    pipe: Option<ChildStdin>,
    group: Option<Pid>,
    pid: Option<u32>,
}

impl Running {
    /// Starts the server of `plan` and waits until it answers with its own name.
    pub(super) async fn start(plan: &Plan, within: Duration) -> Result<Self, BrokerError> {
        let io = |source| BrokerError::Io { dir: plan.dir.clone(), source };
        let _ = std::fs::remove_file(pid_path(&plan.dir));
        let mut child = Command::new("/bin/sh")
            .args(["-c", GUARD, "nats-guard"])
            .arg(&plan.program)
            .arg(config_path(&plan.dir))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Ctrl-C at the terminal is for us; the broker ends after the drain.
            .process_group(0)
            .spawn()
            .map_err(io)?;
        let lines = LastLines::default();
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(fold_log(stderr, Arc::clone(&lines)));
        }
        let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let mut running = Self { pipe: child.stdin.take(), group, child, pid: None };
        match running.ready(plan, Instant::now() + within, &lines).await {
            Ok(()) => {
                running.pid =
                    read_pid(&pid_path(&plan.dir)).map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
                Ok(running)
            }
            Err(detail) => {
                running.stop().await;
                let timeout_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
                Err(BrokerError::NotReady { timeout_ms, detail })
            }
        }
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.pid
    }

    async fn ready(&mut self, plan: &Plan, deadline: Instant, lines: &LastLines) -> Result<(), String> {
        let address = SocketAddr::from(([127, 0, 0, 1], plan.port));
        loop {
            let reason = match tokio::time::timeout(Duration::from_secs(1), greeting(address)).await {
                Ok(Ok(info)) if info.contains(&plan.server_name) => {
                    if pid_path(&plan.dir).exists() {
                        return Ok(());
                    }
                    "its pid file is missing".to_owned()
                }
                Ok(Ok(_)) => return Err(format!("another server listens on port {}", plan.port)),
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no greeting".to_owned(),
            };
            let ended = matches!(self.child.try_wait(), Ok(Some(_)));
            if ended || Instant::now() >= deadline {
                // Its last lines may still be on their way through the pipe.
                tokio::time::sleep(POLL).await;
                let said: Vec<String> =
                    lines.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect();
                return Err(if said.is_empty() { reason } else { said.join(" | ") });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits for the server's end.
    pub(super) async fn wait(&mut self) -> String {
        let status: std::io::Result<ExitStatus> = self.child.wait().await;
        match status {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        }
    }

    /// Ends the server: first politely through the guard, then by force.
    pub(super) async fn stop(&mut self) {
        drop(self.pipe.take());
        if tokio::time::timeout(STOP_WITHIN, self.child.wait()).await.is_ok() {
            return;
        }
        tracing::warn!("nats-server does not end; killing it");
        if let Some(group) = self.group {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait().await;
    }
}

async fn greeting(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let mut buffer = vec![0; 4096];
    let n = stream.read(&mut buffer).await?;
    buffer.truncate(n);
    Ok(String::from_utf8_lossy(&buffer).into_owned())
}

/// Puts the server's log lines into ours: `[pid] 2026/11/21 01:02:03.4 [WRN] text`.
async fn fold_log(stderr: ChildStderr, last: LastLines) {
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if line.contains("[ERR]") || line.contains("[FTL]") {
            tracing::warn!(target: "ringback_service_runtime::nats", "{line}");
        } else {
            tracing::debug!(target: "ringback_service_runtime::nats", "{line}");
        }
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() == KEPT_LINES {
            last.pop_front();
        }
        last.push_back(line);
    }
}

/// Stops the broker that an earlier process left in this folder, if there is one. Only a process that runs with our
/// own configuration file is touched: the pid in the file may long be somebody else's.
pub(super) async fn stop_stale(dir: &Path) {
    let path = pid_path(dir);
    let Some(pid) = read_pid(&path) else { return };
    if is_ours(pid, dir) {
        tracing::info!(pid = pid.as_raw_nonzero(), "stopping a broker left behind by an earlier process");
        let _ = kill_process(pid, Signal::TERM);
        let deadline = Instant::now() + STOP_WITHIN;
        while test_kill_process(pid).is_ok() && is_ours(pid, dir) {
            if Instant::now() >= deadline {
                let _ = kill_process(pid, Signal::KILL);
            }
            tokio::time::sleep(POLL).await;
        }
    }
    let _ = std::fs::remove_file(path);
}

fn read_pid(path: &Path) -> Option<Pid> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok().and_then(Pid::from_raw)
}

fn is_ours(pid: Pid, dir: &Path) -> bool {
    let config = config_path(dir);
    let config = config.as_os_str().as_encoded_bytes();
    std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero()))
        .is_ok_and(|line| line.split(|&byte| byte == 0).any(|argument| argument == config))
}

/// Random bytes of the system as hex.
pub(super) fn random_hex(bytes: usize) -> std::io::Result<String> {
    use std::fmt::Write;
    let mut buffer = vec![0; bytes];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut buffer)?;
    Ok(buffer.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}
