//! The lease of a partition, as seen from within its process.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

/// What the owner of the lease says to its partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lease {
    renewed_at: Instant,
    /// The same moment on the wall clock, which goes on while the host sleeps; the monotonic clock stands still then.
    renewed_at_wall: SystemTime,
    /// No try begins later than this after the renewal.
    valid_for: Duration,
    /// What to do.
    pub(crate) order: Order,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Work.
    Own,
    /// Begin nothing more, end what flies, write it down, return.
    HandOver,
    /// Somebody else owns it: drop everything.
    Lost,
}

/// A moment before a request to the database: it cannot have granted a lease earlier.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    at: Instant,
    wall: SystemTime,
}

impl Asked {
    pub(crate) fn now() -> Self {
        Self { at: Instant::now(), wall: SystemTime::now() }
    }

    pub(crate) fn at(self) -> Instant {
        self.at
    }
}

impl Lease {
    /// A lease granted after `asked`. Tries begin in its first three quarters: the rest is for those that have begun.
    pub(crate) fn granted(asked: Asked, lease: Duration) -> Self {
        Self {
            renewed_at: asked.at,
            renewed_at_wall: asked.wall,
            valid_for: lease * 3 / 4,
            order: Order::Own,
        }
    }

    /// Renewed after `asked`.
    pub(crate) fn renewed(&mut self, asked: Asked) {
        (self.renewed_at, self.renewed_at_wall) = (asked.at, asked.wall);
    }

    /// Whether a try may begin now. Asked at the last moment before a POST: between the decision to send and the sending
    /// a process may be starved, stopped or suspended for any time.
    pub(crate) fn allows(&self) -> bool {
        // A wall clock that was put forward costs the time until the next renewal, one that was put back nothing.
        let asleep = self.renewed_at_wall.elapsed().is_ok_and(|passed| passed >= self.valid_for);
        self.order == Order::Own && self.renewed_at.elapsed() < self.valid_for && !asleep
    }

    pub(crate) fn renewed_ms_ago(&self) -> u64 {
        let passed = self.renewed_at.elapsed().max(self.renewed_at_wall.elapsed().unwrap_or_default());
        u64::try_from(passed.as_millis()).unwrap_or(u64::MAX)
    }
}

/// How many tries of a partition are in doubt: begun, and not in SQL.
#[derive(Debug, Clone, Default)]
pub(crate) struct Doubts(Arc<AtomicUsize>);

impl Doubts {
    pub(crate) fn set(&self, tries: usize) {
        self.0.store(tries, Relaxed);
    }

    pub(crate) fn get(&self) -> usize {
        self.0.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(8);

    fn ago(seconds: u64, wall_seconds: u64) -> Lease {
        let asked = Asked {
            at: Instant::now() - Duration::from_secs(seconds),
            wall: SystemTime::now() - Duration::from_secs(wall_seconds),
        };
        Lease::granted(asked, LEASE)
    }

    #[test]
    fn a_try_begins_within_three_quarters_of_a_lease() {
        assert!(ago(5, 5).allows());
        assert!(!ago(6, 6).allows());
        let handed_over = Lease { order: Order::HandOver, ..ago(0, 0) };
        assert!(!handed_over.allows());
        let mut renewed = ago(6, 6);
        renewed.renewed(Asked::now());
        assert!(renewed.allows());
    }

    #[test]
    fn a_host_that_slept_begins_nothing_though_its_monotonic_clock_stood_still() {
        assert!(!ago(1, 60).allows());
        assert!(ago(1, 60).renewed_ms_ago() >= 60_000);
        // A wall clock that was put back says nothing.
        let asked = Asked { at: Instant::now(), wall: SystemTime::now() + Duration::from_secs(900) };
        assert!(Lease::granted(asked, LEASE).allows());
    }
}
