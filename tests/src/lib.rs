//! End-to-end tests of Ringback. What several of them share; the tests themselves are in `tests/`.
//!
//! Run them with `make test`. Each test has its own broker, database, processes and ports, so that they can run at
//! the same time and in any order.
// Panics of this crate are test failures, never user paths.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::missing_panics_doc)]

pub mod collector;
pub mod receivers;
pub mod tiny_model;

use futures::future::join_all;
use ringback_test_support::books::Accepted;
use ringback_test_support::client::Client;
use ringback_test_support::stack::Stack;
use ringback_test_support::tools;
use ringback_test_support::wait::until;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::task::JoinHandle;

/// Longest time that anything short may take on a busy machine.
pub const SOON: Duration = Duration::from_secs(60);
/// Longest time for what waits for a webhook's second retry (10 s + 10 s) or for a slow start.
pub const LATER: Duration = Duration::from_secs(240);

/// Runs tests that take a backend on both databases, as `sqlite::NAME` and `postgres::NAME`.
#[macro_export]
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $name() {
                    super::$name(super::Backend::Sqlite).await;
                }
            )*
        }
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $name() {
                    super::$name(super::Backend::Postgres).await;
                }
            )*
        }
    };
}

/// A handler of tests/handlers.
#[must_use]
pub fn handler(name: &str) -> String {
    tools::root().join("tests/handlers").join(name).display().to_string()
}

/// Runs a script of tests/sdk against an API and shows what it printed if it fails.
pub fn run_script(program: &Path, script: &str, api: &Client, env: &[(&str, PathBuf)]) {
    let output = Command::new(program)
        .arg(tools::root().join("tests/sdk").join(script))
        .env("RUNPOD_ENDPOINT_BASE_URL", format!("{}/v2", api.base()))
        .env("RINGBACK_TEST_KEY", api.key())
        .envs(env.iter().map(|(name, value)| (name, value)))
        .output()
        .unwrap_or_else(|error| panic!("{} does not start: {error}", program.display()));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script} failed with {}:\n{out}\n{err}", output.status);
    // A script that ends early without an error must not pass.
    assert!(out.trim_end().ends_with("all cases passed"), "{script} did not finish:\n{out}\n{err}");
    println!("{out}");
}

/// The webhook fields of a job that owes the receiver both kinds, at two of its paths.
#[must_use]
pub fn both_webhooks(stack: &Stack, input: &Value) -> Value {
    json!({
        "input": input,
        "webhook": stack.receiver.url("/terminal"),
        "webhookv2": stack.receiver.url("/every"),
    })
}

/// Submits a job with both kinds of webhook, again and again with its key until it is accepted (P1).
pub async fn submit(stack: &Stack, endpoint: &str, key: &str, input: &Value) -> Accepted {
    submit_body(&stack.api, endpoint, key, &both_webhooks(stack, input)).await
}

async fn submit_body(api: &Client, endpoint: &str, key: &str, body: &Value) -> Accepted {
    let id = api.submit_surely(endpoint, key, body, LATER).await;
    Accepted { id, endpoint: endpoint.to_owned(), webhook: true, webhookv2: true }
}

/// Submits several jobs at once in the background, so that a test can kill things meanwhile.
/// Each job is (endpoint, input); `name` makes the idempotency keys.
pub fn submit_behind(stack: &Stack, name: &str, jobs: &[(&str, Value)]) -> JoinHandle<Vec<Accepted>> {
    let api = stack.api.clone();
    let bodies: Vec<(String, String, Value)> = jobs
        .iter()
        .enumerate()
        .map(|(n, (endpoint, input))| {
            ((*endpoint).to_owned(), format!("{name}-{n}"), both_webhooks(stack, input))
        })
        .collect();
    tokio::spawn(async move {
        join_all(bodies.iter().map(|(endpoint, key, body)| submit_body(&api, endpoint, key, body))).await
    })
}

/// A steady load of short jobs, `per_second` of them, until [`Load::stop`].
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Vec<Accepted>>,
    accepted: Arc<AtomicUsize>,
}

impl Load {
    /// Starts it on the endpoint `echo`.
    #[must_use]
    pub fn start(stack: &Stack, name: &str, per_second: u32) -> Self {
        let (stop, accepted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (api, name) = (stack.api.clone(), name.to_owned());
        let body = both_webhooks(stack, &json!({ "load": &name }));
        let task = tokio::spawn({
            let (stop, accepted) = (Arc::clone(&stop), Arc::clone(&accepted));
            async move {
                let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second);
                let mut jobs = Vec::new();
                while !stop.load(Ordering::SeqCst) {
                    ticks.tick().await;
                    let (api, body, accepted) = (api.clone(), body.clone(), Arc::clone(&accepted));
                    let key = format!("{name}-{}", jobs.len());
                    jobs.push(tokio::spawn(async move {
                        let job = submit_body(&api, "echo", &key, &body).await;
                        accepted.fetch_add(1, Ordering::SeqCst);
                        job
                    }));
                }
                join_all(jobs).await.into_iter().map(|job| job.expect("a submit")).collect()
            }
        });
        Self { stop, task, accepted }
    }

    /// Waits until so many further jobs were accepted.
    pub async fn wait_for_more(&self, jobs: usize) {
        let goal = self.accepted.load(Ordering::SeqCst) + jobs;
        until("the load to go on", LATER, || async {
            (self.accepted.load(Ordering::SeqCst) >= goal).then_some(())
        })
        .await;
    }

    /// Ends it; gives every job that was accepted.
    pub async fn stop(self) -> Vec<Accepted> {
        self.stop.store(true, Ordering::SeqCst);
        self.task.await.expect("the load")
    }
}

/// Every job in the database is one that a client was told of, and the other way round (P1); no webhook came for any
/// other job.
pub async fn assert_only(stack: &Stack, accepted: &[Accepted]) {
    let ids: BTreeSet<&str> = accepted.iter().map(|job| job.id.as_str()).collect();
    let jobs = stack.sql().await.count("SELECT COUNT(*) FROM jobs").await;
    assert_eq!(jobs, i64::try_from(ids.len()).expect("few"), "jobs in SQL and accepted jobs differ");
    for hit in stack.receiver.hits() {
        assert!(ids.contains(hit.job()), "a webhook of a job that nobody was told of: {:?}", hit.json);
    }
}
