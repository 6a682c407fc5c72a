//! Several runs of one job against each other, and long absences of broker and database.

use ringback_test_support::books::{Accepted, assert_books_balance};
use ringback_test_support::receiver::Mode;
use ringback_test_support::stack::{Backend, Options, Role, Stack};
use ringback_test_support::wait::until;
use ringback_tests::{LATER, Load, SOON, assert_only, submit};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use tokio::net::TcpStream;

/// Four lease periods of the test configuration.
const SEVERAL_LEASES: Duration = Duration::from_secs(6);

fn options(backend: Backend) -> Options {
    let mut options = Options::new(backend);
    // The first loss of a worker ends the job: then an explicit retry is possible while the old attempt lives on.
    options.endpoint("once", r#"{ builtin = "sleep" }"#, "slots = 4\nmax_attempts = 1");
    options
}

async fn retry(stack: &Stack, job: &Accepted) {
    let reply = stack.api.post(&format!("/v1/jobs/{}/retry", job.id), &json!({})).await;
    assert_eq!(reply.status, 200, "retry: {}", reply.text);
    assert_eq!(reply.json["run"], 2, "{}", reply.text);
}

fn assert_second_run_counts(job: &Value) {
    assert_eq!(job["status"], "COMPLETED", "{job}");
    assert_eq!(job["run"], 2, "{job}");
}

async fn retry_while_the_old_attempt_still_works(backend: Backend) {
    let Some(mut stack) = Stack::apart(options(backend)).await else { return };
    let job = submit(&stack, "once", "frozen", &json!({"seconds": 8})).await;
    stack.api.wait_status("once", &job.id, "IN_PROGRESS", SOON).await;
    // A frozen worker looks dead and is not.
    stack.process("worker").signal(Signal::STOP);
    stack.api.wait_status("once", &job.id, "FAILED", SOON).await;
    retry(&stack, &job).await;
    stack.process("worker").signal(Signal::CONT);
    let accepted = [job];
    let jobs = assert_books_balance(&stack, &accepted, LATER).await;
    assert_second_run_counts(&jobs[0]);
    assert_only(&stack, &accepted).await;
}

async fn cancel_and_retry_while_the_old_attempt_still_works(backend: Backend) {
    let Some(mut stack) = Stack::apart(options(backend)).await else { return };
    let job = submit(&stack, "once", "cancelled", &json!({"seconds": 8})).await;
    stack.api.wait_status("once", &job.id, "IN_PROGRESS", SOON).await;
    // The worker does not hear of the cancel before the retry is there.
    stack.process("worker").signal(Signal::STOP);
    let reply = stack.api.post(&format!("/v1/jobs/{}/cancel", job.id), &json!({})).await.expect(200);
    assert_eq!(reply["status"], "CANCELLED");
    retry(&stack, &job).await;
    stack.process("worker").signal(Signal::CONT);
    let jobs = assert_books_balance(&stack, &[job], LATER).await;
    assert_second_run_counts(&jobs[0]);
    let statuses: Vec<&str> = jobs[0]["history"]
        .as_array()
        .expect("history")
        .iter()
        .filter_map(|entry| entry["status"].as_str())
        .collect();
    assert_eq!(statuses[..3], ["IN_QUEUE", "IN_PROGRESS", "CANCELLED"], "{statuses:?}");
}

fn holds_a_file(folder: &Path) -> bool {
    std::fs::read_dir(folder).into_iter().flatten().flatten().any(|entry| {
        let path = entry.path();
        if path.is_dir() { holds_a_file(&path) } else { entry.metadata().is_ok_and(|meta| meta.len() > 0) }
    })
}

async fn a_spooled_outcome_arrives_after_a_retry(backend: Backend) {
    let Some(mut stack) = Stack::apart(options(backend)).await else { return };
    let job = submit(&stack, "once", "spooled", &json!({"seconds": 2})).await;
    stack.api.wait_status("once", &job.id, "IN_PROGRESS", SOON).await;
    stack.kill9("tracker");
    let spool = stack.data_dir("worker").join("spool");
    until("the outcome to be spooled", SOON, || async { holds_a_file(&spool).then_some(()) }).await;
    stack.kill9("worker");
    stack.start_again("tracker").await;
    stack.api.wait_status("once", &job.id, "FAILED", SOON).await;
    retry(&stack, &job).await;
    // The worker comes back with the success of run 1 in its spool. Run 1 has ended; it changes nothing (P3).
    stack.start_again("worker").await;
    let jobs = assert_books_balance(&stack, &[job], LATER).await;
    assert_second_run_counts(&jobs[0]);
}

/// Jobs in progress, each with the attempt that runs: the second one where the first message had to be sent again
/// because its stream did not exist yet.
async fn running_jobs(stack: &Stack, seconds: u32) -> Vec<(Accepted, Value)> {
    let mut jobs = Vec::new();
    for n in 0..3 {
        let job = submit(stack, "sleep", &format!("long-{n}"), &json!({ "seconds": seconds })).await;
        stack.api.wait_status("sleep", &job.id, "IN_PROGRESS", SOON).await;
        let attempt = stack.api.job(&job.id).await["attempt"].take();
        jobs.push((job, attempt));
    }
    jobs
}

/// No job that ran through the outage was taken for lost: the same attempt, and no way back to the queue.
async fn assert_undisturbed(stack: &Stack, running: &[(Accepted, Value)]) {
    let accepted: Vec<Accepted> = running.iter().map(|(job, _)| job.clone()).collect();
    for (job, (_, attempt)) in assert_books_balance(stack, &accepted, LATER).await.iter().zip(running) {
        assert_eq!(job["status"], "COMPLETED", "{job}");
        assert_eq!(job["attempt"], *attempt, "a running job was taken for lost: {job}");
        assert_eq!(job["history"].as_array().map(Vec::len), Some(3), "{job}");
    }
}

async fn the_broker_is_away_for_several_leases(backend: Backend) {
    let Some(mut stack) = Stack::apart(options(backend)).await else { return };
    let jobs = running_jobs(&stack, 10).await;
    stack.nats.kill9();
    tokio::time::sleep(SEVERAL_LEASES).await;
    stack.nats.start_again().await;
    assert_undisturbed(&stack, &jobs).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_away_for_several_leases() {
    let Some(mut stack) = Stack::apart(options(Backend::Postgres)).await else { return };
    let jobs = running_jobs(&stack, 10).await;
    let postgres = stack.postgres.as_mut().expect("PostgreSQL");
    postgres.crash();
    tokio::time::sleep(SEVERAL_LEASES).await;
    postgres.start_again().await;
    assert_undisturbed(&stack, &jobs).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_is_locked_for_several_leases() {
    let Some(stack) = Stack::apart(options(Backend::Sqlite)).await else { return };
    let jobs = running_jobs(&stack, 10).await;
    let sql = stack.sql().await;
    sql.execute("BEGIN IMMEDIATE").await;
    tokio::time::sleep(SEVERAL_LEASES).await;
    sql.execute("ROLLBACK").await;
    assert_undisturbed(&stack, &jobs).await;
}

async fn assert_all_completed(stack: &Stack, accepted: &[Accepted]) {
    for job in assert_books_balance(stack, accepted, LATER).await {
        assert_eq!(job["status"], "COMPLETED", "{job}");
    }
    assert_only(stack, accepted).await;
}

async fn nats_is_stopped_for_ten_seconds_under_load(backend: Backend) {
    let Some(mut stack) = Stack::apart(options(backend)).await else { return };
    let load = Load::start(&stack, "stopped", 20);
    load.wait_for_more(20).await;
    stack.nats.stop();
    tokio::time::sleep(Duration::from_secs(10)).await;
    stack.nats.start_again().await;
    load.wait_for_more(20).await;
    assert_all_completed(&stack, &load.stop().await).await;
}

/// P6: the whole store of the broker goes, with messages in it and jobs on their way.
async fn the_nats_store_is_deleted_under_load(backend: Backend) {
    let Some(mut stack) = Stack::apart(options(backend)).await else { return };
    let load = Load::start(&stack, "deleted", 20);
    let long = submit(&stack, "sleep", "across", &json!({"seconds": 6})).await;
    load.wait_for_more(20).await;
    // Without a worker for a moment, so that messages wait in the store when it goes.
    stack.kill9("worker");
    load.wait_for_more(20).await;
    stack.nats.kill9();
    stack.nats.delete_store();
    stack.nats.start_again().await;
    stack.start_again("worker").await;
    load.wait_for_more(20).await;
    let mut accepted = load.stop().await;
    accepted.push(long);
    assert_all_completed(&stack, &accepted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_restarted_under_load() {
    let Some(mut stack) = Stack::apart(options(Backend::Postgres)).await else { return };
    let load = Load::start(&stack, "restarted", 20);
    for crash in [false, true] {
        load.wait_for_more(20).await;
        let postgres = stack.postgres.as_mut().expect("PostgreSQL");
        if crash {
            postgres.crash();
        } else {
            postgres.stop();
        }
        postgres.start_again().await;
    }
    load.wait_for_more(20).await;
    assert_all_completed(&stack, &load.stop().await).await;
}

/// The primary dies, and its synchronous standby takes over behind the same address. As a service may, the address
/// leads to the standby before that is promoted: for a while it can be read and refuses every write.
#[tokio::test(flavor = "multi_thread")]
async fn postgres_fails_over_to_its_standby_under_load() {
    let mut options = options(Backend::Postgres);
    options.forwarded = true;
    let Some(mut stack) = Stack::apart(options).await else { return };
    let primary = stack.postgres.as_ref().expect("PostgreSQL");
    let old_port = primary.port();
    let standby = primary.synchronous_standby().await;
    let new_port = standby.port();
    // Each commit waits for two disks.
    let load = Load::start(&stack, "failover", 5);
    let long = submit(&stack, "sleep", "across", &json!({"seconds": 6})).await;
    // A webhook that waits for its second try while the primary dies.
    stack.receiver.answer("/again", Mode::FailFirst { times: 1, status: 500 });
    let body = json!({"input": {"again": true}, "webhook": stack.receiver.url("/again")});
    let id = stack.api.submit_surely("echo", "again", &body, LATER).await;
    let again = Accepted { id, endpoint: "echo".to_owned(), webhook: true, webhookv2: false };
    until("a first try", LATER, || async { stack.receiver.hits_of(&again.id).pop() }).await;
    until("a long job to start", LATER, || async {
        (stack.api.status("sleep", &long.id).await.field("status") != "IN_QUEUE").then_some(())
    })
    .await;
    load.wait_for_more(10).await;

    let mut primary = stack.postgres.replace(standby).expect("PostgreSQL");
    primary.kill9();
    // With its data: it never comes back as a second writer.
    drop(primary);
    stack.forwarder.as_ref().expect("a forwarder").turn_to(new_port);
    tokio::time::sleep(SEVERAL_LEASES / 2).await;
    stack.postgres.as_ref().expect("PostgreSQL").promote().await;

    load.wait_for_more(10).await;
    let mut accepted = load.stop().await;
    accepted.extend([long, again.clone()]);
    assert_all_completed(&stack, &accepted).await;
    assert_eq!(stack.receiver.hits_of(&again.id).len(), 2, "one refused try and one accepted");
    assert!(TcpStream::connect(("127.0.0.1", old_port)).await.is_err(), "the old primary is back");
    for role in Role::APART {
        assert!(stack.is_running(role.word()), "{} ended", role.word());
    }
}

/// Two of each at once, and one of each dies: partitions, leases and batches of outcomes pass to the other.
async fn two_of_each_and_one_dies_under_load(backend: Backend) {
    let Some(mut stack) = Stack::apart(options(backend)).await else { return };
    let roles = [Role::Tracker, Role::Dispatcher, Role::Worker, Role::Reconciler];
    for role in roles {
        stack.start_as(role, &format!("{}-2", role.word())).await;
    }
    let load = Load::start(&stack, "twice", 20);
    for role in roles {
        load.wait_for_more(10).await;
        stack.kill9(role.word());
    }
    load.wait_for_more(20).await;
    assert_all_completed(&stack, &load.stop().await).await;
}

ringback_tests::on_both!(
    retry_while_the_old_attempt_still_works,
    cancel_and_retry_while_the_old_attempt_still_works,
    a_spooled_outcome_arrives_after_a_retry,
    the_broker_is_away_for_several_leases,
    nats_is_stopped_for_ten_seconds_under_load,
    the_nats_store_is_deleted_under_load,
    two_of_each_and_one_dies_under_load,
);
