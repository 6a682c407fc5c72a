//! All routes. Each is in docs/openapi.json too; a test compares the two.

use std::sync::Arc;

use axum::{
    Router,
    extract::{OriginalUri, Request, State},
    http::{HeaderMap, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{MethodFilter, MethodRouter, get, on},
};
use ringback_service_runtime::{Readiness, ops};
use ringback_store::auth::ScopeSet;

use crate::{
    error::{ApiError, NativeError},
    native::{
        artifacts, batches, deliveries, events, feed, files, jobs, project, replays, usage, webhook_secrets,
        webhooks,
    },
    openai,
    runflow::{callbacks, history, runs, secrets as callback_secrets},
    runpod::{control, queue, run, status, stream},
    state::Api,
};

const OPENAPI: &str = include_str!("../../../docs/openapi.json");

/// The router, with the list of its routes.
pub(crate) struct Routes {
    router: Router<Arc<Api>>,
    /// Method in lower case, and path.
    pub(crate) listed: Vec<(&'static str, String)>,
}

impl Routes {
    fn add(mut self, methods: &[&'static str], path: &str, route: MethodRouter<Arc<Api>>) -> Self {
        // The document has no sign for "the rest of the path".
        let told = path.replace("{*", "{");
        self.listed.extend(methods.iter().map(|m| (*m, told.clone())));
        self.router = self.router.route(path, route);
        self
    }
}

macro_rules! get {
    ($routes:ident, $path:expr, $handler:expr) => {
        $routes = $routes.add(&["get"], $path, get($handler));
    };
}
macro_rules! post {
    ($routes:ident, $path:expr, $handler:expr) => {
        $routes = $routes.add(&["post"], $path, on(MethodFilter::POST, $handler));
    };
}

macro_rules! patch {
    ($routes:ident, $path:expr, $handler:expr) => {
        $routes = $routes.add(&["patch"], $path, on(MethodFilter::PATCH, $handler));
    };
}
macro_rules! delete {
    ($routes:ident, $path:expr, $handler:expr) => {
        $routes = $routes.add(&["delete"], $path, on(MethodFilter::DELETE, $handler));
    };
}

macro_rules! get_or_post {
    ($routes:ident, $path:expr, $handler:expr) => {
        $routes =
            $routes.add(&["get", "post"], $path, on(MethodFilter::GET.or(MethodFilter::POST), $handler));
    };
}

/// The fixed routes.
pub(crate) fn fixed() -> Routes {
    let mut r = Routes { router: Router::new(), listed: Vec::new() };
    post!(r, "/v2/{endpoint}/run", run::run);
    post!(r, "/v2/{endpoint}/runsync", run::runsync);
    // The Go SDK reads with POST.
    get_or_post!(r, "/v2/{endpoint}/status/{id}", status::status);
    get_or_post!(r, "/v2/{endpoint}/status-sync/{id}", status::status_sync);
    get_or_post!(r, "/v2/{endpoint}/stream/{id}", stream::stream);
    post!(r, "/v2/{endpoint}/cancel/{id}", control::cancel);
    post!(r, "/v2/{endpoint}/retry/{id}", control::retry);
    post!(r, "/v2/{endpoint}/purge-queue", queue::purge_queue);
    get!(r, "/v2/{endpoint}/health", queue::health);
    get!(r, "/v2/{endpoint}/requests", queue::requests);
    get_or_post!(r, "/v2/{endpoint}/openai/{*path}", openai::serve);
    post!(r, "/v1/jobs", jobs::create);
    get!(r, "/v1/jobs", jobs::list);
    get!(r, "/v1/jobs/{id}", jobs::get);
    get!(r, "/v1/jobs/{id}/output", jobs::output);
    get!(r, "/v1/jobs/{id}/logs", jobs::logs);
    post!(r, "/v1/jobs/{id}/cancel", jobs::cancel);
    post!(r, "/v1/jobs/{id}/retry", jobs::retry);
    get!(r, "/v1/jobs/{id}/deliveries", jobs::deliveries);
    get!(r, "/v1/jobs/{id}/artifacts", artifacts::list);
    get!(r, "/v1/artifacts/{id}", artifacts::get);
    delete!(r, "/v1/artifacts/{id}", artifacts::delete);
    get!(r, "/v1/artifacts/{id}/content", artifacts::content);
    get!(r, "/artifacts/{id}/{token}/{filename}", artifacts::download);
    post!(r, "/artifacts/{id}/{token}/confirm", artifacts::confirm);
    get!(r, "/batches/{id}/{token}/{file}", files::linked);
    post!(r, "/v1/batches", batches::post);
    get!(r, "/v1/batches/{id}", batches::get);
    post!(r, "/v1/batches/{id}/cancel", batches::cancel);
    get!(r, "/v1/batches/{id}/results", batches::results);
    get!(r, "/v1/batches/{id}/deliveries", batches::deliveries);
    post!(r, "/v1/models/{owner}/{model}/runs", runs::create);
    get!(r, "/v1/runs/{id}", runs::get);
    post!(r, "/v1/runs/{id}/cancel", runs::cancel);
    get!(r, "/v1/runs/{id}/callback", callbacks::of_run);
    post!(r, "/v1/runs/{id}/callback-redeliveries", callbacks::redeliver_run);
    get!(r, "/v1/batches/{id}/callback", callbacks::of_batch);
    post!(r, "/v1/batches/{id}/callback-redeliveries", callbacks::redeliver_batch);
    post!(r, "/v1/callback-secrets", callback_secrets::create);
    get!(r, "/v1/callback-secrets", callback_secrets::list);
    delete!(r, "/v1/callback-secrets/{id}", callback_secrets::delete);
    get!(r, "/v1/files/{id}", files::get);
    get!(r, "/v1/files/{id}/content", files::content);
    get!(r, "/v1/usage", usage::get);
    get!(r, "/v1/endpoints", project::endpoints);
    post!(r, "/v1/endpoints/{name}/purge", project::purge_endpoint);
    get!(r, "/v1/workers", project::workers);
    get!(r, "/v1/webhooks/default/secret", webhook_secrets::project_get);
    post!(r, "/v1/webhooks/default/secret", webhook_secrets::project_rotate);
    // Row C6 names the plain path too.
    for base in ["/v1/webhooks", "/webhooks"] {
        let one = format!("{base}/{{id}}");
        post!(r, base, webhooks::create);
        get!(r, base, webhooks::list);
        get!(r, &one, webhooks::get);
        patch!(r, &one, webhooks::patch);
        delete!(r, &one, webhooks::delete);
    }
    get!(r, "/v1/webhooks/event-types", webhooks::event_types);
    post!(r, "/v1/webhooks/{id}/enable", webhooks::enable);
    post!(r, "/v1/webhooks/{id}/test", webhooks::test);
    get!(r, "/v1/webhooks/{id}/secrets", webhook_secrets::list);
    post!(r, "/v1/webhooks/{id}/secrets", webhook_secrets::add);
    delete!(r, "/v1/webhooks/{id}/secrets/{secret}", webhook_secrets::remove);
    get!(r, "/v1/webhooks/{id}/deliveries/{delivery}/attempts", history::attempts);
    get!(r, "/v1/deliveries", deliveries::list);
    get!(r, "/v1/deliveries/{id}", deliveries::get);
    get!(r, "/v1/deliveries/{id}/attempts", deliveries::attempts);
    post!(r, "/v1/deliveries/{id}/redeliver", deliveries::redeliver);
    post!(r, "/v1/replays", replays::create);
    get!(r, "/v1/replays", replays::list);
    get!(r, "/v1/replays/{id}", replays::get);
    delete!(r, "/v1/replays/{id}", replays::cancel);
    get!(r, "/v1/events", feed::events);
    get!(r, "/v1/events/{id}", feed::one_event);
    post!(r, "/v1/events/missed", feed::missed);
    get!(r, "/v1/stream", events::stream);
    get!(r, "/openapi.json", openapi);
    get!(r, "/metrics", metrics_text);
    r
}

/// Everything that the API's listener serves.
pub(crate) fn router(api: Arc<Api>, readiness: Readiness) -> Router {
    let shutdown = api.shutdown.clone();
    let mut routes = fixed();
    for route in api.templates.routes() {
        post!(routes, route, batches::template_post);
        let one = format!("{route}/{{id}}");
        get!(routes, &one, batches::template_get);
    }
    routes
        .router
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .with_state(api)
        .merge(ops::health_router(readiness, shutdown))
        .layer(middleware::from_fn(shape))
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

/// `/metrics`, for keys that may read them; the operations listener serves them without a key.
async fn metrics_text(State(api): State<Arc<Api>>, headers: HeaderMap) -> Result<Response, NativeError> {
    api.auth.authorize(&headers, ScopeSet::METRICS).await?;
    Ok(ops::metrics_text().await)
}

/// The compatible shapes belong to their routes, problem+json to all others.
fn error_at(path: &str, error: ApiError) -> Response {
    let Some(below) = path.strip_prefix("/v2/") else { return error.problem() };
    if below.split('/').nth(1) == Some("openai") { openai::respond(error) } else { error.runpod() }
}

async fn not_found(OriginalUri(uri): OriginalUri) -> Response {
    error_at(uri.path(), ApiError::not_found("no such route; /openapi.json lists all routes"))
}

async fn not_allowed(method: Method, OriginalUri(uri): OriginalUri) -> Response {
    let detail = format!("this route does not take {method}; /openapi.json lists the methods of each route");
    error_at(uri.path(), ApiError::new(StatusCode::METHOD_NOT_ALLOWED, detail))
}

/// Brings refusals of axum itself (a path or query that cannot be read) into the shape of the route.
async fn shape(request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let response = next.run(request).await;
    let status = response.status();
    let class = match status.as_u16() {
        ..=299 => "2xx",
        300..=399 => "3xx",
        400..=499 => "4xx",
        500.. => "5xx",
    };
    metrics::counter!("ringback_api_responses_total", "class" => class).increment(1);
    if !status.is_client_error() {
        return response;
    }
    let plain =
        response.headers().get(header::CONTENT_TYPE).is_some_and(|v| v.as_bytes().starts_with(b"text/plain"));
    if !plain {
        return response;
    }
    let text = axum::body::to_bytes(response.into_body(), 4096).await.unwrap_or_default();
    let error = ApiError::new(status, String::from_utf8_lossy(&text).into_owned());
    error_at(&path, error)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_document_and_the_router_name_the_same_routes() {
        let document: serde_json::Value = serde_json::from_str(OPENAPI).unwrap();
        let mut told = BTreeSet::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            for (method, operation) in methods.as_object().unwrap() {
                let success =
                    operation["responses"].as_object().unwrap().keys().any(|code| code.starts_with('2'));
                assert!(success && operation["summary"].is_string(), "{method} {path}");
                if !path.starts_with("/healthz/") {
                    told.insert((method.clone(), path.clone()));
                }
            }
        }
        let served: BTreeSet<_> =
            fixed().listed.into_iter().map(|(method, path)| (method.to_owned(), path)).collect();
        assert_eq!(told, served);
    }

    #[test]
    fn every_reference_of_the_document_leads_somewhere() {
        let document: serde_json::Value = serde_json::from_str(OPENAPI).unwrap();
        for piece in OPENAPI.split("\"$ref\": \"#").skip(1) {
            let pointer = piece.split('"').next().unwrap();
            assert!(document.pointer(pointer).is_some(), "{pointer}");
        }
    }
}
