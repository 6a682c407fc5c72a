//! HTTP in: validates, stores once, publishes, answers after the commit.
//!
//! api-ingest inserts jobs with the deliveries of their first transition (P1, P4, P8); it changes no job afterwards.
//! Cancels, retries and purges are commands to the state-tracker. Surfaces: RunPod's `/v2` with OpenAI's below it,
//! the native `/v1`, batch templates of the configuration, health and metrics.

mod app;
mod auth;
mod batches;
mod body;
mod catalog;
mod disk;
mod error;
mod native;
mod openai;
mod process;
mod rate;
mod render;
mod routes;
mod runflow;
mod runpod;
mod state;
mod submit;
mod waiters;
mod workers;

pub use app::{App, AppError, Deps};
pub use process::serve;
