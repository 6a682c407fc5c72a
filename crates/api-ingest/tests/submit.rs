//! Submits: P1, group commit, idempotency, what is stored and published.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::{collections::BTreeSet, time::Duration};

use common::Server;
use http::Method;
use ringback_bus::JobPage;
use ringback_domain::{EndpointId, JobId};
use ringback_test_support::{
    stack::Backend,
    wait::{until, until_true},
};
use serde_json::{Value, json};

async fn published(server: &Server, endpoint: EndpointId) -> BTreeSet<JobId> {
    let shard = u32::try_from(endpoint.0 % i64::from(server.store.facts().shards)).unwrap();
    let (mut found, mut offset) = (BTreeSet::new(), Some(0));
    while let Some(at) = offset {
        let page: JobPage = server.bus.list_jobs(shard, endpoint, at).await.unwrap();
        found.extend(page.jobs.iter().map(|j| j.job));
        offset = page.next_offset;
    }
    found
}

async fn echo(server: &Server) -> EndpointId {
    let rows = ringback_store::endpoints::list(server.store.read()).await.unwrap();
    rows.iter().find(|e| e.name == "echo" && e.project_name == "default").unwrap().id
}

async fn an_answer_means_a_row_and_a_message(backend: Backend) {
    let Some(server) = Server::start(backend, "", "").await else { return };
    let body = json!({"input": {"b": 1, "a": [1.5, null]}, "webhook": "http://127.0.0.1:9/x", "metadata": {"k": 1},
                      "s3Config": {"accessId": "a", "accessSecret": "canary-secret"}, "unknown": 1});
    let id = server.api.run("echo", &body).await;
    let job = JobId::parse(&id).unwrap();
    let sql = server.sql().await;
    assert_eq!(sql.count("SELECT COUNT(*) FROM jobs WHERE state = 0 AND seq = 1 AND run = 1").await, 1, "P1");
    assert_eq!(sql.count("SELECT COUNT(*) FROM deliveries").await, 0, "`webhook` hears of the end only");
    let endpoint = echo(&server).await;
    until_true("the message to be stored", Duration::from_secs(10), || async {
        published(&server, endpoint).await == BTreeSet::from([job])
    })
    .await;
    let reply = server.api.status("echo", &id).await;
    assert_eq!(reply.clone().expect(200), json!({"id": id, "status": "IN_QUEUE"}));
    assert_eq!(reply.headers["content-type"], "application/json");
    let health = server.api.get("/v2/echo/health").await.expect(200);
    assert_eq!(
        health["jobs"],
        json!({"completed": 0, "failed": 0, "inProgress": 0, "inQueue": 1, "retried": 0})
    );
    for kind in ["idle", "initializing", "ready", "running", "throttled"] {
        assert_eq!(health["workers"][kind], 0, "{health}");
    }
    let inputs = ringback_store::inputs::select_inputs(server.store.read(), &[job]).await.unwrap();
    let stored = &inputs[&job];
    assert_eq!(
        stored.input,
        ringback_store::submit::InputAt::Inline(json!({"a": [1.5, null], "b": 1}).to_string().into()),
    );
    let extra = String::from_utf8(stored.extra.clone().unwrap().to_vec()).unwrap();
    assert!(extra.contains("metadata") && !extra.contains("canary"), "{extra}");
    let sealed = stored.secret_extra_encrypted.clone().unwrap();
    assert!(!String::from_utf8_lossy(&sealed).contains("canary"), "s3Config is encrypted");
    let key = ringback_store::secrets::SecretKey::open(&server.config.data.secret_key_path()).unwrap();
    let plain = key.open_sealed(&sealed, &ringback_store::submit::secret_purpose(job)).unwrap();
    assert!(String::from_utf8_lossy(plain.expose()).contains("canary-secret"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_means_a_row_and_a_message_on_sqlite() {
    an_answer_means_a_row_and_a_message(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_means_a_row_and_a_message_on_postgres() {
    an_answer_means_a_row_and_a_message(Backend::Postgres).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_transition_has_its_first_delivery_where_it_is_asked_for() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    let (a, b) = ("http://127.0.0.1:9/a", "http://127.0.0.1:9/b");
    for (endpoint, body, owed) in [
        ("echo", json!({"input": 1}), 0),
        ("echo", json!({"input": 1, "webhook": a}), 0),
        ("echo", json!({"input": 1, "webhookv2": a}), 1),
        ("echo", json!({"input": 1, "webhookV2": a, "webhook": b}), 1),
        ("echo", json!({"input": 1, "webhookv2": a, "webhook": a}), 1),
        ("loud", json!({"input": 1, "webhook": a}), 1),
        ("loud", json!({"input": 1, "webhook": a, "webhookv2": b}), 2),
    ] {
        let id = server.api.run(endpoint, &body).await;
        let job = server.api.job(&id).await;
        let deliveries = server.api.deliveries(&id).await;
        assert_eq!(deliveries.len(), owed, "{body}: {deliveries:?}");
        assert_eq!(job["deliveries"]["pending"], owed, "{job}");
        for d in &deliveries {
            assert_eq!((d["event"].as_str(), d["seq"].as_u64()), (Some("job.queued"), Some(1)), "{d}");
        }
    }
    let sql = server.sql().await;
    let owed = sql.count("SELECT CAST(SUM(owed) AS BIGINT) FROM jobs").await;
    assert_eq!(owed, sql.count("SELECT COUNT(*) FROM deliveries").await, "P5");
}

async fn concurrent_submits_share_transactions(backend: Backend) {
    let Some(server) = Server::start(backend, "", "").await else { return };
    ringback_service_runtime::metrics::install();
    let tasks: Vec<_> = (0..400)
        .map(|n| {
            let api = server.api.clone();
            tokio::spawn(async move { api.run("echo", &json!({"input": n})).await })
        })
        .collect();
    let mut ids = BTreeSet::new();
    for task in tasks {
        ids.insert(JobId::parse(&task.await.unwrap()).unwrap());
    }
    assert_eq!(ids.len(), 400);
    let sql = server.sql().await;
    assert_eq!(sql.count("SELECT COUNT(*) FROM jobs").await, 400);
    assert_eq!(sql.count("SELECT COUNT(*) FROM job_inputs").await, 400);
    assert_eq!(sql.count("SELECT CAST(SUM(queued) AS BIGINT) FROM endpoint_counters").await, 400);
    let endpoint = echo(&server).await;
    until_true("all messages to be stored", Duration::from_secs(20), || async {
        published(&server, endpoint).await == ids
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_submits_share_transactions_on_sqlite() {
    concurrent_submits_share_transactions(Backend::Sqlite).await;
    let text = ringback_service_runtime::metrics::render();
    let value = |name: &str| -> f64 {
        let line =
            text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let (submits, commands) = (
        value("ringback_api_submits_per_command_size_sum"),
        value("ringback_api_submits_per_command_size_count"),
    );
    assert!(submits >= 400.0 && commands < submits / 2.0, "{submits} submits in {commands} commands");
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_submits_share_transactions_on_postgres() {
    concurrent_submits_share_transactions(Backend::Postgres).await;
}

async fn keyed(server: &Server, path: &str, key: &str, body: &Value) -> (u16, Value) {
    let headers = [("content-type", "application/json"), ("idempotency-key", key)];
    let reply = server.api.send(Method::POST, path, &headers, body.to_string()).await.unwrap();
    (reply.status, reply.json)
}

async fn a_key_makes_one_job(backend: Backend) {
    let Some(server) = Server::start(backend, "", "").await else { return };
    let body = json!({"input": {"n": 1}});
    // Many at once: whether they meet in one transaction or in several, one row is made.
    let replies =
        futures::future::join_all((0..40).map(|_| keyed(&server, "/v2/echo/run", "k1", &body))).await;
    let ids: BTreeSet<&str> = replies
        .iter()
        .map(|(status, reply)| {
            assert_eq!((*status, reply["status"].as_str()), (200, Some("IN_QUEUE")), "{reply}");
            reply["id"].as_str().unwrap()
        })
        .collect();
    assert_eq!(ids.len(), 1);
    let sql = server.sql().await;
    assert_eq!(sql.count("SELECT COUNT(*) FROM jobs").await, 1);
    let (status, reply) = keyed(&server, "/v2/echo/run", "k1", &json!({"input": {"n": 2}})).await;
    assert_eq!(status, 409, "{reply}");
    assert!(reply["error"].as_str().unwrap().contains("Idempotency-Key"), "{reply}");
    let (status, _) = keyed(&server, "/v2/loud/run", "k1", &body).await;
    assert_eq!(status, 409, "another endpoint is another request");
    // Another project has its own keys.
    let headers = [("idempotency-key", "k1")];
    let other = server.other().send(Method::POST, "/v2/echo/run", &headers, body.to_string()).await.unwrap();
    assert!(!ids.contains(other.expect(200)["id"].as_str().unwrap()));
    let (status, reply) = keyed(&server, "/v2/echo/run", &"x".repeat(256), &body).await;
    assert!(status == 400 && reply["error"].as_str().unwrap().contains("255"), "{reply}");
    assert_eq!(sql.count("SELECT CAST(SUM(queued) AS BIGINT) FROM endpoint_counters").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_makes_one_job_on_sqlite() {
    a_key_makes_one_job(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_makes_one_job_on_postgres() {
    a_key_makes_one_job(Backend::Postgres).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_that_race_for_a_key_make_one_job() {
    let Some(mut server) = Server::start(Backend::Postgres, "", "").await else { return };
    let second = server.second().await;
    let body = json!({"input": 1});
    for n in 0..20 {
        let key = format!("race-{n}");
        let headers = [("idempotency-key", key.as_str())];
        let (a, b) = tokio::join!(
            server.api.send(Method::POST, "/v2/echo/run", &headers, body.to_string()),
            second.send(Method::POST, "/v2/echo/run", &headers, body.to_string()),
        );
        assert_eq!(a.unwrap().expect(200)["id"], b.unwrap().expect(200)["id"]);
    }
    assert_eq!(server.sql().await.count("SELECT COUNT(*) FROM jobs").await, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_input_goes_to_the_blob_store_first() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    let text = "x".repeat(300 * 1024);
    let id = server.api.run("echo", &json!({"input": {"text": text}})).await;
    let key = format!("in/{}", JobId::parse(&id).unwrap().simple());
    let key = ringback_service_runtime::blobs::BlobKey::new(key).unwrap();
    let stored = server.blobs().get(&key, 1 << 20).await.unwrap();
    assert_eq!(stored, json!({"text": text}).to_string());
    let sql = server.sql().await;
    assert_eq!(
        sql.count("SELECT COUNT(*) FROM job_inputs WHERE input IS NULL AND input_bytes > 300000").await,
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn submits_are_accepted_while_the_broker_is_away() {
    let Some(mut server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.nats.kill9();
    let id = server.api.run("echo", &json!({"input": 1})).await;
    server.api.status("echo", &id).await.expect(200);
    let reply = server.api.post(&format!("/v2/echo/cancel/{id}"), &json!({})).await;
    assert_eq!(reply.status, 503, "{}", reply.text);
    assert_eq!(reply.headers["retry-after"], "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_goes_away_is_a_503_in_time_and_nothing_is_half_done() {
    let Some(mut server) = Server::start(Backend::Postgres, "", "").await else { return };
    server.api.run("echo", &json!({"input": 1})).await;
    server.postgres.as_mut().unwrap().crash();
    let began = std::time::Instant::now();
    let reply = server.api.post("/v2/echo/run", &json!({"input": 2})).await;
    assert_eq!(reply.status, 503, "{}", reply.text);
    assert!(began.elapsed() < Duration::from_millis(2_900), "{:?}", began.elapsed());
    server.postgres.as_mut().unwrap().start_again().await;
    let api = server.api.clone();
    until("submits to be taken again", Duration::from_secs(20), || async {
        let reply = api.post("/v2/echo/run", &json!({"input": 3})).await;
        (reply.status == 200).then_some(())
    })
    .await;
    let sql = server.sql().await;
    let rows = "SELECT COUNT(*) FROM jobs j JOIN job_inputs i ON i.job_id = j.id";
    assert_eq!(sql.count(rows).await, sql.count("SELECT COUNT(*) FROM jobs").await);
}
