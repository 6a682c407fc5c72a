//! How fast one dispatcher sends what is owed in SQL, beside bare POSTs by the same client, and in how much memory.

use std::time::{Duration, Instant};

use uuid::Uuid;

use super::ledger::Ledger;
use super::setup::{Rig, delivery};
use super::{Cli, failed};
use crate::error::BenchError;
use crate::procs::Group;

const CHUNK: u64 = 2_000;

/// How much.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Deliveries that are owed before the dispatcher starts
    #[arg(long, default_value_t = 100_000)]
    owed: u64,
    /// Targets that they go to
    #[arg(long, default_value_t = 16)]
    targets: u64,
    /// Bare POSTs of the floor
    #[arg(long, default_value_t = 50_000)]
    floor: u64,
}

pub(super) async fn run(cli: &Cli, args: &Args) -> Result<bool, BenchError> {
    let patience = Duration::from_secs(cli.patience);
    let mut rig = Rig::start(cli).await?;
    let ledger = Ledger::start().await?;
    let floor = floor(&ledger, args.floor).await?;
    let mut owed = 0;
    while owed < args.owed {
        let until = args.owed.min(owed + CHUNK);
        let rows = (owed..until).map(|n| {
            delivery(Uuid::now_v7(), 1, true, &ledger.url(&format!("/hook/{}", n % args.targets.max(1))), n)
        });
        rig.owe(rows.collect(), false).await?;
        owed = until;
    }
    let dispatcher = rig.dispatcher()?;
    let group = Group::single("dispatcher", dispatcher.pid().unwrap_or_default());
    if !ledger.until(1, patience).await {
        return Err(dispatcher.not_ready("no webhook came".to_owned()));
    }
    let began = Instant::now();
    let mut memory: Vec<(u64, u64)> = Vec::new();
    let mut arrived = ledger.distinct();
    while arrived < args.owed && ledger.last_at().is_none_or(|at| at.elapsed() < patience) {
        tokio::time::sleep(Duration::from_millis(200)).await;
        arrived = ledger.distinct();
        memory.push((arrived, group.memory().resident_bytes / 1024));
    }
    let rate = arrived as f64 / began.elapsed().as_secs_f64();
    let settled = Instant::now();
    let mut books = rig.books().await?;
    while books.0 > 0 && settled.elapsed() < patience {
        tokio::time::sleep(Duration::from_millis(200)).await;
        books = rig.books().await?;
    }
    drop(dispatcher);
    let again = self::floor(&ledger, args.floor).await?;
    let (faults, doubles) = (ledger.faults(), ledger.doubles());
    println!("owed                       {:>10}", args.owed);
    println!("arrived                    {arrived:>10}   copies beyond the first {doubles}");
    println!("rate                       {rate:>10.0} /s   signed, recorded in SQL");
    println!("floor (bare POSTs)         {floor:>10.0} /s   before, {again:.0} /s after");
    for part in 1..=4_u64 {
        let reached = args.owed * part / 4;
        if let Some((_, rss)) = memory.iter().find(|(n, _)| *n >= reached) {
            println!("memory at {reached:>10}       {rss:>10} KiB");
        }
    }
    let most = memory.iter().map(|(_, rss)| *rss).max().unwrap_or_default();
    println!("memory at most             {most:>10} KiB");
    println!("SQL: delivered {}, pending {}, other {}", books.1, books.0, books.2);
    let sound = arrived == args.owed
        && doubles == 0
        && books.1 == args.owed
        && (faults.altered, faults.unsigned) == (0, 0);
    println!("{}", if sound { "sound" } else { "NOT SOUND" });
    Ok(sound)
}

/// Bare POSTs by a process of their own.
async fn floor(ledger: &Ledger, count: u64) -> Result<f64, BenchError> {
    let output = tokio::process::Command::new(std::env::current_exe()?)
        .args(["posts", "--url", &ledger.url("/floor"), "--count", &count.to_string()])
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.trim().parse().map_err(|_| failed(String::from_utf8_lossy(&output.stderr)))
}
