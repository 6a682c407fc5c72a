//! The operator's `[webhooks]` in the sizes that one partition works with.

use std::time::Duration;

use ringback_domain::webhook::response::Profile;
use ringback_egress::Limits;
use ringback_service_runtime::config::{WebhookProfile, WebhooksConfig};

use crate::book::{BookLimits, GateLimits};

/// Deliveries of one partition in memory.
const HELD: usize = 4_096;
/// Their bytes.
const HELD_BYTES: usize = 16 << 20;

/// What the dispatcher works with.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub lease: Duration,
    pub book: BookLimits,
    pub egress: Limits,
    pub profile: Profile,
}

impl Settings {
    pub(crate) fn new(config: &WebhooksConfig, partitions: u16) -> Self {
        let share = |total: u32| (total / u32::from(partitions.max(1))).max(1);
        let in_flight = share(config.max_in_flight);
        let target = share(config.per_target_in_flight).min(in_flight);
        let profile = match config.profile {
            WebhookProfile::Default => Profile::Standard,
            WebhookProfile::RunpodStrict => Profile::RunpodStrict,
        };
        Self {
            lease: Duration::from_millis(config.partition_lease_ms),
            book: BookLimits {
                gates: GateLimits {
                    in_flight,
                    target,
                    // A quarter of the places: four dead hosts do not stop the others.
                    host: (in_flight / 4).max(target),
                    quota: u32::try_from(HELD / 4).unwrap_or(u32::MAX),
                },
                held: HELD,
                bytes: HELD_BYTES,
                profile,
                retry_after_cap_ms: config.retry_after_max_ms,
            },
            egress: Limits {
                deadline: Duration::from_millis(config.deadline_ms),
                max_body_bytes: config.response_keep_bytes as usize,
                max_idle_per_host: config.per_target_in_flight.max(1) as usize,
                ..Limits::default()
            },
            profile,
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
        assert_eq!((gates.in_flight, gates.target, gates.host), (1, 1, 1));
    }
}
