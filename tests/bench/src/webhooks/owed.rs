//! How much memory a dispatcher takes while very many deliveries are owed: to a receiver that is down, then to one that
//! is back.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::Cli;
use super::ledger::Ledger;
use super::setup::{Rig, delivery};
use crate::children::free_port;
use crate::error::BenchError;
use crate::procs::Group;

/// Deliveries of one commit.
const CHUNK: u64 = 2_000;
/// Between two looks at the memory.
const LOOK: Duration = Duration::from_millis(500);
/// Lines printed of each part.
const LINES: u64 = 10;

/// How much.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Deliveries that are owed before the dispatcher starts
    #[arg(long, default_value_t = 1_000_000)]
    deliveries: u64,
    /// Targets that they go to, all on one host
    #[arg(long, default_value_t = 100)]
    targets: u64,
    /// How long the receiver is down after the dispatcher's start, in seconds
    #[arg(long, default_value_t = 60)]
    dead_s: u64,
    /// How long it is up then, in seconds; 0 until everything has arrived
    #[arg(long, default_value_t = 0)]
    good_s: u64,
    /// Most memory that the dispatcher may take, in MiB
    #[arg(long, default_value_t = 200)]
    limit_mib: u64,
}

pub(super) async fn run(cli: &Cli, args: &Args) -> Result<bool, BenchError> {
    let patience = Duration::from_secs(cli.patience);
    let mut rig = Rig::start(cli).await?;
    // Nobody listens there yet.
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()?));
    owe(&rig, args, address).await?;
    let dispatcher = rig.dispatcher()?;
    let group = Group::single("dispatcher", dispatcher.pid().unwrap_or_default());

    let dead_for = Duration::from_secs(args.dead_s);
    let mut watch = Watch::new("down", group, dead_for.as_millis() as u64);
    while watch.began.elapsed() < dead_for {
        tokio::time::sleep(LOOK).await;
        watch.look(watch.began.elapsed().as_millis() as u64, 0);
    }
    let down = watch.most_kib;
    if down == 0 {
        return Err(dispatcher.not_ready("it ended".to_owned()));
    }

    let ledger = Ledger::listen(address).await?;
    let good_for = if args.good_s > 0 { Duration::from_secs(args.good_s) } else { Duration::MAX };
    let mut watch = watch.next("up", args.deliveries);
    let mut arrived = 0;
    while arrived < args.deliveries && watch.began.elapsed() < good_for {
        // A breaker may leave its target alone for a minute.
        if ledger.last_at().unwrap_or(watch.began).elapsed() > patience.max(Duration::from_secs(120)) {
            break;
        }
        tokio::time::sleep(LOOK).await;
        arrived = ledger.distinct();
        watch.look(arrived, arrived);
    }
    let took = watch.began.elapsed();
    let settled = Instant::now();
    let mut books = rig.books().await?;
    let all = arrived == args.deliveries;
    while all && books.0 > 0 && settled.elapsed() < patience {
        tokio::time::sleep(LOOK).await;
        books = rig.books().await?;
    }
    drop(dispatcher);
    let (up, faults, doubles) = (watch.most_kib, ledger.faults(), ledger.doubles());
    println!("owed                       {:>10}", args.deliveries);
    println!(
        "arrived                    {arrived:>10}   in {:.0} s, copies beyond the first {doubles}",
        took.as_secs_f64()
    );
    println!("memory at most, down       {down:>10} KiB");
    println!("memory at most, up         {up:>10} KiB");
    println!("SQL: delivered {}, pending {}, other {}", books.1, books.0, books.2);
    let sound = (all || args.good_s > 0)
        && books.0 + books.1 == args.deliveries
        && (faults.altered, faults.unsigned) == (0, 0)
        && down.max(up) <= args.limit_mib * 1024;
    println!("{}", if sound { "sound" } else { "NOT SOUND" });
    Ok(sound)
}

async fn owe(rig: &Rig, args: &Args, address: SocketAddr) -> Result<(), BenchError> {
    let (began, mut owed) = (Instant::now(), 0);
    while owed < args.deliveries {
        let until = args.deliveries.min(owed + CHUNK);
        let rows = (owed..until).map(|n| {
            let url = format!("http://{address}/hook/{}", n % args.targets.max(1));
            delivery(Uuid::now_v7(), 1, true, &url, n)
        });
        rig.owe(rows.collect(), false).await?;
        owed = until;
    }
    eprintln!("{owed} deliveries are owed after {:.0} s", began.elapsed().as_secs_f64());
    Ok(())
}

/// Looks at a process's memory, and prints a line now and then.
struct Watch {
    what: &'static str,
    group: Group,
    began: Instant,
    /// A line each time that so much more has passed.
    step: u64,
    next: u64,
    most_kib: u64,
}

impl Watch {
    fn new(what: &'static str, group: Group, whole: u64) -> Self {
        Self { what, group, began: Instant::now(), step: (whole / LINES).max(1), next: 0, most_kib: 0 }
    }

    fn next(self, what: &'static str, whole: u64) -> Self {
        Self::new(what, self.group, whole)
    }

    fn look(&mut self, passed: u64, arrived: u64) {
        let kib = self.group.memory().resident_bytes / 1024;
        self.most_kib = self.most_kib.max(kib);
        if passed >= self.next {
            self.next = passed + self.step;
            let s = self.began.elapsed().as_secs_f64();
            println!("{:<5} {s:>7.1} s   arrived {arrived:>10}   memory {kib:>10} KiB", self.what);
        }
    }
}
