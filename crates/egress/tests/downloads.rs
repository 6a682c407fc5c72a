//! Downloads from servers that misbehave, over real sockets.

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ringback_domain::webhook::url::UrlPolicy;
use ringback_egress::{Client, EgressError, Limits};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const TIME: Duration = Duration::from_millis(800);
const CAP: u64 = 100_000;

fn client(policy: UrlPolicy) -> Client {
    // Another test of this process may have installed it before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::new(policy, Limits::default()).unwrap()
}

async fn server<F, Fut>(behave: F) -> SocketAddr
where
    F: Fn(TcpStream, String) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut seen = Vec::new();
            let mut buffer = [0; 4096];
            while !seen.windows(4).any(|w| w == b"\r\n\r\n") {
                match stream.read(&mut buffer).await {
                    Ok(0) | Err(_) => break,
                    Ok(n) => seen.extend_from_slice(&buffer[..n]),
                }
            }
            let head = String::from_utf8_lossy(&seen).into_owned();
            let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
            tokio::spawn(behave(stream, path));
        }
    });
    address
}

async fn fetch(client: &Client, url: &str) -> Result<(u16, Vec<u8>), EgressError> {
    let mut download = client.download(client.check(url)?, TIME, CAP).await?;
    let mut bytes = Vec::new();
    while let Some(chunk) = download.chunk().await? {
        bytes.extend_from_slice(&chunk);
    }
    Ok((download.status(), bytes))
}

async fn text(stream: &mut TcpStream, text: String) {
    let _ = stream.write_all(text.as_bytes()).await;
}

#[tokio::test]
async fn a_file_comes_whole_and_through_a_redirect_that_the_rules_allow() {
    let address = server(|mut stream, path| async move {
        if path == "/stable" {
            text(
                &mut stream,
                "HTTP/1.1 302 F\r\nlocation: /file?sig=1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
                    .into(),
            )
            .await;
        } else {
            text(
                &mut stream,
                "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello".into(),
            )
            .await;
        }
    })
    .await;
    let client = client(UrlPolicy::development());
    for path in ["/file", "/stable"] {
        assert_eq!(
            fetch(&client, &format!("http://{address}{path}")).await.unwrap(),
            (200, b"hello".to_vec())
        );
    }
}

#[tokio::test]
async fn a_redirect_to_a_denied_address_is_never_dialled() {
    for target in ["http://169.254.169.254/latest", "http://10.0.0.1/", "file:///etc/passwd", "ftp://x/", ""]
    {
        let address = server(move |mut stream, _| async move {
            text(&mut stream, format!("HTTP/1.1 302 F\r\nlocation: {target}\r\ncontent-length: 0\r\n\r\n"))
                .await;
        })
        .await;
        let error =
            fetch(&client(UrlPolicy::development()), &format!("http://{address}/")).await.unwrap_err();
        assert!(matches!(error, EgressError::Url(_) | EgressError::Redirect(_)), "{target}: {error}");
    }
}

#[tokio::test]
async fn dripping_endless_lying_and_cut_files_are_errors() {
    let address = server(|mut stream, path| async move {
        match path.as_str() {
            "/drip" => {
                text(&mut stream, "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n".into()).await;
                while stream.write_all(b"x").await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            "/endless" => {
                text(&mut stream, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".into()).await;
                let chunk = format!("4000\r\n{}\r\n", "y".repeat(0x4000));
                while stream.write_all(chunk.as_bytes()).await.is_ok() {}
            }
            "/announced" => {
                text(&mut stream, format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", CAP + 1)).await
            }
            "/cut" => text(&mut stream, "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf".into()).await,
            "/loop" => {
                text(
                    &mut stream,
                    "HTTP/1.1 302 F\r\nlocation: /loop\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
                        .into(),
                )
                .await
            }
            _ => std::future::pending().await,
        }
    })
    .await;
    let client = client(UrlPolicy::development());
    let get = |path: &'static str| {
        let client = client.clone();
        async move { fetch(&client, &format!("http://{address}{path}")).await.unwrap_err() }
    };
    let begun = Instant::now();
    assert!(matches!(get("/drip").await, EgressError::Timeout(_)));
    assert!(matches!(get("/silent").await, EgressError::Timeout(_)));
    assert!(begun.elapsed() < TIME * 4, "{:?}", begun.elapsed());
    assert!(matches!(get("/endless").await, EgressError::TooLarge(CAP)));
    assert!(matches!(get("/announced").await, EgressError::TooLarge(CAP)));
    assert!(matches!(get("/cut").await, EgressError::Closed(_)));
    assert!(matches!(get("/loop").await, EgressError::Redirect(_)));
}
