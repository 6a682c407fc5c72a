//! A target that fails is left alone: closed, open, half-open.
//!
//! Closed: everything passes. After so many failures in a row, or when nearly all of the latest tries failed, it
//! opens: nothing is tried until its time is over. Then one delivery, the oldest, is the probe: a success closes the
//! breaker, a failure opens it again for twice as long, up to a cap.

/// The latest tries that the ratio is taken of.
const WINDOW: u32 = u64::BITS;

/// When a breaker opens and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BreakerLimits {
    /// Failures in a row that open it.
    pub failures: u32,
    /// Failed part of a full window that opens it, in percent; over 100 never does.
    pub percent: u32,
    /// The first time open.
    pub open_ms: i64,
    /// The longest time open.
    pub open_max_ms: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed,
    Open { until_ms: i64 },
    HalfOpen,
}

/// What may pass now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    /// Everything.
    Free,
    /// One at a time.
    Probe,
    /// Nothing before this time.
    NotBefore(i64),
}

/// The breaker of one target.
#[derive(Debug, Clone, Copy)]
pub(super) struct Breaker {
    limits: BreakerLimits,
    state: State,
    in_a_row: u32,
    /// One bit per try, the latest lowest; set = failed.
    window: u64,
    seen: u32,
    next_open_ms: i64,
}

impl Breaker {
    pub(super) fn new(limits: BreakerLimits) -> Self {
        Self { limits, state: State::Closed, in_a_row: 0, window: 0, seen: 0, next_open_ms: limits.open_ms }
    }

    /// Whether nothing but a probe passes.
    pub(super) fn is_open(&self) -> bool {
        self.state != State::Closed
    }

    /// Whether it remembers nothing bad.
    pub(super) fn is_fresh(&self) -> bool {
        !self.is_open() && self.window == 0
    }

    pub(super) fn pass(&mut self, now_ms: i64) -> Pass {
        match self.state {
            State::Closed => Pass::Free,
            State::HalfOpen => Pass::Probe,
            State::Open { until_ms } if until_ms > now_ms => Pass::NotBefore(until_ms),
            State::Open { .. } => {
                self.state = State::HalfOpen;
                Pass::Probe
            }
        }
    }

    pub(super) fn good(&mut self) {
        self.in_a_row = 0;
        self.note(false);
        if self.state != State::Closed {
            *self = Self::new(self.limits);
        }
    }

    pub(super) fn bad(&mut self, now_ms: i64) {
        self.in_a_row = self.in_a_row.saturating_add(1);
        self.note(true);
        let failed = self.window.count_ones().saturating_mul(100);
        let mostly = self.seen >= WINDOW && failed >= self.limits.percent.saturating_mul(WINDOW);
        match self.state {
            // What was on its way when it opened says nothing more.
            State::Open { .. } => {}
            State::Closed if self.in_a_row < self.limits.failures && !mostly => {}
            State::Closed | State::HalfOpen => {
                self.state = State::Open { until_ms: now_ms + self.next_open_ms };
                self.next_open_ms = (self.next_open_ms * 2).min(self.limits.open_max_ms);
            }
        }
    }

    fn note(&mut self, failed: bool) {
        self.window = self.window << 1 | u64::from(failed);
        self.seen = self.seen.saturating_add(1).min(WINDOW);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: BreakerLimits =
        BreakerLimits { failures: 3, percent: 90, open_ms: 1_000, open_max_ms: 3_000 };

    fn opened() -> Breaker {
        let mut breaker = Breaker::new(LIMITS);
        for _ in 0..3 {
            assert_eq!(breaker.pass(0), Pass::Free);
            breaker.bad(0);
        }
        breaker
    }

    #[test]
    fn it_opens_for_longer_each_time_up_to_a_cap_and_closes_on_a_success() {
        let mut breaker = opened();
        let mut now = 0;
        for open_ms in [1_000, 2_000, 3_000, 3_000] {
            assert_eq!(breaker.pass(now + open_ms - 1), Pass::NotBefore(now + open_ms));
            now += open_ms;
            assert_eq!(breaker.pass(now), Pass::Probe);
            breaker.bad(now);
        }
        now += 3_000;
        assert_eq!(breaker.pass(now), Pass::Probe);
        breaker.good();
        assert_eq!(breaker.pass(now), Pass::Free);
        for _ in 0..3 {
            breaker.bad(now);
        }
        assert_eq!(breaker.pass(now), Pass::NotBefore(now + 1_000), "it begins anew");
    }

    #[test]
    fn what_was_on_its_way_does_not_open_it_longer() {
        let mut breaker = opened();
        breaker.bad(500);
        assert_eq!(breaker.pass(600), Pass::NotBefore(1_000));
    }

    #[test]
    fn a_target_that_nearly_always_fails_opens_it_too() {
        let patient = BreakerLimits { failures: 1_000, ..LIMITS };
        for (good_one_in, opens) in [(16, true), (4, false)] {
            let mut breaker = Breaker::new(patient);
            for n in 0..200 {
                if breaker.is_open() {
                    break;
                }
                if n % good_one_in == 0 { breaker.good() } else { breaker.bad(0) }
            }
            assert_eq!(breaker.is_open(), opens, "one good in {good_one_in}");
        }
    }
}
