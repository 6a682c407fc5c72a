//! The tracker over NATS, on SQLite and on PostgreSQL: answers, rows and messages of every request it serves.
#![allow(clippy::unwrap_used, reason = "a failed step of a test is its report")]

#[macro_use]
mod rig;

use std::{collections::BTreeSet, time::Duration};

use prost::Message as _;
use rig::*;
use ringback_bus::Verb;
use ringback_contracts::{VERSION, attempt_to_wire, history_of, v1};
use ringback_domain::{AttemptRef, JobId, JobStatus, Nonce, job::EndReason, policy::Policy, target::Target};
use ringback_store::{Urgency, deliveries::delivery_counts, endpoint_counts, sql, submit::Submit};
use ringback_test_support::wait::{always, until, until_true};
use v1::{Verdict, command_reply::Reply, grant_reply::Answer};

const SOON: Duration = Duration::from_secs(10);

scenarios! {
    a_short_job_passes_through_in_progress_and_ends_once: 30_000,
    the_first_heartbeat_starts_an_attempt_and_later_ones_renew_it: 30_000,
    a_failure_is_final_and_a_crash_is_tried_again: 30_000,
    a_redelivered_message_needs_a_grant: 30_000,
    an_outcome_of_a_former_run_goes_to_the_history: 30_000,
    one_broken_row_costs_its_neighbours_nothing: 30_000,
    a_lease_is_judged_only_by_an_observer_that_saw_all_of_it: 3_000,
    a_worker_that_replaces_another_ends_its_attempts_at_once: 30_000,
    limits_are_judged_again_in_the_commit: 1_000,
    chunks_are_kept_once_and_for_live_attempts_only: 30_000,
    a_lost_message_is_replaced_by_one_that_asks: 30_000,
    two_replicas_end_every_job_once: 30_000,
    what_another_process_wrote_is_seen_before_anything_is_answered: 30_000,
}

async fn a_short_job_passes_through_in_progress_and_ends_once(rig: &mut Rig) {
    rig.tracker().await;
    let mut events = rig.bus.subscribe_transitions().await.unwrap();
    let job = rig.job().await;
    let mut deliveries = rig.bus.subscribe_deliveries(job.partition(4)).await.unwrap();
    rig.bus.flush().await.unwrap();
    let attempt = first();
    let told = success(job, attempt, "{\"n\": 1e400}");
    assert_eq!(rig.outcome("w1", told.clone()).await, Verdict::Committed);

    let row = rig.row(job).await;
    assert_eq!((row.job.status(), row.job.seq, row.job.owed), (JobStatus::Completed, 3, 4));
    let history = history_of(&row.history).unwrap().entries;
    assert_eq!(history.iter().map(|h| h.status).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(rig.number("SELECT COUNT(*) FROM results").await, 1);
    let counts = endpoint_counts(rig.store.read(), ENDPOINT).await.unwrap();
    assert_eq!((counts.queued, counts.running, counts.completed), (0, 0, 1));

    // Told to those who wait, in one message per commit.
    let told_events = v1::TransitionEvents::decode(events.next().await.unwrap().payload).unwrap().events;
    assert_eq!(told_events.iter().map(|e| (e.seq, e.status)).collect::<Vec<_>>(), [(2, 1), (3, 2)]);
    let sent = v1::DeliveryEvents::decode(deliveries.next().await.unwrap().payload).unwrap();
    assert_eq!(sent.counter, 1);
    let owed: BTreeSet<(u32, u32)> = sent.deliveries.iter().map(|d| (d.seq, d.target)).collect();
    assert_eq!(owed, BTreeSet::from([(2, 1), (3, 0), (3, 1)]));
    let body = |seq, target| {
        let d = sent.deliveries.iter().find(|d| (d.seq, d.target) == (seq, target)).unwrap();
        match &d.body.as_ref().unwrap().parts[0].part {
            Some(v1::body_part::Part::Inline(bytes)) => String::from_utf8(bytes.to_vec()).unwrap(),
            other => panic!("{other:?}"),
        }
    };
    let of_webhook = body(3, 0);
    assert!(of_webhook.contains("\"input\":{\"text\": \"hi\"}"), "{of_webhook}");
    assert!(of_webhook.contains("\"output\":{\"n\": 1e400}"), "the output is verbatim: {of_webhook}");
    assert!(of_webhook.contains(&format!("\"webhook\":\"{HOOK}\"")), "{of_webhook}");
    assert!(body(2, 1).contains("\"status\":\"IN_PROGRESS\""));

    // The sender repeats what it did not hear the answer of.
    let before = rig.row(job).await;
    for _ in 0..3 {
        assert_eq!(rig.outcome("w1", told.clone()).await, Verdict::Obsolete);
    }
    assert_eq!(rig.row(job).await, before);
    assert_eq!(rig.number("SELECT COUNT(*) FROM attempts").await, 0, "a repetition is nothing late");
    assert_eq!(delivery_counts(rig.store.read()).await.unwrap().total(), 4);
    rig.books_balance().await;
}

async fn the_first_heartbeat_starts_an_attempt_and_later_ones_renew_it(rig: &mut Rig) {
    rig.tracker().await;
    let job = rig.job().await;
    let attempt = first();
    assert!(rig.beat("w1", &[(job, attempt)]).await.is_empty());
    let started = rig.row(job).await;
    let live = started.job.state.live().unwrap();
    assert_eq!((live.attempt, live.nonce, live.worker.as_str()), (1, attempt.nonce, "w1"));

    let mut beat = beat_of("w1", &[(job, attempt)]);
    beat.attempts[0].progress = "\"half\"".into();
    until_true("the lease to move on", SOON, || {
        let beat = beat.clone();
        let rig = &*rig;
        async move {
            assert!(rig.heartbeat(beat).await.is_empty());
            rig.row(job).await.job.state.live().unwrap().lease_until > live.lease_until
        }
    })
    .await;
    let renewed = rig.row(job).await;
    assert_eq!((renewed.job.seq, renewed.job.owed), (started.job.seq, started.job.owed));
    let check = rig.number("SELECT next_check_at_ms FROM jobs").await;
    assert_eq!(check, renewed.job.state.live().unwrap().lease_until.0);
    assert_eq!(rig.number("SELECT COUNT(*) FROM job_progress").await, 1);
    until_true("the worker's row", SOON, || async {
        rig.number("SELECT COUNT(*) FROM workers WHERE id = 'w1'").await == 1
    })
    .await;

    // Another holder of the first delivery, an attempt that nobody granted, a job that is unknown, a job that ended.
    let other = AttemptRef { nonce: Nonce(fresh()), ..attempt };
    let wild = AttemptRef { attempt: 9, ..attempt };
    let gone = JobId::from_parts(1, [1; 10]);
    let ended = rig.job().await;
    let of_ended = first();
    assert_eq!(rig.outcome("w1", success(ended, of_ended, "1")).await, Verdict::Committed);
    let stop = rig
        .beat("w2", &[(job, other), (job, wild), (gone, attempt), (ended, of_ended), (job, attempt)])
        .await;
    let reasons: Vec<&str> = stop.iter().map(|s| s.reason.as_str()).collect();
    assert_eq!(reasons, ["superseded", "superseded", "unknown", "succeeded"]);
    assert_eq!(stop[0].attempt, Some(attempt_to_wire(&job, &other)));
}

async fn a_failure_is_final_and_a_crash_is_tried_again(rig: &mut Rig) {
    rig.tracker().await;
    let retried = Submit { policy: Policy { max_attempts: 2, retry_errors: true }, ..new_job() };
    let ids = rig.submit(vec![new_job(), new_job(), retried, new_job()]).await;
    let attempts: Vec<AttemptRef> = ids.iter().map(|_| first()).collect();
    let verdicts = rig
        .outcomes(
            "w1",
            vec![
                failure(ids[0], attempts[0], "no voice"),
                crash(ids[1], attempts[1]),
                failure(ids[2], attempts[2], "once more"),
                hand_back(ids[3], attempts[3]),
            ],
        )
        .await;
    assert_eq!(verdicts, [Verdict::Committed, Verdict::Requeued, Verdict::Requeued, Verdict::Requeued]);
    assert_eq!(rig.status(ids[0]).await, JobStatus::Failed);
    for (n, failures) in [(1, 1), (2, 1), (3, 0)] {
        let job = rig.row(ids[n]).await.job;
        assert_eq!((job.status(), job.failures), (JobStatus::InQueue, failures), "{n}");
    }
    assert_eq!(rig.number("SELECT COUNT(*) FROM attempts WHERE late = 0").await, 3);
    assert_eq!(rig.number("SELECT COUNT(*) FROM results WHERE error = 'no voice'").await, 1);

    // Said again, because the answer was lost: the holder still gives its message back.
    assert_eq!(rig.outcome("w1", crash(ids[1], attempts[1])).await, Verdict::Requeued);
    assert_eq!(rig.number("SELECT COUNT(*) FROM attempts").await, 3);

    // The second failure of a job that may fail twice ends it.
    let Answer::Run(run) = rig.grant("w2", ids[2], 1, 0).await else { panic!("no grant") };
    assert_eq!(run.attempt, 2);
    let second = AttemptRef { run: 1, attempt: 2, nonce: Nonce(run.nonce) };
    assert_eq!(rig.outcome("w2", failure(ids[2], second, "again")).await, Verdict::Committed);
    assert_eq!(rig.status(ids[2]).await, JobStatus::Failed);
    rig.books_balance().await;
}

async fn a_redelivered_message_needs_a_grant(rig: &mut Rig) {
    rig.tracker().await;
    let job = rig.job().await;
    let Answer::Run(run) = rig.grant("w1", job, 1, 0).await else { panic!("no grant") };
    assert_eq!(run.attempt, 2, "attempt 1 may be running unreported");
    assert_eq!(rig.grant("w1", job, 1, 0).await, Answer::Run(run), "the answer was lost: the same again");
    let Answer::Wait(wait) = rig.grant("w2", job, 1, 0).await else { panic!("two holders") };
    assert!(wait.retry_after_ms > 0);
    let second = AttemptRef { run: 1, attempt: 2, nonce: Nonce(run.nonce) };
    until_true("the lease to be renewed", SOON, || async {
        let before = rig.row(job).await.job.state.live().unwrap().lease_until;
        rig.beat("w1", &[(job, second)]).await;
        rig.row(job).await.job.state.live().unwrap().lease_until > before
    })
    .await;
    assert!(
        matches!(rig.grant("w1", job, 1, 0).await, Answer::Wait(_)),
        "it runs: the same message came twice"
    );
    for (run, publish) in [(1, 1), (2, 0)] {
        assert!(matches!(rig.grant("w2", job, run, publish).await, Answer::Drop(_)));
    }
    // The unreported first attempt succeeds after all: it ends the run, and the second is stopped.
    let mut stops = rig.bus.subscribe_stop("w1").await.unwrap();
    rig.bus.flush().await.unwrap();
    assert_eq!(rig.outcome("w0", success(job, first(), "1")).await, Verdict::Committed);
    let order = v1::StopOrders::decode(stops.next().await.unwrap().payload).unwrap().stop.remove(0);
    assert_eq!((order.attempt, order.reason.as_str()), (Some(attempt_to_wire(&job, &second)), "superseded"));
    assert!(matches!(rig.grant("w2", job, 1, 0).await, Answer::Drop(_)));
    let unknown = JobId::from_parts(1, [1; 10]);
    assert!(matches!(rig.grant("w2", unknown, 1, 0).await, Answer::Drop(_)));
}

async fn an_outcome_of_a_former_run_goes_to_the_history(rig: &mut Rig) {
    rig.tracker().await;
    let job = rig.job().await;
    let old = first();
    rig.beat("w1", &[(job, old)]).await;
    let Reply::Refusal(refused) = rig.retry(job, true).await else { panic!("a running job was retried") };
    assert_eq!(refused.why(), v1::refusal::Why::Conflict);
    assert!(refused.detail.contains("IN_PROGRESS"), "{}", refused.detail);
    assert!(matches!(rig.cancel(PROJECT, job).await, Reply::Job(j) if j.changed));
    assert!(matches!(rig.retry(job, false).await, Reply::Refusal(_)), "only natively");
    let Reply::Job(reply) = rig.retry(job, true).await else { panic!("not retried") };
    assert_eq!((reply.run, reply.changed, reply.status), (2, true, 0));
    until("the message of run 2", SOON, || async {
        rig.bus.has_job(&subject(job, 2, 0)).await.unwrap().then_some(())
    })
    .await;

    // The spooled outcome of run 1 arrives now.
    assert_eq!(rig.outcome("w1", success(job, old, "\"old\"")).await, Verdict::Obsolete);
    assert_eq!(rig.status(job).await, JobStatus::InQueue);
    assert_eq!(rig.number("SELECT COUNT(*) FROM attempts WHERE late = 1 AND run = 1").await, 1);
    assert_eq!(rig.outcome("w1", success(job, old, "\"old\"")).await, Verdict::Obsolete);
    assert_eq!(rig.number("SELECT COUNT(*) FROM attempts WHERE late = 1").await, 1, "kept once");
    let new = AttemptRef { run: 2, ..first() };
    assert_eq!(rig.outcome("w2", success(job, new, "\"new\"")).await, Verdict::Committed);
    assert_eq!(rig.number("SELECT COUNT(*) FROM results").await, 2);
    let counts = endpoint_counts(rig.store.read(), ENDPOINT).await.unwrap();
    assert_eq!((counts.retried, counts.cancelled, counts.completed, counts.queued), (1, 1, 1, 0));
    rig.books_balance().await;
}

async fn one_broken_row_costs_its_neighbours_nothing(rig: &mut Rig) {
    rig.tracker().await;
    let ids = rig.submit((0..9).map(|_| new_job()).collect()).await;
    let broken = ids[4];
    rig.store
        .write(ringback_store::Urgency::Now, move |tx| {
            Box::pin(async move {
                let values = [sql::id(broken.as_bytes())];
                sql::execute(tx.conn(), "UPDATE jobs SET state = 77 WHERE id = $1", values).await.map(drop)
            })
        })
        .await
        .unwrap();
    let mut told: Vec<v1::Outcome> = ids.iter().map(|id| success(*id, first(), "1")).collect();
    told.push(v1::Outcome { attempt: None, ..told[0].clone() });
    let verdicts = rig.outcomes("w1", told).await;
    for (n, verdict) in verdicts.into_iter().enumerate() {
        let want = if n == 4 || n == 9 { Verdict::Quarantined } else { Verdict::Committed };
        assert_eq!(verdict, want, "{n}");
    }
    assert_eq!(rig.number("SELECT COUNT(*) FROM jobs WHERE state = 2").await, 8);
    assert_eq!(rig.number("SELECT COUNT(*) FROM quarantine").await, 1);

    // What cannot be read at all gets no answer and is kept once.
    for _ in 0..2 {
        let asked = rig.bus.request(Verb::Outcomes, "\u{ff}\u{ff}".into(), Duration::from_millis(300)).await;
        assert!(asked.is_err());
    }
    until_true("the payload to be kept", SOON, || async {
        rig.number("SELECT COUNT(*) FROM quarantine").await == 2
    })
    .await;
}

async fn a_lease_is_judged_only_by_an_observer_that_saw_all_of_it(rig: &mut Rig) {
    rig.tracker().await;
    let job = rig.job().await;
    let lost = first();
    rig.beat("w1", &[(job, lost)]).await;
    let lease_until = rig.row(job).await.job.state.live().unwrap().lease_until;
    rig.stop().await;
    until_true("the lease to run out", SOON, || async {
        ringback_service_runtime::time::now_ms() > lease_until.0
    })
    .await;
    // A tracker that has just started has not seen whether the worker lives.
    rig.tracker().await;
    let rig_ = &*rig;
    always("nobody is judged in the first lease", Duration::from_millis(700), || async move {
        rig_.check_due(&[job]).await == 0 && matches!(rig_.grant("w2", job, 1, 0).await, Answer::Wait(_))
    })
    .await;
    until_true("the lease to be judged", SOON, || async move { rig_.check_due(&[job]).await == 1 }).await;
    let row = rig.row(job).await;
    assert_eq!((row.job.status(), row.job.failures, row.job.publish), (JobStatus::InQueue, 1, 1));
    until("a new message", SOON, || async {
        rig.bus.has_job(&subject(job, 1, 1)).await.unwrap().then_some(())
    })
    .await;
    assert!(matches!(rig.grant("w2", job, 1, 0).await, Answer::Drop(_)), "the old message is void");
    let Answer::Run(run) = rig.grant("w2", job, 1, 1).await else { panic!("no grant") };
    assert_eq!(run.attempt, 2);
    // The first worker was only slow. Its success still counts.
    assert_eq!(rig.outcome("w1", success(job, lost, "1")).await, Verdict::Committed);
    rig.books_balance().await;
}

async fn a_worker_that_replaces_another_ends_its_attempts_at_once(rig: &mut Rig) {
    rig.tracker().await;
    let ids = rig.submit((0..3).map(|_| new_job()).collect()).await;
    let refs: Vec<AttemptRef> = ids.iter().map(|_| first()).collect();
    rig.beat("old", &[(ids[0], refs[0]), (ids[1], refs[1])]).await;
    rig.beat("other", &[(ids[2], refs[2])]).await;
    // It holds the spooled outcome of the first.
    let mut beat = beat_of("new", &[(ids[0], refs[0])]);
    beat.replaces = vec!["old".to_owned()];
    for _ in 0..2 {
        assert!(rig.heartbeat(beat.clone()).await.is_empty());
    }
    assert_eq!(rig.status(ids[0]).await, JobStatus::InProgress);
    assert_eq!(rig.status(ids[2]).await, JobStatus::InProgress);
    let gone = rig.row(ids[1]).await;
    assert_eq!((gone.job.status(), gone.job.failures, gone.job.publish), (JobStatus::InQueue, 1, 1));
    assert_eq!(rig.outcome("new", success(ids[0], refs[0], "1")).await, Verdict::Committed);
    rig.books_balance().await;
}

async fn limits_are_judged_again_in_the_commit(rig: &mut Rig) {
    rig.tracker().await;
    let short = Submit { ttl_ms: Some(1), ..new_job() };
    let long = Submit { ttl_ms: Some(3_600_000), ..new_job() };
    // The grace of the tracker is added to the limit: this one has run for long enough by its own word.
    let ids = rig.submit(vec![short, long, new_job()]).await;
    until_true("the time to live to pass", SOON, || async { rig.check_due(&ids).await == 1 }).await;
    let row = rig.row(ids[0]).await;
    assert_eq!(row.job.state.ended().map(|e| e.reason), Some(EndReason::TtlExpired));
    assert_eq!(rig.number("SELECT COUNT(*) FROM results WHERE error LIKE '%time to live of 1 ms%'").await, 1);
    assert_eq!(rig.status(ids[1]).await, JobStatus::InQueue);

    let overrun = first();
    rig.beat("w1", &[(ids[2], overrun)]).await;
    let started = ringback_service_runtime::time::now_ms() - 60_000;
    let job = ids[2];
    rig.store
        .write(ringback_store::Urgency::Now, move |tx| {
            Box::pin(async move {
                let text = "UPDATE jobs SET started_at_ms = $2, execution_timeout_ms = 1000, \
                            lease_until_ms = $3 WHERE id = $1";
                let values = [sql::id(job.as_bytes()), started.into(), (started + 3_600_000).into()];
                sql::execute(tx.conn(), text, values).await.map(drop)
            })
        })
        .await
        .unwrap();
    until_true("the overrun to be judged", SOON, || async { rig.check_due(&[job]).await == 1 }).await;
    let row = rig.row(job).await;
    assert_eq!(row.job.state.ended().map(|e| e.reason), Some(EndReason::ExecutionTimeout));
    // Its result comes too late and goes to the history.
    assert_eq!(rig.outcome("w1", success(job, overrun, "1")).await, Verdict::Obsolete);
    assert_eq!(rig.number("SELECT COUNT(*) FROM attempts WHERE late = 1").await, 1);
    rig.books_balance().await;
}

async fn chunks_are_kept_once_and_for_live_attempts_only(rig: &mut Rig) {
    rig.tracker().await;
    let job = rig.job().await;
    let attempt = first();
    let chunk = |n, r: AttemptRef| v1::Chunk {
        attempt: Some(attempt_to_wire(&job, &r)),
        n,
        output: format!("{{\"n\":{n}}}").into(),
        started_at_ms: 0,
    };
    let other = AttemptRef { nonce: Nonce(fresh()), ..attempt };
    let chunks = vec![chunk(0, attempt), chunk(1, attempt), chunk(0, other)];
    let batch = v1::ChunkBatch { version: VERSION, worker_id: "w1".to_owned(), chunks };
    let mut told = rig.bus.subscribe_chunks(None).await.unwrap();
    rig.bus.flush().await.unwrap();
    for _ in 0..2 {
        let reply: v1::ChunkReply = rig.ask(Verb::Chunks, &batch).await;
        let verdicts: Vec<Verdict> = reply.verdicts().collect();
        assert_eq!(verdicts, [Verdict::Committed, Verdict::Committed, Verdict::Obsolete]);
    }
    assert_eq!(rig.number("SELECT COUNT(*) FROM chunks").await, 2);
    assert_eq!(rig.status(job).await, JobStatus::InProgress, "the first chunk starts the attempt");
    let events = v1::ChunkEvents::decode(told.next().await.unwrap().payload).unwrap();
    assert_eq!(events.job_ids, [id_bytes(job)]);
}

async fn a_lost_message_is_replaced_by_one_that_asks(rig: &mut Rig) {
    rig.tracker().await;
    let ids = rig.submit(vec![new_job(), new_job()]).await;
    rig.beat("w1", &[(ids[1], first())]).await;
    let lost = |publish| {
        let job = |id: &JobId| v1::RepublishJob { job_id: id_bytes(*id), run: 1, publish };
        v1::command::Command::Republish(v1::Republish { jobs: ids.iter().map(job).collect() })
    };
    for (publish, changed) in [(0, 1), (0, 0), (5, 0)] {
        let reply = rig.command(lost(publish)).await;
        assert_eq!(reply, Reply::Count(v1::CountReply { changed, more: false }), "{publish}");
    }
    until("the new message", SOON, || async {
        rig.bus.has_job(&subject(ids[0], 1, 1)).await.unwrap().then_some(())
    })
    .await;
    let page = rig.bus.list_jobs(1, ENDPOINT, 0).await.unwrap();
    assert_eq!(page.jobs.len(), 1, "the running job has no message of ours");
    assert!(matches!(rig.grant("w1", ids[0], 1, 1).await, Answer::Run(_)));
}

/// Everything is said twice, to whichever replica gets it, in batches that overlap.
/// A tracker may still hold a live job as it wrote it. Another one has started the next run, or ended the job.
async fn what_another_process_wrote_is_seen_before_anything_is_answered(rig: &mut Rig) {
    rig.tracker().await;
    let (retried, cancelled) = (rig.job().await, rig.job().await);
    let attempt = first();
    rig.beat("w1", &[(retried, attempt), (cancelled, attempt)]).await;
    assert_eq!(rig.status(retried).await, JobStatus::InProgress);
    let behind = |text: &'static str, job: JobId| {
        rig.store.write(Urgency::Now, move |tx| {
            Box::pin(async move { sql::execute(tx.conn(), text, [sql::id(job.as_bytes())]).await.map(drop) })
        })
    };
    behind(
        "UPDATE jobs SET state = 0, run = 2, seq = seq + 2, revision = revision + 2, last_attempt = 0, attempt = NULL, \
         nonce = NULL, worker_id = NULL, started_at_ms = NULL, lease_until_ms = NULL WHERE id = $1",
        retried,
    )
    .await
    .unwrap();
    behind(
        "UPDATE jobs SET state = 4, seq = seq + 1, revision = revision + 1, nonce = NULL, worker_id = NULL, \
         started_at_ms = NULL, lease_until_ms = NULL, ended_at_ms = 1, end_reason = 6 WHERE id = $1",
        cancelled,
    )
    .await
    .unwrap();

    let next_run = AttemptRef { run: 2, ..first() };
    assert_eq!(rig.outcome("w1", success(retried, next_run, "1")).await, Verdict::Committed);
    assert_eq!(rig.status(retried).await, JobStatus::Completed);
    assert_eq!(rig.outcome("w1", success(cancelled, attempt, "1")).await, Verdict::Obsolete);
    assert_eq!(rig.status(cancelled).await, JobStatus::Cancelled);
}

async fn two_replicas_end_every_job_once(rig: &mut Rig) {
    rig.tracker().await;
    rig.tracker().await;
    const JOBS: usize = 300;
    let all = Submit { targets: Target::of_submit(None, Some(HOOK), false), ..new_job() };
    let jobs: Vec<Submit> = (0..JOBS).map(|_| Submit { id: new_job().id, ..all.clone() }).collect();
    let ids = rig.submit(jobs).await;
    let refs: Vec<AttemptRef> = ids.iter().map(|_| first()).collect();
    let rig = &*rig;
    let speakers = (0..8_usize).map(|speaker| {
        let (ids, refs) = (&ids, &refs);
        async move {
            for start in (0..JOBS).step_by(25) {
                let part: Vec<usize> = (0..40).map(|i| (start + i * 7 + speaker * 11) % JOBS).collect();
                let told = |n: &usize| match n % 3 {
                    0 => success(ids[*n], refs[*n], "1"),
                    1 => failure(ids[*n], refs[*n], "no"),
                    _ => crash(ids[*n], refs[*n]),
                };
                let beats: Vec<(JobId, AttemptRef)> = part.iter().map(|n| (ids[*n], refs[*n])).collect();
                let worker = format!("w{speaker}");
                let (verdicts, _) = futures::join!(
                    rig.outcomes(&worker, part.iter().map(told).collect()),
                    rig.beat(&worker, &beats)
                );
                assert!(verdicts.iter().all(|v| !matches!(v, Verdict::Quarantined | Verdict::Unspecified)));
            }
        }
    });
    futures::future::join_all(speakers).await;
    let told: Vec<v1::Outcome> = (0..JOBS).map(|n| success(ids[n], refs[n], "1")).collect();
    for part in told.chunks(100) {
        rig.outcomes("w9", part.to_vec()).await;
    }
    assert_eq!(rig.number("SELECT COUNT(*) FROM jobs WHERE state IN (2, 3)").await, JOBS as i64);
    assert_eq!(rig.number("SELECT COUNT(*) FROM results").await, JOBS as i64);
    let counts = endpoint_counts(rig.store.read(), ENDPOINT).await.unwrap();
    assert_eq!((counts.queued, counts.running), (0, 0));
    assert_eq!(counts.completed + counts.failed, JOBS as i64);
    // One delivery per transition: as many as the seqs of all jobs together.
    let seqs = rig.number("SELECT CAST(SUM(seq) AS BIGINT) FROM jobs").await;
    assert_eq!(delivery_counts(rig.store.read()).await.unwrap().total(), seqs.unsigned_abs());
    rig.books_balance().await;
}
