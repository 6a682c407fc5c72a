//! The receiver's book: each webhook-id with its copies, their bytes and their order.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use ringback_service_runtime::time::now_ms;
use ringback_store::deliveries::partition_of;
use tokio::net::TcpListener;
use uuid::Uuid;

use crate::error::BenchError;
use crate::signature;

/// One webhook-id.
#[derive(Debug)]
struct Entry {
    /// When each came, Unix ms.
    copies: Vec<i64>,
    bytes: u64,
}

/// What was wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Faults {
    /// A copy with other bytes.
    pub(super) altered: u64,
    /// The first copy came before the first copy of a lower one of its job.
    pub(super) disordered: u64,
    /// Signature or headers did not hold.
    pub(super) unsigned: u64,
    /// The first of them in words.
    pub(super) first: Option<String>,
}

#[derive(Debug, Default)]
struct Book {
    entries: HashMap<String, Entry>,
    last_seq: HashMap<String, u64>,
    faults: Faults,
    last_at: Option<Instant>,
}

/// A receiver on loopback. `/drip…` answers 200 and drips its body; every other path answers 200 at once.
pub(super) struct Ledger {
    /// Where it listens.
    pub(super) address: SocketAddr,
    state: Arc<State>,
}

struct State {
    book: Mutex<Book>,
    posts: AtomicU64,
    key: Vec<u8>,
    /// When each number arrived first.
    arrivals: Mutex<HashMap<u64, Instant>>,
}

impl Ledger {
    /// Listens on a free port.
    pub(super) async fn start() -> Result<Self, BenchError> {
        Self::listen(SocketAddr::from(([127, 0, 0, 1], 0))).await
    }

    /// Listens there.
    pub(super) async fn listen(address: SocketAddr) -> Result<Self, BenchError> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let key = signature::key_of(crate::instance::WEBHOOK_SECRET).unwrap_or_default();
        let state = Arc::new(State {
            book: Mutex::default(),
            posts: AtomicU64::new(0),
            key,
            arrivals: Mutex::default(),
        });
        tokio::spawn(accept(listener, Arc::clone(&state)));
        Ok(Self { address, state })
    }

    /// The URL of a path.
    pub(super) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// POSTs so far, copies included.
    pub(super) fn posts(&self) -> u64 {
        self.state.posts.load(Relaxed)
    }

    /// Different webhook-ids so far.
    pub(super) fn distinct(&self) -> u64 {
        self.book().entries.len() as u64
    }

    /// When the last POST came.
    pub(super) fn last_at(&self) -> Option<Instant> {
        self.book().last_at
    }

    /// What was wrong so far.
    pub(super) fn faults(&self) -> Faults {
        self.book().faults.clone()
    }

    /// Copies beyond the first.
    pub(super) fn doubles(&self) -> u64 {
        self.book().entries.values().map(|entry| entry.copies.len() as u64 - 1).sum()
    }

    /// When the copies of each webhook-id came, with the partition of its job.
    pub(super) fn copies(&self, partitions: u16) -> Vec<(u16, Vec<i64>)> {
        let book = self.book();
        let entries = book.entries.iter().map(|(id, entry)| {
            let owner = id.split('_').nth(1).and_then(|id| Uuid::try_parse(id).ok()).unwrap_or_default();
            (partition_of(owner.as_bytes(), partitions), entry.copies.clone())
        });
        entries.collect()
    }

    /// When the delivery with this number arrived first.
    pub(super) fn arrived(&self, n: u64) -> Option<Instant> {
        self.state.arrivals.lock().unwrap_or_else(PoisonError::into_inner).get(&n).copied()
    }

    fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        self.state.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until so many ids have come. False after `patience` without any POST.
    pub(super) async fn until(&self, distinct: u64, patience: Duration) -> bool {
        let began = Instant::now();
        loop {
            if self.distinct() >= distinct {
                return true;
            }
            if self.last_at().unwrap_or(began).elapsed() > patience && began.elapsed() > patience {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn accept(listener: TcpListener, state: Arc<State>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        stream.set_nodelay(true).ok();
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            let service = service_fn(|request| take(&state, request));
            let http = http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service);
            http.await.ok();
        });
    }
}

type Answer = Response<UnsyncBoxBody<Bytes, std::convert::Infallible>>;

async fn take(state: &State, request: Request<Incoming>) -> Result<Answer, hyper::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    state.posts.fetch_add(1, Relaxed);
    if head.headers.contains_key("webhook-id") {
        note(state, &head.headers, &body);
    }
    if head.uri.path().starts_with("/drip") {
        let drops = futures::stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Some((Ok(Frame::data(Bytes::from_static(b"."))), ()))
        });
        return Ok(Response::new(BodyExt::boxed_unsync(StreamBody::new(drops))));
    }
    Ok(Response::new(BodyExt::boxed_unsync(Empty::new())))
}

fn note(state: &State, headers: &HeaderMap, body: &[u8]) {
    let (now, at_ms) = (Instant::now(), now_ms());
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let (id, seq) = (text("webhook-id"), text("webhook-sequence").parse::<u64>().unwrap_or_default());
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    let bytes = hasher.finish();
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let signed = signature::verify(&state.key, headers, body, now_s);
    if let Some(n) = crate::receiver::slot_number(body) {
        let mut arrivals = state.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        arrivals.entry(n).or_insert(now);
    }
    let mut book = state.book.lock().unwrap_or_else(PoisonError::into_inner);
    book.last_at = Some(now);
    if let Err(reason) = signed {
        book.faults.unsigned += 1;
        book.faults.first.get_or_insert(reason);
    }
    if let Some(entry) = book.entries.get_mut(id) {
        entry.copies.push(at_ms);
        if entry.bytes != bytes {
            book.faults.altered += 1;
            book.faults.first.get_or_insert_with(|| format!("{id} came with other bytes"));
        }
        return;
    }
    book.entries.insert(id.to_owned(), Entry { copies: vec![at_ms], bytes });
    // `msg_<job>_<seq>_<target>`: what lies before the number is the job.
    let job = id.rsplitn(3, '_').last().unwrap_or(id).to_owned();
    let last = book.last_seq.entry(job).or_default();
    let disordered = *last > seq;
    *last = seq.max(*last);
    if disordered {
        book.faults.disordered += 1;
        book.faults.first.get_or_insert_with(|| format!("{id} came after a later one of its job"));
    }
}
