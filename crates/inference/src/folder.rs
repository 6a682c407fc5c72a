//! Reading files of a model folder, with errors that name them.

use crate::error::LoadError;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use std::{fmt::Write, fs, io, path::Path};

/// No configuration file of a model is larger; tokenizer.json files of large vocabularies have about 20 MB.
pub(crate) const MOST_JSON_BYTES: u64 = 256 << 20;

/// The file's bytes.
pub(crate) fn bytes(path: &Path, most: u64) -> Result<Vec<u8>, LoadError> {
    let failed = |source: io::Error| {
        if source.kind() == io::ErrorKind::NotFound {
            LoadError::MissingFile { path: path.to_owned() }
        } else {
            LoadError::Read { path: path.to_owned(), source }
        }
    };
    let size = fs::metadata(path).map_err(failed)?.len();
    if size > most {
        let source = io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it has {size} bytes, at most {most} are read"),
        );
        return Err(LoadError::Read { path: path.to_owned(), source });
    }
    fs::read(path).map_err(failed)
}

/// The file's JSON.
pub(crate) fn json<T: DeserializeOwned>(path: &Path) -> Result<T, LoadError> {
    let text = bytes(path, MOST_JSON_BYTES)?;
    serde_json::from_slice(&text)
        .map_err(|error| LoadError::Config { path: path.to_owned(), detail: error.to_string() })
}

/// The file's JSON, or nothing if there is no such file.
pub(crate) fn optional_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, LoadError> {
    match json(path) {
        Ok(value) => Ok(Some(value)),
        Err(LoadError::MissingFile { .. }) => Ok(None),
        Err(other) => Err(other),
    }
}

/// Refuses bytes whose digest is not the expected one.
pub(crate) fn check_sha256(path: &Path, bytes: &[u8], expected: &str) -> Result<(), LoadError> {
    let mut found = String::with_capacity(64);
    for byte in Sha256::digest(bytes) {
        let _ = write!(found, "{byte:02x}");
    }
    if found.eq_ignore_ascii_case(expected.trim()) {
        return Ok(());
    }
    Err(LoadError::Hash { path: path.to_owned(), expected: expected.trim().to_owned(), found })
}
