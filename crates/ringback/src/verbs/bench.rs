//! `ringback bench`: a small load on a running server through the routes that every client uses.

mod figures;

use super::{Context, input};
use crate::client::connection::ServerArgs;
use crate::client::encode;
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::progress::Progress;
use crate::ui::style::Style;
use crate::ui::{out, when};
use figures::{Figures, Spread};
use futures::future::join_all;
use ringback_domain::JobStatus;
use serde::Deserialize;
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

const EXAMPLES: &str = "\
Examples:
  ringback bench                                  1000 jobs of echo, 16 at a time
  ringback bench --duration 30s --concurrency 64
  ringback bench --rate 200 --duration 30s        200 a second, however slow the answers are
  ringback bench tts --input @sentence.json --jobs 50 --concurrency 4 --json

Each job is one POST /v2/ENDPOINT/runsync, timed from before it is sent until its result is here; with --rate from the
moment it was due. The load comes from this one process: on the server's own machine the two share its cores. The jobs
are real ones, stay in the lists for as long as the endpoint keeps its results, and count towards quotas.
Exit codes: 0 all completed, 1 some had no answer or were refused, 10 some did not complete.";

/// How long the server holds one answer.
const HOLD: Duration = Duration::from_secs(45);
/// Time between two looks at the progress.
const LOOK: Duration = Duration::from_millis(200);

/// Measure a running server with a small load
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct BenchArgs {
    /// Endpoint's name
    #[arg(default_value = "echo")]
    endpoint: String,
    /// The input of every job: JSON, @FILE, or - for standard input
    #[arg(short, long, value_name = "JSON|@FILE|-", default_value = "{}")]
    input: String,
    /// How many jobs [default: 1000, or as many as --duration leaves time for]
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    jobs: Option<u64>,
    /// For how long jobs are sent
    #[arg(short, long, value_name = "TIME", value_parser = when::parse_span_ms)]
    duration: Option<u64>,
    /// Jobs on their way at the same time
    #[arg(short, long, value_name = "N", default_value = "16", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    concurrency: u32,
    /// Jobs per second [default: the next one as soon as one has ended]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: Option<u32>,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

/// What `/runsync` and `/status-sync` answer.
#[derive(Deserialize)]
struct Answer {
    id: String,
    status: String,
    #[serde(default, rename = "delayTime")]
    delay_ms: Option<u64>,
    #[serde(default, rename = "executionTime")]
    execution_ms: Option<u64>,
}

/// Which job is sent when.
struct Plan {
    begun: Instant,
    jobs: u64,
    time: Duration,
    rate: Option<u32>,
    next: Cell<u64>,
    stopped: Cell<bool>,
}

impl Plan {
    /// The moment that the next job is due, `None` when there is none.
    fn take(&self) -> Option<Instant> {
        let n = self.next.get();
        let after =
            self.rate.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(n as f64 / f64::from(rate)));
        let late = self.begun.elapsed().max(after) >= self.time;
        if self.stopped.get() || n >= self.jobs || late {
            return None;
        }
        self.next.set(n + 1);
        Some(if self.rate.is_some() { self.begun + after } else { Instant::now() })
    }
}

/// Runs the verb.
pub(crate) async fn run(ctx: &Context, args: &BenchArgs) -> Result<Exit, CliError> {
    let input = input::job_input(Some(&args.input))?;
    let body = format!("{{\"input\":{}}}", input.get());
    // One job alone first: what cannot work at all is told as what it is. It also opens the connection.
    let first = job(ctx, &args.endpoint, &body).await?;
    if first.status != JobStatus::Completed.as_str() {
        return Err(CliError::Service(format!(
            "the first job, {}, ended {}; see `ringback get {}`",
            first.id, first.status, first.id
        )));
    }
    let jobs = args.jobs.unwrap_or(if args.duration.is_some() { u64::MAX } else { 1000 });
    let plan = Plan {
        begun: Instant::now(),
        jobs,
        time: args.duration.map_or(Duration::MAX, Duration::from_millis),
        rate: args.rate,
        next: Cell::new(0),
        stopped: Cell::new(false),
    };
    let figures = RefCell::new(Figures::default());
    let progress = Progress::bar(expected(args, jobs), ctx.quiet || ctx.json);
    let sending = join_all((0..args.concurrency).map(|_| send(ctx, args, &body, &plan, &figures)));
    let looking = async {
        loop {
            tokio::time::sleep(LOOK).await;
            let figures = figures.borrow();
            progress.at(figures.ended());
            let per_s = figures.completed() as f64 / plan.begun.elapsed().as_secs_f64();
            progress.text(format!("{per_s:.0} jobs/s"));
        }
    };
    let stopping = async {
        // Without the signal it just runs to its end.
        if tokio::signal::ctrl_c().await.is_ok() {
            plan.stopped.set(true);
        }
        std::future::pending().await
    };
    tokio::select! {
        _ = sending => {}
        () = looking => {}
        () = stopping => {}
    }
    let took = plan.begun.elapsed();
    progress.clear();
    let figures = figures.into_inner();
    if ctx.json {
        out(&report(args, &figures, took).to_string())?;
    } else {
        show(args, &figures, took)?;
    }
    Ok(match (figures.not_completed(), figures.unanswered()) {
        (0, 0) => Exit::Ok,
        (0, _) => Exit::Error,
        _ => Exit::JobFailed,
    })
}

/// How many jobs the bar is long.
fn expected(args: &BenchArgs, jobs: u64) -> u64 {
    let by_rate = args.rate.zip(args.duration).map(|(rate, ms)| u64::from(rate) * ms / 1000);
    by_rate.unwrap_or(u64::MAX).min(jobs).min(10_000_000)
}

async fn send(ctx: &Context, args: &BenchArgs, body: &str, plan: &Plan, figures: &RefCell<Figures>) {
    while let Some(due) = plan.take() {
        tokio::time::sleep_until(due.into()).await;
        let ended = job(ctx, &args.endpoint, body).await;
        let took = due.elapsed();
        let mut figures = figures.borrow_mut();
        match ended {
            Ok(answer) if answer.status == JobStatus::Completed.as_str() => {
                figures.complete(took, answer.delay_ms.unwrap_or(0), answer.execution_ms.unwrap_or(0));
            }
            Ok(answer) => figures.end_otherwise(answer.status),
            Err(CliError::Refused(problem)) => figures.no_answer(format!("HTTP {}", problem.status())),
            Err(CliError::Unreachable { reason, .. }) => figures.no_answer(reason),
            Err(error) => figures.no_answer(error.to_string()),
        }
    }
}

/// One job from its submit to its end.
async fn job(ctx: &Context, endpoint: &str, body: &str) -> Result<Answer, CliError> {
    let (endpoint, hold_ms) = (encode(endpoint), HOLD.as_millis());
    let path = format!("/v2/{endpoint}/runsync?wait={hold_ms}");
    let mut answer: Answer = ctx.api.post(&path, body.to_owned(), &[]).await?.read()?;
    while JobStatus::ALL.into_iter().any(|s| s.as_str() == answer.status && !s.is_terminal()) {
        let path = format!("/v2/{endpoint}/status-sync/{}?wait={hold_ms}", encode(&answer.id));
        answer = ctx.api.get(&path).await?.read()?;
    }
    Ok(answer)
}

fn report(args: &BenchArgs, figures: &Figures, took: Duration) -> Value {
    json!({
        "endpoint": args.endpoint,
        "concurrency": args.concurrency,
        "rate": args.rate,
        "seconds": took.as_secs_f64(),
        "completed": figures.completed(),
        "jobs_per_s": figures.completed() as f64 / took.as_secs_f64(),
        "latency_ms": figures.latency().as_json(),
        "delay_ms": figures.delay().as_json(),
        "execution_ms": figures.execution().as_json(),
        "not_completed": figures.endings,
        "no_answer": figures.faults,
    })
}

fn show(args: &BenchArgs, figures: &Figures, took: Duration) -> std::io::Result<()> {
    let style = Style::stdout();
    let per_s = figures.completed() as f64 / took.as_secs_f64();
    let way = args.rate.map_or_else(
        || format!("{} at a time", args.concurrency),
        |rate| format!("{rate} a second, at most {} at a time", args.concurrency),
    );
    out(&format!("{} jobs of {} in {:.2} s, {way}", figures.ended(), args.endpoint, took.as_secs_f64()))?;
    out(&format!("  {:<11} {} at {per_s:.1} jobs/s", "completed", figures.completed()))?;
    let line = |name: &str, spread: &Spread, what: &str| {
        let Spread { p50, p90, p99, max } = spread;
        let figures = format!("p50 {p50:<8.2} p90 {p90:<8.2} p99 {p99:<8.2} max {max:.2}");
        out(&format!("  {name:<11} {figures} ms  {}", style.dim(what)))
    };
    if figures.completed() > 0 {
        line("latency", &figures.latency(), "submit to result, seen from here")?;
        line("in queue", &figures.delay(), "the server's delayTime")?;
        line("running", &figures.execution(), "the server's executionTime")?;
    }
    for (name, count) in figures.endings.iter().chain(&figures.faults) {
        out(&format!("  {:<11} {}", style.red(&count.to_string()), crate::ui::clean(name)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_sets_the_times_and_a_duration_ends_it() {
        let plan = |jobs, time, rate| Plan {
            begun: Instant::now(),
            jobs,
            time,
            rate,
            next: Cell::new(0),
            stopped: Cell::new(false),
        };
        let by_rate = plan(u64::MAX, Duration::from_secs(3600), Some(2));
        let times: Vec<Duration> = (0..3).map(|_| by_rate.take().unwrap() - by_rate.begun).collect();
        assert_eq!(times, [0, 500, 1000].map(Duration::from_millis));
        let short = plan(u64::MAX, Duration::from_secs(1), Some(1));
        assert!(short.take().is_some() && short.take().is_none(), "the second would be due at its end");
        let few = plan(2, Duration::MAX, None);
        assert!(few.take().is_some() && few.take().is_some() && few.take().is_none());
        let stopped = plan(2, Duration::MAX, None);
        stopped.stopped.set(true);
        assert!(stopped.take().is_none());
    }
}
