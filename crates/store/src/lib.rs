//! SQL: one code base for SQLite and PostgreSQL, group commit, one function per question asked.
//!
//! P1 and P4 rest on this crate: what [`Store::write`] answered is committed to disk. Closures given to it hold no
//! transaction across anything but SQL (P7). Every query that serves a client takes the project from the key.

pub mod artifacts;
mod artifacts_held;
mod artifacts_view;
pub mod auth;
pub mod batches;
pub mod batches_fold;
pub mod blob_reservations;
pub mod books;
pub mod chunks_write;
mod counters;
pub mod cursors;
mod db;
pub mod deliveries;
pub mod delivery_search;
pub mod due;
pub mod endpoints;
mod error;
pub mod events;
pub mod feed;
pub mod inputs;
mod jobs;
mod live_cache;
pub mod observer;
pub mod partitions;
pub mod progress;
pub mod project_secrets;
pub mod quarantine;
pub mod replays;
pub mod replays_api;
pub mod results;
pub mod retention;
pub mod secrets;
pub mod sql;
mod start;
pub mod submit;
pub mod usage;
pub mod views;
pub mod webhooks;
pub mod workers;
mod writer;

pub use counters::{CounterDelta, EndpointCounts, add_counters, endpoint_counts, fold_counters};
pub use db::{Facts, Open, Store};
pub use error::StoreError;
pub use jobs::{JobRow, insert_jobs, lock_jobs, select_jobs, update_jobs};
pub use live_cache::{LockedJob, lock_jobs_to_decide, prove};
pub use sea_orm;
pub use writer::{Urgency, WriteTx};
