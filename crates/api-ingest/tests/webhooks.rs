//! Registered webhooks over HTTP: made, shown, changed, taken away; their secrets; test sends; replays; deliveries.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::Server;
use http::Method;
use ringback_domain::webhook::signature::{SigningKey, verify};
use ringback_test_support::{client::Client, stack::Backend};
use serde_json::{Value, json};

async fn send(api: &Client, method: Method, path: &str, body: Option<Value>) -> (u16, Value) {
    let reply = api.call(method, path, body.as_ref()).await;
    (reply.status, reply.json)
}

async fn a_webhook_lives_and_dies(backend: Backend) {
    let Some(server) = Server::start(backend, "", "").await else { return };
    let api = &server.api;
    // Row C6: url, events, secret; null = one is made.
    let (status, made) = send(
        api,
        Method::POST,
        "/webhooks",
        Some(
            json!({"url": "https://hooks.example.com/x?key=canary-url", "events": ["job.*"], "secret": null}),
        ),
    )
    .await;
    assert_eq!(status, 201, "{made}");
    let id = made["id"].as_str().unwrap().to_owned();
    assert!(id.starts_with("wh_") && id.len() == 35, "{id}");
    let secret = made["secret"].as_str().unwrap().to_owned();
    assert!(secret.starts_with("whsec_"), "{made}");
    assert_eq!(made["secret_form"], "standard");
    let (_, listed) = send(api, Method::GET, "/v1/webhooks", None).await;
    assert_eq!(listed["webhooks"].as_array().unwrap().len(), 1, "{listed}");
    let shown = &listed["webhooks"][0];
    assert_eq!(
        (&shown["id"], &shown["events"], &shown["state"], &shown["format"]),
        (&json!(id), &json!(["job.*"]), &json!("active"), &json!("standard"))
    );
    assert_eq!(shown["health"]["state"], "unknown");
    assert!(!listed.to_string().contains(&secret), "a secret is shown once: {listed}");
    // A key that may only read sees no credentials of a URL.
    let read = server.read_only().get(&format!("/v1/webhooks/{id}")).await.expect(200);
    assert_eq!(read["url"], "https://hooks.example.com/x");
    // Its place in SQL is encrypted.
    let sql = server.sql().await;
    let changes = |texts: Vec<Vec<String>>| texts.concat().concat();
    let revision = changes(sql.texts("SELECT value FROM meta WHERE key = 'registry_revision'", 1).await);
    // PATCH changes what it names.
    let path = format!("/webhooks/{id}");
    let patch = json!({"paused": true, "label": "mine", "headers": {"X-Token": "canary-header"},
                       "retry": {"profile": "runpod-strict"}, "rate_per_second": 5, "deadline_ms": 2000,
                       "endpoints": ["echo"], "metadata": {"team": "a"}, "strict_order": true});
    let (status, now) = send(api, Method::PATCH, &path, Some(patch)).await;
    assert_eq!(status, 200, "{now}");
    assert_eq!(
        (&now["state"], &now["label"], &now["headers"], &now["retry"]["profile"], &now["rate_per_second"]),
        (
            &json!("paused"),
            &json!("mine"),
            &json!({"x-token": "[redacted]"}),
            &json!("runpod-strict"),
            &json!(5)
        )
    );
    assert_eq!((&now["endpoints"], &now["metadata"]), (&json!(["echo"]), &json!({"team": "a"})));
    assert_eq!(now["url"], made["url"], "what is not named stays");
    assert_ne!(
        revision,
        changes(sql.texts("SELECT value FROM meta WHERE key = 'registry_revision'", 1).await),
        "whoever tells of events must notice"
    );
    let (_, resumed) = send(api, Method::PATCH, &path, Some(json!({"paused": false}))).await;
    assert_eq!(
        (&resumed["state"], &resumed["headers"]),
        (&json!("active"), &json!({"x-token": "[redacted]"}))
    );
    let (status, refused) = send(api, Method::PATCH, &path, Some(json!({"secret": "x"}))).await;
    assert_eq!((status, &refused["errors"][0]["pointer"]), (400, &json!("/secret")));
    // Other projects, other scopes.
    for path in [format!("/v1/webhooks/{id}"), format!("/v1/webhooks/{id}/secrets")] {
        let theirs = server.other().get(&path).await;
        let unknown = server.other().get(&path.replace(&id, "wh_00000000000000000000000000000000")).await;
        assert_eq!((theirs.status, &theirs.text), (404, &unknown.text), "{path}");
    }
    let theirs = server.other().call(Method::DELETE, &path, None).await;
    assert_eq!(theirs.status, 404);
    let theirs = server.other().call(Method::PATCH, &path, Some(&json!({"paused": true}))).await;
    assert_eq!(theirs.status, 404);
    assert_eq!(server.read_only().post("/v1/webhooks", &json!({})).await.status, 403);
    assert_eq!(server.submit_only().call(Method::DELETE, &path, None).await.status, 403);
    // Gone.
    assert_eq!(api.call(Method::DELETE, &path, None).await.status, 204);
    assert_eq!(api.call(Method::DELETE, &path, None).await.status, 404);
    assert_eq!(api.get(&path).await.status, 404);
    assert_eq!(api.get("/webhooks").await.expect(200), json!({"webhooks": []}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_lives_and_dies_on_sqlite() {
    a_webhook_lives_and_dies(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_lives_and_dies_on_postgres() {
    a_webhook_lives_and_dies(Backend::Postgres).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_name_the_field_and_quote_no_secret() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    let good = json!({"url": "https://hooks.example.com/x", "events": ["*"]});
    for (name, value, pointer) in [
        ("url", json!("https://10.0.0.1/"), "/url"),
        ("events", json!(["job.nope"]), "/events/0"),
        ("events", json!([]), "/events"),
        ("endpoints", json!(["echo", ""]), "/endpoints/1"),
        ("metadata", json!({"tenant": [1]}), "/metadata/tenant"),
        ("secret", json!(["canary-1"]), "/secret"),
        ("secret", json!(""), "/secret"),
        ("secret", json!("canary-1".repeat(100)), "/secret"),
        ("headers", json!({"x-a": "canary-1\r\nHost: evil"}), "/headers/x-a"),
        ("expires_in_seconds", json!(1), "/expires_in_seconds"),
    ] {
        let mut body = good.clone();
        body[name] = value;
        let reply = server.api.post("/v1/webhooks", &body).await;
        assert_eq!(reply.status, 400, "{}", reply.text);
        assert_eq!(reply.json["errors"][0]["pointer"], pointer, "{}", reply.text);
        let detail = reply.json["detail"].as_str().expect("a detail");
        let place = format!("`{}` ", pointer.trim_start_matches('/').replace('/', "."));
        let rest = detail.strip_prefix(&place).expect("a detail that begins with its field");
        assert_eq!(Some(rest), reply.json["errors"][0]["detail"].as_str(), "{}", reply.text);
        assert!(!rest.starts_with(name), "the field is named once: {}", reply.text);
        assert!(!reply.text.contains("canary-1"), "{}", reply.text);
    }
    for body in ["", "[]", "{\"url\":", "null", "{\"url\": null, \"url\": 5}"] {
        let reply = server.api.send(Method::POST, "/v1/webhooks", &[], body.to_owned()).await.unwrap();
        assert_eq!(reply.status, 400, "{body}: {}", reply.text);
    }
    for id in ["x", "%00", "..%2f..", "wh_%27%20OR%201=1", &"x".repeat(3000)] {
        let reply = server.api.get(&format!("/v1/webhooks/{id}")).await;
        assert!(matches!(reply.status, 400 | 404 | 414 | 431), "{id}: {} {}", reply.status, reply.text);
    }
    // At most 200 of them.
    let sql = server.sql().await;
    for n in 0..200 {
        sql.execute(&format!(
            "INSERT INTO webhooks (public_id, project_id, label, format, filter, strict_order, paused, enable_epoch, \
             created_at_ms, updated_at_ms) SELECT 'wh_{n}', id, '', 0, '{{\"events\":[\"*\"]}}', 0, 0, 1, 1, 1 \
             FROM projects WHERE name = 'default'"
        ))
        .await;
    }
    let reply = server.api.post("/v1/webhooks", &good).await;
    assert_eq!(reply.status, 409, "{}", reply.text);
    // One that has expired is gone and makes room.
    sql.execute("UPDATE webhooks SET expires_at_ms = 5 WHERE public_id = 'wh_7'").await;
    assert_eq!(server.api.get("/v1/webhooks/wh_7").await.status, 404);
    assert_eq!(server.api.post("/v1/webhooks", &good).await.status, 201);
    // One that was deleted keeps its row, for the name of its deliveries.
    assert_eq!(server.api.call(Method::DELETE, "/v1/webhooks/wh_8", None).await.status, 204);
    assert_eq!(server.api.post("/v1/webhooks", &good).await.status, 201);
    assert_eq!(sql.count("SELECT COUNT(*) FROM webhooks WHERE public_id = 'wh_8'").await, 1);
}

async fn secrets_rotate_with_overlap(backend: Backend) {
    let Some(server) = Server::start(backend, "", "").await else { return };
    let api = &server.api;
    let body = json!({"url": null, "events": ["*"], "secret": "my own canary words"});
    let made = api.post("/v1/webhooks", &body).await.expect(201);
    assert_eq!((&made["secret"], &made["secret_form"]), (&json!("my own canary words"), &json!("raw")));
    assert!(made["secret_note"].as_str().unwrap().contains("bytes"), "{made}");
    let path = format!("/v1/webhooks/{}/secrets", made["id"].as_str().unwrap());
    let first = api.get(&path).await.expect(200);
    assert!(!first.to_string().contains("canary"), "{first}");
    assert_eq!(
        (&first["secrets"][0]["form"], &first["secrets"][0]["expires_at"]),
        (&json!("raw"), &Value::Null)
    );
    let only = first["secrets"][0]["id"].as_str().unwrap().to_owned();
    assert_eq!(api.call(Method::DELETE, &format!("{path}/{only}"), None).await.status, 409);
    // A new one signs at once, the old one for two hours more.
    let added = api.post(&path, &json!({"expire_old_after_hours": 2})).await.expect(201);
    assert!(added["secret"].as_str().unwrap().starts_with("whsec_"), "{added}");
    assert_eq!(added["current"], true);
    let both = api.get(&path).await.expect(200);
    assert_eq!(both["secrets"].as_array().unwrap().len(), 2, "{both}");
    assert_eq!((&both["secrets"][0]["id"], &both["secrets"][0]["expires_at"]), (&added["id"], &Value::Null));
    assert!(both["secrets"][1]["expires_at"].is_string(), "{both}");
    assert!(!both.to_string().contains(added["secret"].as_str().unwrap()));
    // At most ten sign at once.
    for n in 2..10 {
        let reply = api.send(Method::POST, &path, &[], "").await.unwrap();
        assert_eq!(reply.status, 201, "{n}: {}", reply.text);
    }
    let eleventh = api.post(&path, &json!({})).await;
    assert_eq!(eleventh.status, 409, "{}", eleventh.text);
    assert_eq!(api.get(&path).await.json["secrets"].as_array().unwrap().len(), 10);
    // The old one can go at once; with no overlap all others do.
    assert_eq!(api.call(Method::DELETE, &format!("{path}/{only}"), None).await.status, 204);
    assert_eq!(api.call(Method::DELETE, &format!("{path}/{only}"), None).await.status, 404);
    api.post(&path, &json!({"expire_old_after_hours": 0})).await.expect(201);
    assert_eq!(api.get(&path).await.json["secrets"].as_array().unwrap().len(), 1);
    for bad in
        [json!({"expire_old_after_hours": -1}), json!({"expire_old_after_hours": "1"}), json!({"hours": 1})]
    {
        assert_eq!(api.post(&path, &bad).await.status, 400, "{bad}");
    }
    // The project's own.
    let path = "/v1/webhooks/default/secret";
    let before = api.get(path).await.expect(200);
    let rotated = api.post(path, &json!({"label": "second"})).await.expect(201);
    assert_ne!(before["secret"], rotated["secret"]);
    assert_eq!(rotated["secrets"][1]["secret"], before["secret"]);
    assert!(rotated["secrets"][1]["expires_at"].is_string(), "{rotated}");
    assert_eq!(rotated["secrets"][0]["label"], "second");
    assert_eq!(server.read_only().get(path).await.status, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_rotate_with_overlap_on_sqlite() {
    secrets_rotate_with_overlap(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_rotate_with_overlap_on_postgres() {
    secrets_rotate_with_overlap(Backend::Postgres).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_catalogue_has_a_schema_and_an_example_per_type() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    let all = server.read_only().get("/v1/webhooks/event-types").await.expect(200);
    let types = all["event_types"].as_array().unwrap();
    assert_eq!(types.len(), ringback_domain::event::EventType::ALL.len());
    for t in types {
        assert_eq!(t["type"], t["example"]["type"], "{t}");
        assert!(t["schema"]["properties"]["data"].is_object() && t["description"].is_string(), "{t}");
        let listens = json!({"url": null, "events": [t["type"]]});
        server.api.post("/v1/webhooks", &listens).await.expect(201);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_goes_to_one_webhook_and_can_be_looked_up() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    let api = &server.api;
    let hook = api.post("/v1/webhooks", &json!({"url": null, "events": ["job.failed"]})).await.expect(201);
    let other = api.post("/v1/webhooks", &json!({"url": null, "events": ["*"]})).await.expect(201);
    let id = hook["id"].as_str().unwrap();
    let sent = api.post(&format!("/v1/webhooks/{id}/test"), &json!({})).await.expect(202);
    let delivery = sent["delivery_id"].as_str().unwrap();
    let shown = api.get(&format!("/v1/deliveries/{delivery}")).await.expect(200);
    assert_eq!((&shown["type"], &shown["webhook"]), (&json!("webhook.test"), &json!(id)), "{shown}");
    assert_eq!(server.other().get(&format!("/v1/deliveries/{delivery}")).await.status, 404);
    let listed =
        api.get(&format!("/v1/deliveries?webhook={}", other["id"].as_str().unwrap())).await.expect(200);
    assert_eq!(listed["deliveries"], json!([]), "the other one hears nothing");
    let listed =
        api.get(&format!("/v1/deliveries?webhook={id}&type=webhook.*&state=pending,delivered")).await;
    assert_eq!(listed.expect(200)["deliveries"].as_array().unwrap().len(), 1);
    // The same, signed, from the feed.
    let feed = api.get(&format!("/v1/events?webhook={id}")).await.expect(200);
    let event = &feed["events"][0];
    let keys = [SigningKey::parse(hook["secret"].as_str().unwrap()).unwrap().0];
    let header = |name: &str| event["headers"][name].as_str().unwrap();
    let body = event["body"].as_str().unwrap();
    let now_s = ringback_service_runtime::time::now_ms() / 1000;
    verify(
        &keys,
        header("webhook-id"),
        header("webhook-timestamp"),
        header("webhook-signature"),
        body.as_bytes(),
        now_s,
    )
    .unwrap();
    assert_eq!(header("webhook-id"), delivery);
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!((&body["type"], &body["data"]["webhook_id"]), (&json!("webhook.test"), &json!(id)));
    assert_eq!(server.other().post(&format!("/v1/webhooks/{id}/test"), &json!({})).await.status, 404);
}

/// Ends a delivery as a dispatcher would.
async fn settle(server: &Server, state: u8) {
    server
        .sql()
        .await
        .execute(&format!(
            "UPDATE deliveries SET state = {state}, attempts = 3, ended_at_ms = created_at_ms + 5, \
             next_attempt_at_ms = NULL, last_status = 500, last_error = 'no' WHERE state = 0"
        ))
        .await;
}

async fn deliveries_are_found_and_sent_again(backend: Backend) {
    let Some(server) = Server::start(backend, "", "").await else { return };
    let api = &server.api;
    let mut jobs = Vec::new();
    for n in 0..5 {
        jobs.push(api.run("echo", &json!({"input": n, "webhookv2": "http://127.0.0.1:9/x?k=canary"})).await);
    }
    let page = api.get("/v1/deliveries?limit=3").await.expect(200);
    let all = page["deliveries"].as_array().unwrap();
    assert_eq!((all.len(), &all[0]["type"], &all[0]["state"]), (3, &json!("job.queued"), &json!("pending")));
    assert!(!page.to_string().contains("canary"), "{page}");
    let cursor = page["next_cursor"].as_str().unwrap();
    let rest = api.get(&format!("/v1/deliveries?limit=3&cursor={cursor}")).await.expect(200);
    assert_eq!((rest["deliveries"].as_array().unwrap().len(), &rest["next_cursor"]), (2, &Value::Null));
    let ids: std::collections::BTreeSet<String> = all
        .iter()
        .chain(rest["deliveries"].as_array().unwrap())
        .map(|d| d["id"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(ids.len(), 5);
    let of_one = api.get(&format!("/v1/deliveries?job={}", jobs[2])).await.expect(200);
    assert_eq!(of_one["deliveries"][0]["job_id"], json!(jobs[2]));
    let one = of_one["deliveries"][0]["id"].as_str().unwrap().to_owned();
    for query in ["state=gone", "type=nope", "from=yesterday", "cursor=1", "limit=0"] {
        assert_eq!(api.get(&format!("/v1/deliveries?{query}")).await.status, 400, "{query}");
    }
    for query in ["endpoint=nope", "webhook=wh_0"] {
        assert_eq!(api.get(&format!("/v1/deliveries?{query}")).await.status, 404, "{query}");
    }
    assert_eq!(server.other().get("/v1/deliveries").await.expect(200)["deliveries"], json!([]));
    // What is pending is not sent again; what has ended is, once.
    let again = format!("/v1/deliveries/{one}/redeliver");
    assert_eq!(api.post(&again, &json!({})).await.status, 409);
    settle(&server, 2).await;
    assert_eq!(server.other().post(&again, &json!({})).await.status, 404);
    let replay = api.post(&again, &json!({})).await.expect(202);
    assert_eq!(api.post(&again, &json!({})).await.status, 409, "it runs");
    let shown = api.get(&format!("/v1/replays/{}", replay["replay_id"].as_str().unwrap())).await.expect(200);
    assert_eq!((&shown["filter"]["delivery"], &shown["matched"]), (&json!(one), &json!(1)), "{shown}");
    // A window: counted first, then made.
    let dead = api.get("/v1/deliveries?state=dead&endpoint=echo&from=1h").await.expect(200);
    assert_eq!(dead["deliveries"].as_array().unwrap().len(), 5);
    let filter =
        json!({"states": ["dead"], "types": ["job.*"], "endpoint": "echo", "from": "1h", "dry_run": true});
    let dry = api.post("/v1/replays", &filter).await.expect(200);
    assert_eq!((&dry["matched"], &dry["dry_run"]), (&json!(5), &json!(true)), "{dry}");
    let none = api.post("/v1/replays", &json!({"states": ["delivered"], "dry_run": true})).await.expect(200);
    assert_eq!(none["matched"], 0);
    let made = api.post("/v1/replays", &json!({"states": ["dead"], "rate_per_second": 7})).await.expect(201);
    assert_eq!(
        (&made["state"], &made["matched"], &made["queued"], &made["rate_per_second"]),
        (&json!("running"), &json!(5), &json!(0), &json!(7))
    );
    let path = format!("/v1/replays/{}", made["id"].as_str().unwrap());
    assert_eq!(server.other().get(&path).await.status, 404);
    assert_eq!(server.other().call(Method::DELETE, &path, None).await.status, 404);
    let (_, cancelled) = send(api, Method::DELETE, &path, None).await;
    assert_eq!(cancelled["state"], "cancelled");
    let listed = api.get("/v1/replays?limit=1").await.expect(200);
    assert_eq!(listed["replays"][0]["id"], made["id"], "newest first");
    let next = listed["next_cursor"].as_str().unwrap();
    let listed = api.get(&format!("/v1/replays?cursor={next}")).await.expect(200);
    assert_eq!(listed["replays"][0]["id"], replay["replay_id"]);
    for (body, pointer) in [
        (json!({"states": ["pending"]}), "/states/0"),
        (json!({"types": ["x"]}), "/types/0"),
        (json!({"from": "2026-01-02T00:00:00Z", "to": "2026-01-01T00:00:00Z"}), "/to"),
        (json!({"webhook": "wh_0"}), "/webhook"),
        (json!({"endpoint": "nope"}), "/endpoint"),
        (json!({"rate_per_second": 0}), "/rate_per_second"),
        (json!({"state": "dead"}), "/state"),
    ] {
        let reply = api.post("/v1/replays", &body).await;
        assert_eq!(
            (reply.status, &reply.json["errors"][0]["pointer"]),
            (400, &json!(pointer)),
            "{}",
            reply.text
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deliveries_are_found_and_sent_again_on_sqlite() {
    deliveries_are_found_and_sent_again(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deliveries_are_found_and_sent_again_on_postgres() {
    deliveries_are_found_and_sent_again(Backend::Postgres).await;
}
