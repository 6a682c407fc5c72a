//! P10: bad input gets a precise error that names the field and the limit, and nothing is lost or half done.

use http::Method;
use ringback_test_support::client::{Client, Reply};
use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_tests::SOON;
use serde_json::{Value, json};

/// The compatible shape: `{"error": "..."}` with words that help.
fn assert_runpod(reply: &Reply, status: u16, words: &[&str]) {
    assert_eq!(reply.status, status, "{}", reply.text);
    let error = reply.json["error"].as_str().unwrap_or_else(|| panic!("no error text: {}", reply.text));
    for word in words {
        assert!(error.contains(word), "the error does not say `{word}`: {error}");
    }
}

/// RFC 9457 problem+json.
fn assert_problem(reply: &Reply, status: u16, words: &[&str]) {
    assert_eq!(reply.status, status, "{}", reply.text);
    let kind = reply.headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
    assert!(kind.starts_with("application/problem+json"), "content-type {kind}: {}", reply.text);
    assert_eq!(reply.json["status"], status, "{}", reply.text);
    assert!(reply.json["title"].is_string(), "{}", reply.text);
    for word in words {
        assert!(reply.text.contains(word), "the problem does not say `{word}`: {}", reply.text);
    }
}

async fn post_raw(api: &Client, path: &str, body: impl Into<Vec<u8>>) -> Reply {
    let headers = [("content-type", "application/json")];
    api.send(Method::POST, path, &headers, body.into()).await.expect("an answer")
}

async fn start() -> Option<Stack> {
    let options = Options::new(Backend::Sqlite)
        .with("server", "max_body_bytes", "100000")
        .with("server", "max_json_depth", "40")
        .with("server", "max_batch_items", "50");
    Stack::dev(options).await
}

async fn not_json(api: &Client) {
    assert_runpod(&post_raw(api, "/v2/echo/run", "{not json").await, 400, &["JSON"]);
    assert_runpod(&post_raw(api, "/v2/echo/run", "").await, 400, &["JSON"]);
    assert_runpod(&post_raw(api, "/v2/echo/run", "[1, 2]").await, 400, &["object"]);
    assert_runpod(
        &post_raw(api, "/v2/echo/run", b"{\"input\": \"\xff\xfe\"}".to_vec()).await,
        400,
        &["UTF-8"],
    );
    assert_problem(&post_raw(api, "/v1/jobs", "{not json").await, 400, &["JSON"]);
    // The same key twice: which one counts would be a guess.
    let twice = post_raw(api, "/v2/echo/run", r#"{"input": 1, "input": 2}"#).await;
    assert_runpod(&twice, 400, &["input"]);
}

async fn missing_or_wrong_fields(api: &Client) {
    assert_runpod(
        &api.post("/v2/echo/run", &json!({"webhook": "http://127.0.0.1:1/"})).await,
        400,
        &["input"],
    );
    assert_problem(&api.post("/v1/jobs", &json!({"endpoint": "echo"})).await, 400, &["/input"]);
    assert_problem(&api.post("/v1/jobs", &json!({"input": 1})).await, 400, &["/endpoint"]);
    assert_runpod(&api.post("/v2/echo/run", &json!({"input": 1, "webhook": 7})).await, 400, &["webhook"]);
    assert_runpod(&api.post("/v2/echo/run", &json!({"input": 1, "policy": 7})).await, 400, &["policy"]);
    let policy = json!({"input": 1, "policy": {"executionTimeout": -5}});
    assert_runpod(&api.post("/v2/echo/run", &policy).await, 400, &["executionTimeout"]);
    let policy = json!({"input": 1, "policy": {"ttl": "soon"}});
    assert_runpod(&api.post("/v2/echo/run", &policy).await, 400, &["ttl"]);
    assert_problem(
        &api.post("/v1/batches", &json!({"endpoint": "echo", "items": []})).await,
        400,
        &["/items"],
    );
    let items: Vec<Value> = (0..51).map(|n| json!({"input": n})).collect();
    assert_problem(
        &api.post("/v1/batches", &json!({"endpoint": "echo", "items": items})).await,
        400,
        &["/items", "50"],
    );
    let items = json!([{"input": 1}, {"client_ref": "no input"}]);
    assert_problem(
        &api.post("/v1/batches", &json!({"endpoint": "echo", "items": items})).await,
        400,
        &["/items/1"],
    );
    // Unknown top-level keys are ignored, as RunPod's own example needs it.
    api.run("echo", &json!({"input": {"a": 1}, "timeout": 3})).await;
}

async fn limits(api: &Client) {
    let large = json!({"input": "x".repeat(120_000)}).to_string();
    assert_runpod(&post_raw(api, "/v2/echo/run", large.clone()).await, 413, &["100000"]);
    assert_problem(&post_raw(api, "/v1/jobs", large).await, 413, &["100000"]);
    let deep = format!("{{\"input\": {}1{}}}", "[".repeat(60), "]".repeat(60));
    assert_runpod(&post_raw(api, "/v2/echo/run", deep).await, 400, &["40"]);
    // Deep enough to end a process that recurses.
    let deeper = format!("{{\"input\": {}1{}}}", "[".repeat(20_000), "]".repeat(20_000));
    assert_runpod(&post_raw(api, "/v2/echo/run", deeper).await, 400, &["40"]);
}

/// A NUL byte is legal JSON when escaped and must survive; a raw one is not JSON. In a name it is refused.
async fn nul_bytes(api: &Client) {
    let id = api.run("echo", &json!({"input": {"text": "a\u{0}b"}})).await;
    let job = api.wait_status("echo", &id, "COMPLETED", SOON).await;
    assert_eq!(job["output"]["text"], "a\u{0}b");
    assert_runpod(&post_raw(api, "/v2/echo/run", b"{\"input\": \"a\0b\"}".to_vec()).await, 400, &["JSON"]);
    let reply = api.get("/v2/echo/status/%00").await;
    assert_runpod(&reply, 404, &[]);
    let headers = [("content-type", "application/json"), ("idempotency-key", "")];
    let reply = api.send(Method::POST, "/v2/echo/run", &headers, r#"{"input": 1}"#).await.expect("an answer");
    assert_runpod(&reply, 400, &["dempotency"]);
}

async fn webhook_urls(api: &Client) {
    for (url, word) in [
        ("not a url", "webhook"),
        ("ftp://example.com/x", "ftp"),
        ("file:///etc/passwd", "file"),
        ("http://169.254.169.254/latest/meta-data", "169.254.169.254"),
        ("http://10.0.0.1/hook", "10.0.0.1"),
        ("http://[::ffff:192.168.0.1]/hook", "192.168.0.1"),
        ("http://0x7f.1.2.3.4.5/", "webhook"),
    ] {
        for field in ["webhook", "webhookv2"] {
            let reply = api.post("/v2/echo/run", &json!({"input": 1, field: url})).await;
            assert_eq!(reply.status, 400, "{field} {url}: {}", reply.text);
            assert_runpod(&reply, 400, &[field]);
            assert!(reply.text.contains(word), "{url}: {}", reply.text);
        }
        let reply = api.post("/v1/jobs", &json!({"endpoint": "echo", "input": 1, "webhook": url})).await;
        assert_problem(&reply, 400, &["/webhook"]);
    }
    // A URL may hold a password; a refusal does not repeat it.
    let secret = "ftp://user:canary-password@example.com/?token=canary-token";
    let reply = api.post("/v2/echo/run", &json!({"input": 1, "webhook": secret})).await;
    assert_runpod(&reply, 400, &["webhook", "ftp"]);
    assert!(!reply.text.contains("canary"), "the answer repeats a password: {}", reply.text);
    // A private address is refused with the name of the setting that would allow it.
    let reply = api.post("/v2/echo/run", &json!({"input": 1, "webhook": "http://10.0.0.1/hook"})).await;
    assert_runpod(&reply, 400, &["allow_private"]);
}

async fn unknown_things(stack: &Stack) {
    let (api, other) = (&stack.api, &stack.other);
    assert_runpod(&api.post("/v2/nothing/run", &json!({"input": 1})).await, 404, &["nothing"]);
    for id in
        ["0197a7b2-0000-7000-8000-000000000000", "sync-0197a7b2-0000-7000-8000-000000000000", "17", "..", "*"]
    {
        assert_runpod(&api.get(&format!("/v2/echo/status/{id}")).await, 404, &[]);
    }
    let id = api.run("echo", &json!({"input": {"a": 1}})).await;
    api.wait_end("echo", &id, SOON).await;
    // The prefix of /runsync on another job's id is no alias.
    assert_runpod(&api.get(&format!("/v2/echo/status/sync-{id}")).await, 404, &[]);
    // The right job under another endpoint is not there.
    assert_runpod(&api.get(&format!("/v2/sleep/status/{id}")).await, 404, &[]);
    // Another project's job answers exactly like an unknown one.
    let unknown = "0197a7b2-0000-7000-8000-000000000000";
    for (method, path) in [
        (Method::GET, "/v1/jobs/{}"),
        (Method::GET, "/v1/jobs/{}/output"),
        (Method::GET, "/v1/jobs/{}/logs"),
        (Method::GET, "/v1/jobs/{}/deliveries"),
        (Method::POST, "/v1/jobs/{}/cancel"),
        (Method::POST, "/v1/jobs/{}/retry"),
    ] {
        let theirs = other.call(method.clone(), &path.replace("{}", &id), None).await;
        let nobodys = other.call(method.clone(), &path.replace("{}", unknown), None).await;
        assert_eq!(theirs.status, 404, "{method} {path}: {}", theirs.text);
        assert_eq!(theirs.text.replace(&id, unknown), nobodys.text, "{method} {path}");
    }
    assert_eq!(other.get("/v1/jobs").await.expect(200)["jobs"], json!([]), "lists show only the own project");
    let theirs = other.post("/v2/echo/run", &json!({"input": 1})).await;
    let nobodys = other.post("/v2/ohce/run", &json!({"input": 1})).await;
    assert_eq!((theirs.status, theirs.text.replace("echo", "ohce")), (404, nobodys.text));
}

async fn keys_and_scopes(stack: &Stack) {
    for key in ["", "rb_wrong_0123456789", "' OR 1=1 --"] {
        let stranger = stack.api.with_key(key);
        assert_runpod(&stranger.post("/v2/echo/run", &json!({"input": 1})).await, 401, &[]);
        assert_runpod(&stranger.get("/v2/echo/health").await, 401, &[]);
        assert_problem(&stranger.get("/v1/jobs").await, 401, &[]);
    }
    // The documents of RunPod show the bare key too.
    let bare = stack.api.with_key("");
    let reply = bare
        .send(Method::GET, "/v2/echo/health", &[("authorization", stack.api.key())], "")
        .await
        .expect("answer");
    assert_eq!(reply.status, 200, "{}", reply.text);
    // submit and read do not purge or manage.
    let reply = stack.other.post("/v1/endpoints/echo/purge", &json!({})).await;
    assert!(matches!(reply.status, 403 | 404), "{}", reply.text);
}

async fn wrong_moment(api: &Client) {
    let id = api.run("sleep", &json!({"input": {"seconds": 60}})).await;
    api.wait_status("sleep", &id, "IN_PROGRESS", SOON).await;
    assert_runpod(&api.post(&format!("/v2/sleep/retry/{id}"), &json!({})).await, 409, &["IN_PROGRESS"]);
    assert_problem(&api.post(&format!("/v1/jobs/{id}/retry"), &json!({})).await, 409, &["IN_PROGRESS"]);
    for _ in 0..2 {
        let reply = api.post(&format!("/v2/sleep/cancel/{id}"), &json!({})).await.expect(200);
        assert_eq!(reply, json!({"id": id, "status": "CANCELLED"}));
    }
    // RunPod retries FAILED and TIMED_OUT only; the native route takes CANCELLED too.
    assert_runpod(&api.post(&format!("/v2/sleep/retry/{id}"), &json!({})).await, 409, &["CANCELLED"]);
    let done = api.run("echo", &json!({"input": {"a": 1}})).await;
    api.wait_end("echo", &done, SOON).await;
    assert_problem(&api.post(&format!("/v1/jobs/{done}/retry"), &json!({})).await, 409, &["COMPLETED"]);
    let reply = api.post(&format!("/v2/echo/cancel/{done}"), &json!({})).await.expect(200);
    assert_eq!(reply["status"], "COMPLETED", "cancel of an ended job tells its state");
}

async fn idempotency(api: &Client) {
    let send = |key: &'static str, body: Value| async move {
        let headers = [("content-type", "application/json"), ("idempotency-key", key)];
        api.send(Method::POST, "/v2/echo/run", &headers, body.to_string()).await.expect("an answer")
    };
    let first = send("same", json!({"input": {"a": 1}})).await.expect(200);
    let again = send("same", json!({"input": {"a": 1}})).await.expect(200);
    assert_eq!(first["id"], again["id"]);
    assert_runpod(&send("same", json!({"input": {"a": 2}})).await, 409, &["dempotency"]);
}

async fn odd_names_and_methods(api: &Client) {
    for name in ["*", ">", "a.b", "..", "%2e%2e%2fetc", "a%20b", "%2A", "x%00"] {
        let reply = api.post(&format!("/v2/{name}/run"), &json!({"input": 1})).await;
        assert!(matches!(reply.status, 400 | 404), "{name}: {} {}", reply.status, reply.text);
        assert!(reply.json["error"].is_string() || reply.json["title"].is_string(), "{name}: {}", reply.text);
    }
    for path in ["/v2/echo/run", "/v2/echo/purge-queue"] {
        assert_eq!(api.call(Method::DELETE, path, None).await.status, 405, "{path}");
    }
    assert_eq!(api.get("/no/such/route").await.status, 404);
    let reply = api.get("/v1/jobs?limit=0").await;
    assert_problem(&reply, 400, &["limit"]);
    assert_problem(&api.get("/v1/jobs?status=SLEEPING").await, 400, &["status"]);
    assert_problem(&api.get("/v1/jobs?cursor=%3Cnonsense%3E").await, 400, &["cursor"]);
    assert_runpod(&api.post("/v2/echo/runsync?wait=soon", &json!({"input": 1})).await, 400, &["wait"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_mistake_has_its_answer() {
    let Some(stack) = start().await else { return };
    let api = &stack.api;
    not_json(api).await;
    missing_or_wrong_fields(api).await;
    limits(api).await;
    nul_bytes(api).await;
    webhook_urls(api).await;
    unknown_things(&stack).await;
    keys_and_scopes(&stack).await;
    wrong_moment(api).await;
    idempotency(api).await;
    odd_names_and_methods(api).await;
    // After all of that the service is well, and nothing half made is there.
    let id = api.run("echo", &json!({"input": {"still": "well"}})).await;
    api.wait_status("echo", &id, "COMPLETED", SOON).await;
    let sql = stack.sql().await;
    let without_input = sql
        .count(
            "SELECT COUNT(*) FROM jobs j WHERE NOT EXISTS (SELECT 1 FROM job_inputs i WHERE i.job_id = j.id)",
        )
        .await;
    assert_eq!(without_input, 0);
}
