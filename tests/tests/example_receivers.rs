//! The receivers of examples/, installed and started by the commands of their README, against a running Ringback.

use http::Method;
use ringback_test_support::client::{Client, Reply};
use ringback_test_support::receiver::Hit;
use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::{signature, tools};
use ringback_tests::receivers::Running;
use ringback_tests::{LATER, SOON, handler};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// What a receiver is to show.
struct Expected {
    name: &'static str,
    port: u16,
    path: &'static str,
    answer: Value,
    /// The file that a job leaves below its data folder.
    file: fn(&str) -> String,
}

/// A delivery of a real job, as it was sent.
async fn captured(stack: &Stack, input: &Value) -> Hit {
    let body = json!({"input": input, "webhook": stack.receiver.url("/captured")});
    let id = stack.api.run("echo", &body).await;
    stack.receiver.wait_for(&id, "COMPLETED", LATER).await
}

/// Posts a captured delivery; `change` may alter its headers and body.
async fn post(
    running: &Running,
    path: &str,
    hit: &Hit,
    change: impl FnOnce(&mut Vec<(String, String)>, &mut Vec<u8>),
) -> Reply {
    let names = ["content-type", "webhook-id", "webhook-timestamp", "webhook-signature"];
    let mut headers: Vec<(String, String)> =
        names.iter().map(|name| ((*name).to_owned(), hit.header(name).to_owned())).collect();
    let mut body = hit.body.to_vec();
    change(&mut headers, &mut body);
    let headers: Vec<(&str, &str)> = headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    Client::new(&running.base, "").send(Method::POST, path, &headers, body).await.expect("an answer")
}

async fn drive(expected: &Expected) {
    let Some(stack) = Stack::dev(Options::new(Backend::Sqlite)).await else { return };
    // The secret of the past beside the one of today: both are live.
    let secrets = format!("{} {}", signature::new_secret(), stack.secret);
    let Some(mut running) =
        Running::example(expected.name, expected.port, &[("WEBHOOK_SECRET", &secrets)]).await
    else {
        return;
    };

    // The documented command.
    let id = running.send_documented_job(&stack);
    assert_eq!(running.wait_step("worked", &id).await["status"], "COMPLETED");
    stack.api.wait_settled(&id, SOON).await;
    assert!(running.data(&(expected.file)(&id)).is_file(), "{}", (expected.file)(&id));
    assert_eq!(running.steps_of("worked", &id).len(), 1);

    // Copies of one delivery are one event, each answered fast and alike.
    let hit = captured(&stack, &json!({"audio_base64": "UklGRg=="})).await;
    for _ in 0..3 {
        let begun = Instant::now();
        let reply = post(&running, expected.path, &hit, |_, _| ()).await;
        assert_eq!((reply.status, &reply.json), (200, &expected.answer), "{}", reply.text);
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }
    running.wait_step("worked", hit.job()).await;
    assert_eq!(running.steps("duplicate").len(), 2);

    // What is not ours is refused, whatever is wrong with it.
    let set = |name: &'static str, value: String| {
        move |headers: &mut Vec<(String, String)>, _: &mut Vec<u8>| {
            headers.retain(|(n, _)| n != name);
            headers.push((name.to_owned(), value));
        }
    };
    let old = hit.header("webhook-timestamp").parse::<i64>().expect("seconds") - 301;
    let answers = [
        post(&running, expected.path, &hit, |_, body| body.push(b' ')).await,
        post(&running, expected.path, &hit, set("webhook-timestamp", old.to_string())).await,
        post(&running, expected.path, &hit, set("webhook-id", "msg_other".to_owned())).await,
        post(&running, expected.path, &hit, set("webhook-signature", "v1,AAAA".to_owned())).await,
        post(&running, expected.path, &hit, set("webhook-signature", "nonsense".to_owned())).await,
        post(&running, expected.path, &hit, |headers, _| headers.truncate(1)).await,
    ];
    assert_eq!(answers.each_ref().map(|reply| reply.status), [401; 6], "{answers:?}");

    // Answered, then killed: the work is done at the next start.
    let hit = captured(&stack, &json!({"audio_base64": "UklGRg=="})).await;
    assert_eq!(post(&running, expected.path, &hit, |_, _| ()).await.status, 200);
    running.crash().await;
    running.wait_step("worked", hit.job()).await;
    assert!(running.data(&(expected.file)(hit.job())).is_file());
    assert_eq!(post(&running, expected.path, &hit, |_, _| ()).await.json, expected.answer);

    // Away while the job ends: Ringback comes again.
    running.process.kill9();
    let body = json!({"input": {"audio_base64": "UklGRg=="}, "webhook": running.url(expected.path)});
    let id = stack.api.run("echo", &body).await;
    stack.api.wait_status("echo", &id, "COMPLETED", SOON).await;
    running.start_again().await;
    running.wait_step("worked", &id).await;
    assert_eq!(running.steps_of("worked", &id).len(), 1);
    assert_eq!(running.steps_of("worked", hit.job()).len(), 1, "a settled event is not worked off again");
}

#[tokio::test(flavor = "multi_thread")]
async fn fastapi() {
    drive(&Expected {
        name: "receiver-fastapi",
        port: 8000,
        path: "/api/tts/callback",
        answer: json!({"acknowledged": true}),
        file: |job| format!("{job}.wav"),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn express() {
    drive(&Expected {
        name: "receiver-express",
        port: 3001,
        path: "/webhooks/ringback",
        answer: json!({"received": true}),
        file: |job| format!("results/{job}.json"),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn axum() {
    drive(&Expected {
        name: "receiver-axum",
        port: 3002,
        path: "/webhooks/ringback",
        answer: json!({"received": true}),
        file: |job| format!("results/{job}.json"),
    })
    .await;
}

/// Rows B1 to B5: a handler writes a file, the job waits until the route has it.
#[tokio::test(flavor = "multi_thread")]
async fn nextjs() {
    let Some(python) = tools::python("venv-runpod112") else { return };
    let secret = signature::new_secret();
    let Some(mut running) = Running::example("receiver-nextjs", 3000, &[("WEBHOOK_SECRET", &secret)]).await
    else {
        return;
    };
    let folder = ringback_test_support::files::Folder::new("handler");
    let mut options = Options::new(Backend::Sqlite);
    let (python, script, cwd) = (python.display().to_string(), handler("files.py"), folder.path());
    let executor =
        format!("{{ process = {{ command = [{python:?}, {script:?}], cwd = {cwd:?}, grace_ms = 1000 }} }}");
    options.endpoint("speech", &executor, &running.documented_settings("Let an endpoint"));
    let Some(mut stack) = Stack::prepare(options).await else { return };
    stack.secret.clone_from(&secret);
    stack.start(ringback_test_support::stack::Role::Dev).await;

    let wav = |name: &str, text: &str| json!({"input": {"name": name, "text": text}});
    let id = stack.api.run("speech", &wav("test.wav", "RIFF la la")).await;
    let job = stack.api.wait_status("speech", &id, "COMPLETED", LATER).await;
    assert_eq!(job["output"]["audio"]["confirmed"], true, "{job}");
    assert_eq!(std::fs::read(running.data("audio-outputs/test.wav")).expect("the file"), b"RIFF la la");
    assert_eq!(running.steps_of("received", &id)[0]["signed"], true);
    assert_eq!(running.steps_of("confirmed", &id)[0]["status"], 200);
    let page = Client::new(&running.base, "");
    assert_eq!(page.get("/audio-outputs/test.wav").await.text, "RIFF la la");
    for outside in
        ["/audio-outputs/..%2Frecords", "/audio-outputs/%2Fetc%2Fpasswd", "/audio-outputs/none.wav"]
    {
        assert_eq!(page.get(outside).await.status, 404, "{outside}");
    }

    // The same bytes to the test's own receiver, to send them again and altered.
    let hit = {
        let artifacts = stack.api.get(&format!("/v1/jobs/{id}/artifacts")).await.expect(200);
        let artifact = &artifacts["artifacts"][0];
        json!({"job_id": id, "download_url": artifact["download_url"],
            "confirmation_url": artifact["confirmation_url"], "filename": "../../escaped.wav"})
    };
    let unsigned = page.post("/api/audio-ready", &hit).await;
    assert_eq!((unsigned.status, &unsigned.json["success"]), (401, &json!(false)));
    let sign = signed(&secret, &hit.to_string());
    let headers: Vec<(&str, &str)> = sign.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    let send = |body: String| page.send(Method::POST, "/api/audio-ready", &headers, body);
    let answers = futures::future::join_all((0..3).map(|_| send(hit.to_string()))).await;
    for answer in answers {
        let expected = json!({"success": true, "job_id": id, "audioUrl": "/audio-outputs/escaped.wav"});
        assert_eq!(answer.expect("an answer").expect(200), expected);
    }
    assert_eq!(running.steps_of("downloaded", &id).len(), 2, "one for each webhook-id");
    assert!(running.data("audio-outputs/escaped.wav").is_file(), "names do not lead out of the folder");
    assert_eq!(send(hit.to_string().replace("escaped", "altered")).await.expect("an answer").status, 401);

    // After kill -9 what was confirmed is known.
    running.crash().await;
    assert_eq!(send(hit.to_string()).await.expect("an answer").status, 200);
    assert_eq!(running.steps_of("downloaded", &id).len(), 2);
    running.process.kill9();
    // Away: the job waits for its time, then for nobody; here it comes back in time.
    let id = stack.api.run("speech", &wav("late.wav", "RIFF")).await;
    stack.api.wait_status("speech", &id, "IN_PROGRESS", LATER).await;
    running.start_again().await;
    let job = stack.api.wait_status("speech", &id, "COMPLETED", LATER).await;
    assert_eq!(std::fs::read(running.data("audio-outputs/late.wav")).unwrap_or_default(), b"RIFF", "{job}");
}

/// The three headers that a sender with this secret makes for a body now.
fn signed(secret: &str, body: &str) -> Vec<(String, String)> {
    let timestamp = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("after 1970")
        .as_secs()
        .to_string();
    let signature = signature::sign(secret, "msg_again", &timestamp, body.as_bytes());
    [
        ("content-type", "application/json".to_owned()),
        ("webhook-id", "msg_again".to_owned()),
        ("webhook-timestamp", timestamp),
        ("webhook-signature", signature),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}
