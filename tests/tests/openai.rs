//! OpenAI's routes: the official client against an unmodified RunPod handler, and what happens to a job whose request
//! is over.

use futures::future::join_all;
use http::Method;
use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::tools;
use ringback_test_support::wait::until;
use ringback_tests::{LATER, handler, run_script};
use serde_json::{Value, json};

async fn start(backend: Backend, options: impl FnOnce(&mut Options)) -> Option<Stack> {
    let program = tools::python("venv-runpod112")?.display().to_string();
    let mut all = Options::new(backend);
    all.process("chat", &[&program, &handler("openai_chat.py")], "slots = 4");
    all.process("generator", &[&program, &handler("generator.py")], "");
    options(&mut all);
    Stack::dev(all).await
}

fn chat(text: &str, stream: bool) -> Value {
    json!({"model": "parrot-1", "messages": [{"role": "user", "content": text}], "stream": stream})
}

/// The jobs of an endpoint by their states.
async fn states(stack: &Stack, endpoint: &str) -> Vec<String> {
    let jobs = stack.api.get(&format!("/v1/jobs?endpoint={endpoint}")).await.expect(200);
    let jobs = jobs["jobs"].as_array().expect("jobs").clone();
    jobs.iter().map(|job| job["status"].as_str().expect("a state").to_owned()).collect()
}

async fn official_client(backend: Backend) {
    let Some(python) = tools::python("venv-openai") else { return };
    let Some(stack) = start(backend, |_| {}).await else { return };
    let (api, folder) = (stack.api.clone(), stack.folder().to_owned());
    let base = api.base().into();
    tokio::task::spawn_blocking(move || {
        let env = [("RINGBACK_TEST_URL", base), ("RINGBACK_TEST_FOLDER", folder)];
        run_script(&python, "openai_client.py", &api, &env);
    })
    .await
    .expect("the script");
    // The client tries a failed request again, unless it is told that the job has run: each failure is one job.
    let failed = states(&stack, "chat").await.iter().filter(|state| *state == "FAILED").count();
    assert_eq!(failed, 4, "`fail`, `refuse` twice and an unknown route");
}

#[tokio::test(flavor = "multi_thread")]
async fn official_client_on_sqlite() {
    official_client(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn official_client_on_postgres() {
    official_client(Backend::Postgres).await;
}

/// A client that hangs up does not want its job any more: neither while it waits for the whole, nor in a stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_cancels_its_job() {
    let Some(stack) = start(Backend::Sqlite, |_| {}).await else { return };
    for stream in [false, true] {
        let api = stack.api.clone();
        let request = tokio::spawn(async move {
            api.post("/v2/chat/openai/v1/chat/completions", &chat("wait:100 one two", stream)).await
        });
        let running =
            || async { states(&stack, "chat").await.contains(&"IN_PROGRESS".to_owned()).then_some(()) };
        until("the job to run", LATER, running).await;
        request.abort();
        let ended =
            || async { states(&stack, "chat").await.iter().all(|state| state == "CANCELLED").then_some(()) };
        until("the job to be cancelled", LATER, ended).await;
    }
    assert_eq!(states(&stack, "chat").await.len(), 2);
    // The handler was stopped as well: all its slots take work again.
    let hello = chat("hi", false);
    let greet = || stack.api.post("/v2/chat/openai/v1/chat/completions", &hello);
    for answer in join_all((0..4).map(|_| greet())).await {
        assert_eq!(answer.expect(200)["choices"][0]["message"]["content"], "hi");
    }
}

/// The request's limit ends it, with a text that names the setting, and its job.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_takes_too_long_is_answered_and_its_job_ends() {
    let limited = |options: &mut Options| {
        options.set("server", "openai_timeout_ms", "2000");
    };
    let Some(stack) = start(Backend::Sqlite, limited).await else { return };
    let reply = stack.api.post("/v2/chat/openai/v1/chat/completions", &chat("wait:100 one two", false)).await;
    assert_eq!(reply.status, 504, "{}", reply.text);
    assert_eq!(reply.json["error"]["type"], "timeout_error");
    assert_eq!(reply.headers["x-should-retry"], "false");
    let ended = || async {
        let states = states(&stack, "chat").await;
        states.iter().all(|state| state == "CANCELLED" || state == "TIMED_OUT").then_some(())
    };
    until("the job to end", LATER, ended).await;
}

/// Handlers that are no vLLM: pieces that are not collected, outputs that are plain values, inputs that are wrong.
#[tokio::test(flavor = "multi_thread")]
async fn any_handler_can_answer() {
    let Some(stack) = start(Backend::Sqlite, |_| {}).await else { return };
    let api = &stack.api;
    // `echo` returns its input, and with it shows what handlers get.
    let path = "/v2/echo/openai/v1/audio/speech";
    let body = r#" {"input": "x", "n": 1e400} "#;
    let reply = api.send(Method::POST, path, &[("content-type", "application/json")], body).await.unwrap();
    assert_eq!(reply.status, 200, "{}", reply.text);
    assert_eq!(
        reply.text,
        r#"{"openai_route":"/v1/audio/speech","openai_input":{"input": "x", "n": 1e400}}"#
    );
    assert_eq!(api.get("/v2/echo/openai/models").await.expect(200), json!({"openai_route": "/v1/models"}));
    let streamed = api.post(path, &json!({"stream": true})).await;
    assert_eq!(streamed.headers["content-type"], "text/event-stream");
    assert_eq!(
        streamed.text,
        "data: {\"openai_route\":\"/v1/audio/speech\",\"openai_input\":{\"stream\":true}}\n\ndata: [DONE]\n\n"
    );
    // A generator that does not collect: its pieces are the answer, in both ways.
    let chunks = json!([{"n": 0, "text": "x"}, {"n": 1, "text": "x"}, {"n": 2, "text": "x"}]);
    let path = "/v2/generator/openai/v1/completions";
    assert_eq!(api.post(path, &json!({})).await.expect(200), chunks);
    let streamed = api.post(path, &json!({"stream": true})).await;
    let events: Vec<&str> = streamed.text.split_terminator("\n\n").collect();
    assert_eq!(events.len(), 4, "{}", streamed.text);
    assert!(events[2].starts_with("data: {\"n\"") && events[3] == "data: [DONE]", "{}", streamed.text);

    let path = "/v2/echo/openai/v1/embeddings";
    for (method, path, body, status, part) in [
        (Method::POST, path, "", 400, "body is empty"),
        (Method::POST, path, "[1]", 400, "must be a JSON object"),
        (Method::POST, path, "{\"a\":", 400, "not valid JSON"),
        (Method::DELETE, path, "", 405, "DELETE"),
        (Method::HEAD, path, "", 405, ""),
        (Method::POST, "/v2/nothing/openai/v1/embeddings", "{}", 404, "no endpoint `nothing`"),
        (Method::GET, "/v2/echo/openai", "", 404, "no such route"),
    ] {
        let reply = api.send(method.clone(), path, &[], body).await.unwrap();
        assert_eq!(reply.status, status, "{method} {path} {body}: {}", reply.text);
        if method != Method::HEAD {
            let error = &reply.json["error"];
            assert!(error["message"].as_str().is_some_and(|text| text.contains(part)), "{}", reply.text);
            assert!(error["type"].is_string() && error["param"].is_null(), "{error}");
        }
    }
    let nobody = api.with_key("");
    assert_eq!(nobody.post(path, &json!({})).await.expect(401)["error"]["code"], "invalid_api_key");
}

/// Bodies over the limit are refused before anything is stored.
#[tokio::test(flavor = "multi_thread")]
async fn limits_are_those_of_runsync() {
    let small = |options: &mut Options| {
        options.set("server", "max_runsync_body_bytes", "2000");
        options.set("server", "max_waiters_per_project", "1");
    };
    let Some(stack) = start(Backend::Sqlite, small).await else { return };
    let path = "/v2/sleep/openai/v1/embeddings";
    let reply = stack.api.post(path, &json!({"input": "x".repeat(2000)})).await.expect(413);
    assert!(
        reply["error"]["message"].as_str().expect("a text").contains("max_runsync_body_bytes"),
        "{reply}"
    );
    let api = stack.api.clone();
    let chat_path = "/v2/chat/openai/v1/chat/completions";
    let waiting = tokio::spawn(async move { api.post(chat_path, &chat("wait:3 one two", false)).await });
    until("the first request to wait", LATER, || async {
        (states(&stack, "chat").await.len() == 1).then_some(())
    })
    .await;
    let refused = stack.api.post(chat_path, &chat("hi", false)).await;
    assert_eq!((refused.status, &refused.json["error"]["type"]), (429, &json!("rate_limit_error")));
    assert!(refused.headers.contains_key("retry-after"));
    waiting.await.expect("the request").expect(200);
}
