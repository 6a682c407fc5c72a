//! Slow clients over real sockets: they lose their connections, others are served.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::StatusCode;
use axum::routing::{get, post};
use bytes::Bytes;
use futures::stream;
use ringback_service_runtime::Shutdown;
use ringback_service_runtime::listener::{self, BodyTooSlow, Limits};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const GET: &str = "GET / HTTP/1.1\r\nhost: x\r\n\r\n";
const CLOSE: &str = "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
/// Far more than any limit of these tests.
const LONG: Duration = Duration::from_secs(60);

fn limits() -> Limits {
    Limits { max_connections: 64, header: LONG, keep_alive: LONG, body: LONG }
}

async fn upload(body: Body) -> (StatusCode, String) {
    match to_bytes(body, 1 << 20).await {
        Ok(body) => (StatusCode::OK, body.len().to_string()),
        Err(error) => match BodyTooSlow::find(&error) {
            Some(slow) => (StatusCode::REQUEST_TIMEOUT, slow.to_string()),
            None => (StatusCode::BAD_REQUEST, error.to_string()),
        },
    }
}

async fn endless() -> Body {
    Body::from_stream(stream::unfold((), |()| async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        Some((Ok::<_, std::io::Error>(Bytes::from_static(b"x")), ()))
    }))
}

async fn start(limits: Limits) -> (SocketAddr, Shutdown, tokio::task::JoinHandle<()>) {
    let router = Router::new()
        .route("/", get(|| async { "here" }))
        .route("/upload", post(upload))
        .route("/endless", get(endless));
    let tcp = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = tcp.local_addr().expect("an address");
    let stop = Shutdown::new();
    let end = stop.clone();
    let task = tokio::spawn(async move { listener::serve(tcp, router, limits, end.triggered()).await });
    (address, stop, task)
}

async fn connect(address: SocketAddr, text: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("connected");
    stream.write_all(text.as_bytes()).await.expect("sent");
    stream
}

/// What comes until the server hangs up.
async fn rest(mut stream: TcpStream) -> String {
    let mut all = Vec::new();
    // A reset says the same as an end.
    let _ = tokio::time::timeout(LONG, stream.read_to_end(&mut all)).await.expect("it hangs up");
    String::from_utf8_lossy(&all).into_owned()
}

/// One answer of a connection that stays open.
async fn answer(stream: &mut TcpStream) -> String {
    let mut all = Vec::new();
    while !all.ends_with(b"here") {
        let n = stream.read_buf(&mut all).await.expect("an answer");
        assert!(n > 0, "{}", String::from_utf8_lossy(&all));
    }
    String::from_utf8(all).expect("text")
}

/// Sends a byte every 50 ms until the connection breaks.
async fn drip(mut stream: TcpStream) -> Duration {
    let begun = Instant::now();
    let (mut read, mut write) = stream.split();
    let dripping = async {
        while write.write_all(b"a").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let mut end = [0; 1024];
    let ended = async { while read.read(&mut end).await.is_ok_and(|n| n > 0) {} };
    let broken = async {
        tokio::select! { () = dripping => {}, () = ended => {} }
    };
    tokio::time::timeout(LONG, broken).await.expect("a client that drips is let go");
    begun.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_that_drip_are_let_go_and_others_are_served() {
    let quick = Limits { header: Duration::from_millis(500), max_connections: 16, ..limits() };
    let (address, ..) = start(quick).await;
    // They take every place; whoever comes then waits for one of them at most.
    let slow: Vec<_> = (0..16)
        .map(|n| {
            let begin = if n % 2 == 0 { "" } else { "GET / HTTP/1.1\r\nx: " };
            tokio::spawn(async move { drip(connect(address, begin).await).await })
        })
        .collect();
    for _ in 0..20 {
        let text = rest(connect(address, CLOSE).await).await;
        assert!(text.ends_with("here"), "{text}");
    }
    for task in slow {
        assert!(task.await.expect("no panic") >= Duration::from_millis(400));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_head_that_drips_is_let_go_too() {
    let (address, ..) = start(Limits { header: Duration::from_millis(300), ..limits() }).await;
    let mut stream = connect(address, GET).await;
    answer(&mut stream).await;
    // Waiting is allowed far longer than a head may take.
    tokio::time::sleep(Duration::from_millis(800)).await;
    stream.write_all(GET.as_bytes()).await.expect("sent");
    answer(&mut stream).await;
    stream.write_all(b"GET ").await.expect("sent");
    assert_eq!(rest(stream).await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_asks_nothing_ends() {
    let quick = Duration::from_millis(300);
    let (address, ..) = start(Limits { keep_alive: quick, ..limits() }).await;
    let mut kept = connect(address, GET).await;
    answer(&mut kept).await;
    assert_eq!(rest(kept).await, "");
    let (address, ..) = start(Limits { header: quick, ..limits() }).await;
    assert_eq!(rest(connect(address, "").await).await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_drips_is_answered_and_a_quick_one_may_be_long() {
    let (address, ..) = start(Limits { body: Duration::from_millis(400), ..limits() }).await;
    let head =
        |length: usize| format!("POST /upload HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n");
    let mut stream = connect(address, &head(1000)).await;
    let (mut read, mut write) = stream.split();
    let dripping = async {
        while write.write_all(b"a").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let mut all = Vec::new();
    let reading = async {
        while !String::from_utf8_lossy(&all).contains("too slowly") {
            let n = read.read_buf(&mut all).await.expect("an answer");
            assert!(n > 0, "no answer: {}", String::from_utf8_lossy(&all));
        }
    };
    let answered = async {
        tokio::select! { () = reading => {}, () = async { dripping.await; std::future::pending().await } => {} }
    };
    tokio::time::timeout(LONG, answered).await.expect("a body that drips is let go");
    assert!(String::from_utf8_lossy(&all).starts_with("HTTP/1.1 408"));
    // 64 KiB earn 4 s: three pauses of 300 ms are within the pace.
    let mut stream = connect(address, &head(4 * 64 * 1024)).await;
    for _ in 0..4 {
        stream.write_all(&[b'x'; 64 * 1024]).await.expect("sent");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    let mut all = Vec::new();
    while !all.ends_with(b"262144") {
        let n = stream.read_buf(&mut all).await.expect("an answer");
        assert!(n > 0, "{}", String::from_utf8_lossy(&all));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scarce_listener_keeps_no_connection() {
    let (address, ..) = start(Limits { max_connections: 4, ..limits() }).await;
    let mut held = Vec::new();
    for _ in 0..4 {
        let mut stream = connect(address, "GET /endless HTTP/1.1\r\nhost: x\r\n\r\n").await;
        let mut first = [0; 64];
        if held.len() < 3 {
            assert!(stream.read(&mut first).await.expect("the beginning") > 0);
        }
        held.push(stream);
    }
    drop(held.pop());
    let text = rest(connect(address, GET).await).await;
    assert!(text.contains("connection: close") && text.ends_with("here"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_waits_for_open_requests_and_dropping_breaks_them_off() {
    let (address, stop, task) = start(limits()).await;
    let mut idle = connect(address, GET).await;
    answer(&mut idle).await;
    stop.trigger();
    assert_eq!(rest(idle).await, "");
    task.await.expect("it ended");
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");

    let (address, stop, task) = start(limits()).await;
    let mut open = connect(address, "GET /endless HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let mut first = [0; 64];
    assert!(open.read(&mut first).await.expect("the beginning") > 0);
    stop.trigger();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!task.is_finished(), "an open request is waited for");
    task.abort();
    let _ = rest(open).await;
}
