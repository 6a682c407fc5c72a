//! The official verifiers accept every delivery that Ringback makes, of every kind and also while secrets change, and
//! nothing that was altered on the way.

use base64::Engine as _;
use http::Method;
use ringback_test_support::client::Client;
use ringback_test_support::events::assert_events_fit;
use ringback_test_support::receiver::{Hit, Mode};
use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::tools;
use ringback_test_support::wait::until;
use ringback_tests::receivers::installed;
use ringback_tests::{LATER, SOON, handler};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

/// A project whose secrets the API may change: no configuration names them.
const PROJECT: &str = "[projects.rotating]\n\
    api_keys = [{ name = \"test\", key = \"rb_rotating_0123456789abcdef\", scopes = [\"admin\"] }]\n";

/// Jobs that end in every way, a batch, and all of their kinds of webhooks.
async fn everything(stack: &Stack, api: &Client, round: &str) {
    let to = |path: &str| stack.receiver.url(&format!("/{round}/{path}"));
    let run = |endpoint: &'static str, input: Value| {
        let body = json!({"input": input, "webhook": to("job"), "webhookv2": to("every")});
        async move { api.run(endpoint, &body).await }
    };
    let large: String = "grüße 漢字 \u{1F600} \\ \" \u{7f} ".repeat(20_000);
    let mut jobs = vec![
        ("say", run("say", json!({"text": "plain"})).await, "COMPLETED"),
        (
            "say",
            run("say", json!({"large": large, "n": 1.5, "deep": {"a": [null, true]}})).await,
            "COMPLETED",
        ),
        ("timed", run("timed", json!({"seconds": 60})).await, "TIMED_OUT"),
    ];
    if tools::python("venv-runpod112").is_some() {
        let id = run("plain", json!({"mode": "raise", "text": "no \u{0} voice «x»"})).await;
        jobs.push(("plain", id, "FAILED"));
    }
    let stopped = run("rest", json!({"seconds": 600})).await;
    api.wait_status("rest", &stopped, "IN_PROGRESS", SOON).await;
    api.post(&format!("/v2/rest/cancel/{stopped}"), &json!({})).await.expect(200);
    jobs.push(("rest", stopped, "CANCELLED"));
    let body = json!({"endpoint": "say", "callback_url": to("batch"),
        "items": [{"input": {"n": 1}}, {"input": {"n": 2}}]});
    let batch = api.post("/v1/batches", &body).await;
    assert!(batch.status < 300, "{}", batch.text);
    for (endpoint, id, status) in &jobs {
        api.wait_status(endpoint, id, status, LATER).await;
        api.wait_settled(id, LATER).await;
    }
    until("the batch's callback", LATER, || async {
        stack.receiver.hits().iter().any(|hit| hit.path == format!("/{round}/batch")).then_some(())
    })
    .await;
}

async fn register(stack: &Stack, api: &Client, format: &str, secret: &Value) -> (String, String) {
    let body = json!({"url": stack.receiver.url(&format!("/registered/{format}")), "events": ["*"],
        "format": format, "secret": secret});
    let made = api.post("/v1/webhooks", &body).await.expect(201);
    let text = |name: &str| made[name].as_str().unwrap_or_else(|| panic!("{name}: {made}")).to_owned();
    (text("id"), text("secret"))
}

/// One line per delivery: what a receiver got, and the secrets that must each fit.
fn line(out: &mut String, hit: &Hit, secrets: &[&str]) {
    let headers: serde_json::Map<String, Value> = ["webhook-id", "webhook-timestamp", "webhook-signature"]
        .iter()
        .map(|name| ((*name).to_owned(), hit.header(name).into()))
        .collect();
    let body = base64::engine::general_purpose::STANDARD.encode(&hit.body);
    writeln!(out, "{}", json!({"headers": headers, "body": body, "secrets": secrets})).expect("a string");
}

fn judge(program: &Path, script: &str, file: &Path, env: &[(&str, &Path)]) -> String {
    let output = Command::new(program)
        .arg(tools::root().join("tests/receivers").join(script))
        .arg(file)
        .envs(env.iter().copied())
        .output()
        .expect("run a verifier");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script}:\n{out}\n{err}");
    assert!(out.trim_end().ends_with("all cases passed"), "{script} did not finish:\n{out}\n{err}");
    out.into_owned()
}

/// What was received by POST comes from the pull feed under the same id with the same bytes.
async fn the_feed_has_the_same_bytes(stack: &Stack, api: &Client) {
    let sent: BTreeMap<String, bytes::Bytes> =
        stack.receiver.hits().into_iter().map(|hit| (hit.webhook_id, hit.body)).collect();
    let (mut after, mut same) = (String::new(), 0);
    loop {
        let page = api.get(&format!("/v1/events?limit=100{after}")).await.expect(200);
        for event in page["events"].as_array().expect("a list") {
            let Some(posted) = sent.get(event["id"].as_str().expect("an id")) else { continue };
            assert_eq!(event["body"].as_str().map(str::as_bytes), Some(posted.as_ref()), "{event}");
            same += 1;
        }
        if page["more"] != true {
            break;
        }
        after = format!("&after={}", page["cursor"].as_str().expect("a cursor"));
    }
    assert!(same >= 20, "only {same} of {} were in the feed", sent.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn official_verifiers_accept_every_delivery() {
    let (Some(python), Some(express)) = (tools::python("venv-verify"), installed("receiver-express")) else {
        return;
    };
    let Some(node) = tools::need(tools::on_path("node"), "node", "install Node.js 18 or newer") else {
        return;
    };
    let mut options = Options::new(Backend::Sqlite);
    const MINE: &str = "project = \"rotating\"\n";
    options.endpoint("say", r#"{ builtin = "echo" }"#, MINE);
    options.endpoint("rest", r#"{ builtin = "sleep" }"#, MINE);
    let brief = format!("{MINE}execution_timeout_ms = 700");
    options.endpoint("timed", r#"{ builtin = "sleep" }"#, &brief).table(PROJECT);
    if let Some(python) = tools::python("venv-runpod112") {
        options.process("plain", &[&python.display().to_string(), &handler("plain.py")], MINE);
    }
    let Some(stack) = Stack::dev(options).await else { return };
    let api = stack.api.with_key("rb_rotating_0123456789abcdef");

    // The project's secret for webhooks of single jobs; one secret of each form for registered ones.
    let of_project = |reply: Value| reply["secret"].as_str().unwrap_or_default().to_owned();
    let first =
        of_project(api.post("/v1/webhooks/default/secret", &json!({"secret": null})).await.expect(201));
    let shown = api.get("/v1/webhooks/default/secret").await.expect(200);
    let live: Vec<&str> = shown["secrets"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|secret| secret["secret"].as_str().expect("a secret"))
        .collect();
    let standard = register(&stack, &api, "standard", &Value::Null).await;
    let text = "any text, however it looks: 2026!";
    let runpod = register(&stack, &api, "runpod", &json!(text)).await;
    let runflow = register(&stack, &api, "runflow", &Value::Null).await;
    everything(&stack, &api, "before").await;

    // Refused at its first try, which is signed before the change; its second try comes after it.
    stack.receiver.answer("/retried", Mode::FailFirst { times: 1, status: 500 });
    let body = json!({"input": {"text": "again"}, "webhook": stack.receiver.url("/retried")});
    let retried = api.run("say", &body).await;
    until("the first try", SOON, || async {
        stack.receiver.hits_of(&retried).iter().any(|hit| hit.path == "/retried").then_some(())
    })
    .await;

    // A second secret of each; the first signs on.
    let begun = stack.receiver.count();
    let second =
        of_project(api.post("/v1/webhooks/default/secret", &json!({"secret": null})).await.expect(201));
    let mut added = Vec::new();
    for (id, _) in [&standard, &runpod, &runflow] {
        let path = format!("/v1/webhooks/{id}/secrets");
        let made = api.post(&path, &json!({"secret": null, "expire_old_after_hours": 1})).await.expect(201);
        added.push(made["secret"].as_str().expect("the new secret").to_owned());
    }
    assert_ne!(first, second);
    // A dispatcher reads a project's secrets again within seconds.
    until("the new secret to sign", SOON, || async {
        let body = json!({"input": {}, "webhook": stack.receiver.url("/probe")});
        let probe = api.run("say", &body).await;
        let hit = stack.receiver.wait_for(&probe, "COMPLETED", SOON).await;
        (hit.header("webhook-signature").split(' ').count() == live.len() + 1).then_some(())
    })
    .await;
    everything(&stack, &api, "rotating").await;

    // What is signed while the change is made may have either number; only what began after is counted as rotated.
    let registered = |hit: &Hit| {
        let names = ["/registered/standard", "/registered/runpod", "/registered/runflow"];
        names.iter().position(|name| hit.path == *name)
    };
    let old = [&standard.1, &runpod.1, &runflow.1];
    until("registered webhooks to hear of both rounds", LATER, || async {
        let hits = stack.receiver.hits();
        let heard =
            |which: usize, after: usize| hits[after..].iter().any(|hit| registered(hit) == Some(which));
        (0..3).all(|which| heard(which, 0) && heard(which, begun)).then_some(())
    })
    .await;
    let tries = until("the second try", LATER, || async {
        let hits = stack.receiver.hits_of(&retried);
        let tries: Vec<Hit> = hits.into_iter().filter(|hit| hit.path == "/retried").collect();
        (tries.len() >= 2).then_some(tries)
    })
    .await;
    let signed = |hit: &Hit| hit.header("webhook-signature").split(' ').count();
    assert_eq!((tries.len(), signed(&tries[0]), signed(&tries[1])), (2, live.len(), live.len() + 1));
    assert_eq!((&tries[0].webhook_id, &tries[0].body), (&tries[1].webhook_id, &tries[1].body));

    let mut file = String::new();
    let (mut counts, mut kinds) = ([0_usize; 2], std::collections::BTreeSet::new());
    for hit in stack.receiver.hits() {
        let signatures = hit.header("webhook-signature").split(' ').count();
        let mut secrets: Vec<&str> = match registered(&hit) {
            Some(which) => vec![&added[which], old[which]],
            None => [vec![second.as_str()], live.clone()].concat(),
        };
        // Before the change the newest was not there; the order of signatures is newest first.
        let all = secrets.len();
        assert!(signatures == all || signatures == all - 1, "{signatures} of {all} for {}", hit.path);
        if hit.path.starts_with("/rotating/") {
            assert_eq!(signatures, all, "{}", hit.path);
        }
        if signatures < all {
            secrets.remove(0);
        }
        counts[usize::from(signatures == all)] += 1;
        kinds.insert(hit.json["type"].as_str().unwrap_or(&hit.path).to_owned());
        line(&mut file, &hit, &secrets);
        if hit.path == "/registered/runflow" {
            assert!(hit.header("runflow-signature").len() == 64, "both schemes in one request");
        }
    }
    assert!(counts.iter().all(|count| *count > 20), "deliveries before and after: {counts:?}");
    for kind in ["job.completed", "job.failed", "job.timed_out", "job.cancelled", "batch.completed"] {
        assert!(kinds.contains(kind), "{kind} is not among {kinds:?}");
    }
    let path = stack.folder().join("deliveries.jsonl");
    std::fs::write(&path, file).expect("write");
    let modules = express.join("node_modules");
    println!("Python: {}", judge(&python, "verify_deliveries.py", &path, &[]));
    println!("npm: {}", judge(&node, "verify_deliveries.cjs", &path, &[("NODE_PATH", &modules)]));

    // A judge that accepts anything proves nothing.
    let broken = std::fs::read_to_string(&path).expect("read").replacen(
        "\"webhook-id\":\"msg_",
        "\"webhook-id\":\"msg_0",
        1,
    );
    std::fs::write(&path, broken).expect("write");
    for (program, script) in [(&python, "verify_deliveries.py"), (&node, "verify_deliveries.cjs")] {
        let output = Command::new(program)
            .arg(tools::root().join("tests/receivers").join(script))
            .arg(&path)
            .env("NODE_PATH", &modules)
            .output()
            .expect("run a verifier");
        assert!(!output.status.success(), "{script} accepts an altered id");
    }
    api.call(Method::DELETE, &format!("/v1/webhooks/{}", standard.0), None).await.expect(204);
    the_feed_has_the_same_bytes(&stack, &api).await;
    let told = assert_events_fit(&stack).await;
    assert!(told.contains("job.completed") && told.contains("batch.completed"), "{told:?}");
}
