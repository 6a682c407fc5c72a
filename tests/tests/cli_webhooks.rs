//! `ringback webhook`, `deliveries`, `replay` and `listen` against a running Ringback and a real receiver.

use ringback_test_support::receiver::{Mode, Receiver};
use ringback_test_support::signature::new_secret;
use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::wait::until;
use ringback_tests::SOON;
use serde_json::{Value, json};
use std::process::Output;
use std::sync::Arc;

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8").trim_end().to_owned()
}

/// Runs a verb off the runtime's threads, so that the receiver in this process can answer meanwhile.
async fn said(stack: &Arc<Stack>, args: &[&str], code: i32) -> String {
    let (stack, args) = (Arc::clone(stack), args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>());
    let shown = format!("{args:?}");
    let output = tokio::task::spawn_blocking(move || stack.cli(&args)).await.expect("run");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "ringback {shown}\n{}\n{errors}", text(&output));
    text(&output)
}

async fn json_of(stack: &Arc<Stack>, args: &[&str], code: i32) -> Value {
    let said = said(stack, args, code).await;
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("{args:?} printed no JSON ({error}): {said}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_from_its_making_to_its_replay() {
    let Some(stack) = Stack::dev(Options::new(Backend::Sqlite)).await else { return };
    let stack = Arc::new(stack);
    let secret = new_secret();
    let receiver = Receiver::start(&secret).await;
    std::fs::write(stack.folder().join("webhook.secret"), format!("{secret}\n")).expect("write");
    let url = receiver.url("/hook");
    let create =
        ["webhook", "create", &url, "-e", "job.*", "--secret-file", "webhook.secret", "--retry", "100ms"];
    let made = json_of(&stack, &[&create[..], &["--json"]].concat(), 0).await;
    let id = made["id"].as_str().expect("an id").to_owned();
    assert_eq!(made["secret_form"], "standard", "{made}");
    let tried = said(&stack, &["webhook", "test", &id], 0).await;
    assert!(tried.contains("delivered") && tried.contains("200"), "{tried}");
    let hit = receiver.hits().remove(0);
    hit.signature.expect("signed with the receiver's secret");
    assert_eq!(hit.json["type"], "webhook.test");
    let listed = said(&stack, &["webhook", "ls"], 0).await;
    assert!(listed.contains(&id) && listed.contains("active"), "{listed}");
    // A receiver that refuses: dead letters.
    receiver.answer("/hook", Mode::Status(500));
    let job = said(&stack, &["submit", "echo", "1"], 0).await;
    until("the end's webhook to be dead", SOON, || async {
        let dead =
            said(&stack, &["deliveries", "dead", "--job", &job, "--type", "job.completed", "--json"], 0)
                .await;
        (!dead.is_empty()).then_some(())
    })
    .await;
    let dead =
        json_of(&stack, &["deliveries", "dead", "--job", &job, "-t", "job.completed", "--json"], 0).await;
    let delivery = dead["id"].as_str().expect("an id").to_owned();
    let shown = said(&stack, &["deliveries", "get", &delivery], 0).await;
    assert!(shown.contains("dead") && shown.contains("500"), "{shown}");
    // It recovers: everything that was given up is sent again, with the same ids and bytes.
    receiver.answer("/hook", Mode::Ok);
    let filter = ["--state", "dead", "--webhook", &id];
    let counted = said(&stack, &[&["replay", "create", "--dry-run"][..], &filter].concat(), 0).await;
    assert!(!counted.starts_with('0'), "{counted}");
    let done = said(&stack, &[&["replay", "create"][..], &filter].concat(), 0).await;
    assert!(done.contains("done"), "{done}");
    let again = until("the dead letter to arrive", SOON, || async {
        receiver.hits().into_iter().find(|hit| hit.webhook_id == delivery && hit.answered == 200)
    })
    .await;
    let first = receiver.hits().into_iter().find(|hit| hit.webhook_id == delivery).expect("a first try");
    assert_eq!(again.body, first.body, "the same bytes");
    let replays = said(&stack, &["replay", "ls"], 0).await;
    assert!(replays.contains("done"), "{replays}");
    until("the delivery to be settled", SOON, || async {
        (json_of(&stack, &["deliveries", "get", &delivery, "--json"], 0).await["state"] == "delivered")
            .then_some(())
    })
    .await;
    let shown = said(&stack, &["deliveries", "get", &delivery], 0).await;
    let delivered = shown.lines().find(|line| line.contains(" 200 ")).unwrap_or_else(|| panic!("{shown}"));
    assert!(delivered.contains("first byte"), "where the time of a success went: {shown}");
    said(&stack, &["deliveries", "redeliver", &delivery], 0).await;
    until("one more copy", SOON, || async {
        let copies = receiver.hits().iter().filter(|h| h.webhook_id == delivery && h.answered == 200).count();
        (copies >= 2).then_some(())
    })
    .await;
    // Changes.
    assert!(said(&stack, &["webhook", "pause", &id], 0).await.contains("paused"));
    assert!(said(&stack, &["webhook", "resume", &id], 0).await.contains("active"));
    let rotated = json_of(&stack, &["webhook", "rotate", &id, "--overlap", "1h", "--json"], 0).await;
    assert!(rotated["secret"].as_str().expect("a secret").starts_with("whsec_"), "{rotated}");
    let types = said(&stack, &["webhook", "event-types"], 0).await;
    assert!(types.contains("job.completed") && types.contains("delivery.dead"), "{types}");
    let example = json_of(&stack, &["webhook", "event-types", "job.completed", "--json"], 0).await;
    assert_eq!(example["example"]["type"], "job.completed");
    said(&stack, &["webhook", "rm", &id], 0).await;
    said(&stack, &["webhook", "get", &id], 3).await;
    said(&stack, &["webhook", "create", "https://10.0.0.1/"], 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn listen_passes_events_on_unchanged() {
    let Some(stack) = Stack::dev(Options::new(Backend::Sqlite)).await else { return };
    let stack = Arc::new(stack);
    let secret = new_secret();
    let receiver = Receiver::start(&secret).await;
    receiver.answer("/down", Mode::Status(503));
    std::fs::write(stack.folder().join("webhook.secret"), &secret).expect("write");
    for (path, answered) in [("/hook", 200), ("/down", 503)] {
        let listener = {
            let (stack, url) = (Arc::clone(&stack), receiver.url(path));
            tokio::spawn(async move {
                let args = [
                    "listen",
                    "--forward-to",
                    &url,
                    "--secret-file",
                    "webhook.secret",
                    "--count",
                    "3",
                    "--json",
                ];
                said(&stack, &args, 0).await
            })
        };
        until("the listener's webhook", SOON, || async {
            let all = json_of(&stack, &["webhook", "ls", "--json"], 0).await;
            all["webhooks"].as_array().is_some_and(|all| !all.is_empty()).then_some(())
        })
        .await;
        let job = said(&stack, &["submit", "echo", r#"{"n": 1e400}"#], 0).await;
        let lines = listener.await.expect("the listener ends after three events");
        let told: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).expect("JSON lines")).collect();
        assert_eq!(told.len(), 3, "{lines}");
        assert_eq!(
            (&told[2]["type"], &told[2]["status"]),
            (&json!("job.completed"), &json!(answered)),
            "{lines}"
        );
        let hits: Vec<_> = receiver.hits().into_iter().filter(|hit| hit.path == path).collect();
        assert_eq!(hits.len(), 3, "nothing is retried");
        for (hit, line) in hits.iter().zip(&told) {
            hit.signature.clone().expect("signed as the server signs");
            assert_eq!(line["id"], json!(hit.webhook_id));
        }
        let end = String::from_utf8(hits[2].body.to_vec()).expect("UTF-8");
        assert!(end.contains("1e400") && end.contains(&job), "{end}");
        let left = json_of(&stack, &["webhook", "ls", "--json"], 0).await;
        assert_eq!(left, json!({"webhooks": []}), "it takes its webhook away");
    }
    said(&stack, &["listen", "--forward-to", "nonsense"], 2).await;
}
