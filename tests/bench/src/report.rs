//! The table, the bars of the issue, and JSON.

use std::fmt::Write as _;

use serde::Serialize;

use crate::disk::Fsync;
use crate::procs::Memory;
use crate::stats::Phase;
use crate::suite::DatabaseReport;

const MB: f64 = 1e6;
/// Cost may differ by so much between two segments of one run: the noise of a shared machine, not growth.
const FLAT_TOLERANCE: f64 = 1.10;

/// Where it was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// CPU model.
    pub cpu: String,
    /// Cores.
    pub cores: usize,
    /// Kernel.
    pub kernel: String,
    /// Load average over one minute when the bench began.
    pub load_1m: String,
    /// The disk under the data folder, before the first load.
    pub fsync: Fsync,
    /// The same after the last load: a neighbour may have come or gone.
    pub fsync_after: Option<Fsync>,
}

/// Whose number a figure is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Must be reached.
    Bar,
    /// Is aimed at.
    Goal,
}

/// One figure beside its target.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// Bar or goal.
    pub kind: Kind,
    /// What is compared.
    pub figure: String,
    /// What is asked.
    pub target: String,
    /// What was measured; None if its part was not run.
    pub measured: Option<String>,
    /// None if not measured.
    pub met: Option<bool>,
}

/// Everything that one run found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Where.
    pub machine: Machine,
    /// By database.
    pub databases: Vec<DatabaseReport>,
    /// Parts that could not be run, with the reason.
    pub skipped: Vec<String>,
    /// Webhooks that were verified and parsed.
    pub checked: u64,
    /// Of those, wrong ones; and webhooks without a signature.
    pub bad: u64,
    /// Webhooks of no job of this bench.
    pub stray: u64,
    /// The first wrong one in words.
    pub first_fault: Option<String>,
    /// Figures beside their targets.
    pub verdicts: Vec<Verdict>,
    /// Nothing lost, doubled or wrongly signed.
    pub sound: bool,
}

impl Report {
    /// Fills in verdicts and soundness.
    pub fn judge(mut self) -> Self {
        self.verdicts = self.databases.first().map(verdicts).unwrap_or_default();
        self.sound =
            self.bad == 0 && self.stray == 0 && self.databases.iter().all(|one| one.audit.is_clean());
        self
    }

    /// The report for people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let machine = &self.machine;
        writeln!(out, "\n{}, {} cores, Linux {}", machine.cpu, machine.cores, machine.kernel)?;
        writeln!(out, "load {} at start", machine.load_1m)?;
        for (when, fsync) in
            std::iter::once(("before", machine.fsync)).chain(machine.fsync_after.map(|one| ("after", one)))
        {
            let note = if fsync.in_memory { " (IN MEMORY: durable figures mean nothing here)" } else { "" };
            let (p50, p99) = (fsync.p50_ms, fsync.p99_ms);
            writeln!(out, "4 KiB append + fdatasync {when}: p50 {p50:.2} ms, p99 {p99:.2} ms{note}")?;
        }
        for database in &self.databases {
            write_database(out, database)?;
        }
        for skipped in &self.skipped {
            writeln!(out, "\nSKIPPED {skipped}")?;
        }
        writeln!(out, "\n{} webhooks verified, {} wrong, {} stray", self.checked, self.bad, self.stray)?;
        if let Some(fault) = &self.first_fault {
            writeln!(out, "first fault: {fault}")?;
        }
        if !self.verdicts.is_empty() {
            writeln!(out, "\n{:5} {:52} {:>14} {:>12}", "", "figure", "target", "measured")?;
        }
        for verdict in &self.verdicts {
            let kind = if verdict.kind == Kind::Bar { "bar" } else { "goal" };
            let met = verdict.met.map_or("not measured", |met| if met { "met" } else { "MISSED" });
            let measured = verdict.measured.as_deref().unwrap_or("-");
            writeln!(out, "{kind:5} {:52} {:>14} {measured:>12}  {met}", verdict.figure, verdict.target)?;
        }
        writeln!(
            out,
            "\n{}",
            if self.sound { "Nothing lost, doubled or wrongly signed." } else { "NOT SOUND." }
        )
    }
}

fn write_database(out: &mut String, report: &DatabaseReport) -> std::fmt::Result {
    writeln!(out, "\n== {}", report.database)?;
    let phases = report
        .latency
        .iter()
        .chain(turns(&report.throughput, &report.floor))
        .chain(&report.flat)
        .chain(report.endpoints.iter().map(|(_, phase)| phase))
        .collect::<Vec<_>>();
    writeln!(
        out,
        "{:24} {:>8} {:>8} {:>8} {:>8} | {:>8} {:>8} {:>8} | {:>8} {:>7} | CPU s per 1,000 jobs",
        "load", "jobs", "hooks/s", "slowest", "submit/s", "p50 ms", "p99 ms", "max ms", "answer", "others"
    )?;
    for phase in phases {
        let cpu: Vec<String> =
            phase.cpu_s_per_1000.iter().map(|(name, cpu_s)| format!("{name} {cpu_s:.3}")).collect();
        writeln!(
            out,
            "{:24} {:>8} {:>8.0} {:>8} {:>8.0} | {:>8.2} {:>8.2} {:>8.1} | {:>8.2} {:>6.0}% | {}",
            phase.name,
            phase.jobs,
            phase.jobs_per_s,
            phase.slowest_second.map_or("-".to_owned(), |count| count.to_string()),
            phase.submits_per_s,
            phase.webhook.p50_ms,
            phase.webhook.p99_ms,
            phase.webhook.max_ms,
            phase.answer.p50_ms,
            phase.spent.others_share * 100.0,
            cpu.join(", ")
        )?;
        if phase.refused + phase.unknown + phase.lost > 0 {
            let (refused, unknown, lost) = (phase.refused, phase.unknown, phase.lost);
            let trouble = phase.trouble.as_deref().unwrap_or("-");
            writeln!(out, "{:24} refused {refused}, unknown {unknown}, lost {lost}; first: {trouble}", "")?;
        }
    }
    if let Some(idle) = &report.idle {
        writeln!(out, "start to ready: {:.0} ms", idle.start_ms)?;
        for (name, memory) in idle.memory.iter().filter(|(name, _)| *name != crate::BENCH) {
            let share = idle.core_share.get(name).copied().unwrap_or(0.0);
            writeln!(
                out,
                "idle      {name:12} {:>7.1} MB resident, {:.2} % of a core",
                resident(memory),
                share * 100.0
            )?;
        }
    }
    for (name, memory) in &report.full_load {
        let peak = memory.peak_bytes as f64 / MB;
        writeln!(out, "full load {name:12} {:>7.1} MB resident, {peak:.1} MB at most", resident(memory))?;
    }
    let audit = &report.audit;
    writeln!(
        out,
        "audit: {} jobs sent, {} lost, {} doubled, {} with another job's id",
        audit.sent, audit.lost, audit.duplicated, audit.wrong_id
    )?;
    for lost in &report.lost {
        writeln!(out, "lost {lost}")?;
    }
    Ok(())
}

/// Throughput and floor rounds in the order they ran.
fn turns<'a>(first: &'a [Phase], second: &'a [Phase]) -> Vec<&'a Phase> {
    let rounds = first.len().max(second.len());
    (0..rounds).flat_map(|k| first.get(k).into_iter().chain(second.get(k))).collect()
}

fn resident(memory: &Memory) -> f64 {
    memory.resident_bytes as f64 / MB
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0_u32), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

/// The figures of issue and design for one database.
fn verdicts(report: &DatabaseReport) -> Vec<Verdict> {
    use Kind::{Bar, Goal};
    let verdict =
        |kind, figure: &str, target: &str, measured: Option<f64>, unit: &str, met: fn(f64) -> bool| Verdict {
            kind,
            figure: format!("{}: {figure}", report.database),
            target: target.to_owned(),
            measured: measured.map(|value| format!("{}{unit}", short(value))),
            met: measured.map(met),
        };
    let sustained = mean(report.throughput.iter().map(|phase| phase.jobs_per_s));
    let floor = mean(report.floor.iter().map(|phase| phase.jobs_per_s));
    let ratio = sustained.zip(floor).map(|(sustained, floor)| sustained / floor);
    let latency = report.latency.as_ref().map(|phase| phase.webhook);
    let (p50, p99) = (latency.map(|spread| spread.p50_ms), latency.map(|spread| spread.p99_ms));
    let peak = report.full_load.get("ringback").map(|memory| memory.peak_bytes as f64 / MB);
    let idle = report.idle.as_ref().and_then(|idle| idle.memory.get("ringback")).map(resident);
    let idle_core = report.idle.as_ref().map(|idle| {
        let shares = idle.core_share.iter().filter(|(name, _)| *name != crate::BENCH);
        shares.map(|(_, share)| share * 100.0).sum::<f64>()
    });
    let start_s = report.idle.as_ref().map(|idle| idle.start_ms / 1000.0);
    let endpoint_growth = growth(report.endpoints.iter().map(|(_, phase)| phase));
    // The first segment pays for cold caches and is left out where there are others.
    let segments = if report.flat.len() > 2 { &report.flat[1..] } else { &report.flat[..] };
    vec![
        verdict(Bar, "jobs/s, submit to webhook, sustained", ">= 4000/s", sustained, "/s", |x| x >= 4000.0),
        verdict(Bar, "share of the floor", ">= 0.35", ratio, "", |x| x >= 0.35),
        verdict(Bar, "p50 of the open loop", "< 8 ms", p50, " ms", |x| x < 8.0),
        verdict(Bar, "p99 of the open loop", "< 40 ms", p99, " ms", |x| x < 40.0),
        verdict(Bar, "CPU per job, last segment over first", "<= 1.10", growth(segments.iter()), "", |x| {
            x <= FLAT_TOLERANCE
        }),
        verdict(Bar, "all-in-one resident at full load, peak", "< 200 MB", peak, " MB", |x| x < 200.0),
        verdict(Bar, "all-in-one resident when idle", "< 100 MB", idle, " MB", |x| x < 100.0),
        verdict(Goal, "share of the floor", ">= 0.50", ratio, "", |x| x >= 0.5),
        verdict(Goal, "p50 of the open loop", "< 5 ms", p50, " ms", |x| x < 5.0),
        verdict(Goal, "CPU per job, most endpoints over one", "<= 1.10", endpoint_growth, "", |x| {
            x <= FLAT_TOLERANCE
        }),
        verdict(Goal, "idle CPU with broker and database", "<= 1 %", idle_core, " %", |x| x <= 1.0),
        verdict(Goal, "start to ready", "< 2 s", start_s, " s", |x| x < 2.0),
    ]
}

/// Server CPU per job of the last phase over that of the first.
fn growth<'a>(phases: impl Iterator<Item = &'a Phase>) -> Option<f64> {
    let costs: Vec<f64> = phases.map(Phase::server_cpu_s_per_1000).collect();
    let (first, last) = (costs.first()?, costs.last()?);
    (costs.len() > 1 && *first > 0.0).then(|| last / first)
}

fn short(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::Board;
    use crate::load::Load;
    use crate::procs::Spent;

    fn phase(cpu_s: f64, jobs: u64) -> Phase {
        let board = Board::default();
        for _ in 0..jobs {
            let n = board.open();
            board.sent(n, 1_000_000 * (n + 1), 1_000_000 * (n + 1));
            board.answered(n, uuid::Uuid::nil());
            board.arrived(n, uuid::Uuid::nil(), 1_000_000 * (n + 2));
        }
        let load = Load { slots: 0..jobs, refused: 0, unknown: 0, first_trouble: None };
        let cpu_s = [("ringback".to_owned(), cpu_s), (crate::BENCH.to_owned(), 99.0)].into();
        Phase::of("x", &board, &load, Spent { cpu_s, others_share: 0.0 })
    }

    fn report(flat: Vec<Phase>) -> DatabaseReport {
        DatabaseReport { database: "sqlite".to_owned(), flat, ..DatabaseReport::default() }
    }

    #[test]
    fn growth_leaves_the_bench_and_the_cold_start_out() {
        let verdicts =
            verdicts(&report(vec![phase(9.0, 10), phase(1.0, 10), phase(1.0, 10), phase(1.3, 10)]));
        let flat = verdicts.iter().find(|verdict| verdict.figure.contains("last segment")).unwrap();
        assert_eq!((flat.measured.as_deref(), flat.met), (Some("1.30"), Some(false)));
    }

    #[test]
    fn what_was_not_run_is_not_judged() {
        for verdict in verdicts(&report(Vec::new())) {
            assert_eq!((verdict.measured, verdict.met), (None, None), "{}", verdict.figure);
        }
    }

    #[test]
    fn share_of_the_floor_is_mean_over_mean() {
        let mut one = report(Vec::new());
        one.throughput = vec![phase(1.0, 10), phase(1.0, 10)];
        one.floor = vec![phase(1.0, 10)];
        let share = verdicts(&one).into_iter().find(|verdict| verdict.target == ">= 0.35").unwrap();
        assert_eq!((share.measured.as_deref(), share.met), (Some("1.00"), Some(true)));
    }
}
