//! The operator's `[webhooks]` in the sizes that one partition works with.

use std::time::Duration;

use ringback_domain::webhook::response::Profile;
use ringback_egress::Limits;
use ringback_service_runtime::config::WebhooksConfig;

use crate::book::{BookLimits, BreakerLimits, GateLimits};

/// Deliveries of one partition in memory.
const HELD: usize = 4_096;
/// Their bytes.
const HELD_BYTES: usize = 16 << 20;

/// What the dispatcher works with.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub lease: Duration,
    pub book: BookLimits,
    /// When a target is left alone.
    pub breaker: BreakerLimits,
    /// POSTs on their way to one target, all partitions of all processes together.
    pub target_in_flight: u32,
    pub egress: Limits,
    pub profile: Profile,
    /// POSTs per second to a target that has no rate of its own.
    pub target_rate: Option<u32>,
    /// A registered webhook that only fails is disabled after this time.
    pub disable_after_ms: Option<u64>,
}

impl Settings {
    pub(crate) fn new(config: &WebhooksConfig, partitions: u16) -> Self {
        let share = |total: u32| (total / u32::from(partitions.max(1))).max(1);
        let in_flight = share(config.max_in_flight);
        let target = share(config.per_target_in_flight).min(in_flight);
        let profile = config.profile.profile();
        Self {
            lease: Duration::from_millis(config.partition_lease_ms),
            book: BookLimits {
                gates: GateLimits {
                    in_flight,
                    target,
                    // A quarter of the places: four dead hosts do not stop the others.
                    host: (in_flight / 4).max(target),
                    // The rest is for the other projects.
                    project: (in_flight - in_flight / 4).max(target),
                    quota: u32::try_from(HELD / 4).unwrap_or(u32::MAX),
                    project_quota: u32::try_from(HELD - HELD / 4).unwrap_or(u32::MAX),
                },
                held: HELD,
                bytes: HELD_BYTES,
                retry_after_cap_ms: config.retry_after_max_ms,
            },
            breaker: BreakerLimits {
                failures: config.breaker_failures,
                percent: config.breaker_failure_percent,
                open_ms: config.breaker_open_ms.cast_signed(),
                open_max_ms: config.breaker_open_max_ms.max(config.breaker_open_ms).cast_signed(),
            },
            target_in_flight: config.per_target_in_flight,
            egress: Limits {
                deadline: Duration::from_millis(config.deadline_ms),
                max_body_bytes: config.response_keep_bytes as usize,
                max_idle_per_host: config.per_target_in_flight.max(1) as usize,
                ..Limits::default()
            },
            profile,
            target_rate: (config.target_rate_per_second > 0).then_some(config.target_rate_per_second),
            disable_after_ms: (config.disable_after_ms > 0).then_some(config.disable_after_ms),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_partitions_together_keep_the_operators_caps() {
        let config = WebhooksConfig::default();
        let settings = Settings::new(&config, 8);
        assert_eq!(settings.book.gates.target * 8, config.per_target_in_flight);
        assert_eq!(settings.book.gates.in_flight * 8, config.max_in_flight);
        let small = WebhooksConfig { max_in_flight: 1, per_target_in_flight: 64, ..config };
        let gates = Settings::new(&small, 8).book.gates;
        assert_eq!((gates.in_flight, gates.target, gates.host, gates.project), (1, 1, 1, 1));
    }
}
