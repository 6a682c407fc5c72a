//! The loops and the audit against a server that misbehaves on purpose, and the floor against a real broker.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail the test")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::routing::post;
use bytes::Bytes;
use http::{Method, Uri};
use indicatif::ProgressBar;
use ringback_bench::board::Board;
use ringback_bench::children::find;
use ringback_bench::client::Connection;
use ringback_bench::error::BenchError;
use ringback_bench::load::{Closed, Load, Open, Target, Until, closed, open};
use ringback_bench::procs::Spent;
use ringback_bench::receiver::{FLOOR_PATH, Receiver};
use ringback_bench::stats::{Audit, Phase};
use tokio::sync::mpsc;
use uuid::Uuid;

/// How a server treats its n-th job.
#[derive(Clone, Copy)]
struct Manners {
    webhooks: fn(u64) -> usize,
    status: u16,
    stall: Option<Duration>,
}

type Job = (Uuid, Bytes, u64);

#[derive(Clone)]
struct Served {
    manners: Manners,
    started: Instant,
    count: Arc<std::sync::atomic::AtomicU64>,
    out: mpsc::UnboundedSender<Job>,
}

async fn take(State(served): State<Served>, body: Bytes) -> (http::StatusCode, String) {
    let n = served.count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    if let Some(stall) = served.manners.stall {
        tokio::time::sleep(stall.saturating_sub(served.started.elapsed())).await;
    }
    let id = Uuid::now_v7();
    let status = http::StatusCode::from_u16(served.manners.status).unwrap();
    if status.is_success() {
        served.out.send((id, body, n)).unwrap();
    }
    (status, format!(r#"{{"id":"{id}","status":"IN_QUEUE"}}"#))
}

async fn send_out(mut connection: Connection, mut jobs: mpsc::UnboundedReceiver<Job>, manners: Manners) {
    while let Some((id, body, n)) = jobs.recv().await {
        let text = format!(r#"{{"id":"{id}","output":{}}}"#, String::from_utf8_lossy(&body));
        for _ in 0..(manners.webhooks)(n) {
            let path = Uri::from_static(FLOOR_PATH);
            connection.send(Method::POST, &path, text.clone().into()).await.unwrap();
        }
    }
}

struct Scene {
    board: Arc<Board>,
    target: Arc<Target>,
    receiver: Receiver,
}

async fn scene(manners: Manners) -> Scene {
    let board = Arc::new(Board::default());
    let receiver = Receiver::start(Arc::clone(&board), b"key".to_vec(), 1).await.unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (out, jobs) = mpsc::unbounded_channel();
    let connection = Connection::open(&receiver.address.to_string(), None).await.unwrap();
    tokio::spawn(send_out(connection, jobs, manners));
    let served = Served { manners, started: Instant::now(), count: Arc::default(), out };
    let app = axum::Router::new().route("/v2/{endpoint}/run", post(take)).with_state(served);
    tokio::spawn(async move { axum::serve(listener, app).await });
    let endpoints = ["a".to_owned(), "b".to_owned()];
    let target = Target::new(&address, Some("k"), &endpoints, receiver.url(FLOOR_PATH), "text".to_owned());
    Scene { board, target: Arc::new(target.unwrap()), receiver }
}

async fn run_closed(scene: &Scene, backlog: usize, jobs: u64) -> Result<Load, BenchError> {
    let patience = Duration::from_millis(400);
    let plan = Closed { connections: 4, backlog, until: Until::Jobs(jobs), patience };
    closed(&scene.board, &scene.target, plan, &ProgressBar::hidden()).await
}

#[tokio::test]
async fn a_faithful_server_is_sound_and_every_job_is_counted_once() {
    let scene = scene(Manners { webhooks: |_| 1, status: 200, stall: None }).await;
    let load = run_closed(&scene, 8, 300).await.unwrap();
    assert_eq!(load.slots, 0..300);
    let audit = Audit::of(&scene.board, std::slice::from_ref(&load.slots));
    assert!(audit.is_clean() && audit.sent == 300, "{audit:?}");
    assert_eq!(scene.receiver.faults().first(), None);
    let phase = Phase::of("x", &scene.board, &load, Spent::default());
    assert!(phase.jobs == 300 && phase.webhook.max_ms >= phase.webhook.p50_ms && phase.jobs_per_s > 0.0);
}

#[tokio::test]
async fn lost_and_doubled_webhooks_are_found() {
    let webhooks = |n: u64| match n % 10 {
        3 => 0,
        7 => 2,
        _ => 1,
    };
    let scene = scene(Manners { webhooks, status: 200, stall: None }).await;
    let load = run_closed(&scene, 1000, 100).await.unwrap();
    let audit = Audit::of(&scene.board, &[load.slots]);
    assert_eq!((audit.sent, audit.lost, audit.duplicated, audit.wrong_id), (100, 10, 10, 0));
}

#[tokio::test]
async fn a_server_that_never_calls_back_gets_no_more_than_the_backlog() {
    let scene = scene(Manners { webhooks: |_| 0, status: 200, stall: None }).await;
    let load = run_closed(&scene, 5, 100).await.unwrap();
    let audit = Audit::of(&scene.board, &[load.slots]);
    assert_eq!((audit.sent, audit.lost), (5, 5));
}

#[tokio::test]
async fn a_server_that_takes_nothing_is_an_error_that_quotes_it() {
    let scene = scene(Manners { webhooks: |_| 1, status: 429, stall: None }).await;
    let error = run_closed(&scene, 100, 1000).await.unwrap_err().to_string();
    assert!(error.contains("/v2/a/run") && error.contains("429"), "{error}");
}

#[tokio::test]
async fn the_open_loop_charges_a_stall_to_every_job_that_was_due() {
    let stall = Duration::from_millis(600);
    let scene = scene(Manners { webhooks: |_| 1, status: 200, stall: Some(stall) }).await;
    let plan = Open { rate: 200, jobs: 200, patience: Duration::from_secs(5) };
    let load = open(&scene.board, &scene.target, plan, &ProgressBar::hidden()).await.unwrap();
    let waited: Vec<u64> = scene
        .board
        .jobs(load.slots.clone())
        .map(|(_, job)| (job.arrived_ns - job.sent_ns) / 1_000_000)
        .collect();
    // About 120 jobs were due during the stall; half of them waited more than half of it.
    assert!(waited.iter().filter(|ms| **ms > 100).count() >= 40, "{waited:?}");
    assert!(Audit::of(&scene.board, &[load.slots]).is_clean());
}

#[test]
fn the_floor_runs_alone_and_loses_nothing() {
    let named = std::env::var_os("RINGBACK_NATS_SERVER").map(std::path::PathBuf::from);
    let Some(nats_server) = named
        .or_else(|| find("nats-server", &[concat!(env!("CARGO_MANIFEST_DIR"), "/../../.tools/bin").into()]))
    else {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "CI needs nats-server on PATH or in RINGBACK_NATS_SERVER"
        );
        eprintln!("SKIPPED: no nats-server on PATH or in RINGBACK_NATS_SERVER");
        return;
    };
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_ringback-bench"))
        .args(["--quick", "--parts", "floor", "--json", "--nats-server"])
        .arg(nats_server)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let floor = &report["databases"][0]["floor"][0];
    assert!(floor["jobs"].as_u64().unwrap() > 100, "{errors}");
    assert_eq!((floor["lost"].as_u64(), floor["refused"].as_u64()), (Some(0), Some(0)), "{floor}");
    assert!(floor["cpu_s_per_1000"]["nats-server"].as_f64().unwrap() > 0.0);
    assert_eq!(report["stray"], 0);
}
