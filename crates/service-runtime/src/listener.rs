//! HTTP listeners that slow clients cannot hold up.
//!
//! A connection ends when the head of a request does not come within [`Limits::header`], when nothing is asked for
//! [`Limits::keep_alive`], or when a request's body comes slower than [`Limits::body`] allows. No more connections than
//! [`Limits::max_connections`] are open at once: others wait in the system's queue until one ends, and while less than
//! a quarter is free no connection is kept for a further request.

mod body;
mod io;

use crate::shutdown::Shutdown;
use axum::Router;
use axum::body::{Body, HttpBody as _};
use axum::extract::ConnectInfo;
use axum::http::{HeaderValue, Request, Response, header};
use body::{AnswerBody, PacedBody};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use io::{Phase, WatchedStream};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service as _;

pub use body::BodyTooSlow;

/// Pause after the system could not accept, mostly for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// With room for fewer connections than this (and than asked for) the operator is told.
const FEW: u32 = 4096;
/// File descriptors left to the rest of the process.
const OTHER_FILES: u64 = 256;

/// What a client may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections open at the same time.
    pub max_connections: u32,
    /// From the first byte of a request, or the start of the connection, to the end of its head.
    pub header: Duration,
    /// How long a connection may wait for its next request.
    pub keep_alive: Duration,
    /// For a request's body, beside one second for every [`BODY_BYTES_PER_SECOND`] that have come.
    pub body: Duration,
}

/// A body that comes at least this fast may take as long as it is long.
pub const BODY_BYTES_PER_SECOND: u64 = 16 * 1024;

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 25_000,
            header: Duration::from_secs(10),
            // Proxies keep theirs for 60 s: the side that asks should be the first to hang up.
            keep_alive: Duration::from_secs(75),
            body: Duration::from_secs(30),
        }
    }
}

impl Limits {
    /// For probes and metrics: few and quick clients.
    #[must_use]
    pub fn operations() -> Self {
        Self { max_connections: 256, body: Duration::from_secs(10), ..Self::default() }
    }

    /// The connections that the system's limit on open files leaves room for; the soft limit is raised as far as needed.
    fn connections(&self) -> u32 {
        use rustix::process::{Resource, getrlimit, setrlimit};
        let wanted = u64::from(self.max_connections) + OTHER_FILES;
        let mut limit = getrlimit(Resource::Nofile);
        if limit.current.is_some_and(|soft| soft < wanted) {
            let raised = limit.maximum.map_or(wanted, |hard| hard.min(wanted));
            let asked = rustix::process::Rlimit { current: Some(raised), maximum: limit.maximum };
            if setrlimit(Resource::Nofile, asked).is_ok() {
                limit = asked;
            }
        }
        let room =
            limit.current.map_or(u64::MAX, |soft| soft.saturating_sub(OTHER_FILES).max(soft / 4).max(1));
        let allowed = u32::try_from(room).unwrap_or(u32::MAX).min(self.max_connections);
        if allowed < self.max_connections.min(FEW) {
            tracing::warn!(
                allowed,
                wanted = self.max_connections,
                "the limit on open files (ulimit -n) leaves room for fewer connections"
            );
        }
        allowed
    }
}

/// Serves `router` until `stop` is triggered and open requests have ended. Each request carries [`ConnectInfo`]. Whoever
/// drops this future breaks open requests off.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: impl Future<Output = ()>) {
    let places = limits.connections();
    let shared = Arc::new(Shared {
        router,
        limits,
        free: Arc::new(Semaphore::new(places as usize)),
        scarce: places as usize / 4,
        stop: Shutdown::new(),
        dropped: CancellationToken::new(),
    });
    let _dropped = shared.dropped.clone().drop_guard();
    let connections = TaskTracker::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = async {
            let place = Arc::clone(&shared.free).acquire_owned().await;
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            accepted = accepted => accepted,
            () = &mut stop => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    let _place = place;
                    shared.connection(stream, peer).await;
                });
            }
            Err(error) if is_of_connection(&error) => {}
            Err(error) => {
                tracing::error!(%error, "a connection cannot be accepted");
                tokio::select! {
                    () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                    () = &mut stop => break,
                }
            }
        }
    }
    drop(listener);
    shared.stop.trigger();
    connections.close();
    connections.wait().await;
}

/// A client that hung up before it was accepted is no fault of the listener.
fn is_of_connection(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionRefused | ConnectionAborted | ConnectionReset)
}

struct Shared {
    router: Router,
    limits: Limits,
    free: Arc<Semaphore>,
    /// With fewer free places than this no connection is kept.
    scarce: usize,
    stop: Shutdown,
    dropped: CancellationToken,
}

impl Shared {
    async fn connection(self: Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        // An answer is mostly one small packet: it must not wait for more.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY cannot be set");
        }
        let phase = Arc::new(Phase::default());
        let stream = TokioIo::new(WatchedStream::new(stream, Arc::clone(&phase), self.limits.header));
        let service = hyper::service::service_fn(|request| self.request(request, peer, &phase));
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(self.limits.keep_alive);
        let mut connection = std::pin::pin!(builder.serve_connection(stream, service));
        let served = async {
            tokio::select! {
                ended = &mut connection => ended,
                () = self.stop.triggered() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            }
        };
        let ended = tokio::select! {
            ended = served => ended,
            () = self.dropped.cancelled() => return,
        };
        if let Err(error) = ended {
            tracing::trace!(%peer, %error, "a connection broke");
        }
    }

    fn request(
        &self,
        request: Request<Incoming>,
        peer: SocketAddr,
        phase: &Arc<Phase>,
    ) -> impl Future<Output = Result<Response<Body>, Infallible>> + use<> {
        phase.request();
        let body_time = self.limits.body;
        let mut request = request.map(|body| {
            if body.is_end_stream() { Body::empty() } else { Body::new(PacedBody::new(body, body_time)) }
        });
        request.extensions_mut().insert(ConnectInfo(peer));
        let (mut router, phase) = (self.router.clone(), Arc::clone(phase));
        let (free, scarce) = (Arc::clone(&self.free), self.scarce);
        async move {
            let Ok(mut response) = router.call(request).await;
            if free.available_permits() < scarce {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok(response.map(|body| Body::new(AnswerBody::new(body, phase))))
        }
    }
}
