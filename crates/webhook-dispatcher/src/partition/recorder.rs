//! Writes outcomes down: many in one command that rides on somebody else's commit.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use ringback_contracts::v1;
use ringback_domain::event::event_key;
use ringback_domain::target::registered_webhook;
use ringback_service_runtime::fault;
use ringback_service_runtime::time::now_ms;
use ringback_store::deliveries::{Claim, DeliveryState, Outcome, record_outcomes};
use ringback_store::webhooks::health::{Death, Sighting, died, sighted};
use ringback_store::{StoreError, Urgency, WriteTx};
use uuid::Uuid;

use crate::book::{Change, Sign};
use crate::shared::Shared;

/// Outcomes gather this long.
const GATHER: Duration = Duration::from_millis(80);
/// So many do not wait any longer.
const PLENTY: usize = 256;
/// At most so many in one command.
const BATCH: usize = 512;
const RETRY: Duration = Duration::from_millis(250);

/// What a write did.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// The partition belongs to somebody else: nothing was written.
    pub lost: bool,
    /// Places in the write of what did not end, because its webhook works again.
    pub reopened: HashSet<usize>,
}

type Writing = BoxFuture<'static, Result<Written, StoreError>>;

/// The outcomes of one partition on their way to SQL.
pub(super) struct Recorder {
    shared: Arc<Shared>,
    claim: Claim,
    changes: Vec<Change>,
    /// How many of `changes`, from the first, are being written.
    writing_rows: usize,
    writing: Option<Writing>,
    since: Option<Instant>,
    not_before: Option<Instant>,
    /// After a refusal: one at a time, so that only the bad one is left out.
    singly: bool,
}

impl Recorder {
    pub(super) fn new(shared: Arc<Shared>, claim: Claim) -> Self {
        Self {
            shared,
            claim,
            changes: Vec::new(),
            writing_rows: 0,
            writing: None,
            since: None,
            not_before: None,
            singly: false,
        }
    }

    pub(super) fn push(&mut self, change: Change) {
        self.since.get_or_insert_with(Instant::now);
        self.changes.push(change);
    }

    /// Outcomes that are not in SQL yet.
    pub(super) fn waiting(&self) -> usize {
        self.changes.len()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.changes.is_empty() && self.writing.is_none()
    }

    /// When [`Self::start`] has something to do.
    pub(super) fn due_at(&self) -> Option<Instant> {
        if self.writing.is_some() || self.changes.is_empty() {
            return None;
        }
        let gathered =
            if self.changes.len() >= PLENTY { self.since } else { self.since.map(|at| at + GATHER) };
        [gathered, self.not_before].into_iter().flatten().max()
    }

    /// Begins to write if enough has gathered; at once when `hurry` is set.
    pub(super) fn start(&mut self, hurry: bool) {
        let now = Instant::now();
        let held_back = self.not_before.is_some_and(|at| at > now);
        let due = hurry || self.due_at().is_some_and(|at| at <= now);
        if self.writing.is_some() || self.changes.is_empty() || held_back || !due {
            return;
        }
        let rows = if self.singly { 1 } else { self.changes.len().min(BATCH) };
        self.writing_rows = rows;
        let facts = Arc::new(Facts::of(self.claim, &self.changes[..rows], &self.shared));
        let shared = Arc::clone(&self.shared);
        let urgency = if hurry || facts.is_urgent() { Urgency::Now } else { Urgency::Lazy };
        self.writing = Some(Box::pin(async move {
            fault::point("dispatcher.record.before");
            let result = shared
                .store
                .write(urgency, move |tx| {
                    let facts = Arc::clone(&facts);
                    Box::pin(async move { facts.write(tx).await })
                })
                .await;
            fault::point("dispatcher.record.after");
            let (written, told) = result?;
            if !told.is_empty() || !written.reopened.is_empty() {
                // A webhook was disabled, or enabled, that is not known here.
                shared.directory.changed();
                shared.announce(told).await;
            }
            Ok(written)
        }));
    }

    /// The result of the write under way; waits for ever when there is none.
    pub(super) async fn done(&mut self) -> Result<Written, StoreError> {
        match self.writing.as_mut() {
            Some(writing) => {
                let result = writing.await;
                self.writing = None;
                result
            }
            None => std::future::pending().await,
        }
    }

    /// The rows of the write that has just ended well.
    pub(super) fn written(&mut self) -> Vec<Change> {
        let rest = self.changes.split_off(self.writing_rows.min(self.changes.len()));
        let written = std::mem::replace(&mut self.changes, rest);
        self.since = (!self.changes.is_empty()).then(Instant::now);
        self.not_before = None;
        if self.changes.is_empty() {
            self.singly = false;
        }
        written
    }

    /// The write failed. It may be repeated as it is: a delivery that has ended does not change again.
    pub(super) fn failed(&mut self, error: &StoreError) {
        self.not_before = Some(Instant::now() + RETRY);
        if error.is_transient() {
            tracing::warn!(partition = self.claim.partition, %error, "outcomes of webhooks wait for SQL");
        } else if self.writing_rows > 1 {
            self.singly = true;
        } else if !self.changes.is_empty() {
            let bad = self.changes.remove(0);
            tracing::error!(
                webhook_id = bad.key.webhook_id(bad.seq), %error,
                "the outcome of a webhook cannot be recorded; it will be sent again"
            );
        }
    }
}

/// What one commit writes: outcomes, what they say about webhooks, and the notices that follow.
struct Facts {
    outcomes: Vec<Outcome>,
    /// Which of them end only as long as their webhook takes nothing more.
    by_standing: Vec<bool>,
    sightings: Vec<Sighting>,
    deaths: Vec<Death>,
    partitions: u16,
    disable_after_ms: Option<u64>,
}

impl Facts {
    fn of(claim: Claim, changes: &[Change], shared: &Shared) -> Self {
        let mut sightings: BTreeMap<u32, Sighting> = BTreeMap::new();
        for change in changes {
            let (Some(webhook), Some(sign)) = (registered_webhook(change.key.target), change.sign) else {
                continue;
            };
            let sighting = sightings.entry(webhook).or_insert_with(|| Sighting {
                webhook,
                event: event_key(now_ms().max(0).cast_unsigned(), rand::random(), None),
                ..Sighting::default()
            });
            sighting.worked |= sign == Sign::Works;
            sighting.gone |= sign == Sign::Gone;
        }
        let dead = changes.iter().filter(|change| change.state == DeliveryState::Dead);
        Self {
            outcomes: changes.iter().map(|change| outcome(claim, change)).collect(),
            by_standing: changes.iter().map(|change| change.by_standing).collect(),
            sightings: sightings.into_values().collect(),
            deaths: dead.map(death).collect(),
            partitions: shared.store.facts().partitions,
            disable_after_ms: shared.settings.disable_after_ms,
        }
    }

    /// A webhook that said 410 takes nothing until that is written down.
    fn is_urgent(&self) -> bool {
        self.sightings.iter().any(|sighting| sighting.gone)
    }

    async fn write(&self, tx: &WriteTx) -> Result<(Written, Vec<v1::Delivery>), StoreError> {
        let reopened = self.reopened(tx).await?;
        let recorded = if reopened.is_empty() {
            record_outcomes(tx, &self.outcomes).await?
        } else {
            let true_ones = self.outcomes.iter().enumerate().filter(|(at, _)| !reopened.contains(at));
            record_outcomes(tx, &true_ones.map(|(_, outcome)| outcome.clone()).collect::<Vec<_>>()).await?
        };
        let written = Written { lost: !recorded.lost.is_empty(), reopened };
        if written.lost {
            return Ok((written, Vec::new()));
        }
        let mut told = sighted(tx, self.partitions, &self.sightings, self.disable_after_ms).await?;
        if !recorded.died.is_empty() {
            let now: HashSet<&(Uuid, u32, u32)> = recorded.died.iter().collect();
            let deaths: Vec<&Death> =
                self.deaths.iter().filter(|d| now.contains(&(d.owner, d.seq, d.target))).collect();
            told.extend(died(tx, self.partitions, &deaths).await?);
        }
        Ok((written, told))
    }

    /// What was to end by the view of a moment ago, though this transaction sees that its webhook works.
    async fn reopened(&self, tx: &WriteTx) -> Result<HashSet<usize>, StoreError> {
        let mut reopened = HashSet::new();
        if !self.by_standing.contains(&true) {
            return Ok(reopened);
        }
        let registry = tx.registry().await?;
        for (at, outcome) in self.outcomes.iter().enumerate().filter(|(at, _)| self.by_standing[*at]) {
            let works = registry
                .target(outcome.target)
                .is_some_and(|webhook| webhook.is_owed(tx.now_ms()) && webhook.url.is_some());
            if works {
                reopened.insert(at);
            }
        }
        Ok(reopened)
    }
}

fn death(change: &Change) -> Death {
    Death {
        owner: change.key.owner,
        seq: change.seq,
        target: change.key.target,
        project: change.project,
        event: change.event,
        attempts: change.attempts,
        created_at_ms: change.created_at_ms,
        last_status: change.last_status,
        last_error: change.last_error.clone(),
        id: event_key(now_ms().max(0).cast_unsigned(), rand::random(), Some(change.key.owner.as_bytes())),
    }
}

fn outcome(claim: Claim, change: &Change) -> Outcome {
    Outcome {
        claim,
        owner: change.key.owner,
        seq: change.seq,
        target: change.key.target,
        state: change.state,
        attempts: change.attempts,
        next_attempt_at_ms: change.next_attempt_at_ms,
        ended_at_ms: change.ended_at_ms,
        last_status: change.last_status,
        last_error: change.last_error.clone(),
        failed: change.failed.clone(),
        duration_ms: change.duration_ms,
        timings: change.timings,
        address: change.address.clone(),
        response: change.response.clone(),
        replays: change.replays,
    }
}
