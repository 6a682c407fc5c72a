//! What the dispatcher writes about registered webhooks and replays, on real databases: SQLite always, PostgreSQL
//! where it is installed.

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

mod common;

use std::sync::Arc;

use common::on_both;
use ringback_contracts::v1;
use ringback_domain::event::EventType;
use ringback_domain::target::{REGISTERED_TARGET_BASE, Target};
use ringback_domain::webhook::body;
use ringback_domain::{JobId, JobStatus, ProjectId, TimestampMs};
use ringback_store::deliveries::{
    Claim, DeliveryState, JobTransition, Outcome, Stored, Timings, insert_deliveries, job_delivery,
    record_outcomes, stored_of,
};
use ringback_store::partitions::{Take, acquire};
use ringback_store::replays::{
    Replay, ReplayFilter, ReplayState, cancel, count, get, lease, next_page, reopen,
};
use ringback_store::replays_api::{self, NewReplay, upto_now};
use ringback_store::sea_orm::Value;
use ringback_store::webhooks::bump_registry;
use ringback_store::webhooks::health::{Death, Sighting, died, sighted};
use ringback_store::{Store, Urgency, sql};
use uuid::Uuid;

const PROJECT: ProjectId = ProjectId(3);
const NOW: i64 = 1_800_000_000_000;

on_both!(
    a_webhook_is_disabled_once_and_the_notice_is_owed_with_it,
    only_failures_disable_and_a_success_begins_anew,
    a_death_is_told_to_the_others_once,
    a_replay_opens_each_delivery_once_whoever_works,
    an_outcome_of_a_former_life_ends_nothing,
);

async fn run(store: &Store, statement: String) {
    store
        .write(Urgency::Now, move |tx| {
            let statement = statement.clone();
            Box::pin(async move {
                sql::execute(tx.conn(), &statement, []).await?;
                bump_registry(tx).await
            })
        })
        .await
        .unwrap();
}

async fn webhook(store: &Store, public_id: &str, events: &str) -> u32 {
    run(
        store,
        format!(
            "INSERT INTO webhooks (public_id, project_id, label, url, format, filter, strict_order, paused, \
             enable_epoch, created_at_ms, updated_at_ms) VALUES ('{public_id}', 3, '', 'https://hooks.example/x', 0, \
             '{{\"events\":[\"{events}\"]}}', 0, 0, 1, 0, 0)"
        ),
    )
    .await;
    let registry = store.registry().await.unwrap();
    registry.webhooks().find(|w| w.public_id == public_id).unwrap().id
}

fn key() -> Uuid {
    Uuid::now_v7()
}

async fn see(store: &Store, sighting: Sighting, disable_after_ms: Option<u64>) -> Vec<v1::Delivery> {
    let partitions = store.facts().partitions;
    store
        .write(Urgency::Now, move |tx| {
            let sightings = [sighting.clone()];
            Box::pin(async move { sighted(tx, partitions, &sightings, disable_after_ms).await })
        })
        .await
        .unwrap()
}

fn seen(webhook: u32, worked: bool, gone: bool) -> Sighting {
    Sighting { webhook, worked, gone, event: key() }
}

async fn is_disabled(store: &Store, webhook: u32) -> bool {
    store.registry().await.unwrap().webhook(webhook).unwrap().disabled
}

async fn owed(store: &Store, event: EventType) -> i64 {
    let (text, values) = ("SELECT COUNT(*) FROM deliveries WHERE event = $1", [sql::int(event.code())]);
    sql::query_one(store.read(), text, values).await.unwrap().unwrap().try_get_by_index(0).unwrap()
}

async fn a_webhook_is_disabled_once_and_the_notice_is_owed_with_it(store: Store) {
    let bad = webhook(&store, "wh_bad", "*").await;
    let other = webhook(&store, "wh_other", "webhook.*").await;
    let told = see(&store, seen(bad, false, true), None).await;
    assert_eq!(told.iter().map(|d| d.target).collect::<Vec<_>>(), [REGISTERED_TARGET_BASE + other]);
    let text = String::from_utf8_lossy(match &told[0].body.as_ref().unwrap().parts[0].part {
        Some(v1::body_part::Part::Inline(bytes)) => bytes,
        _ => panic!("inline"),
    })
    .into_owned();
    assert!(
        text.contains("\"webhook.disabled\"") && text.contains("gone_410") && text.contains("wh_bad"),
        "{text}"
    );
    assert!(is_disabled(&store, bad).await);
    // A late answer of before changes nothing, nor does a repeated write.
    assert!(see(&store, seen(bad, false, true), None).await.is_empty());
    assert!(see(&store, seen(bad, true, false), None).await.is_empty());
    assert_eq!(owed(&store, EventType::WebhookDisabled).await, 1);
    // Another life after somebody has enabled it.
    run(&store, format!("UPDATE webhooks SET enable_epoch = 2 WHERE id = {bad}")).await;
    assert!(!is_disabled(&store, bad).await);
    assert_eq!(see(&store, seen(bad, false, true), None).await.len(), 1);
    assert!(is_disabled(&store, bad).await);
}

async fn only_failures_disable_and_a_success_begins_anew(store: Store) {
    let id = webhook(&store, "wh_1", "*").await;
    webhook(&store, "wh_2", "webhook.disabled").await;
    let day = 86_400_000;
    let fail = || see(&store, seen(id, false, false), Some(5 * day));
    let back = |days: u64| {
        run(&store, format!("UPDATE webhook_health SET failing_since_ms = failing_since_ms - {}", days * day))
    };
    assert!(fail().await.is_empty());
    back(4).await;
    assert!(fail().await.is_empty(), "not yet");
    assert!(see(&store, seen(id, true, false), Some(5 * day)).await.is_empty());
    assert!(fail().await.is_empty(), "the success began it anew");
    back(6).await;
    assert!(see(&store, seen(id, false, false), None).await.is_empty(), "switched off by the operator");
    assert!(!is_disabled(&store, id).await);
    assert_eq!(fail().await.len(), 1);
    assert!(is_disabled(&store, id).await);
    // The failures of before do not count for the next life.
    run(&store, format!("UPDATE webhooks SET enable_epoch = enable_epoch + 1 WHERE id = {id}")).await;
    assert!(fail().await.is_empty());
    assert!(!is_disabled(&store, id).await);
}

fn job(n: u64) -> JobId {
    JobId::from_parts(NOW.unsigned_abs() + n, [8; 10])
}

fn uuid(job: JobId) -> Uuid {
    Uuid::from_bytes(*job.as_bytes())
}

fn delivery(job: JobId, seq: u32, status: JobStatus, target: u32) -> v1::Delivery {
    let at = &Target::of_submit(None, Some("https://hooks.example/x"), false)[0];
    let (run, at_ms) = (1, TimestampMs(NOW + i64::from(seq)));
    let of = JobTransition { job, project: PROJECT, seq, run, status, at: at_ms, traceparent: None };
    job_delivery(&of, target, at, body::in_progress(&job.to_string(), u64::from(seq)))
}

async fn insert(store: &Store, deliveries: Vec<v1::Delivery>) {
    let (partitions, deliveries) = (store.facts().partitions, Arc::new(deliveries));
    store
        .write(Urgency::Now, move |tx| {
            let deliveries = Arc::clone(&deliveries);
            Box::pin(async move { insert_deliveries(tx, partitions, &deliveries).await })
        })
        .await
        .unwrap();
}

async fn a_death_is_told_to_the_others_once(store: Store) {
    let died_one = webhook(&store, "wh_died", "*").await;
    let told = webhook(&store, "wh_told", "delivery.dead").await;
    let tell = |event: EventType| {
        let partitions = store.facts().partitions;
        let death = Death {
            owner: uuid(job(1)),
            seq: 3,
            target: REGISTERED_TARGET_BASE + died_one,
            project: PROJECT.0,
            event: event.code(),
            attempts: 10,
            created_at_ms: NOW,
            last_status: Some(500),
            last_error: Some("http_500".into()),
            id: key(),
        };
        store.write(Urgency::Now, move |tx| {
            let death = death.clone();
            Box::pin(async move { died(tx, partitions, &[&death]).await })
        })
    };
    let heard = tell(EventType::JobCompleted).await.unwrap();
    assert_eq!(heard.iter().map(|d| d.target).collect::<Vec<_>>(), [REGISTERED_TARGET_BASE + told]);
    assert!(tell(EventType::DeliveryDead).await.unwrap().is_empty(), "nobody tells of the death of a notice");
}

async fn claim(store: &Store) -> Claim {
    // All jobs of these tests end in the same byte, so one partition has them all.
    let partition = 8 % store.facts().partitions;
    store
        .write(Urgency::Now, move |tx| Box::pin(acquire(tx, "d", partition, 60_000, Take::Always)))
        .await
        .unwrap()
        .unwrap()
}

fn outcome(claim: Claim, job: JobId, seq: u32, state: DeliveryState) -> Outcome {
    Outcome {
        claim,
        owner: uuid(job),
        seq,
        target: 0,
        state,
        attempts: 1,
        next_attempt_at_ms: None,
        ended_at_ms: Some(NOW + 50),
        last_status: Some(200),
        last_error: None,
        failed: None,
        duration_ms: Some(3),
        timings: Timings::default(),
        address: None,
        response: None,
        replays: 0,
    }
}

async fn record(store: &Store, outcomes: Vec<Outcome>) -> u64 {
    let outcomes = Arc::new(outcomes);
    store
        .write(Urgency::Now, move |tx| {
            let outcomes = Arc::clone(&outcomes);
            Box::pin(async move { record_outcomes(tx, &outcomes).await })
        })
        .await
        .unwrap()
        .changed
}

async fn make(store: &Store, filter: ReplayFilter) -> Replay {
    let (id, upto_position) = (Uuid::now_v7(), upto_now(store.read()).await.unwrap());
    let matched = count(store.read(), PROJECT, &filter, upto_position).await.unwrap();
    let new = NewReplay { id, project: PROJECT, filter, rate_per_second: 100, upto_position, matched };
    store
        .write(Urgency::Now, move |tx| {
            let new = new.clone();
            Box::pin(async move { replays_api::insert(tx, &new).await })
        })
        .await
        .unwrap();
    get(store.read(), PROJECT, id).await.unwrap().unwrap()
}

async fn take(store: &Store, me: &'static str) -> Vec<Replay> {
    store.write(Urgency::Now, move |tx| Box::pin(lease(tx, me, 60_000, 10, false))).await.unwrap()
}

/// One page as a dispatcher works it off.
async fn step(store: &Store, me: &'static str, replay: &Replay, limit: u32) -> Option<u64> {
    let (page, more) = next_page(store.read(), replay, limit).await.unwrap();
    let (replay, page) = (Arc::new(replay.clone()), Arc::new(page));
    store
        .write(Urgency::Now, move |tx| {
            let (replay, page) = (Arc::clone(&replay), Arc::clone(&page));
            Box::pin(async move { reopen(tx, me, &replay, &page, more, 60_000).await })
        })
        .await
        .unwrap()
}

async fn stored(store: &Store, job: JobId) -> Vec<Stored> {
    stored_of(store.read(), &[uuid(job)]).await.unwrap()
}

async fn a_replay_opens_each_delivery_once_whoever_works(store: Store) {
    let ended =
        [DeliveryState::Delivered, DeliveryState::Dead, DeliveryState::Superseded, DeliveryState::Cancelled];
    let mine = claim(&store).await;
    for n in 0..40 {
        insert(&store, vec![delivery(job(n), 1, JobStatus::Completed, 0)]).await;
    }
    // Every tenth one is still owed: it comes anyway.
    let outcomes = (0..40).filter(|n| n % 10 != 9);
    let outcomes = outcomes.map(|n| outcome(mine, job(n), 1, ended[n as usize % 4])).collect();
    assert_eq!(record(&store, outcomes).await, 36);
    let some = ReplayFilter { states: vec![DeliveryState::Dead.code()], ..ReplayFilter::default() };
    let upto = upto_now(store.read()).await.unwrap();
    let dead = count(store.read(), PROJECT, &some, upto).await.unwrap();
    assert!((8..=10).contains(&dead), "{dead}");
    assert_eq!(count(store.read(), ProjectId(4), &some, upto).await.unwrap(), 0);
    let replay = make(&store, ReplayFilter::default()).await;
    assert_eq!((replay.matched, replay.state), (36, ReplayState::Running));
    // What comes later is not part of it.
    insert(&store, vec![delivery(job(100), 1, JobStatus::Completed, 0)]).await;
    record(&store, vec![outcome(mine, job(100), 1, DeliveryState::Dead)]).await;

    let first = take(&store, "a").await.remove(0);
    assert!(take(&store, "b").await.is_empty(), "held");
    assert_eq!(step(&store, "a", &first, 10).await, Some(10));
    assert_eq!(step(&store, "a", &first, 10).await, None, "a page is not opened twice");
    run(&store, "UPDATE replays SET lease_until_ms = 1".to_owned()).await;
    // The first dispatcher was killed; the other one goes on where it stood.
    let mut at = take(&store, "b").await.remove(0);
    assert_eq!(step(&store, "a", &first, 10).await, None, "it is no longer the first one's");
    let mut opened = 10;
    while let Some(n) = step(&store, "b", &at, 7).await {
        opened += n;
        at = match take(&store, "b").await.pop() {
            Some(next) => next,
            None => break,
        };
    }
    assert_eq!(opened, 36);
    let done = get(store.read(), PROJECT, replay.id).await.unwrap().unwrap();
    assert_eq!((done.state, done.queued), (ReplayState::Done, 36));
    for n in 0..40 {
        let row = stored(&store, job(n)).await.remove(0);
        let lives = if n % 10 == 9 { (0, 0) } else { (1, 1) };
        assert_eq!(row.state, DeliveryState::Pending, "{n}");
        assert_eq!((row.delivery.replays, row.delivery.attempts_before), lives, "{n}");
        assert!(row.delivery.body.is_some());
    }
    assert_eq!(stored(&store, job(100)).await[0].state, DeliveryState::Dead);

    let one = make(&store, ReplayFilter::default()).await;
    let id = one.id;
    assert!(store.write(Urgency::Now, move |tx| Box::pin(cancel(tx, PROJECT, id))).await.unwrap());
    assert!(take(&store, "b").await.is_empty());
    assert_eq!(get(store.read(), PROJECT, id).await.unwrap().unwrap().state, ReplayState::Cancelled);
}

async fn an_outcome_of_a_former_life_ends_nothing(store: Store) {
    let mine = claim(&store).await;
    insert(&store, vec![delivery(job(1), 1, JobStatus::Completed, 0)]).await;
    let first = outcome(mine, job(1), 1, DeliveryState::Delivered);
    assert_eq!(record(&store, vec![first.clone()]).await, 1);
    let key = ringback_store::replays::DeliveryKey { owner: uuid(job(1)), seq: 1, target: 0 };
    make(&store, ReplayFilter { delivery: Some(key), ..ReplayFilter::default() }).await;
    let replay = take(&store, "a").await.remove(0);
    assert_eq!(step(&store, "a", &replay, 10).await, Some(1));
    assert_eq!(get(store.read(), PROJECT, replay.id).await.unwrap().unwrap().state, ReplayState::Done);
    // The answer to the first write was lost, so it is written again.
    assert_eq!(record(&store, vec![first.clone()]).await, 0);
    assert_eq!(stored(&store, job(1)).await[0].state, DeliveryState::Pending);
    assert_eq!(record(&store, vec![Outcome { replays: 1, attempts: 2, ..first }]).await, 1);
    let row = sql::query_one(
        store.read(),
        "SELECT duration_ms, attempts FROM deliveries WHERE owner_id = $1",
        [Value::from(uuid(job(1)).as_bytes().to_vec())],
    );
    let row = row.await.unwrap().unwrap();
    assert_eq!((row.try_get_by_index::<i64>(0).unwrap(), row.try_get_by_index::<i64>(1).unwrap()), (3, 2));
}
