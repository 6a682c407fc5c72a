//! The routes of a ready receiver: three styles of webhook endpoints (row C2), the callback route of a batch API (row
//! A3), the artefact route (row B2), and what came of it all.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{FromRef, Path, Request, State as Shared};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use http::StatusCode;
use ringback_domain::artifact::percent_encoded;
use serde_json::{Value, json};

use super::{State, files, track};
use crate::event::Event;
use crate::http::{Rejection, Verified, problem};
use crate::intake::Intake;
use crate::observe::Step;
use crate::store::{Accepted, EventView, TrackedState};
use crate::verify::Trust;

/// The state of the routes.
#[derive(Clone)]
pub(super) struct Ctx(pub(super) Arc<State>);

type App = Shared<Ctx>;

impl FromRef<Ctx> for Arc<Trust> {
    fn from_ref(ctx: &Ctx) -> Self {
        Self::clone(&ctx.0.trust)
    }
}

/// All routes.
pub(super) fn router(state: Arc<State>) -> Router {
    let files = format!("{}/{{name}}", state.public_prefix);
    Router::new()
        .route("/", post(any))
        .route("/webhooks", post(any))
        .route("/webhooks/metrics", get(metrics))
        .route("/webhooks/{family}", post(family))
        .route("/v1/webhooks/{event_type}", post(versioned))
        .route("/api/tts/callback", post(callback))
        .route("/artifacts", post(artifact))
        .route("/track", post(track::track))
        .route("/received/{subject}", get(received))
        .route("/health", get(|| async { Json(json!({"status": "ok"})) }))
        .route(&files, get(files::serve))
        .fallback(|| async { problem(StatusCode::NOT_FOUND, "no_route", "there is nothing at this address") })
        .method_not_allowed_fallback(|| async {
            problem(StatusCode::METHOD_NOT_ALLOWED, "method", "this address does not take that method")
        })
        .layer(from_fn_with_state(Ctx(Arc::clone(&state)), tell_refusals))
        .with_state(Ctx(state))
}

/// Whoever watches sees what was turned away, and why.
async fn tell_refusals(Shared(Ctx(state)): App, request: Request, next: Next) -> Response {
    let (begun, path) = (Instant::now(), request.uri().path().to_owned());
    let response = next.run(request).await;
    if let Some(rejection) = response.extensions().get::<Rejection>() {
        state.observer.tell(&Step {
            name: "refused",
            kind: rejection.code().to_owned(),
            subject: path.chars().take(200).collect(),
            detail: rejection.to_string(),
            took: Some(begun.elapsed()),
            failed: true,
        });
    }
    response
}

/// One endpoint for everything, routed by what the body says.
async fn any(Shared(Ctx(state)): App, hook: Verified<Event>) -> Result<Response, Rejection> {
    take(&state, hook).await
}

/// One endpoint per family of events.
async fn family(
    Shared(Ctx(state)): App,
    Path(family): Path<String>,
    hook: Verified<Event>,
) -> Result<Response, Rejection> {
    let kind = hook.event.kind();
    if kind.split('.').next() != Some(family.as_str()) {
        return Err(Rejection::WrongRoute { kind, expected: format!("{family}.*") });
    }
    take(&state, hook).await
}

/// One endpoint per type.
async fn versioned(
    Shared(Ctx(state)): App,
    Path(event_type): Path<String>,
    hook: Verified<Event>,
) -> Result<Response, Rejection> {
    let kind = hook.event.kind();
    if kind != event_type {
        return Err(Rejection::WrongRoute { kind, expected: event_type });
    }
    take(&state, hook).await
}

async fn artifact(Shared(Ctx(state)): App, hook: Verified<Event>) -> Result<Response, Rejection> {
    let kind = hook.event.kind();
    if !kind.starts_with("artifact.") {
        return Err(Rejection::WrongRoute { kind, expected: "artifact.*".to_owned() });
    }
    take(&state, hook).await
}

/// Writes the event down and answers; only a classic artefact notice is answered after its download.
async fn take(state: &State, hook: Verified<Event>) -> Result<Response, Rejection> {
    if let Event::Artifact(notice) = &hook.event {
        let job_id = notice.job_id.clone();
        return fetched(state, hook, &job_id).await;
    }
    state.intake.take(&hook.proof, &hook.event, hook.body).await?;
    Ok(Json(json!({"received": true})).into_response())
}

/// Row A3: whatever a trusted sender posts is acknowledged once it is on disk, even what nobody can read.
async fn callback(Shared(Ctx(state)): App, hook: Verified<Bytes>) -> Result<Response, Rejection> {
    match Event::parse(&hook.body) {
        Ok(event) => state.intake.take(&hook.proof, &event, hook.body).await?,
        Err(error) => {
            tracing::warn!(%error, "a callback that cannot be read is kept");
            state.intake.take_unreadable(&hook.proof, hook.body).await?
        }
    };
    Ok(Json(json!({"acknowledged": true})).into_response())
}

/// Row B2. The work is not this request's: a sender that hangs up does not stop it.
async fn fetched(state: &State, hook: Verified<Event>, job_id: &str) -> Result<Response, Rejection> {
    let Verified { event, proof, body } = hook;
    let tried = state.intake.wait_for(&Intake::key_of(&proof, &event));
    let taken = state.intake.take(&proof, &event, body).await?;
    let journal = state.intake.journal();
    if taken.accepted != Accepted::Done {
        // Behind many others it may take longer than any sender waits; the notice is on disk in any case.
        if tokio::time::timeout(state.answer_within, tried).await.is_err() {
            return Ok(problem(
                StatusCode::SERVICE_UNAVAILABLE,
                "not_fetched_yet",
                "the notice is stored and its file is not fetched yet; ask /received/ID or send it again",
            ));
        }
    }
    if let Some(file) = journal.file(&taken.key, 0).await? {
        let answer = json!({"success": true, "job_id": job_id, "audioUrl": url(state, &file.name)});
        return Ok(Json(answer).into_response());
    }
    let views = journal.about(job_id).await?;
    let reason = views.into_iter().rev().find_map(|view| view.error);
    let reason = reason.unwrap_or_else(|| "the file could not be fetched".to_owned());
    let answer = json!({"success": false, "job_id": job_id, "error": reason});
    Ok((StatusCode::BAD_GATEWAY, Json(answer)).into_response())
}

/// What came for a job, run or batch.
async fn received(Shared(Ctx(state)): App, Path(subject): Path<String>) -> Result<Response, Rejection> {
    let views = state.intake.journal().about(&subject).await?;
    let tracked = state.intake.journal().tracked_state(&subject).await?;
    if views.is_empty() && tracked.is_none() {
        return Ok(problem(StatusCode::NOT_FOUND, "unknown", "nothing came under this id"));
    }
    let mut about = about(&state, &subject, &views);
    if let Some(tracked) = tracked {
        about["tracked"] = tracked.as_str().into();
    }
    if views.is_empty() {
        about["status"] = tracked.map(TrackedState::as_str).into();
    }
    Ok(Json(about).into_response())
}

fn about(state: &State, subject: &str, views: &[EventView]) -> Value {
    let has = |wanted: &str| views.iter().any(|view| view.state == wanted);
    let status = match () {
        () if has("pending") => "pending",
        () if has("failed") => "failed",
        () => "completed",
    };
    let files: Vec<Value> = views
        .iter()
        .flat_map(|view| &view.files)
        .map(|file| {
            json!({
                "name": file.name,
                "url": url(state, &file.name),
                "sha256": file.sha256,
                "size_bytes": file.size_bytes,
            })
        })
        .collect();
    let audio = files.iter().find(|file| !file["name"].as_str().unwrap_or_default().ends_with(".json"));
    let events: Vec<Value> = views
        .iter()
        .map(|view| {
            json!({
                "type": view.kind,
                "state": view.state,
                "received_at_ms": view.received_at_ms,
                "error": view.error,
            })
        })
        .collect();
    json!({
        "job_id": subject,
        "status": status,
        "audioUrl": audio.map(|file| file["url"].clone()),
        "files": files,
        "events": events,
    })
}

fn url(state: &State, name: &str) -> String {
    // Letters of other scripts are kept on disk and written as the web wants them.
    format!("{}{}/{}", state.public_url, state.public_prefix, percent_encoded(name))
}

/// Row C7.
async fn metrics(Shared(Ctx(state)): App) -> Result<Response, Rejection> {
    let counts = state.intake.journal().counts().await?;
    let read = serde_json::to_value(state.router.metrics().read());
    let mut body = read.unwrap_or_default();
    for (name, count) in [
        ("events_pending", counts.pending),
        ("events_given_up", counts.failed),
        ("jobs_tracked", counts.tracked),
    ] {
        body[name] = count.into();
    }
    Ok(Json(body).into_response())
}
