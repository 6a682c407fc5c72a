//! What one partition owes, in memory: order, turns, retries. Pure: time and dice are arguments.
//!
//! Rules (DESIGN 6): deliveries of one job to one target go in order, different jobs in parallel. A delivery is
//! eligible when no lower one of its chain is pending. When a job has ended, notices of earlier states that have
//! failed once, and those behind them, are superseded; those that were never tried still get their one try, so that
//! a quick job tells all its states. A target with strict order supersedes nothing: each one waits until the one
//! before it is acknowledged or given up. A replay is sent as asked: nothing supersedes it.
//!
//! Nothing here is the only copy: everything can be dropped from memory and read again from SQL.

mod breaker;
mod gates;
mod rates;
mod settled;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use ringback_contracts::v1;
use ringback_domain::target::REGISTERED_TARGET_BASE;
use ringback_domain::webhook::response::{Profile, Reason, TransportFault, Verdict};
use ringback_domain::webhook::schedule::{self, Failed, Next, Schedule};
use ringback_store::deliveries::{DeliveryState, FailedAttempt};
use uuid::Uuid;

pub(crate) use self::breaker::BreakerLimits;
use self::gates::Gates;
pub(crate) use self::gates::{Flow, GateLimits, Place, Turn};
pub(crate) use self::rates::Rates;
use self::settled::SettledMemory;

/// Waits longer than this are spent in SQL; the sweep brings the delivery back.
const PARK_AFTER_MS: i64 = 45_000;

/// One job (or batch) and one of its targets: the unit of order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ChainKey {
    pub owner: Uuid,
    pub target: u32,
}

/// How a target wants to be served.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Rules {
    /// Which answers acknowledge.
    pub profile: Profile,
    /// When to try again.
    pub schedule: Schedule,
    /// Nothing is superseded, everything climbs the whole ladder.
    pub strict_order: bool,
}

/// A delivery's unchanging part, until it is replayed.
#[derive(Debug)]
pub(crate) struct Owed {
    pub key: ChainKey,
    pub seq: u32,
    pub terminal: bool,
    pub event: u32,
    /// What the body is: see `deliveries.format`.
    pub format: u32,
    /// Empty for a registered webhook: its URL is the one it has when it is sent to.
    pub url: String,
    pub body: v1::BodyParts,
    pub traceparent: String,
    pub created_at_ms: i64,
    /// How often it was asked for again.
    pub replays: u32,
    /// Tries before that: they do not count for its schedule.
    pub attempts_before: u32,
    pub place: Place,
    pub rules: Arc<Rules>,
}

impl Owed {
    fn bytes(&self) -> usize {
        let body: usize = self
            .body
            .parts
            .iter()
            .map(|part| match &part.part {
                Some(v1::body_part::Part::Inline(bytes)) => bytes.len(),
                Some(v1::body_part::Part::BlobKey(key)) => key.len(),
                None => 0,
            })
            .sum();
        // Structure, maps and queues beside it.
        body + self.url.len() + self.traceparent.len() + 400
    }
}

/// Whether anything may be sent to a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Yes.
    Live,
    /// Not now: it is paused, or not known yet. What is owed stays in SQL.
    Held,
    /// Never more: what is owed ends in this state, for this reason.
    Ended(DeliveryState, &'static str),
}

/// A delivery offered to the book.
#[derive(Debug)]
pub(crate) struct Offered {
    pub owed: Owed,
    pub standing: Standing,
    pub attempts: u32,
    pub due_at_ms: i64,
    pub source: Source,
}

/// Where an offer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// Announced after a commit, with the run of the job. Lower ones may not have arrived yet.
    Announced { run: u32 },
    /// Read from SQL together with all others of its job.
    Read,
}

/// What became of an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offer {
    /// It is in memory now, or was settled at once.
    Taken,
    /// It was there already.
    Known,
    /// Its target has no room, or takes nothing now; it stays in SQL.
    Deferred,
    /// Memory is full; it stays in SQL.
    Full,
}

/// A try to make.
#[derive(Debug, Clone)]
pub(crate) struct Flight {
    pub owed: Arc<Owed>,
    /// Number of this try, from 1.
    pub n: u32,
}

/// How a try ended.
#[derive(Debug, Clone)]
pub(crate) struct Tried {
    pub verdict: Verdict,
    pub flow: Flow,
    pub began_at_ms: i64,
    pub duration_ms: u64,
    pub status: Option<u16>,
    /// Details for people beside the reason.
    pub detail: Option<String>,
    pub address: Option<String>,
    pub response: Option<Vec<u8>>,
    /// Parts of the duration, in ms, where they were measured: name, connection, headers of the answer.
    pub dns_ms: Option<u64>,
    pub connect_ms: Option<u64>,
    pub first_byte_ms: Option<u64>,
}

/// What a try says about its receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sign {
    /// It acknowledges.
    Works,
    /// It does not.
    Fails,
    /// It said 410.
    Gone,
}

/// A delivery's new state, to be written down.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Change {
    pub key: ChainKey,
    pub seq: u32,
    pub state: DeliveryState,
    pub attempts: u32,
    pub next_attempt_at_ms: Option<i64>,
    pub ended_at_ms: Option<i64>,
    pub last_status: Option<u16>,
    pub last_error: Option<String>,
    pub failed: Option<FailedAttempt>,
    /// How long the try that succeeded took, and who answered.
    pub duration_ms: Option<u64>,
    pub address: Option<String>,
    /// Which life of the delivery this is about.
    pub replays: u32,
    pub project: i64,
    pub event: u32,
    /// What the try said about the receiver, if there was one.
    pub sign: Option<Sign>,
    /// It ends because its webhook takes nothing more: true only while SQL says so too.
    pub by_standing: bool,
    /// For metrics: when it was owed.
    pub created_at_ms: i64,
}

/// Sizes and rules of a book.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BookLimits {
    pub gates: GateLimits,
    pub held: usize,
    pub bytes: usize,
    pub retry_after_cap_ms: u64,
}

#[derive(Debug)]
struct Entry {
    owed: Arc<Owed>,
    attempts: u32,
    first_try_at_ms: Option<i64>,
    due_at_ms: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Waits for SQL to say whether a lower one is pending.
    Checking,
    /// In the turns.
    Ready,
    Flying,
    /// Until its due time.
    Waiting,
}

#[derive(Debug)]
struct Chain {
    /// In the order of their numbers; the first is the one that may go.
    entries: Vec<Entry>,
    phase: Phase,
    /// SQL must be read before the chain goes on.
    check: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Wake {
    Chain(ChainKey),
    Target(u64),
}

/// The deliveries of one partition that are in memory.
#[derive(Debug)]
pub(crate) struct Book {
    limits: BookLimits,
    chains: HashMap<ChainKey, Chain>,
    gates: Gates,
    settled: SettledMemory,
    wakes: BinaryHeap<Reverse<(i64, Wake)>>,
    held: usize,
    bytes: usize,
    changes: Vec<Change>,
    checks: Vec<Uuid>,
    /// The targets of a job whose chains wait for SQL.
    checking: HashMap<Uuid, Vec<u32>>,
    refill: bool,
}

impl Book {
    pub(crate) fn new(limits: BookLimits, rates: Arc<Rates>) -> Self {
        Self {
            limits,
            chains: HashMap::new(),
            gates: Gates::new(limits.gates, rates),
            settled: SettledMemory::default(),
            wakes: BinaryHeap::new(),
            held: 0,
            bytes: 0,
            changes: Vec::new(),
            checks: Vec::new(),
            checking: HashMap::new(),
            refill: false,
        }
    }

    /// Deliveries in memory.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    pub(crate) fn in_flight(&self) -> u32 {
        self.gates.in_flight()
    }

    /// Targets that are left alone because they fail.
    pub(crate) fn open_breakers(&self) -> usize {
        self.gates.open_breakers()
    }

    /// Whether so much room is free that another page may be read.
    pub(crate) fn has_room(&self) -> bool {
        self.held <= self.limits.held / 2 && self.bytes <= self.limits.bytes / 2
    }

    /// What is to be written down since the last call.
    pub(crate) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// Jobs that must be read from SQL before their chains may go on, since the last call.
    pub(crate) fn take_checks(&mut self) -> Vec<Uuid> {
        std::mem::take(&mut self.checks)
    }

    /// Whether a target has room again for what was left in SQL, since the last call.
    pub(crate) fn take_refill(&mut self) -> bool {
        std::mem::take(&mut self.refill)
    }

    /// When [`Self::wake`] has something to do.
    pub(crate) fn next_wake_ms(&self) -> Option<i64> {
        self.wakes.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes a pending delivery into memory.
    pub(crate) fn offer(&mut self, offered: Offered, now_ms: i64) -> Offer {
        let Offered { owed, standing, attempts, due_at_ms, source } = offered;
        let (key, seq) = (owed.key, owed.seq);
        if self.settled.has(&key, seq, owed.replays) {
            return Offer::Known;
        }
        if self.knows(&owed, attempts, due_at_ms, source, now_ms) {
            return Offer::Known;
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
        let entry = Entry { owed: Arc::new(owed), attempts, first_try_at_ms, due_at_ms };
        if check {
            self.checks.push(key.owner);
            let targets = self.checking.entry(key.owner).or_default();
            if !targets.contains(&key.target) {
                targets.push(key.target);
            }
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
                    if self.chains.get(&key).is_some_and(|chain| chain.phase == Phase::Waiting) {
                        self.advance(key, now_ms);
                    }
                }
            }
        }
    }

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
                address: tried.address.clone(),
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
                let ended = chain.entries.iter().skip(1).any(|e| e.owed.terminal);
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

    /// Puts a chain that does not fly where it belongs.
    fn advance(&mut self, key: ChainKey, now_ms: i64) {
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
    fn supersede(&mut self, key: ChainKey, failed: bool, now_ms: i64) {
        let told = self.settled.get(&key).copied().unwrap_or_default();
        let Some(chain) = self.chains.get_mut(&key) else { return };
        let failed =
            failed || chain.entries.first().is_some_and(|head| head.attempts > head.owed.attempts_before);
        let waiting_end =
            chain.entries.iter().rev().find(|e| e.owed.terminal).map(|e| e.owed.seq).filter(|_| failed);
        let mut overtaken = Vec::new();
        chain.entries.retain(|entry| {
            let seq = entry.owed.seq;
            let keep = !may_be_superseded(&entry.owed)
                || !(told.told_end_after(seq) || waiting_end.is_some_and(|end| seq < end));
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

    /// The receiver said 410: nothing of this chain is sent any more.
    fn end_gone(&mut self, key: ChainKey, now_ms: i64) {
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

    /// Remembers from SQL that a delivery has ended.
    pub(crate) fn note_settled(&mut self, key: ChainKey, seq: u32, terminal: bool, replays: u32) {
        self.settled.note(key, seq, terminal, replays);
    }

    fn end_head(&mut self, change: Change) {
        if let Some(chain) = self.chains.get_mut(&change.key)
            && !chain.entries.is_empty()
        {
            let head = chain.entries.remove(0);
            self.settled.note(change.key, change.seq, head.owed.terminal, head.owed.replays);
            self.forget_held(&head.owed);
        }
        self.changes.push(change);
    }

    fn settle_unsent(
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
    fn drop_chain(&mut self, key: ChainKey) {
        let Some(chain) = self.chains.remove(&key) else { return };
        for entry in chain.entries {
            self.forget_held(&entry.owed);
        }
    }

    fn forget_held(&mut self, owed: &Owed) {
        self.held = self.held.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(owed.bytes());
        self.refill |= self.gates.release(&owed.place);
    }
}

/// Whether an end of the job makes this delivery needless.
fn may_be_superseded(owed: &Owed) -> bool {
    !owed.terminal && !owed.rules.strict_order && owed.replays == 0
}

/// The change of a delivery that ends now.
fn ended(owed: &Owed, state: DeliveryState, attempts: u32, now_ms: i64) -> Change {
    Change {
        key: owed.key,
        seq: owed.seq,
        state,
        attempts,
        next_attempt_at_ms: None,
        ended_at_ms: Some(now_ms),
        last_status: None,
        last_error: None,
        failed: None,
        duration_ms: None,
        address: None,
        replays: owed.replays,
        project: owed.place.project,
        event: owed.event,
        sign: None,
        by_standing: false,
        created_at_ms: owed.created_at_ms,
    }
}

fn sign_of(tried: &Tried) -> Option<Sign> {
    match tried.verdict {
        Verdict::Delivered => Some(Sign::Works),
        Verdict::Dead(Reason::Gone) => Some(Sign::Gone),
        // A body that we cannot read says nothing about its receiver.
        Verdict::Retry(Reason::Transport(TransportFault::Body), _) => None,
        Verdict::Dead(_) | Verdict::Retry(..) => Some(Sign::Fails),
    }
}

fn failure(change: Change, reason: Reason, state: DeliveryState, tried: &Tried) -> Change {
    let error = match &tried.detail {
        Some(detail) => format!("{reason}: {detail}"),
        None => reason.to_string(),
    };
    Change {
        state,
        last_error: Some(error.clone()),
        failed: Some(FailedAttempt {
            at_ms: tried.began_at_ms,
            duration_ms: tried.duration_ms,
            status: tried.status,
            error: Some(error),
            address: tried.address.clone(),
            response: tried.response.clone(),
            dns_ms: tried.dns_ms,
            connect_ms: tried.connect_ms,
            first_byte_ms: tried.first_byte_ms,
        }),
        ..change
    }
}
