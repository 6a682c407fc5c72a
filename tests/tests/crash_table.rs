//! The crash table: `kill -9` of each service before and after each commit, publish, ack and POST on the way of a
//! job (DESIGN 3; the named points of the product). Real processes, both databases.
//!
//! Each row: the service is started with the point armed, jobs go in, the service dies at the point (if it does not,
//! the row fails), it is started again, and then the books must balance: every accepted job has one end, every owed
//! webhook arrived with one id and one body, and nothing else did.

use ringback_test_support::books::{Accepted, assert_books_balance};
use ringback_test_support::stack::{Backend, Options, Role, Stack};
use ringback_tests::{LATER, SOON, assert_only, submit, submit_behind};
use serde_json::json;

fn options(backend: Backend) -> Options {
    let mut options = Options::new(backend);
    options.endpoint("expiring", r#"{ builtin = "echo" }"#, "ttl_ms = 1000");
    options
}

/// Short jobs and one that is long enough to be reported as started.
async fn dies_and_recovers(points: &[&str], backend: Backend) {
    let Some(mut stack) = Stack::apart(options(backend)).await else { return };
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

/// What came late for the jobs of an earlier row counts as well.
async fn balance_once_more(stack: &Stack, all: &[Accepted]) {
    assert_books_balance(stack, all, LATER).await;
    assert_only(stack, all).await;
}

async fn api(backend: Backend) {
    dies_and_recovers(
        &["api.commit.before", "api.commit.after", "api.publish.before", "api.publish.after"],
        backend,
    )
    .await;
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
        backend,
    )
    .await;
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

async fn assert_ended(stack: &Stack, accepted: &[Accepted], status: &str, point: &str) {
    for job in assert_books_balance(stack, accepted, LATER).await {
        assert_eq!(job["status"], status, "{point}: {job}");
    }
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
        assert_ended(&stack, &accepted, "COMPLETED", point).await;
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
        assert_ended(&stack, std::slice::from_ref(&job), "COMPLETED", point).await;
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

rows!(sqlite: api, worker, tracker, dispatcher, reconciler);
rows!(postgres: api, worker, tracker, dispatcher, reconciler);
