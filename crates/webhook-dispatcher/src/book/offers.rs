//! Into the book: what is announced and what is read from SQL.

use std::sync::Arc;

use ringback_domain::webhook::schedule;
use ringback_store::deliveries::DeliveryState;
use uuid::Uuid;

use super::changes::{ended, may_be_superseded};
use super::{Book, Chain, ChainKey, Change, Entry, Offer, Offered, Owed, Phase, Source, Standing};

impl Book {
    /// Takes a pending delivery into memory.
    pub(crate) fn offer(&mut self, offered: Offered, now_ms: i64) -> Offer {
        let Offered { owed, standing, overtaken, attempts, due_at_ms, source } = offered;
        let (key, seq) = (owed.key, owed.seq);
        if self.settled.has(&key, seq, owed.replays) {
            return Offer::Known;
        }
        let overtaken = overtaken && may_be_superseded(&owed);
        if self.knows(&owed, attempts, due_at_ms, source, now_ms) {
            if overtaken {
                self.overtake(key, seq, now_ms);
            }
            return Offer::Known;
        }
        if overtaken {
            self.settle_unsent(&owed, attempts, DeliveryState::Superseded, None, now_ms);
            return Offer::Taken;
        }
        match standing {
            Standing::Live => {}
            Standing::Held => return Offer::Deferred,
            Standing::Ended(state, why) => {
                // Not told: it may turn out that the webhook works again.
                self.settled.note(key, seq, false, owed.replays);
                self.changes.push(Change {
                    last_error: Some(why.to_owned()),
                    by_standing: true,
                    ..ended(&owed, state, attempts, now_ms)
                });
                return Offer::Taken;
            }
        }
        let settled = self.settled.get(&key).copied().unwrap_or_default();
        if settled.gone && owed.replays == 0 {
            self.settle_unsent(&owed, attempts, DeliveryState::Dead, Some("target_gone"), now_ms);
            return Offer::Taken;
        }
        if may_be_superseded(&owed) && settled.told_end_after(seq) {
            self.settle_unsent(&owed, attempts, DeliveryState::Superseded, None, now_ms);
            return Offer::Taken;
        }
        let chain = self.chains.get(&key);
        // A chain in memory takes all of its own, or its order would be lost.
        if chain.is_none() {
            if self.held >= self.limits.held || self.bytes >= self.limits.bytes {
                return Offer::Full;
            }
            if !self.gates.admits(&owed.place) {
                return Offer::Deferred;
            }
        }
        let lower_known = seq <= 1
            || settled.has(seq - 1)
            || chain.is_some_and(|chain| chain.entries.iter().any(|e| e.owed.seq + 1 == seq));
        let check = match source {
            // A target that hears only of ends has gaps in its numbers; within the first run nothing precedes one.
            // The end of an earlier run may wait in SQL for its next try, though what followed it was superseded.
            Source::Announced { .. } if owed.replays > 0 => !lower_known,
            Source::Announced { run } if run > 1 => chain.is_none() || !lower_known,
            Source::Announced { .. } => !lower_known && (owed.rules.strict_order || !owed.terminal),
            Source::Read => false,
        };
        self.insert(owed, attempts, due_at_ms, check, now_ms);
        Offer::Taken
    }

    /// Whether the delivery is in memory. One that was held back (a batch that was not open yet) may have been read
    /// with its later time: an announcement, or SQL, says that it is due now. Nothing hurries a retry.
    fn knows(&mut self, owed: &Owed, attempts: u32, due_at_ms: i64, source: Source, now_ms: i64) -> bool {
        let key = owed.key;
        let Some(chain) = self.chains.get_mut(&key) else { return false };
        let Some(at) = chain.entries.iter().position(|e| e.owed.seq == owed.seq) else { return false };
        let flying = at == 0 && chain.phase == Phase::Flying;
        let entry = &mut chain.entries[at];
        let held_back = match source {
            Source::Announced { .. } => entry.attempts == entry.owed.attempts_before,
            Source::Read => entry.attempts == attempts,
        };
        if held_back && !flying && due_at_ms < entry.due_at_ms {
            entry.due_at_ms = due_at_ms;
            if at == 0 && chain.phase == Phase::Waiting {
                self.advance(key, now_ms);
            }
        }
        true
    }

    fn insert(&mut self, owed: Owed, attempts: u32, due_at_ms: i64, check: bool, now_ms: i64) {
        let (key, seq) = (owed.key, owed.seq);
        self.held += 1;
        self.bytes += owed.bytes();
        self.gates.hold(&owed.place);
        // Only the number of former tries is stored; they were at least the first wait apart.
        let tries = attempts.saturating_sub(owed.attempts_before);
        let first_try_at_ms =
            (tries > 0).then(|| due_at_ms - i64::from(tries) * schedule::LADDER_MS[0].cast_signed());
        let entry = Entry { owed: Arc::new(owed), attempts, first_try_at_ms, due_at_ms, overtaken: false };
        if check {
            self.ask(key);
        }
        let Some(chain) = self.chains.get_mut(&key) else {
            self.chains.insert(key, Chain { entries: vec![entry], phase: Phase::Waiting, check });
            self.advance(key, now_ms);
            return;
        };
        chain.check |= check;
        // What flies stays first: it is on its way and cannot be called back.
        let from = usize::from(chain.phase == Phase::Flying);
        let at = from + chain.entries[from..].partition_point(|e| e.owed.seq < seq);
        match chain.phase {
            Phase::Flying => chain.entries.insert(at, entry),
            Phase::Ready if at > 0 && !check => chain.entries.insert(at, entry),
            Phase::Ready => {
                if let Some(head) = chain.entries.first() {
                    self.gates.withdraw(head.owed.place.target, key);
                }
                chain.entries.insert(at, entry);
                self.advance(key, now_ms);
            }
            Phase::Waiting | Phase::Checking => {
                chain.entries.insert(at, entry);
                self.advance(key, now_ms);
            }
        }
    }

    /// SQL is to be read before this chain goes on.
    pub(super) fn ask(&mut self, key: ChainKey) {
        self.checks.push(key.owner);
        let targets = self.checking.entry(key.owner).or_default();
        if !targets.contains(&key.target) {
            targets.push(key.target);
        }
    }

    /// SQL was read for these jobs and what is pending was offered: their chains may go on.
    pub(crate) fn checked(&mut self, owners: &[Uuid], now_ms: i64) {
        for owner in owners {
            for target in self.checking.remove(owner).unwrap_or_default() {
                let key = ChainKey { owner: *owner, target };
                if let Some(chain) = self.chains.get_mut(&key) {
                    chain.check = false;
                    if chain.phase == Phase::Checking {
                        self.advance(key, now_ms);
                    }
                }
            }
        }
    }

    /// The rules of a registered webhook have changed: all of it that does not fly leaves memory and is read again.
    pub(crate) fn drop_target(&mut self, target: u32) {
        let keys: Vec<ChainKey> = self
            .chains
            .iter()
            .filter(|(key, chain)| key.target == target && chain.phase != Phase::Flying)
            .map(|(key, _)| *key)
            .collect();
        for key in keys {
            if let Some(chain) = self.chains.get(&key)
                && let (Phase::Ready, Some(head)) = (chain.phase, chain.entries.first())
            {
                self.gates.withdraw(head.owed.place.target, key);
            }
            self.drop_chain(key);
        }
    }

    /// A delivery that was to end did not, because its webhook works again: SQL has it.
    pub(crate) fn reopened(&mut self, change: &Change) {
        self.settled.forget(&change.key, change.seq, change.replays);
    }

    /// Remembers from SQL that a delivery has ended.
    pub(crate) fn note_settled(&mut self, key: ChainKey, seq: u32, terminal: bool, replays: u32) {
        self.settled.note(key, seq, terminal, replays);
    }
}
