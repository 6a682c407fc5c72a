//! Health and metrics over HTTP.

use crate::listener::{self, Limits};
use crate::readiness::{CheckState, Readiness};
use crate::shutdown::Shutdown;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::net::TcpListener;

#[derive(Serialize)]
struct Health {
    status: &'static str,
    checks: BTreeMap<String, CheckState>,
}

#[derive(Clone)]
struct OpsState {
    readiness: Readiness,
    started: Arc<AtomicBool>,
    shutdown: Shutdown,
}

/// Routes for the API's own listener and for the operations listener:
/// `/healthz/live` (200 while the process answers), `/healthz/ready` (200, or 503 with the failing checks; 503 while
/// draining), `/healthz/startup` (503 until all checks were ok once).
pub fn health_router(readiness: Readiness, shutdown: Shutdown) -> Router {
    let state = OpsState { readiness, started: Arc::default(), shutdown };
    Router::new()
        .route("/healthz/live", get(live))
        .route("/healthz/ready", get(ready))
        .route("/healthz/startup", get(startup))
        .with_state(state)
}

/// [`health_router`] and `/metrics`, for a listener that only operators reach.
pub fn ops_router(readiness: Readiness, shutdown: Shutdown) -> Router {
    health_router(readiness, shutdown).route("/metrics", get(metrics_text))
}

/// Serves [`ops_router`] on `address` until the shutdown is over its drain, that is until `stop` is cancelled.
/// Returns the bound address and the task.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(
    address: SocketAddr,
    readiness: Readiness,
    shutdown: Shutdown,
) -> std::io::Result<(SocketAddr, tokio::task::JoinHandle<()>)> {
    let tcp = TcpListener::bind(address).await?;
    let bound = tcp.local_addr()?;
    let router = ops_router(readiness, shutdown.clone());
    let task = tokio::spawn(async move {
        // Probes must be answered during a drain, so this listener ends only with the process.
        listener::serve(tcp, router, Limits::operations(), shutdown.finished()).await;
    });
    Ok((bound, task))
}

/// `/metrics` in Prometheus' text format. Mount it behind the `metrics` scope on a public listener.
pub async fn metrics_text() -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], crate::metrics::render())
        .into_response()
}

async fn live() -> &'static str {
    "ok\n"
}

async fn ready(State(state): State<OpsState>) -> Response {
    let checks = state.readiness.snapshot();
    if state.shutdown.is_triggered() {
        return health(StatusCode::SERVICE_UNAVAILABLE, "draining", checks);
    }
    if checks.values().all(|check| check.ok) {
        health(StatusCode::OK, "ok", checks)
    } else {
        health(StatusCode::SERVICE_UNAVAILABLE, "not ready", checks)
    }
}

async fn startup(State(state): State<OpsState>) -> Response {
    if state.readiness.is_ready() {
        state.started.store(true, Ordering::Relaxed);
    }
    let checks = state.readiness.snapshot();
    if state.started.load(Ordering::Relaxed) {
        health(StatusCode::OK, "ok", checks)
    } else {
        health(StatusCode::SERVICE_UNAVAILABLE, "starting", checks)
    }
}

fn health(code: StatusCode, status: &'static str, checks: BTreeMap<String, CheckState>) -> Response {
    (code, Json(Health { status, checks })).into_response()
}
