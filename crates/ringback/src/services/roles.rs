//! Each service of the all-in-one as a future: built from what the process shares, run until its shutdown.

use super::platform::{Platform, Sql, service};
use crate::error::CliError;
use ringback_api_ingest as api_ingest;
use ringback_gpu_worker as gpu_worker;
use ringback_reconciler as reconciler;
use ringback_service_runtime::Shutdown;
use ringback_state_tracker as state_tracker;
use ringback_webhook_dispatcher as webhook_dispatcher;

/// Builds the API and binds its listener.
pub(crate) async fn build_api(
    platform: &Platform,
    sql: &Sql,
    shutdown: &Shutdown,
) -> Result<api_ingest::App, CliError> {
    let deps = api_ingest::Deps {
        store: sql.store.clone(),
        bus: platform.bus.clone(),
        blobs: platform.blobs.clone(),
        key: sql.key.clone(),
        readiness: platform.readiness.clone(),
        shutdown: shutdown.clone(),
    };
    api_ingest::App::build(&platform.config, deps).await.map_err(|error| match error {
        api_ingest::AppError::Listen { .. } => CliError::usage(
            error.to_string(),
            "stop what has that address, or choose another one with --listen",
        ),
        other => service("api", &other),
    })
}

/// Takes jobs and answers clients.
pub(crate) async fn api(platform: Platform, sql: Sql, shutdown: Shutdown) -> Result<(), CliError> {
    let app = build_api(&platform, &sql, &shutdown).await?;
    app.run().await;
    Ok(())
}

/// Runs jobs.
pub(crate) async fn worker(platform: Platform, shutdown: Shutdown) -> Result<(), CliError> {
    let (config, readiness) = (&platform.config, &platform.readiness);
    let found = gpu_worker::served_endpoints(config, &platform.bus, readiness, &shutdown).await;
    let found = found.map_err(|error| service("worker", &error))?;
    let Some(gpu_worker::Served { endpoints, shards, check: _check }) = found else { return Ok(()) };
    let parts = gpu_worker::WorkerParts {
        bus: platform.bus,
        blobs: platform.blobs,
        readiness: platform.readiness.clone(),
        endpoints,
        shards,
        guard: None,
    };
    let app = gpu_worker::App::build(&platform.config, parts).map_err(|error| service("worker", &error))?;
    app.run(shutdown).await.map_err(|error| match error {
        gpu_worker::WorkerError::Ruined(_) => CliError::Ruined(error.to_string()),
        other => service("worker", &other),
    })
}

/// Changes the state of jobs.
pub(crate) async fn tracker(platform: Platform, sql: Sql, shutdown: Shutdown) -> Result<(), CliError> {
    let server = &platform.config.server;
    let handles = state_tracker::Handles {
        store: sql.store,
        bus: platform.bus,
        secret_key: sql.key,
        public_url: server.base_url(server.listen),
        readiness: platform.readiness,
    };
    let app = state_tracker::App::build(&platform.config, handles);
    app.run(shutdown).await.map_err(|error| service("tracker", &error))
}

/// Sends webhooks. `alone`: no other dispatcher can be alive on this database.
pub(crate) async fn dispatcher(
    platform: Platform,
    sql: Sql,
    shutdown: Shutdown,
    alone: bool,
) -> Result<(), CliError> {
    let deps = webhook_dispatcher::Deps {
        store: sql.store,
        bus: platform.bus,
        blobs: platform.blobs,
        key: sql.key,
        readiness: platform.readiness,
        shutdown,
        alone,
    };
    let app = webhook_dispatcher::App::build(&platform.config, deps)
        .map_err(|error| service("dispatcher", &error))?;
    app.run().await;
    Ok(())
}

/// Finds what should be on its way and is not.
pub(crate) async fn reconciler(platform: Platform, sql: Sql, shutdown: Shutdown) -> Result<(), CliError> {
    let server = &platform.config.server;
    let handles = reconciler::Handles {
        store: sql.store,
        bus: platform.bus,
        blobs: platform.blobs,
        secret_key: sql.key,
        public_url: server.base_url(server.listen),
        readiness: platform.readiness,
    };
    let app = reconciler::App::build(&platform.config, handles);
    app.run(shutdown).await.map_err(|error| service("reconciler", &error))
}
