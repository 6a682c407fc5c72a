//! The guard: a tiny process between the worker and a handler.
//!
//! The worker starts its own binary again as `child-guard … -- COMMAND`. The guard runs the command in the
//! process group that it leads, and watches its standard input, a pipe whose other end only the worker
//! holds. However the worker ends, also by `kill -9`, the pipe closes, and the guard ends the whole group:
//! a dead worker never leaves handlers running. While the guard lives it holds a lock on a file of the
//! worker's data folder; a worker that starts again waits for that lock before it runs anything.
//!
//! Through the same pipe the worker has the command stopped while it is idle, see [`PAUSE`]: the guard, whose child
//! it is, cannot hit another process, and a stopped command dies with its worker like any other.
//!
//! When the command ends, the guard writes how into a status file and then ends what is left of the group,
//! itself included.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus, Stdio};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, getppid, kill_current_process_group, kill_process, setpriority_process};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

/// First argument that makes a binary act as the guard, see [`run`].
pub const VERB: &str = "child-guard";

/// Sent through the pipe: stop the command (SIGSTOP), only its own process.
pub(crate) const PAUSE: u8 = b'p';
/// Sent through the pipe: let the command go on.
pub(crate) const RESUME: u8 = b'r';

/// How a guarded command ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuardStatus {
    /// It exited with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// It could not be started, for this reason.
    NotStarted(String),
}

/// What the guard is told.
#[derive(Debug)]
pub(crate) struct GuardArgs {
    pub(crate) parent_pid: u32,
    pub(crate) status: PathBuf,
    pub(crate) lock: PathBuf,
    /// Niceness of the command; the guard keeps its own.
    pub(crate) nice: i32,
    pub(crate) command: Vec<OsString>,
}

impl GuardArgs {
    /// The arguments that [`run`] reads back.
    pub(crate) fn to_argv(&self) -> Vec<OsString> {
        let mut argv: Vec<OsString> = vec![
            VERB.into(),
            "--parent-pid".into(),
            self.parent_pid.to_string().into(),
            "--status".into(),
            self.status.clone().into(),
            "--lock".into(),
            self.lock.clone().into(),
            "--nice".into(),
            self.nice.to_string().into(),
            "--".into(),
        ];
        argv.extend(self.command.iter().cloned());
        argv
    }

    fn parse(argv: impl IntoIterator<Item = OsString>) -> Option<Self> {
        let mut argv = argv.into_iter();
        let (mut parent_pid, mut status, mut lock, mut nice) = (None, None, None, 0);
        while let Some(word) = argv.next() {
            match word.to_str()? {
                "--parent-pid" => parent_pid = argv.next()?.to_str()?.parse().ok(),
                "--status" => status = argv.next().map(PathBuf::from),
                "--lock" => lock = argv.next().map(PathBuf::from),
                "--nice" => nice = argv.next()?.to_str()?.parse().ok()?,
                "--" => break,
                _ => return None,
            }
        }
        let command: Vec<OsString> = argv.collect();
        if command.is_empty() {
            return None;
        }
        Some(Self { parent_pid: parent_pid?, status: status?, lock: lock?, nice, command })
    }
}

/// Runs as the guard with the arguments after [`VERB`]. A binary that supervises handlers calls this first
/// of all when its first argument is [`VERB`], before it starts anything else. It does not return when
/// the command was started.
pub fn run(argv: impl IntoIterator<Item = OsString>) -> ExitCode {
    let Some(args) = GuardArgs::parse(argv) else {
        eprintln!("{VERB} is for internal use");
        return ExitCode::from(64);
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return not_started(&args.status, format!("cannot start the guard: {error}")),
    };
    runtime.block_on(guard(args))
}

async fn guard(args: GuardArgs) -> ExitCode {
    // The group's SIGTERM is for the handler; the guard stays to see it end.
    let handlers = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
    let _lock = match lock(&args.lock) {
        Ok(file) => file,
        Err(error) => {
            return not_started(&args.status, format!("cannot lock {}: {error}", args.lock.display()));
        }
    };
    if getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs()) != Some(args.parent_pid) {
        return not_started(&args.status, "the worker is gone".to_owned());
    }
    let mut command = Command::new(&args.command[0]);
    command.args(&args.command[1..]).stdin(Stdio::null());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let name = args.command[0].to_string_lossy();
            return not_started(&args.status, format!("cannot start `{name}`: {error}"));
        }
    };
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // A handler that spins (SDK 1.7 does while it is idle) must not starve the worker beside it.
        let _ = setpriority_process(Some(pid), args.nice);
    }
    let ended = tokio::select! {
        ended = child.wait() => ended,
        () = obey(pid) => {
            // The handler first, and for certain, so that the lock means what it says.
            let _ = child.start_kill();
            child.wait().await
        }
    };
    drop(handlers);
    if let Ok(ended) = ended {
        write_status(&args.status, &status_of(ended));
    }
    // What the handler left behind (its ping process, its own children) ends now, and so does the guard.
    let _ = kill_current_process_group(Signal::KILL);
    ExitCode::FAILURE
}

/// Pauses and resumes the command as the worker says; returns when the worker closed its end of the pipe.
async fn obey(command: Option<Pid>) {
    let lifeline = std::io::stdin().as_fd().try_clone_to_owned().and_then(pipe::Receiver::from_owned_fd);
    // Without a pipe nobody can hold the other end: as if it were closed.
    let Ok(mut lifeline) = lifeline else { return };
    let mut buffer = [0_u8; 64];
    loop {
        let last = match lifeline.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(read) => buffer[..read].last().copied(),
        };
        let signal = match last {
            Some(PAUSE) => Signal::STOP,
            Some(RESUME) => Signal::CONT,
            Some(_) | None => continue,
        };
        // Until the guard has collected it, its id belongs to nobody else: this runs beside `Child::wait` in one task,
        // which ends with it.
        if let Some(pid) = command {
            let _ = kill_process(pid, signal);
        }
    }
}

fn lock(path: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

fn status_of(ended: ExitStatus) -> GuardStatus {
    use std::os::unix::process::ExitStatusExt;
    match (ended.code(), ended.signal()) {
        (Some(code), _) => GuardStatus::Code(code),
        (None, signal) => GuardStatus::Signal(signal.unwrap_or(0)),
    }
}

fn not_started(path: &Path, reason: String) -> ExitCode {
    write_status(path, &GuardStatus::NotStarted(reason));
    ExitCode::FAILURE
}

/// Whole or not at all. A failure to write shows as a missing status, which the worker reports.
fn write_status(path: &Path, status: &GuardStatus) {
    let part = path.with_extension("part");
    if let Ok(text) = serde_json::to_vec(status)
        && std::fs::write(&part, text).is_ok()
    {
        let _ = std::fs::rename(&part, path);
    }
}

/// Reads what a guard wrote; `None` if it died before.
pub(crate) fn read_status(path: &Path) -> Option<GuardStatus> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_read_back() {
        let args = GuardArgs {
            parent_pid: 7,
            status: "/s".into(),
            lock: "/l".into(),
            nice: 10,
            command: vec!["python3".into(), "--".into(), "-u".into()],
        };
        let argv = args.to_argv();
        assert_eq!(argv[0], VERB);
        let back = GuardArgs::parse(argv.into_iter().skip(1)).expect("reads back");
        assert_eq!((back.parent_pid, back.status, back.lock, back.nice), (7, args.status, args.lock, 10));
        assert_eq!(back.command, args.command);
        assert!(GuardArgs::parse(["--status", "x"].map(OsString::from)).is_none());
    }

    #[test]
    fn a_status_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("status");
        assert_eq!(read_status(&path), None);
        for status in [GuardStatus::Code(3), GuardStatus::Signal(9), GuardStatus::NotStarted("no".into())] {
            write_status(&path, &status);
            assert_eq!(read_status(&path), Some(status));
        }
    }
}
