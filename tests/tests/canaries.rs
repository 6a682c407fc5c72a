//! Secrets stay where they belong: a whole scenario with everything logged, and then no process's log, no answer that
//! is an error or a list, no metric and no span holds one of them.

use base64::Engine as _;
use http::Method;
use ringback_test_support::client::{Client, Reply};
use ringback_test_support::receiver::Mode;
use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::tools;
use ringback_test_support::wait::until;
use ringback_tests::collector::Collector;
use ringback_tests::{LATER, SOON, handler};
use serde_json::{Value, json};

/// What must not be seen, with a name for each.
#[derive(Default)]
struct Secrets {
    all: Vec<(String, String)>,
}

impl Secrets {
    /// A new secret.
    fn new_one(&mut self, what: &str) -> String {
        let text = format!("canary{}", uuid::Uuid::now_v7().simple());
        self.watch(what, &text);
        text
    }

    fn watch(&mut self, what: &str, text: &str) {
        assert!(text.len() >= 16, "{what} is too short to be looked for: {text}");
        self.all.push((what.to_owned(), text.to_owned()));
    }

    /// A webhook secret of a new key; both spellings of the key are watched.
    fn webhook(&mut self, what: &str) -> String {
        let key = self.new_one(what);
        let text = base64::engine::general_purpose::STANDARD.encode(key);
        self.watch(what, &text);
        format!("whsec_{text}")
    }

    /// A URL with a password and a token.
    fn url(&mut self, what: &str, base: &str, path: &str) -> String {
        let (password, token) =
            (self.new_one(&format!("password in {what}")), self.new_one(&format!("query of {what}")));
        format!("{}{path}?token={token}", base.replacen("://", &format!("://user:{password}@"), 1))
    }

    fn assert_not_in(&self, place: &str, text: &str) {
        for (what, secret) in &self.all {
            if let Some(at) = text.find(secret.as_str()) {
                let from =
                    (0..=at.saturating_sub(300)).rev().find(|n| text.is_char_boundary(*n)).unwrap_or(0);
                panic!("{place} holds the {what}: …{}", &text[from..at]);
            }
        }
    }
}

fn options(collector: &Collector, receiver_url: Option<&str>) -> Options {
    let mut options = Options::new(Backend::Postgres).with("telemetry", "log_level", "\"debug\"").with(
        "telemetry",
        "otlp_endpoint",
        &format!("{:?}", collector.address),
    );
    if let (Some(python), Some(url)) = (tools::python("venv-runpod112"), receiver_url) {
        let (python, script) = (python.display().to_string(), handler("files.py"));
        let more = format!(
            "artifacts = {{ paths = true, base64 = true }}\n\
             confirm = {{ mode = \"platform\", receiver_url = {url:?}, timeout_ms = 4000 }}"
        );
        options.process("files", &[&python, &script], &more);
    }
    options
}

/// Answers to hostile or mistaken requests; each of them holds secrets that the answer must not repeat.
async fn mistakes(stack: &Stack, secrets: &mut Secrets) -> Vec<(String, Reply)> {
    let api = &stack.api;
    let mut all = Vec::new();
    let wrong_key = secrets.new_one("wrong API key");
    let stranger = Client::new(api.base(), &wrong_key);
    for path in ["/v1/jobs", "/v2/echo/health", "/v1/webhooks", "/metrics"] {
        all.push((format!("401 of {path}"), stranger.get(path).await));
    }
    let in_query = secrets.new_one("API key in a query");
    all.push((
        "a key in the query".to_owned(),
        Client::new(api.base(), "").get(&format!("/v1/jobs?api_key={in_query}")).await,
    ));
    let bad_urls = [
        secrets.url("a URL with a bad scheme", "ftp://files.example.com", "/hook"),
        secrets.url("a private URL", "https://10.0.0.1", "/hook"),
        secrets.url("a URL with a bad port", "https://example.com:99999", "/hook"),
        secrets.url("a URL with a space", "https://exa mple.com", "/hook"),
    ];
    for url in &bad_urls {
        for body in [json!({"input": 1, "webhook": url}), json!({"input": 1, "webhookv2": url})] {
            all.push((format!("a bad URL, {}", url.len()), api.post("/v2/echo/run", &body).await));
        }
        all.push((
            "a bad URL of a webhook".to_owned(),
            api.post("/v1/webhooks", &json!({"url": url, "events": ["*"]})).await,
        ));
        let runflow = json!({"input": {}, "callback_url": url});
        all.push(("a bad callback".to_owned(), api.post("/v1/models/default/echo/runs", &runflow).await));
    }
    let (s3, header, secret) =
        (secrets.new_one("s3 secret"), secrets.new_one("webhook header"), secrets.new_one("webhook secret"));
    let json_type = [("content-type", "application/json")];
    let broken = format!("{{\"input\": 1, \"s3Config\": {{\"accessSecret\": \"{s3}\", }}");
    let path = "/v2/echo/run";
    all.push((
        "broken JSON".to_owned(),
        api.send(Method::POST, path, &json_type, broken).await.expect("an answer"),
    ));
    for body in [
        json!({"url": stack.receiver.url("/x"), "events": ["*"], "secret": {"text": secret}}),
        json!({"url": stack.receiver.url("/x"), "events": ["*"], "headers": {"authorization": [header]}}),
        json!({"url": stack.receiver.url("/x"), "events": ["*"], "headers": {"webhook-id": header}}),
        json!({"url": stack.receiver.url("/x"), "events": ["no.such.event"], "secret": secret}),
    ] {
        all.push(("a bad webhook".to_owned(), api.post("/v1/webhooks", &body).await));
    }
    for body in [json!({"input": 1, "s3Config": s3}), json!({"input": 1, "s3Config": [s3], "policy": 7})] {
        all.push(("a bad s3Config".to_owned(), api.post("/v2/echo/run", &body).await));
    }
    let token = secrets.new_one("made-up capability");
    for path in [format!("/callbacks/runpod/{token}"), format!("/files/{token}"), format!("/a/{token}/x")] {
        all.push((format!("{} of a stranger", &path[..6]), Client::new(api.base(), "").get(&path).await));
    }
    all
}

/// A job whose file has a capability URL; gives the token, which is then used rightly and wrongly.
async fn a_file(stack: &Stack, secrets: &mut Secrets) -> Vec<(String, Reply)> {
    if tools::python("venv-runpod112").is_none() {
        return Vec::new();
    }
    let id = stack.api.run("files", &json!({"input": {"name": "a.txt", "text": "la la"}})).await;
    stack.api.wait_status("files", &id, "COMPLETED", LATER).await;
    let job = stack.api.job(&id).await;
    let url = job["artifacts"][0]["download_url"].as_str().unwrap_or_else(|| panic!("no link: {job}"));
    let path = url.strip_prefix(stack.api.base()).expect("a link of ours").to_owned();
    let token = path.rsplit('/').nth(1).expect("a token").to_owned();
    secrets.watch("capability token", &token);
    let anyone = Client::new(stack.api.base(), "");
    assert_eq!(anyone.get(&path).await.text, "la la");
    let mut all = Vec::new();
    for wrong in [path.replace(&id, "0"), format!("{path}/more"), path.replace("/artifacts/", "/artifact/")] {
        if wrong != path {
            all.push(("a wrong link".to_owned(), anyone.get(&wrong).await));
        }
    }
    all.push(("a link that is posted to".to_owned(), anyone.post(&path, &json!({"job_id": 7})).await));
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_shows_in_logs_errors_lists_metrics_and_traces() {
    let collector = Collector::start().await;
    let mut secrets = Secrets::default();
    // The receiver has to be known before the configuration is written: one of its own for the notices of files.
    let notices = ringback_test_support::receiver::Receiver::start("").await;
    let notice_url = secrets.url("the URL of notices", &notices.url(""), "/notice");
    let Some(mut stack) = Stack::apart(options(&collector, Some(&notice_url))).await else { return };
    for (what, text) in [
        ("API key", stack.api.key()),
        ("API key of another project", stack.other.key()),
        ("project's secret", stack.secret.trim_start_matches("whsec_")),
        ("broker's password", stack.nats.password()),
        ("database's password", "not-a-secret-on-loopback"),
    ] {
        secrets.watch(what, text);
    }

    // A webhook with a secret, another one, a header and a URL that are all secret.
    let url = secrets.url("the URL of a webhook", &stack.receiver.url(""), "/registered");
    let (secret, header) = (secrets.webhook("secret of a webhook"), secrets.new_one("header of a webhook"));
    let body = json!({"url": url, "events": ["*"], "secret": secret, "headers": {"x-token": header}});
    let made = stack.api.post("/v1/webhooks", &body).await.expect(201);
    let hook = made["id"].as_str().expect("an id").to_owned();
    let second = secrets.webhook("second secret of a webhook");
    stack.api.post(&format!("/v1/webhooks/{hook}/secrets"), &json!({"secret": second})).await.expect(201);
    let given = stack.api.post("/v1/callback-secrets", &json!({"label": "x"})).await;
    if let Some(text) = given.json["plain_secret"].as_str() {
        secrets.watch("callback secret", text.trim_start_matches("whsec_"));
    }

    // Jobs whose webhooks are taken, refused, redirected, not reachable, and spoken to in the wrong protocol.
    stack.receiver.answer("/refused", Mode::Status(500));
    stack.receiver.answer("/gone", Mode::Status(410));
    let elsewhere = secrets.url("a redirect", &stack.receiver.url(""), "/elsewhere");
    stack.receiver.answer("/moved", Mode::Redirect(elsewhere));
    let s3 = json!({"accessId": secrets.new_one("s3 id"), "accessSecret": secrets.new_one("s3 secret of a job"),
        "bucketName": "b", "endpointUrl": "https://s3.example.com"});
    let closed = format!("http://127.0.0.1:{}", ringback_test_support::files::free_port());
    let tls = stack.receiver.url("").replacen("http", "https", 1);
    let mut jobs = Vec::new();
    for (base, path) in [
        (stack.receiver.url(""), "/taken"),
        (stack.receiver.url(""), "/refused"),
        (stack.receiver.url(""), "/gone"),
        (stack.receiver.url(""), "/moved"),
        (closed, "/closed"),
        (tls, "/tls"),
    ] {
        let url = secrets.url(&format!("the webhook {path}"), &base, path);
        let body = json!({"input": {"n": 1}, "webhook": url, "webhookv2": url, "s3Config": s3});
        let id = stack.api.run("echo", &body).await;
        stack.api.wait_end("echo", &id, LATER).await;
        jobs.push(id);
    }
    let stopped = stack.api.run("sleep", &json!({"input": {"seconds": 600}, "s3Config": s3})).await;
    stack.api.wait_status("sleep", &stopped, "IN_PROGRESS", SOON).await;
    stack.api.post(&format!("/v2/sleep/cancel/{stopped}"), &json!({})).await.expect(200);
    stack.api.post(&format!("/v2/sleep/retry/{stopped}"), &json!({})).await;
    stack.api.post("/v2/sleep/purge-queue", &json!({})).await;
    let mut answers = mistakes(&stack, &mut secrets).await;
    answers.extend(a_file(&stack, &mut secrets).await);
    for (what, reply) in &answers {
        assert!(reply.status >= 400, "{what} was accepted: {} {}", reply.status, reply.text);
    }
    // Everybody loses the broker and the database for a while, and says so.
    stack.nats.stop();
    stack.nats.start_again().await;
    let postgres = stack.postgres.as_mut().expect("the cluster");
    postgres.crash();
    postgres.start_again().await;
    stack.kill9("dispatcher");
    stack.start_again("dispatcher").await;
    let replay = json!({"webhook": hook, "rate_per_second": 100});
    until("a replay to be made", LATER, || async {
        (stack.api.post("/v1/replays", &replay).await.status < 300).then_some(())
    })
    .await;
    let last = stack
        .api
        .submit_surely("echo", "last", &json!({"input": {}, "webhookv2": stack.receiver.url("/last")}), LATER)
        .await;
    stack.receiver.wait_for(&last, "COMPLETED", LATER).await;

    // What a person sees of all this who may read and no more.
    let reader = stack.reader();
    let mut paths: Vec<String> = [
        "/v1/jobs",
        "/v1/webhooks",
        "/v1/deliveries",
        "/v1/replays",
        "/v1/endpoints",
        "/v1/workers",
        "/v1/usage",
        "/v1/callback-secrets",
        "/v2/echo/requests",
    ]
    .map(str::to_owned)
    .to_vec();
    paths.extend([format!("/v1/webhooks/{hook}"), format!("/v1/webhooks/{hook}/secrets")]);
    for id in &jobs {
        paths.extend([
            format!("/v1/jobs/{id}"),
            format!("/v1/jobs/{id}/deliveries"),
            format!("/v2/echo/status/{id}"),
        ]);
        for delivery in stack.api.deliveries(id).await {
            let id = delivery["id"].as_str().expect("an id").to_owned();
            paths.extend([format!("/v1/deliveries/{id}"), format!("/v1/deliveries/{id}/attempts")]);
        }
    }
    for path in paths {
        let reply = reader.get(&path).await;
        let admins = path == "/v1/callback-secrets" || path.ends_with("/secrets");
        assert_eq!(reply.status, if admins { 403 } else { 200 }, "{path}: {}", reply.text);
        secrets.assert_not_in(&path, &reply.text);
    }
    for (what, reply) in &answers {
        secrets.assert_not_in(what, &reply.text);
        for (name, value) in &reply.headers {
            secrets.assert_not_in(&format!("{what}: {name}"), value.to_str().unwrap_or_default());
        }
    }
    for name in ["api", "tracker", "worker", "dispatcher", "reconciler"] {
        let metrics = stack.ops(name).get("/metrics").await;
        assert_eq!(metrics.status, 200, "{name}: {}", metrics.text);
        secrets.assert_not_in(&format!("/metrics of {name}"), &metrics.text);
        stack.terminate(name);
        let log = stack.log(name);
        assert!(log.contains("\"DEBUG\""), "{name} logs little");
        secrets.assert_not_in(&format!("the log of {name}"), &log);
    }
    // The ends of the processes have sent the last spans.
    assert!(collector.holds("webhook.post") && collector.holds("submit"), "no spans were exported");
    let taken = collector.taken();
    secrets.assert_not_in("an exported span", &String::from_utf8_lossy(&taken));
    assert!(jobs.iter().all(|id| String::from_utf8_lossy(&taken).contains(id.as_str())), "spans of all jobs");
    // Each of them was really in use.
    let used = stack.receiver.hits();
    for name in ["/registered", "/taken", "/refused"] {
        let hit = used.iter().find(|hit| hit.path.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
        assert!(hit.path.contains("?token=canary"), "{}", hit.path);
    }
    let told: &Value = &used.iter().find(|hit| hit.path.starts_with("/registered")).expect("told").json;
    assert!(told["type"].is_string(), "{told}");
    assert!(used.iter().any(|hit| hit.header("x-token") == header));
}
