//! Whether one dead and one dripping receiver delay 98 good ones: the same load with and without the bad two.

use std::time::{Duration, Instant};

use uuid::Uuid;

use super::Cli;
use super::ledger::Ledger;
use super::setup::{Rig, delivery};
use crate::children::free_port;
use crate::error::BenchError;
use crate::stats::{Quantiles, Spread};

const TARGETS: u64 = 100;
/// Webhooks are owed this often.
const TICK: Duration = Duration::from_millis(10);

/// How much.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Webhooks per second over all 100 targets
    #[arg(long, default_value_t = 500)]
    rate: u64,
    /// Length of each round, in seconds
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Rounds of each kind, in turns
    #[arg(long, default_value_t = 2)]
    rounds: u64,
}

pub(super) async fn run(cli: &Cli, args: &Args) -> Result<bool, BenchError> {
    let mut all_came = true;
    for round in 1..=args.rounds.max(1) {
        let (alone, ok) = measure(cli, args, false).await?;
        all_came &= ok;
        let (beside, ok) = measure(cli, args, true).await?;
        all_came &= ok;
        println!("round {round}                          p50 ms     p99 ms     max ms");
        println!(
            "98 of 100 good            {:>10.2} {:>10.2} {:>10.2}",
            alone.p50_ms, alone.p99_ms, alone.max_ms
        );
        println!(
            "98 beside dead and drip   {:>10.2} {:>10.2} {:>10.2}",
            beside.p50_ms, beside.p99_ms, beside.max_ms
        );
        println!("p99 ratio                 {:>10.2}", beside.p99_ms / alone.p99_ms.max(f64::MIN_POSITIVE));
    }
    println!("{}", if all_came { "sound" } else { "NOT SOUND: webhooks of good receivers are missing" });
    Ok(all_came)
}

/// Times of the 98 good ones from the moment they are owed to their arrival.
async fn measure(cli: &Cli, args: &Args, bad: bool) -> Result<(Quantiles, bool), BenchError> {
    let mut rig = Rig::start(cli).await?;
    let ledger = Ledger::start().await?;
    let dispatcher = rig.dispatcher()?;
    let dead = format!("http://127.0.0.1:{}/hook", free_port()?);
    let url = |target: u64| match target {
        0 if bad => dead.clone(),
        1 if bad => ledger.url("/drip"),
        _ => ledger.url(&format!("/hook/{target}")),
    };
    // Once through, so that start-up is not measured.
    let warm: Vec<_> =
        (2..TARGETS).map(|t| delivery(Uuid::now_v7(), 1, true, &url(t), u64::MAX - t)).collect();
    let warmed = warm.len() as u64;
    rig.owe(warm, true).await?;
    if !ledger.until(warmed, Duration::from_secs(cli.patience)).await {
        return Err(dispatcher.not_ready("no webhook came".to_owned()));
    }
    let (began, mut owed_at) = (Instant::now(), Vec::new());
    let total = args.rate * args.seconds;
    while (owed_at.len() as u64) < total {
        let due = (began.elapsed().as_millis() as u64 * args.rate / 1_000).min(total);
        let from = owed_at.len() as u64;
        if due > from {
            let rows = (from..due).map(|n| delivery(Uuid::now_v7(), 1, true, &url(n % TARGETS), n)).collect();
            owed_at.extend(std::iter::repeat_n(Instant::now(), (due - from) as usize));
            rig.owe(rows, true).await?;
        }
        tokio::time::sleep(TICK).await;
    }
    let good: Vec<u64> = (0..total).filter(|n| n % TARGETS >= 2).collect();
    let patience = Instant::now() + Duration::from_secs(cli.patience);
    while good.iter().any(|n| ledger.arrived(*n).is_none()) && Instant::now() < patience {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (mut spread, mut came) = (Spread::new(), 0);
    for n in &good {
        if let Some(at) = ledger.arrived(*n) {
            came += 1;
            let took = at.saturating_duration_since(owed_at[*n as usize]);
            spread.add_us(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        }
    }
    Ok((spread.quantiles(), came == good.len()))
}
