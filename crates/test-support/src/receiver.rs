//! A webhook receiver that counts: every POST with its headers, bytes and verdict, answered as a test says.

use crate::signature;
use crate::wait::until;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http::{HeaderMap, StatusCode};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;

/// How POSTs to one path are answered.
#[derive(Debug, Clone)]
pub enum Mode {
    /// 200 at once.
    Ok,
    /// Always this status.
    Status(u16),
    /// The first `times` tries of each webhook-id get `status`, later ones 200.
    FailFirst {
        /// Tries refused per webhook-id.
        times: usize,
        /// Status of the refusals.
        status: u16,
    },
    /// 200 after this time.
    Slow(Duration),
    /// The answer's head comes at once, its body one byte per `pause` without end.
    Drip(Duration),
    /// Never any answer.
    Hang,
    /// 200 if the body's `status` is this one, else 500.
    AcceptOnly(&'static str),
    /// A redirect to this address.
    Redirect(String),
    /// This status with `Retry-After` in seconds for the first try of each webhook-id, 200 later.
    RetryAfter(u16, u64),
}

/// One POST that came in.
#[derive(Debug, Clone)]
pub struct Hit {
    /// When it was fully read.
    pub at: Instant,
    /// Path it went to, with its query.
    pub path: String,
    /// All headers.
    pub headers: HeaderMap,
    /// The raw body.
    pub body: Bytes,
    /// The body as JSON, null if it is none.
    pub json: Value,
    /// Header `webhook-id`, empty if missing.
    pub webhook_id: String,
    /// Header `webhook-sequence`, 0 if missing or not a number.
    pub sequence: u64,
    /// What is wrong with the signature, if anything.
    pub signature: Result<(), String>,
    /// The status it was (or is to be) answered with; 0 for none.
    pub answered: u16,
}

impl Hit {
    /// The body's `id`: the job it is about.
    #[must_use]
    pub fn job(&self) -> &str {
        self.json["id"].as_str().unwrap_or_default()
    }

    /// The body's `status`.
    #[must_use]
    pub fn status(&self) -> &str {
        self.json["status"].as_str().unwrap_or_default()
    }

    /// A header's text, empty if missing.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

#[derive(Debug, Default)]
struct Shared {
    secret: String,
    hits: Mutex<Vec<Hit>>,
    modes: Mutex<BTreeMap<String, Mode>>,
}

/// The receiver. It lives in the test's own process, so it outlives everything the test kills.
#[derive(Debug)]
pub struct Receiver {
    base: String,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

impl Receiver {
    /// Listens on a free port of loopback; signatures are checked with `secret`.
    pub async fn start(secret: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let base = format!("http://{}", listener.local_addr().expect("an address"));
        let shared = Arc::new(Shared { secret: secret.to_owned(), ..Shared::default() });
        let app = axum::Router::new()
            .fallback(take)
            .layer(axum::extract::DefaultBodyLimit::disable())
            .with_state(Arc::clone(&shared));
        let task = tokio::spawn(async move { axum::serve(listener, app).await.expect("serve") });
        Self { base, shared, task }
    }

    /// The port that it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.base.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port")
    }

    /// The URL of a path.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// Sets how a path (without query) is answered from now on.
    pub fn answer(&self, path: &str, mode: Mode) {
        self.shared.modes.lock().unwrap().insert(path.to_owned(), mode);
    }

    /// Everything that came in, in order.
    #[must_use]
    pub fn hits(&self) -> Vec<Hit> {
        self.shared.hits.lock().unwrap().clone()
    }

    /// What came in for one job.
    #[must_use]
    pub fn hits_of(&self, job: &str) -> Vec<Hit> {
        self.shared.hits.lock().unwrap().iter().filter(|hit| hit.job() == job).cloned().collect()
    }

    /// Number of POSTs so far.
    #[must_use]
    pub fn count(&self) -> usize {
        self.shared.hits.lock().unwrap().len()
    }

    /// The accepted (2xx) hits by webhook-id.
    #[must_use]
    pub fn accepted(&self) -> BTreeMap<String, Vec<Hit>> {
        let mut all: BTreeMap<String, Vec<Hit>> = BTreeMap::new();
        for hit in self.hits() {
            if (200..300).contains(&hit.answered) {
                all.entry(hit.webhook_id.clone()).or_default().push(hit);
            }
        }
        all
    }

    /// Waits for an accepted webhook of a job with this status.
    pub async fn wait_for(&self, job: &str, status: &str, within: Duration) -> Hit {
        until(&format!("the webhook {status} of {job}"), within, || async {
            self.hits_of(job)
                .into_iter()
                .find(|hit| hit.status() == status && (200..300).contains(&hit.answered))
        })
        .await
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn take(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    // A sender that breaks off has delivered nothing.
    let Ok(body) = axum::body::to_bytes(body, usize::MAX).await else { return plain(400) };
    let path = head.uri.path_and_query().map_or_else(|| head.uri.path().to_owned(), ToString::to_string);
    let mode = shared.modes.lock().unwrap().get(head.uri.path()).cloned().unwrap_or(Mode::Ok);
    let text =
        |name: &str| head.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let webhook_id = text("webhook-id");
    let answered = {
        let mut hits = shared.hits.lock().unwrap();
        let tries = hits.iter().filter(|hit| hit.webhook_id == webhook_id).count();
        let answered = if head.method == http::Method::POST { status_of(&mode, tries, &body) } else { 405 };
        hits.push(Hit {
            at: Instant::now(),
            path,
            json: serde_json::from_slice(&body).unwrap_or(Value::Null),
            sequence: text("webhook-sequence").parse().unwrap_or_default(),
            signature: signature::verify(&shared.secret, &head.headers, &body),
            headers: head.headers,
            body,
            webhook_id,
            answered,
        });
        answered
    };
    reply(mode, answered).await
}

fn status_of(mode: &Mode, tries_before: usize, body: &[u8]) -> u16 {
    match mode {
        Mode::Ok | Mode::Slow(_) | Mode::Drip(_) => 200,
        Mode::Status(status) => *status,
        Mode::FailFirst { times, status } => {
            if tries_before < *times {
                *status
            } else {
                200
            }
        }
        Mode::AcceptOnly(wanted) => match serde_json::from_slice::<Value>(body) {
            Ok(json) if json["status"] == *wanted => 200,
            _ => 500,
        },
        Mode::Hang => 0,
        Mode::Redirect(_) => 302,
        Mode::RetryAfter(status, _) => {
            if tries_before == 0 {
                *status
            } else {
                200
            }
        }
    }
}

async fn reply(mode: Mode, status: u16) -> Response {
    match mode {
        Mode::Slow(time) => {
            tokio::time::sleep(time).await;
            plain(status)
        }
        Mode::Hang => std::future::pending().await,
        Mode::Drip(pause) => {
            let bytes = stream::repeat(()).then(move |()| async move {
                tokio::time::sleep(pause).await;
                Ok::<_, std::io::Error>(Bytes::from_static(b" "))
            });
            Response::new(Body::from_stream(bytes))
        }
        Mode::Redirect(to) => {
            let mut response = plain(status);
            response.headers_mut().insert("location", to.parse().expect("a header value"));
            response
        }
        Mode::RetryAfter(_, seconds) if status != 200 => {
            let mut response = plain(status);
            response.headers_mut().insert("retry-after", seconds.into());
            response
        }
        Mode::Ok | Mode::Status(_) | Mode::FailFirst { .. } | Mode::AcceptOnly(_) | Mode::RetryAfter(..) => {
            plain(status)
        }
    }
}

fn plain(status: u16) -> Response {
    let mut response = Response::new(Body::from("{\"acknowledged\":true}"));
    *response.status_mut() = StatusCode::from_u16(status).expect("a status");
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Client;
    use serde_json::json;

    #[tokio::test(flavor = "multi_thread")]
    async fn it_counts_and_answers_as_told() {
        let receiver = Receiver::start(&signature::new_secret()).await;
        receiver.answer("/twice", Mode::FailFirst { times: 2, status: 500 });
        receiver.answer("/end", Mode::AcceptOnly("COMPLETED"));
        let client = Client::new(&receiver.url(""), "");
        let post = |path: &'static str, id: &'static str, status: &'static str| {
            let client = client.clone();
            async move {
                let body = json!({"id": "job", "status": status}).to_string();
                client.send(http::Method::POST, path, &[("webhook-id", id)], body).await.unwrap().status
            }
        };
        for expected in [500, 500, 200, 200] {
            assert_eq!(post("/twice", "a", "FAILED").await, expected);
        }
        assert_eq!(post("/twice", "b", "FAILED").await, 500, "tries are counted per webhook-id");
        assert_eq!(post("/end", "c", "IN_QUEUE").await, 500);
        assert_eq!(post("/end", "d", "COMPLETED").await, 200);
        assert_eq!(post("/any", "e", "COMPLETED").await, 200);
        assert_eq!(receiver.hits_of("job").len(), 8);
        assert_eq!(receiver.accepted().keys().collect::<Vec<_>>(), ["a", "d", "e"]);
        assert!(receiver.hits()[0].signature.as_ref().unwrap_err().contains("webhook-timestamp"));
    }
}
