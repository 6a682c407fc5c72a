//! Temporary folders and free ports.

use std::net::TcpListener;
use std::path::PathBuf;
use tempfile::TempDir;

/// A folder removed at the end of the test; kept when `RINGBACK_KEEP` is set.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    _dir: Option<TempDir>,
}

impl Folder {
    /// A new empty folder whose name starts with `name`.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix(&format!("ringback-{name}-"))
            .tempdir()
            .expect("a temporary folder");
        let path = dir.path().to_owned();
        if std::env::var_os("RINGBACK_KEEP").is_some() {
            eprintln!("kept: {}", path.display());
            return Self { path: dir.keep(), _dir: None };
        }
        Self { path, _dir: Some(dir) }
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }
}

/// A loopback port that was free a moment ago. Each call gives another one: the range below the system's own
/// ephemeral ports is walked from a place that depends on the process, so that two tests rarely meet.
#[must_use]
pub fn free_port() -> u16 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    const FIRST: u32 = 12_000;
    const COUNT: u32 = 19_000;
    let start = std::process::id().wrapping_mul(97);
    for _ in 0..COUNT {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = u16::try_from(FIRST + start.wrapping_add(step) % COUNT).expect("below 65536");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port between {FIRST} and {}", FIRST + COUNT);
}
