//! Turns slots into figures.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::board::Board;
use crate::load::Load;
use crate::procs::Spent;

const NS_PER_S: f64 = 1e9;

/// A distribution in milliseconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Quantiles {
    /// Median.
    pub p50_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
    /// Largest.
    pub max_ms: f64,
}

/// One measured load.
#[derive(Debug, Clone, Serialize)]
pub struct Phase {
    /// What was measured.
    pub name: String,
    /// Accepted jobs.
    pub jobs: u64,
    /// Answers other than 200.
    pub refused: u64,
    /// Requests without an answer.
    pub unknown: u64,
    /// Accepted jobs without a webhook when the phase ended.
    pub lost: u64,
    /// The first refusal in words.
    pub trouble: Option<String>,
    /// From the first job sent to the last webhook received.
    pub seconds: f64,
    /// Webhooks received per second over all of `seconds`: ramp and drain count.
    pub jobs_per_s: f64,
    /// Submits answered 200 per second, until the last of them.
    pub submits_per_s: f64,
    /// Webhooks in the slowest whole second, without the first and the last one.
    pub slowest_second: Option<u64>,
    /// Submit due → webhook received.
    pub webhook: Quantiles,
    /// Submit due → answered.
    pub answer: Quantiles,
    /// Submit due → written by the generator: its own lag, part of the two above.
    pub lag: Quantiles,
    /// CPU by process and the noise of the machine.
    pub spent: Spent,
    /// CPU seconds per 1,000 jobs, by process.
    pub cpu_s_per_1000: BTreeMap<String, f64>,
}

/// What must not happen, over a range of jobs.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Audit {
    /// Jobs sent.
    pub sent: u64,
    /// Accepted jobs whose webhook never came.
    pub lost: u64,
    /// Webhooks that came more than once.
    pub duplicated: u64,
    /// Webhooks whose job id is not the one that the submit was answered with.
    pub wrong_id: u64,
}

impl Phase {
    /// CPU seconds per 1,000 jobs of everything but the bench itself.
    pub fn server_cpu_s_per_1000(&self) -> f64 {
        self.cpu_s_per_1000.iter().filter(|(name, _)| *name != crate::BENCH).map(|(_, cpu)| cpu).sum()
    }

    /// Reads the slots of a load.
    pub fn of(name: &str, board: &Board, load: &Load, spent: Spent) -> Self {
        let (mut webhook, mut answer, mut lag) = (Spread::new(), Spread::new(), Spread::new());
        let (mut first_ns, mut last_arrival_ns, mut last_answer_ns) = (u64::MAX, 0, 0);
        let (mut jobs, mut received, mut lost) = (0_u64, 0_u64, 0_u64);
        let mut arrivals = Vec::new();
        for (_, job) in board.jobs(load.slots.clone()) {
            if job.sent_ns != 0 {
                first_ns = first_ns.min(job.sent_ns);
                lag.add(job.sent_ns, job.written_ns);
            }
            if job.answered_ns != 0 {
                jobs += 1;
                lost += u64::from(job.arrivals == 0);
                last_answer_ns = last_answer_ns.max(job.answered_ns);
                answer.add(job.sent_ns, job.answered_ns);
            }
            if job.arrivals > 0 {
                received += 1;
                last_arrival_ns = last_arrival_ns.max(job.arrived_ns);
                webhook.add(job.sent_ns, job.arrived_ns);
                arrivals.push(job.arrived_ns);
            }
        }
        let since_first_s = |end_ns: u64| end_ns.saturating_sub(first_ns) as f64 / NS_PER_S;
        let rate = |count: u64, seconds: f64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let per_1000 = |cpu_s: f64| if jobs > 0 { cpu_s / jobs as f64 * 1000.0 } else { 0.0 };
        Self {
            name: name.to_owned(),
            jobs,
            refused: load.refused,
            unknown: load.unknown,
            lost,
            trouble: load.first_trouble.clone(),
            seconds: since_first_s(last_arrival_ns),
            jobs_per_s: rate(received, since_first_s(last_arrival_ns)),
            submits_per_s: rate(jobs, since_first_s(last_answer_ns)),
            slowest_second: slowest_second(&arrivals, first_ns),
            webhook: webhook.quantiles(),
            answer: answer.quantiles(),
            lag: lag.quantiles(),
            cpu_s_per_1000: spent.cpu_s.iter().map(|(name, cpu)| (name.clone(), per_1000(*cpu))).collect(),
            spent,
        }
    }
}

impl Audit {
    /// Counts over slots. Call it at the end: a late duplicate must show.
    pub fn of(board: &Board, ranges: &[std::ops::Range<u64>]) -> Self {
        let mut audit = Self::default();
        for (_, job) in ranges.iter().flat_map(|range| board.jobs(range.clone())) {
            let accepted = job.answered_ns != 0;
            audit.sent += u64::from(job.sent_ns != 0);
            audit.lost += u64::from(accepted && job.arrivals == 0);
            audit.duplicated += u64::from(job.arrivals.saturating_sub(1));
            audit.wrong_id += u64::from(accepted && job.arrivals > 0 && job.submitted != job.delivered);
        }
        audit
    }

    /// True if nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.lost == 0 && self.duplicated == 0 && self.wrong_id == 0
    }
}

/// The whole second with the fewest arrivals, the ragged first and last left out.
fn slowest_second(arrivals_ns: &[u64], first_ns: u64) -> Option<u64> {
    let second = |ns: &u64| (ns.saturating_sub(first_ns) / 1_000_000_000) as usize;
    let last = arrivals_ns.iter().map(second).max()?;
    let mut counts = vec![0_u64; last + 1];
    for ns in arrivals_ns {
        counts[second(ns)] += 1;
    }
    counts.get(1..last)?.iter().min().copied()
}

/// Collects durations.
pub struct Spread(Option<Histogram<u64>>);

impl Default for Spread {
    fn default() -> Self {
        Self::new()
    }
}

impl Spread {
    /// 1 µs to 1 h with three digits.
    pub fn new() -> Self {
        // The bounds are constants that the library accepts.
        Self(Histogram::new_with_bounds(1, 3_600_000_000, 3).ok())
    }

    /// Adds a duration in microseconds.
    pub fn add_us(&mut self, us: u64) {
        if let Some(histogram) = &mut self.0 {
            histogram.saturating_record(us);
        }
    }

    fn add(&mut self, from_ns: u64, to_ns: u64) {
        self.add_us(to_ns.saturating_sub(from_ns) / 1000);
    }

    /// Median, 99th percentile and largest.
    pub fn quantiles(&self) -> Quantiles {
        let Some(histogram) = &self.0 else { return Quantiles::default() };
        let ms = |us: u64| us as f64 / 1000.0;
        Quantiles {
            p50_ms: ms(histogram.value_at_quantile(0.5)),
            p99_ms: ms(histogram.value_at_quantile(0.99)),
            max_ms: ms(histogram.max()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn load(slots: std::ops::Range<u64>) -> Load {
        Load { slots, refused: 0, unknown: 0, first_trouble: None }
    }

    #[test]
    fn latency_counts_from_the_due_time_and_rates_from_first_to_last() {
        let board = Board::default();
        for k in 0..3_u64 {
            let n = board.open();
            let due_ns = 1_000_000_000 * (k + 1);
            board.sent(n, due_ns, due_ns + 2_000_000);
            board.arrived(n, Uuid::from_u128(1), due_ns + 10_000_000);
            board.answered(n, Uuid::from_u128(1));
        }
        let phase = Phase::of("x", &board, &load(0..3), Spent::default());
        assert!((phase.webhook.p50_ms - 10.0).abs() < 0.1 && (phase.lag.max_ms - 2.0).abs() < 0.1);
        assert!((phase.jobs_per_s - 3.0 / 2.01).abs() < 0.001, "{}", phase.jobs_per_s);
        assert_eq!((phase.jobs, phase.lost, phase.slowest_second), (3, 0, Some(1)));
    }

    #[test]
    fn the_audit_finds_lost_doubled_and_swapped_webhooks() {
        let board = Board::default();
        let ids: Vec<Uuid> = (0..4).map(|_| Uuid::now_v7()).collect();
        for id in &ids {
            let n = board.open();
            board.sent(n, 1, 1);
            board.answered(n, *id);
        }
        board.arrived(0, ids[0], 5);
        board.arrived(1, ids[1], 5);
        board.arrived(1, ids[1], 6);
        board.arrived(2, ids[3], 5);
        let audit = Audit::of(&board, &[0..2, 2..4]);
        assert_eq!((audit.sent, audit.lost, audit.duplicated, audit.wrong_id), (4, 1, 1, 1));
        assert!(!audit.is_clean() && Audit::of(&board, std::slice::from_ref(&(0..1))).is_clean());
    }

    #[test]
    fn a_spread_holds_microseconds_and_minutes() {
        let mut spread = Spread::new();
        for us in [200, 200, 200, 60_000_000] {
            spread.add_us(us);
        }
        let quantiles = spread.quantiles();
        assert!((quantiles.p50_ms - 0.2).abs() < 0.001 && (quantiles.max_ms - 60_000.0).abs() < 100.0);
    }

    #[test]
    fn the_slowest_second_leaves_the_ragged_ends_out() {
        let s = 1_000_000_000_u64;
        assert_eq!(slowest_second(&[1, s, s + 5, 2 * s, 3 * s, 3 * s + 1, 4 * s], 0), Some(1));
        assert_eq!(slowest_second(&[1, 2], 0), None);
    }
}
