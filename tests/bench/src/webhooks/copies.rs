//! Which copies a crash explains.
//!
//! A dispatcher that dies leaves tries that were answered and not yet recorded, and its successor makes them again. So a
//! copy is explained by a death only if the process that brought the copy before is the one that died, if this one came
//! after the death, and if that process had no time to record the one before: it records each partition in order, so one
//! that it brought later and that never came again was recorded first. Who brought a copy is known by its partition,
//! whose owners follow each other. All times are Unix ms of this machine.

use std::collections::HashMap;

/// Answers to tries of one partition that are on their way together may be recorded in another order.
const IN_ORDER_AFTER_MS: i64 = 500;
/// A dispatcher says that it owns a partition when it begins to send.
const SAID_WITHIN_MS: i64 = 5;

/// A dispatcher took a partition.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tenure {
    /// Which partition.
    pub(super) partition: u16,
    /// Which process, by the number of its start.
    pub(super) process: u32,
    /// When.
    pub(super) from_ms: i64,
}

/// A lease that lapsed with tries in flight, as its dispatcher said.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lapse {
    /// Of which partition.
    pub(super) partition: u16,
    /// Its last renewal.
    pub(super) from_ms: i64,
    /// When the dispatcher saw that it is over.
    pub(super) until_ms: i64,
    /// How many tries.
    pub(super) tries: u64,
}

/// What may cause copies, and who brought them.
#[derive(Debug, Default)]
pub(super) struct Causes {
    /// Owners of partitions.
    pub(super) tenures: Vec<Tenure>,
    /// When each process was killed.
    pub(super) deaths: HashMap<u32, i64>,
    /// Told lapses.
    pub(super) lapses: Vec<Lapse>,
}

/// Copies beyond the first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Doubles {
    /// All of them.
    pub(super) all: u64,
    /// Those of them that no death and no lapse explains.
    pub(super) unexplained: u64,
    /// How long an explained one came before the last that its process recorded of its partition, at most.
    pub(super) overtaken_ms: i64,
}

impl Causes {
    /// Judges the copies of each delivery, given with its partition.
    pub(super) fn judge(&self, entries: &[(u16, Vec<i64>)]) -> Doubles {
        // When the last one came that a process recorded of a partition.
        let mut recorded: HashMap<(u32, u16), i64> = HashMap::new();
        for (partition, copies) in entries {
            if let Some(&last) = copies.last()
                && let Some(process) = self.owner(*partition, last)
            {
                let at = recorded.entry((process, *partition)).or_insert(last);
                *at = last.max(*at);
            }
        }
        let mut doubles = Doubles::default();
        for (partition, copies) in entries {
            for (&before, &again) in copies.iter().zip(copies.iter().skip(1)) {
                doubles.all += 1;
                if self.lapsed(*partition, before, again) {
                    continue;
                }
                let overtaken = self.owner(*partition, before).and_then(|process| {
                    self.deaths.get(&process).filter(|death| **death <= again)?;
                    Some(recorded.get(&(process, *partition)).map_or(0, |last| last - before))
                });
                match overtaken {
                    Some(ms) if ms <= IN_ORDER_AFTER_MS => {
                        doubles.overtaken_ms = doubles.overtaken_ms.max(ms)
                    }
                    _ => doubles.unexplained += 1,
                }
            }
        }
        doubles
    }

    fn owner(&self, partition: u16, at_ms: i64) -> Option<u32> {
        let of =
            self.tenures.iter().filter(|t| t.partition == partition && t.from_ms <= at_ms + SAID_WITHIN_MS);
        of.max_by_key(|tenure| tenure.from_ms).map(|tenure| tenure.process)
    }

    fn lapsed(&self, partition: u16, before: i64, again: i64) -> bool {
        let during = |lapse: &Lapse| lapse.from_ms <= again && before <= lapse.until_ms;
        self.lapses.iter().any(|lapse| lapse.partition == partition && during(lapse))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first process has the partition until it is killed at 2,000, the second one from 3,000 on.
    fn causes() -> Causes {
        let tenure = |process, from_ms| Tenure { partition: 7, process, from_ms };
        Causes {
            tenures: vec![tenure(2, 3_000), tenure(1, 0)],
            deaths: HashMap::from([(1, 2_000)]),
            ..Causes::default()
        }
    }

    fn judged(causes: &Causes, entries: &[&[i64]]) -> (u64, u64) {
        let entries: Vec<_> = entries.iter().map(|copies| (7, copies.to_vec())).collect();
        let doubles = causes.judge(&entries);
        (doubles.all, doubles.unexplained)
    }

    #[test]
    fn what_was_in_doubt_at_a_death_comes_again() {
        assert_eq!(judged(&causes(), &[&[1_800], &[1_750, 3_000], &[1_990, 3_100]]), (2, 0));
    }

    #[test]
    fn what_its_process_had_time_to_record_does_not() {
        assert_eq!(judged(&causes(), &[&[1_800], &[1_200, 3_000]]), (1, 1));
    }

    #[test]
    fn a_death_explains_nothing_of_another_process_or_of_what_came_before_it() {
        assert_eq!(judged(&causes(), &[&[3_100, 3_200]]), (1, 1), "the second one lives");
        assert_eq!(judged(&causes(), &[&[1_900, 1_950]]), (1, 1), "the first one was alive");
        assert_eq!(
            judged(&causes(), &[&[1_990, 3_000, 3_500]]),
            (2, 1),
            "a third copy needs a cause of its own"
        );
    }

    #[test]
    fn a_told_lapse_explains_copies_of_its_partition() {
        let judged = |partition, from_ms, until_ms| {
            let lapses = vec![Lapse { partition, from_ms, until_ms, tries: 1 }];
            judged(&Causes { lapses, ..causes() }, &[&[1_000, 1_500]])
        };
        assert_eq!(judged(7, 900, 1_600), (1, 0));
        assert_eq!(judged(8, 900, 1_600), (1, 1));
        assert_eq!(judged(7, 1_600, 1_700), (1, 1));
    }
}
