//! A receiver on bare sockets that does everything wrong, and counts.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// What it does with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Habit {
    /// Answers 200, then drips its body for ever.
    Drips,
    /// Answers 200, then sends as fast as it can without end.
    NeverEnds,
    /// Drips the head of its answer.
    DripsItsHead,
    /// Reads nothing and says nothing: also a TLS handshake that stalls.
    Silent,
    /// The kernel takes the connection, nobody ever does: half-open.
    HalfOpen,
}

/// The receiver.
#[derive(Debug)]
pub struct Hostile {
    /// Where it listens.
    pub address: SocketAddr,
    connections: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
    task: JoinHandle<()>,
    /// Keeps the port of a half-open one.
    _kept: Option<std::net::TcpListener>,
}

impl Hostile {
    /// Listens on a free port of loopback.
    pub async fn start(habit: Habit) -> Self {
        let (connections, open) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        if habit == Habit::HalfOpen {
            let kept = std::net::TcpListener::bind("127.0.0.1:0").expect("listen");
            let task = tokio::spawn(std::future::pending());
            return Self {
                address: kept.local_addr().expect("listen"),
                connections,
                open,
                task,
                _kept: Some(kept),
            };
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let address = listener.local_addr().expect("listen");
        let (all, now) = (Arc::clone(&connections), Arc::clone(&open));
        let task = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                all.fetch_add(1, Ordering::SeqCst);
                now.fetch_add(1, Ordering::SeqCst);
                let now = Arc::clone(&now);
                tokio::spawn(async move {
                    behave(stream, habit).await;
                    now.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { address, connections, open, task, _kept: None }
    }

    /// A URL of it.
    #[must_use]
    pub fn url(&self, scheme: &str) -> String {
        format!("{scheme}://{}/hook", self.address)
    }

    /// Connections so far.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// Connections open now.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ends when the sender gives up.
async fn behave(mut stream: TcpStream, habit: Habit) {
    let mut buffer = vec![0; 16 * 1024];
    if habit == Habit::Silent {
        // Only the end of the connection is waited for; what came is dropped unread by the kernel's buffer.
        while stream.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
        return;
    }
    if stream.read(&mut buffer).await.is_err() {
        return;
    }
    let head: &[u8] = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    let chunk = [b"4000\r\n".as_slice(), &[b'x'; 0x4000], b"\r\n"].concat();
    match habit {
        Habit::DripsItsHead => {
            for byte in head.iter().cycle() {
                tokio::time::sleep(Duration::from_millis(100)).await;
                if stream.write_all(&[*byte]).await.is_err() {
                    return;
                }
            }
        }
        _ => {
            if stream.write_all(head).await.is_err() {
                return;
            }
        }
    }
    loop {
        let sent = if habit == Habit::NeverEnds {
            stream.write_all(&chunk).await
        } else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            stream.write_all(b"1\r\n.\r\n").await
        };
        if sent.is_err() {
            return;
        }
    }
}
