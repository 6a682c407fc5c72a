//! Replays under the dispatcher (P7 of reference/webhooks.md section 5).

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use ringback_contracts::v1;
use ringback_domain::JobId;
use ringback_store::Urgency;
use ringback_store::deliveries::DeliveryState;
use ringback_store::replays::{self, DeliveryKey, ReplayFilter, ReplayState};
use ringback_test_support::receiver::Mode;
use ringback_test_support::wait::{always, until, until_true};
use support::{Dispatcher, PROJECT, Rig, SOON, end, job, life, to};
use uuid::Uuid;

fn one(job: JobId, seq: u32, target: u32) -> ReplayFilter {
    let delivery = Some(DeliveryKey { owner: Uuid::from_bytes(*job.as_bytes()), seq, target });
    ReplayFilter { delivery, ..ReplayFilter::default() }
}

/// P7: over 10,000 deliveries of every state, with many tries or none, are each sent again exactly once, under their
/// ids and with their bytes; progress can be read, and a dispatcher that is killed goes on where it stood.
#[tokio::test(flavor = "multi_thread")]
async fn more_than_ten_thousand_are_replayed_once_each_across_a_kill() {
    const MANY: usize = 10_500;
    let Some(rig) = Rig::start().await else { return };
    let hook = rig.hook(&rig.url("/all"), |_| {}).await;
    let ids: Vec<JobId> = (0..MANY).map(|_| job()).collect();
    for part in ids.chunks(1_000) {
        let owed: Vec<v1::Delivery> = part.iter().map(|id| to(hook.target(), end(*id, ""))).collect();
        rig.commit(&owed).await;
    }
    // As they are days later: delivered, dead, superseded and cancelled ones, with none to nine tries.
    rig.sql(
        "UPDATE deliveries SET state = 1 + (position + created_at_ms) % 4, attempts = created_at_ms % 10, \
         ended_at_ms = created_at_ms, next_attempt_at_ms = NULL"
            .to_owned(),
    )
    .await;
    let first = Dispatcher::start(&rig, true);
    let bus = rig.bus().await;
    let replay = rig.replay(&bus, ReplayFilter::default(), 2_500).await;
    assert_eq!(replay.matched, MANY as u64);
    let progress = || async { replays::get(rig.store.read(), PROJECT, replay.id).await.unwrap().unwrap() };
    until_true("a part of it", SOON, || async { progress().await.queued >= 2_000 }).await;
    first.kill();
    let half = progress().await;
    assert!(half.queued < MANY as u64 && half.state == ReplayState::Running, "{half:?}");
    let _second = Dispatcher::start(&rig, true);
    let done = until("the replay to be done", 4 * SOON, || async {
        Some(progress().await).filter(|replay| replay.state == ReplayState::Done)
    })
    .await;
    assert_eq!(done.queued, MANY as u64);
    until_true("all of them", 4 * SOON, || async { rig.receiver.accepted().len() == MANY }).await;
    let copies = rig.receiver.accepted();
    // What was on its way when the dispatcher was killed may come twice: no more than it could have in the air.
    let twice: Vec<_> = copies.values().filter(|hits| hits.len() > 1).collect();
    assert!(twice.len() <= 4_096, "{}", twice.len());
    for hits in copies.values() {
        assert!(hits.len() <= 2);
        assert!(hits.iter().all(|hit| hit.body == hits[0].body && hit.signature == Ok(())));
        assert!(hits.iter().all(|hit| hit.header("webhook-replay") == "1"));
    }
    let expected: BTreeSet<String> =
        ids.iter().map(|id| format!("msg_{}_3_{}", id.simple(), hook.target())).collect();
    assert_eq!(copies.into_keys().collect::<BTreeSet<_>>(), expected);
}

/// Redelivery of one: the same id and bytes, at once, whatever its webhook answered before; its failures climb anew.
#[tokio::test(flavor = "multi_thread")]
async fn one_delivery_is_sent_again_on_request() {
    let Some(rig) = Rig::start().await else { return };
    rig.receiver.answer("/gone", Mode::Status(410));
    let _dispatcher = Dispatcher::start(&rig, true);
    let bus = rig.bus().await;
    let id = job();
    rig.owe(&[end(id, &rig.url("/gone"))]).await;
    rig.ends(id, DeliveryState::Dead).await;
    rig.receiver.answer("/gone", Mode::FailFirst { times: 2, status: 500 });
    rig.replay(&bus, one(id, 3, 0), 1).await;
    let seen = until("the try", SOON, || async {
        rig.view(id).await.pop().filter(|d| d.state == DeliveryState::Pending && d.attempts == 2)
    })
    .await;
    let wait = seen.next_attempt_at_ms.unwrap() - ringback_service_runtime::time::now_ms();
    assert!(wait <= 10_000, "the first wait of the ladder: {wait}");
    rig.ends(id, DeliveryState::Delivered).await;
    let hits = rig.receiver.hits_of(&id.to_string());
    assert_eq!(hits.len(), 3);
    assert!(hits.iter().all(|hit| (&hit.webhook_id, &hit.body) == (&hits[0].webhook_id, &hits[0].body)));
    let marks: Vec<&str> = hits.iter().map(|hit| hit.header("webhook-replay")).collect();
    assert_eq!(marks, ["", "1", "1"]);
}

/// A whole job again: in order, notices too, though its end was told long ago.
#[tokio::test(flavor = "multi_thread")]
async fn a_replayed_job_tells_its_states_in_order() {
    let Some(rig) = Rig::start().await else { return };
    let _dispatcher = Dispatcher::start(&rig, true);
    let bus = rig.bus().await;
    let ids: Vec<JobId> = (0..20).map(|_| job()).collect();
    for id in &ids {
        rig.owe(&life(*id, &rig.url("/hook"))).await;
    }
    for id in &ids {
        rig.ends(*id, DeliveryState::Delivered).await;
    }
    rig.replay(&bus, ReplayFilter::default(), 10_000).await;
    until_true("everything twice", SOON, || async { rig.receiver.count() == 2 * 3 * ids.len() }).await;
    for id in &ids {
        rig.ends(*id, DeliveryState::Delivered).await;
        let order: Vec<u64> = rig.receiver.hits_of(&id.to_string()).iter().map(|hit| hit.sequence).collect();
        assert_eq!(order, [1, 2, 3, 1, 2, 3]);
    }
}

/// A replay keeps its rate and stops when it is cancelled; what was opened before still goes out.
#[tokio::test(flavor = "multi_thread")]
async fn a_replay_keeps_its_rate_until_it_is_cancelled() {
    let Some(rig) = Rig::start().await else { return };
    let ids: Vec<JobId> = (0..200).map(|_| job()).collect();
    let owed: Vec<v1::Delivery> = ids.iter().map(|id| end(*id, &rig.url("/hook"))).collect();
    rig.commit(&owed).await;
    rig.sql("UPDATE deliveries SET state = 2, ended_at_ms = 1, next_attempt_at_ms = NULL".to_owned()).await;
    let _dispatcher = Dispatcher::start(&rig, true);
    let bus = rig.bus().await;
    let replay = rig.replay(&bus, ReplayFilter::default(), 20).await;
    until_true("some", SOON, || async { rig.receiver.count() >= 30 }).await;
    let id = replay.id;
    rig.store.write(Urgency::Now, move |tx| Box::pin(replays::cancel(tx, PROJECT, id))).await.unwrap();
    assert!(bus.announce_replays().await);
    let opened = replays::get(rig.store.read(), PROJECT, id).await.unwrap().unwrap().queued;
    assert!(opened < 200);
    until_true("what was opened", SOON, || async { rig.receiver.count() as u64 == opened }).await;
    always("no more of it", Duration::from_secs(1), || async { rig.receiver.count() as u64 == opened }).await;
    let hits = rig.receiver.hits();
    // Pages of four, five a second; a busy machine may bunch two or three of them.
    for window in hits.windows(34) {
        let took = window[33].at - window[0].at;
        assert!(took >= Duration::from_millis(800), "34 within {took:?}");
    }
}
