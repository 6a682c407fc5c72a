//! When a delivery is tried again.
//!
//! Terminal deliveries climb a ladder that begins with RunPod's times (10 s, 10 s, no jitter) and goes on to a
//! day. Notices of earlier states get at most three tries within 30 s, because the result must not wait for them.
//! A registered webhook may bring waits of its own ([`RetryPolicy`]).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

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

/// The longest list of waits that a webhook may bring.
pub const MAX_WAITS: usize = 50;
/// The longest wait of its own, in ms: seven days.
pub const MAX_WAIT_MS: u64 = 7 * 24 * 3_600_000;
/// The shortest wait of its own, in ms.
pub const MIN_WAIT_MS: u64 = 100;
/// The most tries that a webhook may ask for.
pub const MAX_ATTEMPTS: u32 = 100;

/// How the tries of a delivery are spaced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Schedule {
    /// The long ladder.
    #[default]
    Standard,
    /// RunPod's: three tries, ten seconds apart.
    RunpodStrict,
    /// Waits of the webhook's own.
    Custom(CustomWaits),
}

/// Waits that the owner of a webhook has chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CustomWaits {
    waits_ms: Arc<[u64]>,
    jitter_percent: u8,
    max_attempts: u32,
}

impl Schedule {
    /// The schedule of a profile.
    #[must_use]
    pub fn of(profile: Profile) -> Self {
        match profile {
            Profile::Standard => Self::Standard,
            Profile::RunpodStrict => Self::RunpodStrict,
        }
    }

    /// How many tries a delivery gets when every one fails: shown to users as `max_attempts`. `climbs` as in
    /// [`Failed::climbs`].
    #[must_use]
    pub fn max_tries(&self, climbs: bool) -> u32 {
        match self {
            Self::Standard if climbs => u32::try_from(LADDER_MS.len()).unwrap_or(u32::MAX) + 1,
            Self::Custom(custom) if climbs => custom.max_attempts,
            Self::Custom(custom) => custom.max_attempts.min(SHORT_TRIES),
            Self::Standard | Self::RunpodStrict => SHORT_TRIES,
        }
    }

    /// The wait after the failed try `made` of a delivery that climbs.
    fn wait_ms(&self, made: u32, jitter: f64) -> Option<u64> {
        let index = usize::try_from(made.max(1) - 1).unwrap_or(usize::MAX);
        match self {
            Self::RunpodStrict => (made < SHORT_TRIES).then_some(LADDER_MS[0]),
            Self::Standard => LADDER_MS
                .get(index)
                .map(|&base| jittered(base, if index < EXACT_RUNGS { 0.0 } else { JITTER }, jitter)),
            Self::Custom(custom) => {
                let base = custom.waits_ms.get(index).or(custom.waits_ms.last())?;
                (made < custom.max_attempts)
                    .then(|| jittered(*base, f64::from(custom.jitter_percent) / 100.0, jitter))
            }
        }
    }

    /// Whether a receiver's wish for a longer wait is heard. RunPod's times are RunPod's times.
    fn listens(&self) -> bool {
        !matches!(self, Self::RunpodStrict)
    }
}

/// A webhook's own rules of acknowledgement and retry, as its owner writes them: a profile, or waits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetryPolicy {
    /// `default` or `runpod-strict`; without one, and without waits, the operator's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<Profile>,
    /// Waits after the first, second, … failed try, in ms. The last one repeats up to `max_attempts`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits_ms: Option<Vec<u64>>,
    /// The most that chance adds to a wait, in percent of it; 20 unless given. Only with waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jitter_percent: Option<u8>,
    /// Tries in all; one more than there are waits unless given. Only with waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<u32>,
}

/// A retry policy that cannot be meant. Each text names the field and its limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RetryPolicyError {
    /// Two ways at once.
    #[error("retry: profile and waits_ms exclude each other; give one of them")]
    Both,
    /// Something that only waits have.
    #[error("retry.{0}: needs retry.waits_ms beside it")]
    NeedsWaits(&'static str),
    /// No wait, or too many.
    #[error("retry.waits_ms: {0} waits; between 1 and {MAX_WAITS} are allowed")]
    Count(usize),
    /// One wait is out of bounds.
    #[error("retry.waits_ms[{index}]: {wait_ms} ms; between {MIN_WAIT_MS} and {MAX_WAIT_MS} ms are allowed")]
    Wait {
        /// Which.
        index: usize,
        /// What it says.
        wait_ms: u64,
    },
    /// More chance than wait.
    #[error("retry.jitter_percent: {0}; at most 100 is allowed")]
    Jitter(u8),
    /// None, or too many tries.
    #[error("retry.max_attempts: {0}; between 1 and {MAX_ATTEMPTS} are allowed")]
    Attempts(u32),
}

impl RetryPolicy {
    /// The rules that this policy means: how answers are read and how tries are spaced. `operator` is the profile
    /// of whoever says nothing.
    ///
    /// # Errors
    /// See [`RetryPolicyError`].
    pub fn resolve(&self, operator: Profile) -> Result<(Profile, Schedule), RetryPolicyError> {
        let Some(waits) = &self.waits_ms else {
            if self.jitter_percent.is_some() {
                return Err(RetryPolicyError::NeedsWaits("jitter_percent"));
            }
            if self.max_attempts.is_some() {
                return Err(RetryPolicyError::NeedsWaits("max_attempts"));
            }
            let profile = self.profile.unwrap_or(operator);
            return Ok((profile, Schedule::of(profile)));
        };
        if self.profile.is_some() {
            return Err(RetryPolicyError::Both);
        }
        if waits.is_empty() || waits.len() > MAX_WAITS {
            return Err(RetryPolicyError::Count(waits.len()));
        }
        let bad = waits.iter().enumerate().find(|(_, ms)| !(MIN_WAIT_MS..=MAX_WAIT_MS).contains(*ms));
        if let Some((index, &wait_ms)) = bad {
            return Err(RetryPolicyError::Wait { index, wait_ms });
        }
        let jitter_percent = self.jitter_percent.unwrap_or(20);
        if jitter_percent > 100 {
            return Err(RetryPolicyError::Jitter(jitter_percent));
        }
        let natural = u32::try_from(waits.len()).unwrap_or(u32::MAX).saturating_add(1);
        let max_attempts = self.max_attempts.unwrap_or(natural);
        if !(1..=MAX_ATTEMPTS).contains(&max_attempts) {
            return Err(RetryPolicyError::Attempts(max_attempts));
        }
        let custom = CustomWaits { waits_ms: waits.as_slice().into(), jitter_percent, max_attempts };
        Ok((Profile::Standard, Schedule::Custom(custom)))
    }
}

/// What is known about a delivery when one of its tries has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failed<'a> {
    /// How the owner of the target wants tries to be spaced.
    pub schedule: &'a Schedule,
    /// Whether the delivery climbs the whole ladder: it tells of an end, or its receiver wants strict order.
    pub climbs: bool,
    /// Tries made so far since it was owed or replayed, this one included; at least 1.
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
pub fn after_failure(failed: &Failed<'_>, jitter: f64) -> Next {
    let made = failed.tries.max(1);
    let wait_ms = if failed.climbs {
        failed.schedule.wait_ms(made, jitter).map(|wait| slowed(wait, failed))
    } else {
        let wait = slowed(LADDER_MS[0], failed);
        let elapsed = failed.now_ms.saturating_sub(failed.first_try_at_ms);
        let left = made < failed.schedule.max_tries(false);
        (left && elapsed.saturating_add(wait) <= SHORT_WINDOW_MS).then_some(wait)
    };
    wait_ms.map_or(Next::GiveUp, |wait| Next::At(failed.now_ms.saturating_add(wait)))
}

fn jittered(base_ms: u64, most: f64, jitter: f64) -> u64 {
    let extra = base_ms as f64 * most * jitter.clamp(0.0, 1.0);
    base_ms.saturating_add(extra as u64)
}

fn slowed(wait_ms: u64, failed: &Failed<'_>) -> u64 {
    match failed.slow_down {
        SlowDown::No => wait_ms,
        _ if failed.climbs && !failed.schedule.listens() => wait_ms,
        SlowDown::Unnamed => wait_ms.saturating_mul(2).max(SLOW_DOWN_MS),
        SlowDown::For(asked_ms) => wait_ms.max(asked_ms.min(failed.retry_after_cap_ms)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 1_800_000_000_000;

    fn failed(tries: u32) -> Failed<'static> {
        Failed {
            schedule: &Schedule::Standard,
            climbs: true,
            tries,
            first_try_at_ms: NOW,
            now_ms: NOW,
            slow_down: SlowDown::No,
            retry_after_cap_ms: RETRY_AFTER_CAP_MS,
        }
    }

    fn wait(failed: &Failed<'_>, jitter: f64) -> Option<u64> {
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
        assert_eq!(Schedule::Standard.max_tries(true), 10);
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
            schedule: &Schedule::RunpodStrict,
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
            wait(&Failed { climbs: false, now_ms: NOW + elapsed_ms, slow_down, ..failed(tries) }, 0.9)
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

    fn custom(waits_ms: &[u64], max_attempts: Option<u32>) -> Schedule {
        let policy = RetryPolicy {
            waits_ms: Some(waits_ms.to_vec()),
            jitter_percent: Some(50),
            max_attempts,
            profile: None,
        };
        policy.resolve(Profile::RunpodStrict).unwrap().1
    }

    #[test]
    fn waits_of_its_own_are_kept_and_the_last_one_repeats() {
        let own = custom(&[1_000, 4_000], Some(5));
        let waits = |jitter| -> Vec<_> {
            (1..=5).map(|n| wait(&Failed { schedule: &own, ..failed(n) }, jitter)).collect()
        };
        assert_eq!(waits(0.0), [Some(1_000), Some(4_000), Some(4_000), Some(4_000), None]);
        assert_eq!(waits(1.0)[..2], [Some(1_500), Some(6_000)], "chance only adds");
        let short = custom(&[1_000, 4_000], None);
        assert_eq!((short.max_tries(true), short.max_tries(false)), (3, 3));
        let asked = Failed { schedule: &own, slow_down: SlowDown::For(30_000), ..failed(1) };
        assert_eq!(wait(&asked, 0.0), Some(30_000));
    }

    #[test]
    fn a_policy_that_cannot_be_meant_is_refused_by_name() {
        let read = |text: &str| serde_json::from_str::<RetryPolicy>(text).unwrap().resolve(Profile::Standard);
        assert_eq!(read("{}").unwrap().0, Profile::Standard);
        assert_eq!(
            read(r#"{"profile":"runpod-strict"}"#),
            Ok((Profile::RunpodStrict, Schedule::RunpodStrict))
        );
        for (text, named) in [
            (r#"{"profile":"default","waits_ms":[1000]}"#, "exclude"),
            (r#"{"jitter_percent":3}"#, "retry.jitter_percent"),
            (r#"{"max_attempts":3}"#, "retry.max_attempts"),
            (r#"{"waits_ms":[]}"#, "retry.waits_ms"),
            (r#"{"waits_ms":[1000,1]}"#, "retry.waits_ms[1]"),
            (r#"{"waits_ms":[1000],"jitter_percent":101}"#, "retry.jitter_percent"),
            (r#"{"waits_ms":[1000],"max_attempts":0}"#, "retry.max_attempts"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
        assert!(serde_json::from_str::<RetryPolicy>(r#"{"wait_ms":[1]}"#).is_err());
    }

    proptest! {
        #[test]
        fn every_ladder_ends_and_never_goes_back(
            jitter in 0.0..1.0f64,
            climbs in any::<bool>(),
            kind in 0..3,
            asked in proptest::option::of(any::<u64>()),
        ) {
            let schedule = match kind {
                0 => Schedule::Standard,
                1 => Schedule::RunpodStrict,
                _ => custom(&[20_000, 10_000], Some(9)),
            };
            let slow_down = asked.map_or(SlowDown::No, SlowDown::For);
            let mut now_ms = NOW;
            let mut tries = 0;
            loop {
                tries += 1;
                let next = after_failure(
                    &Failed { schedule: &schedule, climbs, tries, first_try_at_ms: NOW, now_ms, slow_down, ..failed(1) },
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
            prop_assert!(tries <= schedule.max_tries(climbs));
        }
    }
}
