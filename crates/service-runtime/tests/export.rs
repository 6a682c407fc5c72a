//! Spans leave for the collector. In a process of its own: the subscriber is global.

use ringback_service_runtime::config::TelemetryConfig;
use ringback_service_runtime::{telemetry, trace_context};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;

#[tokio::test(flavor = "multi_thread")]
async fn spans_are_sent_to_the_collector() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    let config = TelemetryConfig { otlp_endpoint: Some(endpoint), ..TelemetryConfig::default() };
    let guard = telemetry::init("test", &config).expect("initialised");
    let span = tracing::info_span!(target: "ringback_test", "work", job_id = "1");
    let traceparent = span.in_scope(trace_context::current_traceparent).expect("in a span");
    assert!(traceparent.ends_with("-01"), "sampled by default: {traceparent}");
    drop(span);
    let flush = tokio::task::spawn_blocking(move || drop(guard));
    let (mut stream, _) = tokio::time::timeout(Duration::from_secs(20), listener.accept())
        .await
        .expect("it connects")
        .expect("accepted");
    let mut preface = [0; 14];
    stream.read_exact(&mut preface).await.expect("gRPC speaks first");
    assert_eq!(&preface, b"PRI * HTTP/2.0");
    drop(stream);
    drop(listener);
    tokio::time::timeout(Duration::from_secs(20), flush)
        .await
        .expect("a dead collector does not hang the end")
        .expect("no panic");
    let again = telemetry::init("test", &TelemetryConfig::default()).expect("a second call is harmless");
    drop(again);
}
