//! Why a figure could not be measured.

use std::path::PathBuf;

/// A bench that cannot run. Lost jobs and wrong signatures are results, not errors of this type.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A file or folder could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A program could not be started.
    #[error("cannot start {program}: {source} ({hint})")]
    Start {
        /// The program as it was called.
        program: String,
        /// What the system said.
        source: std::io::Error,
        /// What the user can do.
        hint: &'static str,
    },
    /// A program ended or stayed silent before it was ready.
    #[error("{program} was not ready: {reason}\n{log}")]
    NotReady {
        /// The program.
        program: String,
        /// What was waited for.
        reason: String,
        /// The end of its log.
        log: String,
    },
    /// The server under test does not take jobs.
    #[error("POST {url} was refused: {reason}")]
    Refused {
        /// Where the job was sent.
        url: String,
        /// Status and body, or the transport error.
        reason: String,
    },
    /// A socket could not be opened or an HTTP exchange failed.
    #[error("HTTP to {address}: {reason}")]
    Http {
        /// Host and port.
        address: String,
        /// The transport error.
        reason: String,
    },
    /// The broker of the floor failed.
    #[error("NATS: {0}")]
    Nats(String),
    /// An option makes no sense.
    #[error("{option}: {reason}")]
    Option {
        /// The option.
        option: &'static str,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The operating system refused something else.
    #[error(transparent)]
    System(#[from] std::io::Error),
}

impl BenchError {
    /// An error about a path.
    pub fn file(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::File { path: path.into(), source }
    }
}
