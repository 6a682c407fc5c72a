//! How many submits a project may make.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use crate::error::ApiError;

const WINDOW_NS: u64 = 10_000_000_000;

/// A token bucket that holds ten seconds' worth (GCRA): one number, no timer.
#[derive(Debug)]
pub(crate) struct Rate {
    per_10s: u64,
    began: Instant,
    /// When the bucket is full again, ns since `began`.
    full_at_ns: AtomicU64,
}

impl Rate {
    /// 0 = no limit.
    pub(crate) fn per_10s(per_10s: u64) -> Self {
        Self { per_10s, began: Instant::now(), full_at_ns: AtomicU64::new(0) }
    }

    /// Takes `n` submits, or says when to come again.
    pub(crate) fn take(&self, n: u64) -> Result<(), ApiError> {
        if self.per_10s == 0 {
            return Ok(());
        }
        let now_ns = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.take_at(n, now_ns).map_err(|wait_ns| {
            ApiError::too_many(
                format!(
                    "more than {} submits in 10 seconds (settings server.submits_per_10s and \
                     projects.<name>.submits_per_10s); wait and try again",
                    self.per_10s
                ),
                wait_ns.div_ceil(1_000_000_000).max(1),
            )
        })
    }

    fn take_at(&self, n: u64, now_ns: u64) -> Result<(), u64> {
        let cost_ns = u64::try_from(u128::from(n) * u128::from(WINDOW_NS) / u128::from(self.per_10s))
            .unwrap_or(u64::MAX);
        let taken = self.full_at_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
            let next = full_at.max(now_ns).saturating_add(cost_ns);
            // More than a whole window at once passes when the bucket is full: a large batch is delayed, not barred.
            (next <= now_ns.saturating_add(WINDOW_NS) || full_at <= now_ns).then_some(next)
        });
        taken.map(drop).map_err(|full_at| {
            full_at
                .saturating_add(cost_ns)
                .saturating_sub(now_ns.saturating_add(WINDOW_NS))
                .min(full_at - now_ns)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn ten_seconds_worth_at_once_then_evenly() {
        let rate = Rate::per_10s(100);
        assert_eq!((0..150).filter(|_| rate.take_at(1, 0).is_ok()).count(), 100);
        assert_eq!(rate.take_at(1, 0), Err(S / 10));
        assert_eq!((0..50).filter(|_| rate.take_at(1, S).is_ok()).count(), 10);
        assert_eq!(
            (0..500).filter(|_| rate.take_at(1, 100 * S).is_ok()).count(),
            100,
            "unused time is not saved up"
        );
    }

    #[test]
    fn a_batch_above_the_window_passes_once_and_is_paid_for() {
        let rate = Rate::per_10s(100);
        assert!(rate.take_at(1000, 0).is_ok());
        assert!(rate.take_at(1, 50 * S).is_err());
        assert!(rate.take_at(1, 91 * S).is_ok());
        assert!(Rate::per_10s(0).take(u64::MAX).is_ok());
    }
}
