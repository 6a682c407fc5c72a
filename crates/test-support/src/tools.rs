//! Where the programs are that tests need, and what happens when one is missing.
//!
//! A missing program is named loudly and its tests are skipped, unless `CI=true`: there it is a failure.

use std::path::{Path, PathBuf};

/// The project's root folder.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("crates/<name> lies below the root")
        .to_owned()
}

/// A path below `.tools/`, the folder that tools/setup fills.
#[must_use]
pub fn tool(path: &str) -> PathBuf {
    root().join(".tools").join(path)
}

/// The `ringback` program: `RINGBACK_BIN`, else the one beside the running test's own build.
#[must_use]
pub fn ringback() -> PathBuf {
    if let Some(path) = std::env::var_os("RINGBACK_BIN") {
        return PathBuf::from(path);
    }
    // A test runs as <target>/debug/deps/<name>-<hash>.
    let own = std::env::current_exe().expect("the test's own path");
    let path = own.ancestors().nth(2).expect("deps lies below the profile's folder").join("ringback");
    assert!(
        path.exists(),
        "{} is not built: run `cargo build -p ringback --features faults` (make test does), or set RINGBACK_BIN",
        path.display()
    );
    path
}

/// Finds a program on PATH, without running it.
#[must_use]
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// Takes what a test needs, or says loudly that the test is skipped and gives `None`.
/// With `CI=true` nothing is skipped.
pub fn need<T>(found: Option<T>, what: &str, how: &str) -> Option<T> {
    if found.is_none() {
        let text = format!("{what} is missing; {how}");
        assert!(std::env::var("CI").as_deref() != Ok("true"), "CI needs everything: {text}");
        eprintln!("\n======== SKIPPED: {text} ========\n");
    }
    found
}

/// The program nats-server: the project's own, else the one on PATH.
#[must_use]
pub fn nats_server() -> Option<PathBuf> {
    let project = tool("bin/nats-server");
    let found = if project.exists() { Some(project) } else { on_path("nats-server") };
    need(found, "nats-server", "run tools/setup nats")
}

/// The Python of one of tools/setup's environments, for example `venv-runpod112`.
pub fn python(environment: &str) -> Option<PathBuf> {
    let path = tool(environment).join("bin/python");
    need(path.exists().then_some(path), environment, "run tools/setup test")
}

/// Node and the folder that holds the RunPod JavaScript SDK.
pub fn node() -> Option<(PathBuf, PathBuf)> {
    let program = need(on_path("node"), "node", "install Node.js 18 or newer")?;
    let folder = tool("node");
    let there = folder.join("node_modules/runpod-sdk").is_dir();
    need(there.then_some((program, folder)), "the RunPod JavaScript SDK", "run tools/setup node")
}
