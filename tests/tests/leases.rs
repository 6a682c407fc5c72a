//! Leases of partitions that lapse though nobody died: a dispatcher that gets no CPU, a stall that all of them share, a
//! laptop that sleeps. Real processes that are stopped (SIGSTOP) and go on (SIGCONT), and a receiver that counts copies.
//!
//! At least once: what was on its way to a receiver when its dispatcher lost the lease comes again. Everything else must
//! not, and each copy must be told of by its sender ("lease lapsed with N tries in flight").

use ringback_test_support::books::assert_books_balance;
use ringback_test_support::client::Client;
use ringback_test_support::receiver::{Hit, Mode};
use ringback_test_support::stack::{Backend, Options, Role, Stack};
use ringback_test_support::wait::{always, until};
use ringback_tests::{LATER, both_webhooks};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;

const LEASE: Duration = Duration::from_secs(3);
/// The dispatcher that is stopped, and the one that takes over.
const STOPPED: &str = "dispatcher";
const OTHER: &str = "second";

fn options(backend: Backend) -> Options {
    Options::new(backend).with("webhooks", "partition_lease_ms", &LEASE.as_millis().to_string()).with(
        "webhooks",
        "deadline_ms",
        "30000",
    )
}

/// A stack with one dispatcher, which has a fault point armed.
async fn with_fault(backend: Backend, fault: Option<&str>) -> Option<Stack> {
    let mut stack = Stack::prepare(options(backend)).await?;
    stack.migrate();
    for role in Role::APART {
        stack.spawn(role, role.word(), fault.filter(|_| role == Role::Dispatcher));
    }
    for role in Role::APART {
        stack.wait_ready(role.word()).await;
    }
    Some(stack)
}

/// Stops a process while it holds no lock of the database, so that others can go on.
async fn stop(stack: &mut Stack, name: &str) {
    for _ in 0..50 {
        stack.process(name).signal(Signal::STOP);
        let statement = "UPDATE partition_leases SET epoch = epoch";
        if stack.sql().await.gets_through(statement, Duration::from_secs(2)).await {
            return;
        }
        go_on(stack, name);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{name} always holds a lock");
}

fn go_on(stack: &mut Stack, name: &str) {
    stack.process(name).signal(Signal::CONT);
}

/// A counter of a process; 0 before its first count.
async fn counted(ops: &Client, name: &str) -> u64 {
    let text = ops.get("/metrics").await.text;
    let lines = text.lines().filter(|line| line.split([' ', '{']).next() == Some(name));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64
}

async fn in_doubt(stack: &Stack, name: &str) -> u64 {
    counted(&stack.ops(name), "ringback_delivery_tries_in_doubt_total").await
}

async fn submit(stack: &Stack, path: &str) -> String {
    let body = json!({"input": {"n": 1}, "webhook": stack.receiver.url(path)});
    stack.api.submit_surely("echo", &Uuid::now_v7().to_string(), &body, LATER).await
}

async fn recorded(stack: &Stack, id: &str) {
    until("the delivery to be recorded", LATER, || async {
        let all = stack.api.deliveries(id).await;
        (!all.is_empty() && all.iter().all(|d| d["state"] == "delivered")).then_some(())
    })
    .await;
}

fn same(hits: &[Hit]) {
    assert!(hits.iter().all(|hit| (&hit.webhook_id, &hit.body) == (&hits[0].webhook_id, &hits[0].body)));
}

/// The stopped dispatcher goes on and finds its partitions taken. Answers how many tries it says were in flight.
async fn finds_out(stack: &mut Stack) -> u64 {
    go_on(stack, STOPPED);
    until("the stopped one to find out", LATER, || async {
        let lost = counted(&stack.ops(STOPPED), "ringback_partitions_lost_total").await;
        // All eight: the other one could not know which of them had work.
        (lost == 8).then_some(())
    })
    .await;
    let log = stack.log(STOPPED);
    let told = in_doubt(stack, STOPPED).await;
    assert_eq!(log.contains("lease lapsed with 1 tries in flight"), told == 1, "{told}");
    told
}

/// Where the stop hits a try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// It was decided on, and its POST has not begun.
    Before,
    /// The receiver has it and has not answered.
    InFlight,
    /// It was answered, and that is not written down.
    Unrecorded,
}

async fn taken_over(backend: Backend, moment: Moment) {
    let folder = ringback_test_support::files::Folder::new("leases");
    let go: PathBuf = folder.path().join("go");
    let hit: PathBuf = folder.path().join("go.hit");
    let point = match moment {
        Moment::Before => Some("dispatcher.post.before"),
        Moment::InFlight => None,
        Moment::Unrecorded => Some("dispatcher.record.before"),
    };
    let fault = point.map(|point| format!("{point}@1:pause={}", go.display()));
    let Some(mut stack) = with_fault(backend, fault.as_deref()).await else { return };
    if moment == Moment::InFlight {
        stack.receiver.answer("/hook", Mode::Hang);
    }
    let id = submit(&stack, "/hook").await;
    until("the try to come to its moment", LATER, || async {
        let there = if point.is_some() { exists(&hit) } else { stack.receiver.count() == 1 };
        there.then_some(())
    })
    .await;
    stop(&mut stack, STOPPED).await;
    stack.receiver.answer("/hook", Mode::Ok);
    stack.start_as(Role::Dispatcher, OTHER).await;
    recorded(&stack, &id).await;
    until("all to be taken over", LATER, || async { (taken(&stack, OTHER).await == 8).then_some(()) }).await;
    std::fs::write(&go, b"").expect("write");
    let told = finds_out(&mut stack).await;
    let copies = if moment == Moment::Before { 1 } else { 2 };
    always("nothing more is sent", Duration::from_secs(1), || async { stack.receiver.count() == copies })
        .await;
    let hits = stack.receiver.hits_of(&id);
    assert_eq!(hits.len(), copies, "{moment:?}");
    same(&hits);
    match moment {
        // Whether it had come back to its partition is a matter of moments; it was sent by one of them only.
        Moment::Before => assert!(told <= 1),
        Moment::InFlight | Moment::Unrecorded => assert_eq!(told, 1, "each copy is told of"),
    }
}

fn exists(path: &Path) -> bool {
    path.exists()
}

/// So many jobs are in flight when the stop comes.
const FLYING: usize = 16;

/// A stop that is shorter than the lease costs nothing.
async fn short_stop(backend: Backend) {
    let Some(mut stack) = with_fault(backend, None).await else { return };
    stack.start_as(Role::Dispatcher, OTHER).await;
    stack.receiver.answer("/slow", Mode::Slow(Duration::from_millis(500)));
    for _ in 0..FLYING {
        submit(&stack, "/slow").await;
    }
    until("some to fly", LATER, || async { (stack.receiver.count() > 0).then_some(()) }).await;
    stack.process(STOPPED).signal(Signal::STOP);
    tokio::time::sleep(LEASE / 6).await;
    go_on(&mut stack, STOPPED);
    each_once_but_for_what_is_told(&stack, FLYING).await;
}

async fn each_once_but_for_what_is_told(stack: &Stack, jobs: usize) {
    until("all to be recorded", LATER, || async {
        let sql = stack.sql().await;
        let done = sql.count("SELECT COUNT(*) FROM deliveries WHERE state = 1").await;
        (done == i64::try_from(jobs).expect("small")).then_some(())
    })
    .await;
    // Whoever lost a lease says so when it looks again. A machine that starves everybody for longer than a deadline makes
    // tries fail in their own right: these are in the log of attempts.
    until("each copy to be explained", LATER, || async {
        let told = in_doubt(stack, STOPPED).await + in_doubt(stack, OTHER).await;
        let retried = "SELECT CAST(COALESCE(SUM(attempts - 1), 0) AS BIGINT) FROM deliveries";
        let retried = stack.sql().await.count(retried).await.unsigned_abs();
        let copies = (stack.receiver.count() - jobs) as u64;
        (copies <= told + retried).then_some(())
    })
    .await;
}

/// A stall that all dispatchers share, as of the database or of the host: each of them finds its own partitions again, and
/// nobody takes another one for dead.
async fn shared_stall(backend: Backend) {
    let Some(mut stack) = with_fault(backend, None).await else { return };
    stack.start_as(Role::Dispatcher, OTHER).await;
    let held = "SELECT COUNT(*) FROM partition_leases WHERE partition >= 0 AND owner <> '' \
                GROUP BY owner ORDER BY 1 LIMIT 1";
    until("a fair share", LATER, || async {
        let sql = stack.sql().await;
        (sql.count("SELECT COUNT(DISTINCT owner) FROM partition_leases WHERE partition >= 0").await == 2
            && sql.count(held).await == 4)
            .then_some(())
    })
    .await;
    let (mut jobs, mut quiet) = (0, false);
    // On a starved machine one of them may really be late: once of several times it is not.
    for round in 0..5 {
        let before = [taken(&stack, STOPPED).await, taken(&stack, OTHER).await];
        stack.receiver.answer("/slow", Mode::Slow(Duration::from_secs(1)));
        for _ in 0..FLYING {
            submit(&stack, "/slow").await;
        }
        jobs += FLYING;
        until("some to fly", LATER, || async { (stack.receiver.count() > jobs - FLYING).then_some(()) })
            .await;
        // The one goes on first, then the other one.
        let order = if round % 2 == 0 { [STOPPED, OTHER] } else { [OTHER, STOPPED] };
        for name in order {
            stack.process(name).signal(Signal::STOP);
        }
        tokio::time::sleep(LEASE * 2).await;
        for name in order {
            go_on(&mut stack, name);
        }
        each_once_but_for_what_is_told(&stack, jobs).await;
        quiet |= before == [taken(&stack, STOPPED).await, taken(&stack, OTHER).await];
        if quiet && round > 0 {
            break;
        }
    }
    assert!(quiet, "they always took each other for dead");
}

async fn taken(stack: &Stack, name: &str) -> u64 {
    counted(&stack.ops(name), "ringback_partitions_taken_over_total").await
}

/// How long the laptop sleeps.
const SLEEP: Duration = Duration::from_secs(10);

/// `ringback dev` stands still under load, as on a laptop that is closed, and goes on.
async fn a_laptop_sleeps(backend: Backend) {
    let Some(mut stack) = Stack::dev(options(backend)).await else { return };
    stack.receiver.answer("/every", Mode::Slow(Duration::from_millis(20)));
    let api = stack.api.clone();
    let bodies: Vec<Value> = (0..150)
        .map(|n| {
            let wait_s = f64::from(n % 5) / 10.0;
            both_webhooks(&stack, &json!({"seconds": wait_s}))
        })
        .collect();
    let load = tokio::spawn(async move {
        let mut accepted = Vec::new();
        for (n, body) in bodies.into_iter().enumerate() {
            let endpoint = if n % 2 == 0 { "echo" } else { "sleep" };
            let id = api.submit_surely(endpoint, &format!("laptop-{n}"), &body, LATER).await;
            accepted.push(ringback_test_support::books::Accepted {
                id,
                endpoint: endpoint.to_owned(),
                webhook: true,
                webhookv2: true,
            });
        }
        accepted
    });
    until("work under way", LATER, || async { (stack.receiver.count() > 60).then_some(()) }).await;
    stack.process("dev").signal(Signal::STOP);
    // What it has sent by now comes in, and is answered.
    tokio::time::sleep(SLEEP).await;
    let woken = std::time::Instant::now();
    go_on(&mut stack, "dev");
    let accepted = load.await.expect("the load ends");
    assert_books_balance(&stack, &accepted, LATER).await;
    let mut copies: BTreeMap<String, Vec<Hit>> = BTreeMap::new();
    for hit in stack.receiver.hits() {
        copies.entry(hit.webhook_id.clone()).or_default().push(hit);
    }
    let mut last: BTreeMap<(String, String), u64> = BTreeMap::new();
    let mut first: Vec<&Hit> = copies.values().map(|hits| &hits[0]).collect();
    first.sort_by_key(|hit| hit.at);
    for hit in first {
        let before = last.insert((hit.path.clone(), hit.job().to_owned()), hit.sequence);
        assert!(before < Some(hit.sequence), "{} came out of order", hit.webhook_id);
    }
    for (id, hits) in &copies {
        same(hits);
        // A copy of what was on its way: its first came in before the laptop woke up, at most one more after it.
        let asleep = hits[0].at < woken && hits[0].at + SLEEP + Duration::from_secs(5) > woken;
        assert!(hits.len() == 1 || (hits.len() == 2 && asleep), "{id} came {} times", hits.len());
    }
    let told = in_doubt(&stack, "dev").await;
    assert_eq!(told, 0, "nobody else could take anything");
}

macro_rules! rows {
    ($backend:ident, $value:expr) => {
        mod $backend {
            use super::Moment;
            #[tokio::test(flavor = "multi_thread")]
            async fn what_had_not_begun_is_not_sent_after_a_take_over() {
                super::taken_over($value, Moment::Before).await;
            }
            #[tokio::test(flavor = "multi_thread")]
            async fn what_was_in_flight_comes_twice_and_is_told_of() {
                super::taken_over($value, Moment::InFlight).await;
            }
            #[tokio::test(flavor = "multi_thread")]
            async fn what_was_not_written_down_comes_twice_and_is_told_of() {
                super::taken_over($value, Moment::Unrecorded).await;
            }
            #[tokio::test(flavor = "multi_thread")]
            async fn a_stop_shorter_than_the_lease_costs_nothing() {
                super::short_stop($value).await;
            }
            #[tokio::test(flavor = "multi_thread")]
            async fn after_a_stall_of_all_each_finds_its_own_again() {
                super::shared_stall($value).await;
            }
            #[tokio::test(flavor = "multi_thread")]
            async fn a_laptop_that_sleeps_loses_nothing() {
                super::a_laptop_sleeps($value).await;
            }
        }
    };
}

rows!(sqlite, super::Backend::Sqlite);
rows!(postgres, super::Backend::Postgres);
