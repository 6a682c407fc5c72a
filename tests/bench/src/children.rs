//! Programs that the bench starts: found on PATH, logged to a file, ended with the bench.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};

use crate::error::BenchError;

const LOG_TAIL_BYTES: usize = 2000;

/// A running program. Dropping it kills it.
pub struct Running {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Starts a program with stderr in `log`. Stdout goes there too, unless the caller set it to a pipe.
    pub fn start(
        name: &str,
        mut command: Command,
        log: PathBuf,
        stdout: Option<Stdio>,
        hint: &'static str,
    ) -> Result<Self, BenchError> {
        let file = std::fs::File::create(&log).map_err(|source| BenchError::file(&log, source))?;
        let same = file.try_clone().map_err(|source| BenchError::file(&log, source))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(stdout.unwrap_or_else(|| same.into()))
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| BenchError::Start {
                program: command.as_std().get_program().to_string_lossy().into_owned(),
                source,
                hint,
            })?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// Its process id. None once it has ended.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Its stdout, if it is a pipe and nobody has taken it.
    pub fn stdout(&mut self) -> Option<tokio::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Asks `ready` every few milliseconds until it says true. Errors when the program ends or time is up.
    pub async fn until_ready<F: AsyncFnMut() -> bool>(
        &mut self,
        what: &str,
        limit: Duration,
        mut ready: F,
    ) -> Result<Duration, BenchError> {
        let start = Instant::now();
        loop {
            if ready().await {
                return Ok(start.elapsed());
            }
            let ended = self.child.try_wait()?;
            if ended.is_some() || start.elapsed() > limit {
                let reason = match ended {
                    Some(status) => format!("it ended with {status} before {what}"),
                    None => format!("no {what} within {} s", limit.as_secs()),
                };
                return Err(self.not_ready(reason));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// An error that shows the end of the log.
    pub fn not_ready(&self, reason: String) -> BenchError {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let tail = &text[text.len().saturating_sub(LOG_TAIL_BYTES)..];
        BenchError::NotReady {
            program: self.name.clone(),
            reason,
            log: String::from_utf8_lossy(tail).into_owned(),
        }
    }

    /// Ends it with SIGKILL, and waits until it is gone and its connections are closed.
    pub async fn kill(mut self) -> Result<(), BenchError> {
        Ok(self.child.kill().await?)
    }

    /// Ends it: SIGTERM, and SIGKILL after `grace`.
    pub async fn stop(mut self, grace: Duration) {
        let pid = self.pid().and_then(|pid| rustix::process::Pid::from_raw(i32::try_from(pid).ok()?));
        if let Some(pid) = pid {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).ok();
            if tokio::time::timeout(grace, self.child.wait()).await.is_ok() {
                return;
            }
        }
        self.child.kill().await.ok();
    }
}

/// A program on PATH or in one of `more`.
pub fn find(name: &str, more: &[PathBuf]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(more.iter().cloned())
        .map(|folder| folder.join(name))
        .find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file()
}

/// A port that was free a moment ago.
pub fn free_port() -> Result<u16, BenchError> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
