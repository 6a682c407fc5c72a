//! When a delivery is tried again.
//!
//! Terminal deliveries climb a ladder that begins with RunPod's times (10 s, 10 s, no jitter) and goes on to a
//! day. Notices of earlier states get at most three tries within 30 s, because the result must not wait for them.

use super::response::Profile;

/// Waits after the first, second, … failed try of a terminal delivery, in ms.
pub const LADDER_MS: [u64; 9] = [
    10_000,
    10_000,
    60_000,
    5 * 60_000,
    30 * 60_000,
    2 * 3_600_000,
    6 * 3_600_000,
    12 * 3_600_000,
    24 * 3_600_000,
];
/// How many rungs have no jitter: RunPod's own.
const EXACT_RUNGS: usize = 2;
/// The most that jitter adds, as a part of the wait. Jitter only adds: a try never comes before the shown time.
const JITTER: f64 = 0.2;
/// Tries of a delivery that is not terminal, and of every delivery under `runpod-strict`.
pub const SHORT_TRIES: u32 = 3;
/// From the first try of a delivery that is not terminal to its last, in ms.
pub const SHORT_WINDOW_MS: u64 = 30_000;
/// The longest wait that a receiver's `Retry-After` can ask for unless the operator says otherwise, in ms.
pub const RETRY_AFTER_CAP_MS: u64 = 3_600_000;
/// The least wait after an answer that says "slow down" and names no time, in ms.
pub const SLOW_DOWN_MS: u64 = 60_000;

/// What is known about a delivery when one of its tries has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failed {
    /// How the owner of the target wants tries to be spaced.
    pub profile: Profile,
    /// Whether the delivery tells of a terminal state.
    pub terminal: bool,
    /// Tries made so far, this one included; at least 1.
    pub tries: u32,
    /// When the first of them began, unix ms.
    pub first_try_at_ms: u64,
    /// Now, unix ms.
    pub now_ms: u64,
    /// What the receiver asked for.
    pub slow_down: SlowDown,
    /// The longest wait that it can ask for.
    pub retry_after_cap_ms: u64,
}

/// A receiver's wish to be left alone for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlowDown {
    /// A plain failure.
    No,
    /// 429 or 503 without `Retry-After`.
    Unnamed,
    /// `Retry-After`, in ms from now.
    For(u64),
}

/// What follows a failed try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Try again at this unix time in ms.
    At(u64),
    /// No try is left: the delivery is dead.
    GiveUp,
}

/// Decides what follows a failed try. `jitter` is a random number in `0.0..1.0`.
#[must_use]
pub fn after_failure(failed: &Failed, jitter: f64) -> Next {
    let made = failed.tries.max(1);
    let wait_ms = match (failed.profile, failed.terminal) {
        (Profile::RunpodStrict, true) => (made < SHORT_TRIES).then_some(LADDER_MS[0]),
        (Profile::Standard, true) => {
            let index = usize::try_from(made - 1).unwrap_or(usize::MAX);
            LADDER_MS.get(index).map(|&base| slowed(jittered(base, index, jitter), failed))
        }
        (Profile::Standard | Profile::RunpodStrict, false) => {
            let wait = slowed(LADDER_MS[0], failed);
            let elapsed = failed.now_ms.saturating_sub(failed.first_try_at_ms);
            (made < SHORT_TRIES && elapsed.saturating_add(wait) <= SHORT_WINDOW_MS).then_some(wait)
        }
    };
    wait_ms.map_or(Next::GiveUp, |wait| Next::At(failed.now_ms.saturating_add(wait)))
}

/// How many tries a delivery gets when every one fails: shown to users as `max_attempts`.
#[must_use]
pub fn max_tries(profile: Profile, terminal: bool) -> u32 {
    match (profile, terminal) {
        (Profile::Standard, true) => u32::try_from(LADDER_MS.len()).unwrap_or(u32::MAX) + 1,
        (Profile::RunpodStrict, _) | (Profile::Standard, false) => SHORT_TRIES,
    }
}

fn jittered(base_ms: u64, rung: usize, jitter: f64) -> u64 {
    if rung < EXACT_RUNGS {
        return base_ms;
    }
    let extra = base_ms as f64 * JITTER * jitter.clamp(0.0, 1.0);
    base_ms.saturating_add(extra as u64)
}

fn slowed(wait_ms: u64, failed: &Failed) -> u64 {
    match failed.slow_down {
        SlowDown::No => wait_ms,
        SlowDown::Unnamed => wait_ms.saturating_mul(2).max(SLOW_DOWN_MS),
        SlowDown::For(asked_ms) => wait_ms.max(asked_ms.min(failed.retry_after_cap_ms)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 1_800_000_000_000;

    fn failed(tries: u32) -> Failed {
        Failed {
            profile: Profile::Standard,
            terminal: true,
            tries,
            first_try_at_ms: NOW,
            now_ms: NOW,
            slow_down: SlowDown::No,
            retry_after_cap_ms: RETRY_AFTER_CAP_MS,
        }
    }

    fn wait(failed: &Failed, jitter: f64) -> Option<u64> {
        match after_failure(failed, jitter) {
            Next::At(at) => Some(at - failed.now_ms),
            Next::GiveUp => None,
        }
    }

    #[test]
    fn a_terminal_delivery_climbs_the_whole_ladder() {
        let waits: Vec<_> = (1..=10).map(|n| wait(&failed(n), 0.0)).collect();
        let mut expected: Vec<_> = LADDER_MS.iter().map(|&ms| Some(ms)).collect();
        expected.push(None);
        assert_eq!(waits, expected);
        assert_eq!(max_tries(Profile::Standard, true), 10);
    }

    #[test]
    fn runpods_rungs_have_no_jitter_and_the_others_do() {
        assert_eq!(wait(&failed(1), 0.999), Some(10_000));
        assert_eq!(wait(&failed(2), 0.999), Some(10_000));
        assert_eq!(wait(&failed(3), 0.5), Some(66_000));
    }

    #[test]
    fn runpod_strict_makes_three_tries_ten_seconds_apart_whatever_is_asked() {
        let strict = |tries| Failed {
            profile: Profile::RunpodStrict,
            slow_down: SlowDown::For(500_000),
            ..failed(tries)
        };
        assert_eq!(wait(&strict(1), 0.7), Some(10_000));
        assert_eq!(wait(&strict(2), 0.7), Some(10_000));
        assert_eq!(wait(&strict(3), 0.7), None);
    }

    #[test]
    fn an_earlier_state_gets_three_tries_within_thirty_seconds() {
        let early = |tries, elapsed_ms, slow_down| {
            wait(&Failed { terminal: false, now_ms: NOW + elapsed_ms, slow_down, ..failed(tries) }, 0.9)
        };
        assert_eq!(early(1, 20, SlowDown::No), Some(10_000));
        assert_eq!(early(2, 10_040, SlowDown::No), Some(10_000));
        assert_eq!(early(3, 20_060, SlowDown::No), None);
        assert_eq!(early(1, 20_001, SlowDown::No), None, "the next try would be after the window");
        assert_eq!(early(1, 0, SlowDown::For(12_000)), Some(12_000));
        assert_eq!(early(1, 0, SlowDown::Unnamed), None, "a minute does not fit into the window");
    }

    #[test]
    fn a_receiver_that_asks_for_time_gets_it_up_to_the_cap() {
        let asked = |slow_down| wait(&Failed { slow_down, ..failed(1) }, 0.0);
        assert_eq!(asked(SlowDown::For(45_000)), Some(45_000));
        assert_eq!(asked(SlowDown::For(1)), Some(10_000), "never earlier than the ladder");
        assert_eq!(asked(SlowDown::For(u64::MAX)), Some(RETRY_AFTER_CAP_MS));
        assert_eq!(asked(SlowDown::Unnamed), Some(SLOW_DOWN_MS), "longer than a plain failure");
        let late = Failed { slow_down: SlowDown::Unnamed, ..failed(5) };
        assert!(wait(&late, 0.0) > wait(&failed(5), 0.0));
    }

    proptest! {
        #[test]
        fn every_ladder_ends_and_never_goes_back(
            jitter in 0.0..1.0f64,
            terminal in any::<bool>(),
            strict in any::<bool>(),
            asked in proptest::option::of(any::<u64>()),
        ) {
            let profile = if strict { Profile::RunpodStrict } else { Profile::Standard };
            let slow_down = asked.map_or(SlowDown::No, SlowDown::For);
            let mut now_ms = NOW;
            let mut tries = 0;
            loop {
                tries += 1;
                let next = after_failure(
                    &Failed { profile, terminal, tries, first_try_at_ms: NOW, now_ms, slow_down, ..failed(1) },
                    jitter,
                );
                match next {
                    Next::At(at) => {
                        prop_assert!(at >= now_ms + 10_000);
                        now_ms = at;
                    }
                    Next::GiveUp => break,
                }
            }
            prop_assert!(tries <= max_tries(profile, terminal));
        }
    }
}
