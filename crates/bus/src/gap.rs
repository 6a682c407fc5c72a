//! Finds lost announcements: every publisher counts what it sends per partition.

use std::collections::HashMap;

/// What an announcement's counter says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// Follows the one before.
    InOrder,
    /// Something before it was missed: read the owed rows again from SQL.
    Gap,
    /// Seen before, or older than what was seen.
    Old,
}

/// Publishers remembered; a restart makes a new one, so old ones must go.
const MAX_PUBLISHERS: usize = 256;

/// Tracks the counters of the publishers of one partition. Clear it whenever the rows were read anew.
#[derive(Debug, Default)]
pub struct GapTracker {
    /// publisher → (last counter, order of last use)
    last: HashMap<u64, (u64, u64)>,
    uses: u64,
}

impl GapTracker {
    /// A tracker that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes note of an announcement. Counters of a publisher start at 1; the first one seen of an unknown
    /// publisher is a gap unless it is 1, because what came before it may have been missed.
    pub fn observe(&mut self, publisher: u64, counter: u64) -> Seen {
        self.uses += 1;
        if !self.last.contains_key(&publisher) && self.last.len() >= MAX_PUBLISHERS {
            self.forget_oldest();
        }
        let entry = self.last.entry(publisher).or_insert((0, self.uses));
        entry.1 = self.uses;
        if counter <= entry.0 {
            return Seen::Old;
        }
        let seen = if counter == entry.0 + 1 { Seen::InOrder } else { Seen::Gap };
        entry.0 = counter;
        seen
    }

    fn forget_oldest(&mut self) {
        let oldest = self.last.iter().min_by_key(|(_, (_, used))| *used).map(|(publisher, _)| *publisher);
        if let Some(publisher) = oldest {
            self.last.remove(&publisher);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn gaps_duplicates_and_strangers() {
        let mut gaps = GapTracker::new();
        assert_eq!(gaps.observe(1, 1), Seen::InOrder);
        assert_eq!(gaps.observe(1, 2), Seen::InOrder);
        assert_eq!(gaps.observe(1, 2), Seen::Old);
        assert_eq!(gaps.observe(1, 5), Seen::Gap);
        assert_eq!(gaps.observe(1, 6), Seen::InOrder);
        assert_eq!(gaps.observe(1, 3), Seen::Old);
        assert_eq!(gaps.observe(2, 9), Seen::Gap, "a stranger's earlier ones may have been missed");
        assert_eq!(gaps.observe(2, 10), Seen::InOrder);
    }

    #[test]
    fn memory_is_bounded_and_the_busy_are_kept() {
        let mut gaps = GapTracker::new();
        assert_eq!(gaps.observe(0, 1), Seen::InOrder);
        for publisher in 1..=10_000u64 {
            gaps.observe(publisher, 1);
            assert_eq!(gaps.observe(0, publisher + 1), Seen::InOrder);
        }
        assert!(gaps.last.len() <= MAX_PUBLISHERS);
    }

    proptest! {
        /// Whatever is lost, the next message that arrives tells.
        #[test]
        fn every_loss_is_noticed(kept in prop::collection::vec(any::<bool>(), 1..60)) {
            let mut gaps = GapTracker::new();
            let mut lost = false;
            for (n, keep) in kept.iter().enumerate() {
                if !keep {
                    lost = true;
                    continue;
                }
                let expected = if lost { Seen::Gap } else { Seen::InOrder };
                prop_assert_eq!(gaps.observe(7, n as u64 + 1), expected);
                lost = false;
            }
        }
    }
}
