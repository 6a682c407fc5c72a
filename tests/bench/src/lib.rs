//! Measures Ringback from outside, as its clients and receivers see it, and the floor of the machine beside it.
//!
//! `docs/PERFORMANCE.md` defines each figure.

pub mod board;
pub mod children;
pub mod client;
pub mod disk;
pub mod error;
pub mod floor;
pub mod instance;
pub mod load;
pub mod options;
pub mod postgres;
pub mod procs;
pub mod receiver;
pub mod report;
pub mod signature;
pub mod stats;
pub mod suite;
pub mod webhooks;

/// The name of this process in figures: generator and receiver together.
pub const BENCH: &str = "bench";
