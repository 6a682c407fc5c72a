//! The floor of free disk space: below it submits are refused while outcomes still commit.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use axum::http::StatusCode;
use ringback_service_runtime::Shutdown;

use crate::error::ApiError;

const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Watches the data folder's file system.
#[derive(Debug)]
pub(crate) struct DiskFloor {
    folder: PathBuf,
    floor_bytes: u64,
    below: AtomicBool,
}

impl DiskFloor {
    /// Looks once at once. A floor of 0 turns it off.
    pub(crate) fn new(folder: PathBuf, floor_bytes: u64) -> Self {
        let floor = Self { folder, floor_bytes, below: AtomicBool::new(false) };
        floor.look();
        floor
    }

    /// 507 while too little is free.
    pub(crate) fn check(&self) -> Result<(), ApiError> {
        if self.below.load(Ordering::Relaxed) {
            return Err(ApiError::new(
                StatusCode::INSUFFICIENT_STORAGE,
                format!(
                    "the server has less than {} bytes of disk space left (setting server.disk_floor_bytes) and takes \
                     no jobs; running ones go on. Free space, or wait for retention to do so",
                    self.floor_bytes
                ),
            ));
        }
        Ok(())
    }

    pub(crate) async fn watch(&self, shutdown: Shutdown) {
        while !shutdown.is_triggered() {
            self.look();
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = shutdown.triggered() => {}
            }
        }
    }

    fn look(&self) {
        if self.floor_bytes == 0 {
            return;
        }
        match rustix::fs::statvfs(&self.folder) {
            Ok(fs) => {
                let free = fs.f_bavail.saturating_mul(fs.f_frsize);
                let below = free < self.floor_bytes;
                if self.below.swap(below, Ordering::Relaxed) != below {
                    tracing::warn!(
                        free_bytes = free,
                        refusing = below,
                        "disk space crossed server.disk_floor_bytes"
                    );
                }
            }
            Err(error) => tracing::warn!(%error, "free disk space cannot be read"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_below_the_floor_only() {
        let folder = std::env::temp_dir();
        assert!(DiskFloor::new(folder.clone(), 1).check().is_ok());
        assert!(DiskFloor::new(folder.clone(), 0).check().is_ok());
        let full = DiskFloor::new(folder, u64::MAX).check().unwrap_err();
        assert_eq!(full.status, StatusCode::INSUFFICIENT_STORAGE);
        assert!(full.detail.contains("server.disk_floor_bytes"));
    }
}
