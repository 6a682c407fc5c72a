//! The crash table of registered webhooks and of replays: two dispatchers, both of which die by `kill -9` at the same
//! point, one after the other. Real processes, both databases, and a receiver that counts copies.
//!
//! Each row owes one delivery of one kind, so that the number of copies is known exactly: a death before the POST or
//! after the record costs none, one in between costs one more copy, with the same id and the same bytes.

use http::Method;
use ringback_test_support::books::assert_identity;
use ringback_test_support::client::Client;
use ringback_test_support::events::assert_events_fit;
use ringback_test_support::receiver::{Hit, Mode};
use ringback_test_support::stack::{Backend, Options, Role, Stack};
use ringback_test_support::tools;
use ringback_test_support::wait::until;
use ringback_tests::{LATER, SOON, handler};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const DISPATCHERS: [&str; 2] = ["dispatcher", "second"];
const POINTS: [&str; 4] = [
    "dispatcher.post.before",
    "dispatcher.post.after",
    "dispatcher.record.before",
    "dispatcher.record.after",
];

/// What owes a delivery: a transition of a job, one of a batch, and events that are neither.
const KINDS: [&str; 5] =
    ["job.queued", "job.completed", "batch.completed", "usage.limit_warning", "artifact.ready"];

/// The project whose quota is warned of in one row; a quota warns once.
fn metered(point: usize) -> (String, String) {
    (format!("metered{point}"), format!("rb_metered{point}_0123456789abcdef"))
}

fn options(backend: Backend) -> Options {
    let mut options = Options::new(backend);
    for point in 0..POINTS.len() {
        let (name, key) = metered(point);
        options.table(&format!(
            "[projects.{name}]\nquota = {{ period = \"month\", jobs = 5 }}\n\
             api_keys = [{{ name = \"test\", key = {key:?}, scopes = [\"admin\"] }}]"
        ));
        options.endpoint(&name, r#"{ builtin = "echo" }"#, &format!("project = {name:?}"));
    }
    if let Some(python) = tools::python("venv-runpod112") {
        let command = [&python.display().to_string(), &handler("files.py")];
        options.process("files", &command.map(String::as_str), "artifacts = { paths = true }");
    }
    options
}

/// Starts what owes exactly one delivery of the kind; the project's client comes back.
async fn cause(stack: &Stack, kind: &str, point: usize) {
    match kind {
        "job.queued" | "job.completed" => {
            stack.api.run("echo", &json!({"input": {"n": 1}})).await;
        }
        "batch.completed" => {
            let items = json!([{"input": {"n": 1}}, {"input": {"n": 2}}]);
            let made = stack.api.post("/v1/batches", &json!({"endpoint": "echo", "items": items})).await;
            assert!(made.status < 300, "{}", made.text);
        }
        "usage.limit_warning" => {
            let (name, key) = metered(point);
            let api = stack.api.with_key(&key);
            for n in 0..4 {
                api.run(&name, &json!({"input": {"n": n}})).await;
            }
        }
        "artifact.ready" => {
            let name = format!("p{point}.txt");
            stack.api.run("files", &json!({"input": {"name": name, "text": "la la"}})).await;
        }
        other => panic!("{other}"),
    }
}

fn client(stack: &Stack, kind: &str, point: usize) -> Client {
    if kind == "usage.limit_warning" { stack.api.with_key(&metered(point).1) } else { stack.api.clone() }
}

/// Both dispatchers end in order and start again with a point armed.
async fn arm(stack: &mut Stack, fault: &str) {
    for name in DISPATCHERS {
        if stack.is_running(name) {
            stack.terminate(name);
        }
        stack.spawn_over(Role::Dispatcher, name, Some(fault));
    }
    for name in DISPATCHERS {
        stack.wait_ready(name).await;
    }
}

/// Waits until so many dispatchers have died at their point.
async fn deaths(stack: &mut Stack, wanted: usize, what: &str) {
    let stack = std::sync::Mutex::new(stack);
    until(&format!("{wanted} dispatchers to die: {what}"), LATER, || async {
        let mut stack = stack.lock().expect("not poisoned");
        let dead = DISPATCHERS.iter().filter(|name| !stack.is_running(name)).count();
        (dead >= wanted).then_some(())
    })
    .await;
}

async fn bring_back(stack: &mut Stack) {
    for name in DISPATCHERS {
        if !stack.is_running(name) {
            stack.start_again(name).await;
        }
    }
}

fn at(stack: &Stack, path: &str) -> Vec<Hit> {
    stack.receiver.hits().into_iter().filter(|hit| hit.path == path).collect()
}

async fn register(stack: &Stack, api: &Client, path: &str, event: &str) -> String {
    let hook = json!({"url": stack.receiver.url(path), "events": [event], "secret": stack.secret});
    let made = api.post("/v1/webhooks", &hook).await.expect(201);
    made["id"].as_str().expect("an id").to_owned()
}

async fn one_row(stack: &mut Stack, kind: &str, point: usize) {
    let fault = POINTS[point];
    println!("--- {kind}: {fault}");
    let api = client(stack, kind, point);
    let path = format!("/{kind}/{point}");
    let hook = register(stack, &api, &path, kind).await;
    arm(stack, &format!("{fault}@1")).await;
    cause(stack, kind, point).await;
    // What is recorded is over: nobody else comes to that point.
    let (dead, copies) = match fault {
        "dispatcher.post.before" => (2, 1),
        "dispatcher.post.after" | "dispatcher.record.before" => (2, 3),
        _ => (1, 1),
    };
    deaths(stack, dead, &format!("{kind} {fault}")).await;
    bring_back(stack).await;
    let deliveries = until(&format!("{kind} after {fault} to be recorded"), LATER, || async {
        let all = api.get(&format!("/v1/deliveries?webhook={hook}")).await.expect(200);
        let all = all["deliveries"].as_array().or_else(|| all["data"].as_array())?.clone();
        (!all.is_empty() && all.iter().all(|delivery| delivery["state"] != "pending")).then_some(all)
    })
    .await;
    assert_eq!(deliveries.len(), 1, "P4: {kind} {fault}: {deliveries:?}");
    assert_eq!(deliveries[0]["state"], "delivered", "{kind} {fault}: {deliveries:?}");
    let hits = at(stack, &path);
    assert_eq!(hits.len(), copies, "{kind} {fault}: copies");
    for hit in &hits {
        assert_eq!(
            (hit.webhook_id.as_str().into(), &hit.body),
            (deliveries[0]["id"].clone(), &hits[0].body),
            "{fault}"
        );
        assert_eq!(hit.json["type"], kind, "{}", hit.json);
        assert_eq!(hit.signature, Ok(()));
    }
    // It hears of nothing more, so that the next row's dispatchers have one delivery to die at.
    api.call(Method::DELETE, &format!("/v1/webhooks/{hook}"), None).await.expect(204);
}

async fn registered(backend: Backend) {
    let Some(mut stack) = Stack::apart(options(backend)).await else { return };
    stack.start_as(Role::Dispatcher, DISPATCHERS[1]).await;
    let files = tools::python("venv-runpod112").is_some();
    for kind in KINDS.iter().filter(|kind| files || **kind != "artifact.ready") {
        for point in 0..POINTS.len() {
            one_row(&mut stack, kind, point).await;
        }
    }
    assert_identity(&stack, LATER).await;
    let sql = stack.sql().await;
    assert_eq!(sql.count("SELECT COUNT(*) FROM deliveries WHERE state <> 1").await, 0, "nothing is open");
    let told = assert_events_fit(&stack).await;
    assert!(
        KINDS.iter().filter(|kind| files || **kind != "artifact.ready").all(|kind| told.contains(*kind)),
        "{told:?}"
    );
}

/// Jobs whose ends are sent again.
const REPLAYED: usize = 60;

async fn replays(backend: Backend) {
    let Some(mut stack) = Stack::apart(options(backend)).await else { return };
    stack.start_as(Role::Dispatcher, DISPATCHERS[1]).await;
    let api = stack.api.clone();
    let hook = register(&stack, &api, "/replayed", "job.completed").await;
    for n in 0..REPLAYED {
        api.run("echo", &json!({"input": {"n": n}})).await;
    }
    until("all to be told once", LATER, || async {
        (at(&stack, "/replayed").len() == REPLAYED).then_some(())
    })
    .await;
    until("that to be recorded", LATER, || async {
        let open = stack.sql().await.count("SELECT COUNT(*) FROM deliveries WHERE state <> 1").await;
        (open == 0).then_some(())
    })
    .await;
    // Pages of ten: the first death is in the middle.
    for (round, fault) in ["dispatcher.replay.before@2", "dispatcher.replay.after@2"].iter().enumerate() {
        println!("--- {fault}");
        arm(&mut stack, fault).await;
        let body = json!({"webhook": hook, "rate_per_second": 50});
        let made = api.post("/v1/replays", &body).await;
        assert!(made.status < 300, "{}", made.text);
        let id = made.field("id").to_owned();
        deaths(&mut stack, 2, fault).await;
        let stood: Value = api.get(&format!("/v1/replays/{id}")).await.expect(200);
        assert_eq!((&stood["state"], &stood["matched"]), (&json!("running"), &json!(REPLAYED)), "{stood}");
        let queued = stood["queued"].as_u64().expect("a number");
        assert!(queued > 0 && queued < REPLAYED as u64, "it stands in the middle: {stood}");
        bring_back(&mut stack).await;
        until(&format!("the replay to end after {fault}"), LATER, || async {
            let now = api.get(&format!("/v1/replays/{id}")).await.expect(200);
            (now["state"] == "done" && now["queued"] == REPLAYED).then_some(())
        })
        .await;
        until(&format!("everything to be delivered again after {fault}"), LATER, || async {
            let open = stack.sql().await.count("SELECT COUNT(*) FROM deliveries WHERE state <> 1").await;
            (open == 0).then_some(())
        })
        .await;
        let mut copies: BTreeMap<String, Vec<Hit>> = BTreeMap::new();
        for hit in at(&stack, "/replayed") {
            copies.entry(hit.webhook_id.clone()).or_default().push(hit);
        }
        assert_eq!(copies.len(), REPLAYED, "{fault}: no other id");
        for (id, hits) in &copies {
            assert!(hits.iter().all(|hit| hit.body == hits[0].body), "P4: {id} came with other bytes");
            let of_round = |round: usize| {
                let mark = if round == 0 { String::new() } else { round.to_string() };
                hits.iter().filter(|hit| hit.header("webhook-replay") == mark).count()
            };
            assert_eq!(of_round(0), 1, "{fault}: {id} at first");
            // What was on its way when its dispatcher was killed may have come twice, and nothing else.
            let again = of_round(round + 1);
            assert!((1..=3).contains(&again), "{fault}: {id} came {again} times in round {}", round + 1);
        }
        let all: usize = copies.values().map(Vec::len).sum();
        assert!(all <= REPLAYED * (round + 2) + 40 * (round + 1), "{fault}: {all} copies");
    }
    assert_identity(&stack, SOON).await;
}

/// Retries of progress that nobody took come this much later.
const LATER_S: u64 = 20;

/// Progress that waits for its retry when its job ends, and a tracker that dies by `kill -9` between the commit of that end
/// and its announcement: nobody hears that the progress is overtaken, and still it is not sent again.
async fn overtaken(backend: Backend) {
    let Some(python) = tools::python("venv-runpod112") else { return };
    let mut options = options(backend);
    // The tracker dies at its first word; heartbeats shall not be what it speaks of.
    options.set("worker", "heartbeat_ms", "15000").set("worker", "lease_ms", "60000");
    options.process("plain", &[&python.display().to_string(), &handler("plain.py")], "");
    let Some(mut stack) = Stack::apart(options).await else { return };
    let api = stack.api.clone();
    for (row, (fault, also_dispatcher)) in
        [("tracker.announce.before@1", false), ("tracker.commit.after@1", true)].into_iter().enumerate()
    {
        println!("--- progress: {fault}, dispatcher killed too: {also_dispatcher}");
        let (told, ended) = (format!("/progress/{row}"), format!("/ended/{row}"));
        stack.receiver.answer(&told, Mode::RetryAfter(503, LATER_S));
        let progress = register(&stack, &api, &told, "job.progress").await;
        let end = register(&stack, &api, &ended, "job.completed").await;
        let input = json!({"mode": "progress", "steps": 1, "pause": 6.0});
        let job = api.run("plain", &json!({"input": input})).await;
        until("the progress to be refused", LATER, || async {
            let all = api.get(&format!("/v1/deliveries?webhook={progress}")).await.expect(200);
            (all["deliveries"][0]["attempts"] == 1).then_some(())
        })
        .await;
        stack.terminate("tracker");
        let overtaken = "SELECT COUNT(*) FROM events e JOIN deliveries d ON d.owner_id = e.id \
                         WHERE e.overtaken = 1 AND d.state = 0";
        // Whatever else it is told of kills it too.
        let mut lives = 0;
        while stack.sql().await.count(overtaken).await == 0 {
            lives += 1;
            assert!(lives <= 20, "the end is not committed");
            stack.spawn_over(Role::Tracker, "tracker", Some(fault));
            stack.wait_dead("tracker", LATER).await;
        }
        if also_dispatcher {
            stack.kill9("dispatcher");
            stack.start_again("dispatcher").await;
        }
        stack.start_again("tracker").await;
        api.wait_end("plain", &job, LATER).await;
        until("the progress to be superseded", LATER, || async {
            let all = api.get(&format!("/v1/deliveries?webhook={progress}")).await.expect(200);
            let state = all["deliveries"][0]["state"].clone();
            assert!(state == "pending" || state == "superseded", "{all}");
            (state == "superseded").then_some(())
        })
        .await;
        until("the end to be told", LATER, || async { (at(&stack, &ended).len() == 1).then_some(()) }).await;
        assert_eq!(at(&stack, &told).len(), 1, "what is overtaken is not sent again");
        for hook in [progress, end] {
            api.call(Method::DELETE, &format!("/v1/webhooks/{hook}"), None).await.expect(204);
        }
    }
    assert_identity(&stack, LATER).await;
}

macro_rules! rows {
    ($backend:ident, $value:expr) => {
        mod $backend {
            #[tokio::test(flavor = "multi_thread")]
            async fn registered() {
                super::registered($value).await;
            }
            #[tokio::test(flavor = "multi_thread")]
            async fn overtaken() {
                super::overtaken($value).await;
            }
            #[tokio::test(flavor = "multi_thread")]
            async fn replays() {
                super::replays($value).await;
            }
        }
    };
}

rows!(sqlite, super::Backend::Sqlite);
rows!(postgres, super::Backend::Postgres);
