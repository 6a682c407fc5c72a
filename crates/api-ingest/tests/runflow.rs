//! Runflow's routes: a client and a receiver of Runflow find what they know.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::Server;
use http::Method;
use ringback_domain::webhook::runflow;
use ringback_store::{Urgency, replays};
use ringback_test_support::stack::Backend;
use serde_json::{Value, json};

const MODEL: &str =
    "[[endpoints]]\nname = \"tts-v2\"\nalias = \"acme/tts\"\nexecutor = { builtin = \"echo\" }\n";
const CALLBACK: &str = "http://127.0.0.1:9/callback?k=canary";

/// What is pending was acknowledged.
async fn settle(server: &Server, backend: Backend) {
    let response = if backend == Backend::Sqlite { "X'6f6b'" } else { "'\\x6f6b'::bytea" };
    // Names in 2 ms, a connection in 9 ms, the first byte after 14 ms.
    let timings = 3_i64 << 42 | 10 << 21 | 15;
    let statement = format!(
        "UPDATE deliveries SET state = 1, attempts = attempts + 1, duration_ms = 20, timings = {timings}, \
         ended_at_ms = created_at_ms + 50 * (attempts + 1), next_attempt_at_ms = NULL, last_status = 200, \
         address = '127.0.0.1:9', response = {response} WHERE state = 0"
    );
    server.sql().await.execute(&statement).await;
}

/// Works the replays off as a dispatcher does.
async fn reopen_all(server: &Server) {
    let taken =
        server.store.write(Urgency::Now, |tx| Box::pin(replays::lease(tx, "d", 60_000, 10, false))).await;
    for replay in taken.unwrap() {
        let (page, more) = replays::next_page(server.store.read(), &replay, 10).await.unwrap();
        let work = Arc::new((replay, page));
        let opened = server.store.write(Urgency::Now, move |tx| {
            let work = Arc::clone(&work);
            Box::pin(async move { replays::reopen(tx, "d", &work.0, &work.1, more, 60_000).await })
        });
        assert_eq!(opened.await.unwrap(), Some(1));
    }
}

/// A redelivery adds to what is told of the first success, and takes nothing of it.
async fn a_redelivery_keeps_the_first_success(server: &Server, backend: Backend, run: &str, delivery: &str) {
    let api = &server.api;
    let log = async || {
        let all = api.get(&format!("/v1/deliveries/{delivery}/attempts")).await.expect(200);
        all["attempts"].as_array().unwrap().clone()
    };
    let first = log().await;
    assert_eq!(first.len(), 1);
    let facts = json!({"n": 1, "outcome": "delivered", "at": first[0]["at"], "duration_ms": 20, "dns_ms": 2,
        "connect_ms": 9, "first_byte_ms": 14, "status": 200, "error": null, "address": "127.0.0.1:9",
        "response": "ok"});
    assert_eq!(first[0], facts);
    reopen_all(server).await;
    let pending = api.get(&format!("/v1/deliveries/{delivery}")).await.expect(200);
    assert_eq!((&pending["state"], &pending["attempts"]), (&json!("pending"), &json!(1)), "{pending}");
    assert_eq!(log().await, first, "while it is pending");
    settle(server, backend).await;
    let both = log().await;
    assert_eq!((both.len(), &both[0]), (2, &first[0]), "{both:?}");
    assert_eq!((&both[1]["n"], &both[1]["outcome"]), (&json!(2), &json!("delivered")));
    assert_ne!(both[1]["at"], both[0]["at"]);
    let of_job = api.get(&format!("/v1/jobs/{run}/deliveries")).await.expect(200);
    assert_eq!(of_job["deliveries"][0]["failed_attempts"], json!([]), "{of_job}");
    let history = api.get(&format!("/v1/runs/{run}/callback")).await.expect(200);
    let told: Vec<_> = history["deliveries"].as_array().unwrap().iter().collect();
    assert_eq!(told.len(), 2, "{history}");
    for (told, automatic, n) in [(told[0], false, 2), (told[1], true, 1)] {
        assert_eq!(
            (&told["is_automatic"], &told["status"], &told["attempt_count"], &told["failure_reason_code"]),
            (&json!(automatic), &json!("delivered"), &json!(1), &Value::Null),
            "{history}"
        );
        assert_eq!(told["attempts"].as_array().unwrap().len(), 1, "{history}");
        assert_eq!(told["attempts"][0]["attempt_number"], json!(n), "{history}");
    }
    assert!(told[1]["completed_at"].as_str() < told[0]["completed_at"].as_str(), "{history}");
}

async fn a_run_ends_with_runflows_body(backend: Backend) {
    let Some(server) = Server::start(backend, "", MODEL).await else { return };
    server.tracker().await;
    let api = &server.api;
    let body = json!({"input": {"text": "hi"}, "callback_url": CALLBACK, "metadata": {"order": 7}});
    let run = api.post("/v1/models/acme/tts/runs", &body).await.expect(201);
    assert_eq!(
        (&run["status_code"], &run["model"], &run["metadata"], &run["output"]),
        (&json!("queued"), &json!("acme/tts"), &json!({"order": 7}), &Value::Null)
    );
    assert!(run["created_at"].as_str().unwrap().ends_with("+00:00"), "{run}");
    assert!(!run.to_string().contains("canary"), "{run}");
    let id = run["id"].as_str().unwrap().to_owned();
    assert_eq!(uuid::Uuid::parse_str(&id).unwrap().get_version_num(), 7);
    let again = format!("/v1/runs/{id}/callback-redeliveries");
    let early = api.post(&again, &json!({})).await;
    assert_eq!((early.status, early.field("error_type")), (422, "not_terminal"), "{}", early.text);
    let attempt = server.attempt(&id, 1);
    attempt.start().await;
    attempt.succeed_with("{\"url\" : \"https://x\", \"n\": 1e400}").await;
    let raw = api.get(&format!("/v1/runs/{id}")).await;
    assert!(raw.text.ends_with(",\"output\":{\"url\" : \"https://x\", \"n\": 1e400}}"), "{}", raw.text);
    // What the receiver gets, as the feed has it.
    let feed = api.get(&format!("/v1/events?job={id}")).await.expect(200);
    assert_eq!(feed["events"].as_array().unwrap().len(), 1, "terminal only: {feed}");
    let event = &feed["events"][0];
    let text = event["body"].as_str().unwrap();
    assert!(text.starts_with(&format!(
        "{{\"event\":\"run.completed\",\"run_id\":\"{id}\",\"status\":\"succeeded\","
    )));
    assert!(text.contains("\"output\":{\"url\" : \"https://x\", \"n\": 1e400},\"duration_ms\":"), "{text}");
    assert!(text.ends_with("+00:00\",\"metadata\":{\"order\":7}}"), "{text}");
    let secret = api.get("/v1/webhooks/default/secret").await.json["secret"].as_str().unwrap().to_owned();
    let signature = event["headers"]["runflow-signature"].as_str().unwrap();
    runflow::verify(&[runflow::key(&secret).unwrap()], signature, text.as_bytes()).unwrap();
    assert!(event["headers"]["webhook-signature"].as_str().unwrap().starts_with("v1,"));
    // On its way: a second one conflicts.
    let conflict = api.post(&again, &json!({})).await;
    assert_eq!(
        (conflict.status, conflict.field("code"), conflict.field("error_type")),
        (422, "validation_error", "conflict"),
        "{}",
        conflict.text
    );
    settle(&server, backend).await;
    let history = api.get(&format!("/v1/runs/{id}/callback")).await.expect(200);
    let told = &history["deliveries"][0];
    assert_eq!(history["callback_url"], "http://127.0.0.1:9/callback");
    assert_eq!(
        (&told["is_automatic"], &told["attempt_count"], &told["max_attempts"], &told["failure_reason_code"]),
        (&json!(true), &json!(1), &json!(10), &Value::Null),
        "{history}"
    );
    assert_eq!(told["payload_bytes"], json!(text.len()));
    assert_eq!(
        (&told["attempts"][0]["status_code"], &told["attempts"][0]["response_time_ms"]),
        (&json!(200), &json!(20))
    );
    let delivery = told["id"].as_str().unwrap();
    for path in [format!("any/deliveries/{delivery}"), "any/deliveries/any".to_owned()] {
        let tries = api.get(&format!("/v1/webhooks/{path}/attempts")).await.expect(200);
        let first = &tries["attempts"][0];
        assert_eq!(
            (&first["status_code"], &first["delivery_id"]),
            (&json!(200), &json!(delivery)),
            "{tries}"
        );
    }
    let theirs = server.other().get(&format!("/v1/webhooks/any/deliveries/{delivery}/attempts")).await;
    assert_eq!(theirs.status, 404);
    let made = api.post(&again, &json!({})).await.expect(202);
    assert_eq!((&made["run_id"], &made["is_automatic"]), (&json!(id), &json!(false)));
    assert_eq!(api.post(&again, &json!({})).await.status, 422, "a second one while the first runs");
    a_redelivery_keeps_the_first_success(&server, backend, &id, delivery).await;
    // Without a callback, and others' runs.
    let silent = api.post("/v1/models/acme/tts/runs", &json!({"input": 1})).await.expect(201);
    let silent = silent["id"].as_str().unwrap();
    let cancelled = api.post(&format!("/v1/runs/{silent}/cancel"), &json!({})).await.expect(200);
    assert_eq!((&cancelled["status_code"], &cancelled["output"]), (&json!("canceled"), &Value::Null));
    let none = api.post(&format!("/v1/runs/{silent}/callback-redeliveries"), &json!({})).await;
    assert_eq!((none.status, none.field("error_type")), (422, "no_callback_url"));
    for path in [format!("/v1/runs/{id}"), format!("/v1/runs/{id}/callback"), "/v1/runs/x".to_owned()] {
        let reply = server.other().get(&path).await;
        assert_eq!((reply.status, reply.field("code")), (404, "not_found"), "{path}");
    }
    assert_eq!(server.other().post(&again, &json!({})).await.status, 404);
    assert_eq!(server.other().post("/v1/models/acme/tts/runs", &json!({"input": 1})).await.status, 404);
    for (body, status) in [
        (json!({}), 400),
        (json!({"input": 1, "callback_url": "https://10.0.0.1/"}), 400),
        (json!({"input": 1, "callback_url": 5}), 400),
    ] {
        let reply = api.post("/v1/models/acme/tts/runs", &body).await;
        assert_eq!((reply.status, reply.field("code")), (status, "validation_error"), "{}", reply.text);
    }
    // RunPod's route knows no callback_url.
    let job = api.run("echo", &json!({"input": 1, "callback_url": CALLBACK})).await;
    let reply = api.post(&format!("/v1/runs/{job}/callback-redeliveries"), &json!({})).await;
    assert_eq!(reply.field("error_type"), "no_callback_url");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_ends_with_runflows_body_on_sqlite() {
    a_run_ends_with_runflows_body(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_ends_with_runflows_body_on_postgres() {
    a_run_ends_with_runflows_body(Backend::Postgres).await;
}

async fn a_batch_of_a_model_ends_with_runflows_body(backend: Backend) {
    let Some(server) = Server::start(backend, "", MODEL).await else { return };
    server.tracker().await;
    let api = &server.api;
    let body = json!({"model": "acme/tts", "items": [{"input": 1, "client_ref": "a"}, {"input": 2}],
                      "callback_url": CALLBACK, "metadata": {"k": 1}});
    let made = api.post("/v1/batches", &body).await.expect(201);
    assert_eq!((&made["status_code"], &made["items_total"]), (&json!("running"), &json!(2)), "{made}");
    let id = made["batch_id"].as_str().unwrap();
    let jobs: Vec<&str> = made["job_ids"].as_array().unwrap().iter().map(|j| j.as_str().unwrap()).collect();
    server.attempt(jobs[0], 1).succeed_with("1").await;
    server.attempt(jobs[1], 1).fail("no").await;
    let feed = api.get(&format!("/v1/events?batch={id}")).await.expect(200);
    assert_eq!(feed["events"].as_array().unwrap().len(), 1, "{feed}");
    let event = &feed["events"][0];
    let told: Value = serde_json::from_str(event["body"].as_str().unwrap()).unwrap();
    assert_eq!(
        (&told["event"], &told["batch_id"], &told["status"], &told["metadata"]),
        (&json!("batch.partial_succeeded"), &json!(id), &json!("partial_succeeded"), &json!({"k": 1}))
    );
    let output = &told["output"];
    assert_eq!(
        (&output["succeeded"], &output["failed"], &output["cancelled"], &output["total"]),
        (&json!(1), &json!(1), &json!(0), &json!(2))
    );
    assert_eq!(
        output["items"][0],
        json!({"sequence_index": 0, "run_id": jobs[0], "status_code": "succeeded", "client_ref": "a"})
    );
    assert!(event["headers"]["runflow-signature"].is_string(), "{event}");
    let shown = api.get(&format!("/v1/batches/{id}")).await.expect(200);
    assert_eq!(
        (&shown["items_succeeded"], &shown["items_failed"], &shown["status_code"]),
        (&json!(1), &json!(1), &json!("partial_succeeded"))
    );
    let again = format!("/v1/batches/{id}/callback-redeliveries");
    assert_eq!(api.post(&again, &json!({})).await.status, 422, "it is pending");
    settle(&server, backend).await;
    assert_eq!(api.post(&again, &json!({})).await.expect(202)["batch_id"], json!(id));
    let history = api.get(&format!("/v1/batches/{id}/callback")).await.expect(200);
    assert_eq!(history["deliveries"].as_array().unwrap().len(), 1, "{history}");
    let both = json!({"model": "acme/tts", "endpoint": "echo", "items": [{"input": 1}]});
    assert_eq!(api.post("/v1/batches", &both).await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_a_model_ends_with_runflows_body_on_sqlite() {
    a_batch_of_a_model_ends_with_runflows_body(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_a_model_ends_with_runflows_body_on_postgres() {
    a_batch_of_a_model_ends_with_runflows_body(Backend::Postgres).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callback_secrets_are_shown_once_and_live_side_by_side() {
    let Some(server) = Server::start(Backend::Sqlite, "", MODEL).await else { return };
    let api = &server.api;
    let first = api.get("/v1/callback-secrets").await.expect(200);
    let only = first["data"][0]["id"].as_str().unwrap().to_owned();
    let last = api.call(Method::DELETE, &format!("/v1/callback-secrets/{only}"), None).await;
    assert_eq!(last.status, 422, "{}", last.text);
    let made = api.post("/v1/callback-secrets", &json!({"label": "second"})).await.expect(201);
    let plain = made["plain_secret"].as_str().unwrap().to_owned();
    assert!(plain.starts_with("whsec_"), "{made}");
    assert_eq!(
        (&made["label"], &made["is_current"], &made["disabled_at"], &made["last_used_at"]),
        (&json!("second"), &json!(true), &Value::Null, &Value::Null)
    );
    assert!(plain.starts_with(made["key_prefix"].as_str().unwrap()) && made["key_prefix"] != json!(plain));
    let both = api.get("/v1/callback-secrets").await.expect(200);
    assert_eq!(both["data"].as_array().unwrap().len(), 2);
    assert!(!both.to_string().contains(&plain), "{both}");
    assert_eq!((&both["data"][0]["id"], &both["data"][1]["is_current"]), (&made["id"], &json!(false)));
    assert_eq!(api.call(Method::DELETE, &format!("/v1/callback-secrets/{only}"), None).await.status, 204);
    let theirs = server.other().call(Method::DELETE, "/v1/callback-secrets/1", None).await;
    assert!(matches!(theirs.status, 404 | 422), "another project's is unknown: {}", theirs.text);
    assert_eq!(api.get("/v1/callback-secrets").await.json["data"].as_array().unwrap().len(), 1);
    let long = api.post("/v1/callback-secrets", &json!({"label": "x".repeat(256)})).await;
    assert_eq!((long.status, long.field("code")), (400, "validation_error"));
    assert_eq!(server.read_only().get("/v1/callback-secrets").await.status, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_of_the_configuration_are_changed_there() {
    let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let Some(mut server) = Server::start(Backend::Sqlite, "", MODEL).await else { return };
    server.config.projects.get_mut("default").unwrap().webhook_secrets =
        vec![serde_json::from_value(json!({"secret": secret})).unwrap()];
    let api = server.second().await;
    for (path, body) in [("/v1/webhooks/default/secret", json!({})), ("/v1/callback-secrets", json!({}))] {
        let reply = api.post(path, &body).await;
        assert_eq!(reply.status, 409, "{}", reply.text);
        assert!(reply.text.contains("webhook_secrets"), "{}", reply.text);
    }
    assert_eq!(api.get("/v1/webhooks/default/secret").await.json["secret"], secret);
}
