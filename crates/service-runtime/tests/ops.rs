//! Health and metrics over a real socket.

use ringback_service_runtime::{Readiness, Shutdown, metrics, ops};
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.expect("the listener is up");
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("answered");
    let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status code");
    (code, answer.split_once("\r\n\r\n").expect("a body").1.to_owned())
}

#[tokio::test]
async fn probes_tell_the_state_and_its_reason() {
    metrics::install();
    ::metrics::counter!("ops_test_total").increment(2);
    let (readiness, shutdown) = (Readiness::new(), Shutdown::new());
    let nats = readiness.register("nats");
    let (address, task) =
        ops::serve(SocketAddr::from(([127, 0, 0, 1], 0)), readiness.clone(), shutdown.clone())
            .await
            .expect("bound");
    assert_eq!(get(address, "/healthz/live").await.0, 200);
    assert_eq!(get(address, "/healthz/startup").await.0, 503);
    assert_eq!(
        get(address, "/healthz/ready").await,
        (503, r#"{"status":"not ready","checks":{"nats":{"ok":false,"reason":"starting"}}}"#.to_owned())
    );
    nats.ok();
    assert_eq!(get(address, "/healthz/startup").await.0, 200);
    assert_eq!(
        get(address, "/healthz/ready").await,
        (200, r#"{"status":"ok","checks":{"nats":{"ok":true}}}"#.to_owned())
    );
    nats.fail("connection lost");
    assert_eq!(get(address, "/healthz/startup").await.0, 200, "it has started once");
    assert!(get(address, "/healthz/ready").await.1.contains("connection lost"));
    assert!(get(address, "/metrics").await.1.contains("ops_test_total 2"));
    nats.ok();
    shutdown.trigger();
    let (code, body) = get(address, "/healthz/ready").await;
    assert!(code == 503 && body.contains("draining"), "{code} {body}");
    assert_eq!(get(address, "/healthz/live").await.0, 200, "probes are answered during the drain");
    shutdown.finish();
    task.await.expect("the listener ends after the drain");
}
