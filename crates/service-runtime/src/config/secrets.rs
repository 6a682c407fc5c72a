//! Secrets given inline, by an environment variable or by a file.

use crate::Redacted;
use std::path::{Path, PathBuf};

/// Why a secret could not be read. Never carries the secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The environment variable is unset, empty or not UTF-8.
    #[error("{key}: environment variable {variable} is not set or empty")]
    Env {
        /// Configuration key.
        key: String,
        /// Name of the variable.
        variable: String,
    },
    /// The file could not be read.
    #[error("{key}: cannot read {path}: {source}")]
    File {
        /// Configuration key.
        key: String,
        /// Path of the file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The value does not have the form it must have.
    #[error("{key}: {detail}")]
    Form {
        /// Configuration key.
        key: String,
        /// What is wrong, without the value.
        detail: String,
    },
}

/// The ways a secret may be given. Validation has made sure that at most one is set.
pub(super) struct SecretSource<'a> {
    pub(super) value: Option<&'a Redacted<String>>,
    pub(super) env: Option<&'a str>,
    pub(super) file: Option<&'a Path>,
}

impl SecretSource<'_> {
    pub(super) fn resolve(&self, key: &str) -> Result<Option<Redacted<String>>, SecretError> {
        if let Some(value) = self.value {
            return Ok(Some(value.clone()));
        }
        if let Some(variable) = self.env {
            return match std::env::var(variable) {
                Ok(text) if !text.is_empty() => Ok(Some(Redacted::new(text))),
                _ => Err(SecretError::Env { key: key.to_owned(), variable: variable.to_owned() }),
            };
        }
        if let Some(path) = self.file {
            let text = std::fs::read_to_string(path).map_err(|source| SecretError::File {
                key: key.to_owned(),
                path: path.to_owned(),
                source,
            })?;
            // Secret files made by hand or by a mount usually end in a newline that is no part of the secret.
            return Ok(Some(Redacted::new(text.trim_end_matches(['\n', '\r']).to_owned())));
        }
        Ok(None)
    }
}
