//! Writes outcomes down: many in one command that rides on somebody else's commit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use ringback_service_runtime::fault;
use ringback_store::deliveries::{Claim, Outcome, Recorded, record_outcomes};
use ringback_store::{Store, StoreError, Urgency};

use crate::book::Change;

/// Outcomes gather this long.
const GATHER: Duration = Duration::from_millis(80);
/// So many do not wait any longer.
const PLENTY: usize = 256;
/// At most so many in one command.
const BATCH: usize = 512;
const RETRY: Duration = Duration::from_millis(250);

type Writing = BoxFuture<'static, Result<Recorded, StoreError>>;

/// The outcomes of one partition on their way to SQL.
pub(super) struct Recorder {
    store: Store,
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
    pub(super) fn new(store: Store, claim: Claim) -> Self {
        Self {
            store,
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
        let outcomes: Arc<Vec<Outcome>> =
            Arc::new(self.changes[..rows].iter().map(|change| outcome(self.claim, change)).collect());
        let store = self.store.clone();
        let urgency = if hurry { Urgency::Now } else { Urgency::Lazy };
        self.writing = Some(Box::pin(async move {
            fault::point("dispatcher.record.before");
            let result = store
                .write(urgency, move |tx| {
                    let outcomes = Arc::clone(&outcomes);
                    Box::pin(async move { record_outcomes(tx, &outcomes).await })
                })
                .await;
            fault::point("dispatcher.record.after");
            result
        }));
    }

    /// The result of the write under way; waits for ever when there is none.
    pub(super) async fn done(&mut self) -> Result<Recorded, StoreError> {
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
                owner = %bad.key.owner, seq = bad.seq, target = bad.key.target, %error,
                "the outcome of a webhook cannot be recorded; it will be sent again"
            );
        }
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
    }
}
