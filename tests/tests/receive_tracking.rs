//! Row C1 with real processes: jobs whose webhook does not come are polled.

use http::Method;
use ringback_test_support::client::Client;
use ringback_test_support::files::{Folder, free_port};
use ringback_test_support::process::{Process, Spec};
use ringback_test_support::receiver::Mode;
use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::tools;
use ringback_test_support::wait::until;
use ringback_tests::{LATER, SOON};
use serde_json::{Value, json};

struct Receive {
    folder: Folder,
    /// With the key that names jobs.
    client: Client,
    spec: Spec,
    process: Process,
}

impl Receive {
    async fn start(stack: &Stack, max_wait: &str) -> Self {
        let (folder, port) = (Folder::new("receive"), free_port());
        let key = folder.path().join("api.key");
        std::fs::write(&key, format!("{}\n", stack.api.key())).expect("write the key");
        let poll_url = format!("{}/v2/{{endpoint}}/status/{{id}}", stack.api.base());
        let spec = Spec::new("receive", tools::ringback(), folder.path())
            .args(["receive", "--dir", &folder.path().join("out").display().to_string()])
            .args(["--listen", &format!("127.0.0.1:{port}"), "--poll-url", &poll_url])
            .args(["--api-key-file", &key.display().to_string()])
            .args(["--max-wait", max_wait, "--poll-every", "1s", "--json"])
            .env("RINGBACK_WEBHOOK_SECRET", &stack.secret);
        let client = Client::new(&format!("http://127.0.0.1:{port}"), stack.api.key());
        let this = Self { folder, client, process: Process::spawn(spec.clone()), spec };
        this.ready().await;
        this
    }

    async fn ready(&self) {
        until("the receiver", SOON, || async {
            let reply = self.client.send(Method::GET, "/health", &[], String::new()).await;
            reply.ok().filter(|reply| reply.status == 200)
        })
        .await;
    }

    async fn track(&self, id: &str) {
        let job = json!({"id": id, "endpoint": "echo", "status": "IN_QUEUE"});
        assert_eq!(self.client.post("/track", &job).await.expect(200)["job_id"], id);
    }

    async fn about(&self, id: &str) -> Value {
        self.client.get(&format!("/received/{id}")).await.json
    }

    async fn ended(&self, id: &str, how: &str) -> Value {
        until(&format!("{id} to be told by {how}"), LATER, || async {
            let about = self.about(id).await;
            (about["status"] == "completed" && about["tracked"] == how).then_some(about)
        })
        .await
    }
}

/// The receiver is down when the job ends, and its webhook never gets through: the result comes by a poll. The webhook
/// comes much later, with its signature and id, and changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_webhook_never_came_is_polled_and_the_late_webhook_is_harmless() {
    let Some(stack) = Stack::dev(Options::new(Backend::Sqlite)).await else { return };
    let mut receive = Receive::start(&stack, "2s").await;
    stack.receiver.answer("/down", Mode::Status(503));
    let body = json!({"input": {"text": "grüße"}, "webhook": stack.receiver.url("/down")});
    let id = stack.api.run("echo", &body).await;
    receive.track(&id).await;
    assert_eq!(receive.about(&id).await["tracked"], "awaited");
    receive.process.kill9();
    stack.api.wait_status("echo", &id, "COMPLETED", LATER).await;
    let lost = until("the webhook that does not get through", LATER, || async {
        stack.receiver.hits_of(&id).into_iter().find(|hit| hit.status() == "COMPLETED")
    })
    .await;
    receive.process = Process::spawn(receive.spec.clone());
    receive.ready().await;
    let about = receive.ended(&id, "poll").await;
    assert_eq!(about["events"].as_array().map(Vec::len), Some(1), "{about}");
    let file = receive.folder.path().join("out").join(format!("{id}.json"));
    let saved: Value = serde_json::from_slice(&std::fs::read(&file).expect("the result")).expect("JSON");
    assert_eq!((&saved["id"], &saved["output"]), (&json!(id), &json!({"text": "grüße"})));

    let written = std::fs::metadata(&file).and_then(|file| file.modified()).expect("its time");
    let headers: Vec<(&str, &str)> = lost
        .headers
        .iter()
        .filter(|(name, _)| name.as_str().starts_with("webhook-") || *name == http::header::CONTENT_TYPE)
        .map(|(name, value)| (name.as_str(), value.to_str().expect("text")))
        .collect();
    let text = String::from_utf8(lost.body.to_vec()).expect("UTF-8");
    let late = receive.client.send(Method::POST, "/webhooks", &headers, text).await.expect("an answer");
    assert_eq!((late.status, late.json), (200, json!({"received": true})));
    let about = receive.ended(&id, "poll").await;
    assert_eq!(about["files"].as_array().map(Vec::len), Some(1), "{about}");
    assert_eq!(std::fs::metadata(&file).and_then(|file| file.modified()).expect("its time"), written);
    let log = receive.process.log();
    assert!(log.contains("\"polled\"") && log.contains("\"duplicate\""), "{log}");
    assert!(!log.contains(stack.api.key()), "the key is in the log:\n{log}");
}

/// A webhook in time ends the wait: nobody is asked.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_webhook_comes_is_not_polled() {
    let Some(stack) = Stack::dev(Options::new(Backend::Sqlite)).await else { return };
    let receive = Receive::start(&stack, "300s").await;
    let hook = format!("{}/webhooks", receive.client.base());
    let id = stack.api.run("echo", &json!({"input": 1, "webhook": hook})).await;
    receive.track(&id).await;
    receive.ended(&id, "webhook").await;
    // Named once more: it has ended.
    let again = receive.client.post("/track", &json!({"id": id, "endpoint": "echo"})).await.expect(200);
    assert_eq!(again, json!({"job_id": id, "tracked": "webhook"}));
    assert!(!receive.process.log().contains("\"polled\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_names_jobs_and_a_job_that_nobody_knows_is_given_up() {
    let Some(stack) = Stack::dev(Options::new(Backend::Sqlite)).await else { return };
    let receive = Receive::start(&stack, "1s").await;
    let job = json!({"id": "00000000-0000-0000-0000-000000000000", "endpoint": "echo"});
    for key in ["", "wrong"] {
        let answer = receive.client.with_key(key).post("/track", &job).await;
        assert_eq!((answer.status, answer.json["code"].as_str()), (401, Some("no_key")));
    }
    for (body, expected) in [
        (json!({"endpoint": "echo"}), "`id`"),
        (json!({"id": "../health", "endpoint": "echo"}), "id must have"),
        (json!({"id": "j"}), "endpoint must have"),
        (json!({"id": "j", "endpoint": "a/b"}), "endpoint must have"),
    ] {
        let answer = receive.client.post("/track", &body).await;
        let detail = answer.field("detail").to_owned();
        assert!(answer.status == 400 && detail.contains(expected), "{body}: {detail}");
    }
    receive.client.post("/track", &job).await.expect(200);
    let id = job["id"].as_str().expect("a text");
    until("the job to be given up", LATER, || async {
        (receive.about(id).await["tracked"] == "given_up").then_some(())
    })
    .await;
    assert!(receive.process.log().contains("given up"));
}

#[tokio::test(flavor = "multi_thread")]
async fn flags_that_cannot_work_are_refused() {
    let folder = Folder::new("refused");
    let dir = folder.path().join("out").display().to_string();
    let empty = folder.path().join("empty").display().to_string();
    std::fs::write(&empty, "\n").expect("write");
    let url = "http://127.0.0.1:1/status/{id}";
    for (args, expected) in [
        (vec!["--poll-url", "http://127.0.0.1:1/status"], "{id} is missing"),
        (vec!["--poll-url", "http://{id}/"], "--poll-url"),
        (vec!["--poll-url", url], "no API key"),
        (vec!["--poll-url", url, "--api-key-file", &empty], "no API key"),
        (vec!["--poll-url", url, "--give-up", "10s"], "--give-up"),
        (vec!["--api-key-file", &empty], "--poll-url"),
    ] {
        let output = std::process::Command::new(tools::ringback())
            .args(["receive", "--dir", &dir, "--listen", "127.0.0.1:0", "--secret", "x"])
            .args(&args)
            .env_remove("RINGBACK_API_KEY")
            .output()
            .expect("run ringback");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && said.contains(expected), "{args:?}: {said}");
    }
}
