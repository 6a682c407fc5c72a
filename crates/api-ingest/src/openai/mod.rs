//! `/v2/{endpoint}/openai/*`: OpenAI's HTTP surface in front of any handler, as RunPod relays it (reference
//! runpod-protocol.md section 4).
//!
//! A request becomes a job with the input `{"openai_route": "/v1/…", "openai_input": {body}}` (GET: the route alone),
//! is held until the job ends, and is answered with what the handler returned: see [`answer`], and [`relay`] for
//! `"stream": true`. Routes are not listed here: what a handler does not know, the handler refuses.
//!
//! A request that is over before its job cancels the job: nobody else waits for it, and OpenAI's clients send a new
//! request after a broken one. A job whose API process died ends by its ttl, which is this route's time limit.

mod answer;
mod error;
mod pieces;
mod relay;

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode},
    response::Response,
};
use bytes::Bytes;
use ringback_domain::{JobId, ProjectId};
use ringback_store::auth::ScopeSet;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::Instant;

pub(crate) use error::{OpenAiError, respond};

use crate::{
    auth::Principal,
    body::{BodyLimit, read_body},
    catalog::Endpoint,
    error::ApiError,
    runpod::{control::cancel_job, find_endpoint, status::wait_for_end},
    state::Api,
    submit::{
        Origin, admit, new_job_id,
        parse::{JobRequest, parse_object},
        submit_one,
    },
    waiters::{Waiter, Wants},
};

/// Longest path below `/openai`.
const ROUTE_MAX_BYTES: usize = 256;

/// `GET` and `POST /v2/{endpoint}/openai/{*path}`
pub(crate) async fn serve(
    State(api): State<Arc<Api>>,
    Path((endpoint, path)): Path<(String, String)>,
    request: Request,
) -> Result<Response, OpenAiError> {
    let (head, body) = request.into_parts();
    let who = api.auth.authorize(&head.headers, ScopeSet::SUBMIT).await?;
    let endpoint = Arc::clone(find_endpoint(&api, &who, &endpoint)?);
    let route = route_of(&path)?;
    admit(&api, &who, 1)?;
    let (input, stream) = match head.method {
        Method::POST => {
            let limit =
                BodyLimit { max_bytes: api.limits.max_runsync_body_bytes, setting: "max_runsync_body_bytes" };
            let body = read_body(&head.headers, body, limit).await?;
            let told: Told<'_> = parse_object(&body, &api.rules)?;
            (input_of(&route, Some(&body)), told.wants_stream())
        }
        Method::GET => (input_of(&route, None), false),
        // HEAD would run a whole job and throw its answer away.
        method => return Err(not_allowed(&method).into()),
    };
    let asked = submit(&api, &who, &endpoint, &head.headers, input, stream).await?;
    let id = asked.public_id.clone();
    let mut response = match if stream { relay::answer(asked).await } else { wait(asked).await } {
        Ok(response) => response,
        Err(error) => axum::response::IntoResponse::into_response(error),
    };
    // OpenAI's clients show it with an answer and with an error.
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", id);
    }
    Ok(response)
}

/// What we read of a body; everything else is the handler's.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Told<'a> {
    #[serde(borrow)]
    stream: Option<&'a RawValue>,
}

impl Told<'_> {
    fn wants_stream(&self) -> bool {
        self.stream.is_some_and(|raw| raw.get() == "true")
    }
}

/// The route as handlers know it.
fn route_of(path: &str) -> Result<String, ApiError> {
    if path.len() > ROUTE_MAX_BYTES {
        return Err(ApiError::not_found(format!(
            "the path below /openai has more than {ROUTE_MAX_BYTES} bytes"
        )));
    }
    Ok(match path.trim_matches('/') {
        // Clients whose base URL lacks the version ask for this to find out what is there.
        "models" => "/v1/models".to_owned(),
        path => format!("/{path}"),
    })
}

fn not_allowed(method: &Method) -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("this route takes GET and POST, not {method}"))
}

/// The job's input; the body stays the bytes that came.
fn input_of(route: &str, body: Option<&Bytes>) -> Bytes {
    let mut input = br#"{"openai_route":"#.to_vec();
    input.extend_from_slice(serde_json::Value::from(route).to_string().as_bytes());
    if let Some(body) = body {
        input.extend_from_slice(br#","openai_input":"#);
        input.extend_from_slice(body.trim_ascii());
    }
    input.push(b'}');
    input.into()
}

/// A request whose job is committed.
struct Asked {
    api: Arc<Api>,
    who: Arc<Principal>,
    endpoint: Arc<Endpoint>,
    public_id: String,
    waiter: Waiter,
    /// The job ends with the request.
    unwanted: CancelUnwanted,
    until: Instant,
}

async fn submit(
    api: &Arc<Api>,
    who: &Arc<Principal>,
    endpoint: &Arc<Endpoint>,
    headers: &HeaderMap,
    input: Bytes,
    stream: bool,
) -> Result<Asked, ApiError> {
    let limit_ms = api.limits.openai_timeout_ms;
    let wants = if stream { Wants::Anything } else { Wants::End };
    let id = new_job_id();
    // A place among the waiters first: a job that nobody can wait for is not made.
    let mut waiter = api.waiters.join(who.project, id, wants)?;
    let text = std::str::from_utf8(&input).map_err(|e| ApiError::bad_request(format!("not UTF-8: {e}")))?;
    let request = JobRequest {
        input: text,
        webhook: None,
        webhook_v2: None,
        callback_url: None,
        execution_timeout_ms: None,
        ttl_ms: Some(endpoint.ttl_ms.min(limit_ms)),
        low_priority: false,
        metadata: None,
        confirm: None,
        extra: None,
        secret_extra: None,
    };
    let origin = Origin { id, sync: true, headers };
    // A client that hangs up meanwhile leaves a job as well.
    let mut unwanted = CancelUnwanted { api: Arc::clone(api), project: who.project, job: Some(id) };
    let accepted = submit_one(api, endpoint, &input, &request, &origin).await.inspect_err(|error| {
        // After a server error nobody knows whether the job was made.
        if !error.status.is_server_error() {
            unwanted.keep();
        }
    })?;
    if !accepted.new {
        unwanted.keep();
    }
    if accepted.id != id {
        // A repeated request waits for the job that the first one made.
        waiter = api.waiters.join(who.project, accepted.id, wants)?;
    }
    Ok(Asked {
        api: Arc::clone(api),
        who: Arc::clone(who),
        endpoint: Arc::clone(endpoint),
        public_id: accepted.public_id(),
        waiter,
        unwanted,
        until: Instant::now() + Duration::from_millis(limit_ms),
    })
}

/// Holds the request until its job has ended.
async fn wait(asked: Asked) -> Result<Response, OpenAiError> {
    let Asked { api, who, endpoint, public_id, waiter, mut unwanted, until } = asked;
    let left = until.saturating_duration_since(Instant::now());
    let row = wait_for_end(&api, &who, &endpoint, &public_id, &waiter, left).await?;
    if !row.job.status().is_terminal() {
        return Err(if Instant::now() < until {
            OpenAiError::shutting_down()
        } else {
            OpenAiError::too_long(&api)
        });
    }
    unwanted.keep();
    answer::of_end(&api, &row).await
}

/// Cancels a job when it is dropped, unless the job has ended by then.
struct CancelUnwanted {
    api: Arc<Api>,
    project: ProjectId,
    /// None: the job belongs to another request, or has ended.
    job: Option<JobId>,
}

impl CancelUnwanted {
    /// The job has ended.
    fn keep(&mut self) {
        self.job = None;
    }
}

impl Drop for CancelUnwanted {
    fn drop(&mut self) {
        let (Some(job), Ok(runtime)) = (self.job, tokio::runtime::Handle::try_current()) else { return };
        let (api, project) = (Arc::clone(&self.api), self.project);
        runtime.spawn(async move {
            match cancel_job(&api, project, job).await {
                Ok(status) => tracing::debug!(job_id = %job, %status, "a request to /openai is over before its job"),
                // Its ttl ends it.
                Err(error) => tracing::warn!(job_id = %job, error = error.detail, "an unwanted job cannot be cancelled now"),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_becomes_the_input_that_handlers_know() {
        let body = Bytes::from_static(b" {\"model\":\"m\", \"n\": 1e400}\n");
        let input = input_of("/v1/chat/completions", Some(&body));
        assert_eq!(
            input,
            r#"{"openai_route":"/v1/chat/completions","openai_input":{"model":"m", "n": 1e400}}"#.as_bytes()
        );
        assert_eq!(input_of("/v1/models", None), r#"{"openai_route":"/v1/models"}"#.as_bytes());
        assert_eq!(input_of("/a\"b", None), r#"{"openai_route":"/a\"b"}"#.as_bytes());
    }

    #[test]
    fn routes_keep_their_path() {
        for (path, route) in [
            ("v1/chat/completions", "/v1/chat/completions"),
            ("models", "/v1/models"),
            ("v1/models/", "/v1/models"),
        ] {
            assert_eq!(route_of(path).unwrap(), route);
        }
        assert!(route_of(&"a".repeat(ROUTE_MAX_BYTES + 1)).is_err());
    }

    #[test]
    fn only_true_is_a_stream() {
        for (body, stream) in [
            (r#"{"stream": true}"#, true),
            (r#"{"stream":false}"#, false),
            (r#"{"stream":"true"}"#, false),
            ("{}", false),
        ] {
            assert_eq!(serde_json::from_str::<Told<'_>>(body).unwrap().wants_stream(), stream, "{body}");
        }
    }
}
