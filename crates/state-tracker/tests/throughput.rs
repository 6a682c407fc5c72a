//! How many outcomes a second the tracker takes. Prints figures, asserts none: run it with
//! `cargo test --release -p ringback-state-tracker --test throughput -- --ignored --nocapture`.
#![allow(clippy::unwrap_used, reason = "a failed step of a test is its report")]

#[macro_use]
#[allow(unused_macros)]
mod rig;

use std::time::{Duration, Instant};

use rig::*;
use ringback_domain::target::Target;
use ringback_store::submit::Submit;

/// CPU time of this process so far: user and system, from proc(5) `stat`, in ticks of 10 ms.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after_name: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = after_name[11].parse::<u64>().unwrap() + after_name[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn outcomes_per_second() {
    const JOBS: usize = 30_000;
    const BATCH: usize = 60;
    const SENDERS: usize = 6;
    let Some((nats, _folder)) = broker().await else { return };
    let mut rig = Rig::sqlite(&nats, 30_000).await;
    rig.tracker().await;
    let targets = Target::of_submit(Some(HOOK), None, false);
    let mut ids = Vec::with_capacity(JOBS);
    for _ in 0..JOBS / 500 {
        let part = (0..500).map(|_| Submit { targets: targets.clone(), ..new_job() }).collect();
        ids.extend(rig.submit(part).await);
    }
    let (began, used) = (Instant::now(), cpu());
    let rig = &rig;
    let senders = (0..SENDERS).map(|n| {
        let mine: Vec<_> = ids.iter().skip(n).step_by(SENDERS).copied().collect();
        async move {
            for part in mine.chunks(BATCH) {
                let told = part.iter().map(|id| success(*id, first(), "{\"echo\": \"hello\"}")).collect();
                rig.outcomes("w1", told).await;
            }
        }
    });
    futures::future::join_all(senders).await;
    let (took, used) = (began.elapsed(), cpu() - used);
    println!(
        "{JOBS} outcomes in {took:.2?}: {:.0}/s, {:.0} µs of CPU each (whole process, its senders too)",
        JOBS as f64 / took.as_secs_f64(),
        used.as_secs_f64() * 1e6 / JOBS as f64
    );
    rig.books_balance().await;
}
