//! Pure heart of Ringback: ids, the job state machine, policies, webhook bodies and signatures.
//!
//! This crate has no clock, no randomness and no I/O: time and random bytes are arguments, effects are
//! values that the caller carries out after its commit. Whoever wants to know what can happen to a job
//! reads [`job`].

pub mod artifact;
pub mod batch;
pub mod capability;
pub mod event;
pub mod ids;
pub mod job;
pub mod policy;
pub mod status;
pub mod target;
pub mod time;
pub mod usage;
pub mod webhook;

pub use ids::{
    ArtifactId, AttemptRef, BatchId, EndpointId, IdError, JobId, Name, NameError, Nonce, ProjectId,
};
pub use status::JobStatus;
pub use time::TimestampMs;
