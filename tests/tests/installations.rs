//! Two installations on one broker, apart by their names.

use ringback_test_support::books::assert_books_balance;
use ringback_test_support::client::Client;
use ringback_test_support::stack::{Backend, Options, Role, Stack};
use ringback_test_support::wait::until;
use ringback_tests::{LATER, Load, assert_only, submit};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// One name begins with the other.
const FIRST: &str = "one";
const SECOND: &str = "one-2";

fn options(backend: Backend, install: &str) -> Options {
    let mut options = Options::new(backend).with("nats", "install", &format!("{install:?}"));
    options.endpoint("single", r#"{ builtin = "sleep" }"#, "slots = 1");
    options
}

/// The streams of an installation by name, each with the id of its creation.
async fn streams(stack: &Stack, install: &str) -> BTreeMap<String, String> {
    let filter = json!({"subject": format!("rb.{install}.>")});
    let names = stack.nats.ask("$JS.API.STREAM.NAMES", &filter).await;
    let mut found = BTreeMap::new();
    for name in names["streams"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        let info = stack.nats.ask(&format!("$JS.API.STREAM.INFO.{name}"), &Value::Null).await;
        let incarnation = info["config"]["metadata"]["incarnation"].as_str().expect("an incarnation");
        found.insert(name.to_owned(), incarnation.to_owned());
    }
    found
}

/// POSTs until it is carried out: on a busy machine the tracker may not answer in time.
async fn surely(api: &Client, path: &str) {
    until(path, LATER, || async { (api.post(path, &json!({})).await.status == 200).then_some(()) }).await;
}

async fn two_with_the_same_endpoints_do_not_meet(backend: Backend) {
    let Some(first) = Stack::dev(options(backend, FIRST)).await else { return };
    let mut second = first.prepare_beside(options(backend, SECOND)).await;
    second.start(Role::Dev).await;
    let of_second = streams(&first, SECOND).await;
    assert!(!of_second.is_empty());

    let loads = [Load::start(&first, "load", 5), Load::start(&second, "load", 5)];
    let mut jobs = [Vec::new(), Vec::new()];
    for (stack, jobs) in [&first, &second].into_iter().zip(&mut jobs) {
        jobs.push(submit(stack, "single", "running", &json!({"seconds": 600})).await);
        stack.api.wait_status("single", &jobs[0].id, "IN_PROGRESS", LATER).await;
        for n in 0..4 {
            jobs.push(submit(stack, "single", &format!("queued-{n}"), &json!({"seconds": 0})).await);
        }
    }
    // The queue, the running job and the messages of the first one go.
    surely(&first.api, "/v2/single/purge-queue").await;
    surely(&first.api, &format!("/v2/single/cancel/{}", jobs[0][0].id)).await;
    for name in streams(&first, FIRST).await.keys() {
        let deleted = first.nats.ask(&format!("$JS.API.STREAM.DELETE.{name}"), &Value::Null).await;
        assert_eq!(deleted["success"], true, "{deleted}");
    }
    for load in &loads {
        load.wait_for_more(10).await;
    }
    for job in &jobs[1][1..] {
        assert_eq!(second.api.job(&job.id).await["status"], "IN_QUEUE", "the queue of the second one moved");
    }
    surely(&second.api, &format!("/v2/single/cancel/{}", jobs[1][0].id)).await;
    // An id of the other one is an unknown id.
    assert_eq!(first.api.status("single", &jobs[1][0].id).await.status, 404);

    let [mut first_jobs, mut second_jobs] = jobs;
    let [load_of_first, load_of_second] = loads;
    let (of_load_first, of_load_second) = (load_of_first.stop().await, load_of_second.stop().await);
    let ends = async |stack: &Stack, accepted: &[_]| -> Vec<String> {
        let rows = assert_books_balance(stack, accepted, LATER).await;
        rows.iter().filter_map(|row| row["status"].as_str().map(str::to_owned)).collect()
    };
    assert_eq!(ends(&first, &first_jobs).await, ["CANCELLED"; 5]);
    let ends_of_second = ends(&second, &second_jobs).await;
    assert_eq!(ends_of_second, ["CANCELLED", "COMPLETED", "COMPLETED", "COMPLETED", "COMPLETED"]);
    assert!(ends(&first, &of_load_first).await.iter().all(|end| end == "COMPLETED"));
    assert!(ends(&second, &of_load_second).await.iter().all(|end| end == "COMPLETED"));
    // Each has its jobs and no others, and its receiver heard of no others.
    first_jobs.extend(of_load_first);
    second_jobs.extend(of_load_second);
    assert_only(&first, &first_jobs).await;
    assert_only(&second, &second_jobs).await;
    assert_eq!(streams(&first, SECOND).await, of_second, "streams of the second one were made anew");
}

ringback_tests::on_both!(two_with_the_same_endpoints_do_not_meet);
