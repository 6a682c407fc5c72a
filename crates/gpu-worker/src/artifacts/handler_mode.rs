//! The confirm handshake of unmodified handlers, which tell their receiver themselves: the routes that they and their
//! receiver expect on a port of the worker.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use ringback_domain::artifact::{file_name, url_segment};
use ringback_service_runtime::listener;
use serde::Deserialize;
use serde_json::json;
use tokio::net::TcpListener;

use super::files::{Outbox, Pieces, type_of};
use crate::listen::limits_of_handshakes;

/// Job ids that are remembered; the oldest go first.
const REMEMBERED: usize = 10_000;
const MAX_ID_BYTES: usize = 128;

/// What the routes of an endpoint's children share.
#[derive(Debug)]
pub(crate) struct Handshakes {
    endpoint: String,
    outbox: Outbox,
    jobs: Mutex<VecDeque<Handshake>>,
}

/// A job that somebody asked for or confirmed.
#[derive(Debug)]
struct Handshake {
    job: String,
    first_asked: Instant,
    /// The receiver's own time, where it told one.
    confirmed: Option<Option<i64>>,
}

#[derive(Deserialize)]
struct Confirmation {
    #[serde(default)]
    job_id: Option<String>,
    #[serde(default)]
    status: Option<String>,
    #[serde(default)]
    timestamp: Option<serde_json::Number>,
}

impl Handshakes {
    pub(crate) fn new(endpoint: &str, outbox: Outbox) -> Arc<Self> {
        Arc::new(Self { endpoint: endpoint.to_owned(), outbox, jobs: Mutex::default() })
    }

    /// Serves until it is dropped.
    pub(crate) async fn serve(self: Arc<Self>, tcp: TcpListener) {
        let router = axum::Router::new()
            .route("/output/{file}", get(output))
            .route("/confirm-download/{job_id}", post(confirm))
            .route("/check-download/{job_id}", get(check))
            .layer(axum::extract::DefaultBodyLimit::max(64 * 1024))
            .with_state(self);
        listener::serve(tcp, router, limits_of_handshakes(), std::future::pending()).await;
    }

    fn jobs(&self) -> MutexGuard<'_, VecDeque<Handshake>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks a job up, or begins to remember it.
    fn with<T>(&self, job: &str, change: impl FnOnce(&mut Handshake) -> T) -> T {
        let mut jobs = self.jobs();
        if let Some(known) = jobs.iter_mut().rev().find(|known| known.job == job) {
            return change(known);
        }
        while jobs.len() >= REMEMBERED {
            jobs.pop_front();
        }
        let mut new = Handshake { job: job.to_owned(), first_asked: Instant::now(), confirmed: None };
        let answer = change(&mut new);
        jobs.push_back(new);
        answer
    }
}

fn is_id(job: &str) -> bool {
    (1..=MAX_ID_BYTES).contains(&job.len())
        && job.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':'))
}

fn answer(status: StatusCode, body: &serde_json::Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

fn bad_id() -> Response {
    let error = "the job id must have 1 to 128 characters of A-Z, a-z, 0-9, `-`, `_`, `.` and `:`";
    answer(StatusCode::BAD_REQUEST, &json!({"success": false, "error": error}))
}

/// `GET /check-download/{job_id}`: what the handler polls.
async fn check(State(shared): State<Arc<Handshakes>>, Path(job): Path<String>) -> Response {
    if !is_id(&job) {
        return bad_id();
    }
    let confirmed = shared.with(&job, |known| known.confirmed);
    let status = if confirmed.is_some() { "confirmed" } else { "pending" };
    let body = json!({
        "job_id": job, "status": status, "confirmed": confirmed.is_some(), "timestamp": confirmed.flatten()
    });
    answer(StatusCode::OK, &body)
}

/// `POST /confirm-download/{job_id}` with `{job_id, status: "downloaded", timestamp}`: what the receiver says.
async fn confirm(State(shared): State<Arc<Handshakes>>, Path(job): Path<String>, body: Bytes) -> Response {
    if !is_id(&job) {
        return bad_id();
    }
    let refuse = |error: &str| answer(StatusCode::BAD_REQUEST, &json!({"success": false, "error": error}));
    let told: Confirmation = match serde_json::from_slice(&body) {
        Ok(told) => told,
        Err(error) => {
            return refuse(&format!(
                "the body must be {{job_id, status: \"downloaded\", timestamp}}: {error}"
            ));
        }
    };
    if told.job_id.as_ref().is_some_and(|told| *told != job) {
        return refuse("`job_id` is not the job of this URL");
    }
    if told.status.as_deref().is_some_and(|status| status != "downloaded") {
        return refuse("`status` must be \"downloaded\"");
    }
    let at = told.timestamp.and_then(|n| n.as_i64());
    let first = shared.with(&job, |known| {
        let waited = known.first_asked.elapsed();
        (known.confirmed.replace(at).is_none()).then_some(waited)
    });
    if let Some(waited) = first {
        let endpoint = shared.endpoint.clone();
        metrics::counter!(
            "ringback_worker_confirmations_total", "endpoint" => endpoint, "mode" => "handler", "end" => "confirmed"
        )
        .increment(1);
        tracing::info!(job, ms = waited.as_millis(), "the receiver confirmed the download");
    }
    answer(StatusCode::OK, &json!({"success": true, "job_id": job, "status": "confirmed"}))
}

/// `GET /output/{file}`: a file of the output folder, and of no other.
async fn output(State(shared): State<Arc<Handshakes>>, Path(file): Path<String>) -> Response {
    let missing = || answer(StatusCode::NOT_FOUND, &json!({"error": "no such file"}));
    // One plain component: no folder, nothing hidden.
    if file_name(&file) != file {
        return missing();
    }
    let (outbox, told) = (shared.outbox.clone(), file.clone());
    let opened = tokio::task::spawn_blocking(move || outbox.open_named(&told)).await.ok().flatten();
    let Some(taken) = opened else { return missing() };
    let began = Instant::now();
    tracing::info!(file, bytes = taken.size_bytes, "a receiver fetches a file");
    let state = (Pieces::File(taken.file), taken.size_bytes);
    let name = file.clone();
    let stream = futures::stream::try_unfold(state, move |(pieces, left)| {
        let name = name.clone();
        async move {
            if left == 0 {
                tracing::info!(file = name, ms = began.elapsed().as_millis(), "the file was read to its end");
                return Ok::<_, super::files::StoreFileError>(None);
            }
            let (mut piece, rest) = pieces.next().await?;
            // A file that grows is sent as long as it was told.
            piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            let left = left - piece.len() as u64;
            Ok((!piece.is_empty()).then_some((piece, (rest, left))))
        }
    });
    let mut response = Response::new(Body::from_stream(stream));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(taken.size_bytes));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(type_of(&file)));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("default-src 'none'; sandbox"));
    let disposition = format!("attachment; filename*=UTF-8''{}", url_segment(&file));
    if let Ok(value) = HeaderValue::from_str(&disposition) {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
    response
}
