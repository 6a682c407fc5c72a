//! The feed: every delivery once, in the order of commits, whoever writes at the same time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use common::Server;
use ringback_contracts::v1;
use ringback_domain::webhook::signature::{SigningKey, verify};
use ringback_store::{
    Urgency,
    deliveries::{body_to_wire, insert_deliveries},
};
use ringback_test_support::stack::Backend;
use serde_json::{Value, json};
use tokio::sync::Notify;
use uuid::Uuid;

const HOOK: &str = "http://127.0.0.1:9/hook";

async fn project_of(server: &Server) -> i64 {
    server.sql().await.count("SELECT id FROM projects WHERE name = 'default'").await
}

fn delivery(project: i64, n: u128) -> v1::Delivery {
    let body = ringback_domain::webhook::body::in_queue(&format!("job-{n}"));
    v1::Delivery {
        owner_id: Bytes::copy_from_slice(Uuid::from_u128(n).as_bytes()),
        seq: 1,
        project_id: project,
        url: HOOK.to_owned(),
        body: Some(body_to_wire(body)),
        created_at_ms: 1,
        run: 1,
        ..v1::Delivery::default()
    }
}

fn owners(page: &Value) -> Vec<String> {
    page["events"].as_array().unwrap().iter().map(|e| e["owner_id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_event_is_skipped_while_an_older_transaction_is_still_open() {
    let Some(server) = Server::start(Backend::Postgres, "", "").await else { return };
    let project = project_of(&server).await;
    let (inserted, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    // The first transaction takes its place and stays open.
    let first = {
        let (store, inserted, go_on) = (server.store.clone(), Arc::clone(&inserted), Arc::clone(&go_on));
        tokio::spawn(async move {
            store
                .write(Urgency::Now, move |tx| {
                    let (inserted, go_on) = (Arc::clone(&inserted), Arc::clone(&go_on));
                    Box::pin(async move {
                        insert_deliveries(tx, 8, &[delivery(project, 1)]).await?;
                        inserted.notify_one();
                        go_on.notified().await;
                        Ok(())
                    })
                })
                .await
                .unwrap();
        })
    };
    inserted.notified().await;
    // The second one begins later and commits first.
    server
        .store
        .write(Urgency::Now, move |tx| {
            Box::pin(async move { insert_deliveries(tx, 8, &[delivery(project, 2)]).await })
        })
        .await
        .unwrap();
    let early = server.api.get("/v1/events").await.expect(200);
    assert_eq!(owners(&early), Vec::<String>::new(), "the second is not told before the first");
    go_on.notify_one();
    first.await.unwrap();
    let path = format!("/v1/events?wait_seconds=20&after={}", early["cursor"].as_str().unwrap());
    let page = server.api.get(&path).await.expect(200);
    let want: Vec<String> = [1_u128, 2].iter().map(|n| Uuid::from_u128(*n).to_string()).collect();
    assert_eq!(owners(&page), want);
    let path = format!("/v1/events?after={}", page["cursor"].as_str().unwrap());
    assert_eq!(owners(&server.api.get(&path).await.expect(200)), Vec::<String>::new());
}

async fn every_event_comes_once_and_in_order(backend: Backend) {
    let Some(server) = Server::start(backend, "", "").await else { return };
    let project = project_of(&server).await;
    let writers: Vec<_> = (0..4_u128)
        .map(|w| {
            let store = server.store.clone();
            tokio::spawn(async move {
                for n in 0..50_u128 {
                    let owner = w * 1_000 + n + 1;
                    store
                        .write(Urgency::Now, move |tx| {
                            Box::pin(
                                async move { insert_deliveries(tx, 8, &[delivery(project, owner)]).await },
                            )
                        })
                        .await
                        .unwrap();
                }
            })
        })
        .collect();
    let mut seen = Vec::new();
    let mut cursor = String::new();
    let began = std::time::Instant::now();
    while seen.len() < 200 {
        assert!(began.elapsed() < Duration::from_secs(120), "{} of 200", seen.len());
        let path = format!("/v1/events?limit=7&wait_seconds=5&after={cursor}");
        let page = server.api.get(&path).await.expect(200);
        seen.extend(owners(&page));
        cursor = page["cursor"].as_str().unwrap().to_owned();
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let mut unique = seen.clone();
    unique.sort();
    unique.dedup();
    assert_eq!((seen.len(), unique.len()), (200, 200), "each once");
    for w in 0..4_u128 {
        let of_one: Vec<&String> =
            seen.iter().filter(|o| Uuid::parse_str(o).unwrap().as_u128() / 1_000 == w).collect();
        assert!(of_one.is_sorted(), "commits of one writer stay in order");
    }
    // The same from the beginning.
    let mut again = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = server.api.get(&format!("/v1/events?limit=50&after={cursor}")).await.expect(200);
        again.extend(owners(&page));
        cursor = page["cursor"].as_str().unwrap().to_owned();
        if page["more"] == false {
            break;
        }
    }
    assert_eq!(again, seen);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_comes_once_and_in_order_on_sqlite() {
    every_event_comes_once_and_in_order(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_comes_once_and_in_order_on_postgres() {
    every_event_comes_once_and_in_order(Backend::Postgres).await;
}

async fn a_receiver_that_was_away_gets_the_same_bytes_signed(backend: Backend) {
    let Some(server) = Server::start(backend, "", "").await else { return };
    server.tracker().await;
    let start = server.api.get("/v1/events?after=latest").await.expect(200);
    let cursor = start["cursor"].as_str().unwrap();
    // A held request is answered when something comes.
    let held = {
        let (api, path) = (server.api.clone(), format!("/v1/events?wait_seconds=30&after={cursor}"));
        tokio::spawn(async move { api.get(&path).await.expect(200) })
    };
    let job = server.api.run("echo", &json!({"input": 1, "webhookv2": HOOK})).await;
    let first = held.await.unwrap();
    assert_eq!(first["events"][0]["type"], "job.queued", "{first}");
    let attempt = server.attempt(&job, 1);
    attempt.start().await;
    attempt.succeed_with("{\"text\": \"\u{fc} 1e400\", \"n\": 1e400}").await;
    let missed = server.api.get(&format!("/v1/events?job={job}&after_sequence=1")).await.expect(200);
    let types: Vec<&str> =
        missed["events"].as_array().unwrap().iter().map(|e| e["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["job.started", "job.completed"]);
    let end = &missed["events"][1];
    let body = end["body"].as_str().unwrap();
    assert!(body.contains("{\"text\": \"\u{fc} 1e400\", \"n\": 1e400}"), "verbatim: {body}");
    let secret = server.api.get("/v1/webhooks/default/secret").await.json["secret"].clone();
    let keys = [SigningKey::parse(secret.as_str().unwrap()).unwrap().0];
    let header = |name: &str| end["headers"][name].as_str().unwrap();
    let now_s = ringback_service_runtime::time::now_ms() / 1000;
    let (id, at) = (header("webhook-id"), header("webhook-timestamp"));
    verify(&keys, id, at, header("webhook-signature"), body.as_bytes(), now_s).unwrap();
    assert_eq!(header("webhook-sequence"), end["sequence"].to_string());
    let one = server.api.get(&format!("/v1/events/{id}")).await.expect(200);
    assert_eq!(one["body"], end["body"]);
    // Several jobs at once.
    let gone = "018f3a5e-0000-7000-8000-000000000000";
    let ask = json!({"jobs": [{"id": job, "last_sequence": 2}, {"id": gone}]});
    let answer = server.api.post("/v1/events/missed", &ask).await.expect(200);
    assert_eq!(
        (answer["jobs"][0]["missed"].as_array().unwrap().len(), &answer["jobs"][0]["sequence"]),
        (1, &json!(3)),
        "{answer}"
    );
    assert_eq!((&answer["jobs"][1]["known"], &answer["jobs"][1]["missed"]), (&json!(false), &json!([])));
    let theirs = server.other().post("/v1/events/missed", &ask).await.expect(200);
    assert_eq!((&theirs["jobs"][0]["known"], &theirs["jobs"][0]["missed"]), (&json!(false), &json!([])));
    assert_eq!(server.other().get("/v1/events").await.expect(200)["events"], json!([]));
    assert_eq!(server.other().get(&format!("/v1/events/{id}")).await.status, 404);
    assert_eq!(server.submit_only().get("/v1/events").await.status, 403);
    let only = server.api.get("/v1/events?types=job.completed").await.expect(200);
    assert_eq!(only["events"].as_array().unwrap().len(), 1);
    // Cursors of another life of the database, and nonsense.
    let other_life = format!("{}{cursor}", if cursor.starts_with('0') { "1" } else { "0" });
    let other_life = other_life.replacen(&cursor[..1], "", 1);
    let reply = server.api.get(&format!("/v1/events?after={other_life}")).await;
    assert_eq!(reply.status, 410, "{}", reply.text);
    assert!(reply.text.contains("without `after`"), "{}", reply.text);
    for query in ["after=x", "wait_seconds=31", "wait_seconds=-1", "after_sequence=1", "limit=501", "types=x"]
    {
        assert_eq!(server.api.get(&format!("/v1/events?{query}")).await.status, 400, "{query}");
    }
    for ask in
        [json!({}), json!({"jobs": [{"id": "x"}]}), json!({"jobs": [{"id": job, "last_sequence": -1}]})]
    {
        assert_eq!(server.api.post("/v1/events/missed", &ask).await.status, 400, "{ask}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_was_away_gets_the_same_bytes_signed_on_sqlite() {
    a_receiver_that_was_away_gets_the_same_bytes_signed(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_was_away_gets_the_same_bytes_signed_on_postgres() {
    a_receiver_that_was_away_gets_the_same_bytes_signed(Backend::Postgres).await;
}
