//! The only way platform code dials a URL that came from outside.
//!
//! A [`Client`] belongs to one role (webhooks, downloads, …) with its own policy. It promises:
//! - Only addresses that the policy allows are dialled. Literal addresses are judged before dialling; names are
//!   resolved by our own resolver inside the connector, which hands on only the answers that passed, so there is no
//!   gap between check and use for a name server that changes its mind.
//! - No redirect of a POST is followed; each hop of a download is judged like its first URL. No proxy is taken from
//!   the environment.
//! - One deadline covers resolving, connecting, sending and waiting for the answer; the answer's body is read up to a
//!   cap and for a short while only.
//! - Errors are typed and never hold the URL, whose query may be a secret.

mod client;
mod config;
mod download;
mod error;
mod get;
mod judge;
mod resolver;
mod timings;
mod upload;

pub use client::{Answer, BuildError, CheckedUrl, Client, Limits, Post, Posted};
pub use config::{ConfigError, only, webhook_policy};
pub use download::{Download, MAX_REDIRECTS};
pub use error::EgressError;
pub use get::Whole;
pub use resolver::{Lookup, SystemLookup};
pub use timings::{Permit, Timings};
