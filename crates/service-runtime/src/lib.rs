//! What every service needs to run: configuration, telemetry, health, metrics, shutdown, blobs, redaction.

pub mod blobs;
pub mod broker_child;
pub mod config;
pub mod crypto_provider;
pub mod data_dir;
pub mod fault;
pub mod host;
pub mod json;
pub mod listener;
pub mod metrics;
pub mod ops;
pub mod readiness;
mod redacted;
pub mod shutdown;
pub mod supervise;
pub mod telemetry;
pub mod time;
pub mod trace_context;

pub use config::RingbackConfig;
pub use host::{Host, ServeError};
pub use readiness::{Check, Readiness};
pub use redacted::{REDACTED, Redacted, redact_url};
pub use shutdown::Shutdown;
