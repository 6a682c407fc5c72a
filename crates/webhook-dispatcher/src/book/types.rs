//! What goes into the book and what comes out of it.

use std::sync::Arc;

use ringback_contracts::v1;
use ringback_domain::event::EventType;
use ringback_domain::webhook::message_id;
use ringback_domain::webhook::response::{Profile, Verdict};
use ringback_domain::webhook::schedule::Schedule;
use ringback_store::deliveries::{DeliveryState, FailedAttempt, Timings};
use uuid::Uuid;

use super::gates::{Flow, GateLimits, Place};

/// One job (or batch) and one of its targets: the unit of order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ChainKey {
    pub owner: Uuid,
    pub target: u32,
}

impl ChainKey {
    /// The `webhook-id` of one of its deliveries: what log lines name it by.
    pub(crate) fn webhook_id(&self, seq: u32) -> String {
        message_id(self.owner, u64::from(seq), self.target)
    }
}

/// How a target wants to be served.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Rules {
    /// Which answers acknowledge.
    pub profile: Profile,
    /// When to try again.
    pub schedule: Schedule,
    /// Nothing is superseded, everything climbs the whole ladder.
    pub strict_order: bool,
}

/// A delivery's unchanging part, until it is replayed.
#[derive(Debug)]
pub(crate) struct Owed {
    pub key: ChainKey,
    pub seq: u32,
    pub terminal: bool,
    pub event: u32,
    /// What the body is: see `deliveries.format`.
    pub format: u32,
    /// Empty for a registered webhook: its URL is the one it has when it is sent to.
    pub url: String,
    pub body: v1::BodyParts,
    pub traceparent: String,
    pub created_at_ms: i64,
    /// How often it was asked for again.
    pub replays: u32,
    /// Tries before that: they do not count for its schedule.
    pub attempts_before: u32,
    pub place: Place,
    pub rules: Arc<Rules>,
}

impl Owed {
    /// The job whose transition it tells, for log lines.
    pub(crate) fn job_id(&self) -> Option<Uuid> {
        EventType::from_code(self.event).filter(|event| event.is_transition_of_job()).map(|_| self.key.owner)
    }

    pub(super) fn bytes(&self) -> usize {
        let body: usize = self
            .body
            .parts
            .iter()
            .map(|part| match &part.part {
                Some(v1::body_part::Part::Inline(bytes)) => bytes.len(),
                Some(v1::body_part::Part::BlobKey(key)) => key.len(),
                None => 0,
            })
            .sum();
        // Structure, maps and queues beside it.
        body + self.url.len() + self.traceparent.len() + 400
    }
}

/// Whether anything may be sent to a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Yes.
    Live,
    /// Not now: it is paused, or not known yet. What is owed stays in SQL.
    Held,
    /// Never more: what is owed ends in this state, for this reason.
    Ended(DeliveryState, &'static str),
}

/// A delivery offered to the book.
#[derive(Debug)]
pub(crate) struct Offered {
    pub owed: Owed,
    pub standing: Standing,
    /// It tells of an attempt that is over.
    pub overtaken: bool,
    pub attempts: u32,
    pub due_at_ms: i64,
    pub source: Source,
}

/// Where an offer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// Announced after a commit, with the run of the job. Lower ones may not have arrived yet.
    Announced { run: u32 },
    /// Read from SQL together with all others of its job.
    Read,
}

/// What became of an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offer {
    /// It is in memory now, or was settled at once.
    Taken,
    /// It was there already.
    Known,
    /// Its target has no room, or takes nothing now; it stays in SQL.
    Deferred,
    /// Memory is full; it stays in SQL.
    Full,
}

/// A try to make.
#[derive(Debug, Clone)]
pub(crate) struct Flight {
    pub owed: Arc<Owed>,
    /// Number of this try, from 1.
    pub n: u32,
}

/// How a try ended.
#[derive(Debug, Clone)]
pub(crate) struct Tried {
    pub verdict: Verdict,
    pub flow: Flow,
    pub began_at_ms: i64,
    pub duration_ms: u64,
    pub status: Option<u16>,
    /// Details for people beside the reason.
    pub detail: Option<String>,
    pub address: Option<String>,
    pub response: Option<Vec<u8>>,
    /// Where the duration went.
    pub timings: Timings,
}

/// What a try says about its receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sign {
    /// It acknowledges.
    Works,
    /// It does not.
    Fails,
    /// It said 410.
    Gone,
}

/// A delivery's new state, to be written down.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Change {
    pub key: ChainKey,
    pub seq: u32,
    pub state: DeliveryState,
    pub attempts: u32,
    pub next_attempt_at_ms: Option<i64>,
    pub ended_at_ms: Option<i64>,
    pub last_status: Option<u16>,
    pub last_error: Option<String>,
    pub failed: Option<FailedAttempt>,
    /// How long the try that succeeded took, where that time went, who answered, and the beginning of what.
    pub duration_ms: Option<u64>,
    pub timings: Timings,
    pub address: Option<String>,
    pub response: Option<Vec<u8>>,
    /// Which life of the delivery this is about.
    pub replays: u32,
    pub project: i64,
    pub event: u32,
    /// What the try said about the receiver, if there was one.
    pub sign: Option<Sign>,
    /// It ends because its webhook takes nothing more: true only while SQL says so too.
    pub by_standing: bool,
    /// For metrics: when it was owed.
    pub created_at_ms: i64,
}

/// Sizes and rules of a book.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BookLimits {
    pub gates: GateLimits,
    pub held: usize,
    pub bytes: usize,
    pub retry_after_cap_ms: u64,
}
