//! Harnesses for tests: real nats-server, real databases, real processes, a counting receiver. Development only.
//!
//! Nothing here is a stand-in: [`nats::NatsServer`] and [`postgres::Postgres`] are the real programs,
//! [`stack::Stack`] is the real `ringback` binary in one or in several processes, [`receiver::Receiver`] is an HTTP
//! server that counts what arrives. Everything is asked and looked at from outside.
//!
//! A failed harness step panics: in a test that is the report.
// Panics of this crate are test failures, never user paths.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::missing_panics_doc)]

pub mod books;
pub mod client;
pub mod events;
pub mod files;
pub mod forwarder;
pub mod hostile;
pub mod nats;
pub mod postgres;
pub mod process;
pub mod receiver;
pub mod schema;
pub mod signature;
pub mod sql;
pub mod stack;
pub mod tools;
pub mod wait;
