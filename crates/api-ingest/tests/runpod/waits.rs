//! Requests that wait for a job.

use std::time::{Duration, Instant};

use ringback_test_support::stack::Backend;
use ringback_test_support::wait::until;
use serde_json::json;

use crate::common::Server;

async fn waits_are_ended_by_the_tracker(backend: Backend) {
    let Some(server) = Server::start(backend, "", "").await else { return };
    server.tracker().await;
    let api = server.api.clone();
    let began = Instant::now();
    let waiting =
        tokio::spawn(async move { api.post("/v2/echo/runsync?wait=60000", &json!({"input": 1})).await });
    let sql = server.sql().await;
    let id = until("the job's row", Duration::from_secs(10), || async {
        let jobs = server.api.get("/v1/jobs").await.expect(200);
        jobs["jobs"][0]["id"].as_str().map(str::to_owned)
    })
    .await;
    assert!(id.starts_with("sync-"), "{id}");
    let api = server.api.clone();
    let (path, body) = (format!("/v2/echo/status-sync/{id}?wait=60000"), json!({}));
    let (by_get, by_post) = (path.clone(), path);
    let second = tokio::spawn(async move { (api.get(&by_get).await, api.post(&by_post, &body).await) });
    let attempt = server.attempt(&id, 1);
    attempt.start().await;
    attempt.progress(r#"{"percent":50}"#).await;
    let now = server.api.status("echo", &id).await.expect(200);
    assert_eq!(
        (&now["status"], &now["output"], &now["workerId"]),
        (&json!("IN_PROGRESS"), &json!({"percent": 50}), &json!("w1"))
    );
    attempt.succeed_with(r#"{"n": 1e400, "a":[1]}"#).await;
    let reply = waiting.await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert!(reply.text.contains(r#""output":{"n": 1e400, "a":[1]}"#), "verbatim: {}", reply.text);
    assert!(
        reply.text.contains(r#""status":"COMPLETED""#) && reply.text.contains(r#""executionTime":12"#),
        "{}",
        reply.text
    );
    assert!(reply.text.contains(r#""workerId":"w1""#), "{}", reply.text);
    let (get, post) = second.await.unwrap();
    assert_eq!((get.text, post.text), (reply.text.clone(), reply.text));
    assert_eq!(
        sql.count("SELECT COUNT(*) FROM jobs WHERE sync_id = 1 AND retain_completed_ms = 3600000").await,
        1
    );
    // The plain spelling of the same id is another job's.
    server.api.status("echo", id.trim_start_matches("sync-")).await.expect(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_are_ended_by_the_tracker_on_sqlite() {
    waits_are_ended_by_the_tracker(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_are_ended_by_the_tracker_on_postgres() {
    waits_are_ended_by_the_tracker(Backend::Postgres).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_that_is_over_answers_200_with_the_job_as_it_is() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    let began = Instant::now();
    let reply = server.api.post("/v2/echo/runsync?wait=1000", &json!({"input": 1})).await.expect(200);
    assert_eq!(reply["status"], "IN_QUEUE");
    assert!(began.elapsed() >= Duration::from_millis(1_000));
    let id = reply["id"].as_str().unwrap();
    let reply = server.api.get(&format!("/v2/echo/status-sync/{id}?wait=50")).await.expect(200);
    assert_eq!(reply["status"], "IN_QUEUE");
}

#[tokio::test(flavor = "multi_thread")]
async fn waiters_are_counted_and_a_drain_lets_them_go() {
    let Some(mut server) =
        Server::start(Backend::Sqlite, "max_waiters = 3\nmax_waiters_per_project = 2", "").await
    else {
        return;
    };
    let id = server.api.run("echo", &json!({"input": 1})).await;
    let path = format!("/v2/echo/status-sync/{id}?wait=60000");
    let waiting: Vec<_> = (0..2)
        .map(|_| {
            let (api, path) = (server.api.clone(), path.clone());
            // A probe below may hold a place for a moment.
            tokio::spawn(async move {
                until("a place", Duration::from_secs(20), || async {
                    let reply = api.get(&path).await;
                    (reply.status != 429).then_some(reply)
                })
                .await
            })
        })
        .collect();
    let full = until("the project's places to be taken", Duration::from_secs(10), || async {
        let reply = server.api.get(&format!("/v2/echo/status-sync/{id}?wait=0")).await;
        (reply.status == 429).then_some(reply)
    })
    .await;
    assert!(
        full.text.contains("max_waiters_per_project") && full.headers["retry-after"] == "1",
        "{}",
        full.text
    );
    let reply = server.api.post("/v2/echo/runsync", &json!({"input": 1})).await;
    assert_eq!(reply.status, 429, "{}", reply.text);
    assert_eq!(
        server.sql().await.count("SELECT COUNT(*) FROM jobs").await,
        1,
        "no job that nobody can wait for"
    );
    // Another project is not held up.
    let other = server.other().post("/v2/echo/runsync?wait=1000", &json!({"input": 1})).await;
    assert_eq!(other.expect(200)["status"], "IN_QUEUE");
    server.drain();
    for task in waiting {
        let reply = tokio::time::timeout(Duration::from_secs(5), task).await.expect("released").unwrap();
        assert_eq!(reply.expect(200)["status"], "IN_QUEUE");
    }
    server.ended().await;
}
