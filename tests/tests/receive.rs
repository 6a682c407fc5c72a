//! `ringback receive` and `ringback verify` as processes: what the documentation shows, official signers, kill -9.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use http::Method;
use ringback_test_support::client::{Client, Reply};
use ringback_test_support::files::{Folder, free_port};
use ringback_test_support::process::{Process, Spec};
use ringback_test_support::receiver::Receiver;
use ringback_test_support::signature;
use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::tools;
use ringback_test_support::wait::until;
use ringback_tests::{LATER, SOON};
use serde_json::{Value, json};

struct Receive {
    folder: Folder,
    secret: String,
    client: Client,
    process: Process,
}

fn spec(folder: &Path, port: u16, args: &[&str], secret: &str) -> Spec {
    let mut spec = Spec::new("receive", tools::ringback(), folder).args([
        "receive",
        "--dir",
        &folder.join("out").display().to_string(),
        "--listen",
        &format!("127.0.0.1:{port}"),
        "--allow-loopback",
    ]);
    spec = spec.args(args);
    if secret.is_empty() { spec } else { spec.env("RINGBACK_WEBHOOK_SECRET", secret) }
}

impl Receive {
    async fn start(args: &[&str], env: &[(&str, &str)]) -> Self {
        Self::with_secret(&signature::new_secret(), args, env).await
    }

    async fn with_secret(secret: &str, args: &[&str], env: &[(&str, &str)]) -> Self {
        let (folder, port, secret) = (Folder::new("receive"), free_port(), secret.to_owned());
        let mut spec = spec(folder.path(), port, args, &secret);
        for (name, value) in env {
            spec = spec.env(name, *value);
        }
        let client = Client::new(&format!("http://127.0.0.1:{port}"), "");
        let this = Self { folder, secret, client, process: Process::spawn(spec) };
        this.ready().await;
        this
    }

    /// Starts it again, without the variables of the first start.
    async fn again(&mut self, args: &[&str]) {
        let port = self.client.base().rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
        self.process = Process::spawn(spec(self.folder.path(), port, args, &self.secret));
        self.ready().await;
    }

    async fn ready(&self) {
        until("the receiver", SOON, || async {
            let reply = self.client.send(Method::GET, "/health", &[], String::new()).await;
            reply.ok().filter(|reply| reply.status == 200)
        })
        .await;
    }

    async fn post(&self, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        let mut all = vec![("content-type", "application/json")];
        all.extend_from_slice(headers);
        self.client.send(Method::POST, path, &all, body.to_owned()).await.expect("an answer")
    }

    async fn about(&self, id: &str) -> Value {
        self.client
            .send(Method::GET, &format!("/received/{id}"), &[], String::new())
            .await
            .expect("an answer")
            .json
    }

    async fn settled(&self, id: &str) -> Value {
        until(&format!("{id} to be worked off"), SOON, || async {
            let about = self.about(id).await;
            (about["status"] == "completed").then_some(about)
        })
        .await
    }

    fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join("out").join(name)
    }
}

/// Headers that the official packages make for a body.
fn signed(python: &Path, folder: &Path, secret: &str, body: &str) -> Vec<Vec<(String, String)>> {
    let file = folder.join("to-sign.json");
    std::fs::write(&file, body).expect("write");
    let output = Command::new(python)
        .arg(tools::root().join("tests/sdk/sign.py"))
        .arg(file)
        .env("WEBHOOK_SECRET", secret)
        .output()
        .expect("run the signer");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout)
        .expect("UTF-8")
        .lines()
        .map(|line| {
            let headers: Value = serde_json::from_str(line).expect("JSON");
            let headers = headers.as_object().expect("an object").clone();
            headers
                .into_iter()
                .map(|(name, value)| (name, value.as_str().expect("a text").to_owned()))
                .collect()
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_official_packages_sign_is_accepted() {
    let Some(python) = tools::python("venv-verify") else { return };
    let receive = Receive::start(&[], &[]).await;
    let body = json!({"id": "job-1", "status": "COMPLETED", "output": {"text": "grüße"}}).to_string();
    let signers = signed(&python, receive.folder.path(), &receive.secret, &body);
    assert_eq!(signers.len(), 3);
    for headers in &signers {
        let headers: Vec<(&str, &str)> = headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        let reply = receive.post("/webhooks", &headers, &body).await;
        assert_eq!((reply.status, reply.json), (200, json!({"received": true})), "{headers:?}");
        let altered = receive.post("/webhooks", &headers, &body.replace("job-1", "job-2")).await;
        assert_eq!((altered.status, &altered.json["code"]), (401, &json!("no_match")));
    }
    let wrong = signed(&python, receive.folder.path(), &signature::new_secret(), &body);
    let headers: Vec<(&str, &str)> = wrong[0].iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    assert_eq!(receive.post("/webhooks", &headers, &body).await.status, 401);
    receive.settled("job-1").await;
    assert_eq!(std::fs::read_to_string(receive.out("job-1.json")).expect("the result"), body);
    let log = receive.process.log();
    assert!(log.contains("refused") && log.contains("no_match"), "{log}");
    assert!(!log.contains(&receive.secret[6..]), "the secret is in the log:\n{log}");
}

/// From a submit to a file: the dispatcher's signatures are the only way in.
#[tokio::test(flavor = "multi_thread")]
async fn our_own_webhooks_are_received() {
    let Some(stack) = Stack::dev(Options::new(Backend::Sqlite)).await else { return };
    let receive = Receive::with_secret(&stack.secret, &[], &[]).await;
    let url = |path: &str| format!("{}{path}", receive.client.base());
    let body = json!({"input": {"text": "grüße"}, "webhook": url("/webhooks"), "webhookv2": url("/api/tts/callback")});
    let id = stack.api.submit_surely("echo", "received-1", &body, LATER).await;
    let about = until("four webhooks", LATER, || async {
        let about = receive.about(&id).await;
        let all = about["events"].as_array().is_some_and(|events| events.len() == 4);
        (all && about["status"] == "completed").then_some(about)
    })
    .await;
    let kinds: Vec<&str> = about["events"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|event| event["type"].as_str())
        .collect();
    for (kind, times) in [("runpod.in_queue", 1), ("runpod.in_progress", 1), ("runpod.completed", 2)] {
        assert_eq!(kinds.iter().filter(|found| **found == kind).count(), times, "{about}");
    }
    let saved: Value =
        serde_json::from_slice(&std::fs::read(receive.out(&format!("{id}.json"))).expect("the result"))
            .expect("JSON");
    assert_eq!((&saved["id"], &saved["output"]), (&json!(id), &json!({"text": "grüße"})));
}

/// The commands of docs/RECEIVING.md, with the ports of this test.
#[tokio::test(flavor = "multi_thread")]
async fn the_documented_curl_works_where_unsigned_is_allowed() {
    let Some(curl) = tools::need(tools::on_path("curl"), "curl", "install it") else { return };
    let text = std::fs::read_to_string(tools::root().join("docs/RECEIVING.md")).expect("the page");
    let block = |mark: &str| -> String {
        let after = text.split_once(&format!("<!-- test: {mark} -->\n")).expect("the mark").1;
        let lines: Vec<&str> =
            after.lines().take_while(|line| line.starts_with("    ")).map(str::trim).collect();
        lines.join("\n")
    };
    let documented: Vec<String> = block("servers")
        .lines()
        .find_map(|line| line.strip_prefix("ringback receive "))
        .expect("the receiver's command")
        .split(' ')
        .map(str::to_owned)
        .collect();
    let folder = Folder::new("curl");
    let (files, port) = (free_port(), free_port());
    std::fs::write(folder.path().join("test.wav"), b"RIFF\0\0\0\0WAVE").expect("write");
    let _server = file_server(folder.path(), files).await;
    let mut spec = Spec::new("receive", tools::ringback(), folder.path())
        .args(["receive"])
        .args(&documented)
        .args(["--listen", &format!("127.0.0.1:{port}")]);
    spec.cwd = Some(folder.path().to_owned());
    let receive = Process::spawn(spec);
    until(
        "the receiver",
        SOON,
        || async move { tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok() },
    )
    .await;
    let command = block("curl")
        .replace("127.0.0.1:8000", &format!("127.0.0.1:{files}"))
        .replace("127.0.0.1:8090", &format!("127.0.0.1:{port}"));
    let command = command.replacen("curl", &curl.display().to_string(), 1);
    let output = Command::new("sh").args(["-c", &command]).output().expect("run the command");
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{answer}{}", String::from_utf8_lossy(&output.stderr));
    let documented =
        text.split('`').find(|part| part.starts_with("{\"audioUrl\"")).expect("the documented answer");
    assert_eq!(answer.trim(), documented);
    let saved = folder.path().join(documented_dir(&text)).join("test.wav");
    assert_eq!(std::fs::read(saved).expect("the file"), b"RIFF\0\0\0\0WAVE");
    // Every step has its line and its time.
    let log = receive.log();
    for step in ["received", "downloaded", "confirm"] {
        assert!(
            log.lines().any(|line| line.contains(step) && line.contains("test-1") && line.ends_with(" ms")),
            "{log}"
        );
    }
}

fn documented_dir(text: &str) -> String {
    let after = text.split_once("<!-- test: servers -->").expect("the mark").1;
    let dir = after.split_once("--dir ").expect("--dir").1;
    dir.split(' ').next().expect("a word").to_owned()
}

/// A server of the files in a folder.
async fn file_server(folder: &Path, port: u16) -> Process {
    let python = tools::on_path("python3").expect("python3");
    let port_text = port.to_string();
    let mut server =
        Spec::new("files", python, folder).args(["-m", "http.server", &port_text, "--bind", "127.0.0.1"]);
    server.cwd = Some(folder.to_owned());
    let server = Process::spawn(server);
    until("the file server", SOON, || async move {
        tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()
    })
    .await;
    server
}

const UNSIGNED: [&str; 3] = ["--allow-unsigned", "--allow-from", "127.0.0.1"];

/// Everything answered with 2xx is worked off after a crash right behind the answer.
#[tokio::test(flavor = "multi_thread")]
async fn kill_9_after_the_answer_loses_nothing() {
    let (folder, files) = (Folder::new("files"), free_port());
    std::fs::write(folder.path().join("image.png"), b"PNG").expect("write");
    let mut receive = Receive::start(&UNSIGNED, &[]).await;
    let runs: Vec<String> = (0..5).map(|n| format!("run-{n}")).collect();
    for run in &runs {
        // Nobody serves the file yet, so the work cannot be done before the crash.
        let body = json!({"event": "run.completed", "run_id": run, "status": "succeeded",
            "output": [format!("http://127.0.0.1:{files}/image.png")]});
        let reply = receive.post("/webhooks", &[], &body.to_string()).await;
        assert_eq!(reply.json, json!({"received": true}));
    }
    receive.process.kill9();
    let _server = file_server(folder.path(), files).await;
    receive.again(&UNSIGNED).await;
    for run in &runs {
        let about = receive.settled(run).await;
        assert_eq!(about["events"].as_array().expect("a list").len(), 1, "{about}");
        assert_eq!(about["files"].as_array().expect("a list").len(), 2, "{about}");
        assert_eq!(std::fs::read(receive.out(&format!("{run}-1-image.png"))).expect("the copy"), b"PNG");
        assert!(receive.out(&format!("{run}.json")).exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_each_point_is_made_good_at_the_next_start() {
    for point in ["receiver.accepted.after", "receiver.saved.before", "receiver.settle.before"] {
        let (folder, files) = (Folder::new("files"), free_port());
        std::fs::write(folder.path().join("test.wav"), b"RIFF").expect("write");
        let _server = file_server(folder.path(), files).await;
        let fault = format!("{point}@1");
        let mut receive = Receive::start(&UNSIGNED, &[("RINGBACK_FAULT", &fault)]).await;
        let confirmed = Receiver::start("").await;
        let notice = json!({"job_id": "j", "filename": "../a.wav", "download_url": format!("http://127.0.0.1:{files}/test.wav"),
            "confirmation_url": confirmed.url("/confirm")});
        let headers = [("content-type", "application/json")];
        // It dies before it can answer, or with the answer.
        let _ = receive.client.send(Method::POST, "/artifacts", &headers, notice.to_string()).await;
        let begun = std::time::Instant::now();
        while receive.process.is_running() {
            assert!(begun.elapsed() < SOON, "{point} was not reached");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        receive.again(&UNSIGNED).await;
        let about = receive.settled("j").await;
        assert_eq!(about["files"].as_array().expect("a list").len(), 1, "{point}: {about}");
        assert_eq!(about["audioUrl"], "/audio-outputs/a.wav", "{point}: one file, no numbered twin");
        assert_eq!(std::fs::read(receive.out("a.wav")).expect("the file"), b"RIFF");
        assert!(!receive.out("a-2.wav").exists(), "{point}");
        assert!(confirmed.count() >= 1, "{point}");
        let hits = confirmed.hits();
        assert_eq!((&hits[0].json["job_id"], &hits[0].json["status"]), (&json!("j"), &json!("downloaded")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn arguments_that_cannot_work_are_refused_with_what_to_do() {
    let folder = Folder::new("refused");
    let dir = folder.path().join("out").display().to_string();
    for (args, code, expected) in [
        (vec![], 2, "no secret is given"),
        (vec!["--allow-unsigned"], 2, "--allow-from"),
        (vec!["--allow-unsigned", "--allow-from", "0.0.0.0/0"], 2, "everybody"),
        (vec!["--allow-unsigned", "--allow-from", "home"], 2, "home"),
        (vec!["--secret", "whsec_"], 2, "secret 1: the secret is empty"),
        (vec!["--secret", "x", "--public-prefix", "/a/../b"], 2, "public prefix"),
        (vec!["--secret", "x", "--allow-private", "0.0.0.0/0"], 2, "--allow-private"),
        (vec!["--secret-file", "/nowhere/s"], 1, "/nowhere/s"),
        (vec!["--secret", "x", "--max-body-bytes", "999999999999"], 2, "--max-body-bytes"),
    ] {
        let mut all = vec!["receive", "--dir", &dir, "--listen", "127.0.0.1:0"];
        all.extend(&args);
        let output = run(&all, &[]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(expected), "{args:?}: {said}");
    }
    let receive = Receive::start(&[], &[]).await;
    let taken = receive.folder.path().join("out").display().to_string();
    let output = run(&["receive", "--dir", &taken, "--listen", "127.0.0.1:0", "--secret", "x"], &[]);
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("in use by process"),
        "two receivers share no folder"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn json_lines_and_an_orderly_end() {
    let mut receive = Receive::start(&[&UNSIGNED[..], &["--json"]].concat(), &[]).await;
    let body =
        json!({"id": "e", "type": "galaxy.born", "created_at": "t", "data": {"secret_field": "canary-5f1c"}});
    assert_eq!(receive.post("/webhooks", &[], &body.to_string()).await.status, 200);
    let ended = until("the event", SOON, || async {
        let log = receive.process.log();
        log.lines().any(|line| line.contains("\"unhandled\"")).then_some(log)
    })
    .await;
    assert!(!ended.contains("canary-5f1c"), "values are told nowhere:\n{ended}");
    assert!(receive.process.terminate(Duration::from_secs(30)).success());
    let steps: Vec<Value> = receive
        .process
        .log()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    let names: Vec<&str> = steps.iter().filter_map(|step| step["step"].as_str()).collect();
    assert_eq!(names, ["listening", "received", "unhandled"]);
    assert!(steps[1]["took_ms"].is_number() && steps[1]["type"] == "galaxy.born");
}

fn run(args: &[&str], env: &[(&str, &str)]) -> Output {
    Command::new(tools::ringback())
        .args(args)
        .env_remove("RINGBACK_WEBHOOK_SECRET")
        .envs(env.iter().copied())
        .output()
        .expect("run ringback")
}

/// The published vector, and what goes wrong most.
#[test]
fn verify_explains() {
    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let folder = Folder::new("verify");
    let path = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("write");
        path.display().to_string()
    };
    let secret = path("secret", &format!("{SECRET}\n"));
    let body = path("body", "{\"test\": 2432232314}");
    let with_end = path("with-end", "{\"test\": 2432232314}\n");
    let wrong = path("wrong", "another secret\n");
    let headers = path(
        "headers",
        "POST /hook HTTP/1.1\r\nWebhook-Id: msg_p5jXN8AQM9LWM0D4loKWxJek\r\nWebhook-Timestamp: 1614265330\r\n\
         Webhook-Signature: v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=\r\n",
    );
    let runflow = "runflow-signature:80ec8a89ce3cd22133a1066caecb4d04fea7467657c8514d717ec42c38a5c94c";
    let given = ["--headers", headers.as_str()];
    let at = ["--at", "1614265400"];
    for (secret, body, rest, code, expected) in [
        (&secret, &body, [given, at].concat(), 0, "verified (Standard Webhooks)"),
        (&secret, &body, [&given[..], &["--ignore-age"]].concat(), 0, "its age is not checked"),
        (&secret, &body, given.to_vec(), 4, "--ignore-age"),
        (&secret, &with_end, [given, at].concat(), 4, "got a line end"),
        (&wrong, &body, [given, at].concat(), 4, "no v1 signature fits"),
        (&secret, &body, vec!["--header", runflow], 0, "verified (Runflow-Signature)"),
        (&secret, &body, vec![], 4, "has no signature"),
        (&secret, &body, vec!["--header", "nothing"], 2, "no header"),
    ] {
        let mut args = vec!["verify", "--secret-file", secret, "--body", body];
        args.extend(&rest);
        let output = run(&args, &[]);
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(expected), "{args:?}: {said}");
        assert!(!said.contains(&SECRET[6..]), "the secret is told: {said}");
    }
    let output = run(
        &["verify", "--json", "--body", &body, "--headers", &headers, "--ignore-age"],
        &[("RINGBACK_WEBHOOK_SECRET", SECRET)],
    );
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (&report["verified"], &report["checks"][4]["passed"]),
        (&json!(true), &json!(true)),
        "{report}"
    );
    assert_eq!(run(&["verify", "--body", &body, "--headers", &headers], &[]).status.code(), Some(2));
}
