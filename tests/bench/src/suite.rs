//! Runs the parts against one database, in order, each load audited to its last job.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::board::Board;
use crate::error::BenchError;
use crate::floor::Floor;
use crate::instance::{API_KEY, Instance, Settings};
use crate::load::{Closed, Load, Open, Target, Until, closed, open};
use crate::options::{Options, Part};
use crate::postgres::Postgres;
use crate::procs::{self, Group, Memory};
use crate::receiver::{FLOOR_PATH, HOOK_PATH, Receiver};
use crate::stats::{Audit, Phase};

const WARM_UP_JOBS: u64 = 500;
/// Lost jobs that are asked after.
const LOST_SHOWN: usize = 5;

/// An instance that does nothing.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Idle {
    /// From start to ready.
    pub start_ms: f64,
    /// Memory by process.
    pub memory: BTreeMap<String, Memory>,
    /// Share of one core by process, 0 to 1.
    pub core_share: BTreeMap<String, f64>,
}

/// All figures of one database.
#[derive(Debug, Clone, Default, Serialize)]
pub struct DatabaseReport {
    /// `sqlite` or `postgres`.
    pub database: String,
    /// Doing nothing.
    pub idle: Option<Idle>,
    /// Open loop.
    pub latency: Option<Phase>,
    /// Closed loop, one entry per round.
    pub throughput: Vec<Phase>,
    /// The floor, one entry per round.
    pub floor: Vec<Phase>,
    /// Memory by process after the throughput rounds.
    pub full_load: BTreeMap<String, Memory>,
    /// Cost while the database grows, one entry per checkpoint.
    pub flat: Vec<Phase>,
    /// Cost by number of endpoints.
    pub endpoints: Vec<(usize, Phase)>,
    /// All jobs sent to this database.
    pub audit: Audit,
    /// The first lost jobs and what the server says about them.
    pub lost: Vec<String>,
}

/// Runs parts.
pub struct Suite<'a> {
    /// Where jobs are noted.
    pub board: Arc<Board>,
    /// Where webhooks come in.
    pub receiver: &'a Receiver,
    /// What to measure.
    pub options: &'a Options,
    /// How instances are started.
    pub settings: &'a Settings,
    /// The nats-server program, for the floor.
    pub nats_server: Option<&'a Path>,
    /// An existing folder for data.
    pub folder: PathBuf,
}

/// Where the jobs of one instance are kept.
pub enum Database {
    /// SQLite in the data folder.
    Sqlite,
    /// A temporary server; each instance gets an empty database.
    Temporary(Box<Postgres>),
    /// A URL from the user.
    Url(String),
}

/// One instance with what belongs to it while it is under load.
struct Bed {
    instance: Instance,
    target: Arc<Target>,
    groups: Vec<Group>,
    slots: Vec<Range<u64>>,
}

impl Suite<'_> {
    /// All wanted parts against one database.
    pub async fn run(&self, name: &str, database: &Database) -> Result<DatabaseReport, BenchError> {
        let mut report = DatabaseReport { database: name.to_owned(), ..DatabaseReport::default() };
        let wants = |part| self.options.wants(part);
        if wants(Part::Idle) || wants(Part::Latency) || wants(Part::Throughput) {
            self.main_instance(&mut report, database).await?;
        } else if wants(Part::Floor) {
            for round in 1..=self.options.rounds {
                report.floor.push(self.floor(round).await?);
            }
        }
        if wants(Part::Flat) {
            self.flat(&mut report, database).await?;
        }
        if wants(Part::Endpoints) {
            for count in &self.options.endpoints {
                let mut bed = self.bed(&format!("{name}-endpoints-{count}"), database, *count).await?;
                let until = Until::Jobs(self.options.endpoint_jobs);
                let phase = self.closed(&mut bed, &format!("{count} endpoints"), until).await?;
                report.endpoints.push((*count, phase));
                self.close(bed, &mut report).await;
            }
        }
        Ok(report)
    }

    async fn main_instance(
        &self,
        report: &mut DatabaseReport,
        database: &Database,
    ) -> Result<(), BenchError> {
        let mut bed = self.bed(&format!("{}-main", report.database), database, 1).await?;
        if self.options.wants(Part::Idle) {
            report.idle = Some(self.idle(&bed).await);
        }
        if self.options.wants(Part::Latency) {
            self.warm_up(&mut bed).await?;
            report.latency = Some(self.latency(&mut bed).await?);
        }
        for round in 1..=self.options.rounds {
            if self.options.wants(Part::Throughput) {
                if round == 1 {
                    self.warm_up(&mut bed).await?;
                }
                let until = Until::Time(Duration::from_secs(self.options.seconds));
                let phase = self.closed(&mut bed, &format!("throughput {round}"), until).await?;
                report.throughput.push(phase);
                report.full_load = memory(&bed.groups);
            }
            if self.options.wants(Part::Floor) {
                report.floor.push(self.floor(round).await?);
            }
        }
        self.close(bed, report).await;
        Ok(())
    }

    async fn bed(&self, name: &str, database: &Database, endpoints: usize) -> Result<Bed, BenchError> {
        let folder = self.make_folder(name)?;
        let url = match database {
            Database::Sqlite => None,
            Database::Temporary(server) => Some(server.database(&name.replace('-', "_")).await?),
            Database::Url(url) => Some(url.clone()),
        };
        let instance = Instance::start(self.settings, &folder, url.as_deref(), endpoints).await?;
        let mut groups = instance.groups();
        if let Database::Temporary(server) = database {
            groups.extend(server.group());
        }
        groups.push(Group::single(crate::BENCH, std::process::id()));
        let (key, hook) = (Some(API_KEY), self.receiver.url(HOOK_PATH));
        let target = Target::new(&instance.address, key, &instance.endpoints, hook, self.text())?;
        Ok(Bed { instance, target: Arc::new(target), groups, slots: Vec::new() })
    }

    /// Counts what became of the instance's jobs, asks after lost ones, and ends it.
    async fn close(&self, bed: Bed, report: &mut DatabaseReport) {
        let audit = Audit::of(&self.board, &bed.slots);
        report.audit.sent += audit.sent;
        report.audit.lost += audit.lost;
        report.audit.duplicated += audit.duplicated;
        report.audit.wrong_id += audit.wrong_id;
        let jobs = bed.slots.iter().flat_map(|slots| self.board.jobs(slots.clone()));
        for (n, job) in jobs.filter(|(_, job)| job.answered_ns != 0 && job.arrivals == 0).take(LOST_SHOWN) {
            let id = job.submitted.hyphenated().to_string();
            report.lost.push(format!("{id}: {}", bed.instance.status_of(n, &id).await));
        }
        bed.instance.stop().await;
    }

    async fn idle(&self, bed: &Bed) -> Idle {
        // What starts up after readiness (first sweeps, page cache) is not idling.
        let (settle, watch) = if self.options.quick { (200, 500) } else { (3_000, 10_000) };
        tokio::time::sleep(Duration::from_millis(settle)).await;
        let before = procs::snapshot(&bed.groups);
        tokio::time::sleep(Duration::from_millis(watch)).await;
        let spent = procs::spent(&before, &bed.groups);
        let share = |cpu_s: &f64| cpu_s * 1000.0 / watch as f64;
        Idle {
            start_ms: bed.instance.start_ms,
            memory: memory(&bed.groups),
            core_share: spent.cpu_s.iter().map(|(name, cpu_s)| (name.clone(), share(cpu_s))).collect(),
        }
    }

    async fn warm_up(&self, bed: &mut Bed) -> Result<(), BenchError> {
        let bar = ProgressBar::hidden();
        let load = closed(&self.board, &bed.target, self.plan(Until::Jobs(WARM_UP_JOBS)), &bar).await?;
        bed.slots.push(load.slots);
        Ok(())
    }

    async fn closed(&self, bed: &mut Bed, name: &str, until: Until) -> Result<Phase, BenchError> {
        let bar = bar(name, until);
        let before = procs::snapshot(&bed.groups);
        let load = closed(&self.board, &bed.target, self.plan(until), &bar).await?;
        Ok(self.finish(name, &bar, bed, before, load))
    }

    async fn latency(&self, bed: &mut Bed) -> Result<Phase, BenchError> {
        let (rate, patience) = (self.options.rate, self.options.patience());
        let jobs = u64::from(rate) * self.options.latency_seconds;
        let name = format!("latency at {rate}/s");
        let bar = bar(&name, Until::Jobs(jobs));
        let before = procs::snapshot(&bed.groups);
        let load = open(&self.board, &bed.target, Open { rate, jobs, patience }, &bar).await?;
        Ok(self.finish(&name, &bar, bed, before, load))
    }

    fn finish(
        &self,
        name: &str,
        bar: &ProgressBar,
        bed: &mut Bed,
        before: procs::Snapshot,
        load: Load,
    ) -> Phase {
        let phase = Phase::of(name, &self.board, &load, procs::spent(&before, &bed.groups));
        bed.slots.push(load.slots);
        tell(bar, &phase);
        phase
    }

    async fn flat(&self, report: &mut DatabaseReport, database: &Database) -> Result<(), BenchError> {
        let mut bed = self.bed(&format!("{}-flat", report.database), database, 1).await?;
        let mut reached = 0;
        for checkpoint in &self.options.checkpoints {
            let until = Until::Jobs(checkpoint.saturating_sub(reached));
            report.flat.push(self.closed(&mut bed, &format!("jobs {reached} to {checkpoint}"), until).await?);
            reached = *checkpoint;
        }
        self.close(bed, report).await;
        Ok(())
    }

    async fn floor(&self, round: usize) -> Result<Phase, BenchError> {
        let nats_server = self.nats_server.ok_or_else(|| BenchError::Option {
            option: "--nats-server",
            reason: "the floor needs one and none is on PATH".to_owned(),
        })?;
        let folder = self.make_folder(&format!("floor-{}", self.board.border()))?;
        let receiver = self.receiver.address.to_string();
        // Ringback's webhook holds the input twice: as input and as output.
        let floor = Floor::start(&folder, nats_server, &receiver, self.options.payload_bytes + 40).await?;
        let mut groups = floor.groups();
        groups.push(Group::single(crate::BENCH, std::process::id()));
        let hook = self.receiver.url(FLOOR_PATH);
        let target = Target::new(&floor.address, Some(API_KEY), &["bench-0".to_owned()], hook, self.text())?;
        let target = Arc::new(target);
        let warm_up = self.plan(Until::Jobs(WARM_UP_JOBS));
        closed(&self.board, &target, warm_up, &ProgressBar::hidden()).await?;

        let name = format!("floor {round}");
        let until = Until::Time(Duration::from_secs(self.options.floor_seconds));
        let bar = bar(&name, until);
        let before = procs::snapshot(&groups);
        let load = closed(&self.board, &target, self.plan(until), &bar).await?;
        let phase = Phase::of(&name, &self.board, &load, procs::spent(&before, &groups));
        tell(&bar, &phase);
        floor.stop().await;
        Ok(phase)
    }

    fn plan(&self, until: Until) -> Closed {
        let options = self.options;
        let (connections, backlog) = (options.connections, options.backlog);
        Closed { connections, backlog, until, patience: options.patience() }
    }

    fn text(&self) -> String {
        "The quick brown fox jumps over the lazy dog. "
            .chars()
            .cycle()
            .take(self.options.payload_bytes)
            .collect()
    }

    fn make_folder(&self, name: &str) -> Result<PathBuf, BenchError> {
        let folder = self.folder.join(name);
        std::fs::create_dir_all(&folder).map_err(|source| BenchError::file(&folder, source))?;
        Ok(folder)
    }
}

/// Memory by group.
fn memory(groups: &[Group]) -> BTreeMap<String, Memory> {
    groups.iter().map(|group| (group.name.clone(), group.memory())).collect()
}

fn bar(name: &str, until: Until) -> ProgressBar {
    let (bar, template) = match until {
        Until::Jobs(jobs) => {
            (ProgressBar::new(jobs), "{msg:24} [{bar:30}] {pos}/{len} webhooks {per_sec} {elapsed}")
        }
        Until::Time(time) => {
            let bar = ProgressBar::new_spinner();
            bar.set_prefix(format!("of {} s", time.as_secs()));
            (bar, "{msg:24} {spinner} {pos} webhooks {per_sec} {elapsed} {prefix}")
        }
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(name.to_owned());
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

/// One line per finished load, also where stderr is no terminal.
fn tell(bar: &ProgressBar, phase: &Phase) {
    bar.finish_and_clear();
    eprintln!(
        "{:24} {} jobs in {:.1} s: {:.0}/s; submit to webhook p50 {:.2} ms, p99 {:.2} ms, max {:.1} ms",
        phase.name,
        phase.jobs,
        phase.seconds,
        phase.jobs_per_s,
        phase.webhook.p50_ms,
        phase.webhook.p99_ms,
        phase.webhook.max_ms
    );
    if let Some(trouble) = &phase.trouble {
        eprintln!("{:24} {} refused, {} unknown; first: {trouble}", "", phase.refused, phase.unknown);
    }
}
