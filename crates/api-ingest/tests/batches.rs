//! Batches: accepted all at once, results, templates, and what a crash in between leaves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::Server;
use http::Method;
use ringback_contracts::v1;
use ringback_domain::JobId;
use ringback_store::deliveries::stored_of;
use ringback_test_support::{client::Client, stack::Backend, wait::until};
use serde_json::{Value, json};

const TTS: &str = "[[batch_templates]]\npreset = \"tts\"\nendpoint = \"echo\"\n";

async fn lines(server: &Server, id: &str) -> Vec<Value> {
    let reply = server.api.get(&format!("/v1/batches/{id}/results")).await;
    assert_eq!(reply.status, 200, "{}", reply.text);
    reply
        .text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect()
}

async fn a_batch_runs_to_its_end(backend: Backend) {
    let Some(server) = Server::start(backend, "", "").await else { return };
    server.tracker().await;
    let items: Vec<Value> =
        (0..45).map(|n| json!({"input": {"n": n}, "client_ref": format!("ref-{n}")})).collect();
    let made = server
        .api
        .post(
            "/v1/batches",
            &json!({"endpoint": "echo", "items": items, "webhookv2": "http://127.0.0.1:9/each",
                    "callback_url": "http://127.0.0.1:9/batch", "metadata": {"album": 7}}),
        )
        .await
        .expect(201);
    assert_eq!(
        (&made["total"], &made["status"], &made["metadata"]),
        (&json!(45), &json!("IN_PROGRESS"), &json!({"album": 7}))
    );
    assert!(made.get("result_url").is_none(), "only once ended");
    let id = made["batch_id"].as_str().unwrap().to_owned();
    let jobs: Vec<String> =
        made["job_ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect();
    assert_eq!(jobs.len(), 45);
    assert!(jobs.is_sorted());
    let sql = server.sql().await;
    assert_eq!(sql.count("SELECT COUNT(*) FROM deliveries WHERE seq = 1").await, 45, "inherited webhookv2");
    let early = server.api.get(&format!("/v1/batches/{id}/results")).await;
    assert_eq!(early.status, 409, "{}", early.text);
    let page = server.api.get(&format!("/v1/batches/{id}?items=true&limit=40")).await.expect(200);
    assert_eq!((page["items"].as_array().unwrap().len(), &page["next_cursor"]), (40, &json!("40")));
    let rest = server.api.get(&format!("/v1/batches/{id}?items=true&limit=40&cursor=40")).await.expect(200);
    assert_eq!(
        (rest["items"][4]["client_ref"].as_str(), &rest["next_cursor"]),
        (Some("ref-44"), &json!(null))
    );
    for (n, job) in jobs.iter().enumerate() {
        let attempt = server.attempt(job, 1);
        if n == 7 {
            attempt.fail("no").await;
        } else {
            attempt.succeed_with(&format!("{{\n\"n\": {n}}}")).await;
        }
    }
    let ended = server.api.get(&format!("/v1/batches/{id}")).await.expect(200);
    assert_eq!(
        (&ended["status"], &ended["completed"], &ended["failed"], &ended["cancelled"]),
        (&json!("COMPLETED"), &json!(44), &json!(1), &json!(0))
    );
    let url = ended["result_url"].as_str().unwrap();
    assert_eq!(url, format!("{}/v1/batches/{id}/results", server.api.base()));
    let results = lines(&server, &id).await;
    assert_eq!(results.len(), 45);
    for (n, line) in results.iter().enumerate() {
        assert_eq!(
            (line["index"].as_u64(), line["job_id"].as_str()),
            (Some(n as u64), Some(jobs[n].as_str()))
        );
        if n == 7 {
            assert_eq!((&line["status"], &line["error"]), (&json!("FAILED"), &json!("no")));
        } else {
            assert_eq!((&line["status"], &line["output"]["n"]), (&json!("COMPLETED"), &json!(n)));
        }
    }
    let owed = server.api.get(&format!("/v1/batches/{id}/deliveries")).await.expect(200);
    assert_eq!(owed["deliveries"].as_array().unwrap().len(), 1, "exactly one batch body: {owed}");
    assert_eq!(server.other().get(&format!("/v1/batches/{id}")).await.status, 404);
    let listed = server.api.get(&format!("/v1/jobs?batch={id}&limit=100")).await.expect(200);
    assert_eq!(listed["jobs"].as_array().unwrap().len(), 45);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_runs_to_its_end_on_sqlite() {
    a_batch_runs_to_its_end(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_runs_to_its_end_on_postgres() {
    a_batch_runs_to_its_end(Backend::Postgres).await;
}

/// The body that a batch's `callback_url` is owed.
async fn owed_body(server: &Server, id: &str) -> Value {
    let rows = stored_of(server.store.read(), &[id.parse().unwrap()]).await.unwrap();
    let [row] = rows.as_slice() else { panic!("{} deliveries", rows.len()) };
    let parts = row.delivery.body.as_ref().unwrap().parts.iter().map(|part| match &part.part {
        Some(v1::body_part::Part::Inline(bytes)) => bytes.to_vec(),
        other => panic!("{other:?}"),
    });
    serde_json::from_slice(&parts.flatten().collect::<Vec<u8>>()).unwrap()
}

async fn links_in_bodies_need_no_key_and_end_with_retention(backend: Backend) {
    let alias = "[[endpoints]]\nname = \"tts-v2\"\nalias = \"acme/tts\"\nexecutor = { builtin = \"echo\" }\n";
    let Some(server) = Server::start(backend, "", alias).await else { return };
    server.tracker().await;
    let nobody = Client::new(server.api.base(), "");
    let mut paths = Vec::new();
    for name in ["endpoint", "model"] {
        let named = if name == "model" { "acme/tts" } else { "echo" };
        let items: Vec<Value> = (0..3).map(|n| json!({"input": {"n": n}})).collect();
        let batch = json!({name: named, "items": items, "callback_url": "http://127.0.0.1:9/batch"});
        let made = server.api.post("/v1/batches", &batch).await.expect(201);
        let jobs: Vec<&str> =
            made["job_ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap()).collect();
        server.attempt(jobs[0], 1).succeed_with("{\"n\": 0}").await;
        server.attempt(jobs[1], 1).fail("no").await;
        server.attempt(jobs[2], 1).succeed_with("{\"n\": 2}").await;
        let id = made["batch_id"].as_str().unwrap().to_owned();
        let body = owed_body(&server, &id).await;
        // Runflow's body has it beside the counts.
        let url = body["result_url"].as_str().or(body["output"]["result_url"].as_str());
        let path = url.unwrap_or_else(|| panic!("{body}")).strip_prefix("http://public.test").unwrap();
        let reply = nobody.get(path).await;
        assert_eq!((reply.status, reply.text.lines().count()), (200, 3), "{path}: {}", reply.text);
        let keyed = server.api.get(&format!("/v1/batches/{id}/results")).await;
        assert_eq!(keyed.text, reply.text, "the keyed route gives the same");
        assert_eq!(nobody.get(&format!("/v1/batches/{id}/results")).await.status, 401);
        let folder = path.rsplit_once('/').unwrap().0.to_owned();
        for (file, indexes) in [("output.jsonl", vec![0, 2]), ("errors.jsonl", vec![1])] {
            let reply = nobody.get(&format!("{folder}/{file}")).await;
            assert_eq!(reply.status, 200, "{}", reply.text);
            let told: Vec<u64> = reply
                .text
                .lines()
                .map(|line| serde_json::from_str::<Value>(line).unwrap()["index"].as_u64().unwrap())
                .collect();
            assert_eq!(told, indexes, "{file}");
        }
        paths.push((id, folder));
    }
    let sql = server.sql().await;
    let [(first, of_first), (second, of_second)] = paths.as_slice() else { panic!("two batches") };
    let token = |folder: &str| folder.rsplit('/').next().unwrap().to_owned();
    for wrong in [
        format!("/batches/{first}/{}/results.jsonl", token(of_second)),
        format!("/batches/{first}/{}/results.jsonl", &token(of_first)[..31]),
        format!("/batches/{first}/x/results.jsonl"),
        format!("/batches/17/{}/results.jsonl", token(of_first)),
        format!("{of_first}/results"),
    ] {
        let reply = nobody.get(&wrong).await;
        assert_eq!(reply.status, 404, "{wrong}: {}", reply.text);
    }
    // One of its jobs is past its time: a file with a hole is not given out.
    sql.execute("DELETE FROM jobs WHERE batch_index = 1").await;
    let reply = nobody.get(&format!("{of_first}/results.jsonl")).await;
    assert_eq!(reply.status, 410, "{}", reply.text);
    // The whole batch is: the link proves that there was one.
    sql.execute("DELETE FROM jobs").await;
    sql.execute("DELETE FROM batches").await;
    let reply = nobody.get(&format!("{of_second}/output.jsonl")).await;
    assert_eq!(reply.status, 410, "{}", reply.text);
    assert_eq!(nobody.get(&format!("/batches/{second}/x/output.jsonl")).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn links_in_bodies_need_no_key_and_end_with_retention_on_sqlite() {
    links_in_bodies_need_no_key_and_end_with_retention(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn links_in_bodies_need_no_key_and_end_with_retention_on_postgres() {
    links_in_bodies_need_no_key_and_end_with_retention(Backend::Postgres).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_cancels_the_rest_of_its_own_batch_only() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.tracker().await;
    let items: Vec<Value> = (0..20).map(|n| json!({"input": n})).collect();
    let body = json!({"endpoint": "echo", "items": items, "on_failure": "cancel_rest"});
    let ours = server.api.post("/v1/batches", &body).await.expect(201);
    let theirs = server.api.post("/v1/batches", &body).await.expect(201);
    server.attempt(ours["job_ids"][3].as_str().unwrap(), 1).fail("no").await;
    let path = format!("/v1/batches/{}", ours["batch_id"].as_str().unwrap());
    let ended = until("the rest to be cancelled", Duration::from_secs(20), || async {
        let now = server.api.get(&path).await.expect(200);
        (now["status"] == "FAILED").then_some(now)
    })
    .await;
    assert_eq!((&ended["failed"], &ended["cancelled"]), (&json!(1), &json!(19)));
    let path = format!("/v1/batches/{}", theirs["batch_id"].as_str().unwrap());
    let now = server.api.get(&path).await.expect(200);
    assert_eq!((&now["status"], &now["cancelled"]), (&json!("IN_PROGRESS"), &json!(0)));
    for _ in 0..2 {
        let now = server.api.post(&format!("{path}/cancel"), &json!({})).await.expect(200);
        assert_eq!((&now["status"], &now["cancelled"]), (&json!("CANCELLED"), &json!(20)), "twice is fine");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn json_lines_and_keys() {
    let Some(server) = Server::start(Backend::Sqlite, "max_batch_items = 1200", "").await else { return };
    let mut text = String::from("{\"endpoint\": \"echo\", \"on_failure\": \"continue\"}\n\n");
    for n in 0..1_200 {
        text.push_str(&format!("{{\"input\": {n}, \"client_ref\": \"{n}\"}}\n"));
    }
    let headers = [("content-type", "application/x-ndjson"), ("idempotency-key", "lines-1")];
    let send = |body: String| server.api.send(Method::POST, "/v1/batches", &headers, body);
    let first = send(text.clone()).await.unwrap().expect(201);
    let again = send(text.clone()).await.unwrap().expect(200);
    assert_eq!((&first["batch_id"], first["total"].as_u64()), (&again["batch_id"], Some(1_200)));
    assert_eq!(first["job_ids"], again["job_ids"]);
    let sql = server.sql().await;
    assert_eq!(sql.count("SELECT COUNT(*) FROM jobs").await, 1_200);
    assert_eq!(sql.count("SELECT CAST(SUM(queued) AS BIGINT) FROM endpoint_counters").await, 1_200);
    assert_eq!(send(text.replace("1199", "1198")).await.unwrap().status, 409);
    let headers = [("content-type", "application/x-ndjson")];
    for (body, wanted) in [
        (String::new(), "empty"),
        ("{\"endpoint\":\"echo\"}".to_owned(), "/items"),
        ("{\"endpoint\":\"echo\",\"items\":[]}\n{\"input\":1}".to_owned(), "first of JSON lines"),
        ("{\"endpoint\":\"echo\"}\n{\"input\":1}\n{\"input\"".to_owned(), "line-3"),
        ("{\"endpoint\":\"echo\"}\n[1]".to_owned(), "line-2"),
        (text.clone() + "{\"input\":1}", "at most 1200"),
    ] {
        let reply = server.api.send(Method::POST, "/v1/batches", &headers, body).await.unwrap();
        assert!(
            reply.status == 400 && reply.text.contains(wanted),
            "{wanted}: {} {}",
            reply.status,
            reply.text
        );
    }
    for (body, pointer) in [
        (json!({"items": [{"input": 1}]}), "/endpoint"),
        (json!({"endpoint": 3, "items": [{"input": 1}]}), "/endpoint"),
        (json!({"endpoint": "echo"}), "/items"),
        (json!({"endpoint": "echo", "items": {}}), "/items"),
        (json!({"endpoint": "echo", "items": [{"input": 1}, 5]}), "/items/1"),
        (json!({"endpoint": "echo", "items": [{"input": 1}, {}]}), "/items/1/input"),
        (json!({"endpoint": "echo", "items": [{"input": 1, "client_ref": 5}]}), "/items/0/client_ref"),
        (json!({"endpoint": "echo", "items": [{"input": 1, "client_ref": "a\u{0}"}]}), "/items/0/client_ref"),
        (json!({"endpoint": "echo", "items": [{"input": 1, "webhook": "ftp://x"}]}), "/items/0/webhook"),
        (json!({"endpoint": "echo", "items": [{"input": 1}], "on_failure": "stop"}), "/on_failure"),
        (
            json!({"endpoint": "echo", "items": [{"input": 1}], "callback_url": "http://10.0.0.1/"}),
            "/callback_url",
        ),
    ] {
        let reply = server.api.post("/v1/batches", &body).await;
        assert_eq!(reply.status, 400, "{body}: {}", reply.text);
        assert_eq!(reply.json["errors"][0]["pointer"], pointer, "{body}: {}", reply.text);
    }
    assert_eq!(sql.count("SELECT COUNT(*) FROM batches").await, 1, "nothing is half made");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_was_never_opened_does_not_exist() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.tracker().await;
    let body = json!({"endpoint": "echo", "items": [{"input": 1}, {"input": 2}], "webhookv2": "http://127.0.0.1:9/x"});
    let headers = [("idempotency-key", "b1")];
    let send = || server.api.send(Method::POST, "/v1/batches", &headers, body.to_string());
    let made = send().await.unwrap().expect(201);
    let (id, job) =
        (made["batch_id"].as_str().unwrap().to_owned(), made["job_ids"][0].as_str().unwrap().to_owned());
    let sql = server.sql().await;
    let due = "SELECT COUNT(*) FROM deliveries WHERE next_attempt_at_ms < created_at_ms + 60000";
    assert_eq!(sql.count(due).await, 2, "opening makes the first deliveries due");
    // As a process leaves it that dies before it opens the batch.
    sql.execute("UPDATE batches SET opened_at_ms = NULL, next_check_at_ms = created_at_ms + 600000").await;
    for path in [
        format!("/v1/batches/{id}"),
        format!("/v1/batches/{id}/results"),
        format!("/v1/jobs/{job}"),
        format!("/v2/echo/status/{job}"),
    ] {
        assert_eq!(server.api.get(&path).await.status, 404, "{path}");
    }
    assert_eq!(server.api.post(&format!("/v2/echo/cancel/{job}"), &json!({})).await.status, 404);
    assert_eq!(server.api.get("/v1/jobs").await.expect(200)["jobs"], json!([]));
    // The same request again finds its maker at work, and later takes its place.
    let busy = send().await.unwrap();
    assert_eq!(busy.status, 503, "{}", busy.text);
    sql.execute("UPDATE batches SET created_at_ms = created_at_ms - 31000").await;
    let again = send().await.unwrap().expect(201);
    assert_ne!(again["batch_id"], id.as_str());
    assert_eq!(sql.count("SELECT COUNT(*) FROM batches WHERE opened_at_ms IS NOT NULL").await, 1);
    // The first one is given up: it can never open, and the library of the reconciler removes it.
    let old = ringback_domain::BatchId::parse(&id).unwrap();
    let opened = server
        .store
        .write(ringback_store::Urgency::Now, move |tx| {
            Box::pin(async move { ringback_store::batches::open_batch(tx, 8, old).await })
        })
        .await
        .unwrap();
    assert!(opened.is_none());
    let store = server.store.clone();
    until("the rows to be removed", Duration::from_secs(10), || async {
        let (done, _) = store
            .write(ringback_store::Urgency::Now, move |tx| {
                Box::pin(async move { ringback_store::retention::remove_unopened(tx, old, 100).await })
            })
            .await
            .unwrap();
        done.then_some(())
    })
    .await;
    assert_eq!(sql.count("SELECT COUNT(*) FROM jobs").await, 2);
    assert_eq!(sql.count("SELECT COUNT(*) FROM batches").await, 1);
    let owed = sql.count("SELECT CAST(SUM(owed) AS BIGINT) FROM jobs").await;
    assert_eq!(owed, sql.count("SELECT COUNT(*) FROM deliveries").await, "P5");
}

#[tokio::test(flavor = "multi_thread")]
async fn deliveries_of_an_unopened_batch_are_held() {
    use ringback_store::submit::{InputAt, Submit, insert_submits};
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    let endpoints = ringback_store::endpoints::list(server.store.read()).await.unwrap();
    let (project, endpoint) = (endpoints[0].project, endpoints[0].id);
    let submit = Submit {
        targets: ringback_domain::target::Target::of_submit(None, Some("http://127.0.0.1:9/x"), false),
        hold_deliveries_ms: 900_000,
        ..Submit::new(JobId::from_parts(1, [1; 10]), project, endpoint, InputAt::Inline("1".into()))
    };
    let free = Submit { id: JobId::from_parts(2, [2; 10]), hold_deliveries_ms: 0, ..submit.clone() };
    let inserted = server
        .store
        .write(ringback_store::Urgency::Now, move |tx| {
            let (submit, free) = (submit.clone(), free.clone());
            Box::pin(async move { insert_submits(tx, 1, 8, &[&submit, &free]).await })
        })
        .await
        .unwrap();
    assert_eq!(inserted.len(), 2);
    let sql = server.sql().await;
    assert_eq!(sql.count("SELECT COUNT(*) FROM deliveries").await, 2);
    let held = "SELECT COUNT(*) FROM deliveries WHERE next_attempt_at_ms = created_at_ms + 900000";
    assert_eq!(sql.count(held).await, 1);
    assert_eq!(
        sql.count("SELECT COUNT(*) FROM deliveries WHERE next_attempt_at_ms = created_at_ms").await,
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tts_template_of_the_configuration() {
    let Some(server) = Server::start(Backend::Sqlite, "", TTS).await else { return };
    server.tracker().await;
    let body = json!({"chunks": [{"text": "two", "index": 2}, {"text": "one", "index": 1, "voice_url": "https://v/own.wav"}],
                      "voice_url": "https://v/all.wav"});
    let made = server.api.post("/tts/batch", &body).await.expect(200);
    assert_eq!(made["job_count"], 2);
    assert_eq!(made.as_object().unwrap().len(), 2, "{made}");
    let id = made["batch_id"].as_str().unwrap();
    let path = format!("/tts/batch/{id}");
    let now = server.api.get(&path).await.expect(200);
    assert_eq!(
        now,
        json!({"batch_id": id, "total": 2, "completed": 0, "failed": 0, "status": "IN_PROGRESS"})
    );
    let items = server.api.get(&format!("/v1/batches/{id}?items=true")).await.expect(200);
    let jobs: Vec<String> =
        (0..2).map(|n| items["items"][n]["job_id"].as_str().unwrap().to_owned()).collect();
    let ids: Vec<JobId> = jobs.iter().map(|j| JobId::parse(j).unwrap()).collect();
    let stored = ringback_store::inputs::select_inputs(server.store.read(), &ids).await.unwrap();
    let input = |n: usize| match &stored[&ids[n]].input {
        ringback_store::submit::InputAt::Inline(bytes) => serde_json::from_slice::<Value>(bytes).unwrap(),
        other => panic!("{other:?}"),
    };
    let wanted = |text: &str, voice: &str| json!({"text": text, "audio_prompt_url": voice, "n_candidates": 3, "whisper_threshold": 85});
    assert_eq!(input(0), wanted("one", "https://v/own.wav"), "the chunk's voice wins");
    assert_eq!(input(1), wanted("two", "https://v/all.wav"));
    for job in &jobs {
        server.attempt(job, 1).succeed_with("{}").await;
    }
    let done = server.api.get(&path).await.expect(200);
    assert_eq!((&done["status"], &done["completed"]), (&json!("COMPLETED"), &json!(2)));
    assert!(done["result_url"].as_str().unwrap().ends_with(&format!("/v1/batches/{id}/results")));
    for (body, pointer) in [
        (json!({}), "/chunks"),
        (json!({"chunks": []}), "/chunks"),
        (json!({"chunks": [{"index": 1}]}), "/chunks/0/text"),
        (json!({"chunks": [{"text": "a", "index": "x"}]}), "/chunks/0/index"),
    ] {
        let reply = server.api.post("/tts/batch", &body).await;
        assert!(
            reply.status == 400 && reply.json["errors"][0]["pointer"] == pointer,
            "{body}: {}",
            reply.text
        );
    }
    assert_eq!(
        server.other().post("/tts/batch", &body).await.status,
        404,
        "another project has no such route"
    );
    assert_eq!(server.api.get("/tts/batch/17").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn transitions_are_streamed_as_they_are_committed() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.tracker().await;
    let items: Vec<Value> = (0..3).map(|n| json!({"input": n})).collect();
    let made = server.api.post("/v1/batches", &json!({"endpoint": "echo", "items": items})).await.expect(201);
    let url = format!("{}/v1/stream?batch={}", server.api.base(), made["batch_id"].as_str().unwrap());
    let mut events = reqwest::Client::new().get(url).bearer_auth(common::ADMIN).send().await.unwrap();
    assert_eq!(events.headers()["content-type"], "text/event-stream");
    let mut text = String::from_utf8(events.chunk().await.unwrap().unwrap().to_vec()).unwrap();
    assert!(text.starts_with(": open"), "{text}");
    server.api.run("echo", &json!({"input": "of no batch"})).await;
    let job = made["job_ids"][1].as_str().unwrap();
    server.attempt(job, 1).succeed_with("1").await;
    while text.matches("event: transition").count() < 2 {
        let more =
            tokio::time::timeout(Duration::from_secs(10), events.chunk()).await.expect("an event").unwrap();
        text.push_str(std::str::from_utf8(&more.expect("not over")).unwrap());
    }
    let told: Vec<Value> = text
        .lines()
        .filter_map(|l| l.strip_prefix("data: "))
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert!(told.iter().all(|t| t["job_id"] == job), "{told:?}");
    let statuses: Vec<_> = told.iter().map(|t| t["status"].as_str().unwrap()).collect();
    assert_eq!(statuses, ["IN_PROGRESS", "COMPLETED"]);
    assert_eq!((told[1]["endpoint"].as_str(), told[1]["seq"].as_u64()), (Some("echo"), Some(3)));
}
