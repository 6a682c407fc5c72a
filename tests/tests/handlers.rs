//! Every kind of unmodified Python handler, with two versions of the RunPod SDK, through the whole of Ringback.

use futures::future::join_all;
use ringback_test_support::client::Client;
use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::tools;
use ringback_test_support::wait::until;
use ringback_tests::{LATER, handler};
use serde_json::{Value, json};

async fn end_of(api: &Client, endpoint: &str, input: Value) -> Value {
    let id = api.run(endpoint, &json!({ "input": input })).await;
    api.wait_end(endpoint, &id, LATER).await
}

async fn completed(api: &Client, endpoint: &str, input: Value) -> Value {
    let mut job = end_of(api, endpoint, input).await;
    assert_eq!(job["status"], "COMPLETED", "{job}");
    job["output"].take()
}

async fn failed(api: &Client, endpoint: &str, input: Value) -> String {
    let job = end_of(api, endpoint, input).await;
    assert_eq!(job["status"], "FAILED", "{job}");
    job["error"].as_str().unwrap_or_else(|| panic!("no error: {job}")).to_owned()
}

async fn start(environment: &str, backend: Backend) -> Option<Stack> {
    let program = tools::python(environment)?.display().to_string();
    let mut options = Options::new(backend);
    let python = |file: &str| [program.clone(), handler(file)];
    for (name, file, flags, more) in [
        ("plain", "plain.py", &[][..], ""),
        ("fragile", "plain.py", &[], "max_attempts = 2"),
        ("async", "async_handler.py", &[], ""),
        ("generator", "generator.py", &[], ""),
        ("aggregate", "generator.py", &["--aggregate"], ""),
        ("agenerator", "generator.py", &["--async", "--aggregate"], ""),
        ("concurrent", "concurrency.py", &["--concurrency", "4"], "slots = 4"),
        ("blocking", "blocking.py", &[], ""),
        ("timed", "blocking.py", &[], "execution_timeout_ms = 1500"),
        ("refresh", "refresh_config.py", &[], ""),
    ] {
        let command = python(file);
        let words: Vec<&str> = command.iter().map(String::as_str).chain(flags.iter().copied()).collect();
        options.process(name, &words, more);
    }
    Stack::dev(options).await
}

/// What a handler returns reaches the client as it is, in every shape.
async fn results(api: &Client) {
    let text = "ü \u{1F600} \"quoted\" \\ \u{0001}";
    let echoed = json!({"mode": "echo", "text": text, "deep": [[{"a": [null, true, 1.5, -7]}]]});
    assert_eq!(completed(api, "plain", echoed.clone()).await, echoed);
    assert_eq!(completed(api, "plain", json!({"mode": "none"})).await, Value::Null);
    assert_eq!(completed(api, "plain", json!({"mode": "empty"})).await, json!({}));
    assert_eq!(completed(api, "plain", json!("just a text")).await, "just a text");
    assert_eq!(completed(api, "async", json!({"seconds": 0.1})).await, json!({"waited": 0.1}));
}

/// Errors of a handler end the job with their text, and are not tried again.
async fn errors(api: &Client) {
    assert!(
        failed(api, "plain", json!({"mode": "raise", "text": "no such voice"}))
            .await
            .contains("no such voice")
    );
    assert!(failed(api, "plain", json!({"mode": "error", "text": "bad text"})).await.contains("bad text"));
    assert!(failed(api, "async", json!({"raise": true})).await.contains("async handler raised"));
    let id = api.run("plain", &json!({"input": {"mode": "raise"}})).await;
    api.wait_end("plain", &id, LATER).await;
    assert_eq!(api.job(&id).await["attempt"], 1, "an error of the handler is final");
    // RunPod loses this one: the SDK never posts it. Here it ends with a reason.
    let error = failed(api, "plain", json!({"mode": "unserialisable"})).await;
    assert!(!error.is_empty());
}

async fn generators(api: &Client) {
    let chunks = json!([{"n": 0, "text": "x"}, {"n": 1, "text": "x"}, {"n": 2, "text": "x"}]);
    assert_eq!(completed(api, "aggregate", json!({"count": 3})).await, chunks);
    assert_eq!(completed(api, "agenerator", json!({"count": 3})).await, chunks);
    let id = api.run("generator", &json!({"input": {"count": 3}})).await;
    api.wait_end("generator", &id, LATER).await;
    let stream = api.get(&format!("/v2/generator/stream/{id}")).await.expect(200);
    let seen: Vec<&Value> =
        stream["stream"].as_array().expect("a list").iter().map(|c| &c["output"]).collect();
    assert_eq!(seen, chunks.as_array().expect("a list").iter().collect::<Vec<_>>(), "{stream}");
    assert!(failed(api, "generator", json!({"count": 5, "fail_at": 2})).await.contains("failed at 2"));
    assert!(failed(api, "aggregate", json!({"count": 5, "error_at": 1})).await.contains("error at 1"));
}

async fn progress(api: &Client) {
    let id = api.run("plain", &json!({"input": {"mode": "progress", "steps": 4, "pause": 0.7}})).await;
    let path = format!("/v2/plain/status/{id}");
    let seen = until("a progress value in the status", LATER, || async {
        let now = api.get(&path).await.expect(200);
        (now["status"] == "IN_PROGRESS" && now["output"]["step"].is_u64()).then_some(now)
    })
    .await;
    assert!(seen["output"]["step"].as_u64().expect("a step") < 4, "{seen}");
    assert_eq!(api.wait_status("plain", &id, "COMPLETED", LATER).await["output"], json!({"steps": 4}));
}

async fn concurrency(api: &Client) {
    let jobs = (0..4).map(|_| completed(api, "concurrent", json!({"seconds": 2.0})));
    let outputs = join_all(jobs).await;
    let peak = outputs.iter().map(|output| output["peak"].as_u64().expect("a peak")).max();
    assert!(peak >= Some(2), "the jobs never ran side by side: {outputs:?}");
}

/// A process that ends in the middle of a job is noticed at once, and a job that always does it stops (poison).
async fn crash(api: &Client) {
    let id = api.run("fragile", &json!({"input": {"mode": "crash", "code": 7}})).await;
    let job = api.wait_end("fragile", &id, LATER).await;
    assert_eq!(job["status"], "FAILED", "{job}");
    let row = api.job(&id).await;
    assert_eq!(row["attempt"], 2, "max_attempts = 2: {row}");
    assert!(job["error"].as_str().expect("an error").contains('7'), "the exit code is in the reason: {job}");
    // The next job gets a new process.
    assert_eq!(completed(api, "fragile", json!({"mode": "echo"})).await, json!({"mode": "echo"}));
}

async fn refresh(api: &Client) {
    let first = completed(api, "refresh", json!({})).await["pid"].as_u64();
    let second = completed(api, "refresh", json!({})).await["pid"].as_u64();
    assert!(first.is_some() && first != second, "refresh_worker gives a new process: {first:?} {second:?}");
    completed(api, "plain", json!({"mode": "refresh"})).await;
    assert_eq!(completed(api, "plain", json!({"mode": "echo"})).await, json!({"mode": "echo"}));
}

fn is_alive(pid: &str) -> bool {
    std::path::Path::new("/proc").join(pid.trim()).exists()
}

/// Cancel and time limit end a handler that never looks up.
async fn stopping(stack: &Stack) {
    let api = &stack.api;
    for endpoint in ["blocking", "timed"] {
        let file = stack.folder().join(format!("{endpoint}.pid"));
        let id = api.run(endpoint, &json!({"input": {"pid_file": file, "seconds": 3600}})).await;
        let pid = until("the handler to start", LATER, || async {
            std::fs::read_to_string(&file).ok().filter(|text| !text.is_empty())
        })
        .await;
        if endpoint == "blocking" {
            // 503 asks for another try; a cancel is idempotent.
            let reply = until("the cancel to be answered", LATER, || async {
                let reply = api.post(&format!("/v2/blocking/cancel/{id}"), &json!({})).await;
                (reply.status != 503).then_some(reply)
            })
            .await
            .expect(200);
            assert_eq!(reply["status"], "CANCELLED");
        } else {
            api.wait_status(endpoint, &id, "TIMED_OUT", LATER).await;
        }
        until("the blocked process to be ended", LATER, || async { (!is_alive(&pid)).then_some(()) }).await;
    }
    // The slot is free again.
    assert_eq!(completed(api, "blocking", json!({"seconds": 0})).await, json!({"done": true}));
}

/// 30 MB, which RunPod silently loses.
async fn big(api: &Client) {
    let output = completed(api, "plain", json!({"mode": "big", "mb": 30})).await;
    assert_eq!(output["data"].as_str().expect("a text").len(), 30 * 1024 * 1024);
}

async fn logs(api: &Client) {
    let id = api.run("plain", &json!({"input": {"mode": "log", "text": "a word for the log"}})).await;
    api.wait_status("plain", &id, "COMPLETED", LATER).await;
    let text = api.get(&format!("/v1/jobs/{id}/logs")).await.text;
    assert!(text.contains("a word for the log on stderr"), "stderr is captured per job: {text}");
}

async fn every_kind(environment: &str, backend: Backend) {
    let Some(stack) = start(environment, backend).await else { return };
    let api = &stack.api;
    tokio::join!(
        results(api),
        generators(api),
        concurrency(api),
        crash(api),
        refresh_alone(api),
        stopping(&stack)
    );
    errors(api).await;
    progress(api).await;
    refresh(api).await;
    logs(api).await;
    big(api).await;
}

/// The configuration's refresh has an endpoint of its own, so it may run beside the others.
async fn refresh_alone(api: &Client) {
    completed(api, "refresh", json!({})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn runpod_1_12() {
    every_kind("venv-runpod112", Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn runpod_1_7() {
    every_kind("venv-runpod17", Backend::Postgres).await;
}

/// The oldest protocol in wide use: single takes only.
#[tokio::test(flavor = "multi_thread")]
async fn runpod_1_6() {
    let Some(python) = tools::python("venv-runpod16") else { return };
    let program = python.display().to_string();
    let mut options = Options::new(Backend::Sqlite);
    options.process("plain", &[&program, &handler("plain.py")], "");
    let Some(stack) = Stack::dev(options).await else { return };
    let jobs = (0..3).map(|n| completed(&stack.api, "plain", json!({"mode": "echo", "n": n})));
    for (n, output) in join_all(jobs).await.into_iter().enumerate() {
        assert_eq!(output["n"], n);
    }
    assert!(failed(&stack.api, "plain", json!({"mode": "raise", "text": "old"})).await.contains("old"));
}
