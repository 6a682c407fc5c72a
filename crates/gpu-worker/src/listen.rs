//! The listener for this worker's own children, and what a client of the worker's listeners may cost.

use crate::app::{WorkerError, io};
use ringback_service_runtime::listener::{self, Limits};
use ringback_worker_protocol::{Hub, HubConfig};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// For children, which keep a connection for each call that they wait for: jobs, stop orders, results, heartbeats. A call
/// that waits has sent its head, so no limit ends it; and a result is not lost because its child got no CPU for a while.
pub(crate) fn limits_of_children() -> Limits {
    Limits { max_connections: 4_096, body: Duration::from_secs(600), ..Limits::default() }
}

/// For the confirm handshake, whose clients may be anywhere: few, with small bodies.
pub(crate) fn limits_of_handshakes() -> Limits {
    Limits::operations()
}

/// Serves the worker protocol on loopback for this worker's own children, until the task is dropped.
pub(crate) async fn for_children(tasks: &mut JoinSet<()>) -> Result<(Hub, String), WorkerError> {
    let what = "cannot listen on loopback for handlers";
    let tcp = TcpListener::bind("127.0.0.1:0").await.map_err(io(what))?;
    let address = tcp.local_addr().map_err(io(what))?;
    let hub = Hub::new(HubConfig::default());
    let router = ringback_worker_protocol::router(hub.clone());
    tasks.spawn(listener::serve(tcp, router, limits_of_children(), std::future::pending()));
    Ok((hub, format!("http://{address}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifacts::Outbox;
    use crate::artifacts::handler_mode::Handshakes;
    use ringback_worker_protocol::{Offer, Registration};
    use std::net::SocketAddr;
    use std::time::Instant;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    const LONG: Duration = Duration::from_secs(60);

    async fn connect(address: SocketAddr, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.expect("connected");
        stream.write_all(text.as_bytes()).await.expect("sent");
        stream
    }

    /// What comes until the other side hangs up.
    async fn rest(mut stream: TcpStream) -> String {
        let mut all = Vec::new();
        // A reset says the same as an end.
        let _ = tokio::time::timeout(LONG, stream.read_to_end(&mut all)).await.expect("it hangs up");
        String::from_utf8_lossy(&all).into_owned()
    }

    /// Sends half a head and then a byte of it now and then; answers how long that was put up with.
    async fn slow_head(address: SocketAddr) -> Duration {
        let (begun, mut drips) = (Instant::now(), 0_u32);
        let stream = connect(address, "GET / HTTP/1.1\r\nhost: x\r\nx-slow: ").await;
        let (mut reader, mut writer) = stream.into_split();
        let dripping = async {
            loop {
                tokio::time::sleep(Duration::from_millis(200)).await;
                if writer.write_all(b"x").await.is_err() {
                    return std::future::pending::<()>().await;
                }
                drips += 1;
            }
        };
        let mut end = Vec::new();
        let ended = async {
            let _ = tokio::time::timeout(LONG, reader.read_to_end(&mut end)).await.expect("it hangs up");
        };
        tokio::select! { () = dripping => {}, () = ended => {} }
        assert!(drips > 0 && end.is_empty(), "{drips}: {end:?}");
        begun.elapsed()
    }

    #[tokio::test]
    async fn clients_with_slow_heads_are_hung_up_on_while_others_are_served() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut tasks = JoinSet::new();
        let (hub, url) = for_children(&mut tasks).await.expect("a listener");
        let of_children: SocketAddr = url["http://".len()..].parse().expect("an address");
        let tcp = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let of_handshakes = tcp.local_addr().expect("an address");
        let outbox = Outbox { cwd: folder.path().to_owned(), folder: "out".into() };
        tasks.spawn(Handshakes::new("e", outbox).serve(tcp));

        let (child, _events) = hub
            .register(Registration {
                worker_id: "w".to_owned(),
                endpoint: "e".to_owned(),
                token: "secret".to_owned(),
                max_jobs: 1,
            })
            .expect("a child");
        let take = "GET /v2/e/job-take/w?job_in_progress=0 HTTP/1.1\r\nhost: x\r\nauthorization: secret\r\nconnection: close\r\n\r\n";
        let taken = tokio::spawn(rest(connect(of_children, take).await));
        let check = "GET /check-download/j1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        let (children, handshakes, checked) =
            tokio::join!(slow_head(of_children), slow_head(of_handshakes), async {
                rest(connect(of_handshakes, check).await).await
            },);
        assert!(checked.starts_with("HTTP/1.1 200") && checked.contains("\"pending\""), "{checked}");
        assert!(children >= limits_of_children().header, "{children:?}");
        assert!(handshakes >= limits_of_handshakes().header, "{handshakes:?}");
        // The call that waits for a job has outlived them.
        assert!(!taken.is_finished(), "it waits for longer than a head may take");
        child.assign(Offer { id: "j1".to_owned(), payload: r#"{"id":"j1"}"#.into() }).expect("assigned");
        let taken = taken.await.expect("an answer");
        assert!(taken.starts_with("HTTP/1.1 200") && taken.ends_with(r#"{"id":"j1"}"#), "{taken}");
    }
}
