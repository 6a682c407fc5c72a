//! Messages on the wire between services: prost types generated from `proto/`, and checked conversions to and
//! from the domain.
//!
//! Every message that is stored or may meet another release carries a `version`; see [`VERSION`].

pub mod catalogue;
mod convert;
mod endpoints;

/// The generated types of `proto/ringback/v1`.
#[allow(
    missing_docs,
    clippy::pedantic,
    clippy::doc_markdown,
    reason = "generated code; the docs are in proto/"
)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/ringback.v1.rs"));
}

pub use convert::{
    ContractError, attempt_of, attempt_to_wire, batch_id_of, completion_of, completion_to_wire,
    history_append, history_of, job_id_of, payload_of, read_version, targets_of, targets_to_bytes,
};
pub use endpoints::{EndpointFacts, EndpointKey, endpoint_facts_of, endpoint_names_of};
pub use prost::Message;

/// Version that this release writes. It reads this one and the one before.
pub const VERSION: u32 = 1;

/// Payloads up to this size travel and are stored inline; larger ones go to a blob.
pub const INLINE_MAX_BYTES: usize = 256 * 1024;
