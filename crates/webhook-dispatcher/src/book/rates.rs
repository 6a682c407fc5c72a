//! A token bucket per target, shared by all partitions of a process.
//!
//! A bucket is one number: the time at which it would be full again. The rate of a webhook is shared out among the
//! dispatchers by the partitions they own, so that together they keep it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Tokens that may gather, as a part of a second's.
const BURST: f64 = 0.1;
/// Nobody is sent away for longer: the share of this process may have grown meanwhile.
const ASK_AGAIN_MS: i64 = 1_000;
/// A timer is late by less than this; whoever comes later than that has not waited.
const LATE_MS: f64 = 1_000.0;
/// Buckets kept; full ones are forgotten beyond that.
const REMEMBERED: usize = 16_384;

/// The buckets of all targets with a rate.
#[derive(Debug)]
pub(crate) struct Rates {
    buckets: Mutex<HashMap<u64, Bucket>>,
    /// The part of each rate that is this process's, in millionths.
    share: AtomicU64,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    full_at_ms: f64,
    /// Somebody was sent away since the last token: a timer that wakes him late shall not cost tokens.
    waited_for: bool,
}

impl Default for Rates {
    fn default() -> Self {
        Self { buckets: Mutex::default(), share: AtomicU64::new(1_000_000) }
    }
}

impl Rates {
    /// This process owns so many of the partitions. Whoever asks for a token owns one, even where the count comes
    /// later than the partition.
    pub(crate) fn own(&self, owned: usize, partitions: usize) {
        let share = (owned.max(1) * 1_000_000).checked_div(partitions).unwrap_or(0);
        self.share.store(share.clamp(1, 1_000_000) as u64, Ordering::Relaxed);
    }

    /// Takes a token of `target`, which gets `per_second` of them.
    ///
    /// # Errors
    /// When to ask again, in Unix ms.
    pub(crate) fn take(&self, target: u64, per_second: u32, now_ms: i64) -> Result<(), i64> {
        let share = self.share.load(Ordering::Relaxed) as f64 / 1e6;
        let rate = f64::from(per_second.max(1)) * share;
        let token_ms = 1_000.0 / rate;
        let burst_ms = token_ms.max(1_000.0 * BURST);
        let now = now_ms as f64;
        let mut all = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= REMEMBERED && !all.contains_key(&target) {
            all.retain(|_, bucket| bucket.full_at_ms > now);
        }
        let bucket = all.entry(target).or_insert(Bucket { full_at_ms: now, waited_for: false });
        let late = bucket.waited_for && now - bucket.full_at_ms < burst_ms + LATE_MS;
        let late_ms = if late { burst_ms } else { 0.0 };
        // A clock that was set back must not close the bucket for hours.
        bucket.full_at_ms = bucket.full_at_ms.clamp(now - late_ms, now + burst_ms);
        let after = bucket.full_at_ms + token_ms;
        let early = after - (now + burst_ms);
        if early > 1e-6 {
            bucket.waited_for = true;
            return Err(now_ms + (early.ceil() as i64).clamp(1, ASK_AGAIN_MS));
        }
        *bucket = Bucket { full_at_ms: after, waited_for: false };
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
    fn a_timer_that_is_late_loses_no_tokens() {
        for (rate, late_ms) in [(10, 60), (100, 40)] {
            let rates = Rates::default();
            let (mut now, mut n) = (0, 0);
            while now < 10_000 {
                match rates.take(7, rate, now) {
                    Ok(()) => n += 1,
                    Err(at) => now = at + late_ms,
                }
            }
            let full = 10 * rate as usize;
            assert!((full * 97 / 100..=full + 12).contains(&n), "{rate}: {n}");
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
    fn a_share_that_grows_is_noticed_soon() {
        let rates = Rates::default();
        // A partition may ask before its process has counted it.
        rates.own(0, 8);
        assert_eq!(rates.take(7, 1, 0), Ok(()));
        let again = rates.take(7, 1, 0).unwrap_err();
        assert!(again <= 1_000, "asleep until {again}");
        rates.own(8, 8);
        let n = taken(&rates, 1, again, again + 5_000);
        assert!((3..=5).contains(&n), "{n}");
    }

    #[test]
    fn a_clock_that_goes_back_does_not_close_the_bucket() {
        let rates = Rates::default();
        assert_eq!(rates.take(1, 2, 10_000_000), Ok(()));
        assert!(rates.take(1, 2, 1_000).unwrap_err() <= 1_500);
    }
}
