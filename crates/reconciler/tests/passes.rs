//! Every pass against a real broker, a real database and a real tracker: what it finds, what it repairs, what it
//! leaves alone, and that a second run finds nothing.
#![allow(clippy::unwrap_used, reason = "a failed step of a test is its report")]

#[path = "../../state-tracker/tests/rig/mod.rs"]
#[macro_use]
mod rig;

use std::time::Duration;

use prost::Message as _;
use rig::*;
use ringback_bus::{ConsumerSettings, GapTracker, JobSubject, Lane, Publication, Seen};
use ringback_contracts::v1;
use ringback_domain::{AttemptRef, EndpointId, JobId, JobStatus, Nonce, TimestampMs};
use ringback_reconciler::{App, Handles};
use ringback_service_runtime::{
    Readiness, Shutdown,
    blobs::{BlobKey, BlobStore},
    config::BlobsConfig,
    time,
};
use ringback_store::{
    StoreError, Urgency,
    blob_reservations::reserve_blobs,
    retention::purge_jobs,
    sea_orm::Value,
    secrets::SecretKey,
    sql,
    submit::{InputAt, Submit, insert_submits},
};
use ringback_test_support::{
    files::Folder,
    wait::{until, until_true},
};
use v1::grant_reply::Answer;

const SOON: Duration = Duration::from_secs(10);

scenarios! {
    lost_messages_are_found_and_replaced_by_ones_that_ask: 30_000,
    a_lost_stream_is_rebuilt_from_sql: 30_000,
    the_stream_of_another_database_is_made_anew: 30_000,
    due_jobs_are_judged_by_an_observer_that_saw_their_lease: 3_000,
    batches_come_to_their_end: 30_000,
    a_reserved_blob_goes_unless_a_row_names_it: 30_000,
    retention_takes_what_nobody_needs_and_keeps_the_books: 30_000,
    events_go_by_their_own_time: 30_000,
    broken_books_are_found_and_named: 30_000,
    deliveries_that_nobody_sends_are_an_alarm: 30_000,
    what_belongs_to_nobody_is_swept: 30_000,
    two_reconcilers_repair_everything_by_themselves: 30_000,
}

struct Bench {
    app: App,
    blobs: BlobStore,
    _folder: Folder,
}

async fn reconciler(rig: &mut Rig) -> Bench {
    rig.config.reconciler.republish_after_ms = 20_000;
    let folder = Folder::new("reconciler");
    let blobs = BlobStore::open(&BlobsConfig::default(), folder.path()).unwrap();
    let handles = Handles {
        store: rig.store.clone(),
        bus: rig.bus.clone(),
        blobs: blobs.clone(),
        secret_key: SecretKey::from_bytes(&[7; 32]),
        public_url: "https://ringback.example".to_owned(),
        readiness: Readiness::new(),
    };
    Bench { app: App::build(&rig.config, handles), blobs, _folder: folder }
}

fn subject(job: JobId, publish: u32) -> JobSubject {
    JobSubject { shard: 1, endpoint: ENDPOINT, lane: Lane::Hi, job, run: 1, publish }
}

async fn publish(rig: &Rig, job: JobId) {
    let publication = Publication { subject: subject(job, 0), payload: "x".into(), traceparent: None };
    assert!(rig.bus.job_publisher().publish(publication).await.is_stored());
}

/// Makes the jobs submitted so far old enough to be missed.
async fn age(rig: &Rig) {
    rig.execute("UPDATE jobs SET queued_at_ms = queued_at_ms - 60000").await;
}

async fn stored(rig: &Rig, job: JobId, publish: u32) -> bool {
    // A stream that is being made anew holds nothing.
    rig.bus.has_job(&subject(job, publish)).await.unwrap_or(false)
}

async fn write(rig: &Rig, text: &'static str, job: JobId, number: i64) {
    rig.store
        .write(Urgency::Now, move |tx| {
            Box::pin(async move {
                sql::execute(tx.conn(), text, [sql::id(job.as_bytes()), number.into()]).await.map(drop)
            })
        })
        .await
        .unwrap();
}

async fn lost_messages_are_found_and_replaced_by_ones_that_ask(rig: &mut Rig) {
    rig.tracker().await;
    let bench = reconciler(rig).await;
    let ids = rig.submit((0..6).map(|_| new_job()).collect()).await;
    for id in &ids[..4] {
        publish(rig, *id).await;
    }
    // Accepted this moment: its message may be on its way.
    age(rig).await;
    let young = rig.job().await;
    let report = bench.app.streams().await.unwrap();
    assert_eq!((report.missing, report.republished, report.compared), (2, 2, 1), "{report:?}");
    for id in &ids[4..] {
        until_true("a new message", SOON, || stored(rig, *id, 1)).await;
        assert_eq!(rig.row(*id).await.job.publish, 1);
        assert!(matches!(rig.grant("w1", *id, 1, 1).await, Answer::Run(_)));
    }
    assert!(!stored(rig, young, 0).await && !stored(rig, young, 1).await);
    publish(rig, young).await;
    age(rig).await;
    let report = bench.app.streams().await.unwrap();
    assert_eq!((report.missing, report.compared, report.probed), (0, 0, 5), "{report:?}");

    // One that vanishes later is found without a comparison.
    assert!(rig.bus.delete_job(&subject(ids[2], 0)).await.unwrap());
    let report = bench.app.streams().await.unwrap();
    assert_eq!((report.missing, report.republished, report.compared), (1, 1, 0), "{report:?}");
    until_true("a new message", SOON, || stored(rig, ids[2], 1)).await;
}

async fn a_lost_stream_is_rebuilt_from_sql(rig: &mut Rig) {
    rig.tracker().await;
    let bench = reconciler(rig).await;
    let ids = rig.submit((0..40).map(|_| new_job()).collect()).await;
    for id in &ids {
        publish(rig, *id).await;
    }
    rig.beat("w1", &[(ids[0], first())]).await;
    rig.outcome("w1", success(ids[1], first(), "1")).await;
    age(rig).await;
    let report = bench.app.streams().await.unwrap();
    assert_eq!((report.missing, report.remade), (0, 0), "{report:?}");

    assert!(rig.bus.delete_stream(1).await.unwrap());
    let report = bench.app.streams().await.unwrap();
    assert_eq!((report.remade, report.missing, report.republished), (1, 38, 38), "{report:?}");
    for id in &ids[2..] {
        until_true("a new message", SOON, || stored(rig, *id, 1)).await;
    }
    assert_eq!(
        rig.bus.stream_state(1).await.unwrap().unwrap().messages,
        38,
        "ended and running jobs get none"
    );
    let report = bench.app.streams().await.unwrap();
    assert_eq!((report.remade, report.missing), (0, 0), "{report:?}");
}

async fn the_stream_of_another_database_is_made_anew(rig: &mut Rig) {
    rig.tracker().await;
    let bench = reconciler(rig).await;
    let job = rig.job().await;
    rig.bus.delete_stream(1).await.unwrap();
    rig.bus.ensure_stream(1, "another").await.unwrap();
    publish(rig, job).await;
    let stranger = JobId::from_parts(1, [9; 10]);
    publish(rig, stranger).await;
    age(rig).await;
    let report = bench.app.streams().await.unwrap();
    assert_eq!((report.remade, report.republished), (1, 1), "{report:?}");
    until_true("a new message", SOON, || stored(rig, job, 1)).await;
    assert!(!stored(rig, stranger, 0).await, "messages of another history are gone");
    let state = rig.bus.stream_state(1).await.unwrap().unwrap();
    assert_eq!(state.db_epoch, rig.store.facts().db_epoch);
}

async fn due_jobs_are_judged_by_an_observer_that_saw_their_lease(rig: &mut Rig) {
    rig.tracker().await;
    let expiring = Submit { ttl_ms: Some(1), ..new_job() };
    let ids = rig.submit(vec![expiring, new_job(), new_job()]).await;
    let attempt = first();
    rig.beat("w1", &[(ids[1], attempt)]).await;
    let running = rig.row(ids[1]).await.job.state.live().unwrap().lease_until;
    until_true("the lease to run out", SOON, || async { rig.store.now_ms().await.unwrap() > running.0 })
        .await;
    // This observer has just begun.
    let bench = reconciler(rig).await;
    let report = bench.app.due().await.unwrap();
    assert_eq!((report.due, report.not_judged, report.changed), (2, 1, 1), "{report:?}");
    assert_eq!(rig.status(ids[0]).await, JobStatus::TimedOut);
    assert_eq!(rig.status(ids[1]).await, JobStatus::InProgress);
    until("the lease to be judged", SOON, || async {
        (bench.app.due().await.unwrap().changed == 1).then_some(())
    })
    .await;
    assert_eq!(rig.status(ids[1]).await, JobStatus::InQueue);
    assert_eq!(rig.status(ids[2]).await, JobStatus::InQueue);
    assert_eq!(bench.app.due().await.unwrap().due, 0);
    rig.books_balance().await;
}

async fn batches_come_to_their_end(rig: &mut Rig) {
    rig.tracker().await;
    let bench = reconciler(rig).await;
    // Never opened: its maker is gone.
    let (forgotten, _) = rig.batch(3, false).await;
    rig.execute("UPDATE batches SET opened_at_ms = NULL, next_check_at_ms = 1").await;
    // A marker that nobody works off, and counts that are wrong.
    let (marked, to_cancel) = rig.batch(3, false).await;
    let (wrong, ended) = rig.batch(2, false).await;
    for job in &ended {
        rig.outcome("w1", success(*job, first(), "1")).await;
    }
    assert_eq!(rig.number("SELECT COUNT(*) FROM batches WHERE status = 1").await, 1);
    rig.execute(
        "UPDATE batches SET completed = 1, status = 0, ended_at_ms = NULL, seq = 0, owed = 0 WHERE status = 1",
    )
    .await;
    rig.execute("DELETE FROM deliveries WHERE event >= 100").await;
    write(
        rig,
        "UPDATE batches SET cancel_marker = 1, next_check_at_ms = $2 WHERE id = $1",
        as_job(marked),
        1,
    )
    .await;
    write(rig, "UPDATE batches SET opened_at_ms = $2 WHERE id = $1", as_job(wrong), 1).await;
    let report = bench.app.batches().await.unwrap();
    assert_eq!(
        (report.forgotten, report.cancelled, report.jobs_cancelled, report.recounted),
        (1, 1, 3, 1),
        "{report:?}"
    );
    assert_eq!(rig.number("SELECT COUNT(*) FROM batches").await, 2);
    assert_eq!(rig.number("SELECT COUNT(*) FROM jobs").await, 5);
    for job in to_cancel {
        assert_eq!(rig.status(job).await, JobStatus::Cancelled);
    }
    assert_eq!(rig.number("SELECT COUNT(*) FROM batches WHERE status = 2 AND cancelled = 3").await, 1);
    assert_eq!(rig.number("SELECT COUNT(*) FROM batches WHERE status = 1 AND completed = 2").await, 1);
    assert_eq!(rig.number("SELECT COUNT(*) FROM deliveries WHERE event >= 100").await, 2);
    assert_ne!(forgotten, marked);
    let again = bench.app.batches().await.unwrap();
    assert_eq!((again.forgotten, again.cancelled, again.recounted), (0, 0, 0), "{again:?}");
    rig.books_balance().await;
    let counts = ringback_store::endpoint_counts(rig.store.read(), ENDPOINT).await.unwrap();
    assert_eq!((counts.queued, counts.running), (0, 0), "removed jobs are not counted as queued");
}

/// A batch's id as the 16 bytes of a key.
fn as_job(batch: ringback_domain::BatchId) -> JobId {
    JobId::from_slice(batch.as_bytes()).unwrap()
}

async fn events_go_by_their_own_time(rig: &mut Rig) {
    let bench = reconciler(rig).await;
    let month: i64 = 30 * 86_400_000;
    // A warning of a quota (300) and a progress (7), a day and more ago; an older warning is not delivered yet.
    let old = time::now_ms() - 2 * 86_400_000;
    for (n, (kind, at, state)) in
        [(300, old, 1), (7, old, 1), (300, old - month, 1), (300, old - month, 0)].into_iter().enumerate()
    {
        let id = JobId::from_parts(at.unsigned_abs(), [u8::try_from(n).unwrap(); 10]);
        rig.store
            .write(Urgency::Now, move |tx| {
                Box::pin(async move {
                    let row = |text: &'static str, values: Vec<Value>| sql::execute(tx.conn(), text, values);
                    row(
                        "INSERT INTO events (id, project_id, type, subject, created_at_ms, owed) \
                         VALUES ($1, 1, $2, '', $3, 1)",
                        vec![sql::id(id.as_bytes()), Value::from(i64::from(kind)), Value::from(at)],
                    )
                    .await?;
                    row(
                        "INSERT INTO deliveries (owner_id, seq, target, partition, project_id, event, terminal, url, \
                         body, state, attempts, created_at_ms, ended_at_ms) \
                         VALUES ($1, 1, 65537, 0, 1, $2, 1, '', $1, $3, 1, $4, $4)",
                        vec![
                            sql::id(id.as_bytes()),
                            Value::from(i64::from(kind)),
                            Value::from(i64::from(state)),
                            Value::from(at),
                        ],
                    )
                    .await
                })
            })
            .await
            .unwrap();
    }
    let report = bench.app.retention().await.unwrap();
    assert_eq!((report.events, report.deliveries), (2, 2), "the old warning and the progress: {report:?}");
    assert_eq!(rig.number("SELECT COUNT(*) FROM events").await, 2);
    assert_eq!(rig.number("SELECT COUNT(*) FROM deliveries WHERE state = 0").await, 1);
    rig.books_balance().await;

    // Webhooks that are gone keep their rows for a month; nobody has to make another one for them to go.
    for (name, column, at) in [
        ("'deleted'", "deleted_at_ms", old - month),
        ("'expired'", "expires_at_ms", old - month),
        ("'lately'", "deleted_at_ms", old),
        ("'alive'", "expires_at_ms", i64::MAX),
    ] {
        let text = format!(
            "INSERT INTO webhooks (public_id, project_id, label, format, filter, strict_order, paused, enable_epoch, \
             created_at_ms, updated_at_ms, {column}) VALUES ({name}, 1, '', 0, '{{}}', 0, 0, 1, 1, 1, {at})"
        );
        run(rig, text).await;
        let secret = "INSERT INTO webhook_secrets (webhook_id, secret_encrypted, created_at_ms) \
                      VALUES ((SELECT MAX(id) FROM webhooks), $1, 1)";
        run(rig, secret.to_owned()).await;
    }
    let revision = rig.store.registry().await.unwrap().revision();
    assert_eq!(bench.app.retention().await.unwrap().webhooks, 2);
    let left = "SELECT COUNT(*) FROM webhooks WHERE public_id IN ('lately', 'alive')";
    assert_eq!((rig.number(left).await, rig.number("SELECT COUNT(*) FROM webhooks").await), (2, 2));
    assert_eq!(rig.number("SELECT COUNT(*) FROM webhook_secrets").await, 2);
    assert!(rig.store.registry().await.unwrap().revision() > revision, "every process forgets them");
    assert_eq!(bench.app.retention().await.unwrap().webhooks, 0);
}

/// Runs a statement; `$1` in it stands for a few bytes.
async fn run(rig: &Rig, text: String) {
    let values = if text.contains("$1") { vec![Value::from(vec![1_u8])] } else { Vec::new() };
    rig.store
        .write(Urgency::Now, move |tx| {
            let (text, values) = (text.clone(), values.clone());
            Box::pin(async move { sql::execute(tx.conn(), &text, values).await.map(drop) })
        })
        .await
        .unwrap();
}

async fn reserve(rig: &Rig, key: &BlobKey) {
    let keys = vec![key.as_str().to_owned()];
    rig.store
        .write(Urgency::Now, move |tx| {
            let keys = keys.clone();
            Box::pin(async move { reserve_blobs(tx, &keys).await })
        })
        .await
        .unwrap();
}

/// Who dies between storing an input and inserting its job leaves a reservation, and the sweep deletes the blob; who
/// dies later leaves a job with its input.
async fn a_reserved_blob_goes_unless_a_row_names_it(rig: &mut Rig) {
    let bench = reconciler(rig).await;
    let key = |n: u8| BlobKey::new(format!("in/0193a5b0c1d27e3f8a4b5c6d7e8f9a{n:02}")).unwrap();
    for n in [1, 2, 3] {
        reserve(rig, &key(n)).await;
        bench.blobs.put(&key(n), "\"large\"".into()).await.unwrap();
    }
    let with = |n: u8| Submit {
        input: InputAt::Blob { key: key(n).as_str().to_owned(), size_bytes: 7 },
        ..new_job()
    };
    rig.submit(vec![with(1)]).await;
    assert_eq!(bench.app.retention().await.unwrap().blobs_left, 0, "the others may still get their rows");
    rig.execute("UPDATE blob_trash SET added_at_ms = 1").await;
    // The sweep may be at it: the row comes too late, and nothing of it stands.
    let (counter, partitions) = (rig.store.counter_row(), rig.store.facts().partitions);
    for late in [with(2), with(4)] {
        let refused = rig
            .store
            .write(Urgency::Now, move |tx| {
                let late = late.clone();
                Box::pin(async move { insert_submits(tx, counter, partitions, &[&late]).await.map(drop) })
            })
            .await;
        assert!(matches!(refused, Err(StoreError::Permanent { .. })), "{refused:?}");
    }
    assert_eq!(rig.number("SELECT COUNT(*) FROM jobs").await, 1);
    assert_eq!(bench.app.retention().await.unwrap().blobs_left, 2);
    assert!(bench.blobs.size(&key(1)).await.is_ok(), "a job needs it");
    for n in [2, 3] {
        assert!(bench.blobs.size(&key(n)).await.is_err(), "nobody names it");
    }
    assert_eq!(rig.number("SELECT COUNT(*) FROM blob_trash").await, 0);
}

async fn retention_takes_what_nobody_needs_and_keeps_the_books(rig: &mut Rig) {
    rig.tracker().await;
    let bench = reconciler(rig).await;
    let key = BlobKey::new("in/0193a5b0c1d27e3f8a4b5c6d7e8f9a0b").unwrap();
    reserve(rig, &key).await;
    bench.blobs.put(&key, "\"large\"".into()).await.unwrap();
    let large = InputAt::Blob { key: key.as_str().to_owned(), size_bytes: 7 };
    let gone_at_once = || Submit { retain_completed_ms: 0, retain_failed_ms: 0, ..new_job() };
    let ids = rig
        .submit(vec![
            Submit { input: large, ..gone_at_once() },
            gone_at_once(),
            gone_at_once(),
            gone_at_once(),
            new_job(),
        ])
        .await;
    for id in &ids {
        rig.outcome("w1", failure(*id, first(), "no")).await;
    }
    let nothing = bench.app.retention().await.unwrap();
    assert_eq!((nothing.jobs, nothing.postponed), (0, 4), "pending deliveries hold their jobs: {nothing:?}");
    rig.execute("UPDATE jobs SET next_check_at_ms = 1 WHERE retain_failed_ms = 0").await;
    rig.execute("UPDATE deliveries SET state = 1").await;
    write(
        rig,
        "UPDATE deliveries SET state = 2, ended_at_ms = $2 WHERE owner_id = $1",
        ids[1],
        time::now_ms(),
    )
    .await;
    // Retried meanwhile: it lives.
    assert!(matches!(rig.retry(ids[2], true).await, v1::command_reply::Reply::Job(_)));
    let report = bench.app.retention().await.unwrap();
    // The input, and for each job that failed whatever an attempt may have stored in vain.
    assert_eq!((report.jobs, report.postponed, report.blobs), (2, 1, 5), "{report:?}");
    assert_eq!(report.deliveries, 8);
    assert!(bench.blobs.size(&key).await.is_err(), "its blob is gone");
    for table in ["jobs", "job_inputs", "results"] {
        assert_eq!(rig.number(&format!("SELECT COUNT(*) FROM {table}")).await, 3, "{table}");
    }
    assert_eq!(rig.number("SELECT owed FROM purged_totals").await, 8);
    assert_eq!(rig.number("SELECT deliveries FROM purged_totals").await, 8);
    assert_eq!(bench.app.retention().await.unwrap().jobs, 0);
    rig.books_balance().await;

    // A dead delivery is kept for a month, not for ever.
    write(rig, "UPDATE deliveries SET ended_at_ms = $2 WHERE owner_id = $1", ids[1], 1).await;
    write(rig, "UPDATE jobs SET next_check_at_ms = $2 WHERE id = $1", ids[1], 1).await;
    assert_eq!(bench.app.retention().await.unwrap().jobs, 1);

    // The process died after the commit: the trash remembers, and so it does what a lost attempt had stored.
    let lost = BlobKey::new(format!("out/{}/1-1-00000000000000aa", ids[2].simple())).unwrap();
    bench.blobs.put(&lost, "\"lost\"".into()).await.unwrap();
    rig.execute("UPDATE jobs SET state = 5, last_attempt = 2, next_check_at_ms = 1 WHERE run = 2").await;
    let retried = ids[2];
    rig.execute("UPDATE deliveries SET state = 1 WHERE state = 0").await;
    let purged = rig
        .store
        .write(Urgency::Now, move |tx| Box::pin(async move { purge_jobs(tx, &[retried]).await }))
        .await
        .unwrap();
    assert_eq!(purged.jobs, 1);
    assert_eq!(bench.app.retention().await.unwrap().blobs_left, 0, "whoever removed the job may be at it");
    assert!(bench.blobs.size(&lost).await.is_ok());
    rig.execute("UPDATE blob_trash SET added_at_ms = 1").await;
    assert_eq!(bench.app.retention().await.unwrap().blobs_left, 2, "its outputs and its logs");
    assert!(bench.blobs.size(&lost).await.is_err());
    assert_eq!(rig.number("SELECT COUNT(*) FROM blob_trash").await, 0);

    // A batch goes after its jobs, and its jobs not before it has ended.
    let (_, jobs) = rig.batch(2, false).await;
    rig.outcome("w1", success(jobs[0], first(), "1")).await;
    rig.execute("UPDATE deliveries SET state = 1").await;
    rig.execute("UPDATE jobs SET next_check_at_ms = 1 WHERE state = 2").await;
    assert_eq!(bench.app.retention().await.unwrap().jobs, 0, "the batch still runs");
    rig.outcome("w1", success(jobs[1], first(), "1")).await;
    rig.execute("UPDATE deliveries SET state = 1").await;
    rig.execute("UPDATE deliveries SET state = 0 WHERE owner_id IN (SELECT id FROM batches)").await;
    rig.execute("UPDATE jobs SET next_check_at_ms = 1 WHERE state = 2").await;
    let report = bench.app.retention().await.unwrap();
    assert_eq!((report.jobs, report.postponed), (0, 2), "a body that waits has a link to them: {report:?}");
    rig.execute("UPDATE deliveries SET state = 1 WHERE owner_id IN (SELECT id FROM batches)").await;
    rig.execute("UPDATE jobs SET next_check_at_ms = 1 WHERE state = 2").await;
    rig.execute("UPDATE batches SET next_check_at_ms = 1").await;
    let report = bench.app.retention().await.unwrap();
    assert_eq!((report.jobs, report.batches), (2, 1), "{report:?}");
    rig.books_balance().await;
}

async fn broken_books_are_found_and_named(rig: &mut Rig) {
    rig.tracker().await;
    let bench = reconciler(rig).await;
    let ids = rig.submit((0..5).map(|_| new_job()).collect()).await;
    for id in &ids {
        rig.outcome("w1", success(*id, first(), "1")).await;
    }
    let newest = time::now_ms();
    until_true("the window to close", SOON, || async { time::now_ms() > newest + 2_100 }).await;
    let whole = bench.app.identity().await.unwrap();
    assert!(whole.complete && whole.offenders.is_empty(), "{whole:?}");
    assert_eq!((whole.owed, whole.deliveries), (20, 20));
    write(rig, "DELETE FROM deliveries WHERE owner_id = $1 AND seq = $2", ids[1], 2).await;
    write(rig, "UPDATE deliveries SET owner_id = $1 WHERE seq = 1 AND target = $2 AND owner_id = (SELECT owner_id FROM deliveries GROUP BY owner_id HAVING COUNT(*) = 4 ORDER BY owner_id LIMIT 1)", JobId::from_parts(newest.unsigned_abs(), [0; 10]), 1).await;
    let broken = bench.app.identity().await.unwrap();
    let named: Vec<_> = broken.offenders.iter().map(|(_, owed, n)| (*owed, *n)).collect();
    assert!(named.contains(&(Some(4), 3)) && named.contains(&(None, 1)), "{broken:?}");
    assert!(broken.offenders.iter().any(|(id, _, _)| id.as_bytes() == ids[1].as_bytes()));
}

async fn deliveries_that_nobody_sends_are_an_alarm(rig: &mut Rig) {
    rig.tracker().await;
    let bench = reconciler(rig).await;
    let id = rig.job().await;
    assert_eq!(bench.app.deliveries().await.unwrap().unowned, 0, "not due for long enough");
    rig.execute("UPDATE deliveries SET next_attempt_at_ms = next_attempt_at_ms - 20000").await;
    let report = bench.app.deliveries().await.unwrap();
    assert_eq!((report.unowned, report.reminded), (1, 0), "{report:?}");
    assert!(report.oldest_due_ms >= 20_000);
    // An owner that missed it is made to read again.
    let partition = id.partition(4);
    let mut heard = rig.bus.subscribe_deliveries(partition).await.unwrap();
    rig.bus.flush().await.unwrap();
    let lease = time::now_ms() + 60_000;
    rig.store
        .write(Urgency::Now, move |tx| {
            Box::pin(async move {
                let text = "INSERT INTO partition_leases (partition, owner, epoch, expires_at_ms) VALUES ($1, 'd', 1, $2)";
                sql::execute(tx.conn(), text, [i64::from(partition).into(), lease.into()]).await.map(drop)
            })
        })
        .await
        .unwrap();
    let report = bench.app.deliveries().await.unwrap();
    assert_eq!((report.unowned, report.reminded), (0, 1), "{report:?}");
    let poke = v1::DeliveryEvents::decode(heard.next().await.unwrap().payload).unwrap();
    assert_eq!(GapTracker::new().observe(poke.publisher, poke.counter), Seen::Gap);
}

async fn what_belongs_to_nobody_is_swept(rig: &mut Rig) {
    rig.tracker().await;
    let bench = reconciler(rig).await;
    let settings = ConsumerSettings { ack_wait: Duration::from_secs(30) };
    for endpoint in [ENDPOINT, EndpointId(9)] {
        rig.bus.ensure_consumer(1, endpoint, Lane::Hi, settings).await.unwrap();
    }
    rig.bus.ensure_stream(5, "x").await.unwrap();
    let report = bench.app.orphans().await.unwrap();
    assert_eq!((report.consumers, report.streams), (1, 1), "{report:?}");
    assert_eq!(rig.bus.list_consumers(1).await.unwrap(), [(ENDPOINT, Lane::Hi)]);

    for n in 1..=10 {
        let delta = ringback_store::CounterDelta { completed: n, ..Default::default() };
        rig.store
            .write(Urgency::Now, move |tx| {
                Box::pin(async move {
                    let all = std::collections::BTreeMap::from([(ENDPOINT, delta)]);
                    ringback_store::add_counters(tx, 1_000 + n, &all).await
                })
            })
            .await
            .unwrap();
    }
    assert_eq!(bench.app.counters().await.unwrap().folded, 10);
    let counts = ringback_store::endpoint_counts(rig.store.read(), ENDPOINT).await.unwrap();
    assert_eq!(counts.completed, 55);

    rig.heartbeat(beat_of("w1", &[])).await;
    rig.heartbeat(beat_of("w2", &[])).await;
    until_true("both workers", SOON, || async { rig.number("SELECT COUNT(*) FROM workers").await == 2 })
        .await;
    rig.execute("UPDATE workers SET last_beat_ms = 1 WHERE id = 'w1'").await;
    let report = bench.app.workers().await.unwrap();
    assert_eq!((report.living, report.forgotten), (1, 1));
}

/// Both run by their timers on a database in disorder, beside a working tracker.
async fn two_reconcilers_repair_everything_by_themselves(rig: &mut Rig) {
    rig.tracker().await;
    rig.config.reconciler.stream_interval_ms = 100;
    rig.config.reconciler.due_interval_ms = 100;
    rig.config.reconciler.batches_interval_ms = 100;
    let ids = rig.submit((0..30).map(|_| new_job()).collect()).await;
    let expiring = rig.submit(vec![Submit { ttl_ms: Some(1), ..new_job() }]).await;
    let (marked, in_batch) = rig.batch(4, false).await;
    write(
        rig,
        "UPDATE batches SET cancel_marker = 2, next_check_at_ms = $2 WHERE id = $1",
        as_job(marked),
        1,
    )
    .await;
    age(rig).await;
    let (one, two) = (reconciler(rig).await, reconciler(rig).await);
    let shutdown = Shutdown::new();
    let runs: Vec<_> = [one.app, two.app]
        .into_iter()
        .map(|app| {
            let shutdown = shutdown.clone();
            tokio::spawn(async move { app.run(shutdown).await.unwrap() })
        })
        .collect();
    for id in &ids {
        until_true("a message for each queued job", SOON, || stored(rig, *id, 1)).await;
    }
    until_true("the expired job to end", SOON, || async {
        rig.status(expiring[0]).await == JobStatus::TimedOut
    })
    .await;
    for id in &in_batch {
        until_true("the batch to be cancelled", SOON, || async {
            rig.status(*id).await == JobStatus::Cancelled
        })
        .await;
    }
    // The broker's data vanish while both run.
    assert!(rig.bus.delete_stream(1).await.unwrap());
    // A replica that looks before the new message is stored sends one more; whoever holds an older one asks and drops it.
    let rig = &*rig;
    for id in &ids {
        until_true("another message", SOON, || async move {
            let publish = rig.row(*id).await.job.publish;
            publish >= 2 && stored(rig, *id, publish).await
        })
        .await;
    }
    shutdown.trigger();
    for run in runs {
        run.await.unwrap();
    }
    for id in &ids {
        let job = rig.row(*id).await.job;
        assert_eq!(job.seq, 1, "nothing changed for those who wait for webhooks");
        assert!(matches!(rig.grant("w1", *id, 1, 1).await, Answer::Drop(_)));
        let Answer::Run(run) = rig.grant("w1", *id, 1, job.publish).await else { panic!("no grant") };
        let attempt = AttemptRef { run: 1, attempt: run.attempt, nonce: Nonce(run.nonce) };
        assert_eq!(rig.outcome("w1", success(*id, attempt, "1")).await, v1::Verdict::Committed);
    }
    assert!(rig.row(ids[0]).await.next_check_at(0) > Some(TimestampMs(0)));
    rig.books_balance().await;
}
