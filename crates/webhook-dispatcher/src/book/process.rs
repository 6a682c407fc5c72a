//! What the partitions of a process share: limits that hold for a target, whichever partition its jobs lie in.

use super::breaker::BreakerLimits;
use super::lanes::Lanes;
use super::rates::Rates;

/// Shared by all books of a process.
#[derive(Debug)]
pub(crate) struct Process {
    pub(super) rates: Rates,
    pub(super) lanes: Lanes,
}

impl Process {
    /// `in_flight`: POSTs on their way to one target, from all partitions of all processes.
    pub(crate) fn new(breaker: BreakerLimits, in_flight: u32) -> Self {
        Self { rates: Rates::default(), lanes: Lanes::new(breaker, in_flight) }
    }

    /// This process owns so many of the partitions, and has that part of each limit.
    pub(crate) fn own(&self, owned: usize, partitions: usize) {
        self.rates.own(owned, partitions);
        self.lanes.own(owned, partitions);
    }

    /// Targets that are left alone because they fail.
    pub(crate) fn open_breakers(&self) -> usize {
        self.lanes.open_breakers()
    }
}
