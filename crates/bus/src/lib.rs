//! NATS JetStream as Ringback uses it: subjects, streams, consumers, pulls, request/reply.
//!
//! The broker is rebuildable (P6): nothing here is the only copy of a fact. Every publish, request and
//! acknowledgement may be repeated by its sender.

mod announce;
mod api;
mod connection;
mod consumers;
mod error;
mod gap;
mod messages;
mod publisher;
mod puller;
mod requests;
mod streams;
mod subjects;

pub use announce::{Announcement, Announcements, DeliveryAnnouncer};
pub use connection::{Bus, Connectivity};
pub use consumers::{ConsumerDepth, ConsumerSettings};
pub use error::BusError;
pub use gap::{GapTracker, Seen};
pub use messages::JobPage;
pub use publisher::{JobPublisher, Publication, PublishFailure, PublishOutcome};
pub use puller::{Acker, JobDelivery, JobPuller, PullCredits, PullSource, PullerSettings};
pub use requests::{Request, Requests};
pub use streams::StreamState;
pub use subjects::{JobSubject, Lane, Subjects, Verb};
