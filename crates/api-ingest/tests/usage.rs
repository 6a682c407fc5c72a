//! Quotas at the door, the files of batches, and what a submit keeps for its events.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::Server;
use http::Method;
use ringback_test_support::stack::Backend;
use serde_json::{Value, json};

const QUOTA: &str = "[projects.default.quota]\nperiod = \"day\"\njobs = 3\n";
const CHAT: &str = "[[endpoints]]\nname = \"chat\"\nkind = \"completion\"\nmodel = \"m\"\nexecutor = { builtin = \"echo\" }\n";

/// A registered webhook that hears of everything, and how many events of a name it was owed.
async fn listen(server: &Server) {
    let body = json!({"url": "http://127.0.0.1:9/hook", "events": ["*"], "secret": null});
    server.api.post("/v1/webhooks", &body).await.expect(201);
}

async fn told(server: &Server, name: &str) -> i64 {
    let code = ringback_domain::event::EventType::parse(name).unwrap().code();
    server
        .sql()
        .await
        .count(&format!("SELECT COUNT(*) FROM deliveries WHERE event = {code} AND target >= 65536"))
        .await
}

async fn beyond_a_quota_submits_get_429(backend: Backend) {
    let Some(server) = Server::start(backend, "", QUOTA).await else { return };
    listen(&server).await;
    server.api.run("echo", &json!({"input": 1})).await;
    server.api.post("/v1/jobs", &json!({"endpoint": "echo", "input": 1})).await.expect(201);
    // A batch has room for all of its items or for none.
    let batch = |n: usize| json!({"endpoint": "echo", "items": vec![json!({"input": 1}); n]});
    let refused = server.api.post("/v1/batches", &batch(2)).await;
    assert_eq!(refused.status, 429, "{}", refused.text);
    assert_eq!(refused.headers["content-type"], "application/problem+json");
    assert_eq!(told(&server, "usage.limit_exceeded").await, 1);
    server.api.post("/v1/batches", &batch(1)).await.expect(201);
    for (path, field) in [("/v2/echo/run", "error"), ("/v2/echo/runsync", "error"), ("/v1/jobs", "detail")] {
        let reply = server.api.post(path, &json!({"endpoint": "echo", "input": 1})).await;
        assert_eq!(reply.status, 429, "{path}: {}", reply.text);
        let wait: u64 = reply.headers["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=86_400).contains(&wait), "{wait}");
        let text = reply.json[field].as_str().unwrap();
        assert!(text.contains("the quota of 3 jobs per day is used up (3 used)"), "{text}");
        assert!(text.contains("projects.<name>.quota.jobs"), "{text}");
    }
    assert_eq!(told(&server, "usage.limit_exceeded").await, 1, "once per period");
    assert_eq!(told(&server, "usage.limit_warning").await, 1, "80 % and 95 % were passed at once");
    let usage = server.api.get("/v1/usage").await.expect(200);
    assert_eq!((&usage["period"], usage["usage"].as_array().unwrap().len()), (&json!("day"), 1));
    let jobs = &usage["usage"][0];
    assert_eq!(
        (&jobs["metric"], &jobs["current_usage"], &jobs["limit"], &jobs["percentage"]),
        (&json!("jobs"), &json!(3), &json!(3), &json!(100.0))
    );
    assert_eq!(usage["reset_at"], jobs["reset_at"]);
    // Another project has its own, which is none.
    let other = server.other();
    other.run("echo", &json!({"input": 1})).await;
    assert_eq!(other.get("/v1/usage").await.expect(200)["usage"], json!([]));
    assert_eq!(server.submit_only().get("/v1/usage").await.status, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_a_quota_submits_get_429_on_sqlite() {
    beyond_a_quota_submits_get_429(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_a_quota_submits_get_429_on_postgresql() {
    beyond_a_quota_submits_get_429(Backend::Postgres).await;
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_files_of_a_batch_can_be_fetched() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.tracker().await;
    let items: Vec<Value> = (0..50).map(|n| json!({"input": n, "client_ref": format!("r{n}")})).collect();
    let made = server.api.post("/v1/batches", &json!({"endpoint": "echo", "items": items})).await.expect(201);
    let hex = made["batch_id"].as_str().unwrap().replace('-', "");
    let (output, errors) = (format!("file_{hex}_output"), format!("file_{hex}_errors"));
    let early = server.api.get(&format!("/v1/files/{output}/content")).await;
    assert_eq!(early.status, 409, "{}", early.text);
    for (n, job) in made["job_ids"].as_array().unwrap().iter().enumerate() {
        let attempt = server.attempt(job.as_str().unwrap(), 1);
        if n % 7 == 3 {
            attempt.fail("no").await;
        } else {
            attempt.succeed_with(&format!("{{\"n\": {n}}}")).await;
        }
    }
    let file = server.api.get(&format!("/v1/files/{output}")).await.expect(200);
    assert_eq!(
        (&file["id"], &file["lines"], &file["purpose"]),
        (&json!(output), &json!(43), &json!("batch_output"))
    );
    let content = server.api.get(&format!("/v1/files/{output}/content")).await;
    assert_eq!(content.headers["content-type"], "application/x-ndjson");
    let good = lines(&content.text);
    assert_eq!(good.len(), 43);
    assert!(good.iter().all(|l| l["status"] == "COMPLETED" && l["output"]["n"] == l["index"]), "{good:?}");
    let bad = lines(&server.api.get(&format!("/v1/files/{errors}/content")).await.text);
    let refs: Vec<&str> = bad.iter().map(|l| l["client_ref"].as_str().unwrap()).collect();
    assert_eq!(refs, ["r3", "r10", "r17", "r24", "r31", "r38", "r45"]);
    assert!(bad.iter().all(|l| l["error"] == "no"));
    // Not for others, and nothing else is a file.
    for path in [format!("/v1/files/{output}"), format!("/v1/files/{output}/content")] {
        assert_eq!(server.other().get(&path).await.status, 404);
        assert_eq!(server.submit_only().get(&path).await.status, 403);
    }
    for id in ["x", "file_1_output", &format!("file_{hex}_other"), &format!("file_{}_output", "0".repeat(32))]
    {
        assert_eq!(server.api.get(&format!("/v1/files/{id}")).await.status, 404, "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submit_keeps_metadata_and_the_clients_request_id() {
    let Some(server) = Server::start(Backend::Sqlite, "", CHAT).await else { return };
    listen(&server).await;
    let sql = server.sql().await;
    let kept = async |id: &str, column: &str| -> String {
        let hex = id.replace('-', "").to_uppercase();
        let query = format!("SELECT CAST({column} AS TEXT) FROM jobs WHERE HEX(id) = '{hex}'");
        sql.texts(&query, 1).await[0][0].clone()
    };
    let headers = [("content-type", "application/json"), ("x-request-id", "from-header")];
    for (body, wanted) in [
        (json!({"input": {"request_id": "from-input"}, "metadata": {"request_id": "m"}}), "from-input"),
        (json!({"input": {"prompt": "hi"}, "metadata": {"request_id": 7}}), "7"),
        (json!({"input": "hi"}), "from-header"),
    ] {
        let text = body.to_string();
        let reply = server.api.send(Method::POST, "/v2/chat/run", &headers, text).await.unwrap();
        let id = reply.field("id").to_owned();
        assert_eq!(kept(&id, "request_id").await, wanted, "{body}");
    }
    // Other endpoints keep none.
    let id = server.api.run("echo", &json!({"input": {"request_id": "x"}, "metadata": {"a": 1}})).await;
    assert_eq!(
        (kept(&id, "request_id").await.as_str(), kept(&id, "metadata").await.as_str()),
        ("", "{\"a\":1}")
    );
    assert_eq!(told(&server, "job.queued").await, 4);
    let batch = json!({"endpoint": "echo", "items": [{"input": 1}], "metadata": {"a": "x".repeat(5_000)}});
    let refused = server.api.post("/v1/batches", &batch).await;
    assert_eq!((refused.status, &refused.json["errors"][0]["pointer"]), (400, &json!("/metadata")));
    let big = json!({"input": 1, "metadata": {"a": "x".repeat(5_000)}});
    let refused = server.api.post("/v2/echo/run", &big).await;
    assert_eq!(refused.status, 400, "{}", refused.text);
    assert!(refused.json["error"].as_str().unwrap().contains("at most 4096 are allowed"), "{}", refused.text);
}
