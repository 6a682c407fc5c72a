//! The counting webhook receiver: notes when each job's webhook came, and checks a sample of them fully.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use memchr::memmem;
use tokio::net::TcpListener;
use uuid::Uuid;

use crate::board::Board;
use crate::error::BenchError;
use crate::signature;

/// The path of webhooks that must be signed.
pub const HOOK_PATH: &str = "/hook";
/// The path of the floor's POSTs, which nobody signs.
pub const FLOOR_PATH: &str = "/floor";
/// The key in a job's input that holds its slot number.
pub const SLOT_KEY: &str = "bench_n";

/// What was wrong with webhooks, counted.
#[derive(Debug, Default)]
pub struct Faults {
    /// Webhooks whose signature, headers or body did not hold.
    pub bad: AtomicU64,
    /// Webhooks of no job of ours.
    pub stray: AtomicU64,
    /// Webhooks that were checked fully.
    pub checked: AtomicU64,
    first: Mutex<Option<String>>,
}

impl Faults {
    fn note(&self, counter: &AtomicU64, text: impl FnOnce() -> String) {
        counter.fetch_add(1, Relaxed);
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(text);
    }

    /// The first fault in words.
    pub fn first(&self) -> Option<String> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A running receiver. It ends with the process.
pub struct Receiver {
    /// Where it listens.
    pub address: SocketAddr,
    state: Arc<State>,
}

struct State {
    board: Arc<Board>,
    key: Vec<u8>,
    sample_every: u64,
    seen: AtomicU64,
    faults: Faults,
}

impl Receiver {
    /// Listens on loopback. One in `sample_every` signed webhooks is verified and parsed; all are counted.
    pub async fn start(board: Arc<Board>, key: Vec<u8>, sample_every: u64) -> Result<Self, BenchError> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let state = Arc::new(State {
            board,
            key,
            sample_every: sample_every.max(1),
            seen: AtomicU64::new(0),
            faults: Faults::default(),
        });
        tokio::spawn(accept(listener, Arc::clone(&state)));
        Ok(Self { address, state })
    }

    /// What was wrong so far.
    pub fn faults(&self) -> &Faults {
        &self.state.faults
    }

    /// The URL that jobs name as their webhook.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

async fn accept(listener: TcpListener, state: Arc<State>) {
    loop {
        // Out of file descriptors is the only lasting reason; the sender sees refused connections and retries.
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            continue;
        };
        stream.set_nodelay(true).ok();
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            let service = service_fn(|request| take(&state, request));
            http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service)
                .await
                .ok();
        });
    }
}

async fn take(state: &State, request: Request<Incoming>) -> Result<Response<Empty<Bytes>>, hyper::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let at_ns = state.board.now_ns();
    let signed = head.uri.path() == HOOK_PATH;
    if signed && state.seen.fetch_add(1, Relaxed).is_multiple_of(state.sample_every) {
        state.faults.checked.fetch_add(1, Relaxed);
        if let Err(reason) = check(&state.key, &head.headers, &body) {
            state.faults.note(&state.faults.bad, || format!("{reason}; body {}", excerpt(&body)));
        }
    } else if signed && !head.headers.contains_key("webhook-signature") {
        state.faults.note(&state.faults.bad, || "a webhook without webhook-signature".to_owned());
    }
    let known =
        slot_number(&body).zip(job_id(&body)).is_some_and(|(n, id)| state.board.arrived(n, id, at_ns));
    if !known {
        state.faults.note(&state.faults.stray, || format!("no job of this bench: {}", excerpt(&body)));
    }
    let mut response = Response::new(Empty::new());
    *response.status_mut() = StatusCode::OK;
    Ok(response)
}

fn check(key: &[u8], headers: &HeaderMap, body: &[u8]) -> Result<(), String> {
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|error| error.to_string())?.as_secs();
    signature::verify(key, headers, body, now_s)?;
    let json: serde_json::Value =
        serde_json::from_slice(body).map_err(|error| format!("not JSON: {error}"))?;
    if json["status"] != "COMPLETED" {
        return Err(format!("status is {} instead of COMPLETED", json["status"]));
    }
    if json["output"].is_null() || json["output"] != json["input"] {
        return Err("output is not the input that echo was given".to_owned());
    }
    Ok(())
}

/// The slot number in a body, found without parsing it.
pub(crate) fn slot_number(body: &[u8]) -> Option<u64> {
    let at = memmem::find(body, b"\"bench_n\":")? + SLOT_KEY.len() + 3;
    let rest = body.get(at..)?;
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
}

/// The value of the first `"id"` key, for answers and webhooks alike. Inputs of the bench hold no such key.
pub fn job_id(body: &[u8]) -> Option<Uuid> {
    let after_key = body.get(memmem::find(body, b"\"id\"")? + 4..)?;
    let open = after_key.iter().position(|byte| *byte == b'"')? + 1;
    let value = after_key.get(open..)?;
    let close = value.iter().position(|byte| *byte == b'"')?;
    Uuid::try_parse_ascii(&value[..close]).ok()
}

fn excerpt(body: &[u8]) -> String {
    String::from_utf8_lossy(&body[..body.len().min(400)]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Connection;
    use http::Method;

    #[test]
    fn finds_number_and_id_without_parsing() {
        let id = Uuid::now_v7();
        let body = format!(r#"{{"delayTime":3,"id": "{id}","input":{{"bench_n":4711,"text":"x"}}}}"#);
        assert_eq!(slot_number(body.as_bytes()), Some(4711));
        assert_eq!(job_id(body.as_bytes()), Some(id));
        assert_eq!(slot_number(br#"{"bench_n":"x"}"#), None);
        assert_eq!(job_id(br#"{"id":"sync"}"#), None);
    }

    #[tokio::test]
    async fn an_unsigned_or_unknown_webhook_is_a_fault_and_a_floor_post_is_not() {
        let board = Arc::new(Board::default());
        let receiver = Receiver::start(Arc::clone(&board), b"key".to_vec(), 1).await.unwrap();
        let mut connection = Connection::open(&receiver.address.to_string(), None).await.unwrap();
        let body =
            |n: u64| Bytes::from(format!(r#"{{"id":"{}","input":{{"bench_n":{n}}}}}"#, Uuid::now_v7()));
        let n = board.open();

        connection.send(Method::POST, &FLOOR_PATH.parse().unwrap(), body(n)).await.unwrap();
        assert_eq!((board.received(), receiver.faults().first()), (1, None));

        connection.send(Method::POST, &HOOK_PATH.parse().unwrap(), body(n)).await.unwrap();
        assert_eq!(receiver.faults().bad.load(Relaxed), 1);
        assert!(receiver.faults().first().unwrap().contains("webhook-id"));

        connection.send(Method::POST, &FLOOR_PATH.parse().unwrap(), body(n + 1)).await.unwrap();
        assert_eq!(receiver.faults().stray.load(Relaxed), 1);
    }
}
