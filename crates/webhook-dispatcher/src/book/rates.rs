//! A token bucket per target, shared by all partitions of a process.
//!
//! A bucket is one number: the time at which it would be full again. The rate of a webhook is shared out among the
//! dispatchers by the partitions they own, so that together they keep it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Tokens that may gather, as a part of a second's: a timer that is late loses none.
const BURST: f64 = 0.1;
/// Buckets kept; full ones are forgotten beyond that.
const REMEMBERED: usize = 16_384;

/// The buckets of all targets with a rate.
#[derive(Debug)]
pub(crate) struct Rates {
    full_at_ms: Mutex<HashMap<u64, f64>>,
    /// The part of each rate that is this process's, in millionths.
    share: AtomicU64,
}

impl Default for Rates {
    fn default() -> Self {
        Self { full_at_ms: Mutex::default(), share: AtomicU64::new(1_000_000) }
    }
}

impl Rates {
    /// This process owns so many of the partitions.
    pub(crate) fn own(&self, owned: usize, partitions: usize) {
        let share = (owned * 1_000_000).checked_div(partitions).unwrap_or(0);
        self.share.store(share.clamp(1, 1_000_000) as u64, Ordering::Relaxed);
    }

    /// Takes a token of `target`, which gets `per_second` of them.
    ///
    /// # Errors
    /// When the next one is there, in Unix ms.
    pub(crate) fn take(&self, target: u64, per_second: u32, now_ms: i64) -> Result<(), i64> {
        let share = self.share.load(Ordering::Relaxed) as f64 / 1e6;
        let rate = f64::from(per_second.max(1)) * share;
        let token_ms = 1_000.0 / rate;
        let burst_ms = token_ms.max(1_000.0 * BURST);
        let now = now_ms as f64;
        let mut all = self.full_at_ms.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= REMEMBERED && !all.contains_key(&target) {
            all.retain(|_, full_at| *full_at > now);
        }
        let full_at = all.entry(target).or_insert(now);
        // A clock that was set back must not close the bucket for hours.
        *full_at = full_at.clamp(now, now + burst_ms);
        let after = *full_at + token_ms;
        let early = after - (now + burst_ms);
        if early > 1e-6 {
            return Err(now_ms + (early.ceil() as i64).max(1));
        }
        *full_at = after;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(rates: &Rates, per_second: u32, from_ms: i64, to_ms: i64) -> usize {
        let mut now = from_ms;
        let mut n = 0;
        while now < to_ms {
            match rates.take(7, per_second, now) {
                Ok(()) => n += 1,
                Err(at) => now = at,
            }
        }
        n
    }

    #[test]
    fn a_flood_passes_at_the_rate() {
        for rate in [1, 3, 10, 250, 5_000] {
            let n = taken(&Rates::default(), rate, 1_000_000, 1_010_000);
            let most = 10 * rate as usize + (rate as usize / 10).max(1);
            assert!(n <= most && n * 100 >= 10 * rate as usize * 99, "{rate}: {n} in 10 s");
        }
    }

    #[test]
    fn waiting_does_not_save_up_and_targets_do_not_share() {
        let rates = Rates::default();
        assert_eq!(taken(&rates, 10, 0, 1), 1);
        assert_eq!(taken(&rates, 10, 3_600_000, 3_600_001), 1);
        assert_eq!(rates.take(8, 10, 3_600_000), Ok(()));
    }

    #[test]
    fn a_process_takes_the_part_of_its_partitions() {
        let rates = Rates::default();
        rates.own(2, 8);
        let n = taken(&rates, 40, 0, 10_000);
        assert!((99..=102).contains(&n), "{n}");
    }

    #[test]
    fn a_clock_that_goes_back_does_not_close_the_bucket() {
        let rates = Rates::default();
        assert_eq!(rates.take(1, 2, 10_000_000), Ok(()));
        assert!(rates.take(1, 2, 1_000).unwrap_err() <= 1_500);
    }
}
