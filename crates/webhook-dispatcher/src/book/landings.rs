//! Out of the book: tries that begin, and how they end.

use std::cmp::Reverse;
use std::sync::Arc;

use ringback_domain::target::REGISTERED_TARGET_BASE;
use ringback_domain::webhook::response::{Reason, Verdict};
use ringback_domain::webhook::schedule::{self, Failed, Next};
use ringback_store::deliveries::DeliveryState;

use super::changes::{ended, failure, may_be_superseded, sign_of};
use super::gates::{Flow, Turn};
use super::{Book, Change, Flight, Owed, Phase, Tried, Wake};

/// Waits longer than this are spent in SQL; the sweep brings the delivery back.
pub(super) const PARK_AFTER_MS: i64 = 45_000;

impl Book {
    /// The next try to make, if any may be made now.
    pub(crate) fn begin(&mut self, now_ms: i64) -> Option<Flight> {
        loop {
            match self.gates.next(now_ms)? {
                Turn::Sleep { target, until_ms } => {
                    self.wakes.push(Reverse((until_ms, Wake::Target(target))));
                }
                Turn::Fly(key) => {
                    let Some(chain) = self.chains.get_mut(&key) else { continue };
                    let Some(head) = chain.entries.first_mut() else { continue };
                    chain.phase = Phase::Flying;
                    head.first_try_at_ms.get_or_insert(now_ms);
                    return Some(Flight { owed: Arc::clone(&head.owed), n: head.attempts + 1 });
                }
            }
        }
    }

    /// A flight could not begin for a reason of ours: it is not a try, and comes back after `wait_ms`.
    pub(crate) fn postpone(&mut self, owed: &Owed, wait_ms: i64, now_ms: i64) {
        self.gates.landed(&owed.place, Flow::Neutral, now_ms);
        if let Some(chain) = self.chains.get_mut(&owed.key)
            && let Some(head) = chain.entries.first_mut()
        {
            head.due_at_ms = now_ms + wait_ms;
            chain.phase = Phase::Waiting;
            chain.entries.sort_by_key(|e| e.owed.seq);
            self.advance(owed.key, now_ms);
        }
    }

    /// A flight ended. `jitter` is a random number in `0.0..1.0`.
    pub(crate) fn land(&mut self, owed: &Owed, tried: Tried, now_ms: i64, jitter: f64) {
        self.gates.landed(&owed.place, tried.flow, now_ms);
        let Some(chain) = self.chains.get_mut(&owed.key) else { return };
        let Some(head) = chain.entries.first_mut() else { return };
        chain.phase = Phase::Waiting;
        head.attempts += 1;
        let attempts = head.attempts;
        let change = Change {
            last_status: tried.status,
            sign: sign_of(&tried),
            ..ended(owed, DeliveryState::Delivered, attempts, now_ms)
        };
        match tried.verdict {
            Verdict::Delivered => self.end_head(Change {
                duration_ms: Some(tried.duration_ms),
                timings: tried.timings,
                address: tried.address.clone(),
                response: tried.response.clone(),
                ..change
            }),
            Verdict::Dead(reason) => {
                let change = failure(change, reason, DeliveryState::Dead, &tried);
                self.end_head(change);
                if reason == Reason::Gone && owed.key.target < REGISTERED_TARGET_BASE {
                    self.end_gone(owed.key, now_ms);
                }
            }
            Verdict::Retry(reason, slow_down) => {
                let first = head.first_try_at_ms.unwrap_or(tried.began_at_ms);
                let next = schedule::after_failure(
                    &Failed {
                        schedule: &owed.rules.schedule,
                        climbs: owed.terminal || owed.rules.strict_order,
                        tries: attempts.saturating_sub(owed.attempts_before),
                        first_try_at_ms: first.max(0).cast_unsigned(),
                        now_ms: now_ms.max(0).cast_unsigned(),
                        slow_down,
                        retry_after_cap_ms: self.limits.retry_after_cap_ms,
                    },
                    jitter,
                );
                let ended = head.overtaken || chain.entries.iter().skip(1).any(|e| e.owed.terminal);
                match next {
                    Next::At(at_ms) if !may_be_superseded(owed) || !ended => {
                        let at_ms = at_ms.cast_signed();
                        if let Some(head) = chain.entries.first_mut() {
                            head.due_at_ms = at_ms;
                        }
                        // One that came during the flight may have to go first.
                        chain.entries.sort_by_key(|e| e.owed.seq);
                        let change = failure(change, reason, DeliveryState::Pending, &tried);
                        self.changes.push(Change {
                            next_attempt_at_ms: Some(at_ms),
                            ended_at_ms: None,
                            ..change
                        });
                    }
                    Next::At(_) => self.end_head(failure(change, reason, DeliveryState::Superseded, &tried)),
                    Next::GiveUp => self.end_head(failure(change, reason, DeliveryState::Dead, &tried)),
                }
            }
        }
        let failed_early = may_be_superseded(owed) && tried.verdict != Verdict::Delivered;
        self.supersede(owed.key, failed_early, now_ms);
        self.advance(owed.key, now_ms);
        if matches!(tried.flow, Flow::Bad | Flow::Dead) {
            for key in self.gates.excess(owed.place.target) {
                self.drop_chain(key);
            }
        }
    }

    /// A change was committed. A chain whose next try is far away leaves memory now: SQL knows when it is due.
    pub(crate) fn recorded(&mut self, change: &Change, now_ms: i64) {
        let Some(at_ms) = change.next_attempt_at_ms else { return };
        let still = self.chains.get(&change.key).is_some_and(|chain| {
            chain.phase == Phase::Waiting
                && chain
                    .entries
                    .first()
                    .is_some_and(|head| head.owed.seq == change.seq && head.due_at_ms == at_ms)
        });
        if still && at_ms - now_ms > PARK_AFTER_MS {
            self.drop_chain(change.key);
        }
    }
}
