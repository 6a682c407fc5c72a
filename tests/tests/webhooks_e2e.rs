//! Webhooks as a receiver sees them: contents, order, signatures, retries, isolation.

use base64::Engine as _;
use ringback_test_support::books::{Accepted, assert_books_balance};
use ringback_test_support::receiver::{Hit, Mode};
use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::tools;
use ringback_test_support::wait::until;
use ringback_tests::{LATER, SOON, both_webhooks, handler, submit};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::time::Duration;

fn options(backend: Backend) -> Options {
    let mut options = Options::new(backend);
    options.endpoint("timed", r#"{ builtin = "sleep" }"#, "execution_timeout_ms = 700");
    options.endpoint("narrow", r#"{ builtin = "sleep" }"#, "slots = 1");
    options.endpoint("loud", r#"{ builtin = "echo" }"#, "webhook_events = \"all\"");
    if let Some(python) = tools::python("venv-runpod112") {
        options.process("plain", &[&python.display().to_string(), &handler("plain.py")], "");
    }
    options
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value.as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

fn on<'a>(hits: &'a [Hit], path: &str) -> Vec<&'a Hit> {
    hits.iter().filter(|hit| hit.path == path).collect()
}

/// The body of each state and kind, on all four ways a job can end.
async fn contents(stack: &Stack) {
    let input = json!({"text": "Hörst du?", "seconds": 0.3});
    let job = submit(stack, "sleep", "contents", &input).await;
    stack.receiver.wait_for(&job.id, "COMPLETED", SOON).await;
    assert_books_balance(stack, std::slice::from_ref(&job), LATER).await;
    let hits = stack.receiver.hits_of(&job.id);

    let every = on(&hits, "/every");
    assert_eq!(
        every.iter().map(|hit| hit.status()).collect::<Vec<_>>(),
        ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    );
    assert_eq!(every.iter().map(|hit| hit.sequence).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(keys(&every[0].json), ["id", "status"]);
    assert_eq!(keys(&every[1].json), ["delayTime", "id", "status"]);
    assert_eq!(keys(&every[2].json), ["delayTime", "executionTime", "id", "output", "status"]);
    assert_eq!(every[2].json["output"], input);

    let terminal = on(&hits, "/terminal");
    assert_eq!(terminal.len(), 1, "plain webhook: terminal states only");
    let body = &terminal[0].json;
    assert_eq!(keys(body), ["delayTime", "executionTime", "id", "input", "output", "status", "webhook"]);
    assert_eq!((&body["input"], &body["output"]), (&input, &input));
    assert_eq!(body["webhook"], stack.receiver.url("/terminal"));
    assert!(body["executionTime"].as_u64().expect("ms") >= 300, "{body}");
    for hit in &hits {
        assert_eq!(hit.header("content-type"), "application/json");
        assert_eq!(hit.signature, Ok(()));
    }
    let simple = job.id.replace('-', "");
    assert!(every[0].webhook_id.starts_with(&format!("msg_{simple}_1_")), "{}", every[0].webhook_id);
}

async fn ends_badly(stack: &Stack) {
    let failed = submit(stack, "plain", "failed", &json!({"mode": "raise", "text": "no such voice"})).await;
    let late = submit(stack, "timed", "late", &json!({"seconds": 60})).await;
    let cancelled = submit(stack, "sleep", "cancelled", &json!({"seconds": 60})).await;
    stack.receiver.wait_for(&cancelled.id, "IN_PROGRESS", SOON).await;
    stack.api.post(&format!("/v2/sleep/cancel/{}", cancelled.id), &json!({})).await.expect(200);
    for (job, status, word) in
        [(&failed, "FAILED", "no such voice"), (&late, "TIMED_OUT", ""), (&cancelled, "CANCELLED", "")]
    {
        stack.receiver.wait_for(&job.id, status, LATER).await;
        stack.api.wait_settled(&job.id, LATER).await;
        for hit in stack.receiver.hits_of(&job.id).iter().filter(|hit| hit.status() == status) {
            // A receiver made for RunPod reads integers always, and the reason from either place.
            assert!(hit.json["delayTime"].is_u64() && hit.json["executionTime"].is_u64(), "{}", hit.json);
            let error = hit.json["error"].as_str().unwrap_or_else(|| panic!("no error: {}", hit.json));
            assert!(!error.is_empty() && error.contains(word), "{}", hit.json);
            assert_eq!(hit.json["output"]["error"], hit.json["error"], "{}", hit.json);
        }
    }
    assert_books_balance(stack, &[failed, late, cancelled], LATER).await;
}

/// Waiting costs the same job object twice: queued behind another, then cancelled without ever starting.
async fn never_started(stack: &Stack) {
    let first = submit(stack, "narrow", "first", &json!({"seconds": 60})).await;
    stack.api.wait_status("narrow", &first.id, "IN_PROGRESS", SOON).await;
    let second = submit(stack, "narrow", "second", &json!({"seconds": 60})).await;
    for job in [&second, &first] {
        stack.api.post(&format!("/v2/narrow/cancel/{}", job.id), &json!({})).await.expect(200);
    }
    let hit = stack.receiver.wait_for(&second.id, "CANCELLED", SOON).await;
    assert_eq!((&hit.json["delayTime"], &hit.json["executionTime"]), (&json!(0), &json!(0)), "{}", hit.json);
    assert_books_balance(stack, &[first, second], LATER).await;
}

async fn one_url_in_both_is_one_target(stack: &Stack) {
    let url = stack.receiver.url("/both");
    let id = stack.api.run("echo", &json!({"input": {"a": 1}, "webhook": url, "webhookv2": url})).await;
    stack.receiver.wait_for(&id, "COMPLETED", SOON).await;
    stack.api.wait_settled(&id, SOON).await;
    assert_eq!(stack.api.deliveries(&id).await.len(), 3);
    assert_eq!(stack.receiver.hits_of(&id).len(), 3);
    // Spelt as the JavaScript types spell it.
    let id = stack.api.run("echo", &json!({"input": {"a": 1}, "webhookV2": url})).await;
    stack.receiver.wait_for(&id, "COMPLETED", SOON).await;
    // An endpoint may tell the plain webhook everything.
    let id = stack.api.run("loud", &json!({"input": {"a": 1}, "webhook": url})).await;
    stack.receiver.wait_for(&id, "COMPLETED", SOON).await;
    stack.api.wait_settled(&id, SOON).await;
    assert_eq!(stack.receiver.hits_of(&id).len(), 3);
}

/// Above the inline limit the body lies in the blob store; the receiver sees no difference.
async fn a_large_output(stack: &Stack) {
    let input = json!({"data": "x".repeat(1024 * 1024)});
    let job = submit(stack, "echo", "large", &input).await;
    let hit = stack.receiver.wait_for(&job.id, "COMPLETED", LATER).await;
    assert_eq!(hit.json["output"], input);
    assert_books_balance(stack, &[job], LATER).await;
}

async fn batch_end(stack: &Stack) {
    let items: Vec<Value> =
        (0..20).map(|n| json!({"input": {"n": n}, "client_ref": format!("c{n}")})).collect();
    let reply = stack
        .api
        .post(
            "/v1/batches",
            &json!({"endpoint": "echo", "items": items, "webhook": stack.receiver.url("/of-batch"),
                    "callback_url": stack.receiver.url("/batch")}),
        )
        .await
        .expect(201);
    assert_eq!(reply["total"], 20, "{reply}");
    let batch = reply["batch_id"].as_str().expect("a batch id").to_owned();
    let hit = until("the batch's own event", LATER, || async {
        stack.receiver.hits().into_iter().find(|hit| hit.path == "/batch")
    })
    .await;
    assert_eq!(hit.json["batch_id"], batch.as_str(), "{}", hit.json);
    assert_eq!((&hit.json["total"], &hit.json["completed"]), (&json!(20), &json!(20)), "{}", hit.json);
    assert_eq!(hit.signature, Ok(()));
    let now = stack.api.get(&format!("/v1/batches/{batch}")).await.expect(200);
    assert_eq!(now["status"], "COMPLETED", "{now}");
    until("the jobs' webhooks", LATER, || async {
        (on(&stack.receiver.hits(), "/of-batch").len() >= 20).then_some(())
    })
    .await;
    let results = stack.api.get(&format!("/v1/batches/{batch}/results")).await;
    let lines: Vec<Value> =
        results.text.lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect();
    let order: Vec<&Value> = lines.iter().map(|line| &line["output"]["n"]).collect();
    assert_eq!(order, (0..20).map(|n| json!(n)).collect::<Vec<_>>().iter().collect::<Vec<_>>());
    assert_eq!(on(&stack.receiver.hits(), "/batch").len(), 1, "exactly one batch body");
}

/// The third opinion: the official package, over everything that has arrived so far.
async fn official_verifier(stack: &Stack) {
    let Some(python) = tools::python("venv-verify") else { return };
    let mut lines = String::new();
    let hits = stack.receiver.hits();
    for hit in &hits {
        let headers: serde_json::Map<String, Value> =
            ["webhook-id", "webhook-timestamp", "webhook-signature"]
                .map(|n| (n.to_owned(), hit.header(n).into()))
                .into_iter()
                .collect();
        let body = base64::engine::general_purpose::STANDARD.encode(&hit.body);
        writeln!(lines, "{}", json!({"headers": headers, "body_base64": body})).expect("a string");
    }
    let file = stack.folder().join("hits.jsonl");
    std::fs::write(&file, lines).expect("write");
    let output = std::process::Command::new(python)
        .arg(tools::root().join("tests/sdk/verify.py"))
        .arg(file)
        .env("WEBHOOK_SECRET", &stack.secret)
        .output()
        .expect("run the verifier");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains(&format!("{} webhooks verified", hits.len())), "{text}");
}

async fn bodies_and_signatures(backend: Backend) {
    let Some(stack) = Stack::dev(options(backend)).await else { return };
    tokio::join!(
        contents(&stack),
        ends_badly(&stack),
        never_started(&stack),
        one_url_in_both_is_one_target(&stack)
    );
    a_large_output(&stack).await;
    batch_end(&stack).await;
    official_verifier(&stack).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_and_signatures_on_sqlite() {
    bodies_and_signatures(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_and_signatures_on_postgres() {
    bodies_and_signatures(Backend::Postgres).await;
}

async fn deliveries_of(stack: &Stack, id: &str, seq: u64) -> Value {
    let all = stack.api.deliveries(id).await;
    all.into_iter()
        .find(|delivery| delivery["seq"] == seq)
        .unwrap_or_else(|| panic!("no delivery {seq} of {id}"))
}

/// A refused result comes again 10 s later: same id, same bytes, a new timestamp; and it is in the log of attempts.
async fn a_refused_result_comes_again(stack: &Stack) {
    stack.receiver.answer("/refuse", Mode::FailFirst { times: 1, status: 500 });
    let id =
        stack.api.run("echo", &json!({"input": {"a": 1}, "webhook": stack.receiver.url("/refuse")})).await;
    stack.receiver.wait_for(&id, "COMPLETED", LATER).await;
    let hits = stack.receiver.hits_of(&id);
    assert_eq!(hits.iter().map(|hit| hit.answered).collect::<Vec<_>>(), [500, 200]);
    assert_eq!(hits[0].webhook_id, hits[1].webhook_id);
    assert_eq!(hits[0].body, hits[1].body);
    assert!(hits[0].header("webhook-timestamp") < hits[1].header("webhook-timestamp"));
    let gap = hits[1].at.duration_since(hits[0].at);
    assert!(
        gap >= Duration::from_millis(9_900) && gap < Duration::from_secs(20),
        "RunPod's gap is 10 s: {gap:?}"
    );
    stack.api.wait_settled(&id, SOON).await;
    let delivery = stack.api.deliveries(&id).await.remove(0);
    assert_eq!((&delivery["state"], &delivery["attempts"]), (&json!("delivered"), &json!(2)), "{delivery}");
    let path = format!("/v1/deliveries/{}/attempts", hits[0].webhook_id);
    let tries = stack.api.get(&path).await.expect(200);
    for (n, outcome) in ["failed", "delivered"].into_iter().enumerate() {
        let one = &tries["attempts"][n];
        assert_eq!(one["outcome"], outcome, "{tries}");
        let took_ms = one["duration_ms"].as_u64().expect("a duration");
        assert!(one["first_byte_ms"].as_u64().is_some_and(|ms| ms <= took_ms), "{tries}");
        assert!(one["address"].is_string() && one["response"].is_string(), "{tries}");
        // A literal address needs no name; whether a kept connection was there is a matter of moments.
        assert!(one["dns_ms"].is_null() && one.get("connect_ms").is_some(), "{tries}");
    }
}

/// A receiver that never takes the earlier states still gets the result at once; the rest is recorded as superseded.
async fn a_result_supersedes_what_waits(stack: &Stack) {
    stack.receiver.answer("/only-end", Mode::AcceptOnly("COMPLETED"));
    let url = stack.receiver.url("/only-end");
    let id = stack.api.run("sleep", &json!({"input": {"seconds": 1}, "webhookv2": url})).await;
    let hit = stack.receiver.wait_for(&id, "COMPLETED", SOON).await;
    let first = stack.receiver.hits_of(&id)[0].at;
    assert!(
        hit.at.duration_since(first) < Duration::from_secs(8),
        "the result waited for an earlier state's retry"
    );
    stack.api.wait_settled(&id, SOON).await;
    assert_eq!(deliveries_of(stack, &id, 1).await["state"], "superseded");
    assert_eq!(deliveries_of(stack, &id, 2).await["state"], "superseded");
    assert_eq!(deliveries_of(stack, &id, 3).await["state"], "delivered");
}

async fn gone_ends_the_target(stack: &Stack) {
    stack.receiver.answer("/gone", Mode::Status(410));
    let id = stack.api.run("echo", &json!({"input": {"a": 1}, "webhook": stack.receiver.url("/gone")})).await;
    stack.api.wait_end("echo", &id, SOON).await;
    stack.api.wait_settled(&id, SOON).await;
    let delivery = stack.api.deliveries(&id).await.remove(0);
    assert_eq!(delivery["state"], "dead", "{delivery}");
    assert_eq!(delivery["last_status"], 410, "{delivery}");
    assert_eq!(stack.receiver.hits_of(&id).len(), 1);
}

async fn a_redirect_is_a_failure(stack: &Stack) {
    stack.receiver.answer("/moved", Mode::Redirect(stack.receiver.url("/elsewhere")));
    let id =
        stack.api.run("echo", &json!({"input": {"a": 1}, "webhook": stack.receiver.url("/moved")})).await;
    let delivery = until("the failed try to be recorded", SOON, || async {
        stack.api.deliveries(&id).await.into_iter().find(|delivery| delivery["last_status"] == 302)
    })
    .await;
    assert_eq!(delivery["state"], "pending", "{delivery}");
    assert!(delivery["next_attempt_at"].is_string(), "{delivery}");
    assert!(on(&stack.receiver.hits(), "/elsewhere").is_empty(), "a redirect was followed");
}

async fn retry_after_is_honoured(stack: &Stack) {
    stack.receiver.answer("/later", Mode::RetryAfter(503, 14));
    let id =
        stack.api.run("echo", &json!({"input": {"a": 1}, "webhook": stack.receiver.url("/later")})).await;
    stack.receiver.wait_for(&id, "COMPLETED", LATER).await;
    let hits = stack.receiver.hits_of(&id);
    let gap = hits[1].at.duration_since(hits[0].at);
    assert!(gap >= Duration::from_millis(13_900), "Retry-After: 14 was not honoured: {gap:?}");
}

/// P9: receivers that hang, drip or refuse cost the others nothing.
async fn bad_neighbours(stack: &Stack) {
    stack.receiver.answer("/hang", Mode::Hang);
    stack.receiver.answer("/drip", Mode::Drip(Duration::from_millis(200)));
    stack.receiver.answer("/down", Mode::Status(500));
    for n in 0..90 {
        let url = stack.receiver.url(["/hang", "/drip", "/down"][n % 3]);
        stack.api.run("echo", &json!({"input": {"n": n}, "webhook": url})).await;
    }
    let good: Vec<Accepted> = {
        let mut good = Vec::new();
        for n in 0..10 {
            good.push(submit(stack, "echo", &format!("good-{n}"), &json!({"n": n})).await);
        }
        good
    };
    // Half of the deadline of one attempt: none of them waited behind a hanging one.
    for job in &good {
        stack.receiver.wait_for(&job.id, "COMPLETED", Duration::from_secs(5)).await;
    }
    assert_books_balance(stack, &good, LATER).await;
    // An attempt that hangs ends at its deadline (3 s in this configuration) and is recorded as one.
    let hanging = stack.receiver.hits().into_iter().find(|hit| hit.path == "/hang").expect("a hanging try");
    until("the hanging try to be given up", SOON, || async {
        let all = stack.api.deliveries(hanging.job()).await;
        all.iter()
            .any(|delivery| delivery["attempts"] == 1 && delivery["last_error"].is_string())
            .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tries_and_neighbours() {
    let Some(stack) = Stack::dev(options(Backend::Sqlite).with("webhooks", "deadline_ms", "3000")).await
    else {
        return;
    };
    tokio::join!(
        a_refused_result_comes_again(&stack),
        a_result_supersedes_what_waits(&stack),
        gone_ends_the_target(&stack),
        a_redirect_is_a_failure(&stack),
        retry_after_is_honoured(&stack),
        bad_neighbours(&stack),
    );
}

/// Retry times are in SQL: a restart in the middle of a wait changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_survives_a_restart() {
    let Some(mut stack) = Stack::dev(options(Backend::Sqlite)).await else { return };
    stack.receiver.answer("/terminal", Mode::FailFirst { times: 1, status: 503 });
    let body = both_webhooks(&stack, &json!({"a": 1}));
    let id = stack.api.run("echo", &body).await;
    until("the first try", SOON, || async {
        stack.receiver.hits_of(&id).iter().any(|hit| hit.path == "/terminal").then_some(())
    })
    .await;
    until("its record", SOON, || async {
        stack
            .api
            .deliveries(&id)
            .await
            .iter()
            .any(|d| d["attempts"] == 1 && d["state"] == "pending")
            .then_some(())
    })
    .await;
    stack.kill9("dev");
    stack.start_again("dev").await;
    until("the second try", LATER, || async {
        stack
            .receiver
            .hits_of(&id)
            .iter()
            .any(|hit| hit.path == "/terminal" && hit.answered == 200)
            .then_some(())
    })
    .await;
    let job = Accepted { id, endpoint: "echo".to_owned(), webhook: true, webhookv2: true };
    assert_books_balance(&stack, &[job], LATER).await;
}
