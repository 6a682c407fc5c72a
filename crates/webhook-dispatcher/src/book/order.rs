//! What may go next in a chain, and what gives way.

use std::cmp::Reverse;
use std::sync::Arc;

use ringback_domain::event::EventType;
use ringback_store::deliveries::DeliveryState;

use super::changes::{ended, may_be_superseded};
use super::{Book, ChainKey, Change, Entry, Owed, Phase, Wake};

impl Book {
    /// Moves what is due into the turns.
    pub(crate) fn wake(&mut self, now_ms: i64) {
        while let Some(Reverse((at, wake))) = self.wakes.peek().copied() {
            if at > now_ms {
                return;
            }
            self.wakes.pop();
            match wake {
                Wake::Target(target) => self.gates.wake(target),
                Wake::Chain(key) => {
                    let Some(chain) = self.chains.get_mut(&key) else { continue };
                    if chain.phase != Phase::Waiting {
                        continue;
                    }
                    // The word that it is over may have been missed.
                    if chain.entries.first().is_some_and(is_passing_retry) {
                        chain.check = true;
                        self.ask(key);
                    }
                    self.advance(key, now_ms);
                }
            }
        }
    }

    /// Puts a chain that does not fly where it belongs.
    pub(super) fn advance(&mut self, key: ChainKey, now_ms: i64) {
        if self.settled.get(&key).is_some_and(|settled| settled.gone) {
            self.end_gone(key, now_ms);
        }
        self.supersede(key, false, now_ms);
        let Some(chain) = self.chains.get_mut(&key) else { return };
        let Some(head) = chain.entries.first() else {
            self.chains.remove(&key);
            return;
        };
        if chain.check {
            chain.phase = Phase::Checking;
        } else if head.due_at_ms <= now_ms {
            chain.phase = Phase::Ready;
            self.gates.push(&head.owed.place, key);
        } else {
            chain.phase = Phase::Waiting;
            self.wakes.push(Reverse((head.due_at_ms, Wake::Chain(key))));
        }
    }

    /// Ends the notices that the end of the job has overtaken: those before an end that was told already, and, where
    /// one has failed (`failed`, or the head was tried), those before an end that waits.
    pub(super) fn supersede(&mut self, key: ChainKey, failed: bool, now_ms: i64) {
        let told = self.settled.get(&key).copied().unwrap_or_default();
        let Some(chain) = self.chains.get_mut(&key) else { return };
        let failed =
            failed || chain.entries.first().is_some_and(|head| head.attempts > head.owed.attempts_before);
        let waiting_end =
            chain.entries.iter().rev().find(|e| e.owed.terminal).map(|e| e.owed.seq).filter(|_| failed);
        let mut overtaken = Vec::new();
        chain.entries.retain(|entry| {
            let seq = entry.owed.seq;
            let over =
                entry.overtaken || told.told_end_after(seq) || waiting_end.is_some_and(|end| seq < end);
            let keep = !(over && may_be_superseded(&entry.owed));
            if !keep {
                overtaken.push((Arc::clone(&entry.owed), entry.attempts));
            }
            keep
        });
        for (owed, attempts) in overtaken {
            self.forget_held(&owed);
            self.settle_unsent(&owed, attempts, DeliveryState::Superseded, None, now_ms);
        }
    }

    /// What this delivery tells is over. What flies ends by its own answer.
    pub(crate) fn overtake(&mut self, key: ChainKey, seq: u32, now_ms: i64) {
        let Some(chain) = self.chains.get_mut(&key) else { return };
        let Some(at) = chain.entries.iter().position(|e| e.owed.seq == seq) else { return };
        chain.entries[at].overtaken = true;
        match chain.phase {
            Phase::Flying => return,
            Phase::Ready => {
                if let Some(head) = chain.entries.first() {
                    self.gates.withdraw(head.owed.place.target, key);
                }
            }
            Phase::Waiting | Phase::Checking => {}
        }
        self.advance(key, now_ms);
    }

    /// The receiver said 410: nothing of this chain is sent any more.
    pub(super) fn end_gone(&mut self, key: ChainKey, now_ms: i64) {
        self.settled.note_gone(key);
        let Some(chain) = self.chains.get_mut(&key) else { return };
        // A person asked for a replay after that answer.
        let (kept, ended) =
            std::mem::take(&mut chain.entries).into_iter().partition(|entry| entry.owed.replays > 0);
        chain.entries = kept;
        for entry in ended {
            self.forget_held(&entry.owed);
            self.settle_unsent(&entry.owed, entry.attempts, DeliveryState::Dead, Some("target_gone"), now_ms);
        }
    }

    /// Remembers from SQL that a target said 410, and ends what waits for it.
    pub(crate) fn note_gone(&mut self, key: ChainKey, now_ms: i64) {
        match self.chains.get(&key) {
            // What flies ends by its own answer; what comes behind it is judged then.
            Some(chain) if chain.phase == Phase::Flying => self.settled.note_gone(key),
            Some(chain) => {
                if let (Phase::Ready, Some(head)) = (chain.phase, chain.entries.first()) {
                    self.gates.withdraw(head.owed.place.target, key);
                }
                self.end_gone(key, now_ms);
                if let Some(chain) = self.chains.get_mut(&key) {
                    chain.phase = Phase::Waiting;
                }
                self.advance(key, now_ms);
            }
            None => self.settled.note_gone(key),
        }
    }

    pub(super) fn end_head(&mut self, change: Change) {
        if let Some(chain) = self.chains.get_mut(&change.key)
            && !chain.entries.is_empty()
        {
            let head = chain.entries.remove(0);
            self.settled.note(change.key, change.seq, head.owed.terminal, head.owed.replays);
            self.forget_held(&head.owed);
        }
        self.changes.push(change);
    }

    pub(super) fn settle_unsent(
        &mut self,
        owed: &Owed,
        attempts: u32,
        state: DeliveryState,
        error: Option<&str>,
        now_ms: i64,
    ) {
        self.settled.note(owed.key, owed.seq, owed.terminal, owed.replays);
        self.changes
            .push(Change { last_error: error.map(str::to_owned), ..ended(owed, state, attempts, now_ms) });
    }

    /// Takes a chain that does not fly out of memory; SQL still has it.
    pub(super) fn drop_chain(&mut self, key: ChainKey) {
        let Some(chain) = self.chains.remove(&key) else { return };
        for entry in chain.entries {
            self.forget_held(&entry.owed);
        }
    }

    pub(super) fn forget_held(&mut self, owed: &Owed) {
        self.held = self.held.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(owed.bytes());
        self.refill |= self.gates.release(&owed.place);
    }
}

/// Whether this is a further try of an event that goes by: see [`EventType::is_throttled`].
fn is_passing_retry(entry: &Entry) -> bool {
    let owed = &entry.owed;
    entry.attempts > owed.attempts_before
        && EventType::from_code(owed.event).is_some_and(EventType::is_throttled)
}
