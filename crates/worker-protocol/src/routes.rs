//! The HTTP side.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, USER_AGENT};
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode};
use axum::routing::{get, post};
use bytes::{BufMut, Bytes, BytesMut};
use tokio::time::Instant;

use crate::body::{self, ReadBody};
use crate::child::{Child, Take};
use crate::event::Unhealthy;
use crate::hub::{Caller, Hub};
use crate::job_json::put_string;
use crate::reply::TakeReply;
use crate::result::{DoneBody, ErrorKind, HandlerResult, parse_chunk, parse_done};
use crate::sdk::SdkVersion;

/// Most ids read from one ping.
const MAX_PING_IDS: usize = 4096;

/// The routes of the worker protocol for the children of `hub`.
///
/// Bodies are limited by [`crate::HubConfig::max_body_bytes`], not by axum's default limit.
pub fn router(hub: Hub) -> Router {
    Router::new()
        .route("/v2/{endpoint}/job-take/{worker}", get(take_one))
        .route("/v2/{endpoint}/job-take-batch/{worker}", get(take_batch))
        .route("/v2/{endpoint}/job-stop/{worker}", get(stop))
        .route("/v2/{endpoint}/job-done/{worker}/{job}", post(done))
        .route("/v2/{endpoint}/job-stream/{worker}/{job}", post(chunk))
        .route("/v2/{endpoint}/ping/{worker}", get(ping))
        .with_state(hub)
}

fn authenticate(hub: &Hub, endpoint: &str, worker: &str, headers: &HeaderMap) -> Option<Arc<Child>> {
    let key = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes);
    match hub.authenticate(endpoint, worker, key) {
        Caller::Child(child) => {
            let agent = headers.get(USER_AGENT).and_then(|value| value.to_str().ok());
            child.contact(agent.and_then(SdkVersion::from_user_agent));
            Some(child)
        }
        Caller::Refused => None,
    }
}

fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

fn json(bytes: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::from(bytes));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// One value of the query, percent-decoded; the last wins.
fn query_value(query: Option<&str>, name: &str) -> Option<String> {
    url::form_urlencoded::parse(query.unwrap_or_default().as_bytes())
        .filter(|(key, _)| key == name)
        .last()
        .map(|(_, value)| value.into_owned())
}

async fn take_one(
    State(hub): State<Hub>,
    Path((endpoint, worker)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response<Body> {
    let Some(child) = authenticate(&hub, &endpoint, &worker, &headers) else {
        return empty(StatusCode::TOO_MANY_REQUESTS);
    };
    take(&hub, child, query.as_deref(), 1, false).await
}

async fn take_batch(
    State(hub): State<Hub>,
    Path((endpoint, worker)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response<Body> {
    let Some(child) = authenticate(&hub, &endpoint, &worker, &headers) else {
        return empty(StatusCode::TOO_MANY_REQUESTS);
    };
    let asked = query_value(query.as_deref(), "batch_size").and_then(|text| text.parse().ok());
    take(&hub, child, query.as_deref(), asked.unwrap_or(1).max(1), true).await
}

/// Holds the poll until a job is there, the child drains, or the hold is over.
async fn take(hub: &Hub, child: Arc<Child>, query: Option<&str>, want: usize, list: bool) -> Response<Body> {
    let flag = query_value(query, "job_in_progress");
    child.take_arrived(flag.as_deref() == Some("0"));
    let deadline = Instant::now() + hub.config().hold;
    let mut parked = None;
    loop {
        let changed = child.changed();
        tokio::pin!(changed);
        changed.as_mut().enable();
        match child.try_take(want) {
            Take::Jobs(jobs) => return assign(&child, jobs, list),
            Take::Draining => return pause(hub.config().drain_hold).await,
            Take::Nothing => {}
        }
        // Only after the first look: a take that gets its job at once was never waiting.
        if parked.is_none() {
            parked = Some(child.park(want));
        }
        if tokio::time::timeout_at(deadline, changed).await.is_err() {
            child.answered_empty(want);
            return empty(StatusCode::NO_CONTENT);
        }
    }
}

/// A short 204: the SDK sleeps 5 s after 429, which would delay the end of a draining child.
async fn pause(hold: Duration) -> Response<Body> {
    tokio::time::sleep(hold).await;
    empty(StatusCode::NO_CONTENT)
}

fn assign(child: &Arc<Child>, jobs: Vec<(String, Bytes)>, list: bool) -> Response<Body> {
    let mut bytes =
        BytesMut::with_capacity(jobs.iter().map(|(_, payload)| payload.len() + 1).sum::<usize>() + 2);
    let mut ids = Vec::with_capacity(jobs.len());
    if list {
        bytes.put_u8(b'[');
    }
    for (index, (id, payload)) in jobs.into_iter().enumerate() {
        if index > 0 {
            bytes.put_u8(b',');
        }
        bytes.extend_from_slice(&payload);
        ids.push(id);
    }
    if list {
        bytes.put_u8(b']');
    }
    let bytes = bytes.freeze();
    let length = bytes.len();
    let body = Body::from_stream(TakeReply::new(Arc::clone(child), ids, bytes));
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    response
}

async fn stop(
    State(hub): State<Hub>,
    Path((endpoint, worker)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response<Body> {
    let Some(child) = authenticate(&hub, &endpoint, &worker, &headers) else {
        return empty(StatusCode::TOO_MANY_REQUESTS);
    };
    let deadline = Instant::now() + hub.config().hold;
    loop {
        let changed = child.changed();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let stops = child.take_stops();
        if !stops.due.is_empty() {
            return json(stop_body(&stops.due));
        }
        if stops.draining {
            return pause(hub.config().drain_hold).await;
        }
        let until = stops.again.map_or(deadline, |at| deadline.min(at.into()));
        if tokio::time::timeout_at(until, changed).await.is_err() && until == deadline {
            return empty(StatusCode::NO_CONTENT);
        }
    }
}

fn stop_body(stops: &[String]) -> Bytes {
    let mut out = BytesMut::new();
    out.put_slice(b"{\"jobsToStop\":[");
    for (index, id) in stops.iter().enumerate() {
        if index > 0 {
            out.put_u8(b',');
        }
        put_string(&mut out, id);
    }
    out.put_slice(b"]}");
    out.freeze()
}

fn announced_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

async fn done(
    State(hub): State<Hub>,
    Path((endpoint, worker, job)): Path<(String, String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Response<Body> {
    let Some(child) = authenticate(&hub, &endpoint, &worker, &headers) else {
        return empty(StatusCode::UNAUTHORIZED);
    };
    let reading = child.begin_post(&job);
    let cap = hub.config().max_body_bytes;
    let parsed = match body::read(body, announced_length(&headers), cap).await {
        Ok(ReadBody::Whole(bytes)) => parse_done(&bytes),
        Ok(ReadBody::TooLarge { bytes }) => DoneBody::Final(HandlerResult::failed(
            format!("the handler's result has {bytes} bytes; the limit is {cap} bytes"),
            ErrorKind::TooLarge,
        )),
        // Nothing to judge: the connection broke in the middle of the body.
        Err(_) => return empty(StatusCode::BAD_REQUEST),
    };
    child.posted(&job, parsed);
    drop(reading);
    json(Bytes::from_static(b"{}"))
}

async fn chunk(
    State(hub): State<Hub>,
    Path((endpoint, worker, job)): Path<(String, String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Response<Body> {
    let Some(child) = authenticate(&hub, &endpoint, &worker, &headers) else {
        return empty(StatusCode::UNAUTHORIZED);
    };
    let cap = hub.config().max_body_bytes;
    match body::read(body, announced_length(&headers), cap).await {
        Ok(ReadBody::Whole(bytes)) => match parse_chunk(&bytes) {
            Ok(output) => child.chunk(&job, output).await,
            Err(reason) => fail(&child, &job, format!("chunk: {reason}"), ErrorKind::Unreadable),
        },
        Ok(ReadBody::TooLarge { bytes }) => fail(
            &child,
            &job,
            format!("the handler yielded a chunk of {bytes} bytes; the limit is {cap} bytes"),
            ErrorKind::TooLarge,
        ),
        Err(_) => return empty(StatusCode::BAD_REQUEST),
    }
    json(Bytes::from_static(b"{}"))
}

/// A chunk that cannot be kept fails its job: a stream with a hole must not look complete.
fn fail(child: &Child, job: &str, reason: String, kind: ErrorKind) {
    child.posted(job, DoneBody::Final(HandlerResult::failed(reason, kind)));
}

async fn ping(
    State(hub): State<Hub>,
    Path((endpoint, worker)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response<Body> {
    let Some(child) = authenticate(&hub, &endpoint, &worker, &headers) else {
        return empty(StatusCode::UNAUTHORIZED);
    };
    let query = query.as_deref();
    let ids = query_value(query, "job_id").unwrap_or_default();
    let jobs = ids.split(',').filter(|id| !id.is_empty()).take(MAX_PING_IDS).map(str::to_owned).collect();
    let unhealthy = (query_value(query, "status").as_deref() == Some("unhealthy")).then(|| Unhealthy {
        check: query_value(query, "check").unwrap_or_default(),
        reason: query_value(query, "reason").unwrap_or_default(),
    });
    child.ping(jobs, unhealthy);
    empty(StatusCode::OK)
}
