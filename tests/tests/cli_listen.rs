//! `ringback listen --state`: the next start goes on where the last one stopped.

use std::sync::Arc;

use ringback_test_support::receiver::Receiver;
use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::wait::until;
use ringback_tests::SOON;
use serde_json::{Value, json};

async fn said(stack: &Arc<Stack>, args: &[&str], code: i32) -> String {
    let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
    let stack = Arc::clone(stack);
    let output = tokio::task::spawn_blocking(move || stack.cli(args)).await.expect("run ringback");
    let all =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{all}");
    all
}

async fn webhooks(stack: &Stack) -> Vec<Value> {
    stack.api.get("/v1/webhooks").await.expect(200)["webhooks"].as_array().cloned().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_between_two_starts_is_passed_on_once() {
    let Some(stack) = Stack::dev(Options::new(Backend::Sqlite)).await else { return };
    let stack = Arc::new(stack);
    let receiver = Receiver::start("").await;
    let url = receiver.url("/hook");
    let listen = ["listen", "--forward-to", &url, "--state", "listen.json", "--count", "3"];
    let first = {
        let (stack, listen) = (Arc::clone(&stack), listen.map(str::to_owned));
        tokio::spawn(async move { said(&stack, &listen.each_ref().map(String::as_str), 0).await })
    };
    until("the listener's webhook", SOON, || async { (!webhooks(&stack).await.is_empty()).then_some(()) })
        .await;
    let jobs = [stack.api.run("echo", &json!({"input": 1})).await];
    let shown = first.await.expect("it ends after three events");
    assert!(shown.contains("signing secret") && shown.contains("events wait for the next start"), "{shown}");

    // Nobody listens now.
    let between = stack.api.run("echo", &json!({"input": 2})).await;
    stack.api.wait_status("echo", &between, "COMPLETED", SOON).await;
    let again = said(&stack, &listen, 0).await;
    assert!(again.contains("going on with wh_") && !again.contains("signing secret"), "{again}");
    let hits = receiver.hits();
    let ids: std::collections::BTreeSet<&str> = hits.iter().map(|hit| hit.webhook_id.as_str()).collect();
    assert_eq!((hits.len(), ids.len()), (6, 6), "three events of each job, each once");
    for job in jobs.iter().chain([&between]) {
        let of_job =
            hits.iter().filter(|hit| String::from_utf8_lossy(&hit.body).contains(job.as_str())).count();
        assert_eq!(of_job, 3, "{job}");
    }
    assert_eq!(webhooks(&stack).await.len(), 1, "the webhook stays");

    // Its webhook was removed: another one takes its place.
    let id = webhooks(&stack).await[0]["id"].as_str().expect("an id").to_owned();
    said(&stack, &["webhook", "rm", &id], 0).await;
    let third = {
        let (stack, listen) = (Arc::clone(&stack), listen.map(str::to_owned));
        tokio::spawn(async move { said(&stack, &listen.each_ref().map(String::as_str), 0).await })
    };
    until("another webhook", SOON, || async { (!webhooks(&stack).await.is_empty()).then_some(()) }).await;
    stack.api.run("echo", &json!({"input": 3})).await;
    let shown = third.await.expect("it ends");
    assert!(shown.contains("is gone; beginning anew"), "{shown}");
    let refused = said(&stack, &["listen", "--state", "listen.json", "--url", "http://127.0.0.1:1"], 2).await;
    assert!(refused.contains("belongs to the server"), "{refused}");
}

/// `ringback bench` in its smallest form: what it counts is what ran.
#[tokio::test(flavor = "multi_thread")]
async fn a_small_load_counts_what_it_ran() {
    let Some(stack) = Stack::dev(Options::new(Backend::Sqlite)).await else { return };
    let stack = Arc::new(stack);
    let text = said(&stack, &["bench", "--jobs", "50", "--concurrency", "4", "--json"], 0).await;
    let report: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((&report["completed"], &report["no_answer"]), (&json!(50), &json!({})), "{report}");
    let of = |name: &str| report["latency_ms"][name].as_f64().expect("a figure");
    assert!(of("p50") > 0.0 && of("p50") <= of("p99") && of("p99") <= of("max"), "{report}");
    let listed = stack.api.get("/v1/jobs?limit=200").await.expect(200);
    assert_eq!(listed["jobs"].as_array().map(Vec::len), Some(51), "one more to begin with");
    let shown = said(&stack, &["bench", "--rate", "20", "--duration", "1s", "--quiet"], 0).await;
    assert!(shown.starts_with("20 jobs of echo") && shown.contains("p99"), "{shown}");
    said(&stack, &["bench", "nowhere"], 3).await;
    said(&stack, &["bench", "--jobs", "0"], 2).await;
    said(&stack, &["bench", "--url", "http://127.0.0.1:1"], 6).await;
}
