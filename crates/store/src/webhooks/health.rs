//! What the dispatcher finds out about registered webhooks, and the notices of it.
//!
//! Only the dispatcher writes `webhook_health` (P8). A webhook that said 410, or that has only failed for days, is
//! disabled in the transaction that records the try which showed it, together with the event that tells of it: a
//! crash loses neither, and a restart does not move the moment, because the beginning of the failures lies in SQL.

use std::collections::HashMap;

use ringback_contracts::v1;
use ringback_domain::{
    EndpointId, ProjectId, TimestampMs,
    event::{Candidates, EventType},
    target::registered_webhook,
    webhook::{body::Body, message_id},
};
use sea_orm::Value;
use serde_json::json;
use uuid::Uuid;

use super::{bump_registry, registry::parse_metadata};
use crate::{
    StoreError, WriteTx,
    events::{Audience, NewEvent, emit},
    sql::{self, LIST, Rows},
};

/// Why a webhook was disabled, as it is stored and told.
pub const REASON_GONE: &str = "gone_410";
/// The other reason: nothing but failures for the operator's time.
pub const REASON_FAILING: &str = "only_failures";

/// What the tries of one commit say about a webhook.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sighting {
    /// Its key.
    pub webhook: u32,
    /// Whether it acknowledged one.
    pub worked: bool,
    /// Whether it said 410.
    pub gone: bool,
    /// Key of the event that may follow, drawn before the transaction.
    pub event: Uuid,
}

const WORKED: Rows = Rows {
    name: "webhook_health.worked",
    before: "INSERT INTO webhook_health (webhook_id, last_success_at_ms) VALUES ",
    casts: &["", ""],
    // Written when it ends a time of failures, else about once a minute.
    after: " ON CONFLICT (webhook_id) DO UPDATE SET last_success_at_ms = excluded.last_success_at_ms, \
            failing_since_ms = NULL WHERE webhook_health.failing_since_ms IS NOT NULL \
            OR COALESCE(webhook_health.last_success_at_ms, 0) < excluded.last_success_at_ms - 60000",
};

const FAILED: Rows = Rows {
    name: "webhook_health.failed",
    before: "INSERT INTO webhook_health (webhook_id, failing_since_ms) VALUES ",
    casts: &["", ""],
    after: " ON CONFLICT (webhook_id) DO UPDATE SET failing_since_ms = excluded.failing_since_ms \
            WHERE webhook_health.failing_since_ms IS NULL",
};

/// Writes down what tries say about webhooks, and disables those that are to be: at once after a 410, or when nothing
/// was acknowledged for `disable_after_ms` (`None` = never). Answers the deliveries of `webhook.disabled`, to be
/// announced after the commit.
///
/// # Errors
/// The database's.
pub async fn sighted(
    tx: &WriteTx,
    partitions: u16,
    sightings: &[Sighting],
    disable_after_ms: Option<u64>,
) -> Result<Vec<v1::Delivery>, StoreError> {
    if sightings.is_empty() {
        return Ok(Vec::new());
    }
    let registry = tx.registry().await?;
    // A webhook that is disabled already, or gone, has no health; a late answer of before says nothing about it.
    let mut live: Vec<&Sighting> =
        sightings.iter().filter(|s| registry.webhook(s.webhook).is_some_and(|w| !w.disabled)).collect();
    // Everybody locks in one order.
    live.sort_by_key(|s| s.webhook);
    let (worked, failed): (Vec<&Sighting>, Vec<&Sighting>) = live.iter().partition(|s| s.worked && !s.gone);
    let now = tx.now_ms();
    let row = |s: &&Sighting, v: &mut Vec<Value>| v.extend([sql::int(s.webhook), Value::from(now)]);
    WORKED.execute(tx.conn(), &worked, row).await?;
    FAILED.execute(tx.conn(), &failed, row).await?;
    let mut told = Vec::new();
    for sighting in failed {
        let Some(webhook) = registry.webhook(sighting.webhook) else { continue };
        let before_ms = match disable_after_ms {
            _ if sighting.gone => i64::MAX,
            Some(after_ms) => now.saturating_sub_unsigned(after_ms),
            None => continue,
        };
        let reason = if sighting.gone { REASON_GONE } else { REASON_FAILING };
        // The epoch is read by this very statement: enabling it meanwhile begins another life.
        let row = sql::query_one(
            tx.conn(),
            "UPDATE webhook_health SET disabled_epoch = $2, disabled_at_ms = $3, disabled_reason = $4, \
             failing_since_ms = NULL, last_failing_since_ms = failing_since_ms \
             WHERE webhook_id = $1 AND failing_since_ms <= $5 \
             AND (disabled_epoch IS NULL OR disabled_epoch <> $2) \
             AND EXISTS (SELECT 1 FROM webhooks w WHERE w.id = $1 AND w.enable_epoch = $2) \
             RETURNING last_success_at_ms, last_failing_since_ms",
            [
                sql::int(sighting.webhook),
                Value::from(webhook.enable_epoch),
                Value::from(tx.now_ms()),
                Value::from(reason),
                Value::from(before_ms),
            ],
        )
        .await?;
        let Some(row) = row else { continue };
        let (last_success, since): (Option<i64>, i64) = (row.try_get_by_index(0)?, row.try_get_by_index(1)?);
        bump_registry(tx).await?;
        tracing::warn!(webhook = webhook.public_id, reason, "a webhook was disabled");
        let data = json!({
            "webhook_id": webhook.public_id,
            "reason": reason,
            "disabled_at": TimestampMs(tx.now_ms()).rfc3339(),
            "failing_since": TimestampMs(since).rfc3339(),
            "last_success_at": last_success.map(|at| TimestampMs(at).rfc3339()),
        });
        let event = NewEvent {
            id: sighting.event,
            project: webhook.project,
            names: Candidates::one(EventType::WebhookDisabled),
            subject: &webhook.public_id,
            endpoint: None,
            metadata: None,
            data: Body::of_json(data.to_string().into_bytes()),
            audience: Audience::MatchingBut { webhook: sighting.webhook },
            traceparent: None,
        };
        told.extend(emit(tx, partitions, event).await?);
    }
    Ok(told)
}

/// A delivery that was given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// Job, batch or event.
    pub owner: Uuid,
    /// Place among its transitions.
    pub seq: u32,
    /// Which target.
    pub target: u32,
    /// Whose.
    pub project: i64,
    /// What it told: an event's code.
    pub event: u32,
    /// Tries made.
    pub attempts: u32,
    /// When it was owed.
    pub created_at_ms: i64,
    /// Status of the last answer.
    pub last_status: Option<u16>,
    /// Why the last try failed.
    pub last_error: Option<String>,
    /// Key of the event that follows, drawn before the transaction.
    pub id: Uuid,
}

const OWNERS: Rows = Rows {
    name: "webhook_health.owners",
    before: "SELECT id, endpoint_id, metadata FROM jobs WHERE id IN (",
    casts: LIST,
    after: ")",
};

/// Tells of deliveries that were given up, in the transaction that gives them up. Nobody is told that a notice of a
/// death has died, and no webhook of its own. Answers the deliveries of `delivery.dead`.
///
/// # Errors
/// The database's.
pub async fn died(tx: &WriteTx, partitions: u16, deaths: &[&Death]) -> Result<Vec<v1::Delivery>, StoreError> {
    let registry = tx.registry().await?;
    let deaths: Vec<&&Death> = deaths
        .iter()
        .filter(|d| d.event != EventType::DeliveryDead.code() && registry.listens(ProjectId(d.project)))
        .collect();
    if deaths.is_empty() {
        return Ok(Vec::new());
    }
    let rows = OWNERS.query(tx.conn(), &deaths, |d, v| v.push(sql::id(d.owner.as_bytes()))).await?;
    let mut jobs: HashMap<Uuid, (EndpointId, Option<Vec<u8>>)> = HashMap::with_capacity(rows.len());
    for row in &rows {
        let id = Uuid::from_slice(&row.try_get_by_index::<Vec<u8>>(0)?)
            .map_err(|_| StoreError::corrupt("jobs.id"))?;
        jobs.insert(id, (EndpointId(row.try_get_by_index(1)?), row.try_get_by_index(2)?));
    }
    let mut told = Vec::new();
    for death in deaths {
        let registered = registered_webhook(death.target);
        let webhook = registered.and_then(|id| registry.webhook(id));
        let job = jobs.get(&death.owner);
        let metadata = parse_metadata(job.and_then(|(_, metadata)| metadata.as_deref()));
        let delivery = message_id(death.owner, u64::from(death.seq), death.target);
        let mut data = json!({
            "delivery_id": delivery,
            "webhook_id": webhook.map(|w| w.public_id.as_str()),
            "event": crate::deliveries::event_name(death.event),
            "attempts": death.attempts,
            "last_status": death.last_status,
            "last_error": death.last_error,
            "created_at": TimestampMs(death.created_at_ms).rfc3339(),
            "given_up_at": TimestampMs(tx.now_ms()).rfc3339(),
        });
        if job.is_some() {
            data["job_id"] = json!(ringback_contracts::job_id_of(death.owner.as_bytes())?.to_string());
        }
        let event = NewEvent {
            id: death.id,
            project: ProjectId(death.project),
            names: Candidates::one(EventType::DeliveryDead),
            subject: &delivery,
            endpoint: job.map(|(endpoint, _)| *endpoint),
            metadata: metadata.as_ref(),
            data: Body::of_json(data.to_string().into_bytes()),
            audience: registered.map_or(Audience::Matching, |webhook| Audience::MatchingBut { webhook }),
            traceparent: None,
        };
        told.extend(emit(tx, partitions, event).await?);
    }
    Ok(told)
}
