//! Runs jobs: fetches exactly as many as it has free slots, executes them, keeps each outcome until the
//! tracker has committed it, and acknowledges last.
//!
//! ```text
//! NATS ── message ──▶ endpoint loop ── work ──▶ executor (echo, sleep, encoder, process)
//!                        ▲    │                    │ started, progress, chunk, finished
//!            stop orders │    ▼                    ▼
//! tracker ◀── heartbeat, outcomes, chunks ── spool on disk
//!    └── committed ──▶ message acknowledged, spool record dropped
//! ```
//!
//! What this crate promises: an outcome reaches the tracker or waits on disk (P3); a message is acknowledged
//! only after the commit; a handler never outlives its worker; a job is never started while an earlier
//! handler of this host may still run it.

mod app;
mod artifacts;
mod attempts;
mod chunks;
mod device;
mod endpoint;
mod executor;
mod fatal;
pub mod guard;
mod heartbeat;
mod listen;
mod message;
mod nvml;
mod outcome;
mod prepare;
mod process;
mod shared;
pub mod spool;

pub use app::{App, ServedEndpoint, WorkerError, WorkerParts};
pub use device::{Device, DeviceChoice, DeviceError};
pub use executor::encoder::LoadFailed;
pub use process::{Served, ServedError, serve, served_endpoints};

/// For tests of this crate: the `process` executor on its own.
#[doc(hidden)]
pub mod testing {
    pub use crate::executor::process::{ProcessPool, ProcessSettings};
    pub use crate::executor::{End, ExecEvent, JobKey, Work};
}
