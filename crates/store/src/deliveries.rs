//! Deliveries: what is owed to receivers, with its bytes (P4).
//!
//! Whoever writes a transition inserts its deliveries in the same transaction ([`insert_deliveries`]) and announces
//! the same messages afterwards on `rb.<install>.dl.<partition>`. Only the webhook-dispatcher changes rows (P8).

mod count;
mod load;
mod record;
mod timings;
mod view;

use bytes::Bytes;
use prost::Message as _;
use ringback_contracts::v1;
use ringback_domain::batch::BatchStatus;
use ringback_domain::event::EventType;
use ringback_domain::target::Target;
use ringback_domain::webhook::body::{Body, Part};
use ringback_domain::{BatchId, JobId, JobStatus, ProjectId, TimestampMs};
use sea_orm::Value;

pub use count::{DeliveryCounts, delivery_counts, delivery_counts_between, delivery_counts_of};
pub use load::{DueAfter, DuePage, Stored, due_page, due_page_but, stored_of, target_page};
pub use record::{Claim, FailedAttempt, Outcome, Recorded, record_outcomes};
pub use timings::Timings;
pub use view::{AttemptView, DeliveryView, attempts_of, deliveries_of, pending_age_ms};

use crate::{
    StoreError, WriteTx,
    sql::{self, Rows},
};

/// What `deliveries.event` of a batch's end begins with; the code of the batch's status follows.
pub const BATCH_EVENT_BASE: u32 = 100;

/// Where a delivery stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeliveryState {
    /// Owed.
    Pending,
    /// The receiver acknowledged it.
    Delivered,
    /// Given up: no try is left, or the receiver said that it is gone.
    Dead,
    /// Not an end, still waiting when the end came, and therefore not sent any more.
    Superseded,
    /// Taken back by a person.
    Cancelled,
}

impl DeliveryState {
    /// Every state, in the order of [`Self::code`].
    pub const ALL: [Self; 5] =
        [Self::Pending, Self::Delivered, Self::Dead, Self::Superseded, Self::Cancelled];

    /// Number used in SQL. The partial index of pending rows relies on 0.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Pending => 0,
            Self::Delivered => 1,
            Self::Dead => 2,
            Self::Superseded => 3,
            Self::Cancelled => 4,
        }
    }

    /// Reads [`Self::code`] back.
    #[must_use]
    pub fn from_code(code: i64) -> Option<Self> {
        usize::try_from(code).ok().and_then(|i| Self::ALL.get(i).copied())
    }

    /// The word in views, metrics and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Delivered => "delivered",
            Self::Dead => "dead",
            Self::Superseded => "superseded",
            Self::Cancelled => "cancelled",
        }
    }
}

/// The word of an event for views and metrics: `job.completed`, `batch.failed`, ….
#[must_use]
pub fn event_name(event: u32) -> &'static str {
    EventType::from_code(event).map_or("unknown", EventType::name)
}

/// What the transitions of one job say about its deliveries.
#[derive(Clone, Copy, Debug)]
pub struct JobTransition<'a> {
    /// The job.
    pub job: JobId,
    /// Its owner.
    pub project: ProjectId,
    /// `jobs.seq` after the transition.
    pub seq: u32,
    /// Its run.
    pub run: u32,
    /// The state that was entered.
    pub status: JobStatus,
    /// When, on the database's clock.
    pub at: TimestampMs,
    /// The trace that the POST belongs to.
    pub traceparent: Option<&'a str>,
}

/// The delivery that `target` is owed for a transition. The caller asks `target.scope.wants(status)` first and makes
/// the body with `domain::webhook::body::of_transition`.
#[must_use]
pub fn job_delivery(of: &JobTransition<'_>, index: u32, target: &Target, body: Body) -> v1::Delivery {
    v1::Delivery {
        owner_id: Bytes::copy_from_slice(of.job.as_bytes()),
        seq: of.seq,
        target: index,
        project_id: of.project.0,
        url: target.url.clone(),
        terminal: of.status.is_terminal(),
        event: u32::from(of.status.code()),
        body: Some(body_to_wire(body)),
        created_at_ms: of.at.0,
        traceparent: of.traceparent.unwrap_or_default().to_owned(),
        run: of.run,
        format: target.delivery_format(),
        ..v1::Delivery::default()
    }
}

/// The one delivery of a batch's end.
#[must_use]
#[expect(clippy::too_many_arguments, reason = "each is a column, and there is one caller")]
pub fn batch_delivery(
    batch: BatchId,
    project: ProjectId,
    seq: u32,
    status: BatchStatus,
    url: &str,
    body: Body,
    at: TimestampMs,
    traceparent: Option<&str>,
) -> v1::Delivery {
    v1::Delivery {
        owner_id: Bytes::copy_from_slice(batch.as_bytes()),
        seq,
        target: 0,
        project_id: project.0,
        url: url.to_owned(),
        terminal: true,
        event: BATCH_EVENT_BASE + u32::from(status.code()),
        body: Some(body_to_wire(body)),
        created_at_ms: at.0,
        traceparent: traceparent.unwrap_or_default().to_owned(),
        run: 1,
        ..v1::Delivery::default()
    }
}

/// A body in the form in which it is stored and sent.
#[must_use]
pub fn body_to_wire(body: Body) -> v1::BodyParts {
    let parts = body
        .into_parts()
        .into_iter()
        .map(|part| match part {
            Part::Inline(bytes) => v1::BodyPart {
                size_bytes: bytes.len() as u64,
                part: Some(v1::body_part::Part::Inline(bytes.into())),
            },
            Part::Blob { key, size_bytes } => {
                v1::BodyPart { size_bytes, part: Some(v1::body_part::Part::BlobKey(key)) }
            }
        })
        .collect();
    v1::BodyParts { parts }
}

const INSERT: Rows = Rows {
    name: "deliveries.insert",
    before: "INSERT INTO deliveries (owner_id, seq, target, partition, project_id, event, terminal, url, body, \
             body_target, format, position, state, attempts, created_at_ms, next_attempt_at_ms) VALUES ",
    casts: &[""; 16],
    after: " ON CONFLICT (owner_id, seq, target) DO NOTHING",
};

/// Inserts the deliveries of transitions, in the transaction that writes these transitions. A delivery that exists
/// is left as it is: there is never a second one, and its bytes never change (P4). Answers how many are new.
///
/// Bodies are stored once: of the deliveries of one transition that stand together, those with equal bytes refer to
/// the first of them (`body_target`).
///
/// # Errors
/// The database's, and a corrupt owner id.
pub async fn insert_deliveries(
    tx: &WriteTx,
    partitions: u16,
    deliveries: &[v1::Delivery],
) -> Result<u64, StoreError> {
    if deliveries.is_empty() {
        return Ok(0);
    }
    if deliveries.iter().any(|d| d.owner_id.len() != 16 || d.body.is_none()) {
        return Err(StoreError::corrupt("delivery without owner or body"));
    }
    let position = tx.position().await?;
    let rows = share_bodies(deliveries);
    INSERT
        .execute(tx.conn(), &rows, |(d, body_target), v| {
            let body = match body_target {
                None => d.body.as_ref().map(v1::BodyParts::encode_to_vec).unwrap_or_default(),
                Some(_) => Vec::new(),
            };
            v.extend([
                Value::from(d.owner_id.to_vec()),
                sql::int(d.seq),
                sql::int(d.target),
                sql::int(partition_of(&d.owner_id, partitions)),
                Value::from(d.project_id),
                sql::int(d.event),
                sql::int(u8::from(d.terminal)),
                Value::from(d.url.as_str()),
                Value::from(body),
                sql::opt_int(*body_target),
                sql::int(d.format),
                Value::from(position),
                sql::int(DeliveryState::Pending.code()),
                sql::int(0_u8),
                Value::from(d.created_at_ms),
                Value::from(d.created_at_ms),
            ]);
        })
        .await
}

/// Each delivery with the target whose row holds its bytes, where that is another one.
fn share_bodies(deliveries: &[v1::Delivery]) -> Vec<(&v1::Delivery, Option<u32>)> {
    let mut rows: Vec<(&v1::Delivery, Option<u32>)> = Vec::with_capacity(deliveries.len());
    for d in deliveries {
        let same = rows
            .iter()
            .rev()
            .take_while(|(o, _)| o.seq == d.seq && o.owner_id == d.owner_id)
            .find(|(o, at)| at.is_none() && o.body == d.body)
            .map(|(o, _)| o.target);
        rows.push((d, same));
    }
    rows
}

/// The partition of a job's or batch's deliveries; equal to `JobId::partition`.
#[must_use]
pub fn partition_of(owner_id: &[u8], partitions: u16) -> u16 {
    u16::from(owner_id.last().copied().unwrap_or_default()) % partitions.max(1)
}
