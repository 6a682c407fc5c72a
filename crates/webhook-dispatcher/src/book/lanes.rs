//! What all partitions of a process share about a target: its breaker, and how many of its POSTs are on their way.
//!
//! So a dead target gets one probe per process, and one that may get few POSTs at once gets no more than those. Who is
//! refused asks again a little later: no partition waits for another one's word.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::breaker::{Breaker, BreakerLimits, Pass};
use super::gates::Flow;

/// Who is refused by what others do asks again after this time.
const LOOK_MS: i64 = 50;
/// Whoever does not ask again within this time has no claim to be next.
const STALE_MS: i64 = 4 * LOOK_MS;
/// Lanes kept; those without a memory worth keeping are forgotten beyond that.
const REMEMBERED: usize = 16_384;

/// The lanes to all targets.
#[derive(Debug)]
pub(crate) struct Lanes {
    breaker: BreakerLimits,
    /// To one target from all partitions of all processes.
    in_flight: u32,
    /// The part of it that is this process's, in millionths.
    share: AtomicU32,
    lanes: Mutex<HashMap<u64, Lane>>,
}

#[derive(Debug)]
struct Lane {
    breaker: Breaker,
    in_flight: u32,
    /// Partitions that found no place, and when they asked last. They come before whoever had one.
    waiting: VecDeque<(u16, i64)>,
}

impl Lane {
    fn new(limits: BreakerLimits) -> Self {
        Self { breaker: Breaker::new(limits), in_flight: 0, waiting: VecDeque::new() }
    }

    fn is_trivial(&self) -> bool {
        self.in_flight == 0 && self.waiting.is_empty() && self.breaker.is_fresh()
    }

    /// Whether it is this partition's turn to take one of `places`.
    fn admits(&mut self, partition: u16, places: u32, now_ms: i64) -> bool {
        self.waiting.retain(|(other, asked)| *other == partition || (now_ms - asked).abs() < STALE_MS);
        let ahead = self.waiting.iter().take_while(|(other, _)| *other != partition).count();
        let free = places.saturating_sub(self.in_flight) as usize;
        if free > ahead {
            self.waiting.retain(|(other, _)| *other != partition);
            return true;
        }
        match self.waiting.iter_mut().find(|(other, _)| *other == partition) {
            Some((_, asked)) => *asked = now_ms,
            None => self.waiting.push_back((partition, now_ms)),
        }
        false
    }
}

/// What [`Lanes::enter`] answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entrance {
    /// A place was taken.
    Free,
    /// A place was taken, for the one probe.
    Probe,
    /// Nothing before this time.
    NotBefore(i64),
}

impl Lanes {
    pub(crate) fn new(breaker: BreakerLimits, in_flight: u32) -> Self {
        Self { breaker, in_flight, share: AtomicU32::new(1_000_000), lanes: Mutex::default() }
    }

    /// This process owns so many of the partitions.
    pub(crate) fn own(&self, owned: usize, partitions: usize) {
        let share = (owned.max(1) * 1_000_000).checked_div(partitions).unwrap_or(0);
        self.share.store(u32::try_from(share).unwrap_or(u32::MAX).clamp(1, 1_000_000), Ordering::Relaxed);
    }

    /// Takes a place on the way to a target for a POST of this partition.
    pub(super) fn enter(&self, partition: u16, target: u64, now_ms: i64) -> Entrance {
        let share = u64::from(self.share.load(Ordering::Relaxed));
        let places = u64::from(self.in_flight).saturating_mul(share).div_ceil(1_000_000).max(1);
        let mut lanes = self.lock();
        if lanes.len() >= REMEMBERED && !lanes.contains_key(&target) {
            lanes.retain(|_, lane| lane.in_flight > 0 || lane.breaker.is_open());
        }
        let lane = lanes.entry(target).or_insert_with(|| Lane::new(self.breaker));
        let (places, entrance) = match lane.breaker.pass(now_ms) {
            Pass::NotBefore(until_ms) => return Entrance::NotBefore(until_ms),
            Pass::Free => (u32::try_from(places).unwrap_or(u32::MAX), Entrance::Free),
            Pass::Probe => (1, Entrance::Probe),
        };
        if !lane.admits(partition, places, now_ms) {
            return Entrance::NotBefore(now_ms + LOOK_MS);
        }
        lane.in_flight += 1;
        entrance
    }

    /// Gives a place back that was not used.
    pub(super) fn leave(&self, target: u64) {
        self.end(target, |_| {});
    }

    /// A POST has ended.
    pub(super) fn landed(&self, target: u64, flow: Flow, now_ms: i64) {
        self.end(target, |breaker| match flow {
            Flow::Good => breaker.good(),
            Flow::Neutral => {}
            Flow::Bad | Flow::Dead => breaker.bad(now_ms),
        });
    }

    /// Targets whose breaker is not closed.
    pub(super) fn open_breakers(&self) -> usize {
        self.lock().values().filter(|lane| lane.breaker.is_open()).count()
    }

    fn end(&self, target: u64, judge: impl FnOnce(&mut Breaker)) {
        let mut lanes = self.lock();
        if let Some(lane) = lanes.get_mut(&target) {
            lane.in_flight = lane.in_flight.saturating_sub(1);
            judge(&mut lane.breaker);
            if lane.is_trivial() {
                lanes.remove(&target);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Lane>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BREAKER: BreakerLimits =
        BreakerLimits { failures: 3, percent: 101, open_ms: 1_000, open_max_ms: 60_000 };

    #[test]
    fn a_dead_target_gets_one_probe_whoever_asks() {
        let lanes = Lanes::new(BREAKER, 64);
        // Three partitions, one failure each: together they open it.
        for partition in 0..3 {
            assert_eq!(lanes.enter(partition, 7, 0), Entrance::Free);
        }
        for _ in 0..3 {
            lanes.landed(7, Flow::Dead, 0);
        }
        assert_eq!(lanes.open_breakers(), 1);
        assert_eq!(lanes.enter(3, 7, 10), Entrance::NotBefore(1_000));
        let probes = (0..8).filter(|n| lanes.enter(*n, 7, 1_000) == Entrance::Probe).count();
        assert_eq!(probes, 1);
        lanes.landed(7, Flow::Bad, 1_100);
        assert_eq!(lanes.enter(1, 7, 1_150), Entrance::NotBefore(3_100), "everybody, and twice as long");
        assert_eq!(lanes.enter(2, 7, 3_100), Entrance::Probe);
        lanes.landed(7, Flow::Good, 3_110);
        assert_eq!(lanes.enter(5, 7, 3_120), Entrance::Free);
        // Another target has its own.
        assert_eq!(lanes.enter(5, 8, 3_120), Entrance::Free);
    }

    #[test]
    fn a_probe_that_could_not_fly_gives_its_place_back() {
        let lanes = Lanes::new(BreakerLimits { failures: 1, ..BREAKER }, 64);
        lanes.enter(0, 7, 0);
        lanes.landed(7, Flow::Bad, 0);
        assert_eq!(lanes.enter(0, 7, 1_000), Entrance::Probe);
        lanes.leave(7);
        assert_eq!(lanes.enter(1, 7, 1_001), Entrance::Probe);
        assert_eq!(lanes.open_breakers(), 1);
    }

    #[test]
    fn a_cap_below_the_number_of_partitions_holds_and_everybody_gets_a_turn() {
        let lanes = Lanes::new(BREAKER, 2);
        let (mut now, mut turns) = (0, [0; 8]);
        let mut flying: VecDeque<u16> = VecDeque::new();
        for _ in 0..400 {
            for partition in 0..8 {
                // Everybody always wants to, in the same order, which favours the first.
                if matches!(lanes.enter(partition, 7, now), Entrance::Free) {
                    turns[usize::from(partition)] += 1;
                    flying.push_back(partition);
                }
            }
            assert!(flying.len() <= 2);
            flying.pop_front();
            lanes.landed(7, Flow::Good, now);
            now += 10;
        }
        assert!(turns.iter().all(|n| (40..=60).contains(n)), "{turns:?}");
    }

    #[test]
    fn a_process_takes_the_part_of_its_partitions_and_forgets_what_is_quiet() {
        let lanes = Lanes::new(BREAKER, 8);
        lanes.own(2, 8);
        let free = (0..8).filter(|n| lanes.enter(*n, 7, 0) == Entrance::Free).count();
        assert_eq!(free, 2);
        for _ in 0..2 {
            lanes.landed(7, Flow::Good, 0);
        }
        for target in 0..100_000 {
            assert_eq!(lanes.enter(0, 1_000 + target, 0), Entrance::Free);
            lanes.landed(1_000 + target, if target % 2 == 0 { Flow::Good } else { Flow::Bad }, 0);
        }
        assert!(lanes.lock().len() <= REMEMBERED);
    }
}
