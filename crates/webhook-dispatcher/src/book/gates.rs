//! Who may be in flight: fair turns over targets, a cap per target and per host, both shrinking with failures.
//!
//! A target is one URL without its query, for one project; a host is scheme, name and port, for one project. Answers
//! that say "overloaded" or "broken" shrink the target; only faults of the transport shrink the host, because one bad
//! path does not make its neighbours bad (P9).

use std::collections::{HashMap, VecDeque};

use super::ChainKey;

/// Failures in a row after which a target is left alone for a while between tries.
const PAUSE_AFTER: u32 = 8;
const FIRST_PAUSE_MS: i64 = 50;
const LONGEST_PAUSE_MS: i64 = 5_000;
/// Failures in a row after which a target may hold only a few deliveries in memory.
const FAILING_AFTER: u32 = 4;
/// How many these are.
const FAILING_QUOTA: u32 = 32;
/// A host never shrinks below this, so that its healthy paths go on.
const HOST_FLOOR: u32 = 4;
/// Idle targets and hosts remembered for their failures.
const REMEMBERED: usize = 8_192;

/// Sizes of the gates of one partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GateLimits {
    /// In flight, all targets together.
    pub in_flight: u32,
    /// In flight to one target.
    pub target: u32,
    /// In flight to one host.
    pub host: u32,
    /// Deliveries of one target or host in memory.
    pub quota: u32,
}

/// How a try ended, as far as the gates care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// The receiver works.
    Good,
    /// The receiver works and does not like the request.
    Neutral,
    /// The receiver is overloaded or broken.
    Bad,
    /// The host cannot be reached or does not answer.
    Dead,
}

#[derive(Debug, Clone, Copy)]
struct Gate {
    in_flight: u32,
    held: u32,
    cap: u32,
    max: u32,
    floor: u32,
    failures: u32,
    paused_until_ms: i64,
}

impl Gate {
    fn new(max: u32, floor: u32) -> Self {
        let max = max.max(1);
        Self { in_flight: 0, held: 0, cap: max, max, floor: floor.min(max), failures: 0, paused_until_ms: 0 }
    }

    fn good(&mut self) {
        self.failures = 0;
        self.paused_until_ms = 0;
        self.cap = (self.cap + 1).min(self.max);
    }

    fn bad(&mut self, now_ms: i64) {
        self.failures = self.failures.saturating_add(1);
        self.cap = (self.cap / 2).max(self.floor);
        if let Some(over) = self.failures.checked_sub(PAUSE_AFTER) {
            let pause = FIRST_PAUSE_MS << over.min(10);
            self.paused_until_ms = now_ms + pause.min(LONGEST_PAUSE_MS);
        }
    }

    fn quota(&self, limit: u32) -> u32 {
        if self.failures >= FAILING_AFTER { FAILING_QUOTA.min(limit) } else { limit }
    }
}

#[derive(Debug)]
struct Target {
    gate: Gate,
    host: u64,
    ready: VecDeque<ChainKey>,
    /// In the turns, or with the blocked ones of its host.
    queued: bool,
    /// A wake-up is set for the end of its pause.
    sleeping: bool,
    /// Something of it was left in SQL for want of room.
    deferred: bool,
}

#[derive(Debug)]
struct Host {
    gate: Gate,
    blocked: VecDeque<u64>,
    /// Something of it was left in SQL for want of room.
    deferred: bool,
}

/// What [`Gates::next`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// This chain may fly.
    Fly(ChainKey),
    /// Nobody before this target's pause is over: wake it then, and ask again.
    Sleep {
        /// The target.
        target: u64,
        /// The end of its pause.
        until_ms: i64,
    },
}

/// The gates of one partition.
#[derive(Debug)]
pub(crate) struct Gates {
    limits: GateLimits,
    in_flight: u32,
    targets: HashMap<u64, Target>,
    hosts: HashMap<u64, Host>,
    turns: VecDeque<u64>,
}

impl Gates {
    pub(crate) fn new(limits: GateLimits) -> Self {
        Self { limits, in_flight: 0, targets: HashMap::new(), hosts: HashMap::new(), turns: VecDeque::new() }
    }

    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Whether there is room for one more delivery of this target in memory; if not, that is remembered.
    pub(crate) fn admits(&mut self, target: u64, host: u64) -> bool {
        let limit = self.limits.quota;
        if let Some(h) = self.hosts.get_mut(&host)
            && h.gate.held >= h.gate.quota(limit)
        {
            h.deferred = true;
            return false;
        }
        match self.targets.get_mut(&target) {
            Some(t) if t.gate.held >= t.gate.quota(limit) => {
                t.deferred = true;
                false
            }
            Some(_) | None => true,
        }
    }

    pub(crate) fn hold(&mut self, target: u64, host: u64) {
        self.target(target, host).gate.held += 1;
        self.host(host).gate.held += 1;
    }

    /// One delivery of the target left memory. Answers whether something left in SQL has room now.
    pub(crate) fn release(&mut self, target: u64, host: u64) -> bool {
        let limit = self.limits.quota;
        let mut refill = false;
        if let Some(h) = self.hosts.get_mut(&host) {
            h.gate.held = h.gate.held.saturating_sub(1);
            if h.deferred && h.gate.held <= h.gate.quota(limit) / 2 {
                h.deferred = false;
                refill = true;
            }
        }
        if let Some(t) = self.targets.get_mut(&target) {
            t.gate.held = t.gate.held.saturating_sub(1);
            if t.deferred && t.gate.held <= t.gate.quota(limit) / 2 {
                t.deferred = false;
                refill = true;
            }
            if t.gate.held == 0 && t.gate.failures == 0 && !t.queued && !t.sleeping {
                self.targets.remove(&target);
            }
        }
        if self.hosts.get(&host).is_some_and(|h| {
            h.gate.held == 0 && h.gate.failures == 0 && h.blocked.is_empty() && h.gate.in_flight == 0
        }) {
            self.hosts.remove(&host);
        }
        self.forget();
        refill
    }

    /// A chain of the target waits for its turn.
    pub(crate) fn push(&mut self, target: u64, host: u64, key: ChainKey) {
        self.target(target, host).ready.push_back(key);
        self.queue(target);
    }

    /// Takes a waiting chain out again. Rare, so it may look through the queue.
    pub(crate) fn withdraw(&mut self, target: u64, key: ChainKey) {
        if let Some(t) = self.targets.get_mut(&target) {
            t.ready.retain(|waiting| *waiting != key);
        }
    }

    /// Chains of a failing target beyond its quota, last come first, taken out of its queue: they stay in SQL.
    pub(crate) fn excess(&mut self, target: u64) -> Vec<ChainKey> {
        let limit = self.limits.quota;
        let Some(t) = self.targets.get_mut(&target) else { return Vec::new() };
        let over = t.gate.held.saturating_sub(t.gate.quota(limit)) as usize;
        let from = t.ready.len().saturating_sub(over);
        let cut: Vec<ChainKey> = t.ready.drain(from..).collect();
        t.deferred |= !cut.is_empty();
        cut
    }

    /// The next chain that may fly, and counts it as flying; `None` when nobody may.
    pub(crate) fn next(&mut self, now_ms: i64) -> Option<Turn> {
        while self.in_flight < self.limits.in_flight {
            let target = self.turns.pop_front()?;
            let Some(t) = self.targets.get_mut(&target) else { continue };
            t.queued = false;
            if t.ready.is_empty() || t.gate.in_flight >= t.gate.cap {
                continue;
            }
            if t.gate.paused_until_ms > now_ms {
                if t.sleeping {
                    continue;
                }
                t.sleeping = true;
                return Some(Turn::Sleep { target, until_ms: t.gate.paused_until_ms });
            }
            let Some(host) = self.hosts.get_mut(&t.host) else { continue };
            if host.gate.in_flight >= host.gate.cap {
                t.queued = true;
                host.blocked.push_back(target);
                continue;
            }
            let Some(key) = t.ready.pop_front() else { continue };
            t.gate.in_flight += 1;
            host.gate.in_flight += 1;
            self.in_flight += 1;
            self.queue(target);
            return Some(Turn::Fly(key));
        }
        None
    }

    /// A flight ended.
    pub(crate) fn landed(&mut self, target: u64, host: u64, flow: Flow, now_ms: i64) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if let Some(t) = self.targets.get_mut(&target) {
            t.gate.in_flight = t.gate.in_flight.saturating_sub(1);
            match flow {
                Flow::Good => t.gate.good(),
                Flow::Neutral => {}
                Flow::Bad | Flow::Dead => t.gate.bad(now_ms),
            }
        }
        self.queue(target);
        let Some(h) = self.hosts.get_mut(&host) else { return };
        h.gate.in_flight = h.gate.in_flight.saturating_sub(1);
        match flow {
            Flow::Good | Flow::Neutral | Flow::Bad => h.gate.good(),
            Flow::Dead => h.gate.bad(now_ms),
        }
        let free = h.gate.cap.saturating_sub(h.gate.in_flight) as usize;
        let unblocked = free.min(h.blocked.len());
        self.turns.extend(h.blocked.drain(..unblocked));
    }

    /// The pause of a target is over.
    pub(crate) fn wake(&mut self, target: u64) {
        if let Some(t) = self.targets.get_mut(&target) {
            t.sleeping = false;
        }
        self.queue(target);
    }

    fn queue(&mut self, target: u64) {
        if let Some(t) = self.targets.get_mut(&target)
            && !t.queued
            && !t.ready.is_empty()
            && t.gate.in_flight < t.gate.cap
        {
            t.queued = true;
            self.turns.push_back(target);
        }
    }

    fn target(&mut self, target: u64, host: u64) -> &mut Target {
        self.host(host);
        self.targets.entry(target).or_insert_with(|| Target {
            gate: Gate::new(self.limits.target, 1),
            host,
            ready: VecDeque::new(),
            queued: false,
            sleeping: false,
            deferred: false,
        })
    }

    fn host(&mut self, host: u64) -> &mut Host {
        self.hosts.entry(host).or_insert_with(|| Host {
            gate: Gate::new(self.limits.host, HOST_FLOOR),
            blocked: VecDeque::new(),
            deferred: false,
        })
    }

    fn forget(&mut self) {
        if self.targets.len() > REMEMBERED {
            self.targets.retain(|_, t| t.gate.held > 0 || t.gate.in_flight > 0 || t.queued || t.sleeping);
        }
        if self.hosts.len() > REMEMBERED {
            self.hosts.retain(|_, h| h.gate.held > 0 || h.gate.in_flight > 0 || !h.blocked.is_empty());
        }
    }
}
