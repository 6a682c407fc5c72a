//! Receivers written as the documents of the mission say, by people who have not heard of Ringback: each works
//! unchanged. Their sources are in tests/receivers/ and examples/receiver-nextjs/.

use http::Method;
use ringback_test_support::client::Client;
use ringback_test_support::files::{Folder, free_port};
use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::wait::until;
use ringback_test_support::{signature, tools};
use ringback_tests::receivers::{Running, installed};
use ringback_tests::{LATER, SOON, handler};
use serde_json::{Value, json};

/// A receiver of tests/receivers in Python, with FastAPI.
async fn python(script: &str, env: &[(&str, &str)]) -> Option<Running> {
    let program = installed("receiver-fastapi")?.join(".venv/bin/python");
    let path = tools::root().join("tests/receivers").join(script).display().to_string();
    Some(Running::program(&program, &[path], env).await)
}

/// A receiver of tests/receivers in JavaScript, with Express.
async fn node(script: &str, env: &[(&str, &str)]) -> Option<Running> {
    let program = tools::need(tools::on_path("node"), "node", "install Node.js 18 or newer")?;
    let modules = installed("receiver-express")?.join("node_modules").display().to_string();
    let path = tools::root().join("tests/receivers").join(script).display().to_string();
    let env = [env, &[("NODE_PATH", modules.as_str())]].concat();
    Some(Running::program(&program, &[path], &env).await)
}

fn no_violation(running: &Running) {
    let found = running.steps("violation");
    assert!(found.is_empty(), "{found:#?}");
}

/// A handler of tests/handlers on an endpoint; `None` where its Python is missing.
fn handle(options: &mut Options, name: &str, script: &str, folder: &Folder, more: &str) -> Option<()> {
    let (python, script) = (tools::python("venv-runpod112")?.display().to_string(), handler(script));
    let cwd = folder.path();
    let executor =
        format!("{{ process = {{ command = [{python:?}, {script:?}], cwd = {cwd:?}, grace_ms = 1000 }} }}");
    options.endpoint(name, &executor, more);
    Some(())
}

/// Row A3: the schema of a batch API's callback, on every way a job can end.
#[tokio::test(flavor = "multi_thread")]
async fn a_the_callback_of_a_batch_api() {
    let Some(running) = python("seed_a_callback.py", &[]).await else { return };
    let (mut options, folder) = (Options::new(Backend::Sqlite), Folder::new("handler"));
    options.endpoint("timed", r#"{ builtin = "sleep" }"#, "execution_timeout_ms = 700");
    options.endpoint("narrow", r#"{ builtin = "sleep" }"#, "slots = 1");
    if handle(&mut options, "plain", "plain.py", &folder, "").is_none() {
        return;
    }
    let Some(stack) = Stack::dev(options).await else { return };
    let callback = running.url("/api/tts/callback");
    let run = async |endpoint: &str, input: Value| {
        stack.api.run(endpoint, &json!({"input": input, "webhook": callback})).await
    };
    let done = run("echo", json!({"audio_base64": "UklGRgAAAABXQVZF"})).await;
    let raised = run("plain", json!({"mode": "raise", "text": "no such voice"})).await;
    let told = run("plain", json!({"mode": "error", "text": "the text is empty"})).await;
    let late = run("timed", json!({"seconds": 60})).await;
    let running_one = run("narrow", json!({"seconds": 600})).await;
    stack.api.wait_status("narrow", &running_one, "IN_PROGRESS", LATER).await;
    let waiting = run("narrow", json!({"seconds": 600})).await;
    for id in [&waiting, &running_one] {
        stack.api.post(&format!("/v2/narrow/cancel/{id}"), &json!({})).await.expect(200);
    }

    let stored = running.wait_step("stored", &done).await;
    assert_eq!((&stored["status"], &stored["audio_bytes"]), (&json!("COMPLETED"), &json!(12)));
    for (id, status, word) in [
        (&raised, "FAILED", "no such voice"),
        (&told, "FAILED", "the text is empty"),
        (&late, "TIMED_OUT", ""),
        (&running_one, "CANCELLED", ""),
        (&waiting, "CANCELLED", ""),
    ] {
        let stored = running.wait_step("stored", id).await;
        assert_eq!(stored["status"], status, "{stored}");
        for field in ["reason", "output_error"] {
            let text = stored[field].as_str().unwrap_or_default();
            assert!(!text.is_empty() && text.contains(word), "{field}: {stored}");
        }
        stack.api.wait_settled(id, SOON).await;
    }
    no_violation(&running);
    // Sent again, as a provider may: nothing happens twice.
    let delivery = stack.api.deliveries(&done).await.remove(0);
    let id = delivery["webhook_id"].as_str().or(delivery["id"].as_str()).expect("an id").to_owned();
    let again = stack.api.post(&format!("/v1/deliveries/{id}/redeliver"), &json!({})).await;
    assert!(again.status < 300, "{}", again.text);
    running.wait_step("duplicate", &done).await;
    assert_eq!(running.steps_of("stored", &done).len(), 1);
}

/// Rows B1 to B3: the handler tells the route of its file itself, unsigned, and waits.
#[tokio::test(flavor = "multi_thread")]
async fn b_the_route_that_downloads_before_the_pod_ends() {
    let Some(running) = Running::example("receiver-nextjs", 3000, &[("ALLOW_UNSIGNED", "1")]).await else {
        return;
    };
    let (mut options, folder, port) = (Options::new(Backend::Sqlite), Folder::new("handler"), free_port());
    let more = format!(
        "confirm = {{ mode = \"handler\", receiver_url = \"{}\", timeout_ms = 60000, listen = \"127.0.0.1:{port}\" }}",
        running.url("/api/audio-ready")
    );
    if handle(&mut options, "speech", "files.py", &folder, &more).is_none() {
        return;
    }
    let Some(stack) = Stack::dev(options).await else { return };
    let input = json!({"mode": "self", "name": "test.wav", "text": "RIFF la la"});
    let id = stack.api.run("speech", &json!({"input": input})).await;
    let job = stack.api.wait_status("speech", &id, "COMPLETED", LATER).await;
    let output = &job["output"];
    assert_eq!(output["confirmed"], true, "{job}");
    assert_eq!(
        output["told"],
        json!({"success": true, "job_id": id, "audioUrl": "/audio-outputs/test.wav"}),
        "{job}"
    );
    assert_eq!(std::fs::read(running.data("audio-outputs/test.wav")).expect("the file"), b"RIFF la la");
    assert_eq!(running.steps_of("confirmed", &id)[0]["status"], 200);
    assert_eq!(running.steps_of("received", &id)[0]["signed"], false);
    for step in ["received", "downloaded", "confirmed"] {
        assert!(running.steps_of(step, &id)[0]["ms"].is_number(), "{step} has its duration");
    }
}

/// Rows C2 to C7: typed events, a router, three styles of endpoints, registration.
#[tokio::test(flavor = "multi_thread")]
async fn c_the_router_of_typed_events() {
    let secrets = json!({"all": null, "family": "any text will do", "versioned": signature::new_secret()});
    let Some(running) = python("seed_c_router.py", &[("SECRETS", &secrets.to_string())]).await else {
        return;
    };
    let mut options = Options::new(Backend::Sqlite);
    options.endpoint("chat", r#"{ builtin = "echo" }"#, "kind = \"completion\"\nmodel = \"m-1\"");
    options.table("[projects.default.quota]\njobs = 20");
    let Some(stack) = Stack::dev(options).await else { return };
    let mut made = Vec::new();
    for (style, path, events) in [
        ("all", "/webhooks", json!(["completion.*", "batch.*", "usage.*", "job.completed"])),
        ("family", "/webhooks/batch", json!(["batch.*"])),
        ("versioned", "/v1/webhooks/completion.finished", json!(["completion.finished"])),
    ] {
        let body = json!({"url": running.url(path), "events": events, "secret": secrets[style]});
        made.push(stack.api.post("/webhooks", &body).await.expect(201));
    }
    let listed = stack.api.get("/webhooks").await.expect(200);
    assert_eq!(listed["webhooks"].as_array().map(Vec::len), Some(3), "{listed}");

    let answer = json!({"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3}, "request_id": "req-7"});
    let chat = stack.api.run("chat", &json!({"input": answer})).await;
    let batch = json!({"endpoint": "echo", "items": [{"input": {"n": 1}}, {"input": {"n": 2}}]});
    let reply = stack.api.post("/v1/batches", &batch).await;
    assert!(reply.status < 300, "{}", reply.text);
    let batch = reply.json["batch_id"].as_str().or(reply.json["id"].as_str()).expect("an id").to_owned();
    // Until the project may submit no more.
    until("the quota to be reached", LATER, || async {
        let reply = stack.api.post("/v2/echo/run", &json!({"input": {"n": 1}})).await;
        (reply.status == 429).then_some(())
    })
    .await;

    let handled = async |kind: &str| {
        until(kind, LATER, || async {
            no_violation(&running);
            running.steps("handled").into_iter().find(|step| step["type"] == kind)
        })
        .await
    };
    let end = handled("completion.finished").await;
    let data = &end["data"];
    assert_eq!((&data["completion_id"], &data["model"]), (&json!(chat), &json!("m-1")), "{end}");
    assert_eq!((&data["content"], &data["request_id"]), (&json!("Hi"), &json!("req-7")), "{end}");
    assert_eq!((&data["total_tokens"], &data["finish_reason"]), (&json!(5), &json!("stop")), "{end}");
    assert_eq!((&end["source"], &end["api_version"]), (&json!("ringback"), &json!("2025-01-01")));
    for kind in ["completion.started", "batch.created", "batch.processing"] {
        handled(kind).await;
    }
    let end = handled("batch.completed").await;
    let data = &end["data"];
    assert_eq!((&data["batch_id"], &data["total_requests"]), (&json!(batch), &json!(2)), "{end}");
    assert_eq!((&data["completed"], &data["failed"]), (&json!(2), &json!(0)), "{end}");
    let file = data["output_file_id"].as_str().unwrap_or_else(|| panic!("no file: {end}"));
    let file = stack.api.get(&format!("/v1/files/{file}/content")).await;
    assert_eq!((file.status, file.text.lines().count()), (200, 2), "{}", file.text);
    let warning = handled("usage.limit_warning").await;
    assert_eq!(warning["data"]["limit"], 20.0, "{warning}");
    handled("usage.limit_exceeded").await;

    // Each style got its own, under its own secret.
    for (style, kind) in
        [("all", "batch.completed"), ("family", "batch.completed"), ("versioned", "completion.finished")]
    {
        until(&format!("{kind} by {style}"), LATER, || async {
            let all = running.steps("received");
            all.into_iter().find(|step| step["style"] == style && step["type"] == kind)
        })
        .await;
    }
    assert!(running.steps("refused").is_empty());
    // What nobody handles is told with the names of its fields.
    let unhandled = until("an unhandled event", LATER, || async {
        running.steps("unhandled").into_iter().find(|step| step["type"] == "job.completed")
    })
    .await;
    assert!(unhandled["payload_keys"].to_string().contains("job_id"), "{unhandled}");
    let metrics = Client::new(&running.base, "").get("/webhooks/metrics").await.expect(200);
    assert_eq!((&metrics["events_failed"], &metrics["registered_handlers"]), (&json!(0), &json!(10)));
    assert!(metrics["events_processed"].as_u64() > Some(5) && metrics["unhandled_events"].as_u64() > Some(0));

    // Registration as documented: change, remove.
    let path = format!("/webhooks/{}", made[1]["id"].as_str().expect("an id"));
    let change = json!({"events": ["batch.completed"]});
    let changed = stack.api.call(Method::PATCH, &path, Some(&change)).await.expect(200);
    assert_eq!(changed["events"], json!(["batch.completed"]));
    assert_eq!(stack.api.call(Method::DELETE, &path, None).await.status, 204);
}

/// Rows D1 to D5 with one of the two handlers.
async fn runflow(running: Running, stack: &Stack) {
    let hook = running.url("/runflow/callback");
    let run = async |model: &str, input: Value| {
        let body = json!({"input": input, "callback_url": hook});
        let run = stack.api.post(&format!("/v1/models/{model}/runs"), &body).await.expect(201);
        run["id"].as_str().unwrap_or_else(|| panic!("no id: {run}")).to_owned()
    };
    let done = run("acme/speech", json!({"name": "a.wav", "text": "RIFF la la"})).await;
    let copied = running.wait_step("copied", &done).await;
    assert_eq!((&copied["event"], &copied["status"]), (&json!("run.completed"), &json!("succeeded")));
    assert_eq!(copied["copied"], json!([10]), "the output's link gives the file: {copied}");
    for field in
        ["event", "run_id", "status", "output", "duration_ms", "created_at", "completed_at", "metadata"]
    {
        assert!(copied["fields"].as_array().expect("a list").contains(&json!(field)), "{field}: {copied}");
    }
    for time in copied["times"].as_array().expect("times") {
        assert!(time.as_str().unwrap_or_default().ends_with("+00:00"), "{copied}");
    }
    let failed = run("acme/speech", json!({"mode": "nonsense"})).await;
    let copied = running.wait_step("copied", &failed).await;
    assert_eq!((&copied["event"], &copied["status"]), (&json!("run.failed"), &json!("failed")));
    assert!(copied["output"].is_object(), "{copied}");

    // Redelivered on request: verified again, and known.
    stack.api.wait_settled(&done, SOON).await;
    let again = stack.api.post(&format!("/v1/runs/{done}/callback-redeliveries"), &json!({})).await;
    assert_eq!(again.status, 202, "{}", again.text);
    running.wait_step("duplicate", &done).await;
    assert_eq!(running.steps_of("taken", &done).len(), 1);

    // A batch, told to a registered webhook in this format.
    let body = json!({"url": hook, "events": ["batch.*"], "format": "runflow", "secret": stack.secret});
    stack.api.post("/v1/webhooks", &body).await.expect(201);
    let batch = json!({"endpoint": "echo", "items": [{"input": {"n": 1}}, {"input": {"n": 2}}]});
    let reply = stack.api.post("/v1/batches", &batch).await;
    let batch = reply.json["batch_id"].as_str().or(reply.json["id"].as_str()).expect("an id").to_owned();
    let copied = running.wait_step("copied", &batch).await;
    assert_eq!((&copied["event"], &copied["status"]), (&json!("batch.succeeded"), &json!("succeeded")));
    assert_eq!(
        (&copied["output"]["total"], &copied["output"]["succeeded"]),
        (&json!(2), &json!(2)),
        "{copied}"
    );
    assert!(running.steps("refused").is_empty(), "{:?}", running.steps("refused"));
}

async fn runflow_stack(folder: &Folder) -> Option<Stack> {
    let mut options = Options::new(Backend::Sqlite);
    let more = "alias = \"acme/speech\"\nartifacts = { paths = true }";
    handle(&mut options, "speech", "files.py", folder, more)?;
    Stack::dev(options).await
}

#[tokio::test(flavor = "multi_thread")]
async fn d_the_fastapi_handler() {
    let folder = Folder::new("handler");
    let Some(stack) = runflow_stack(&folder).await else { return };
    // The handler holds an old secret beside the live one.
    let secrets = format!("{} {}", signature::new_secret(), stack.secret);
    let Some(running) = python("seed_d_fastapi.py", &[("SECRETS", &secrets)]).await else { return };
    runflow(running, &stack).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn d_the_express_handler() {
    let folder = Folder::new("handler");
    let Some(stack) = runflow_stack(&folder).await else { return };
    let secrets = format!("{} {}", signature::new_secret(), stack.secret);
    let Some(running) = node("seed_d_express.cjs", &[("SECRETS", &secrets)]).await else { return };
    runflow(running, &stack).await;
}

/// Rows E2, E3, E7: a POST at each transition with the body of that state.
#[tokio::test(flavor = "multi_thread")]
async fn e_the_test_receiver_of_states() {
    let Some(program) = tools::need(tools::on_path("python3"), "python3", "install it") else { return };
    let script = tools::root().join("tests/receivers/seed_e_states.py").display().to_string();
    let running = Running::program(&program, &[script], &[]).await;
    let mut options = Options::new(Backend::Sqlite);
    options.endpoint("loud", r#"{ builtin = "echo" }"#, "webhook_events = \"all\"");
    options.endpoint("timed", r#"{ builtin = "sleep" }"#, "execution_timeout_ms = 700");
    let Some(stack) = Stack::dev(options).await else { return };
    let input = json!({"prompt": "a cat"});
    let every = stack.api.run("echo", &json!({"input": input, "webhookv2": running.url("/v2")})).await;
    let loud = stack.api.run("loud", &json!({"input": input, "webhook": running.url("/v1")})).await;
    let quiet = stack.api.run("echo", &json!({"input": input, "webhook": running.url("/v1")})).await;
    let late =
        stack.api.run("timed", &json!({"input": {"seconds": 60}, "webhookv2": running.url("/v2")})).await;
    let told = async |job: &str, expected: &[&str]| -> Vec<Value> {
        let all = until(&format!("the states of {job}"), LATER, || async {
            let all = running.steps_of("told", job);
            (all.len() >= expected.len()).then_some(all)
        })
        .await;
        stack.api.wait_settled(job, SOON).await;
        let states: Vec<&str> = all.iter().filter_map(|step| step["body"]["status"].as_str()).collect();
        assert_eq!(states, expected, "{all:?}");
        all.into_iter().map(|step| step["body"].clone()).collect()
    };
    let bodies = told(&every, &["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]).await;
    assert_eq!(bodies[0], json!({"id": every, "status": "IN_QUEUE"}));
    let waited = &bodies[1]["delayTime"];
    assert!(waited.is_u64());
    assert_eq!(bodies[1], json!({"id": every, "status": "IN_PROGRESS", "delayTime": waited}));
    let took = &bodies[2]["executionTime"];
    assert!(took.is_u64());
    assert_eq!(
        bodies[2],
        json!({"id": every, "status": "COMPLETED", "delayTime": waited, "executionTime": took, "output": input})
    );
    told(&loud, &["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]).await;
    told(&quiet, &["COMPLETED"]).await;
    let bodies = told(&late, &["IN_QUEUE", "IN_PROGRESS", "TIMED_OUT"]).await;
    assert!(bodies[2]["executionTime"].as_u64() >= Some(700), "{bodies:?}");
}
