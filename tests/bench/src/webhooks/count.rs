//! Webhooks of many jobs while dispatchers are killed at random.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use ringback_service_runtime::time::now_ms;
use uuid::Uuid;

use super::ledger::Ledger;
use super::setup::{Rig, delivery};
use super::{Cli, failed};
use crate::children::Running;
use crate::error::BenchError;

/// Deliveries of one job: two notices and its end.
const LIFE: u64 = 3;
/// Jobs owed in one commit.
const CHUNK: u64 = 200;
/// Between two looks at the books.
const LOOK: Duration = Duration::from_millis(200);

/// How much and how rough.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Webhooks in all; three per job
    #[arg(long, default_value_t = 100_000)]
    webhooks: u64,
    /// Dispatchers at once
    #[arg(long, default_value_t = 2)]
    dispatchers: usize,
    /// A random dispatcher is killed with SIGKILL about this often; 0 for never
    #[arg(long, default_value_t = 2_000)]
    kill_every_ms: u64,
    /// Webhooks that may be outstanding
    #[arg(long, default_value_t = 5_000)]
    backlog: u64,
    /// Seed of the moments and victims of the kills [default: a random one, which is printed]
    #[arg(long)]
    seed: Option<u64>,
}

pub(super) async fn run(cli: &Cli, args: &Args) -> Result<bool, BenchError> {
    let patience = Duration::from_secs(cli.patience);
    let mut rig = Rig::start(cli).await?;
    let ledger = Ledger::start().await?;
    let mut alive: Vec<(u32, Running)> = Vec::new();
    for _ in 0..args.dispatchers.max(1) {
        let next = rig.dispatcher()?;
        alive.push((rig.starts(), next));
    }
    let (jobs, began) = (args.webhooks.div_ceil(LIFE), Instant::now());
    let mut deaths: HashMap<u32, i64> = HashMap::new();
    let seed = args.seed.unwrap_or_else(rand::random);
    println!("seed                       {seed:>20}");
    let mut dice = StdRng::seed_from_u64(seed);
    let mut next_kill = soon(&mut dice, args.kill_every_ms);
    let (mut owed, mut told) = (0, began);
    loop {
        if next_kill.is_some_and(|at| at <= Instant::now()) {
            let at = dice.random_range(0..alive.len());
            let (process, victim) = alive.swap_remove(at);
            deaths.insert(process, now_ms());
            victim.kill().await?;
            let next = rig.dispatcher()?;
            alive.push((rig.starts(), next));
            next_kill = soon(&mut dice, args.kill_every_ms);
        }
        let distinct = ledger.distinct();
        if owed < jobs && (owed * LIFE).saturating_sub(distinct) < args.backlog {
            let until = jobs.min(owed + CHUNK);
            let life = |job: u64| {
                let (id, url) = (Uuid::now_v7(), ledger.url(&format!("/hook/{}", job % 8)));
                (1..=LIFE).map(move |seq| {
                    let seq = u32::try_from(seq).unwrap_or(1);
                    delivery(id, seq, u64::from(seq) == LIFE, &url, job * LIFE + u64::from(seq))
                })
            };
            rig.owe((owed..until).flat_map(life).collect(), true).await?;
            owed = until;
        } else if distinct >= jobs * LIFE || ledger.last_at().unwrap_or(began).elapsed() > patience {
            break;
        } else {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if told.elapsed() > Duration::from_secs(10) {
            told = Instant::now();
            eprintln!("{distinct} of {} webhooks, {} kills", jobs * LIFE, deaths.len());
        }
    }
    let took = began.elapsed();
    // What was told and not yet written down.
    let settled = Instant::now();
    let mut books = rig.books().await?;
    while books.0 > 0 && settled.elapsed() < patience {
        tokio::time::sleep(LOOK).await;
        books = rig.books().await?;
    }
    // Before the last ones end: what they have brought was not in doubt.
    let copies = ledger.copies(rig.store.facts().partitions);
    drop(alive);
    let mut causes = rig.causes()?;
    causes.deaths = deaths;
    let (doubles, lapses) = (causes.judge(&copies), &causes.lapses);
    let (faults, distinct) = (ledger.faults(), ledger.distinct());
    let (pending, delivered, other) = books;
    let lost = (jobs * LIFE).saturating_sub(distinct);
    println!("webhooks owed              {:>10}", jobs * LIFE);
    println!("ids that arrived           {distinct:>10}   lost {lost}");
    println!("POSTs                      {:>10}   in {:.1} s", ledger.posts(), took.as_secs_f64());
    println!("dispatchers killed         {:>10}", causes.deaths.len());
    let tries: u64 = lapses.iter().map(|lapse| lapse.tries).sum();
    println!("leases that lapsed         {:>10}   with {tries} tries in flight", lapses.len());
    println!(
        "copies beyond the first    {:>10}   without a cause that explains them {}; overtaken by at most {} ms",
        doubles.all, doubles.unexplained, doubles.overtaken_ms
    );
    println!("copies with other bytes    {:>10}", faults.altered);
    println!("out of order within a job  {:>10}", faults.disordered);
    println!("signature did not hold     {:>10}", faults.unsigned);
    println!("SQL: delivered {delivered}, pending {pending}, other {other}");
    if let Some(first) = &faults.first {
        println!("first fault: {first}");
    }
    let sound = lost == 0
        && doubles.unexplained == 0
        && (faults.altered, faults.disordered, faults.unsigned) == (0, 0, 0)
        && delivered == jobs * LIFE;
    println!("{}", if sound { "sound" } else { "NOT SOUND" });
    if distinct > jobs * LIFE {
        return Err(failed("more ids than were owed"));
    }
    Ok(sound)
}

/// A random moment about so far away.
fn soon(dice: &mut StdRng, every_ms: u64) -> Option<Instant> {
    (every_ms > 0).then(|| {
        let ms = dice.random_range(every_ms / 2..=every_ms + every_ms / 2);
        Instant::now() + Duration::from_millis(ms)
    })
}
