//! Who may be in flight: fair turns over projects, then over their targets; a cap per target and per host, both
//! shrinking with failures. The lane to a target with its breaker, and its rate, are shared by all partitions of the
//! process.
//!
//! A target is a registered webhook, or one URL without its query, for one project; a host is scheme, name and port,
//! for one project. Answers that say "overloaded" or "broken" shrink the target; only faults of the transport shrink
//! the host, because one bad path does not make its neighbours bad (P9).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::ChainKey;
use super::lanes::Entrance;
use super::process::Process;

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
    /// In flight of one project.
    pub project: u32,
    /// Deliveries of one target or host in memory.
    pub quota: u32,
    /// Deliveries of one project in memory.
    pub project_quota: u32,
}

/// Through which gates a delivery goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// The project that owes it.
    pub project: i64,
    /// Its target.
    pub target: u64,
    /// Its host.
    pub host: u64,
    /// POSTs per second that its target takes.
    pub rate: Option<u32>,
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
}

impl Gate {
    fn new(max: u32, floor: u32) -> Self {
        let max = max.max(1);
        Self { in_flight: 0, held: 0, cap: max, max, floor: floor.min(max), failures: 0 }
    }

    fn good(&mut self) {
        self.failures = 0;
        self.cap = (self.cap + 1).min(self.max);
    }

    fn bad(&mut self) {
        self.failures = self.failures.saturating_add(1);
        self.cap = (self.cap / 2).max(self.floor);
    }

    fn quota(&self, limit: u32) -> u32 {
        if self.failures >= FAILING_AFTER { FAILING_QUOTA.min(limit) } else { limit }
    }
}

#[derive(Debug)]
struct Target {
    gate: Gate,
    project: i64,
    host: u64,
    rate: Option<u32>,
    ready: VecDeque<ChainKey>,
    /// In the turns, or with the blocked ones of its host or project.
    queued: bool,
    /// A wake-up is set for the time when it may go on.
    sleeping: bool,
    /// Something of it was left in SQL for want of room.
    deferred: bool,
}

impl Target {
    /// Whether another one may fly as far as this partition's part of the target is concerned.
    fn has_place(&self) -> bool {
        self.gate.in_flight < self.gate.cap
    }

    /// The next chain: in turn, but the oldest where it is a probe.
    fn pop(&mut self, probe: bool) -> Option<ChainKey> {
        if !probe {
            return self.ready.pop_front();
        }
        // Owners are UUIDv7: their order is the order of time.
        let at = self.ready.iter().enumerate().min_by_key(|(_, key)| key.owner).map(|(at, _)| at)?;
        self.ready.remove(at)
    }
}

/// What several targets share: a host, or a project.
#[derive(Debug)]
struct Common {
    gate: Gate,
    blocked: VecDeque<u64>,
    /// Something of it was left in SQL for want of room.
    deferred: bool,
}

impl Common {
    fn new(max: u32, floor: u32) -> Self {
        Self { gate: Gate::new(max, floor), blocked: VecDeque::new(), deferred: false }
    }

    fn is_full(&self) -> bool {
        self.gate.in_flight >= self.gate.cap
    }

    /// Remembers that something was left out when there is no room in memory.
    fn admits(&mut self, limit: u32) -> bool {
        let admits = self.gate.held < self.gate.quota(limit);
        self.deferred |= !admits;
        admits
    }

    /// One left memory; whether something left in SQL has room now.
    fn release(&mut self, limit: u32) -> bool {
        self.gate.held = self.gate.held.saturating_sub(1);
        let refill = self.deferred && self.gate.held <= self.gate.quota(limit) / 2;
        self.deferred &= !refill;
        refill
    }

    /// The targets that may go on now.
    fn unblock(&mut self) -> std::collections::vec_deque::Drain<'_, u64> {
        let free = self.gate.cap.saturating_sub(self.gate.in_flight) as usize;
        self.blocked.drain(..free.min(self.blocked.len()))
    }

    fn is_idle(&self) -> bool {
        self.gate.held == 0 && self.gate.in_flight == 0 && self.blocked.is_empty()
    }
}

/// Fair turns: projects one after the other, each with its targets one after the other.
#[derive(Debug, Default)]
struct Turns {
    projects: VecDeque<i64>,
    targets: HashMap<i64, VecDeque<u64>>,
}

impl Turns {
    fn push(&mut self, project: i64, target: u64) {
        let queue = self.targets.entry(project).or_default();
        if queue.is_empty() {
            self.projects.push_back(project);
        }
        queue.push_back(target);
    }

    fn pop(&mut self) -> Option<u64> {
        let project = self.projects.pop_front()?;
        let queue = self.targets.get_mut(&project)?;
        let target = queue.pop_front();
        if queue.is_empty() {
            self.targets.remove(&project);
        } else {
            self.projects.push_back(project);
        }
        target
    }
}

/// What [`Gates::next`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// This chain may fly.
    Fly(ChainKey),
    /// This target may go on only later, by its breaker or its rate: wake it then, and ask again.
    Sleep {
        /// The target.
        target: u64,
        /// When.
        until_ms: i64,
    },
}

/// The gates of one partition.
#[derive(Debug)]
pub(crate) struct Gates {
    limits: GateLimits,
    partition: u16,
    process: Arc<Process>,
    in_flight: u32,
    targets: HashMap<u64, Target>,
    hosts: HashMap<u64, Common>,
    projects: HashMap<i64, Common>,
    turns: Turns,
}

impl Drop for Gates {
    /// What still flies is of no more account: its places go to other partitions.
    fn drop(&mut self) {
        for (target, t) in &self.targets {
            for _ in 0..t.gate.in_flight {
                self.process.lanes.leave(*target);
            }
        }
    }
}

impl Gates {
    pub(crate) fn new(limits: GateLimits, partition: u16, process: Arc<Process>) -> Self {
        Self {
            limits,
            partition,
            process,
            in_flight: 0,
            targets: HashMap::new(),
            hosts: HashMap::new(),
            projects: HashMap::new(),
            turns: Turns::default(),
        }
    }

    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Whether there is room for one more delivery in memory; if not, that is remembered.
    pub(crate) fn admits(&mut self, place: &Place) -> bool {
        let limit = self.limits.quota;
        let project_limit = self.limits.project_quota;
        if self.projects.get_mut(&place.project).is_some_and(|p| !p.admits(project_limit))
            || self.hosts.get_mut(&place.host).is_some_and(|h| !h.admits(limit))
        {
            return false;
        }
        match self.targets.get_mut(&place.target) {
            Some(t) if t.gate.held >= t.gate.quota(limit) => {
                t.deferred = true;
                false
            }
            Some(_) | None => true,
        }
    }

    pub(crate) fn hold(&mut self, place: &Place) {
        self.target(place).gate.held += 1;
        if let Some(host) = self.hosts.get_mut(&place.host) {
            host.gate.held += 1;
        }
        if let Some(project) = self.projects.get_mut(&place.project) {
            project.gate.held += 1;
        }
    }

    /// One delivery left memory. Answers whether something left in SQL has room now.
    pub(crate) fn release(&mut self, place: &Place) -> bool {
        let limit = self.limits.quota;
        let mut refill = false;
        if let Some(p) = self.projects.get_mut(&place.project) {
            refill |= p.release(self.limits.project_quota);
            if p.is_idle() {
                self.projects.remove(&place.project);
            }
        }
        if let Some(h) = self.hosts.get_mut(&place.host) {
            refill |= h.release(limit);
            if h.is_idle() && h.gate.failures == 0 {
                self.hosts.remove(&place.host);
            }
        }
        if let Some(t) = self.targets.get_mut(&place.target) {
            t.gate.held = t.gate.held.saturating_sub(1);
            if t.deferred && t.gate.held <= t.gate.quota(limit) / 2 {
                t.deferred = false;
                refill = true;
            }
            let idle = t.gate.held == 0 && t.gate.in_flight == 0 && !t.queued && !t.sleeping;
            if idle && t.gate.failures == 0 {
                self.targets.remove(&place.target);
            }
        }
        self.forget();
        refill
    }

    /// A chain waits for its turn.
    pub(crate) fn push(&mut self, place: &Place, key: ChainKey) {
        let target = self.target(place);
        (target.rate, target.host) = (place.rate, place.host);
        target.ready.push_back(key);
        self.queue(place.target);
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
            let target = self.turns.pop()?;
            let Some(t) = self.targets.get_mut(&target) else { continue };
            t.queued = false;
            if t.ready.is_empty() || t.sleeping {
                continue;
            }
            if !t.has_place() {
                continue;
            }
            let Some(host) = self.hosts.get_mut(&t.host) else { continue };
            let Some(project) = self.projects.get_mut(&t.project) else { continue };
            let full =
                if host.is_full() { Some(&mut *host) } else { Some(&mut *project).filter(|p| p.is_full()) };
            if let Some(full) = full {
                t.queued = true;
                full.blocked.push_back(target);
                continue;
            }
            let entrance = self.process.lanes.enter(self.partition, target, now_ms);
            if let Entrance::NotBefore(until_ms) = entrance {
                t.sleeping = true;
                return Some(Turn::Sleep { target, until_ms });
            }
            if let Some(rate) = t.rate
                && let Err(until_ms) = self.process.rates.take(target, rate, now_ms)
            {
                self.process.lanes.leave(target);
                t.sleeping = true;
                return Some(Turn::Sleep { target, until_ms });
            }
            let Some(key) = t.pop(entrance == Entrance::Probe) else {
                self.process.lanes.leave(target);
                continue;
            };
            t.gate.in_flight += 1;
            host.gate.in_flight += 1;
            project.gate.in_flight += 1;
            self.in_flight += 1;
            self.queue(target);
            return Some(Turn::Fly(key));
        }
        None
    }

    /// A flight ended.
    pub(crate) fn landed(&mut self, place: &Place, flow: Flow, now_ms: i64) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.process.lanes.landed(place.target, flow, now_ms);
        if let Some(t) = self.targets.get_mut(&place.target) {
            t.gate.in_flight = t.gate.in_flight.saturating_sub(1);
            match flow {
                Flow::Good => t.gate.good(),
                Flow::Neutral => {}
                Flow::Bad | Flow::Dead => t.gate.bad(),
            }
        }
        self.queue(place.target);
        if let Some(p) = self.projects.get_mut(&place.project) {
            p.gate.in_flight = p.gate.in_flight.saturating_sub(1);
            for target in p.unblock() {
                self.turns.push(place.project, target);
            }
        }
        if let Some(h) = self.hosts.get_mut(&place.host) {
            h.gate.in_flight = h.gate.in_flight.saturating_sub(1);
            match flow {
                Flow::Good | Flow::Neutral | Flow::Bad => h.gate.good(),
                Flow::Dead => h.gate.bad(),
            }
            for target in h.unblock() {
                self.turns.push(place.project, target);
            }
        }
    }

    /// A target may go on.
    pub(crate) fn wake(&mut self, target: u64) {
        if let Some(t) = self.targets.get_mut(&target) {
            t.sleeping = false;
        }
        self.queue(target);
    }

    fn queue(&mut self, target: u64) {
        if let Some(t) = self.targets.get_mut(&target)
            && !t.queued
            && !t.sleeping
            && !t.ready.is_empty()
            && t.has_place()
        {
            t.queued = true;
            self.turns.push(t.project, target);
        }
    }

    fn target(&mut self, place: &Place) -> &mut Target {
        let limits = self.limits;
        self.projects.entry(place.project).or_insert_with(|| Common::new(limits.project, limits.project));
        self.hosts.entry(place.host).or_insert_with(|| Common::new(limits.host, HOST_FLOOR));
        self.targets.entry(place.target).or_insert_with(|| Target {
            gate: Gate::new(limits.target, 1),
            project: place.project,
            host: place.host,
            rate: place.rate,
            ready: VecDeque::new(),
            queued: false,
            sleeping: false,
            deferred: false,
        })
    }

    fn forget(&mut self) {
        if self.targets.len() > REMEMBERED {
            self.targets.retain(|_, t| t.gate.held > 0 || t.gate.in_flight > 0 || t.queued || t.sleeping);
        }
        if self.hosts.len() > REMEMBERED {
            self.hosts.retain(|_, h| !h.is_idle());
        }
    }
}
