//! Reads pending deliveries from SQL, one page or one set of jobs at a time.
//!
//! A *round* goes through everything that is due: at the start, after missed announcements, when memory was full, and
//! every few seconds as a net under all of that. A *refill* stops early: it looks for more of a target that has room
//! again. A *check* reads single jobs, because something of theirs arrived out of order. A *clearance* reads all of
//! one target, due or not: it is to end.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use ringback_store::deliveries::{DueAfter, Stored, due_page_but, stored_of, target_page};
use ringback_store::{Store, StoreError};
use uuid::Uuid;

use crate::book::ChainKey;

const PAGE: u32 = 500;
/// Time between two sweeps.
const SWEEP: Duration = Duration::from_secs(5);
/// A sweep may use this part of the time: one in so many.
const SWEEP_SHARE: u32 = 20;
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A sweep leaves alone what has only just come due: it is in memory or announced.
const SWEEP_GRACE_MS: i64 = 1_000;
const RETRY: Duration = Duration::from_millis(500);
/// Jobs looked up by one check.
const CHECKS: usize = 256;

/// What was read.
pub(super) struct Page {
    pub stored: Vec<Stored>,
    /// Jobs that were read because something waited for it.
    pub checked: Vec<Uuid>,
    pub cursor: Cursor,
}

/// Where the reading stood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cursor {
    /// Single jobs were read.
    Check,
    /// A page was read; the next one begins here, if there is one.
    Round(Option<DueAfter>),
}

#[derive(Debug, Clone, Copy)]
struct Round {
    after: DueAfter,
    due_ms: i64,
    refill: bool,
    /// Only what is owed to this target, due or not.
    target: Option<u32>,
    /// Time spent in SQL.
    spent: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Want {
    Nothing,
    Refill,
    Sweep,
    Round,
}

/// Reads for one partition.
pub(super) struct Reader {
    store: Store,
    partition: u16,
    want: Want,
    checks: Vec<Uuid>,
    clearances: BTreeSet<u32>,
    /// Targets that take nothing now: rounds leave out what they can of these.
    held: Vec<u32>,
    round: Option<Round>,
    reading: Option<BoxFuture<'static, Result<Page, StoreError>>>,
    /// What is being checked, to ask again if it fails.
    asked: Vec<Uuid>,
    sweep_at: Instant,
    not_before: Option<Instant>,
    began: Instant,
}

impl Reader {
    pub(super) fn new(store: Store, partition: u16) -> Self {
        Self {
            store,
            partition,
            want: Want::Nothing,
            checks: Vec::new(),
            clearances: BTreeSet::new(),
            held: Vec::new(),
            round: None,
            reading: None,
            asked: Vec::new(),
            sweep_at: Instant::now() + SWEEP,
            not_before: None,
            began: Instant::now(),
        }
    }

    /// Something may have been missed: read everything that is due.
    pub(super) fn want_round(&mut self) {
        self.want = Want::Round;
    }

    /// A target has room again.
    pub(super) fn want_refill(&mut self) {
        self.want = self.want.max(Want::Refill);
    }

    /// These targets take nothing now.
    pub(super) fn leave_out(&mut self, held: Vec<u32>) {
        self.held = held;
    }

    /// Everything of a target is to end.
    pub(super) fn want_clearance(&mut self, target: u32) {
        self.clearances.insert(target);
    }

    pub(super) fn want_checks(&mut self, owners: Vec<Uuid>) {
        self.checks.extend(owners);
    }

    pub(super) fn sweep_is_due(&self) -> bool {
        self.sweep_at <= Instant::now()
    }

    /// When [`Self::start`] has something to do.
    pub(super) fn due_at(&self, has_room: bool) -> Option<Instant> {
        if self.reading.is_some() {
            return None;
        }
        let waiting = !self.checks.is_empty() || (has_room && (self.round.is_some() || self.wants_a_round()));
        let at = if waiting { Instant::now() } else { self.sweep_at };
        Some(self.not_before.map_or(at, |not_before| not_before.max(at)))
    }

    fn wants_a_round(&self) -> bool {
        self.want > Want::Nothing || !self.clearances.is_empty()
    }

    /// Begins to read what is wanted most.
    pub(super) fn start(&mut self, has_room: bool, now_ms: i64) {
        let now = Instant::now();
        if self.reading.is_some() || self.not_before.is_some_and(|at| at > now) {
            return;
        }
        self.began = now;
        if !self.checks.is_empty() {
            self.checks.sort_unstable();
            self.checks.dedup();
            let rest = self.checks.split_off(self.checks.len().min(CHECKS));
            self.asked = std::mem::replace(&mut self.checks, rest);
            self.reading = Some(Box::pin(check(self.store.clone(), self.asked.clone())));
            return;
        }
        if self.sweep_at <= now {
            self.want = self.want.max(Want::Sweep);
            self.sweep_at = now + SWEEP;
        }
        if !has_room {
            return;
        }
        if self.round.is_none()
            && let Some(target) = self.clearances.pop_first()
        {
            self.round = Some(Round {
                after: DueAfter::START,
                due_ms: i64::MAX,
                refill: false,
                target: Some(target),
                spent: Duration::ZERO,
            });
        }
        if self.round.is_none() && self.want > Want::Nothing {
            let want = std::mem::replace(&mut self.want, Want::Nothing);
            let grace_ms = if want == Want::Sweep { SWEEP_GRACE_MS } else { 0 };
            self.round = Some(Round {
                after: DueAfter::START,
                due_ms: now_ms - grace_ms,
                refill: want == Want::Refill,
                target: None,
                spent: Duration::ZERO,
            });
        }
        if let Some(round) = self.round {
            self.reading = Some(Box::pin(page(self.store.clone(), self.partition, round, self.held.clone())));
        }
    }

    /// What was read; waits for ever when nothing is being read.
    pub(super) async fn done(&mut self) -> Result<Page, StoreError> {
        let Some(reading) = self.reading.as_mut() else { return std::future::pending().await };
        let result = reading.await;
        self.reading = None;
        match &result {
            Ok(page) => {
                if let (Cursor::Round(_), Some(round)) = (page.cursor, self.round.as_mut()) {
                    round.spent += self.began.elapsed();
                }
                self.asked.clear();
                self.not_before = None;
            }
            Err(_) => {
                self.checks.append(&mut self.asked);
                self.not_before = Some(Instant::now() + RETRY);
            }
        }
        result
    }

    /// The page was taken into the book.
    pub(super) fn finish(&mut self, cursor: Cursor, page: Taken) {
        let Cursor::Round(next) = cursor else { return };
        let Some(round) = self.round.as_mut() else { return };
        if page.full {
            // The same page once more when there is room; what was taken is known then.
            return;
        }
        // What looks for more of a target stops where that target has no room; what is in memory does not count.
        let enough = round.refill && page.taken == 0 && page.deferred > 0;
        match next {
            Some(after) if !enough => round.after = after,
            Some(_) | None => {
                let pause = (round.spent * SWEEP_SHARE).min(LONGEST_PAUSE);
                self.sweep_at = self.sweep_at.max(Instant::now() + pause);
                self.round = None;
            }
        }
    }
}

/// What became of a page.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Taken {
    /// New in memory.
    pub taken: usize,
    /// Left in SQL, because their target has no room.
    pub deferred: usize,
    /// Memory is full: the rest of the page was left.
    pub full: bool,
}

async fn page(store: Store, partition: u16, round: Round, held: Vec<u32>) -> Result<Page, StoreError> {
    let due = match round.target {
        Some(target) => target_page(store.read(), partition, target, round.after, PAGE).await?,
        None => due_page_but(store.read(), partition, round.due_ms, round.after, PAGE, &held).await?,
    };
    let stored = stored_of(store.read(), &due.owners).await?;
    Ok(Page { stored, checked: Vec::new(), cursor: Cursor::Round(due.next) })
}

async fn check(store: Store, owners: Vec<Uuid>) -> Result<Page, StoreError> {
    let stored = stored_of(store.read(), &owners).await?;
    Ok(Page { stored, checked: owners, cursor: Cursor::Check })
}

pub(super) fn key_of(row: &Stored) -> Option<ChainKey> {
    let owner = Uuid::from_slice(&row.delivery.owner_id).ok()?;
    Some(ChainKey { owner, target: row.delivery.target })
}
