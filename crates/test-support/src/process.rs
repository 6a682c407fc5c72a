//! A supervised process with its output in a file.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How to start a process; kept so that it can be started again.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Name in messages and of the log file.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Variables set beside the inherited ones.
    pub env: Vec<(String, String)>,
    /// Folder it runs in.
    pub cwd: Option<PathBuf>,
    /// File its output is appended to.
    pub log: PathBuf,
}

impl Spec {
    /// A process named `name` that logs into `folder`.
    pub fn new(name: &str, program: impl Into<PathBuf>, folder: &Path) -> Self {
        Self {
            name: name.to_owned(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            cwd: None,
            log: folder.join(format!("{name}.log")),
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I, S>(mut self, args: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<OsString>,
    {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds a variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }
}

/// A running (or ended) process. Dropping it kills it; if the test is failing, the end of its log is shown.
#[derive(Debug)]
pub struct Process {
    spec: Spec,
    child: Child,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts it.
    #[must_use]
    pub fn spawn(spec: Spec) -> Self {
        let log = OpenOptions::new().create(true).append(true).open(&spec.log).expect("the log file");
        let child = Self::command(&spec, &log).spawn().unwrap_or_else(|error| {
            panic!("{} does not start: {}: {error}", spec.name, spec.program.display())
        });
        Self { spec, child, ended: None }
    }

    fn command(spec: &Spec, log: &File) -> Command {
        let mut command = Command::new(&spec.program);
        command
            .args(&spec.args)
            .envs(spec.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle of the log"))
            .stderr(log.try_clone().expect("a second handle of the log"));
        if let Some(cwd) = &spec.cwd {
            command.current_dir(cwd);
        }
        command
    }

    /// How it was started.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status, once it has ended.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("wait for a child");
        }
        self.ended
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.exit_status().is_none()
    }

    /// Sends a signal, unless it has ended.
    pub fn signal(&mut self, signal: rustix::process::Signal) {
        if self.is_running() {
            let pid = rustix::process::Pid::from_child(&self.child);
            // Between the look and the signal it may end by itself; that is as good.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill9(&mut self) {
        if self.is_running() {
            self.child.kill().expect("kill a child");
            self.ended = Some(self.child.wait().expect("wait for a child"));
        }
    }

    /// SIGTERM, then SIGKILL when `grace` has passed. Gives the exit status.
    pub fn terminate(&mut self, grace: Duration) -> ExitStatus {
        self.signal(rustix::process::Signal::TERM);
        let begun = Instant::now();
        while begun.elapsed() < grace {
            if let Some(status) = self.exit_status() {
                return status;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.kill9();
        self.exit_status().expect("killed")
    }

    /// Everything it has printed.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.spec.log).unwrap_or_default()).into_owned()
    }

    /// The last lines it printed.
    #[must_use]
    pub fn log_tail(&self, lines: usize) -> String {
        let text = self.log();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let ended = self.exit_status();
        if std::thread::panicking() {
            let state = ended.map_or_else(|| "running".to_owned(), |status| status.to_string());
            eprintln!("\n--- end of the log of {} ({state}) ---\n{}", self.spec.name, self.log_tail(60));
        }
        self.kill9();
    }
}
