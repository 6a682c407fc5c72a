//! What is answered: ends, files, purges, keys, limits, errors.

use std::time::Duration;

use http::Method;
use ringback_contracts::v1;
use ringback_service_runtime::blobs::BlobKey;
use ringback_test_support::stack::Backend;
use ringback_test_support::wait::{until, until_true};
use serde_json::json;

use crate::common::Server;

#[tokio::test(flavor = "multi_thread")]
async fn ends_are_shown_as_webhooks_tell_them() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.tracker().await;
    let id = server.api.run("echo", &json!({"input": 1})).await;
    server.attempt(&id, 1).fail("no \"voice\"").await;
    let job = server.api.status("echo", &id).await.expect(200);
    assert_eq!(
        (&job["status"], &job["error"], &job["output"]["error"]),
        (&json!("FAILED"), &json!("no \"voice\""), &json!("no \"voice\""))
    );
    assert!(job["delayTime"].is_u64() && job["executionTime"] == 12, "{job}");
    let native = server.api.job(&id).await;
    assert_eq!(
        (&native["error"], &native["attempt"], &native["run"]),
        (&json!("no \"voice\""), &json!(1), &json!(1))
    );
    let told: Vec<_> =
        native["history"].as_array().unwrap().iter().map(|h| h["status"].as_str().unwrap()).collect();
    assert_eq!(told, ["IN_QUEUE", "IN_PROGRESS", "FAILED"]);
    assert_eq!(server.api.get(&format!("/v1/jobs/{id}/logs")).await.text, "one line\n");
    // Retry drops the old result.
    let running = server.api.post(&format!("/v1/jobs/{id}/retry"), &json!({})).await.expect(200);
    assert_eq!(
        (&running["status"], &running["run"], &running["error"]),
        (&json!("IN_QUEUE"), &json!(2), &json!(null))
    );
    let again = server.api.post(&format!("/v2/echo/retry/{id}"), &json!({})).await;
    assert!(again.status == 409 && again.text.contains("IN_QUEUE"), "{}", again.text);
    let health = server.api.get("/v2/echo/health").await.expect(200);
    assert_eq!(
        health["jobs"],
        json!({"completed": 0, "failed": 1, "inProgress": 0, "inQueue": 1, "retried": 1})
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_output_is_streamed_from_its_blob() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.tracker().await;
    let id = server.api.run("echo", &json!({"input": 1})).await;
    let text = format!("\"{}\"", "y".repeat(3_000_000));
    let key = BlobKey::new(format!("out/{id}/1-1-7")).unwrap();
    server.blobs().put(&key, text.clone().into()).await.unwrap();
    let payload = v1::Payload {
        size_bytes: text.len() as u64,
        at: Some(v1::payload::At::BlobKey(key.as_str().to_owned())),
    };
    server.attempt(&id, 1).succeed(payload).await;
    let reply = server.api.status("echo", &id).await;
    assert_eq!(reply.json["output"].as_str().map(str::len), Some(3_000_000));
    assert_eq!(reply.headers["content-length"].to_str().unwrap(), reply.text.len().to_string());
    let native = server.api.job(&id).await;
    assert!(native.get("output").is_none(), "large outputs have a link");
    assert_eq!(native["output_bytes"], 3_000_002);
    let path = native["output_url"].as_str().unwrap().strip_prefix(server.api.base()).unwrap().to_owned();
    assert_eq!(server.api.get(&path).await.text, text);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_takes_what_is_queued_and_nothing_else() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.tracker().await;
    let running = server.api.run("echo", &json!({"input": 0})).await;
    server.attempt(&running, 1).start().await;
    let elsewhere = server.api.run("loud", &json!({"input": 0})).await;
    let ids = futures::future::join_all((0..30).map(|n| {
        let api = server.api.clone();
        async move { api.run("echo", &json!({"input": n})).await }
    }))
    .await;
    let refused = server.submit_only().post("/v2/echo/purge-queue", &json!({})).await;
    assert!(refused.status == 403 && refused.text.contains("admin"), "{}", refused.text);
    let purged = server.api.post("/v2/echo/purge-queue", &json!({})).await.expect(200);
    assert_eq!(purged, json!({"removed": 30, "status": "completed"}));
    for id in &ids {
        assert_eq!(server.api.status("echo", id).await.expect(200)["status"], "CANCELLED");
    }
    assert_eq!(server.api.status("echo", &running).await.expect(200)["status"], "IN_PROGRESS");
    assert_eq!(server.api.status("loud", &elsewhere).await.expect(200)["status"], "IN_QUEUE");
    let again = server.api.post("/v1/endpoints/echo/purge", &json!({})).await.expect(200);
    assert_eq!(again["removed"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_open_what_their_scopes_say() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    let id = server.api.run("echo", &json!({"input": 1})).await;
    let (status, run) = (format!("/v2/echo/status/{id}"), "/v2/echo/run");
    let body = json!({"input": 1});
    assert_eq!(server.submit_only().post(run, &body).await.status, 200);
    assert_eq!(server.submit_only().get(&status).await.status, 403);
    assert_eq!(server.read_only().get(&status).await.status, 200);
    assert_eq!(server.read_only().post(run, &body).await.status, 403);
    assert_eq!(server.read_only().get("/v1/webhooks/default/secret").await.status, 403);
    let secret = server.api.get("/v1/webhooks/default/secret").await.expect(200);
    assert!(secret["secret"].as_str().unwrap().starts_with("whsec_"), "{secret}");
    assert_eq!(server.read_only().get("/metrics").await.status, 403);
    assert_eq!(server.api.get("/metrics").await.status, 200);
    let stranger = server.api.with_key("rb_wrong_0123456789");
    let reply = stranger.get(&status).await;
    assert_eq!((reply.status, reply.headers["www-authenticate"].to_str().unwrap()), (401, "Bearer"));
    assert_eq!(server.other().get(&status).await.status, 404, "another project's job");
    // A key that is taken away stops working within seconds.
    server.sql().await.execute("UPDATE api_keys SET disabled_at_ms = 1 WHERE name = 'read'").await;
    let read_only = server.read_only();
    until_true("the key to be refused", Duration::from_secs(10), || async {
        read_only.get(&status).await.status == 401
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_rate_size_and_disk_have_their_answers() {
    let section = "submits_per_10s = 5\nmax_body_bytes = 2000\nmax_runsync_body_bytes = 3000";
    let Some(server) = Server::start(Backend::Sqlite, section, "").await else { return };
    let body = json!({"input": "x".repeat(2_500)});
    let reply = server.api.post("/v2/echo/run", &body).await;
    assert!(
        reply.status == 413 && reply.text.contains("2000") && reply.text.contains("max_body_bytes"),
        "{}",
        reply.text
    );
    let reply = server.api.post("/v2/echo/runsync?wait=1000", &body).await;
    assert_eq!(reply.status, 200, "its own limit: {}", reply.text);
    // Without a length that was told before, the bytes are counted as they come.
    let pieces: Vec<Result<&str, std::io::Error>> = vec![Ok("{\"input\":\""), Ok("yyyyyyyyyy")];
    let endless = futures::stream::iter(pieces.into_iter().chain((0..500).map(|_| Ok("zzzzzzzzzz"))));
    let reply = server
        .api
        .send(Method::POST, "/v2/echo/run", &[], reqwest::Body::wrap_stream(endless))
        .await
        .unwrap();
    assert_eq!(reply.status, 413, "{}", reply.text);
    let refused = until("the rate to be used up", Duration::from_secs(5), || async {
        let reply = server.api.post("/v2/echo/run", &json!({"input": 1})).await;
        (reply.status == 429).then_some(reply)
    })
    .await;
    let seconds: u64 = refused.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=10).contains(&seconds), "{seconds}");
    assert!(refused.text.contains("submits_per_10s"), "{}", refused.text);
    assert_eq!(server.other().post("/v2/echo/run", &json!({"input": 1})).await.status, 200, "P9");
    let section = "disk_floor_bytes = 9000000000000000000";
    let Some(full) = Server::start(Backend::Sqlite, section, "").await else { return };
    let reply = full.api.post("/v2/echo/run", &json!({"input": 1})).await;
    assert!(reply.status == 507 && reply.text.contains("disk_floor_bytes"), "{}", reply.text);
    let reply = full.api.post("/v1/batches", &json!({"endpoint": "echo", "items": [{"input": 1}]})).await;
    assert_eq!(reply.status, 507, "{}", reply.text);
    assert_eq!(full.api.get("/v2/echo/health").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_says_so_in_the_shape_of_its_route() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    let api = &server.api;
    let document = api.get("/openapi.json").await.expect(200);
    assert_eq!(document["openapi"], "3.1.0");
    for (method, path, status) in [
        (Method::GET, "/v2/echo/run", 405),
        (Method::DELETE, "/v2/echo/status/x", 405),
        (Method::GET, "/v2/echo/nothing", 404),
        (Method::GET, "/v2/echo/status/%FF", 400),
        (Method::POST, "/v2/a%2Ab/run", 404),
        (Method::POST, "/v2/%2E%2E%2Fx/run", 404),
        (Method::POST, "/v2/x%00/run", 404),
        (Method::POST, "/v2/%3E/run", 404),
        (Method::GET, "/v2/echo/status/%2A", 404),
        (Method::POST, "/v2/echo/cancel/17", 404),
        (Method::POST, "/v2/echo/runsync?wait=soon", 400),
    ] {
        let reply = api.call(method.clone(), path, Some(&json!({"input": 1}))).await;
        assert_eq!(reply.status, status, "{method} {path}: {}", reply.text);
        assert!(reply.json["error"].is_string(), "{method} {path}: {}", reply.text);
    }
    let reply = api.call(Method::POST, "/v2/a%2Ab/run", Some(&json!({"input": 1}))).await;
    assert!(reply.text.contains("found '*'"), "{}", reply.text);
    for (method, path, status) in [
        (Method::GET, "/nothing", 404),
        (Method::DELETE, "/v1/jobs", 405),
        (Method::GET, "/v1/jobs/%FF", 400),
        (Method::GET, "/v1/jobs/17", 404),
        (Method::GET, "/v1/jobs?limit=0", 400),
        (Method::GET, "/v1/jobs?status=RUNNING", 400),
        (Method::GET, "/v1/jobs?cursor=x", 400),
        (Method::GET, "/v1/batches/17", 404),
        (Method::GET, "/v1/stream?batch=17", 400),
    ] {
        let reply = api.call(method.clone(), path, None).await;
        assert_eq!(reply.status, status, "{method} {path}: {}", reply.text);
        assert_eq!(reply.headers["content-type"], "application/problem+json", "{method} {path}");
        assert_eq!(reply.json["status"], status, "{}", reply.text);
    }
    let reply = api.post("/v1/jobs", &json!({"endpoint": "echo", "input": 1, "policy": {"ttl": 1}})).await;
    assert_eq!(reply.json["errors"][0]["pointer"], "/policy/ttl", "{}", reply.text);
    assert!(reply.text.contains("server.min_ttl_ms"), "{}", reply.text);
}
