//! `builtin.encoder` through the public surface, with the real weights of all-MiniLM-L6-v2 and with small models that
//! the test writes.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::future::join_all;
use ringback_test_support::client::Client;
use ringback_test_support::files::Folder;
use ringback_test_support::stack::{Backend, Options, Role, Stack};
use ringback_test_support::tools;
use ringback_test_support::wait::until;
use ringback_tests::{LATER, assert_only, both_webhooks, run_script, submit_behind, tiny_model};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const EATING: &str = "A man is eating food.";
const BREAD: &str = "A man is eating a piece of bread.";
const BABY: &str = "The girl is carrying a baby.";
/// First numbers of EATING's vector, and its cosines with the other two: measured with other programs.
const FIRST: [f64; 4] = [0.033242, 0.004406, -0.006277, 0.048379];
const COSINES: [f64; 2] = [0.75534, -0.10496];

fn mini_lm() -> Option<PathBuf> {
    let folder = tools::tool("models/all-MiniLM-L6-v2");
    tools::need(folder.is_dir().then_some(folder), "the model all-MiniLM-L6-v2", "run `make model`")
}

fn encoder(options: &mut Options, name: &str, model: &Path, more: &str) {
    let executor = format!(
        "{{ builtin = {{ encoder = {{ model = \"{}\", device = \"cpu\"{more} }} }} }}",
        model.display()
    );
    options.endpoint(name, &executor, "max_attempts = 1");
}

fn embed_options(backend: Backend) -> Option<Options> {
    let mut options = Options::new(backend);
    encoder(&mut options, "embed", &mini_lm()?, "");
    Some(options)
}

async fn runsync(api: &Client, endpoint: &str, input: Value) -> Value {
    let id = api.run(endpoint, &json!({ "input": input })).await;
    api.wait_end(endpoint, &id, LATER).await
}

async fn completed(api: &Client, endpoint: &str, input: Value) -> Value {
    let mut job = runsync(api, endpoint, input).await;
    assert_eq!(job["status"], "COMPLETED", "{job}");
    job["output"].take()
}

fn vectors(output: &Value) -> Vec<Vec<f64>> {
    let rows = output["embeddings"].as_array().expect("embeddings");
    rows.iter().map(|row| serde_json::from_value(row.clone()).expect("numbers")).collect()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// A number of the metrics; the test fails where it is missing.
async fn metric(api: &Client, name: &str) -> f64 {
    let text = api.get("/metrics").await.text;
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
    line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
}

/// The vectors are those that other programs compute from the same weights, in every encoding.
async fn golden(api: &Client) {
    let texts = json!([EATING, BREAD, BABY]);
    let float = completed(api, "embed", json!({ "texts": texts })).await;
    let rows = vectors(&float);
    assert_eq!((rows.len(), rows[0].len(), &float["dimensions"]), (3, 384, &json!(384)));
    for (found, known) in rows[0].iter().zip(FIRST) {
        assert!((found - known).abs() < 1e-4, "{found} is not {known}");
    }
    for (row, known) in rows[1..].iter().zip(COSINES) {
        let found = cosine(&rows[0], row);
        assert!((found - known).abs() < 1e-3, "{found} is not {known}");
    }
    assert!(float["usage"]["total_tokens"].as_u64() > Some(20), "{}", float["usage"]);

    let base64 = completed(api, "embed", json!({"texts": texts, "encoding": "base64"})).await;
    let bytes = STANDARD.decode(base64["embeddings"][0].as_str().expect("a text")).expect("base64");
    let read: Vec<f64> = bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect();
    assert!(cosine(&read, &rows[0]) > 0.999_999);
    let half =
        completed(api, "embed", json!({"texts": EATING, "encoding": "base64", "dtype": "float16"})).await;
    let bytes = STANDARD.decode(half["embeddings"][0].as_str().expect("a text")).expect("base64");
    assert_eq!(bytes.len(), 2 * 384);
}

async fn bad_inputs(api: &Client) {
    for (input, part) in [
        (json!({}), "lacks `texts`"),
        (json!({"texts": []}), "`texts` is empty"),
        (json!({"texts": ["a", 7]}), "`texts[1]` is a number"),
        (json!({"texts": ["a"], "dimensions": 8}), "`dimensions` is 8"),
        (
            json!({"texts": ["a", "word ".repeat(600)], "truncate": false}),
            "`texts[1]` has more than the 256 tokens",
        ),
        (json!({"texts": ["x".repeat(1024 * 1024 + 1)]}), "`texts[0]` has 1048577 bytes"),
        (json!({"query": "q"}), "lacks `texts`"),
    ] {
        let job = runsync(api, "embed", input).await;
        assert_eq!(job["status"], "FAILED", "{job}");
        assert!(job["error"].as_str().is_some_and(|text| text.contains(part)), "{part}: {}", job["error"]);
    }
    let cut = completed(api, "embed", json!({"texts": ["a", "word ".repeat(600)]})).await;
    assert_eq!(cut["truncated"], json!([1]));
}

/// Texts that are hard to read are still texts.
async fn odd_texts(api: &Client) {
    let texts = json!([
        "",
        " ",
        "\u{0}\u{1}\u{7f}",
        "\u{1F600}\u{200d}\u{1F680}",
        "今天天气很好。",
        "\n\n\t",
        "a".repeat(5000)
    ]);
    let rows = vectors(&completed(api, "embed", json!({ "texts": texts })).await);
    assert_eq!(rows.len(), 7);
    assert!(rows.iter().flatten().all(|value| value.is_finite()));
}

/// One job of a thousand texts, whose output is a blob, and a batch of jobs of one text: the same vectors.
async fn many(stack: &Stack) {
    let api = &stack.api;
    let texts: Vec<String> = (0..1000).map(|n| format!("text number {n}")).collect();
    let rows = vectors(&completed(api, "embed", json!({ "texts": texts })).await);
    assert_eq!(rows.len(), 1000);
    let items: Vec<Value> = texts.iter().take(64).map(|text| json!({"input": {"texts": [text]}})).collect();
    let batch = api.post("/v1/batches", &json!({"endpoint": "embed", "items": items})).await;
    let id = batch.json["batch_id"].as_str().unwrap_or_else(|| panic!("{}", batch.text)).to_owned();
    let path = format!("/v1/batches/{id}");
    until("the batch to end", LATER, || async {
        (api.get(&path).await.json["status"] == "COMPLETED").then_some(())
    })
    .await;
    let lines = api.get(&format!("{path}/results")).await.text;
    let of_batch: Vec<Vec<f64>> = lines
        .lines()
        .map(|line| vectors(&serde_json::from_str::<Value>(line).expect("a line")["output"]).remove(0))
        .collect();
    assert_eq!(of_batch.len(), 64);
    for (one, other) in of_batch.iter().zip(&rows) {
        assert!(cosine(one, other) > 0.9999, "a neighbour in the batch changes a vector");
    }
    let (texts, batches) = (
        metric(api, "ringback_encoder_inputs_total{endpoint=\"embed\"}").await,
        metric(api, "ringback_encoder_batch_size_count{endpoint=\"embed\"}").await,
    );
    assert!(texts >= 1064.0 && batches < texts / 4.0, "texts share batches: {texts} in {batches}");
    for name in ["tokenization", "queue", "inference"] {
        metric(api, &format!("ringback_encoder_request_{name}_seconds_count")).await;
    }
}

/// A cancelled job leaves no work behind: the next one is not kept waiting by its texts.
async fn cancel(api: &Client) {
    let before = metric(api, "ringback_encoder_batch_size_count{endpoint=\"embed\"}").await;
    let texts: Vec<String> = (0..10_000).map(|n| format!("{} {n}", "so many words ".repeat(60))).collect();
    let id = api.run("embed", &json!({"input": {"texts": texts}})).await;
    // Read, cut into tokens and partly computed.
    until("its texts to be computed", LATER, || async {
        let batches = metric(api, "ringback_encoder_batch_size_count{endpoint=\"embed\"}").await;
        (batches > before).then_some(())
    })
    .await;
    // The engine computes on all cores: on a small machine the tracker may not answer in time, and the API says so.
    let path = format!("/v2/embed/cancel/{id}");
    let reply = until("the cancel to be taken", LATER, || async {
        let reply = api.post(&path, &json!({})).await;
        assert!(matches!(reply.status, 200 | 503), "{}", reply.text);
        (reply.status == 200).then_some(reply)
    })
    .await;
    assert_eq!(reply.json["status"], "CANCELLED");
    completed(api, "embed", json!({"texts": [EATING]})).await;
    let cancelled = "ringback_encoder_requests_total{endpoint=\"embed\",outcome=\"cancelled\"}";
    assert!(metric(api, cancelled).await > 0.0, "the queued texts were dropped");
}

async fn real_model(backend: Backend) {
    let Some(options) = embed_options(backend) else { return };
    let Some(stack) = Stack::dev(options).await else { return };
    let api = &stack.api;
    golden(api).await;
    bad_inputs(api).await;
    odd_texts(api).await;
    many(&stack).await;
    cancel(api).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn real_model_on_sqlite() {
    real_model(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn real_model_on_postgres() {
    real_model(Backend::Postgres).await;
}

/// The official OpenAI client gets embeddings and models from an encoder endpoint.
#[tokio::test(flavor = "multi_thread")]
async fn official_openai_client() {
    let (Some(python), Some(options)) = (tools::python("venv-openai"), embed_options(Backend::Sqlite)) else {
        return;
    };
    let Some(stack) = Stack::dev(options).await else { return };
    let api = stack.api.clone();
    let base = api.base().into();
    let run = move || run_script(&python, "openai_embeddings.py", &api, &[("RINGBACK_TEST_URL", base)]);
    tokio::task::spawn_blocking(run).await.expect("the script");
}

/// Cross-encoder and classifier, from folders with a few weights whose effect is plain.
#[tokio::test(flavor = "multi_thread")]
async fn rerank_and_classify() {
    let folder = Folder::new("models");
    let (ranker, classifier) = (folder.path().join("ranker"), folder.path().join("classifier"));
    tiny_model::write(&ranker, &[("LABEL_0", [4.0, 0.0, 0.0, 0.0])]);
    tiny_model::write(
        &classifier,
        &[("calm", [0.0; 4]), ("good", [3.0, 0.0, 0.0, 0.0]), ("bad", [-3.0, 0.0, 0.0, 0.0])],
    );
    let mut options = Options::new(Backend::Sqlite);
    encoder(&mut options, "rank", &ranker, ", task = \"rerank\"");
    encoder(&mut options, "class", &classifier, ", task = \"classify\"");
    let Some(stack) = Stack::dev(options).await else { return };
    let api = &stack.api;
    let documents = json!(["bad bad bad", "what", {"text": "good good good"}]);
    let asked = json!({"query": "what", "documents": documents, "top_n": 2, "return_documents": true});
    let native = completed(api, "rank", asked.clone()).await;
    let cohere = api.post("/v2/rank/openai/v1/rerank", &asked).await.expect(200);
    for output in [native, cohere] {
        let results = output["results"].as_array().expect("results");
        let order: Vec<u64> = results.iter().filter_map(|result| result["index"].as_u64()).collect();
        assert_eq!(order, [2, 1], "{output}");
        assert_eq!(results[0]["document"]["text"], "good good good");
        let score = |n: usize| results[n]["relevance_score"].as_f64().expect("a score");
        assert!(score(0) > 0.9 && score(1) < score(0) && score(1) > 0.0, "{output}");
    }
    let output = completed(api, "class", json!({"texts": ["good", "bad bad", "what"]})).await;
    let best = |n: usize| output["results"][n][0]["label"].as_str().expect("a label").to_owned();
    assert_eq!([best(0), best(1)], ["good", "bad"], "{output}");
    let sum: f64 = (0..3).filter_map(|n| output["results"][2][n]["score"].as_f64()).sum();
    assert!((sum - 1.0).abs() < 1e-4, "{output}");
    let wrong = api.post("/v2/class/openai/v1/embeddings", &json!({"input": "x"})).await;
    assert_eq!(wrong.status, 404, "{}", wrong.text);
    assert!(wrong.text.contains("its task is classify"), "{}", wrong.text);
}

/// `kill -9` of the worker in the middle of its batches: each job ends once, and its webhooks arrive.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_loses_nothing() {
    let Some(mut options) = mini_lm().map(|model| {
        let mut options = Options::new(Backend::Sqlite);
        let model = format!(
            "{{ builtin = {{ encoder = {{ model = \"{}\", device = \"cpu\" }} }} }}",
            model.display()
        );
        options.endpoint("embed", &model, "");
        options
    }) else {
        return;
    };
    options.set("worker", "spool_max_bytes", "268435456");
    let Some(mut stack) = Stack::apart(options).await else { return };
    let long: Vec<String> =
        (0..1000).map(|n| format!("text {n} {}", "with many words ".repeat(20))).collect();
    let mut jobs = vec![("embed", json!({ "texts": long }))];
    jobs.extend((0..20).map(|n| ("embed", json!({"texts": [format!("short {n}")]}))));
    let accepted = submit_behind(&stack, "killed", &jobs).await.expect("the submits");
    stack.api.wait_status("embed", &accepted[0].id, "IN_PROGRESS", LATER).await;
    stack.kill9("worker");
    stack.start_again("worker").await;
    for job in &accepted {
        stack.api.wait_status("embed", &job.id, "COMPLETED", LATER).await;
        stack.receiver.wait_for(&job.id, "COMPLETED", LATER).await;
    }
    assert_only(&stack, &accepted).await;
}

/// An engine that is ruined for its process: the jobs go back without a failure counted, and the process ends with an
/// error; the next one does them.
#[tokio::test(flavor = "multi_thread")]
async fn a_ruined_engine_ends_the_worker_and_costs_no_job() {
    let Some(options) = embed_options(Backend::Sqlite) else { return };
    let Some(mut stack) = Stack::apart(options).await else { return };
    ruined(&mut stack, Role::Worker, "worker", 8).await;
}

/// Started again inside of the same process the worker would meet the same ruin, so all of `ringback dev` ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_ruined_engine_ends_the_all_in_one_and_costs_no_job() {
    let Some(options) = embed_options(Backend::Sqlite) else { return };
    let Some(mut stack) = Stack::dev(options).await else { return };
    // The API ends as well, so there is no time for a second submit.
    ruined(&mut stack, Role::Dev, "dev", 1).await;
}

async fn ruined(stack: &mut Stack, role: Role, name: &str, jobs: u32) {
    assert!(stack.terminate(name).success());
    stack.spawn_over(role, name, Some("worker.engine.batch@1:fail"));
    stack.wait_ready(name).await;
    let inputs: Vec<Value> = (0..jobs).map(|n| json!({"texts": [format!("text {n}")]})).collect();
    let bodies: Vec<Value> = inputs.iter().map(|input| both_webhooks(stack, input)).collect();
    let ids = join_all(bodies.iter().map(|body| stack.api.run("embed", body))).await;
    let process = std::sync::Mutex::new(stack.process(name));
    let status = until("the process to end", LATER, || async {
        process.lock().expect("no panic holds it").exit_status()
    })
    .await;
    assert!(status.code().is_some_and(|code| code != 0), "it ends with an error: {status}");
    assert!(stack.log(name).contains("an engine is ruined"));
    stack.start_again(name).await;
    for id in &ids {
        // max_attempts = 1: a failure that counted would have ended the job.
        stack.api.wait_status("embed", id, "COMPLETED", LATER).await;
        stack.receiver.wait_for(id, "COMPLETED", LATER).await;
    }
}
