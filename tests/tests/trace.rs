//! One trace per job, from the client's header to the receiver's.

use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::wait::until;
use ringback_tests::SOON;
use ringback_tests::collector::{Collector, Exported};
use serde_json::json;
use std::collections::BTreeSet;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// The trace id of a `traceparent` (W3C Trace Context: version-trace-parent-flags).
fn trace_id(header: &str) -> &str {
    let parts: Vec<&str> = header.split('-').collect();
    assert_eq!(parts.len(), 4, "not a traceparent: {header:?}");
    assert_eq!(parts[2].len(), 16, "not a traceparent: {header:?}");
    parts[1]
}

/// The span id of a `traceparent`.
fn span_id(header: &str) -> &str {
    header.split('-').nth(2).expect("a traceparent")
}

/// The client's span.
const CALLER: &str = "00f067aa0ba902b7";

/// Each service adds its span to the caller's trace, and whoever follows the parents from a POST gets to the caller.
#[tokio::test(flavor = "multi_thread")]
async fn one_trace_from_submit_to_webhook() {
    let collector = Collector::start().await;
    let options =
        Options::new(Backend::Sqlite).with("telemetry", "otlp_endpoint", &format!("{:?}", collector.address));
    let Some(stack) = Stack::apart(options).await else { return };
    let sent = traceparents(&stack).await;
    let own: BTreeSet<&str> = sent.iter().map(|(_, header)| span_id(header)).collect();
    assert_eq!(own.len(), sent.len(), "each POST is a span of its own: {sent:?}");
    for (status, header) in &sent {
        let way = until(&format!("the spans of {status}"), SOON, || async {
            way(&collector.spans(), span_id(header))
        })
        .await;
        let names: Vec<&str> = way.iter().map(|span| span.name.as_str()).collect();
        assert_eq!((names[0], names[names.len() - 1]), ("webhook.post", "submit"), "{status}: {names:?}");
        assert_eq!(names.contains(&"commit transition"), *status != "IN_QUEUE", "{status}: {names:?}");
        assert!(way.iter().all(|span| span.trace == TRACE), "{way:?}");
    }
    let attempt = until("the worker's span", SOON, || async {
        let spans = collector.spans();
        let attempt = spans.iter().find(|span| span.name == "attempt")?;
        way(&spans, &attempt.id)
    })
    .await;
    assert!(attempt.iter().all(|span| span.trace == TRACE), "{attempt:?}");
    let spans = collector.spans();
    let services: BTreeSet<&str> =
        spans.iter().filter(|span| span.trace == TRACE).map(|span| span.service.as_str()).collect();
    assert_eq!(services.len(), 4, "one span at least of each service on the way: {services:?}");
}

/// From a span by its parents to the client's; none while one of them is not there yet.
fn way(spans: &[Exported], from: &str) -> Option<Vec<Exported>> {
    let mut way: Vec<Exported> = Vec::new();
    let mut next = from.to_owned();
    while next != CALLER {
        let span = spans.iter().find(|span| span.id == next)?;
        assert!(way.len() < 10 && !span.parent.is_empty(), "{span:?} after {way:?}");
        next.clone_from(&span.parent);
        way.push(span.clone());
    }
    Some(way)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_collector_the_callers_trace_is_handed_on() {
    let Some(stack) = Stack::apart(Options::new(Backend::Sqlite)).await else { return };
    for (status, header) in traceparents(&stack).await {
        assert_eq!(span_id(&header), CALLER, "{status}: {header}");
    }
}

/// Runs a job within the caller's trace; what each of its webhooks carried, with its status.
async fn traceparents(stack: &Stack) -> Vec<(String, String)> {
    let given = format!("00-{TRACE}-{CALLER}-01");
    let body = json!({"input": {"seconds": 0.2}, "webhookv2": stack.receiver.url("/every")});
    let headers = [("content-type", "application/json"), ("traceparent", given.as_str())];
    let reply = stack
        .api
        .send(http::Method::POST, "/v2/sleep/run", &headers, body.to_string())
        .await
        .expect("an answer")
        .expect(200);
    let id = reply["id"].as_str().expect("an id");
    stack.receiver.wait_for(id, "COMPLETED", SOON).await;
    let hits = stack.receiver.hits_of(id);
    hits.iter()
        .map(|hit| {
            let sent = hit.header("traceparent");
            assert_eq!(trace_id(sent), TRACE, "{} came with another trace", hit.status());
            (hit.status().to_owned(), sent.to_owned())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_a_trace_gets_one() {
    let Some(stack) = Stack::dev(Options::new(Backend::Sqlite)).await else { return };
    let mut traces = BTreeSet::new();
    for n in 0..2 {
        let id = stack
            .api
            .run("echo", &json!({"input": {"n": n}, "webhookv2": stack.receiver.url("/every")}))
            .await;
        stack.receiver.wait_for(&id, "COMPLETED", SOON).await;
        let of_job: BTreeSet<String> = stack
            .receiver
            .hits_of(&id)
            .iter()
            .map(|hit| trace_id(hit.header("traceparent")).to_owned())
            .collect();
        assert_eq!(of_job.len(), 1, "one trace per job: {of_job:?}");
        traces.extend(of_job);
    }
    assert_eq!(traces.len(), 2, "two jobs, two traces");
    // What is not a traceparent is ignored, never passed on.
    let headers = [("content-type", "application/json"), ("traceparent", "00-zz-evil")];
    let body = json!({"input": {"n": 3}, "webhookv2": stack.receiver.url("/every")});
    let reply = stack
        .api
        .send(http::Method::POST, "/v2/echo/run", &headers, body.to_string())
        .await
        .expect("an answer");
    let id = reply.expect(200)["id"].as_str().expect("an id").to_owned();
    let hit = stack.receiver.wait_for(&id, "COMPLETED", SOON).await;
    assert_eq!(trace_id(hit.header("traceparent")).len(), 32);
}

/// Logs of every service name the job, and no log holds a secret.
#[tokio::test(flavor = "multi_thread")]
async fn logs_name_the_job_and_no_secret() {
    let Some(stack) = Stack::apart(Options::new(Backend::Sqlite)).await else { return };
    let body = json!({
        "input": {"seconds": 0.2, "note": "canary-input"},
        "webhookv2": stack.receiver.url("/every?token=canary-query"),
        "s3Config": {"accessId": "canary-access", "accessSecret": "canary-secret", "bucketName": "b", "endpointUrl": "https://s3.example.com"},
    });
    let id = stack.api.run("sleep", &body).await;
    stack.receiver.wait_for(&id, "COMPLETED", SOON).await;
    stack.api.wait_settled(&id, SOON).await;
    for name in ["api", "tracker", "worker", "dispatcher", "reconciler"] {
        let log = stack.log(name);
        for secret in [
            "canary-query",
            "canary-access",
            "canary-secret",
            stack.api.key(),
            stack.secret.as_str(),
            stack.nats.password(),
        ] {
            assert!(!log.contains(secret), "the log of {name} holds {secret}");
        }
        for line in log.lines().filter(|line| !line.trim().is_empty()) {
            let json: Result<serde_json::Value, _> = serde_json::from_str(line);
            assert!(json.is_ok(), "the log of {name} is not JSON lines: {line}");
        }
    }
    for name in ["tracker", "worker", "dispatcher"] {
        assert!(stack.log(name).contains(&id), "the log of {name} does not name the job");
    }
    for name in ["api", "tracker", "worker", "dispatcher", "reconciler"] {
        let metrics = stack.ops(name).get("/metrics").await;
        assert_eq!(metrics.status, 200, "{name}: {}", metrics.text);
        assert!(metrics.text.contains("# TYPE"), "{name} has no metrics");
    }
}
