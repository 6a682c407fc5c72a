//! Events that are no transition of a job or batch: they own their deliveries, with seq 1.
//!
//! Whoever writes the fact calls [`emit`] in the same transaction and announces what it answers after the commit,
//! exactly as the deliveries of a transition. What nobody is owed leaves no row.

use bytes::Bytes;
use ringback_contracts::v1;
use ringback_domain::{
    EndpointId, ProjectId, TimestampMs,
    event::{Candidates, event_id},
    target::{FORMAT_RUNFLOW, WebhookFormat},
    webhook::{body::Body, envelope},
};
use sea_orm::Value;
use uuid::Uuid;

use crate::{
    StoreError, WriteTx,
    deliveries::{body_to_wire, insert_deliveries},
    sql,
    webhooks::{EventFacts, Webhook},
};

/// `deliveries.seq` of every event.
const SEQ: u32 = 1;

/// Who may hear of an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Audience {
    /// Every webhook whose filter matches.
    #[default]
    Matching,
    /// Every one whose filter matches but this.
    MatchingBut {
        /// Key of the webhook.
        webhook: u32,
    },
    /// This one, whatever its filter says, even while it is paused or disabled.
    Only {
        /// Key of the webhook.
        webhook: u32,
    },
}

/// Something that happened.
#[derive(Clone, Debug)]
pub struct NewEvent<'a> {
    /// Its key: see [`ringback_domain::event::event_key`]. Drawn before the transaction, so that it stays the same
    /// however often the transaction is tried.
    pub id: Uuid,
    /// Owner.
    pub project: ProjectId,
    /// Its names, the more precise one first.
    pub names: Candidates,
    /// What it is about: id of a job, batch, artefact, webhook or delivery.
    pub subject: &'a str,
    /// The endpoint that it belongs to.
    pub endpoint: Option<EndpointId>,
    /// Metadata of the job or batch, an object.
    pub metadata: Option<&'a serde_json::Value>,
    /// `data` of the envelope: one JSON object.
    pub data: Body,
    /// Who may hear of it.
    pub audience: Audience,
    /// The trace that its POSTs belong to.
    pub traceparent: Option<&'a str>,
}

/// Inserts the event and what is owed for it. Answers the deliveries; empty, and without a row, where nobody is owed
/// anything, and empty where an event of this id exists: it was told before.
///
/// # Errors
/// The database's.
pub async fn emit(
    tx: &WriteTx,
    partitions: u16,
    event: NewEvent<'_>,
) -> Result<Vec<v1::Delivery>, StoreError> {
    let registry = tx.registry().await?;
    let facts = EventFacts {
        names: event.names,
        runflow: None,
        endpoint: event.endpoint,
        metadata: event.metadata,
        now_ms: tx.now_ms(),
    };
    let deliver = |webhook: &Webhook, name, body: Body| v1::Delivery {
        owner_id: Bytes::copy_from_slice(event.id.as_bytes()),
        seq: SEQ,
        target: webhook.target(),
        project_id: event.project.0,
        url: webhook.url.clone().unwrap_or_default(),
        terminal: ringback_domain::event::EventType::is_terminal(name),
        event: name.code(),
        body: Some(body_to_wire(body)),
        created_at_ms: tx.now_ms(),
        traceparent: event.traceparent.unwrap_or_default().to_owned(),
        run: 1,
        // A test of a Runflow receiver, whose verifier reads nothing but its own header.
        format: if webhook.format == WebhookFormat::Runflow { FORMAT_RUNFLOW } else { 0 },
        ..v1::Delivery::default()
    };
    let id = event_id(event.id, SEQ);
    let told = |name| envelope::standard(&id, name, TimestampMs(tx.now_ms()), event.data.clone());
    let deliveries: Vec<v1::Delivery> = match event.audience {
        Audience::Only { webhook } => registry
            .webhook(webhook)
            .filter(|w| w.project == event.project)
            .zip(event.names.iter().next())
            .map(|(w, name)| deliver(w, name, told(name)))
            .into_iter()
            .collect(),
        Audience::Matching | Audience::MatchingBut { .. } => {
            let but = match event.audience {
                Audience::MatchingBut { webhook } => Some(webhook),
                Audience::Matching | Audience::Only { .. } => None,
            };
            registry
                .matching(event.project, facts)
                .filter(|(_, w, _)| Some(w.id) != but)
                .map(|(_, w, name)| deliver(w, name, told(name)))
                .collect()
        }
    };
    let told = insert_owned(tx, partitions, event.id.as_bytes(), event.subject, &deliveries).await?;
    Ok(if told { deliveries } else { Vec::new() })
}

/// Inserts deliveries that nobody but the event `owner` owns, with the row that counts them (P5). Answers false, and
/// inserts nothing, where there are none or an event of this id exists: it was told before.
///
/// # Errors
/// The database's.
pub async fn insert_owned(
    tx: &WriteTx,
    partitions: u16,
    owner: &[u8; 16],
    subject: &str,
    deliveries: &[v1::Delivery],
) -> Result<bool, StoreError> {
    let Some(first) = deliveries.first() else { return Ok(false) };
    let made = sql::execute(
        tx.conn(),
        "INSERT INTO events (id, project_id, type, subject, created_at_ms, owed) VALUES ($1, $2, $3, $4, $5, $6) \
         ON CONFLICT (id) DO NOTHING",
        [
            sql::id(owner),
            Value::from(first.project_id),
            sql::int(first.event),
            Value::from(subject),
            Value::from(tx.now_ms()),
            sql::int(deliveries.len()),
        ],
    )
    .await?;
    if made == 0 {
        return Ok(false);
    }
    insert_deliveries(tx, partitions, deliveries).await?;
    Ok(true)
}
