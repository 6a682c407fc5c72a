//! Receivers that misbehave, over real sockets (reference/webhooks.md sections 5, 6 and 8).

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::HeaderMap;
use ringback_domain::webhook::address::AddressPolicy;
use ringback_domain::webhook::response::TransportFault;
use ringback_domain::webhook::url::UrlPolicy;
use ringback_egress::{Answer, Client, EgressError, Limits, Lookup, Permit, Post};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

fn limits() -> Limits {
    Limits {
        deadline: Duration::from_millis(600),
        body_time: Duration::from_millis(300),
        max_body_bytes: 1000,
        ..Limits::default()
    }
}

fn client_with(policy: UrlPolicy, lookup: Option<Arc<dyn Lookup>>) -> Client {
    // Another test of this process may have installed it before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match lookup {
        Some(lookup) => Client::with_lookup(policy, limits(), lookup).unwrap(),
        None => Client::new(policy, limits()).unwrap(),
    }
}

fn client() -> Client {
    client_with(UrlPolicy::development(), None)
}

async fn post(client: &Client, url: &str) -> Result<Answer, EgressError> {
    let url = client.check(url)?;
    let (headers, body) = (HeaderMap::new(), Bytes::from_static(b"{}"));
    client.post(Post { url, headers, body, deadline: None }).await.result
}

/// Reads one request (headers and a body of two bytes).
async fn read_request(stream: &mut TcpStream) -> bool {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    while !seen.windows(6).any(|w| w == b"\r\n\r\n{}") {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return false,
            Ok(n) => seen.extend_from_slice(&buffer[..n]),
        }
    }
    true
}

/// A server that answers every connection with `behave` and counts the connections.
async fn server<F, Fut>(behave: F) -> (SocketAddr, Arc<AtomicUsize>)
where
    F: Fn(TcpStream, usize) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let number = counted.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(behave(stream, number));
        }
    });
    (address, count)
}

async fn say(mut stream: TcpStream, text: &str) {
    if read_request(&mut stream).await {
        let _ = stream.write_all(text.as_bytes()).await;
        // Held open until the other side is done with it.
        let _ = stream.read(&mut [0; 1]).await;
    }
}

#[tokio::test]
async fn a_dripping_body_does_not_hold_the_verdict() {
    let (address, _) = server(|mut stream, _| async move {
        read_request(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n").await;
        while stream.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let begun = Instant::now();
    let answer = post(&client(), &format!("http://{address}/")).await.unwrap();
    assert_eq!((answer.status, answer.truncated), (200, true));
    assert!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn an_endless_body_is_read_to_the_cap_only() {
    let (address, _) = server(|mut stream, _| async move {
        read_request(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 500 Oh\r\ntransfer-encoding: chunked\r\n\r\n").await;
        let chunk = format!("4000\r\n{}\r\n", "y".repeat(0x4000));
        while stream.write_all(chunk.as_bytes()).await.is_ok() {}
    })
    .await;
    let answer = post(&client(), &format!("http://{address}/")).await.unwrap();
    assert_eq!((answer.status, answer.body.len(), answer.truncated), (500, 1000, true));
}

#[tokio::test]
async fn silence_ends_at_the_deadline_at_every_stage() {
    let silent = server(|mut stream, _| async move {
        read_request(&mut stream).await;
        std::future::pending::<()>().await;
    })
    .await;
    let dripping_headers = server(|mut stream, _| async move {
        read_request(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n").await;
        while stream.write_all(b"x-a: b\r\n").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    })
    .await;
    for (scheme, address) in [("http", silent.0), ("https", silent.0), ("http", dripping_headers.0)] {
        let begun = Instant::now();
        let error = post(&client(), &format!("{scheme}://{address}/")).await.unwrap_err();
        let took = begun.elapsed();
        let endless_headers = scheme == "http" && address == dripping_headers.0;
        let expected = error.fault() == TransportFault::Timeout
            // A hundred headers are too many before the time is up.
            || (endless_headers && error.fault() == TransportFault::Protocol);
        assert!(expected, "{scheme} {error}");
        assert!(took < Duration::from_millis(1200), "{took:?}");
    }
}

#[tokio::test]
async fn a_redirect_is_an_answer_and_its_target_is_never_dialled() {
    let (inner, dialled) = server(|stream, _| say(stream, "HTTP/1.1 200 OK\r\n\r\n")).await;
    let (address, _) = server(move |stream, _| async move {
        let text =
            format!("HTTP/1.1 302 Found\r\nlocation: http://{inner}/secret\r\ncontent-length: 0\r\n\r\n");
        say(stream, &text).await;
    })
    .await;
    let answer = post(&client(), &format!("http://{address}/")).await.unwrap();
    assert_eq!(answer.status, 302);
    assert_eq!(dialled.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn faults_are_told_apart() {
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let (hanging_up, dialled) = server(|mut stream, _| async move {
        read_request(&mut stream).await;
    })
    .await;
    let (babbling, _) = server(|stream, _| say(stream, "220 smtp.example.com ESMTP\r\n\r\n")).await;
    let (no_tls, _) = server(|mut stream, _| async move {
        let _ = stream.write_all(b"HTTP/1.1 400 No TLS here\r\n\r\n").await;
        let _ = stream.read(&mut [0; 1]).await;
    })
    .await;
    let client = client();
    let fault = async |url: String| post(&client, &url).await.unwrap_err().fault();
    assert_eq!(fault(format!("http://{closed}/")).await, TransportFault::Connect);
    assert_eq!(fault(format!("http://{hanging_up}/")).await, TransportFault::Closed);
    assert_eq!(dialled.load(Ordering::SeqCst), 2, "one second try at once, not more");
    assert_eq!(fault(format!("http://{babbling}/")).await, TransportFault::Protocol);
    assert_eq!(fault(format!("https://{no_tls}/")).await, TransportFault::Tls);
    assert_eq!(fault("https://name.invalid/".into()).await, TransportFault::Dns);
}

#[tokio::test]
async fn a_receiver_that_drops_a_kept_connection_gets_the_request_again_at_once() {
    let (address, dialled) = server(|mut stream, number| async move {
        if number == 0 {
            read_request(&mut stream).await;
            return;
        }
        say(stream, "HTTP/1.1 204 No\r\n\r\n").await;
    })
    .await;
    let answer = post(&client(), &format!("http://{address}/")).await.unwrap();
    assert_eq!(answer.status, 204);
    assert_eq!(dialled.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn retry_after_and_the_reason_are_handed_on() {
    let (address, _) = server(|stream, _| {
        say(stream, "HTTP/1.1 429 Slow\r\nretry-after: 17\r\ncontent-length: 4\r\n\r\nbusy")
    })
    .await;
    let answer = post(&client(), &format!("http://{address}/")).await.unwrap();
    assert_eq!(answer.retry_after.as_deref(), Some("17"));
    assert_eq!((&answer.body[..], answer.truncated), (&b"busy"[..], false));
    assert_eq!(answer.remote, Some(address));
}

#[tokio::test]
async fn times_are_measured_where_something_happened() {
    let answer = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    let (address, _) = server(move |mut stream, _| async move {
        for _ in 0..2 {
            if !read_request(&mut stream).await {
                return;
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
            stream.write_all(answer.as_bytes()).await.ok();
        }
    })
    .await;
    let client =
        client_with(second_loopback_only_and(address.ip()), Some(Fickle::new(vec![vec![address.ip()]])));
    let times = async || {
        let url = client.check(&format!("http://named.example:{}/", address.port())).unwrap();
        let (headers, body) = (HeaderMap::new(), Bytes::from_static(b"{}"));
        let posted = client.post(Post { url, headers, body, deadline: None }).await;
        posted.result.unwrap();
        posted.timings
    };
    let first = times().await;
    assert!(first.dns.is_some() && first.connect.is_some(), "{first:?}");
    assert!(first.first_byte.unwrap() >= Duration::from_millis(30), "{first:?}");
    let second = times().await;
    assert_eq!((second.dns, second.connect), (None, None), "a kept connection");
    assert!(second.first_byte.is_some());
}

/// The answer came in time, and whoever waits for it did not get to run before the deadline was over.
#[tokio::test]
async fn an_answer_that_came_during_a_stall_counts() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (arrived, arrival) = tokio::sync::oneshot::channel();
    // A thread of its own: it goes on while the runtime stands still.
    std::thread::spawn(move || {
        use std::io::{Read as _, Write as _};
        let (mut stream, _) = listener.accept().unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"\r\n\r\n{}") {
            let mut buffer = [0; 4096];
            let n = stream.read(&mut buffer).unwrap();
            seen.extend_from_slice(&buffer[..n]);
        }
        arrived.send(()).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
        std::thread::sleep(Duration::from_secs(2));
    });
    let client = client();
    let url = format!("http://{address}/");
    let stall = async {
        arrival.await.unwrap();
        std::thread::sleep(limits().deadline + Duration::from_millis(200));
    };
    let (answer, ()) = tokio::join!(post(&client, &url), stall);
    assert_eq!(answer.unwrap().status, 200);
}

/// A permit that ends between the decision to send and the sending: while the connection is made, or before the second
/// sending to a receiver that closes without an answer.
#[tokio::test]
async fn nothing_is_sent_once_the_permit_has_ended() {
    let requests = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&requests);
    let (address, _) = server(move |mut stream, _| {
        let seen = Arc::clone(&seen);
        async move {
            if read_request(&mut stream).await {
                seen.fetch_add(1, Ordering::SeqCst);
            }
        }
    })
    .await;
    // How often the permit is asked until it says no; what comes of it; requests that the receiver reads.
    for (answers, withdrawn, sent) in
        [(0, true, 0), (1, true, 0), (2, false, 1), (3, false, 1), (4, false, 2)]
    {
        let client = client();
        let before = requests.load(Ordering::SeqCst);
        let left = AtomicUsize::new(answers);
        let permit = Permit::new(move || {
            left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
        });
        let url = client.check(&format!("http://{address}/")).unwrap();
        let (headers, body) = (HeaderMap::new(), Bytes::from_static(b"{}"));
        let posted = client.post_while(Post { url, headers, body, deadline: None }, permit).await;
        let error = posted.result.unwrap_err();
        assert_eq!(matches!(error, EgressError::Withdrawn), withdrawn, "{answers}: {error}");
        assert_eq!(matches!(error, EgressError::Closed(_)), !withdrawn, "{answers}: {error}");
        assert_eq!(requests.load(Ordering::SeqCst) - before, sent, "{answers}");
    }
}

#[tokio::test]
async fn a_deadline_of_the_receivers_own_is_kept() {
    let (address, _) = server(|stream, _| async move {
        let _silent = stream;
        std::future::pending::<()>().await;
    })
    .await;
    let client = client();
    let url = client.check(&format!("http://{address}/")).unwrap();
    let (headers, body) = (HeaderMap::new(), Bytes::from_static(b"{}"));
    let short = Some(Duration::from_millis(50));
    let error = client.post(Post { url, headers, body, deadline: short }).await.result.unwrap_err();
    assert!(error.to_string().contains("50 ms"), "{error}");
}

#[tokio::test]
async fn connections_are_kept() {
    let (address, dialled) = server(|mut stream, _| async move {
        while read_request(&mut stream).await {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
        }
    })
    .await;
    let client = client();
    for _ in 0..20 {
        assert_eq!(post(&client, &format!("http://{address}/")).await.unwrap().status, 200);
    }
    assert_eq!(dialled.load(Ordering::SeqCst), 1);
}

/// A name server whose answers change with each question.
struct Fickle {
    answers: Vec<Vec<IpAddr>>,
    asked: AtomicUsize,
}

impl Fickle {
    fn new(answers: Vec<Vec<IpAddr>>) -> Arc<Self> {
        Arc::new(Self { answers, asked: AtomicUsize::new(0) })
    }
}

impl Lookup for Fickle {
    fn lookup(&self, _host: String) -> BoxFuture<'static, std::io::Result<Vec<IpAddr>>> {
        let n = self.asked.fetch_add(1, Ordering::SeqCst);
        let answer = self.answers[n.min(self.answers.len() - 1)].clone();
        Box::pin(async move { Ok(answer) })
    }
}

/// http on every port, as an operator may open it.
fn open_policy(addresses: AddressPolicy) -> UrlPolicy {
    UrlPolicy { allow_http: true, ports: vec![1..=u16::MAX], addresses }
}

/// This address may be dialled too.
fn second_loopback_only_and(ip: IpAddr) -> UrlPolicy {
    let own = format!("{ip}/32").parse().unwrap();
    open_policy(AddressPolicy { allow_loopback: false, allow_private: vec![own] })
}

/// Only 127.0.0.2 may be dialled: the rest of loopback plays the denied network.
fn second_loopback_only() -> UrlPolicy {
    open_policy(AddressPolicy { allow_loopback: false, allow_private: vec!["127.0.0.2/32".parse().unwrap()] })
}

#[tokio::test]
async fn a_name_that_changes_its_mind_reaches_only_what_was_checked() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let denied = IpAddr::V4(Ipv4Addr::LOCALHOST);
    // The first answer is fine, every later one is the denied address: with a check apart from the dialling, the
    // check would see the first and the connector the second.
    let allowed: IpAddr = "127.0.0.2".parse().unwrap();
    let lookup = Fickle::new(vec![vec![allowed], vec![denied]]);
    let client = client_with(second_loopback_only(), Some(Arc::clone(&lookup) as Arc<dyn Lookup>));
    let url = format!("http://rebind.example:{port}/");
    let first = post(&client, &url).await.unwrap_err();
    assert_eq!(first.fault(), TransportFault::Connect, "127.0.0.2 was dialled: {first}");
    assert_eq!(lookup.asked.load(Ordering::SeqCst), 1, "one question per connection");
    let second = post(&client, &url).await.unwrap_err();
    assert_eq!(second.fault(), TransportFault::Blocked, "{second}");
    assert!(second.to_string().contains("127.0.0.1"), "{second}");
    let nobody = tokio::time::timeout(Duration::from_millis(50), listener.accept()).await;
    assert!(nobody.is_err(), "the denied address was dialled");
}

#[tokio::test]
async fn denied_answers_are_dropped_from_a_mixed_list() {
    let (address, dialled) = server(|stream, _| say(stream, "HTTP/1.1 200 OK\r\n\r\n")).await;
    let mapped: IpAddr = "::ffff:127.0.0.1".parse().unwrap();
    let lookup = Fickle::new(vec![vec![
        address.ip(),
        mapped,
        "169.254.169.254".parse().unwrap(),
        "64:ff9b::7f00:1".parse().unwrap(),
    ]]);
    let client = client_with(second_loopback_only(), Some(lookup));
    let error = post(&client, &format!("http://mixed.example:{}/", address.port())).await.unwrap_err();
    assert_eq!(error.fault(), TransportFault::Blocked);
    assert_eq!(dialled.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn literal_addresses_are_judged_without_a_resolver() {
    let client = client_with(open_policy(AddressPolicy::default()), None);
    for url in [
        "http://127.0.0.1:8080/",
        "http://[::ffff:127.0.0.1]:8080/",
        "http://2130706433:8080/",
        "http://[::1]:8080/",
    ] {
        let error = post(&client, url).await.unwrap_err();
        assert_eq!(error.fault(), TransportFault::Blocked, "{url}");
    }
}

/// A name server that never answers.
struct Mute(AtomicUsize);

impl Lookup for Mute {
    fn lookup(&self, _host: String) -> BoxFuture<'static, std::io::Result<Vec<IpAddr>>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Box::pin(std::future::pending())
    }
}

#[tokio::test]
async fn a_mute_name_server_is_asked_once_and_ends_at_the_deadline() {
    let lookup = Arc::new(Mute(AtomicUsize::new(0)));
    let client =
        client_with(open_policy(AddressPolicy::default()), Some(Arc::clone(&lookup) as Arc<dyn Lookup>));
    let posts = (0..20).map(|_| post(&client, "http://mute.example/"));
    for result in futures::future::join_all(posts).await {
        assert_eq!(result.unwrap_err().fault(), TransportFault::Timeout);
    }
    assert_eq!(lookup.0.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn errors_never_hold_the_url() {
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let error =
        post(&client(), &format!("http://user:hunter2@{closed}/hook?token=s3cr3t")).await.unwrap_err();
    let told = format!("{error} {error:?}");
    assert!(!told.contains("s3cr3t") && !told.contains("hunter2"), "{told}");
}
