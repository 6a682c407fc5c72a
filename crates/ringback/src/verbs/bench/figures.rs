//! What a load measured.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// One entry per job that completed, and counts of the others.
#[derive(Debug, Default)]
pub(super) struct Figures {
    latency_ms: Vec<f64>,
    delay_ms: Vec<f64>,
    execution_ms: Vec<f64>,
    /// Jobs that ended otherwise, by status.
    pub(super) endings: BTreeMap<String, u64>,
    /// Requests without a job's end, by reason.
    pub(super) faults: BTreeMap<String, u64>,
}

/// How times are spread, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Spread {
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Figures {
    pub(super) fn complete(&mut self, latency: Duration, delay_ms: u64, execution_ms: u64) {
        self.latency_ms.push(latency.as_secs_f64() * 1000.0);
        self.delay_ms.push(delay_ms as f64);
        self.execution_ms.push(execution_ms as f64);
    }

    pub(super) fn end_otherwise(&mut self, status: String) {
        *self.endings.entry(status).or_default() += 1;
    }

    pub(super) fn no_answer(&mut self, reason: String) {
        *self.faults.entry(reason).or_default() += 1;
    }

    pub(super) fn completed(&self) -> u64 {
        self.latency_ms.len() as u64
    }

    pub(super) fn not_completed(&self) -> u64 {
        self.endings.values().sum()
    }

    pub(super) fn unanswered(&self) -> u64 {
        self.faults.values().sum()
    }

    pub(super) fn ended(&self) -> u64 {
        self.completed() + self.not_completed() + self.unanswered()
    }

    pub(super) fn latency(&self) -> Spread {
        Spread::of(&self.latency_ms)
    }

    pub(super) fn delay(&self) -> Spread {
        Spread::of(&self.delay_ms)
    }

    pub(super) fn execution(&self) -> Spread {
        Spread::of(&self.execution_ms)
    }
}

impl Spread {
    /// By the nearest rank.
    fn of(times: &[f64]) -> Self {
        let mut sorted = times.to_vec();
        sorted.sort_by(f64::total_cmp);
        let rank = |percent: usize| {
            let at = (sorted.len() * percent).div_ceil(100).max(1) - 1;
            sorted.get(at).copied().unwrap_or_default()
        };
        Self { p50: rank(50), p90: rank(90), p99: rank(99), max: rank(100) }
    }

    pub(super) fn as_json(&self) -> Value {
        json!({"p50": self.p50, "p90": self.p90, "p99": self.p99, "max": self.max})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_the_nearest() {
        let times: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(Spread::of(&times), Spread { p50: 100.0, p90: 180.0, p99: 198.0, max: 200.0 });
        assert_eq!(Spread::of(&[7.0]), Spread { p50: 7.0, p90: 7.0, p99: 7.0, max: 7.0 });
        assert_eq!(Spread::of(&[]), Spread::default());
    }
}
