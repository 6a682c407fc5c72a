//! What one partition owes, in memory: order, turns, retries. Pure: time and dice are arguments.
//!
//! Rules (DESIGN 6): deliveries of one job to one target go in order, different jobs in parallel. A delivery is
//! eligible when no lower one of its chain is pending. When a job has ended, notices of earlier states that have
//! failed once, and those behind them, are superseded; those that were never tried still get their one try, so that
//! a quick job tells all its states. A target with strict order supersedes nothing: each one waits until the one
//! before it is acknowledged or given up. A replay is sent as asked: nothing supersedes it.
//!
//! Progress and streamed text are events of their own, each a chain of one. The tracker notes in SQL that the attempt
//! they tell of is over, and says so: what waits of them is superseded, tried or not. Whoever missed the word meets the
//! note, for SQL is asked before each further try of such an event.
//!
//! Nothing here is the only copy: everything can be dropped from memory and read again from SQL.

mod breaker;
mod changes;
mod gates;
mod landings;
mod lanes;
mod offers;
mod order;
mod process;
mod rates;
mod settled;
#[cfg(test)]
mod tests;
mod types;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use uuid::Uuid;

pub(crate) use self::breaker::BreakerLimits;
use self::gates::Gates;
pub(crate) use self::gates::{Flow, GateLimits, Place};
pub(crate) use self::process::Process;
use self::settled::SettledMemory;
pub(crate) use self::types::{
    BookLimits, ChainKey, Change, Flight, Offer, Offered, Owed, Rules, Sign, Source, Standing, Tried,
};

#[derive(Debug)]
struct Entry {
    owed: Arc<Owed>,
    attempts: u32,
    first_try_at_ms: Option<i64>,
    due_at_ms: i64,
    /// What it tells is over.
    overtaken: bool,
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
    pub(crate) fn new(limits: BookLimits, partition: u16, process: Arc<Process>) -> Self {
        Self {
            limits,
            chains: HashMap::new(),
            gates: Gates::new(limits.gates, partition, process),
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
}
