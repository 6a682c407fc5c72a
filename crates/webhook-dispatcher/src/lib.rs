//! Owns deliveries: signs, sends, classifies, retries, records (DESIGN 6; P4, P8, P9).
//!
//! Deliveries are partitioned by job. One dispatcher owns a partition through a lease in SQL ([`mod@ownership`]), so
//! that order, in-flight caps and retries live in its memory ([`mod@book`]); whatever it wants to write proves the
//! lease. Announcements after a commit bring new deliveries with their bytes; pages read from SQL bring what was
//! missed, what did not fit into memory, and what has come due ([`mod@partition`]). A crash between a POST and its
//! record repeats the POST with the same id and the same bytes: at least once, never a second id.

mod app;
mod bodies;
mod book;
mod clock;
mod directory;
mod keyring;
mod lease;
mod meters;
mod notice;
mod ownership;
mod partition;
mod process;
mod replayer;
mod send;
mod settings;
mod shared;

pub use app::{App, AppError, Deps};
pub use process::serve;
