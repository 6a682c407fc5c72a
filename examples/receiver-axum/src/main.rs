//! Receives Ringback's webhooks with axum: verified, on disk before the answer, worked off behind it.
//!
//! - `WEBHOOK_SECRET`: the secret that signs the webhooks; several, separated by spaces, are all live (rotation)
//! - `PORT`: where to listen on 127.0.0.1 (3002)
//! - `DATA`: folder of the database and of the results (data)

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::{FromRef, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use ringback_service_runtime::Shutdown;
use ringback_webhook_receiver::http::{Rejection, Verified};
use ringback_webhook_receiver::router::{HandlerError, Metrics, Received, Router as Events, RouterMetrics};
use ringback_webhook_receiver::store::{Accepted, SqliteJournal};
use ringback_webhook_receiver::worker::Worker;
use ringback_webhook_receiver::{Event, Intake, Observer, SafeName, Secrets, Trust};
use serde_json::{Value, json};
use tokio::net::TcpListener;

#[derive(Clone)]
struct App {
    trust: Arc<Trust>,
    intake: Intake,
    metrics: Arc<RouterMetrics>,
}

impl FromRef<App> for Arc<Trust> {
    fn from_ref(app: &App) -> Self {
        Self::clone(&app.trust)
    }
}

/// `Verified` has checked the signature over the raw bytes. Once we answer 200, Ringback does not send it again, so the
/// event is on disk before.
async fn hook(State(app): State<App>, hook: Verified<Event>) -> Result<Json<Value>, Rejection> {
    let taken = app.intake.take(&hook.proof, &hook.event, hook.body).await?;
    let step = if taken.accepted == Accepted::New { "queued" } else { "duplicate" };
    println!("{}", json!({"step": step, "key": taken.key}));
    Ok(Json(json!({"received": true})))
}

async fn metrics(State(app): State<App>) -> Json<Metrics> {
    Json(app.metrics.read())
}

/// The work behind the answer, as long as it likes. It may be done twice if the process dies in its midst.
async fn work(results: PathBuf, received: Arc<Received>) -> Result<(), HandlerError> {
    let Event::Runpod(job) = &received.event else {
        return Err(HandlerError::Permanent(format!("{} is no job", received.kind)));
    };
    let transient = |error: std::io::Error| HandlerError::Transient(error.to_string());
    // Names of files never come from outside unchecked.
    let name = SafeName::from_untrusted(&format!("{}.json", job.id));
    let (file, part) = (results.join(name.as_str()), results.join(format!("{name}.part")));
    tokio::fs::write(&part, &received.body).await.map_err(transient)?;
    tokio::fs::rename(&part, &file).await.map_err(transient)?;
    println!(
        "{}",
        json!({"step": "worked", "job": job.id, "status": job.status.as_str(), "error": job.error})
    );
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let text = env::var("WEBHOOK_SECRET").map_err(|_| "WEBHOOK_SECRET is not set")?;
    let secrets = Secrets::parse(&text.split_whitespace().collect::<Vec<_>>())?;
    let port: u16 = env::var("PORT").map_or(Ok(3002), |port| port.parse())?;
    let data = env::var("DATA").unwrap_or_else(|_| "data".to_owned());
    let results = Path::new(&data).join("results");
    std::fs::create_dir_all(&results)?;

    let journal = Arc::new(SqliteJournal::open(&Path::new(&data).join("inbox.db")).await?);
    let events = Events::new().on("runpod.*", move |received| work(results.clone(), received));
    let intake = Intake::new(journal, events.metrics(), Observer::default());
    let app =
        App { trust: Arc::new(Trust::signed(secrets)), intake: intake.clone(), metrics: events.metrics() };

    let shutdown = Shutdown::on_signals()?;
    // What an earlier process took and did not finish is worked off first.
    let worker = tokio::spawn(Worker::new(intake, events, Observer::default(), 4).run(shutdown.clone()));
    let routes = Router::new()
        .route("/webhooks/ringback", post(hook))
        .route("/webhooks/metrics", get(metrics))
        .with_state(app);
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    println!("{}", json!({"step": "listening", "port": port}));
    let stop = shutdown.clone();
    axum::serve(listener, routes).with_graceful_shutdown(async move { stop.triggered().await }).await?;
    worker.await?;
    shutdown.finish();
    Ok(())
}
