//! What can go wrong on the bus, split by whether trying again helps.

/// A failed bus operation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Nobody answers this subject now: the service is not running, or the stream or consumer does not exist.
    #[error("nobody answers {subject}")]
    NoResponders {
        /// The subject asked.
        subject: String,
    },
    /// No answer in time. The request may or may not have been worked on.
    #[error("no answer on {subject} within {timeout_ms} ms")]
    Timeout {
        /// The subject asked.
        subject: String,
        /// The time waited.
        timeout_ms: u64,
    },
    /// No connection to NATS; nothing was sent.
    #[error("not connected to NATS")]
    Disconnected,
    /// Another failure that may pass.
    #[error("NATS: {0}")]
    Transient(String),
    /// A stream that does not exist.
    #[error("stream {stream} does not exist")]
    StreamMissing {
        /// Name of the stream.
        stream: String,
    },
    /// Trying the same again cannot help.
    #[error("NATS: {0}")]
    Permanent(String),
}

impl BusError {
    /// Whether the same call may succeed later without anybody changing it.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::NoResponders { .. }
            | Self::Timeout { .. }
            | Self::Disconnected
            | Self::Transient(_)
            | Self::StreamMissing { .. } => true,
            Self::Permanent(_) => false,
        }
    }
}
