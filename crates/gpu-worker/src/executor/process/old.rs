//! Children of an earlier life of this worker.

use std::fs::OpenOptions;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

/// How often a lock is tried.
const LOOK: Duration = Duration::from_millis(20);

/// Waits until no guard of an earlier life holds its lock, and removes what those children left. After
/// `kill -9` of a worker its guards end their handlers at once; a job must not start here while an old
/// handler might still run it.
///
/// Returns the folders that are still locked after `limit`.
pub(crate) async fn wait_for_old_children(state_dir: &Path, limit: Duration) -> std::io::Result<Vec<String>> {
    let end = Instant::now() + limit;
    let mut left = Vec::new();
    let entries = match std::fs::read_dir(state_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(left),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let folder = entry?.path();
        loop {
            if is_free(&folder) {
                // What cannot be removed does no harm; it is tried again at the next start.
                let _ = std::fs::remove_dir_all(&folder);
                break;
            }
            if Instant::now() >= end {
                left.push(folder.display().to_string());
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
    }
    Ok(left)
}

fn is_free(folder: &Path) -> bool {
    match OpenOptions::new().write(true).open(folder.join("lock")) {
        Ok(file) => flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok(),
        // No lock file: the guard never came that far.
        Err(_) => true,
    }
}
