//! Where a listener stopped: a file that lets the next start go on.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::CliError;
use crate::private_file;

/// The file of `--state`.
#[derive(Debug)]
pub(super) struct StateFile {
    path: PathBuf,
    kept: Option<Kept>,
}

/// What it holds. The secret is not part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    /// Base address of the server.
    pub(super) url: String,
    /// The webhook there.
    pub(super) webhook: String,
    /// The last event that was passed on.
    pub(super) cursor: String,
}

impl StateFile {
    /// Reads the file, which need not exist yet.
    pub(super) fn open(path: &Path, url: &str) -> Result<Self, CliError> {
        let kept = match std::fs::read(path) {
            Ok(bytes) => {
                let kept: Kept = serde_json::from_slice(&bytes).map_err(|error| {
                    CliError::usage(
                        format!("{} is no file of `ringback listen --state`: {error}", path.display()),
                        "name another file, or remove it to begin anew",
                    )
                })?;
                if kept.url != url {
                    return Err(CliError::usage(
                        format!("{} belongs to the server {}, not to {url}", path.display(), kept.url),
                        "give that server with --url, or name another file",
                    ));
                }
                Some(kept)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(source) => return Err(CliError::File { action: "read", path: path.to_owned(), source }),
        };
        Ok(Self { path: path.to_owned(), kept })
    }

    /// What the last run left.
    pub(super) fn kept(&self) -> Option<&Kept> {
        self.kept.as_ref()
    }

    /// Writes down a new webhook, or how far it was read.
    pub(super) fn keep(&mut self, kept: Kept) -> Result<(), CliError> {
        if self.kept.as_ref() != Some(&kept) {
            private_file::write(&self.path, &kept)?;
            self.kept = Some(kept);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_reads_back_and_stays_with_its_server() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("listen.json");
        let mut state = StateFile::open(&path, "http://a").unwrap();
        assert_eq!(state.kept(), None);
        let kept = Kept { url: "http://a".into(), webhook: "wh_1".into(), cursor: "c".into() };
        state.keep(kept.clone()).unwrap();
        assert_eq!(StateFile::open(&path, "http://a").unwrap().kept(), Some(&kept));
        let other = StateFile::open(&path, "http://b").unwrap_err().to_string();
        assert!(other.contains("http://a") && other.contains("http://b"), "{other}");
        std::fs::write(&path, "no JSON").unwrap();
        assert!(StateFile::open(&path, "http://a").is_err());
    }
}
