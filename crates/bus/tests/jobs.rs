//! Publishing and pulling against a real nats-server.

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

mod support;

use bytes::Bytes;
use ringback_bus::{Bus, BusError, Lane, PublishFailure, PublishOutcome};
use std::collections::HashSet;
use std::time::Duration;
use support::{ENDPOINT, EPOCH, QUIET, Rig, SHARD, job, next, none_comes, publication, until};

const LONG: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_job_is_stored_once_and_carries_its_trace() {
    let rig = Rig::with_stream().await;
    let publisher = rig.bus.job_publisher();
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned();
    let mut first = publication(1, Lane::Hi);
    first.traceparent = Some(traceparent.clone());
    let stored = publisher.publish(first.clone()).await;
    assert!(matches!(stored, PublishOutcome::Stored { .. }), "{stored:?}");
    assert_eq!(publisher.publish(first).await, PublishOutcome::AlreadyThere);

    let mut puller = rig.pull(&[Lane::Hi], LONG).await;
    puller.add_credits(2);
    let delivery = next(&mut puller).await;
    assert_eq!((delivery.subject, delivery.payload), (job(1, Lane::Hi), Bytes::from_static(b"job 1")));
    assert_eq!((delivery.num_delivered, delivery.traceparent), (1, Some(traceparent)));
    assert!((ringback_service_runtime::time::now_ms() - delivery.stored_at_ms).abs() < 60_000);
    none_comes(&mut puller).await;
    delivery.acker.ack().await.unwrap();
    until("the ack removes the message", || async { !rig.bus.has_job(&job(1, Lane::Hi)).await.unwrap() })
        .await;
}

#[tokio::test]
async fn exactly_the_free_slots_are_fetched() {
    let rig = Rig::with_stream().await;
    let many = (1..=500).map(|n| publication(n, Lane::Hi)).collect();
    let outcomes = rig.bus.job_publisher().publish_all(many).await;
    assert_eq!(outcomes.len(), 500);
    assert!(outcomes.iter().all(PublishOutcome::is_stored), "{outcomes:?}");

    let mut puller = rig.pull(&[Lane::Hi, Lane::Lo], LONG).await;
    none_comes(&mut puller).await;
    puller.add_credits(7);
    let mut held = Vec::new();
    for _ in 0..7 {
        held.push(next(&mut puller).await);
    }
    none_comes(&mut puller).await;
    let depth = rig.bus.consumer_depth(SHARD, ENDPOINT, Lane::Hi).await.unwrap().unwrap();
    assert_eq!((depth.pending, depth.ack_pending, depth.total()), (493, 7, 500));

    // Every acknowledged job frees one slot; all come, each once.
    let mut seen = HashSet::new();
    while let Some(delivery) = held.pop() {
        assert!(seen.insert(delivery.subject.job), "{:?} came twice", delivery.subject);
        assert_eq!(delivery.num_delivered, 1);
        delivery.acker.ack().await.unwrap();
        if seen.len() + held.len() < 500 {
            puller.add_credits(1);
            held.push(next(&mut puller).await);
        }
    }
    assert_eq!(seen.len(), 500);
    until("nothing is left", || async {
        rig.bus.consumer_depth(SHARD, ENDPOINT, Lane::Hi).await.unwrap().unwrap().total() == 0
    })
    .await;
}

/// A worker starts while its connection is still being made.
#[tokio::test(flavor = "multi_thread")]
async fn a_puller_that_is_older_than_its_connection_asks_once() {
    let mut rig = Rig::with_stream().await;
    // The consumers are there, so that the first request follows the connection at once.
    rig.pull(&[Lane::Hi, Lane::Lo], LONG).await.stop();
    let many = (1..=200).map(|n| publication(n, Lane::Hi)).collect();
    rig.bus.job_publisher().publish_all(many).await;
    for taken in 1..=40 {
        rig.bus = Bus::connect(&rig.config, "young").await.unwrap();
        let mut puller = rig.pull(&[Lane::Hi, Lane::Lo], LONG).await;
        puller.add_credits(2);
        for _ in 0..2 {
            assert_eq!(next(&mut puller).await.num_delivered, 1, "an earlier puller fetched too much");
        }
        let depth = rig.bus.consumer_depth(SHARD, ENDPOINT, Lane::Hi).await.unwrap().unwrap();
        assert_eq!(depth.ack_pending, 2 * taken, "only what has a slot is fetched");
    }
}

#[tokio::test]
async fn a_job_that_comes_later_reaches_a_waiting_slot() {
    let rig = Rig::with_stream().await;
    let mut puller = rig.pull(&[Lane::Hi, Lane::Lo], LONG).await;
    puller.add_credits(2);
    none_comes(&mut puller).await;
    rig.bus.job_publisher().publish(publication(1, Lane::Lo)).await;
    assert_eq!(next(&mut puller).await.subject, job(1, Lane::Lo));
    rig.bus.job_publisher().publish(publication(2, Lane::Hi)).await;
    assert_eq!(next(&mut puller).await.subject, job(2, Lane::Hi));
    // Longer than one pull request lives: it is renewed.
    tokio::time::sleep(Duration::from_secs(5)).await;
    puller.add_credits(1);
    rig.bus.job_publisher().publish(publication(3, Lane::Hi)).await;
    assert_eq!(next(&mut puller).await.subject, job(3, Lane::Hi));
}

#[tokio::test]
async fn low_priority_waits_for_the_rest() {
    let rig = Rig::with_stream().await;
    let mut all: Vec<_> = (1..=5).map(|n| publication(n, Lane::Lo)).collect();
    all.extend((11..=15).map(|n| publication(n, Lane::Hi)));
    rig.bus.job_publisher().publish_all(all).await;
    let mut puller = rig.pull(&[Lane::Hi, Lane::Lo], LONG).await;
    let mut order = Vec::new();
    for _ in 0..10 {
        puller.add_credits(1);
        let delivery = next(&mut puller).await;
        order.push(delivery.subject.lane);
        delivery.acker.ack().await.unwrap();
    }
    assert_eq!(order, [[Lane::Hi; 5], [Lane::Lo; 5]].concat());
}

#[tokio::test]
async fn both_lanes_never_hold_more_than_the_slots() {
    let rig = Rig::with_stream().await;
    let mut puller = rig.pull(&[Lane::Hi, Lane::Lo], LONG).await;
    puller.add_credits(1);
    tokio::time::sleep(QUIET).await;
    // One slot, both lanes wait: whichever comes second is given back.
    let outcomes =
        rig.bus.job_publisher().publish_all(vec![publication(1, Lane::Lo), publication(2, Lane::Hi)]).await;
    assert!(outcomes.iter().all(PublishOutcome::is_stored));
    let first = next(&mut puller).await;
    none_comes(&mut puller).await;
    first.acker.ack().await.unwrap();
    puller.add_credits(1);
    let second = next(&mut puller).await;
    assert_ne!(second.subject.lane, first.subject.lane);
    second.acker.ack().await.unwrap();
    none_comes(&mut puller).await;
}

#[tokio::test]
async fn redelivery_nak_in_progress_and_term() {
    let rig = Rig::with_stream().await;
    let ack_wait = Duration::from_secs(1);
    rig.bus.job_publisher().publish(publication(1, Lane::Hi)).await;
    let mut puller = rig.pull(&[Lane::Hi], ack_wait).await;
    puller.add_credits(1);
    let first = next(&mut puller).await;
    // Kept alive past the ack wait.
    puller.add_credits(1);
    for _ in 0..6 {
        first.acker.in_progress().await.unwrap();
        none_comes(&mut puller).await;
    }
    // Silence: delivered again.
    let second = next(&mut puller).await;
    assert_eq!((second.num_delivered, second.subject), (2, first.subject));
    // Given back: at once.
    puller.add_credits(1);
    second.acker.nak(None).await.unwrap();
    let third = next(&mut puller).await;
    assert_eq!(third.num_delivered, 3);
    // Given back for later.
    puller.add_credits(1);
    let since = std::time::Instant::now();
    third.acker.nak(Some(Duration::from_millis(700))).await.unwrap();
    let fourth = next(&mut puller).await;
    assert!(since.elapsed() >= Duration::from_millis(600), "{:?}", since.elapsed());
    // Terminated: gone without having been done.
    puller.add_credits(1);
    fourth.acker.term().await.unwrap();
    tokio::time::sleep(ack_wait).await;
    none_comes(&mut puller).await;
    assert!(!rig.bus.has_job(&job(1, Lane::Hi)).await.unwrap());
}

#[tokio::test]
async fn a_stopped_puller_gives_back_what_still_comes() {
    let rig = Rig::with_stream().await;
    let mut puller = rig.pull(&[Lane::Hi], LONG).await;
    puller.add_credits(3);
    tokio::time::sleep(QUIET).await;
    puller.stop();
    let outcome = rig.bus.job_publisher().publish(publication(1, Lane::Hi)).await;
    assert!(outcome.is_stored());
    if let Some(taken) = puller.next().await {
        taken.acker.nak(None).await.unwrap();
    }
    // Another worker gets it long before the ack wait of 30 s.
    let mut other = rig.pull(&[Lane::Hi], LONG).await;
    other.add_credits(1);
    assert_eq!(next(&mut other).await.subject, job(1, Lane::Hi));
}

#[tokio::test]
async fn pulling_survives_the_kill_of_the_server() {
    let rig = Rig::with_stream().await;
    let publisher = rig.bus.job_publisher();
    let mut puller = rig.pull(&[Lane::Hi, Lane::Lo], LONG).await;
    puller.add_credits(2);
    publisher.publish(publication(1, Lane::Hi)).await;
    let before = next(&mut puller).await;
    rig.kill_server().await;
    // The waiting slot is asked for again, and the job in hand can still be acknowledged.
    until("published after the restart", || {
        let publisher = publisher.clone();
        async move { publisher.publish(publication(2, Lane::Hi)).await.is_stored() }
    })
    .await;
    let mut after = next(&mut puller).await;
    if after.subject == job(1, Lane::Hi) {
        // What a consumer has handed out is not on the disk at once: the killed server may have forgotten it.
        puller.add_credits(1);
        after = next(&mut puller).await;
    }
    assert_eq!(after.subject, job(2, Lane::Hi));
    before.acker.ack().await.unwrap();
    until("acknowledged", || async { matches!(rig.bus.has_job(&job(1, Lane::Hi)).await, Ok(false)) }).await;
}

#[tokio::test]
async fn a_lost_store_is_noticed_and_rebuilt() {
    let rig = Rig::with_stream().await;
    let publisher = rig.bus.job_publisher();
    let old = rig.bus.stream_state(SHARD).await.unwrap().unwrap();
    assert_eq!((old.db_epoch.as_str(), old.created), (EPOCH, false));
    let mut puller = rig.pull(&[Lane::Hi], LONG).await;
    puller.add_credits(1);
    assert!(!rig.bus.ensure_stream(SHARD, EPOCH).await.unwrap().created);

    // Moved away in one step: the living server still writes into it.
    let store = rig.broker.store_dir();
    std::fs::rename(&store, store.with_extension("lost")).unwrap();
    rig.kill_server().await;
    until("JetStream is up and empty", || async { matches!(rig.bus.stream_state(SHARD).await, Ok(None)) })
        .await;
    let failed = publisher.publish(publication(1, Lane::Hi)).await;
    let stream = rig.bus.subjects().stream(SHARD);
    assert_eq!(failed, PublishOutcome::Failed(PublishFailure::StreamMissing(stream.clone())));
    assert!(!PublishFailure::StreamMissing(stream.clone()).may_be_stored());
    assert!(PublishFailure::Unknown.may_be_stored());
    assert_eq!(
        rig.bus.has_job(&job(1, Lane::Hi)).await,
        Err(BusError::StreamMissing { stream: stream.clone() })
    );
    assert_eq!(rig.bus.list_jobs(SHARD, ENDPOINT, 0).await, Err(BusError::StreamMissing { stream }));

    let new = rig.bus.ensure_stream(SHARD, EPOCH).await.unwrap();
    assert!(new.created);
    assert_ne!(new.incarnation, old.incarnation);
    assert!(publisher.publish(publication(1, Lane::Hi)).await.is_stored());
    // The puller makes its consumer again by itself.
    assert_eq!(next(&mut puller).await.subject, job(1, Lane::Hi));
}

#[tokio::test]
async fn a_deleted_consumer_is_made_again() {
    let rig = Rig::with_stream().await;
    let mut puller = rig.pull(&[Lane::Hi, Lane::Lo], LONG).await;
    puller.add_credits(1);
    tokio::time::sleep(QUIET).await;
    let mut consumers = rig.bus.list_consumers(SHARD).await.unwrap();
    consumers.sort();
    assert_eq!(consumers, [(ENDPOINT, Lane::Hi), (ENDPOINT, Lane::Lo)]);
    assert!(rig.bus.delete_consumer(SHARD, ENDPOINT, Lane::Hi).await.unwrap());
    rig.bus.job_publisher().publish(publication(1, Lane::Hi)).await;
    assert_eq!(next(&mut puller).await.subject, job(1, Lane::Hi));
}

#[tokio::test]
async fn exact_messages_are_listed_and_deleted() {
    let rig = Rig::with_stream().await;
    let publisher = rig.bus.job_publisher();
    publisher.publish_all((1..=20).map(|n| publication(n, Lane::Hi)).collect()).await;
    publisher.publish(publication(21, Lane::Lo)).await;
    let page = rig.bus.list_jobs(SHARD, ENDPOINT, 0).await.unwrap();
    assert_eq!((page.jobs.len(), page.next_offset), (21, None));
    assert_eq!(rig.bus.list_lane_jobs(SHARD, ENDPOINT, Lane::Lo, 0).await.unwrap().jobs, [job(21, Lane::Lo)]);

    let mut puller = rig.pull(&[Lane::Hi], LONG).await;
    puller.add_credits(1);
    let held = next(&mut puller).await;
    for n in [5, 6] {
        assert!(rig.bus.delete_job(&job(n, Lane::Hi)).await.unwrap());
        assert!(!rig.bus.delete_job(&job(n, Lane::Hi)).await.unwrap(), "it was deleted before");
    }
    // One that a worker holds can be deleted too; its later ack does no harm.
    assert!(rig.bus.delete_job(&held.subject).await.unwrap());
    held.acker.ack().await.unwrap();
    let mut left: Vec<_> = rig.bus.list_shard_jobs(SHARD, 0).await.unwrap().jobs;
    left.sort_by_key(|subject| subject.job);
    assert_eq!(left.len(), 18);
    assert!(!left.contains(&job(5, Lane::Hi)) && left.contains(&job(7, Lane::Hi)));
    // A deleted subject is free again, for example for a rebuilt queue.
    assert!(matches!(publisher.publish(publication(5, Lane::Hi)).await, PublishOutcome::Stored { .. }));
}

#[tokio::test]
async fn streams_are_listed_and_a_replica_creates_no_second_one() {
    let rig = Rig::start().await;
    let other = ringback_bus::Bus::connect(&rig.config, "replica").await.unwrap();
    let (a, b) = tokio::join!(rig.bus.ensure_streams(3, EPOCH), other.ensure_streams(3, EPOCH));
    let (a, b) = (a.unwrap(), b.unwrap());
    for (mine, theirs) in a.iter().zip(&b) {
        assert_eq!(mine.incarnation, theirs.incarnation);
        assert!(!(mine.created && theirs.created));
    }
    let mut shards = rig.bus.list_streams().await.unwrap();
    shards.sort_unstable();
    assert_eq!(shards, [0, 1, 2]);
    assert!(rig.bus.delete_stream(2).await.unwrap());
    assert!(!rig.bus.delete_stream(2).await.unwrap());
}
