//! The working folder of a child.
//!
//! SDK 1.7 keeps the ids of its jobs in `.runpod_jobs.pkl` in the working folder and believes what it finds
//! there. Left by a crashed child it makes the next one think that it is full for ever; shared by two
//! children it makes one of them idle. So a stale file is removed before a start, and children that would
//! share a folder get one each, filled with links into the real one.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

const SDK_STATE: &str = ".runpod_jobs.pkl";

/// Prepares the folder and returns the one to start in.
///
/// # Errors
/// The folder does not exist or cannot be read, or the private one cannot be made.
pub(super) fn prepare(folder: &Path, private_in: Option<&Path>) -> io::Result<PathBuf> {
    let Some(private_in) = private_in else {
        // `metadata` first, so that a missing folder is reported as such.
        if !std::fs::metadata(folder)?.is_dir() {
            return Err(io::Error::new(io::ErrorKind::NotADirectory, "not a folder"));
        }
        match std::fs::remove_file(folder.join(SDK_STATE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => return Ok(folder.to_owned()),
        }
    };
    let private = private_in.join("work");
    std::fs::create_dir_all(&private)?;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(SDK_STATE) {
            symlink(entry.path(), private.join(entry.file_name()))?;
        }
    }
    Ok(private)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_folder_loses_only_the_stale_state() {
        let folder = tempfile::tempdir().expect("folder");
        std::fs::write(folder.path().join(SDK_STATE), "stale").expect("write");
        std::fs::write(folder.path().join("handler.py"), "x").expect("write");
        assert_eq!(prepare(folder.path(), None).expect("prepared"), folder.path());
        assert!(!folder.path().join(SDK_STATE).exists());
        assert!(folder.path().join("handler.py").exists());
        assert!(prepare(&folder.path().join("missing"), None).is_err());
    }

    #[test]
    fn a_private_folder_sees_the_files_but_not_the_state() {
        let (folder, state) = (tempfile::tempdir().expect("folder"), tempfile::tempdir().expect("folder"));
        std::fs::write(folder.path().join(SDK_STATE), "of another child").expect("write");
        std::fs::write(folder.path().join("model.bin"), "weights").expect("write");
        let private = prepare(folder.path(), Some(state.path())).expect("prepared");
        assert_eq!(std::fs::read_to_string(private.join("model.bin")).expect("read"), "weights");
        assert!(!private.join(SDK_STATE).exists());
        assert!(folder.path().join(SDK_STATE).exists());
    }
}
