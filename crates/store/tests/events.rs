//! Registered webhooks hear of what is committed after them; events own their deliveries and the books balance.

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

mod common;

use std::sync::Arc;

use common::on_both;
use ringback_domain::{
    JobStatus, ProjectId,
    event::{EndpointKind, EventType, event_key, of_transition},
    webhook::body::Body,
};
use ringback_store::sea_orm;
use ringback_store::{
    Store, StoreError, Urgency,
    books::{Books, Window, books_of, offenders},
    events::{Audience, NewEvent, emit},
    retention::{Events, ended_events, purge_events},
    sql,
    webhooks::{EventFacts, Registry, bump_registry},
};
use sea_orm::Value;
use uuid::Uuid;

const PROJECT: ProjectId = ProjectId(3);
const ALWAYS: Window = Window { from_ms: 0, to_ms: 1 << 47 };

on_both!(
    another_process_hears_at_once,
    what_is_rolled_back_was_never_known,
    an_event_owns_its_deliveries_and_the_books_balance,
    equal_bodies_are_stored_once,
    places_of_the_feed_rise_with_commits,
    events_go_when_nobody_waits_for_them,
);

async fn insert_webhook(
    tx: &ringback_store::WriteTx,
    public_id: &str,
    filter: &str,
) -> Result<(), StoreError> {
    sql::execute(
        tx.conn(),
        "INSERT INTO webhooks (public_id, project_id, label, url, format, filter, strict_order, paused, enable_epoch, \
         created_at_ms, updated_at_ms) VALUES ($1, $2, '', 'https://hooks.example/x', 0, $3, 0, 0, 1, 0, 0)",
        [Value::from(public_id), Value::from(PROJECT.0), Value::from(filter)],
    )
    .await?;
    bump_registry(tx).await
}

async fn webhook(store: &Store, public_id: &'static str, filter: &'static str) -> u32 {
    store.write(Urgency::Now, move |tx| Box::pin(insert_webhook(tx, public_id, filter))).await.unwrap();
    let registry = store.registry().await.unwrap();
    registry.webhooks().find(|w| w.public_id == public_id).unwrap().id
}

fn heard(registry: &Registry, names: ringback_domain::event::Candidates) -> Vec<(u32, EventType)> {
    let facts = EventFacts { names, runflow: None, endpoint: None, metadata: None, now_ms: 1 };
    registry.matching(PROJECT, facts).map(|(_, w, name)| (w.id, name)).collect()
}

fn completed() -> ringback_domain::event::Candidates {
    of_transition(EndpointKind::Completion, JobStatus::Completed, false)
}

async fn another_process_hears_at_once((a, b): (Store, Store)) {
    assert!(!b.registry().await.unwrap().listens(PROJECT));
    let all = webhook(&a, "wh_1", r#"{"events":["*"]}"#).await;
    let jobs = webhook(&a, "wh_2", r#"{"events":["job.*"]}"#).await;
    let expected = vec![(all, EventType::CompletionFinished), (jobs, EventType::JobCompleted)];
    assert_eq!(heard(&b.registry().await.unwrap(), completed()), expected);
    let inside = b.write(Urgency::Now, |tx| Box::pin(async move { tx.registry().await })).await.unwrap();
    assert_eq!(heard(&inside, completed()), expected);
    // What does not change is not read again.
    let kept = b.registry().await.unwrap();
    assert!(Arc::ptr_eq(&kept, &b.registry().await.unwrap()));
    for (statement, left) in [
        ("UPDATE webhooks SET paused = 1 WHERE public_id = 'wh_1'", 2),
        ("UPDATE webhooks SET expires_at_ms = 1 WHERE public_id = 'wh_1'", 1),
        ("UPDATE webhooks SET deleted_at_ms = 1 WHERE public_id = 'wh_2'", 0),
        ("UPDATE webhooks SET deleted_at_ms = NULL", 1),
        (
            "INSERT INTO webhook_health (webhook_id, disabled_epoch) SELECT id, 1 FROM webhooks WHERE public_id = 'wh_2'",
            0,
        ),
        ("UPDATE webhooks SET enable_epoch = 2", 1),
    ] {
        a.write(Urgency::Now, move |tx| {
            Box::pin(async move {
                sql::execute(tx.conn(), statement, []).await?;
                bump_registry(tx).await
            })
        })
        .await
        .unwrap();
        let registry = b.registry().await.unwrap();
        assert_eq!(heard(&registry, completed()).len(), left, "{statement}");
    }
}

async fn what_is_rolled_back_was_never_known((a, _): (Store, Store)) {
    let refused: Result<(), StoreError> = a
        .write(Urgency::Now, |tx| {
            Box::pin(async move {
                insert_webhook(tx, "wh_1", r#"{"events":["*"]}"#).await?;
                // Inside its own transaction it is there.
                assert!(tx.registry().await?.listens(PROJECT));
                Err(StoreError::Permanent { detail: "no".to_owned() })
            })
        })
        .await;
    assert!(refused.is_err());
    let inside = a.write(Urgency::Now, |tx| Box::pin(async move { tx.registry().await })).await.unwrap();
    assert!(!inside.listens(PROJECT));
    // The next change gets the number that was rolled back, and is seen all the same.
    webhook(&a, "wh_2", r#"{"events":["job.failed"]}"#).await;
    let registry = a.registry().await.unwrap();
    assert_eq!(registry.webhooks().map(|w| w.public_id.as_str()).collect::<Vec<_>>(), ["wh_2"]);
}

async fn emit_one(store: &Store, id: Uuid, name: EventType, audience: Audience) -> usize {
    let partitions = store.facts().partitions;
    store
        .write(Urgency::Now, move |tx| {
            Box::pin(async move {
                let event = NewEvent {
                    id,
                    project: PROJECT,
                    names: name.into(),
                    subject: "w-1",
                    endpoint: None,
                    metadata: None,
                    data: Body::of_json(br#"{"worker_id":"w-1"}"#.to_vec()),
                    audience,
                    traceparent: None,
                };
                Ok(emit(tx, partitions, event).await?.len())
            })
        })
        .await
        .unwrap()
}

fn key(n: u8) -> Uuid {
    event_key(1_800_000_000_000 + u64::from(n), [n; 10], None)
}

async fn books(store: &Store) -> Books {
    books_of(store.read(), ALWAYS).await.unwrap()
}

async fn an_event_owns_its_deliveries_and_the_books_balance((a, b): (Store, Store)) {
    assert_eq!(emit_one(&a, key(1), EventType::WorkerLost, Audience::Matching).await, 0);
    let first = webhook(&a, "wh_1", r#"{"events":["*"]}"#).await;
    let second = webhook(&a, "wh_2", r#"{"events":["worker.lost"]}"#).await;
    assert_eq!(emit_one(&b, key(2), EventType::WorkerLost, Audience::Matching).await, 2);
    assert_eq!(emit_one(&b, key(3), EventType::ModelUpdated, Audience::Matching).await, 1);
    let but = Audience::MatchingBut { webhook: first };
    assert_eq!(emit_one(&b, key(4), EventType::WorkerLost, but).await, 1);
    assert_eq!(emit_one(&b, key(5), EventType::ModelUpdated, but).await, 0);
    let only = Audience::Only { webhook: second };
    assert_eq!(emit_one(&b, key(6), EventType::WebhookTest, only).await, 1);
    let books = books(&a).await;
    assert!(books.balance() && books.owed == 5, "{books:?}");
    assert_eq!(offenders(a.read(), ALWAYS, 9).await.unwrap(), []);
    // The books name an event whose delivery vanished, and a delivery whose event did.
    for statement in
        ["DELETE FROM deliveries WHERE target = 65537 AND event = 400", "DELETE FROM events WHERE type = 503"]
    {
        a.write(Urgency::Now, move |tx| {
            Box::pin(async move { sql::execute(tx.conn(), statement, []).await.map(drop) })
        })
        .await
        .unwrap();
    }
    let named: Vec<Uuid> = offenders(a.read(), ALWAYS, 9).await.unwrap().iter().map(|o| o.owner).collect();
    assert_eq!(named, [key(3), key(6)]);
}

async fn equal_bodies_are_stored_once((a, _): (Store, Store)) {
    for id in ["wh_1", "wh_2", "wh_3"] {
        webhook(&a, id, r#"{"events":["*"]}"#).await;
    }
    emit_one(&a, key(1), EventType::WorkerLost, Audience::Matching).await;
    let rows = sql::query(
        a.read(),
        "SELECT target, body_target, CAST(LENGTH(body) AS BIGINT), position, format FROM deliveries ORDER BY target",
        [],
    )
    .await
    .unwrap();
    let at = |row: usize, column: usize| rows[row].try_get_by_index::<Option<i64>>(column).unwrap();
    let first = at(0, 0);
    assert_eq!((rows.len(), at(0, 1), at(1, 1), at(2, 1)), (3, None, first, first));
    assert!(at(0, 2).unwrap() > 50 && at(1, 2) == Some(0) && at(2, 2) == Some(0));
    assert!(at(0, 3).is_some() && at(0, 3) == at(2, 3) && at(0, 4) == Some(0));
}

async fn places_of_the_feed_rise_with_commits((a, b): (Store, Store)) {
    webhook(&a, "wh_1", r#"{"events":["*"]}"#).await;
    for n in 1..=6 {
        emit_one(if n % 2 == 0 { &a } else { &b }, key(n), EventType::WorkerLost, Audience::Matching).await;
    }
    let rows = sql::query(a.read(), "SELECT position FROM deliveries ORDER BY owner_id", []).await.unwrap();
    let places: Vec<i64> = rows.iter().map(|r| r.try_get_by_index(0).unwrap()).collect();
    assert!(places.windows(2).all(|w| w[0] < w[1]), "{places:?}");
    let horizon = ringback_store::webhooks::registry::feed_horizon(a.read()).await.unwrap();
    assert!(places.iter().all(|p| *p < horizon), "{places:?} {horizon}");
}

async fn events_go_when_nobody_waits_for_them((a, _): (Store, Store)) {
    webhook(&a, "wh_1", r#"{"events":["*"]}"#).await;
    for n in 1..=3 {
        emit_one(&a, key(n), EventType::WorkerLost, Audience::Matching).await;
    }
    let now = a.now_ms().await.unwrap();
    let set = async |n: u8, state: i64, ended_at_ms: i64| {
        a.write(Urgency::Now, move |tx| {
            Box::pin(async move {
                sql::execute(
                    tx.conn(),
                    "UPDATE deliveries SET state = $2, ended_at_ms = $3 WHERE owner_id = $1",
                    [sql::id(key(n).as_bytes()), Value::from(state), Value::from(ended_at_ms)],
                )
                .await
                .map(drop)
            })
        })
        .await
        .unwrap();
    };
    // One delivered, one dead a moment ago, one pending.
    set(1, 1, now).await;
    set(2, 2, now).await;
    assert_eq!(ended_events(a.read(), Events::All, now - 1_000, now, 9).await.unwrap(), Vec::<Uuid>::new());
    assert_eq!(ended_events(a.read(), Events::All, now + 1_000, now, 9).await.unwrap(), [key(1)]);
    let later = now + ringback_store::retention::KEEP_DEAD_MS + 1;
    assert_eq!(ended_events(a.read(), Events::All, later, later, 9).await.unwrap(), [key(1), key(2)]);
    // Judged again in the transaction: the pending one and the dead one stay, whoever asks.
    let purged = a
        .write(Urgency::Now, |tx| Box::pin(async move { purge_events(tx, &[key(1), key(2), key(3)]).await }))
        .await
        .unwrap();
    assert_eq!((purged.events, purged.owed, purged.deliveries, purged.postponed), (1, 1, 1, 2));
    let books = books(&a).await;
    assert!(books.balance() && books.owed == 2, "{books:?}");
    assert_eq!(ringback_store::books::purged_totals(a.read()).await.unwrap(), (1, 1));
}
