//! What clients and the reconciler ask of the tracker: retries, cancellations, purges, batches.
#![allow(clippy::unwrap_used, reason = "a failed step of a test is its report")]

#[macro_use]
mod rig;

use std::time::Duration;

use prost::Message as _;
use rig::*;
use ringback_bus::Verb;
use ringback_contracts::{VERSION, endpoint_facts_of, v1};
use ringback_domain::{AttemptRef, EndpointId, JobId, JobStatus, ProjectId};
use ringback_store::{sql, submit::Submit};
use ringback_test_support::wait::until_true;
use v1::{Verdict, command_reply::Reply};

const SOON: Duration = Duration::from_secs(10);
const BATCH_DELIVERIES: &str = "SELECT COUNT(*) FROM deliveries WHERE event >= 100";

scenarios! {
    a_repeated_retry_starts_one_run: 30_000,
    a_worker_is_told_of_the_endpoints_that_it_names: 30_000,
    cancel_is_idempotent_and_stays_in_its_project: 30_000,
    a_purge_ends_queued_jobs_and_deletes_exactly_their_messages: 30_000,
    a_batch_ends_with_its_last_job_and_tells_once: 30_000,
    a_failure_cancels_the_rest_of_its_batch_and_nobody_else: 30_000,
}

/// The answer to a retry was lost, so the asker repeats it.
async fn a_repeated_retry_starts_one_run(rig: &mut Rig) {
    rig.tracker().await;
    let job = rig.job().await;
    assert_eq!(rig.outcome("w1", failure(job, first(), "no")).await, Verdict::Committed);
    for changed in [true, false] {
        let Reply::Job(reply) = rig.retry_after(job, 1, false).await else { panic!("refused") };
        assert_eq!((reply.run, reply.changed, reply.status), (2, changed, 0));
    }
    // Whoever does not say what was seen, or saw run 2, is refused: it has not ended.
    for expected_run in [0, 2] {
        let Reply::Refusal(refused) = rig.retry_after(job, expected_run, false).await else {
            panic!("retried")
        };
        assert_eq!(refused.why(), v1::refusal::Why::Conflict);
    }
    let second = AttemptRef { run: 2, ..first() };
    assert_eq!(rig.outcome("w1", success(job, second, "1")).await, Verdict::Committed);
    let Reply::Job(late) = rig.retry_after(job, 1, false).await else { panic!("refused") };
    assert_eq!((late.run, late.changed, late.status), (2, false, u32::from(JobStatus::Completed.code())));
    rig.books_balance().await;
}

async fn a_worker_is_told_of_the_endpoints_that_it_names(rig: &mut Rig) {
    rig.tracker().await;
    rig.execute("INSERT INTO projects (id, name, created_at_ms) VALUES (1, 'default', 0), (2, 'other', 0)")
        .await;
    rig.execute(
        "INSERT INTO endpoints (id, project_id, name, config, created_at_ms, updated_at_ms) \
         VALUES (8, 2, 'speech', '{}', 0, 0), (9, 1, 'video', '{\"slots\":2}', 0, 0)",
    )
    .await;
    let name = |project: &str, name: &str| v1::EndpointName { project: project.into(), name: name.into() };
    let endpoints = vec![name("default", "speech"), name("default", "video"), name("default", "later")];
    let request = v1::EndpointsRequest { version: VERSION, endpoints };
    let facts = endpoint_facts_of(&rig.ask::<v1::EndpointsReply>(Verb::Endpoints, &request).await).unwrap();
    let told: Vec<_> =
        facts.endpoints.iter().map(|e| (e.project.as_str(), e.name.as_str(), e.id.0)).collect();
    assert_eq!((facts.shards, told), (2, vec![("default", "speech", 7), ("default", "video", 9)]));
    assert_ne!(facts.endpoints[0].config_revision, facts.endpoints[1].config_revision);
}

async fn cancel_is_idempotent_and_stays_in_its_project(rig: &mut Rig) {
    rig.tracker().await;
    let job = rig.job().await;
    let attempt = first();
    rig.beat("w1", &[(job, attempt)]).await;
    for stranger in [(ProjectId(2), job), (PROJECT, JobId::from_parts(1, [1; 10]))] {
        let Reply::Refusal(refused) = rig.cancel(stranger.0, stranger.1).await else { panic!("cancelled") };
        assert_eq!(refused.why(), v1::refusal::Why::NotFound);
    }
    assert_eq!(rig.status(job).await, JobStatus::InProgress);
    let mut stops = rig.bus.subscribe_stop("w1").await.unwrap();
    rig.bus.flush().await.unwrap();
    for changed in [true, false] {
        let Reply::Job(reply) = rig.cancel(PROJECT, job).await else { panic!("refused") };
        assert_eq!((reply.changed, reply.status), (changed, u32::from(JobStatus::Cancelled.code())));
    }
    let order = v1::StopOrders::decode(stops.next().await.unwrap().payload).unwrap().stop.remove(0);
    assert_eq!(order.reason, "cancel_requested");
    // The order was lost: the answer to the next heartbeat repeats it.
    let stop = rig.beat("w1", &[(job, attempt)]).await;
    assert_eq!(stop[0].reason, "cancel_requested");
    assert_eq!(rig.outcome("w1", success(job, attempt, "1")).await, Verdict::Obsolete);
    assert_eq!(rig.status(job).await, JobStatus::Cancelled);
    rig.books_balance().await;
}

async fn publish(rig: &Rig, job: JobId, run: u32, publish: u32) {
    let publication = ringback_bus::Publication {
        subject: subject(job, run, publish),
        payload: "x".into(),
        traceparent: None,
    };
    assert!(rig.bus.job_publisher().publish(publication).await.is_stored());
}

async fn a_purge_ends_queued_jobs_and_deletes_exactly_their_messages(rig: &mut Rig) {
    rig.tracker().await;
    let elsewhere = Submit { endpoint: EndpointId(8), ..new_job() };
    let foreign = Submit { project: ProjectId(2), ..new_job() };
    let ids = rig.submit(vec![new_job(), new_job(), new_job(), elsewhere, foreign]).await;
    for id in &ids {
        publish(rig, *id, 1, 0).await;
    }
    rig.beat("w1", &[(ids[1], first())]).await;
    let purge =
        |limit| v1::command::Command::Purge(v1::PurgeQueue { project_id: 1, endpoint_id: ENDPOINT.0, limit });
    for (changed, more) in [(1, true), (1, true), (0, false)] {
        let Reply::Count(count) = rig.command(purge(1)).await else { panic!("refused") };
        assert_eq!((count.changed, count.more), (changed, more));
    }
    let states: Vec<JobStatus> = futures::future::join_all(ids.iter().map(|id| rig.status(*id))).await;
    use JobStatus::{Cancelled, InProgress, InQueue};
    assert_eq!(states, [Cancelled, InProgress, Cancelled, InQueue, InQueue]);
    until_true("the messages of purged jobs to go", SOON, || async {
        !rig.bus.has_job(&subject(ids[0], 1, 0)).await.unwrap()
            && !rig.bus.has_job(&subject(ids[2], 1, 0)).await.unwrap()
    })
    .await;
    for stays in [ids[1], ids[3], ids[4]] {
        assert!(rig.bus.has_job(&subject(stays, 1, 0)).await.unwrap());
    }
    rig.books_balance().await;
}

async fn batch_row(rig: &Rig) -> (i64, i64, i64, i64, i64) {
    let text = "SELECT status, completed, failed, cancelled, seq FROM batches";
    let row = sql::query_one(rig.store.read(), text, []).await.unwrap().unwrap();
    let n = |i| row.try_get_by_index::<i64>(i).unwrap();
    (n(0), n(1), n(2), n(3), n(4))
}

async fn a_batch_ends_with_its_last_job_and_tells_once(rig: &mut Rig) {
    rig.tracker().await;
    let (batch, jobs) = rig.batch(3, false).await;
    let refs: Vec<AttemptRef> = jobs.iter().map(|_| first()).collect();
    rig.outcomes("w1", vec![success(jobs[0], refs[0], "1"), failure(jobs[1], refs[1], "no")]).await;
    assert_eq!(batch_row(rig).await, (0, 1, 1, 0, 0));
    assert_eq!(rig.number(BATCH_DELIVERIES).await, 0);
    // A retried job was counted when its first run ended.
    assert!(matches!(rig.retry(jobs[1], false).await, Reply::Job(_)));
    let again = AttemptRef { run: 2, ..first() };
    rig.outcome("w1", success(jobs[1], again, "2")).await;
    assert_eq!(batch_row(rig).await, (0, 1, 1, 0, 0));
    let mut deliveries = rig.bus.subscribe_deliveries(batch.partition(4)).await.unwrap();
    rig.bus.flush().await.unwrap();
    for _ in 0..2 {
        rig.outcome("w1", success(jobs[2], refs[2], "1")).await;
    }
    assert_eq!(batch_row(rig).await, (1, 2, 1, 0, 1));
    assert_eq!(rig.number(BATCH_DELIVERIES).await, 1);
    let told = tokio::time::timeout(SOON, async {
        loop {
            let events = v1::DeliveryEvents::decode(deliveries.next().await.unwrap().payload).unwrap();
            if let Some(told) = events.deliveries.into_iter().find(|d| d.event >= 100) {
                return told;
            }
        }
    });
    let told = told.await.unwrap();
    let parts = told.body.unwrap().parts;
    let Some(v1::body_part::Part::Inline(bytes)) = &parts[0].part else { panic!("{parts:?}") };
    let body = String::from_utf8(bytes.to_vec()).unwrap();
    let link = format!("\"https://ringback.example/batches/{batch}/");
    assert!(body.contains(&link) && body.contains("/results.jsonl\""), "{body}");
    assert!(body.contains("\"total\":3"), "{body}");
    rig.books_balance().await;
}

async fn a_failure_cancels_the_rest_of_its_batch_and_nobody_else(rig: &mut Rig) {
    rig.tracker().await;
    let (batch, jobs) = rig.batch(5, true).await;
    let other = rig.job().await;
    let running = first();
    rig.beat("w1", &[(jobs[1], running)]).await;
    rig.outcome("w1", success(jobs[0], first(), "1")).await;
    assert_eq!(rig.outcome("w1", failure(jobs[2], first(), "no")).await, Verdict::Committed);
    until_true("the batch to end", SOON, || async { batch_row(rig).await == (2, 1, 1, 3, 1) }).await;
    assert_eq!(rig.number(BATCH_DELIVERIES).await, 1);
    assert_eq!(rig.status(other).await, JobStatus::InQueue);
    assert_eq!(rig.beat("w1", &[(jobs[1], running)]).await[0].reason, "batch_cancelled");
    let command = v1::CancelBatch {
        project_id: 1,
        batch_id: batch.as_bytes().to_vec().into(),
        limit: 10,
        by_request: true,
    };
    let foreign = v1::CancelBatch { project_id: 2, ..command.clone() };
    let reply = rig.command(v1::command::Command::CancelBatch(command)).await;
    assert_eq!(reply, Reply::Count(v1::CountReply { changed: 0, more: false }), "it has ended");
    assert!(matches!(rig.command(v1::command::Command::CancelBatch(foreign)).await, Reply::Refusal(_)));

    // By request, in chunks.
    let (batch, jobs) = rig.batch(3, false).await;
    let command = |by_request| v1::CancelBatch {
        project_id: 1,
        batch_id: batch.as_bytes().to_vec().into(),
        limit: 2,
        by_request,
    };
    let nothing = rig.command(v1::command::Command::CancelBatch(command(false))).await;
    assert_eq!(nothing, Reply::Count(v1::CountReply { changed: 0, more: false }), "nobody asked for it");
    let mut changed = 0;
    loop {
        let Reply::Count(count) = rig.command(v1::command::Command::CancelBatch(command(true))).await else {
            panic!("refused")
        };
        changed += count.changed;
        if !count.more {
            break;
        }
    }
    assert_eq!(changed, 3);
    for job in jobs {
        assert_eq!(rig.status(job).await, JobStatus::Cancelled);
    }
    assert_eq!(rig.number("SELECT COUNT(*) FROM batches WHERE status = 3 AND cancelled = 3").await, 1);
    rig.books_balance().await;
}
