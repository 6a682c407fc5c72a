//! Batches as a polling client sees them: the shipped template `/tts/batch`, a template of one's own, and a batch that
//! stops at its first failure. All through HTTP, on real workers.

use ringback_test_support::client::Client;
use ringback_test_support::stack::{Backend, Options, Role, Stack};
use ringback_test_support::wait::until;
use ringback_tests::{LATER, SOON};
use serde_json::{Value, json};
use std::time::Duration;

const TEMPLATES: &str = r#"
[[batch_templates]]
preset = "tts"
endpoint = "echo"

[[batch_templates]]
route = "/naps"
endpoint = "narrow"
items_field = "naps"
input = { seconds = { item = "seconds", body = "seconds" }, why = { const = "rest" } }
"#;

fn options(backend: Backend) -> Options {
    let mut options = Options::new(backend);
    options.endpoint("narrow", r#"{ builtin = "sleep" }"#, "slots = 1");
    options.endpoint("timed", r#"{ builtin = "sleep" }"#, "slots = 1\nexecution_timeout_ms = 700");
    options.table(TEMPLATES);
    options
}

/// Polls as a client of the original service would, and checks the counts of every answer on the way.
async fn poll_to_the_end(api: &Client, path: &str, total: u64) -> Value {
    until(&format!("{path} to end"), LATER, || async {
        let reply = api.get(path).await;
        if reply.status == 503 {
            // The database was too slow for this look: a polling client asks again.
            return None;
        }
        let now = reply.expect(200);
        let count = |name: &str| now[name].as_u64().unwrap_or_else(|| panic!("no {name}: {now}"));
        assert_eq!(count("total"), total, "{now}");
        assert!(count("completed") + count("failed") <= total, "{now}");
        let ended = now["status"] != "IN_PROGRESS";
        assert_eq!(now["result_url"].is_string(), ended, "a result_url once it is done, not before: {now}");
        ended.then_some(now)
    })
    .await
}

async fn results(api: &Client, ended: &Value) -> Vec<Value> {
    let url = ended["result_url"].as_str().expect("a result_url");
    let path = url.strip_prefix(api.base()).unwrap_or_else(|| panic!("{url} is not below {}", api.base()));
    let reply = api.get(path).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    reply.text.lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect()
}

/// `POST /tts/batch`: each chunk becomes a job with exactly the documented input; the chunk's own voice wins.
async fn tts(stack: &Stack) {
    let api = &stack.api;
    let chunks: Vec<Value> = (0..13)
        .map(|n| match n {
            4 => json!({"text": "chunk 4", "index": 4, "voice_url": "https://voices.example.com/own.wav"}),
            _ => json!({"text": format!("chunk {n}"), "index": n}),
        })
        .collect();
    let body = json!({"chunks": chunks, "voice_url": "https://voices.example.com/all.wav"});
    let made = api.post("/tts/batch", &body).await.expect(200);
    assert_eq!(made["job_count"], 13, "{made}");
    let id = made["batch_id"].as_str().expect("a batch id");
    let ended = poll_to_the_end(api, &format!("/tts/batch/{id}"), 13).await;
    assert_eq!((&ended["status"], &ended["batch_id"]), (&json!("COMPLETED"), &json!(id)), "{ended}");
    assert_eq!((&ended["completed"], &ended["failed"]), (&json!(13), &json!(0)), "{ended}");
    let lines = results(api, &ended).await;
    assert_eq!(lines.len(), 13);
    for (n, line) in lines.iter().enumerate() {
        let voice = if n == 4 { "own" } else { "all" };
        // The endpoint gives its input back: this is what the handler was handed.
        let wanted = json!({
            "text": format!("chunk {n}"),
            "audio_prompt_url": format!("https://voices.example.com/{voice}.wav"),
            "n_candidates": 3,
            "whisper_threshold": 85,
        });
        assert_eq!(line["output"], wanted, "{line}");
    }
    // The native route knows the same batch; another project knows neither.
    let native = api.get(&format!("/v1/batches/{id}")).await.expect(200);
    assert_eq!((&native["status"], &native["total"]), (&json!("COMPLETED"), &json!(13)), "{native}");
    assert_eq!(stack.other.get(&format!("/tts/batch/{id}")).await.status, 404);
    for (body, pointer) in [
        (json!({}), "/chunks"),
        (json!({"chunks": [{"text": "a", "index": 0}, {"index": 1}]}), "/chunks/1/text"),
        (json!({"chunks": [{"text": "a", "index": "first"}]}), "/chunks/0/index"),
    ] {
        let reply = api.post("/tts/batch", &body).await;
        assert_eq!(reply.status, 400, "{body}: {}", reply.text);
        assert!(reply.text.contains(pointer), "{body}: {}", reply.text);
    }
}

/// A route of the operator's own, and a batch seen while it is under way.
async fn own_template(api: &Client) {
    let made = api.post("/naps", &json!({"naps": [{"seconds": 0.5}, {}], "seconds": 0.6})).await.expect(200);
    let path = format!("/naps/{}", made["batch_id"].as_str().expect("a batch id"));
    let first = api.get(&path).await.expect(200);
    // One slot and at least 1.1 s of work: a busy machine makes it longer, never shorter.
    assert_eq!(first["status"], "IN_PROGRESS", "{first}");
    let ended = poll_to_the_end(api, &path, 2).await;
    let lines = results(api, &ended).await;
    assert_eq!(lines[0]["output"], json!({"seconds": 0.5, "why": "rest"}));
    assert_eq!(lines[1]["output"], json!({"seconds": 0.6, "why": "rest"}));
}

/// `on_failure: cancel_rest` ends this batch as FAILED and touches nobody else's jobs.
async fn stops_at_the_first_failure(api: &Client) {
    let items: Vec<Value> = (0..6).map(|_| json!({"input": {"seconds": 60}})).collect();
    let batch = json!({"endpoint": "timed", "items": items, "on_failure": "cancel_rest"});
    let made = api.post("/v1/batches", &batch).await.expect(201);
    let neighbour = api.run("timed", &json!({"input": {"seconds": 0}})).await;
    let path = format!("/v1/batches/{}", made["batch_id"].as_str().expect("a batch id"));
    let ended = poll_to_the_end(api, &path, 6).await;
    assert_eq!(ended["status"], "FAILED", "{ended}");
    let (failed, cancelled) = (ended["failed"].as_u64(), ended["cancelled"].as_u64());
    assert!(failed >= Some(1) && cancelled >= Some(1), "{ended}");
    assert_eq!(failed.zip(cancelled).map(|(f, c)| f + c), Some(6), "{ended}");
    api.wait_status("timed", &neighbour, "COMPLETED", SOON).await;

    // Told to go on, the same failures end it as COMPLETED.
    let items = [json!({"input": {"seconds": 60}}), json!({"input": {"seconds": 0}})];
    let made = api.post("/v1/batches", &json!({"endpoint": "timed", "items": items})).await.expect(201);
    let path = format!("/v1/batches/{}", made["batch_id"].as_str().expect("a batch id"));
    let ended = poll_to_the_end(api, &path, 2).await;
    assert_eq!(
        (&ended["status"], &ended["completed"], &ended["failed"]),
        (&json!("COMPLETED"), &json!(1), &json!(1)),
        "{ended}"
    );
}

/// The link in a batch's body: it came signed, opens without a key, and stands in no log.
async fn link_in_the_body(stack: &Stack) {
    let items: Vec<Value> = (0..3).map(|n| json!({"input": {"n": n}})).collect();
    let batch = json!({"endpoint": "echo", "items": items, "callback_url": stack.receiver.url("/linked")});
    stack.api.post("/v1/batches", &batch).await.expect(201);
    let hit = until("the batch's body", LATER, || async {
        stack.receiver.hits().into_iter().find(|hit| hit.path == "/linked")
    })
    .await;
    assert_eq!(hit.signature, Ok(()));
    let url = hit.json["result_url"].as_str().expect("a result_url");
    let path = url.strip_prefix(stack.api.base()).unwrap_or_else(|| panic!("{url}"));
    let reply = Client::new(stack.api.base(), "").get(path).await;
    assert_eq!((reply.status, reply.text.lines().count()), (200, 3), "{}", reply.text);
    let token = path.split('/').nth(3).expect("a token");
    assert_eq!(token.len(), 32, "{path}");
    assert!(stack.log("dev").contains("batch file fetched") && !stack.log("dev").contains(token));
}

async fn all(backend: Backend) {
    let Some(stack) = Stack::dev(options(backend)).await else { return };
    tokio::join!(
        tts(&stack),
        own_template(&stack.api),
        stops_at_the_first_failure(&stack.api),
        link_in_the_body(&stack)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn templates_and_failures_on_sqlite() {
    all(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn templates_and_failures_on_postgres() {
    all(Backend::Postgres).await;
}

/// Jobs of one transaction, so that 700 need two.
const CHUNK: i64 = 500;

/// Payloads in the blob store that are inputs.
fn input_blobs(stack: &Stack) -> usize {
    std::fs::read_dir(stack.folder().join("blobs/in")).map_or(0, Iterator::count)
}

/// `kill -9` of the API after the first part of a batch is committed: its client was told nothing, so nothing of it may
/// run, be seen or be told, and it is removed.
async fn a_batch_that_was_never_opened_leaves_nothing(backend: Backend) {
    let Some(mut stack) = Stack::apart(options(backend)).await else { return };
    stack.terminate("api");
    // The first commit is that of the batch's row.
    stack.spawn_over(Role::Api, "api", Some("api.commit.after@2"));
    stack.wait_ready("api").await;
    let items: Vec<Value> = (0..700)
        .map(|n| match n {
            3 => json!({"input": {"n": n, "large": "x".repeat(300_000)}, "webhook": stack.receiver.url("/terminal")}),
            _ => json!({"input": {"n": n}, "webhook": stack.receiver.url("/terminal")}),
        })
        .collect();
    let body = json!({"endpoint": "echo", "items": items, "callback_url": stack.receiver.url("/batch")});
    let headers = [("content-type", "application/json"), ("idempotency-key", "once")];
    let broken = stack.api.send(http::Method::POST, "/v1/batches", &headers, body.to_string()).await;
    assert!(broken.is_err(), "the API was to die before its answer: {broken:?}");
    stack.wait_dead("api", SOON).await;
    stack.start_again("api").await;
    let sql = stack.sql().await;
    assert_eq!(sql.count("SELECT COUNT(*) FROM batches WHERE opened_at_ms IS NULL").await, 1);
    assert_eq!(sql.count("SELECT COUNT(*) FROM jobs").await, CHUNK);
    assert_eq!(input_blobs(&stack), 1);

    // Several rounds of the reconciler, which looks for queued jobs without a message; the workers are at work.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let marker = stack.api.run("echo", &json!({"input": "marker"})).await;
    stack.api.wait_status("echo", &marker, "COMPLETED", SOON).await;
    assert_eq!(sql.count("SELECT COUNT(*) FROM jobs WHERE batch_id IS NOT NULL AND seq > 1").await, 0);
    let listed = stack.api.get("/v1/jobs?limit=100").await.expect(200);
    let ids: Vec<&str> =
        listed["jobs"].as_array().expect("a list").iter().filter_map(|job| job["id"].as_str()).collect();
    assert_eq!(ids, [marker.as_str()], "only what was accepted is listed");
    let spelt = match backend {
        Backend::Sqlite => "lower(hex(id))",
        Backend::Postgres => "encode(id, 'hex')",
    };
    for (table, path) in [("batches", "/v1/batches"), ("jobs WHERE batch_id IS NOT NULL", "/v2/echo/status")]
    {
        let hex = sql.texts(&format!("SELECT {spelt} FROM {table} LIMIT 1"), 1).await.remove(0).remove(0);
        let id = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-");
        assert_eq!(stack.api.get(&format!("{path}/{id}")).await.status, 404, "{path}/{id}");
    }
    assert_eq!(stack.receiver.count(), 0, "nobody is told of it");

    // Ten minutes later.
    sql.execute("UPDATE batches SET next_check_at_ms = 1").await;
    for table in ["batches", "jobs WHERE batch_id IS NOT NULL", "blob_trash"] {
        let question = format!("SELECT COUNT(*) FROM {table}");
        until(&format!("{table} to be empty"), SOON, || async {
            (sql.count(&question).await == 0).then_some(())
        })
        .await;
    }
    assert_eq!(input_blobs(&stack), 0);
    assert_eq!(sql.count("SELECT COUNT(*) FROM job_inputs").await, 1);

    // The client asks again with its key.
    let reply = stack.api.send(http::Method::POST, "/v1/batches", &headers, body.to_string()).await;
    let made = reply.expect("an answer").expect(201);
    let path = format!("/v1/batches/{}", made["batch_id"].as_str().expect("a batch id"));
    let ended = poll_to_the_end(&stack.api, &path, 700).await;
    assert_eq!((&ended["status"], &ended["completed"]), (&json!("COMPLETED"), &json!(700)), "{ended}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unopened_batch_on_sqlite() {
    a_batch_that_was_never_opened_leaves_nothing(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unopened_batch_on_postgres() {
    a_batch_that_was_never_opened_leaves_nothing(Backend::Postgres).await;
}
