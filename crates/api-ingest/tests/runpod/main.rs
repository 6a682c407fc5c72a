//! RunPod's client surface against the real tracker: waits, streams, cancel, retry, purge, keys, bad input.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;

mod answers;
mod streams;
mod waits;
