//! Real Python handlers for the tests: where the interpreters are, and how to start one against a hub.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "shared by several test binaries, each uses a part"
)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A version of the Python package `runpod`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sdk {
    V1_12,
    V1_7,
}

pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("repository root")
}

/// The interpreter that has this version installed. Missing: skipped aloud, required when CI=true.
pub fn python(sdk: Sdk) -> Option<PathBuf> {
    let (variable, folder) = match sdk {
        Sdk::V1_12 => ("RINGBACK_PY_RUNPOD112", "venv-runpod112"),
        Sdk::V1_7 => ("RINGBACK_PY_RUNPOD17", "venv-runpod17"),
    };
    let found = std::env::var_os(variable)
        .map(PathBuf::from)
        .or_else(|| Some(repository().join(".tools").join(folder).join("bin/python")))
        .filter(|path| path.exists());
    if found.is_none() {
        let text = format!(
            "SKIPPED: no Python with the package runpod for {sdk:?}; set {variable} or install it into .tools/{folder}"
        );
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{text}");
        eprintln!("{text}");
    }
    found
}

pub fn handler(name: &str) -> PathBuf {
    repository().join("tests/handlers").join(name)
}

/// Polls until `check` gives a value.
pub async fn eventually<T>(what: &str, limit: Duration, mut check: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(Instant::now() < end, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A running handler process; killed when dropped.
pub struct HandlerProcess {
    pub child: Child,
    pub lines: Arc<Mutex<Vec<String>>>,
}

impl HandlerProcess {
    pub fn start(python: &Path, script: &str, args: &[&str], env: &[(&str, String)], cwd: &Path) -> Self {
        let mut command = Command::new(python);
        command
            .arg("-u")
            .arg(handler(script))
            .args(args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", cwd)
            .current_dir(cwd)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        for (name, value) in env {
            command.env(name, value);
        }
        let mut child = command.spawn().expect("python starts");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let out = child.stdout.take().expect("stdout");
        let err = child.stderr.take().expect("stderr");
        collect(out, Arc::clone(&lines));
        collect(err, Arc::clone(&lines));
        Self { child, lines }
    }

    pub fn log(&self) -> String {
        self.lines.lock().expect("lines").join("\n")
    }
}

fn collect(from: impl std::io::Read + Send + 'static, into: Arc<Mutex<Vec<String>>>) {
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            into.lock().expect("lines").push(line);
        }
    });
}

impl Drop for HandlerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the handler\n{}\n---", self.log());
        }
    }
}
