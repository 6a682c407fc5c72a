//! Pauses between starts of a child that keeps ending.

use std::time::{Duration, Instant};

/// Pause after the second failure in a row; it doubles from there.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// From so many failures in a row on, the endpoint is in trouble.
const TROUBLE_AFTER: u32 = 3;
/// A child that lived this long was not part of a crash loop.
const STABLE: Duration = Duration::from_secs(60);

/// Counts failures in a row.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    failures: u32,
    last_reason: String,
}

impl Breaker {
    /// A child ended by itself. Returns how long to wait before the next start: not at all after a single
    /// failure, so that one crashed job does not stop its neighbours.
    pub(super) fn failed(&mut self, started: Instant, useful: bool, reason: String) -> Duration {
        if useful || started.elapsed() >= STABLE {
            self.failures = 0;
        }
        self.failures = self.failures.saturating_add(1);
        self.last_reason = reason;
        match self.failures {
            1 => Duration::ZERO,
            n => FIRST_PAUSE.saturating_mul(1 << (n - 2).min(10)).min(LONGEST_PAUSE),
        }
    }

    /// A child did a job or ended as it was told.
    pub(super) fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// Why the child does not stay up.
    pub(super) fn trouble(&self) -> Option<String> {
        (self.failures >= TROUBLE_AFTER)
            .then(|| format!("the handler ended {} times in a row: {}", self.failures, self.last_reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end_with_success() {
        let mut breaker = Breaker::default();
        let now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..10 {
            pauses.push(breaker.failed(now, false, "exit code 1".into()));
        }
        assert_eq!(pauses[0], Duration::ZERO);
        assert_eq!(pauses[1], FIRST_PAUSE);
        assert!(pauses.is_sorted());
        assert_eq!(pauses[9], LONGEST_PAUSE);
        assert!(
            breaker.trouble().is_some_and(|text| text.contains("10 times") && text.contains("exit code 1"))
        );
        breaker.succeeded();
        assert_eq!(breaker.trouble(), None);
        assert_eq!(breaker.failed(now, false, String::new()), Duration::ZERO);
        assert_eq!(breaker.failed(now, true, String::new()), Duration::ZERO, "it did a job in between");
    }
}
