//! Files of jobs through the whole of Ringback: both modes of the confirm handshake, links, crashes, drain, uploads.
//! The receiver is a Python program that knows nothing of Ringback.
#![allow(clippy::unwrap_used, reason = "a failed step of a test is its report")]

use http::Method;
use ringback_test_support::client::{Client, Reply};
use ringback_test_support::events::assert_events_fit;
use ringback_test_support::files::{Folder, free_port};
use ringback_test_support::process::{Process, Spec};
use ringback_test_support::stack::{Backend, Options, Role, Stack};
use ringback_test_support::tools;
use ringback_test_support::wait::until;
use ringback_tests::{LATER, SOON, handler};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The Python receiver, and the folder that it saves into.
struct FileReceiver {
    process: Process,
    folder: Folder,
    base: String,
}

impl FileReceiver {
    async fn start() -> Option<Self> {
        let python = tools::on_path("python3")?;
        let (folder, port) = (Folder::new("receiver"), free_port());
        let saved = folder.path().join("saved");
        std::fs::create_dir(&saved).unwrap();
        let spec = Spec::new("receiver", python, folder.path()).args([
            handler("file_receiver.py"),
            port.to_string(),
            saved.display().to_string(),
        ]);
        let process = Process::spawn(spec);
        until("the receiver to listen", SOON, || async {
            std::net::TcpStream::connect(("127.0.0.1", port)).ok()
        })
        .await;
        Some(Self { process, folder, base: format!("http://127.0.0.1:{port}") })
    }

    fn saved(&self, name: &str) -> PathBuf {
        self.folder.path().join("saved").join(name)
    }

    /// What it did, one JSON object per step.
    fn steps(&self, step: &str) -> Vec<Value> {
        let log = self.process.log();
        let all = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        all.filter(|s| s["step"] == step).collect()
    }
}

/// Where the handlers of a test work.
struct Handlers {
    folder: Folder,
    options: Options,
    python: String,
}

impl Handlers {
    fn new(backend: Backend) -> Option<Self> {
        let python = tools::python("venv-runpod112")?.display().to_string();
        let options = Options::new(backend).with("worker", "drain_grace_ms", "30000");
        Some(Self { folder: Folder::new("handlers"), options, python })
    }

    /// An endpoint of the handler that makes files, in a folder of its own.
    fn endpoint(&mut self, name: &str, more: &str) -> PathBuf {
        let cwd = self.folder.path().join(name);
        std::fs::create_dir(&cwd).unwrap();
        let (python, script) = (&self.python, handler("files.py"));
        let executor = format!(
            "{{ process = {{ command = [{python:?}, {script:?}], cwd = {cwd:?}, grace_ms = 1000 }} }}"
        );
        self.options.endpoint(name, &executor, more);
        cwd
    }
}

fn platform(receiver: &FileReceiver, query: &str, timeout_ms: u64) -> String {
    let url = format!("{}/hook?{query}", receiver.base);
    format!(
        "artifacts = {{ paths = true, base64 = true }}\n\
         confirm = {{ mode = \"platform\", receiver_url = {url:?}, timeout_ms = {timeout_ms} }}"
    )
}

async fn ended(stack: &Stack, endpoint: &str, input: Value) -> Value {
    let id = stack.api.run(endpoint, &json!({ "input": input })).await;
    stack.api.wait_end(endpoint, &id, LATER).await;
    stack.api.job(&id).await
}

/// A call without a key to a link of this installation.
async fn open(stack: &Stack, method: Method, link: &str, headers: &[(&str, &str)], body: &str) -> Reply {
    let path = link.strip_prefix(stack.api.base()).unwrap_or_else(|| panic!("another host: {link}"));
    let anyone = Client::new(stack.api.base(), "");
    anyone.send(method, path, headers, body.to_owned()).await.unwrap()
}

fn link(artifact: &Value) -> &str {
    artifact["download_url"].as_str().unwrap_or_else(|| panic!("no link: {artifact}"))
}

/// Rows B1 to B4 as a service of the platform, and everything that a link can do.
async fn platform_mode(backend: Backend) {
    let Some(receiver) = FileReceiver::start().await else { return };
    let Some(mut handlers) = Handlers::new(backend) else { return };
    let cwd = handlers.endpoint("speech", &platform(&receiver, "hash=1&wrong=1", 60_000));
    let Some(stack) = Stack::dev(handlers.options.clone()).await else { return };
    let hook =
        json!({"url": stack.receiver.url("/events"), "events": ["artifact.*"], "secret": stack.secret});
    stack.api.post("/v1/webhooks", &hook).await.expect(201);

    let began = Instant::now();
    let job = ended(&stack, "speech", json!({"name": "test.wav", "text": "la la"})).await;
    assert_eq!(job["status"], "COMPLETED", "{job}");
    // The wait lasts as long as the download, not as long as the time limit.
    assert!(began.elapsed() < Duration::from_secs(50), "{:?}", began.elapsed());
    let output = &job["output"];
    let file = &output["audio"];
    assert_eq!(file["sha256"], output["sha256"], "{output}");
    assert_eq!((&file["filename"], &file["size_bytes"]), (&json!("test.wav"), &json!(5)));
    assert_eq!(file["confirmed"], true);
    // The rest of the output is untouched, to the last digit.
    let raw = stack.api.get(&format!("/v1/jobs/{}/output", job["id"].as_str().unwrap())).await;
    assert!(raw.text.contains("12345678901234567890123"), "{}", raw.text);
    assert_eq!(std::fs::read_to_string(receiver.saved("test.wav")).unwrap(), "la la");
    assert!(!cwd.join("output/test.wav").exists(), "a file that became an artefact is removed");
    let told = receiver.steps("told").remove(0);
    assert_eq!(told["told"]["job_id"], job["id"]);
    assert_eq!(told["told"]["filename"], "test.wav");
    assert_eq!(told["signed"], true);
    assert_eq!(told["told"]["download_url"], file["url"]);
    // A wrong hash was refused and changed nothing; the right one was taken. The job may end before the receiver has
    // written down what it was answered.
    let confirmed =
        until("the receiver's note", SOON, || async { receiver.steps("confirmed").into_iter().next() }).await;
    assert_eq!((&receiver.steps("refused")[0]["status"], &confirmed["status"]), (&json!(409), &json!(200)));
    let artifact = &job["artifacts"][0];
    assert_eq!(
        (&artifact["state"], &artifact["confirmed"], &artifact["confirmed_in_time"]),
        (&json!("confirmed"), &json!(true), &json!(true))
    );

    links(&stack, &job, artifact).await;
    events(&stack, &job).await;
    saved_by_cli(&stack, &job);
    removed(&stack, artifact).await;
}

/// Downloads, ranges, wrong links, second confirmations.
async fn links(stack: &Stack, job: &Value, artifact: &Value) {
    let url = link(artifact);
    let got = open(stack, Method::GET, url, &[], "").await;
    assert_eq!((got.status, got.text.as_str()), (200, "la la"));
    let header = |reply: &Reply, name: &str| reply.headers[name].to_str().unwrap().to_owned();
    assert!(header(&got, "content-disposition").starts_with("attachment; filename=\"test.wav\""));
    assert_eq!(header(&got, "x-content-type-options"), "nosniff");
    assert!(header(&got, "content-security-policy").contains("sandbox"));
    assert_eq!(header(&got, "etag"), format!("\"{}\"", artifact["sha256"].as_str().unwrap()));
    let part = open(stack, Method::GET, url, &[("range", "bytes=3-")], "").await;
    assert_eq!((part.status, part.text.as_str()), (206, "la"));
    assert_eq!(header(&part, "content-range"), "bytes 3-4/5");
    assert_eq!(open(stack, Method::GET, url, &[("range", "bytes=9-")], "").await.status, 416);
    let etag = header(&got, "etag");
    assert_eq!(open(stack, Method::GET, url, &[("if-none-match", &etag)], "").await.status, 304);
    let head = open(stack, Method::HEAD, url, &[], "").await;
    assert_eq!((head.status, header(&head, "content-length").as_str(), head.text.as_str()), (200, "5", ""));

    // Whoever guesses learns nothing: a wrong token and an unknown artefact are answered alike.
    let (id, token) = (artifact["id"].as_str().unwrap(), url.rsplit('/').nth(1).unwrap());
    let wrong = open(stack, Method::GET, &url.replace(token, &"A".repeat(32)), &[], "").await;
    let digit = if id.as_bytes()[34] == b'0' { "1" } else { "0" };
    let other = format!("{}{digit}{}", &id[..34], &id[35..]);
    let unknown = open(stack, Method::GET, &url.replace(id, &other), &[], "").await;
    let strange = open(stack, Method::GET, &url.replace(id, "x"), &[], "").await;
    assert_eq!((wrong.status, unknown.status, strange.status), (404, 404, 404));
    assert_eq!((&wrong.text, &unknown.text), (&unknown.text, &strange.text));

    let confirm = artifact["confirmation_url"].as_str().unwrap();
    let body = |status: &str| json!({"job_id": job["id"], "status": status, "timestamp": 1}).to_string();
    let again = open(stack, Method::POST, confirm, &[], &body("downloaded")).await.expect(200);
    assert_eq!((&again["success"], &again["acknowledged"]), (&json!(true), &json!(true)));
    let refused = open(stack, Method::POST, confirm, &[], &body("eaten")).await.expect(400);
    assert_eq!(refused["errors"][0]["pointer"], "/status");
    let foreign = json!({"job_id": "0", "status": "downloaded"}).to_string();
    assert_eq!(open(stack, Method::POST, confirm, &[], &foreign).await.status, 400);
    let wrong =
        open(stack, Method::POST, &confirm.replace(token, &"A".repeat(32)), &[], &body("downloaded")).await;
    assert_eq!(wrong.status, 404);

    // Another project's key sees nothing.
    assert_eq!(stack.other.get(&format!("/v1/artifacts/{id}")).await.status, 404);
    assert_eq!(stack.other.get(&format!("/v1/artifacts/{id}/content")).await.status, 404);
    assert_eq!(stack.api.get(&format!("/v1/artifacts/{id}/content")).await.text, "la la");
    let listed =
        stack.api.get(&format!("/v1/jobs/{}/artifacts", job["id"].as_str().unwrap())).await.expect(200);
    assert_eq!(listed["artifacts"][0], stack.api.get(&format!("/v1/artifacts/{id}")).await.expect(200));
}

/// Registered webhooks hear of the file.
async fn events(stack: &Stack, job: &Value) {
    for kind in ["artifact.ready", "artifact.confirmed"] {
        let hit = until(kind, LATER, || async {
            let hits = stack.receiver.hits();
            hits.into_iter().find(|h| h.path == "/events" && h.json["type"] == kind)
        })
        .await;
        assert_eq!(hit.signature, Ok(()), "{kind}");
        assert_eq!(hit.json["data"]["job_id"], job["id"], "{}", hit.json);
        assert_eq!(hit.json["data"]["sha256"], job["artifacts"][0]["sha256"]);
        if kind == "artifact.ready" {
            assert_eq!(hit.json["data"]["download_url"], job["artifacts"][0]["download_url"]);
        }
    }
    assert_events_fit(stack).await;
}

fn saved_by_cli(stack: &Stack, job: &Value) {
    let folder = stack.folder().join("by-cli");
    let args = ["get", job["id"].as_str().unwrap(), "--save", folder.to_str().unwrap()];
    let output = stack.cli(args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read_to_string(folder.join("test.wav")).unwrap(), "la la");
}

async fn removed(stack: &Stack, artifact: &Value) {
    let path = format!("/v1/artifacts/{}", artifact["id"].as_str().unwrap());
    for _ in 0..2 {
        assert_eq!(stack.api.call(Method::DELETE, &path, None).await.status, 204);
    }
    assert_eq!(open(stack, Method::GET, link(artifact), &[], "").await.status, 410);
    assert_eq!(stack.api.get(&path).await.expect(200)["state"], "expired");
    until("the blob to go", LATER, || async {
        let left = stack.sql().await.count("SELECT count(*) FROM artifacts WHERE blob_key IS NOT NULL").await;
        (left == 0).then_some(())
    })
    .await;
    let blobs = stack.folder().join("blobs/art");
    assert_eq!(files_below(&blobs), 0, "the bytes are gone");
}

fn files_below(folder: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries
        .map(|entry| entry.unwrap().path())
        .map(|path| if path.is_dir() { files_below(&path) } else { 1 })
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn platform_mode_on_sqlite() {
    platform_mode(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn platform_mode_on_postgres() {
    platform_mode(Backend::Postgres).await;
}

/// A job's own word on the handshake: it may do without, ask where the endpoint waits only for those that ask, and wait
/// shorter, never longer. Whom it is told to stays the endpoint's to say.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_has_a_word_on_its_confirmation() {
    let Some(receiver) = FileReceiver::start().await else { return };
    let Some(mut handlers) = Handlers::new(Backend::Sqlite) else { return };
    // Its receiver never confirms: only a wait that is cut short ends within this test.
    let deaf = platform(&receiver, "confirm=no", 600_000);
    handlers.endpoint("deaf", &deaf);
    handlers.endpoint("asked", &platform(&receiver, "", 600_000).replace("platform", "on_request"));
    handlers.endpoint("plain", "artifacts = { paths = true }");
    let Some(stack) = Stack::dev(handlers.options.clone()).await else { return };
    let input = json!({"name": "a.wav", "text": "x"});
    let ended = async |endpoint: &str, wish: Value| {
        let body = json!({"input": input, "artifact_confirm": wish});
        let id = stack.api.run(endpoint, &body).await;
        stack.api.wait_end(endpoint, &id, LATER).await;
        let job = stack.api.job(&id).await;
        (job["output"]["audio"]["confirmed"].clone(), job["artifacts"][0]["state"].clone())
    };
    let told = || receiver.steps("told").len();
    assert_eq!(ended("deaf", json!(false)).await, (Value::Null, json!("ready")), "no wait");
    assert_eq!(told(), 0, "and nobody is told");
    let shorter = json!({"timeout_ms": 1_200});
    assert_eq!(ended("deaf", shorter).await, (json!(false), json!("unconfirmed")));
    assert_eq!(ended("asked", json!(true)).await, (json!(true), json!("confirmed")));
    let so_far = told();
    let job = self::ended(&stack, "asked", input.clone()).await;
    assert_eq!((&job["status"], &job["artifacts"][0]["state"]), (&json!("COMPLETED"), &json!("ready")));
    assert_eq!(told(), so_far, "who does not ask is not waited for");
    for (endpoint, wish, wanted) in [
        ("plain", json!(true), "does not offer"),
        ("deaf", json!({"timeout_ms": 600_001}), "between 100 and 600000"),
        ("deaf", json!({"receiver_url": "https://x.example"}), "must be true, false or"),
        ("deaf", json!({"timeout_ms": "1"}), "artifact_confirm.timeout_ms"),
    ] {
        let body = json!({"input": 1, "artifact_confirm": wish});
        let reply = stack.api.post(&format!("/v2/{endpoint}/run"), &body).await;
        assert!(reply.status == 400 && reply.text.contains(wanted), "{body}: {}", reply.text);
    }
}

/// Row B4: nobody confirms, the job ends and says so; a late confirmation is still taken. Other shapes of files, and
/// texts that only look like files.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_confirmed_and_what_is_no_file() {
    let Some(receiver) = FileReceiver::start().await else { return };
    let Some(mut handlers) = Handlers::new(Backend::Sqlite) else { return };
    handlers.endpoint("deaf", &platform(&receiver, "confirm=no", 1_500));
    let cwd = handlers.endpoint("plain", "artifacts = { paths = true, base64 = true }\nslots = 2");
    handlers.endpoint("off", "");
    handlers.endpoint("brief", "artifacts = { paths = true, keep_ms = 1000 }");
    handlers.endpoint("small", "artifacts = { paths = true, max_bytes = 4 }");
    handlers.options.set("reconciler", "artifacts_interval_ms", "200");
    let Some(stack) = Stack::dev(handlers.options.clone()).await else { return };

    let job = ended(&stack, "deaf", json!({"name": "a.wav", "text": "x"})).await;
    assert_eq!((&job["status"], &job["output"]["audio"]["confirmed"]), (&json!("COMPLETED"), &json!(false)));
    let artifact = &job["artifacts"][0];
    assert_eq!((&artifact["state"], &artifact["confirmed"]), (&json!("unconfirmed"), &json!(false)));
    assert!(stack.log("dev").contains("without its receiver's confirmation"));
    let metrics = stack.api.get("/metrics").await.text;
    assert!(
        metrics.contains("ringback_worker_confirmations_total{") && metrics.contains("end=\"unconfirmed\"")
    );
    let late = json!({"job_id": job["id"], "status": "downloaded"}).to_string();
    let confirm = artifact["confirmation_url"].as_str().unwrap();
    assert_eq!(open(&stack, Method::POST, confirm, &[], &late).await.status, 200);
    let late =
        stack.api.get(&format!("/v1/artifacts/{}", artifact["id"].as_str().unwrap())).await.expect(200);
    assert_eq!((&late["confirmed"], &late["confirmed_in_time"]), (&json!(true), &json!(false)));

    // Off by default: the output is what the handler gave.
    let job = ended(&stack, "off", json!({"mode": "base64", "text": "x"})).await;
    assert_eq!((&job["output"]["audio_base64"], &job["artifacts"]), (&json!("eA=="), &json!([])));
    let job = ended(&stack, "plain", json!({"mode": "base64", "text": "x"})).await;
    let output = &job["output"];
    assert_eq!(output["audio_base64"]["filename"], "speech.wav", "{output}");
    assert_eq!(output["nested"]["picture"]["content_type"], "image/png");
    assert_eq!(
        (&output["images"][0]["type"], &output["images"][0]["filename"]),
        (&json!("s3_url"), &json!("a.png"))
    );
    let by_link = open(&stack, Method::GET, output["images"][0]["data"].as_str().unwrap(), &[], "").await;
    assert_eq!(by_link.text, "x");
    assert_eq!(job["artifacts"].as_array().unwrap().len(), 3);
    // No one is asked, so nothing is known.
    assert_eq!(job["artifacts"][0]["confirmed"], Value::Null);

    // Names with folders, absolute names; a file of two children that share one output folder.
    let job = ended(&stack, "plain", json!({"name": "b.wav", "text": "abs", "absolute": true})).await;
    assert_eq!(job["output"]["audio"]["size_bytes"], 3, "{job}");
    std::fs::write(cwd.join("handler_secret.txt"), "secret").unwrap();
    std::fs::write(cwd.join("output/old.txt"), "of another job").unwrap();
    // The clock that counts is the one of the inode: nothing here may be called young by waiting too little.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let texts = json!([
        "../handler_secret.txt",
        "output/../handler_secret.txt",
        "handler_secret.txt",
        "output/link.txt",
        "/etc/passwd",
        "output/old.txt",
        "output",
        "output/none.txt",
        "..",
        ""
    ]);
    let job = ended(&stack, "plain", json!({"mode": "texts", "texts": texts})).await;
    assert_eq!((&job["output"]["texts"], &job["artifacts"]), (&texts, &json!([])));

    let job = ended(&stack, "small", json!({"name": "c.wav", "text": "12345"})).await;
    assert_eq!(job["status"], "FAILED");
    assert!(job["error"].as_str().unwrap().contains("artifacts.max_bytes"), "{job}");
    assert_eq!(job["error_type"], "ArtifactTooLarge");

    let job = ended(&stack, "brief", json!({"name": "d.wav", "text": "x"})).await;
    let url = link(&job["artifacts"][0]).to_owned();
    until("the artefact to expire", LATER, || async {
        (open(&stack, Method::GET, &url, &[], "").await.status == 410).then_some(())
    })
    .await;
}

/// Row B3 for handlers that do it themselves: the variables, the routes and the port that they expect.
#[tokio::test(flavor = "multi_thread")]
async fn handler_mode() {
    let Some(receiver) = FileReceiver::start().await else { return };
    let Some(mut handlers) = Handlers::new(Backend::Sqlite) else { return };
    let port = free_port();
    let more = format!(
        "confirm = {{ mode = \"handler\", receiver_url = \"{}/hook?slow=0.5\", timeout_ms = 60000, listen = \"127.0.0.1:{port}\" }}",
        receiver.base
    );
    let cwd = handlers.endpoint("own", &more);
    let Some(stack) = Stack::dev(handlers.options.clone()).await else { return };
    let job = ended(&stack, "own", json!({"mode": "self", "name": "test.wav", "text": "sung"})).await;
    assert_eq!(job["status"], "COMPLETED", "{job}");
    let output = &job["output"];
    assert_eq!(output["confirmed"], true, "{output}");
    assert_eq!(output["told"]["audioUrl"], "/audio-outputs/test.wav");
    assert!(output["waited"].as_f64().unwrap() < 50.0, "{output}");
    assert_eq!(std::fs::read_to_string(receiver.saved("test.wav")).unwrap(), "sung");
    assert!(stack.log("dev").contains("the receiver confirmed the download"));

    let own = Client::new(&format!("http://127.0.0.1:{port}"), "");
    std::fs::write(cwd.join("private.txt"), "secret").unwrap();
    for bad in ["..%2Fprivate.txt", "%2e%2e%2fprivate.txt", "%2Fetc%2Fpasswd", "missing", ".hidden", "a%00b"]
    {
        assert_eq!(own.get(&format!("/output/{bad}")).await.status, 404, "{bad}");
    }
    let id = job["id"].as_str().unwrap();
    let got = own.get("/output/test.wav").await;
    assert_eq!(
        (got.text.as_str(), got.headers["x-content-type-options"].to_str().unwrap()),
        ("sung", "nosniff")
    );
    assert_eq!(own.get(&format!("/check-download/{id}")).await.field("status"), "confirmed");
    assert_eq!(own.get("/check-download/another").await.field("status"), "pending");
    let wrong =
        own.post(&format!("/confirm-download/{id}"), &json!({"job_id": "x", "status": "downloaded"})).await;
    assert_eq!(wrong.status, 400);
}

/// Row B1: a receiver that answers later than the time limit of the notice is told once, for it may be downloading; once
/// it has confirmed, nothing is owed to it any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_receiver_is_told_once() {
    let Some(receiver) = FileReceiver::start().await else { return };
    let Some(mut handlers) = Handlers::new(Backend::Sqlite) else { return };
    handlers.endpoint("speech", &platform(&receiver, "late=8", 15_000));
    let Some(stack) = Stack::dev(handlers.options.clone()).await else { return };
    let job = ended(&stack, "speech", json!({"name": "a.wav", "text": "x"})).await;
    assert_eq!(job["output"]["audio"]["confirmed"], true, "{job}");
    // Its answer came too late for the POST, and the file was confirmed all the same.
    until("the notice to be settled", LATER, || async {
        let sql = stack.sql().await;
        let settled = "SELECT count(*) FROM deliveries WHERE format = 8 AND state = 1 AND attempts = 2";
        (sql.count(settled).await == 1).then_some(())
    })
    .await;
    assert_eq!(receiver.steps("told").len(), 1);
}

/// Row E5: inputs are there before the handler starts, outputs go where the client says.
#[tokio::test(flavor = "multi_thread")]
async fn downloads_and_uploads() {
    let Some(receiver) = FileReceiver::start().await else { return };
    let Some(mut handlers) = Handlers::new(Backend::Sqlite) else { return };
    handlers.endpoint("comfy", "artifacts = { comfyui = true }");
    let Some(stack) = Stack::dev(handlers.options.clone()).await else { return };
    std::fs::write(receiver.saved("pose.png"), "a pose").unwrap();
    let store = |name: &str| format!("{}/store/{name}?signature=secret", receiver.base);
    let input = json!({
        "workflow": {"1": {}},
        "download_urls": [store("pose.png"), {"url": store("pose.png"), "filename": "../other.png"}],
        "upload_urls": [store("up-1.png"), store("up-2.png")],
        "mode": "images", "names": ["one.png", "two.png", "three.png"], "expects": ["pose.png", "other.png"],
    });
    let job = ended(&stack, "comfy", input).await;
    assert_eq!(job["status"], "COMPLETED", "{job}");
    let images = &job["output"]["images"];
    let up = |name: &str, to: &str| json!({"filename": name, "type": "uploaded", "url": format!("{}/store/{to}", receiver.base)});
    assert_eq!((&images[0], &images[1]), (&up("one.png", "up-1.png"), &up("two.png", "up-2.png")));
    assert_eq!(std::fs::read_to_string(receiver.saved("up-1.png")).unwrap(), "one.png");
    // What has no place of its own is an artefact.
    assert_eq!(images[2]["filename"], "three.png", "{images}");
    assert_eq!(job["artifacts"].as_array().unwrap().len(), 1);
    assert!(!job["output"].to_string().contains("signature"), "{}", job["output"]);

    let job =
        ended(&stack, "comfy", json!({"mode": "images", "names": [], "download_urls": [store("none")]}))
            .await;
    assert_eq!((&job["status"], &job["error_type"]), (&json!("FAILED"), &json!("DownloadFailed")));
    assert!(!job["error"].as_str().unwrap().contains("secret"), "{job}");
    let job =
        ended(&stack, "comfy", json!({"download_urls": ["http://169.254.169.254/latest"], "mode": "images"}))
            .await;
    assert_eq!(job["error_type"], "DownloadFailed", "{job}");
}

/// The worker dies between storing and telling, between telling and the outcome: the job runs again, has one end, and
/// the links of the lost attempt still lead somewhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_with_files_in_hand() {
    for point in ["worker.artifact.stored@1", "worker.artifact.ready@1", "worker.outcome.before@1"] {
        let Some(receiver) = FileReceiver::start().await else { return };
        let Some(mut handlers) = Handlers::new(Backend::Sqlite) else { return };
        handlers.endpoint("speech", &platform(&receiver, "", 20_000));
        let Some(mut stack) = Stack::prepare(handlers.options.clone()).await else { return };
        stack.migrate();
        for role in [Role::Tracker, Role::Dispatcher, Role::Reconciler, Role::Api] {
            stack.start(role).await;
        }
        stack.spawn(Role::Worker, "worker", Some(point));
        let id = stack.api.run("speech", &json!({"input": {"name": "a.wav", "text": "again"}})).await;
        stack.wait_dead("worker", LATER).await;
        stack.start_again("worker").await;
        stack.api.wait_status("speech", &id, "COMPLETED", LATER).await;
        let job = stack.api.job(&id).await;
        assert_eq!(job["output"]["audio"]["confirmed"], true, "{point}: {job}");
        let all = stack.api.get(&format!("/v1/jobs/{id}/artifacts")).await.expect(200);
        let all = all["artifacts"].as_array().unwrap();
        assert!(all.iter().any(|a| a["download_url"] == job["output"]["audio"]["url"]), "{point}");
        for artifact in all {
            assert_eq!(open(&stack, Method::GET, link(artifact), &[], "").await.text, "again", "{point}");
        }
        assert_eq!(all.len(), if point.contains("stored") { 1 } else { 2 }, "{point}");
    }
}

/// Row B4: a worker that is told to end waits for downloads in flight.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_waits_for_the_download() {
    let Some(receiver) = FileReceiver::start().await else { return };
    let Some(mut handlers) = Handlers::new(Backend::Sqlite) else { return };
    handlers.endpoint("speech", &platform(&receiver, "slow=3", 60_000));
    let Some(mut stack) = Stack::apart(handlers.options.clone()).await else { return };
    let id = stack.api.run("speech", &json!({"input": {"name": "a.wav", "text": "x"}})).await;
    until("the receiver to be told", LATER, || async { receiver.steps("told").first().cloned() }).await;
    let status = stack.terminate("worker");
    assert!(status.success(), "{status}");
    stack.api.wait_status("speech", &id, "COMPLETED", LATER).await;
    let job = stack.api.job(&id).await;
    assert_eq!(
        (&job["artifacts"][0]["confirmed"], &job["artifacts"][0]["attempt"]),
        (&json!(true), &json!(1)),
        "{job}"
    );
}

/// A job that waits for its receiver can be cancelled; a drain whose time is over lets the others end without a word.
#[tokio::test(flavor = "multi_thread")]
async fn a_wait_ends_by_cancel_and_by_the_end_of_a_drain() {
    let Some(receiver) = FileReceiver::start().await else { return };
    let Some(mut handlers) = Handlers::new(Backend::Sqlite) else { return };
    handlers.endpoint("deaf", &platform(&receiver, "confirm=no", 600_000));
    handlers.options.set("worker", "drain_grace_ms", "1000");
    let Some(mut stack) = Stack::apart(handlers.options.clone()).await else { return };
    let told = async |n: usize| {
        until("the receiver to be told", LATER, || async {
            (receiver.steps("told").len() == n).then_some(())
        })
        .await;
    };
    let run = async |stack: &Stack, name: &str| {
        stack.api.run("deaf", &json!({"input": {"name": name, "text": "x"}})).await
    };
    // One slot, and both wait: the handler is done, so its slot is free.
    let (first, second) = (run(&stack, "a.wav").await, run(&stack, "b.wav").await);
    told(2).await;
    stack.api.post(&format!("/v1/jobs/{first}/cancel"), &json!({})).await.expect(200);
    stack.api.wait_status("deaf", &first, "CANCELLED", SOON).await;
    until("the worker to let go of it", SOON, || async {
        let live = stack.ops("worker").get("/metrics").await.text;
        live.lines()
            .any(|l| l.starts_with("ringback_worker_attempts_live") && l.ends_with(" 1"))
            .then_some(())
    })
    .await;
    assert!(stack.terminate("worker").success());
    let job = stack.api.wait_status("deaf", &second, "COMPLETED", SOON).await;
    assert_eq!(job["output"]["audio"]["confirmed"], false, "{job}");
}

/// A large file passes worker, API and receiver without passing through memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_file_takes_no_memory() {
    const MIB: u64 = 300;
    let Some(mut handlers) = Handlers::new(Backend::Sqlite) else { return };
    handlers.endpoint("speech", "artifacts = { paths = true }");
    let Some(mut stack) = Stack::apart(handlers.options.clone()).await else { return };
    let peaks = |stack: &mut Stack| ["worker", "api"].map(|name| peak_kib(stack.process(name).pid()));
    let before = peaks(&mut stack);
    let job = ended(&stack, "speech", json!({"mode": "big", "name": "big.wav", "mib": MIB})).await;
    assert_eq!(job["output"]["audio"]["size_bytes"], MIB << 20, "{job}");
    let folder = stack.folder().join("big");
    let args = ["get", job["id"].as_str().unwrap(), "--save", folder.to_str().unwrap()];
    let output = stack.cli(args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::metadata(folder.join("big.wav")).unwrap().len(), MIB << 20);
    for (name, (before, after)) in
        ["worker", "api"].into_iter().zip(before.into_iter().zip(peaks(&mut stack)))
    {
        let grown_mib = after.saturating_sub(before) / 1024;
        println!("{name}: peak memory grew by {grown_mib} MiB for a file of {MIB} MiB");
        assert!(grown_mib < 100, "{name} grew by {grown_mib} MiB");
    }
}

fn peak_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
