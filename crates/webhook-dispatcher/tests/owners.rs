//! Partitions change hands: crashes, drains, thieves, and more work than memory.

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

mod support;

use std::time::{Duration, Instant};

use ringback_contracts::v1;
use ringback_domain::JobId;
use ringback_store::Urgency;
use ringback_store::deliveries::{DeliveryState, delivery_counts};
use ringback_store::partitions::{Take, acquire};
use ringback_test_support::receiver::Mode;
use ringback_test_support::wait::{always, until_true};
use support::{Dispatcher, Rig, SOON, end, job, life};
use uuid::Uuid;

/// The row "kill -9 after POST, before record": at most one extra copy, same id, same bytes.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_crash_the_same_bytes_come_with_the_same_id() {
    let Some(rig) = Rig::start().await else { return };
    rig.receiver.answer("/hook", Mode::Hang);
    let first = Dispatcher::start(&rig, false);
    let id = job();
    rig.owe(&[end(id, &rig.url("/hook"))]).await;
    until_true("the first POST", SOON, || async { rig.receiver.count() == 1 }).await;
    first.kill();
    rig.receiver.answer("/hook", Mode::Ok);
    let _second = Dispatcher::start(&rig, false);
    rig.ends(id, DeliveryState::Delivered).await;
    let hits = rig.receiver.hits_of(&id.to_string());
    assert_eq!(hits.len(), 2);
    assert_eq!((&hits[0].webhook_id, &hits[0].body), (&hits[1].webhook_id, &hits[1].body));
    assert_eq!(hits[1].signature, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_dispatchers_share_the_work_and_hand_it_over() {
    let Some(rig) = Rig::start().await else { return };
    let owns = |counts: &'static [usize]| {
        let rig = &rig;
        move || async move { rig.owners().await.into_values().collect::<Vec<_>>() == counts }
    };
    let a = Dispatcher::start(&rig, false);
    until_true("the first to own everything", SOON, owns(&[8])).await;
    let _b = Dispatcher::start(&rig, false);
    let mut owed = Vec::new();
    // Work goes on while partitions change hands.
    for _ in 0..30 {
        let batch: Vec<JobId> = (0..10).map(|_| job()).collect();
        let life: Vec<v1::Delivery> = batch.iter().flat_map(|id| life(*id, &rig.url("/hook"))).collect();
        rig.owe(&life).await;
        owed.extend(batch);
    }
    until_true("a fair share", SOON, owns(&[4, 4])).await;
    a.stop().await;
    let last = job();
    rig.owe(&life(last, &rig.url("/hook"))).await;
    owed.push(last);
    until_true("the other to take over", SOON, owns(&[8])).await;
    for id in &owed {
        rig.ends(*id, DeliveryState::Delivered).await;
        let hits = rig.receiver.hits_of(&id.to_string());
        let order: Vec<&str> = hits.iter().map(|hit| hit.status()).collect();
        assert_eq!(order, ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"], "{id}: in order, each once");
    }
    assert_eq!(rig.receiver.count(), 3 * owed.len());
}

/// What lands after the order to hand over, as the last of its partition, is written down before the lease is given back.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_landing_is_written_down_before_a_partition_is_handed_over() {
    let patient =
        |config: &mut ringback_service_runtime::RingbackConfig| config.webhooks.deadline_ms = 15_000;
    let Some(rig) = Rig::start_with(patient).await else { return };
    rig.receiver.answer("/slow", Mode::Slow(Duration::from_secs(2)));
    let dispatcher = Dispatcher::start(&rig, true);
    // One in each partition: whatever else a partition does, this is all that it has to write.
    let ids: Vec<JobId> = (0..8)
        .map(|last| {
            let mut bytes = *job().as_bytes();
            bytes[15] = last;
            JobId::from_uuid(Uuid::from_bytes(bytes))
        })
        .collect();
    rig.owe(&ids.iter().map(|id| end(*id, &rig.url("/slow"))).collect::<Vec<_>>()).await;
    until_true("all to be on their way", SOON, || async { rig.receiver.count() == 8 }).await;
    // The order comes while they fly.
    dispatcher.stop().await;
    for id in &ids {
        let view = rig.view(*id).await;
        assert_eq!((view[0].state, view[0].attempts), (DeliveryState::Delivered, 1), "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_lost_its_lease_stops_and_comes_back() {
    let Some(rig) = Rig::start().await else { return };
    let _dispatcher = Dispatcher::start(&rig, false);
    until_true("all partitions to be owned", SOON, || async {
        rig.owners().await.values().sum::<usize>() == 8
    })
    .await;
    for partition in 0..8 {
        let taken = rig
            .store
            .write(Urgency::Now, move |tx| Box::pin(acquire(tx, "intruder", partition, 8_000, Take::Always)))
            .await
            .unwrap();
        assert!(taken.is_some());
    }
    // The owner may send until it has noticed, which it does when it renews.
    let stolen = Instant::now();
    until_true("the owner to notice", SOON, || async { stolen.elapsed() > Duration::from_secs(3) }).await;
    let id = job();
    rig.owe(&[end(id, &rig.url("/hook"))]).await;
    always("nothing is sent without a lease", Duration::from_secs(2), || async { rig.receiver.count() == 0 })
        .await;
    rig.ends(id, DeliveryState::Delivered).await;
    assert_eq!(rig.receiver.count(), 1);
}

/// The row "JetStream restart; stream loss", and P4: nothing that is owed needs the broker.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_goes_away_delays_only_the_announcements() {
    let Some(mut rig) = Rig::start().await else { return };
    let _dispatcher = Dispatcher::start(&rig, true);
    let first = job();
    rig.owe(&[end(first, &rig.url("/hook"))]).await;
    rig.ends(first, DeliveryState::Delivered).await;
    rig.nats.kill9();
    let second = job();
    rig.commit(&[end(second, &rig.url("/hook"))]).await;
    rig.ends(second, DeliveryState::Delivered).await;
    rig.nats.delete_store();
    rig.nats.start_again().await;
    let third = job();
    rig.commit(&[end(third, &rig.url("/hook"))]).await;
    rig.ends(third, DeliveryState::Delivered).await;
    assert_eq!(rig.receiver.count(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heap_of_deliveries_passes_through_bounded_memory() {
    let Some(rig) = Rig::start().await else { return };
    // All in one partition and for one target, which may hold a thousand of them in memory.
    let ids: Vec<JobId> = (0..3_000)
        .map(|_| {
            let mut bytes = *job().as_bytes();
            bytes[15] = 8;
            JobId::from_uuid(Uuid::from_bytes(bytes))
        })
        .collect();
    for part in ids.chunks(1_000) {
        let owed: Vec<v1::Delivery> = part.iter().map(|id| end(*id, &rig.url("/heap"))).collect();
        rig.commit(&owed).await;
    }
    let begun = Instant::now();
    let _dispatcher = Dispatcher::start(&rig, true);
    until_true("the heap to be gone", SOON, || async {
        delivery_counts(rig.store.read()).await.unwrap().delivered == 3_000
    })
    .await;
    eprintln!("3,000 deliveries in {:?}", begun.elapsed());
    assert_eq!(rig.receiver.count(), 3_000, "each once");
}
