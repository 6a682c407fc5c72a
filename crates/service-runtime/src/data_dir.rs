//! The data folder: made private, and locked so that two processes cannot both own it.

use rustix::fs::{FlockOperation, flock};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Why the data folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Another process owns it.
    #[error("the data folder {dir} is in use by process {pid}; stop it or choose another folder with --data")]
    InUse {
        /// The folder.
        dir: PathBuf,
        /// Process id that the owner wrote, or `?`.
        pid: String,
    },
    /// It cannot be made, opened or written.
    #[error("cannot use the data folder {dir}: {source}")]
    Io {
        /// The folder.
        dir: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// The lock on a data folder. It ends with this value, and by itself when the process dies in any way.
#[derive(Debug)]
pub struct DataDirLock {
    _file: File,
    dir: PathBuf,
}

impl DataDirLock {
    /// Makes the folder (mode 0700) if needed and locks it.
    ///
    /// # Errors
    /// [`DataDirError::InUse`] when another process holds the lock; [`DataDirError::Io`] otherwise.
    pub fn acquire(dir: &Path) -> Result<Self, DataDirError> {
        let io = |source| DataDirError::Io { dir: dir.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
        let dir = dir.canonicalize().map_err(io)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(dir.join("ringback.lock"))
            .map_err(io)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                let _ = file.read_to_string(&mut pid);
                let pid = if pid.trim().is_empty() { "?".to_owned() } else { pid.trim().to_owned() };
                return Err(DataDirError::InUse { dir, pid });
            }
            Err(errno) => return Err(io(errno.into())),
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(io)?;
        writeln!(file, "{}", std::process::id()).map_err(io)?;
        Ok(Self { _file: file, dir })
    }

    /// The folder, absolute.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_owner_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let lock = DataDirLock::acquire(&path).unwrap();
        let refused = DataDirLock::acquire(&path).unwrap_err();
        assert!(refused.to_string().contains(&format!("process {}", std::process::id())), "{refused}");
        drop(lock);
        DataDirLock::acquire(&path).unwrap();
    }
}
