//! The crash table: `kill -9` of each service before and after each commit, publish, ack and POST on the way of a
//! job (DESIGN 3; the named points of the product). Real processes, both databases.
//!
//! Each row: the service is started with the point armed, jobs go in, the service dies at the point (if it does not,
//! the row fails), it is started again, and then the books must balance: every accepted job has one end, every owed
//! webhook arrived with one id and one body, and nothing else did.

use ringback_test_support::books::{Accepted, assert_books_balance};
use ringback_test_support::receiver::Hit;
use ringback_test_support::stack::{Backend, Options, Role, Stack};
use ringback_test_support::wait::until;
use ringback_tests::{LATER, SOON, assert_only, submit, submit_behind};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;

fn options(backend: Backend) -> Options {
    let mut options = Options::new(backend);
    options.endpoint("expiring", r#"{ builtin = "echo" }"#, "ttl_ms = 1000");
    options
}

/// Who may mend what the crash left behind.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mended {
    /// Everybody, the reconciler included.
    ByAll,
    /// The service itself: a live row always has a message or a spool record (DESIGN 3.4).
    WithoutReconciler,
}

/// Short jobs and one that is long enough to be reported as started.
async fn dies_and_recovers(points: &[&str], mended: Mended, backend: Backend) {
    let Some(mut stack) = Stack::apart(options(backend)).await else { return };
    if mended == Mended::WithoutReconciler {
        stack.terminate("reconciler");
    }
    let mut all = Vec::new();
    for point in points {
        println!("--- {point}");
        let role = Role::of_fault(point);
        stack.terminate(role.word());
        stack.spawn_over(role, role.word(), Some(&format!("{point}@1")));
        let mut jobs = vec![("echo", json!({ "point": point })); 4];
        jobs.push(("sleep", json!({ "seconds": 0.8 })));
        let submits = submit_behind(&stack, point, &jobs);
        stack.wait_dead(role.word(), SOON).await;
        assert_heard_only_what_is_committed(&stack, point).await;
        stack.start_again(role.word()).await;
        let accepted = submits.await.expect("the submits");
        for job in assert_books_balance(&stack, &accepted, LATER).await {
            assert_eq!(job["status"], "COMPLETED", "{point}: {job}");
            assert_eq!(job["run"], 1, "{point}: {job}");
        }
        all.extend(accepted);
    }
    balance_once_more(&stack, &all).await;
}

/// While the service is dead: every webhook that came is a delivery in SQL (P4). What it said too early could not be
/// told from the truth later, when the same transition is committed after all.
async fn assert_heard_only_what_is_committed(stack: &Stack, point: &str) {
    // A window to look, not a wait for something: whatever was said before the death is heard within it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let hits = stack.receiver.hits();
    let sql = stack.sql().await;
    for job in hits.iter().map(Hit::job).collect::<BTreeSet<_>>() {
        let highest = hits.iter().filter(|hit| hit.job() == job).map(|hit| hit.sequence).max().unwrap_or(0);
        let id = job.replace('-', "");
        let blob = match stack.backend() {
            Backend::Sqlite => format!("X'{id}'"),
            Backend::Postgres => format!("decode('{id}', 'hex')"),
        };
        let rows =
            sql.count(&format!("SELECT COUNT(*) FROM jobs WHERE id = {blob} AND seq >= {highest}")).await;
        assert_eq!(rows, 1, "{point}: transition {highest} of {job} was told and is not in SQL");
    }
}

/// What came late for the jobs of an earlier row counts as well.
async fn balance_once_more(stack: &Stack, all: &[Accepted]) {
    assert_books_balance(stack, all, LATER).await;
    assert_only(stack, all).await;
}

async fn api(backend: Backend) {
    dies_and_recovers(
        &[
            "api.commit.before",
            "api.commit.during",
            "api.commit.after",
            "api.publish.before",
            "api.publish.after",
        ],
        Mended::ByAll,
        backend,
    )
    .await;
}

/// P1: while the transaction of a submit has not committed, nobody is told that it was accepted.
async fn unanswered(backend: Backend) {
    let Some(mut stack) = Stack::apart(options(backend)).await else { return };
    stack.terminate("api");
    let held = stack.folder().join("held");
    stack.spawn_over(Role::Api, "api", Some(&format!("api.commit.during@1:pause={}", held.display())));
    stack.wait_ready("api").await;
    let api = stack.api.clone();
    let submit = tokio::spawn(async move {
        api.try_call(http::Method::POST, "/v2/echo/run", Some(&json!({ "input": 1 }))).await
    });
    until("the transaction to be held", SOON, || async { held.with_extension("hit").exists().then_some(()) })
        .await;
    // A window for an answer that comes too early; what is not committed in time is answered with 503.
    tokio::time::sleep(Duration::from_millis(500)).await;
    stack.kill9("api");
    let told = submit.await.expect("the submit").map_or(0, |reply| reply.status);
    assert_ne!(told, 200, "accepted before the commit");
    stack.start_again("api").await;
    assert_eq!(stack.sql().await.count("SELECT COUNT(*) FROM jobs").await, 0);
}

async fn worker(backend: Backend) {
    dies_and_recovers(
        &[
            "worker.fetch.after",
            "worker.started.before",
            "worker.started.after",
            "worker.run.after",
            "worker.spool.after",
            "worker.outcome.before",
            "worker.outcome.after",
            "worker.ack.before",
            "worker.ack.after",
        ],
        Mended::WithoutReconciler,
        backend,
    )
    .await;
}

/// Large outputs go to the blob store before their outcome goes to the tracker.
async fn blobs(backend: Backend) {
    let mut options = options(backend);
    options.endpoint("brief", r#"{ builtin = "echo" }"#, "[endpoints.retention]\ncompleted_ms = 1000");
    options.set("reconciler", "retention_interval_ms", "500");
    let Some(mut stack) = Stack::apart(options).await else { return };
    let large = json!({ "large": "x".repeat(400_000) });
    let mut all = Vec::new();
    for point in ["worker.blob.before", "worker.blob.after"] {
        println!("--- {point}");
        stack.terminate("worker");
        stack.spawn_over(Role::Worker, "worker", Some(&format!("{point}@1")));
        let submits = submit_behind(&stack, point, &vec![("echo", large.clone()); 2]);
        stack.wait_dead("worker", SOON).await;
        stack.start_again("worker").await;
        let accepted = submits.await.expect("the submits");
        assert_ended(&stack, &accepted, "COMPLETED", point).await;
        for job in &accepted {
            let told = stack.api.status("echo", &job.id).await.expect(200);
            assert!(told["output"] == large, "{point}: the output is not whole");
        }
        all.extend(accepted);
    }
    let sql = stack.sql().await;
    for point in ["api.blob.before", "api.blob.after", "api.commit.before", "api.commit.after"] {
        println!("--- {point}");
        stack.terminate("api");
        stack.spawn_over(Role::Api, "api", Some(&format!("{point}@1")));
        let submits = submit_behind(&stack, point, &[("echo", large.clone())]);
        stack.wait_dead("api", SOON).await;
        stack.start_again("api").await;
        let accepted = submits.await.expect("the submit");
        assert_ended(&stack, &accepted, "COMPLETED", point).await;
        all.extend(accepted);
        // An input whose job was never inserted is known, and goes; one whose job was is kept. The repeated submit
        // after the commit stored a second one in vain, and deleted it as soon as it knew.
        assert_eq!(sql.count("SELECT COUNT(*) FROM blob_trash").await, 1, "{point}");
        let orphans = usize::from(matches!(point, "api.blob.after" | "api.commit.before"));
        assert_eq!(blobs_of(&stack, "in"), all.len() + orphans, "{point}");
        sql.execute("UPDATE blob_trash SET added_at_ms = 1").await;
        until("the trash to be emptied", SOON, || async {
            (sql.count("SELECT COUNT(*) FROM blob_trash").await == 0).then_some(())
        })
        .await;
        assert_eq!(blobs_of(&stack, "in"), all.len(), "{point}");
    }
    balance_once_more(&stack, &all).await;
    let (inputs, outputs) = (blobs_of(&stack, "in"), blobs_of(&stack, "out"));
    for point in ["reconciler.blobs.before", "reconciler.blobs.after"] {
        println!("--- {point}");
        stack.terminate("reconciler");
        let submits = submit_behind(&stack, point, &[("brief", large.clone())]);
        let accepted = submits.await.expect("the submit");
        stack.api.wait_end("brief", &accepted[0].id, SOON).await;
        stack.api.wait_settled(&accepted[0].id, LATER).await;
        reconciler_dies_and_returns(&mut stack, point).await;
        assert_eq!(
            sql.count("SELECT COUNT(*) FROM blob_trash").await,
            2,
            "{point}: input and output are noted"
        );
        // Whoever removed the job is surely gone a minute later.
        sql.execute("UPDATE blob_trash SET added_at_ms = 1").await;
        until("the trash to be emptied", SOON, || async {
            (sql.count("SELECT COUNT(*) FROM blob_trash").await == 0).then_some(())
        })
        .await;
        assert_eq!((blobs_of(&stack, "in"), blobs_of(&stack, "out")), (inputs, outputs), "{point}");
    }
}

/// Jobs with something below a folder of the blob store.
fn blobs_of(stack: &Stack, kind: &str) -> usize {
    let entries = std::fs::read_dir(stack.folder().join("blobs").join(kind)).into_iter().flatten().flatten();
    entries
        .filter(|entry| {
            entry.path().is_file() || entry.path().read_dir().is_ok_and(|mut d| d.next().is_some())
        })
        .count()
}

async fn tracker(backend: Backend) {
    dies_and_recovers(
        &[
            "tracker.commit.before",
            "tracker.commit.after",
            "tracker.announce.before",
            "tracker.announce.after",
            "tracker.reply.before",
        ],
        Mended::ByAll,
        backend,
    )
    .await;
}

async fn dispatcher(backend: Backend) {
    dies_and_recovers(
        &[
            "dispatcher.post.before",
            "dispatcher.post.after",
            "dispatcher.record.before",
            "dispatcher.record.after",
        ],
        Mended::ByAll,
        backend,
    )
    .await;
}

/// Starts the reconciler with a point armed, waits until it has died there, and starts it again without.
async fn reconciler_dies_and_returns(stack: &mut Stack, point: &str) {
    stack.spawn_over(Role::Reconciler, "reconciler", Some(&format!("{point}@1")));
    stack.wait_dead("reconciler", SOON).await;
    stack.start_again("reconciler").await;
}

async fn assert_ended(stack: &Stack, accepted: &[Accepted], status: &str, point: &str) -> Vec<Value> {
    let jobs = assert_books_balance(stack, accepted, LATER).await;
    for job in &jobs {
        assert_eq!(job["status"], status, "{point}: {job}");
    }
    jobs
}

/// The reconciler has something to do only when something was lost or a limit has passed.
async fn reconciler(backend: Backend) {
    let Some(mut stack) = Stack::apart(options(backend)).await else { return };
    let mut all = Vec::new();
    for point in ["reconciler.republish.before", "reconciler.republish.after"] {
        println!("--- {point}");
        stack.terminate("worker");
        stack.terminate("reconciler");
        let jobs = vec![("echo", json!({ "point": point })); 4];
        let accepted = submit_behind(&stack, point, &jobs).await.expect("the submits");
        stack.nats.stop();
        stack.nats.delete_store();
        stack.nats.start_again().await;
        reconciler_dies_and_returns(&mut stack, point).await;
        stack.start_again("worker").await;
        let jobs = assert_ended(&stack, &accepted, "COMPLETED", point).await;
        // The first message may have been worked off: whoever takes another one asks, and gets the next attempt.
        assert!(jobs.iter().any(|job| job["attempt"] == 2), "{point}: no attempt was granted: {jobs:?}");
        all.extend(accepted);
    }
    for point in ["reconciler.command.before", "reconciler.command.after"] {
        // A lease that nobody renews.
        println!("--- {point}: lease");
        let job = submit(&stack, "sleep", &format!("{point}-lease"), &json!({"seconds": 1})).await;
        stack.api.wait_status("sleep", &job.id, "IN_PROGRESS", SOON).await;
        stack.kill9("worker");
        stack.terminate("reconciler");
        reconciler_dies_and_returns(&mut stack, point).await;
        // A job that nobody takes within its time to live.
        println!("--- {point}: time to live");
        stack.terminate("reconciler");
        let late = submit(&stack, "expiring", &format!("{point}-ttl"), &json!({})).await;
        reconciler_dies_and_returns(&mut stack, point).await;
        assert_ended(&stack, std::slice::from_ref(&late), "TIMED_OUT", point).await;
        stack.start_again("worker").await;
        let again = assert_ended(&stack, std::slice::from_ref(&job), "COMPLETED", point).await;
        assert_eq!(again[0]["attempt"], 2, "{point}: {}", again[0]);
        all.extend([job, late]);
    }
    balance_once_more(&stack, &all).await;
}

macro_rules! rows {
    ($backend:ident: $($role:ident),*) => {
        mod $backend {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $role() {
                    super::$role(backend()).await;
                }
            )*
            fn backend() -> Backend {
                if stringify!($backend) == "sqlite" { Backend::Sqlite } else { Backend::Postgres }
            }
        }
    };
}

rows!(sqlite: api, unanswered, worker, blobs, tracker, dispatcher, reconciler);
rows!(postgres: api, unanswered, worker, blobs, tracker, dispatcher, reconciler);
