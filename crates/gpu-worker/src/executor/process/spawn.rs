//! Starting a child.

use std::fs::{DirBuilder, remove_dir_all};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rand::RngExt;
use ringback_worker_protocol::{ChildEvent, ChildHandle, ChildIdentity, Registration};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use super::environment::of_child;
use super::exit::Exit;
use super::lines::{LineReader, Tail};
use super::place::Place;
use super::workdir;
use crate::guard::{self, GuardArgs, read_status};

/// The longest worker id that fits `[A-Za-z0-9_-]{1,64}` leaves this much for its start.
const PREFIX_CHARS: usize = 40;

/// A child that was started.
pub(super) struct Started {
    pub(super) process: ChildProcess,
    pub(super) handle: ChildHandle,
    pub(super) events: mpsc::UnboundedReceiver<ChildEvent>,
    pub(super) lines: LineReader,
}

/// The guard's process and what it holds.
#[derive(Debug)]
pub(super) struct ChildProcess {
    guard: Child,
    /// While this is open the guard lets the handler live; pauses and resumes go through it.
    lifeline: Option<pipe::Sender>,
    paused: bool,
    group: Option<Pid>,
    folder: PathBuf,
    pub(super) started: Instant,
}

/// Starts a child and registers it with the hub.
///
/// # Errors
/// Why it could not be started, for people.
pub(super) fn start(place: &Place) -> Result<Started, String> {
    let settings = &place.settings;
    let mut rng = rand::rng();
    let prefix: String = settings.id_prefix.chars().take(PREFIX_CHARS).collect();
    let worker_id = format!("{prefix}-{}-{:08x}", place.number, rng.random::<u32>());
    let token = format!("{:032x}{:032x}", rng.random::<u128>(), rng.random::<u128>());
    let folder = settings.state_dir.join(&worker_id);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&folder)
        .map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
    let made = start_in(place, &folder, worker_id, token);
    if made.is_err() {
        let _ = remove_dir_all(&folder);
    }
    made
}

fn start_in(place: &Place, folder: &Path, worker_id: String, token: String) -> Result<Started, String> {
    let settings = &place.settings;
    let private = settings.private_folder.then_some(folder);
    let cwd = workdir::prepare(&settings.folder, private)
        .map_err(|error| format!("working folder {}: {error}", settings.folder.display()))?;
    let identity = ChildIdentity {
        base_url: settings.base_url.clone(),
        endpoint: settings.endpoint.clone(),
        worker_id: worker_id.clone(),
        token: token.clone(),
        device: settings.device.clone(),
        ping_interval_ms: u64::try_from(settings.ping_interval.as_millis()).unwrap_or(u64::MAX),
    };
    let registration =
        Registration { worker_id, endpoint: settings.endpoint.clone(), token, max_jobs: place.max_jobs() };
    let (handle, events) = place.hub.register(registration).map_err(|error| error.to_string())?;
    let args = GuardArgs {
        parent_pid: std::process::id(),
        status: folder.join("status"),
        lock: folder.join("lock"),
        nice: settings.nice,
        command: settings.command.iter().map(Into::into).collect(),
    };
    let mut guard = Command::new(&settings.guard)
        .args(args.to_argv())
        .env_clear()
        .envs(of_child(settings, &identity, std::env::vars_os()))
        .envs(place.confirm_port().map(|port| ("RINGBACK_CONFIRM_PORT", port.to_string())))
        .current_dir(cwd)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|error| format!("cannot start {}: {error}", settings.guard.display()))?;
    let lines = match (guard.stdout.take(), guard.stderr.take()) {
        (Some(out), Some(err)) => {
            let read = |fd: std::io::Result<_>| fd.and_then(pipe::Receiver::from_owned_fd);
            let pipes = read(out.into_owned_fd()).and_then(|out| Ok((out, read(err.into_owned_fd())?)));
            let (out, err) = pipes.map_err(|error| format!("cannot read the handler's output: {error}"))?;
            LineReader::new(out, err)
        }
        _ => return Err("the handler has no output pipes".to_owned()),
    };
    let group = guard.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    let lifeline =
        guard.stdin.take().map(|stdin| stdin.into_owned_fd().and_then(pipe::Sender::from_owned_fd));
    let lifeline = lifeline
        .transpose()
        .map_err(|error| format!("cannot use the pipe to the handler's guard: {error}"))?;
    let process = ChildProcess {
        guard,
        lifeline,
        paused: false,
        group,
        folder: folder.to_owned(),
        started: Instant::now(),
    };
    Ok(Started { process, handle, events, lines })
}

impl ChildProcess {
    /// SIGTERM to the whole group.
    pub(super) fn terminate(&mut self) {
        self.signal(Signal::TERM);
        // A stopped process gets the signal only when it goes on.
        self.pause(false);
    }

    /// Stops the handler's own process, or lets it go on.
    pub(super) fn pause(&mut self, paused: bool) {
        if self.paused == paused {
            return;
        }
        let order = if paused { guard::PAUSE } else { guard::RESUME };
        // The guard reads at once, so that the pipe is never full; a guard that is gone took the handler along.
        let sent = self.lifeline.as_ref().is_some_and(|pipe| pipe.try_write(&[order]).is_ok());
        if sent {
            self.paused = paused;
        }
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Has the guard kill the handler, see it dead, and end the group.
    pub(super) fn kill(&mut self) {
        self.lifeline = None;
    }

    /// SIGKILL to the whole group, the guard included.
    pub(super) fn kill_group(&self) {
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        if let Some(group) = self.group {
            // ESRCH: it is gone already.
            let _ = kill_process_group(group, signal);
        }
    }

    /// Returns when the guard has ended. Cancelling loses nothing.
    pub(super) async fn ended(&mut self) {
        // Err only if the system lost the child, which then is as good as ended.
        let _ = self.guard.wait().await;
    }

    /// How the handler ended; call it after [`ChildProcess::ended`].
    pub(super) fn exit(&mut self, tail: &Tail) -> Exit {
        let status = read_status(&self.folder.join("status"));
        if status.is_none() {
            // The guard was killed before it could end its group.
            self.kill_group();
        }
        let _ = remove_dir_all(&self.folder);
        Exit { status, tail: tail.text() }
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        // The supervising task was dropped with the runtime: the handler ends with it.
        self.lifeline = None;
    }
}

/// How long after a hard kill the guard is given before the group is killed without it.
pub(super) const GUARD_PATIENCE: Duration = Duration::from_secs(5);
