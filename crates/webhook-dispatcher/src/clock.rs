//! The database's clock, as seen from here.
//!
//! Due times in SQL are read and written by several dispatchers and by the services that insert deliveries: all of
//! them mean the database's clock. A host whose own clock is wrong would send too early or too late, and would sign
//! with a time that receivers refuse.

use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::Instant;

use ringback_service_runtime::time::now_ms;

/// Runs at the speed of this host's monotonic clock; each look at the database's puts it right.
#[derive(Debug)]
pub(crate) struct Clock {
    origin: Instant,
    /// The time at `origin`, Unix ms.
    at_origin_ms: AtomicI64,
}

impl Clock {
    /// This host's clock, until the database's has been seen.
    pub(crate) fn new() -> Self {
        Self { origin: Instant::now(), at_origin_ms: AtomicI64::new(now_ms()) }
    }

    /// Unix ms.
    pub(crate) fn now_ms(&self) -> i64 {
        self.at_origin_ms.load(Relaxed) + since(self.origin, Instant::now())
    }

    /// The database said `database_ms` at some moment after `asked` and before now. What fits into that is left as it
    /// is, so that the way there and back does not make the clock jitter.
    pub(crate) fn see(&self, asked: Instant, database_ms: i64) {
        let latest = database_ms - since(self.origin, asked);
        let earliest = database_ms - since(self.origin, Instant::now());
        let known = self.at_origin_ms.load(Relaxed);
        self.at_origin_ms.store(known.clamp(earliest, latest), Relaxed);
    }
}

/// Negative where `at` lies before `origin`.
fn since(origin: Instant, at: Instant) -> i64 {
    let ms = |span: std::time::Duration| i64::try_from(span.as_millis()).unwrap_or(i64::MAX);
    match at.checked_duration_since(origin) {
        Some(after) => ms(after),
        None => -ms(origin.saturating_duration_since(at)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_the_database_and_does_not_jitter() {
        let clock = Clock::new();
        let asked = Instant::now();
        clock.see(asked, 1_000_000);
        let first = clock.now_ms();
        assert!((1_000_000..1_005_000).contains(&first), "{first}");
        // An answer that was 50 ms on its way agrees with any time within these.
        let kept = clock.at_origin_ms.load(Relaxed);
        clock.see(Instant::now() - std::time::Duration::from_millis(50), clock.now_ms() - 20);
        assert_eq!(clock.at_origin_ms.load(Relaxed), kept);
        clock.see(Instant::now(), 900_000);
        assert!((900_000..905_000).contains(&clock.now_ms()));
    }
}
