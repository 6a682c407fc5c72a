//! What one consumer has been asked for and not yet answered. Pure bookkeeping.

use std::collections::HashMap;
use std::time::Duration;
use tokio::time::Instant;

/// How a pull request waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PullKind {
    /// Answered at once with what is there.
    NoWait,
    /// Waits for messages until it expires.
    Long,
}

#[derive(Debug)]
struct Pull {
    kind: PullKind,
    batch: u32,
    forget_at: Instant,
}

/// Requests of one consumer. The server spreads messages over the requests that wait, so what is outstanding is
/// counted per consumer: asked for, minus delivered, minus what each ended request reports as not delivered.
#[derive(Debug, Default)]
pub(super) struct LaneBook {
    pulls: HashMap<u64, Pull>,
    outstanding: u32,
    last_sign: Option<Instant>,
    /// Nothing is asked before this moment (after a refusal).
    pub(super) blocked_until: Option<Instant>,
    /// Whether the last no-wait request found the queue empty and no message came since.
    pub(super) known_empty: bool,
}

impl LaneBook {
    pub(super) fn outstanding(&self) -> u32 {
        self.outstanding
    }

    pub(super) fn waits_without_long(&self) -> bool {
        self.pulls.values().any(|pull| pull.kind == PullKind::NoWait)
    }

    pub(super) fn is_blocked(&self, now: Instant) -> bool {
        self.blocked_until.is_some_and(|until| until > now)
    }

    pub(super) fn asked(&mut self, id: u64, kind: PullKind, batch: u32, forget_at: Instant, now: Instant) {
        self.pulls.insert(id, Pull { kind, batch, forget_at });
        self.outstanding += batch;
        self.last_sign = Some(now);
    }

    /// A message came for this consumer.
    pub(super) fn delivered(&mut self, now: Instant) {
        self.outstanding = self.outstanding.saturating_sub(1);
        self.known_empty = false;
        self.last_sign = Some(now);
        if self.outstanding == 0 {
            // Requests that were served in full end without a word.
            self.pulls.clear();
        }
    }

    /// A request ended early; `left` is what the server says it did not deliver of it.
    pub(super) fn ended(&mut self, id: u64, left: Option<u32>, now: Instant) -> Option<PullKind> {
        let pull = self.pulls.remove(&id)?;
        self.last_sign = Some(now);
        let alone = self.pulls.is_empty();
        self.outstanding = match left {
            _ if alone => 0,
            Some(left) => self.outstanding.saturating_sub(left.min(pull.batch)),
            None => self.outstanding.saturating_sub(pull.batch),
        };
        Some(pull.kind)
    }

    pub(super) fn sign_of_life(&mut self, now: Instant) {
        self.last_sign = Some(now);
    }

    /// Everything asked so far is void: a new connection, or silence.
    pub(super) fn forget_all(&mut self) {
        self.pulls.clear();
        self.outstanding = 0;
        self.known_empty = false;
    }

    /// Forgets what can no longer be answered: requests past their end, and all of them after `silence`.
    pub(super) fn forget_overdue(&mut self, now: Instant, silence: Duration) {
        if self.outstanding == 0 && self.pulls.is_empty() {
            return;
        }
        if self.last_sign.is_some_and(|sign| now.duration_since(sign) > silence) {
            self.forget_all();
            return;
        }
        self.pulls.retain(|_, pull| pull.forget_at > now);
        if self.pulls.is_empty() {
            self.outstanding = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book() -> (LaneBook, Instant, Instant) {
        let now = Instant::now();
        (LaneBook::default(), now, now + Duration::from_secs(32))
    }

    #[tokio::test]
    async fn counts_what_is_outstanding() {
        let (mut lane, now, later) = book();
        lane.asked(1, PullKind::Long, 4, later, now);
        lane.asked(2, PullKind::Long, 2, later, now);
        assert_eq!(lane.outstanding(), 6);
        lane.delivered(now);
        lane.delivered(now);
        assert_eq!(lane.outstanding(), 4);
        assert_eq!(lane.ended(1, Some(3), now), Some(PullKind::Long));
        assert_eq!(lane.outstanding(), 1);
        lane.delivered(now);
        assert_eq!(lane.outstanding(), 0);
        assert_eq!(lane.ended(2, None, now), None, "it was served in full");
        assert_eq!(lane.ended(99, Some(5), now), None);
    }

    #[tokio::test]
    async fn the_last_request_to_end_leaves_nothing() {
        let (mut lane, now, later) = book();
        lane.asked(1, PullKind::NoWait, 8, later, now);
        lane.delivered(now);
        assert_eq!(lane.ended(1, None, now), Some(PullKind::NoWait));
        assert_eq!(lane.outstanding(), 0);
    }

    #[tokio::test]
    async fn silence_and_age_are_forgotten() {
        let (mut lane, now, later) = book();
        lane.asked(1, PullKind::Long, 3, later, now);
        lane.forget_overdue(now + Duration::from_secs(10), Duration::from_secs(12));
        assert_eq!(lane.outstanding(), 3);
        lane.sign_of_life(now + Duration::from_secs(10));
        lane.forget_overdue(now + Duration::from_secs(20), Duration::from_secs(12));
        assert_eq!(lane.outstanding(), 3);
        lane.forget_overdue(now + Duration::from_secs(23), Duration::from_secs(12));
        assert_eq!(lane.outstanding(), 0);
        lane.asked(2, PullKind::Long, 3, later, now + Duration::from_secs(30));
        lane.forget_overdue(now + Duration::from_secs(33), Duration::from_secs(12));
        assert_eq!(lane.outstanding(), 0, "its end has passed");
    }
}
