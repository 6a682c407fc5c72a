//! Row C1: whoever submits a job with this receiver as its webhook names it here; if its webhook does not come, it is
//! polled.

use axum::Json;
use axum::extract::{Request, State as Shared};
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, StatusCode, header};
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::Tracked;
use super::routes::Ctx;
use crate::http::{Rejection, problem};
use crate::poll::is_plain_name;

/// A job's name is short.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// What `/run` answered will do, with the endpoint beside it.
#[derive(Deserialize)]
struct Named {
    #[serde(alias = "job_id")]
    id: String,
    #[serde(default)]
    endpoint: String,
}

pub(super) async fn track(Shared(Ctx(state)): Shared<Ctx>, request: Request) -> Result<Response, Rejection> {
    let Some(tracked) = &state.tracked else {
        return Ok(problem(
            StatusCode::NOT_FOUND,
            "no_tracking",
            "jobs are not tracked here: start the receiver with --poll-url and --api-key-file",
        ));
    };
    if !is_key(request.headers(), tracked) {
        return Ok(problem(
            StatusCode::UNAUTHORIZED,
            "no_key",
            "give the API key that this receiver polls with: Authorization: Bearer KEY",
        ));
    }
    let body = axum::body::to_bytes(request.into_body(), MAX_BODY_BYTES)
        .await
        .map_err(|error| Rejection::Body(error.to_string()))?;
    let invalid = |detail: &str| Ok(problem(StatusCode::BAD_REQUEST, "invalid_job", detail));
    let named: Named = match serde_json::from_slice(&body) {
        Ok(named) => named,
        Err(error) => return invalid(&format!("expected {{\"id\", \"endpoint\"}}: {error}")),
    };
    if !is_plain_name(&named.id) {
        return invalid("id must have 1 to 128 letters, digits or one of -_.:");
    }
    if tracked.needs_endpoint && !is_plain_name(&named.endpoint) {
        return invalid(
            "endpoint must have 1 to 128 letters, digits or one of -_.: (--poll-url asks for it)",
        );
    }
    tracked.tracker.submitted(&named.id, &named.endpoint).await?;
    let stands = state.intake.journal().tracked_state(&named.id).await?;
    let answer = json!({"job_id": named.id, "tracked": stands.map(crate::store::TrackedState::as_str)});
    Ok(Json(answer).into_response())
}

/// With or without `Bearer`, as providers take it. Hashes are compared, so that time tells nothing about the key.
fn is_key(headers: &HeaderMap, tracked: &Tracked) -> bool {
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let given = given.strip_prefix("Bearer ").unwrap_or(given);
    Sha256::digest(given) == Sha256::digest(tracked.key.expose())
}
