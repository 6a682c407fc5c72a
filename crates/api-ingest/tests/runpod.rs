//! RunPod's client surface against the real tracker: waits, streams, cancel, retry, purge, keys, bad input.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::{Duration, Instant};

use common::Server;
use http::Method;
use ringback_contracts::v1;
use ringback_service_runtime::blobs::BlobKey;
use ringback_test_support::{
    stack::Backend,
    wait::{until, until_true},
};
use serde_json::{Value, json};

async fn waits_are_ended_by_the_tracker(backend: Backend) {
    let Some(server) = Server::start(backend, "", "").await else { return };
    server.tracker().await;
    let api = server.api.clone();
    let began = Instant::now();
    let waiting =
        tokio::spawn(async move { api.post("/v2/echo/runsync?wait=60000", &json!({"input": 1})).await });
    let sql = server.sql().await;
    let id = until("the job's row", Duration::from_secs(10), || async {
        let jobs = server.api.get("/v1/jobs").await.expect(200);
        jobs["jobs"][0]["id"].as_str().map(str::to_owned)
    })
    .await;
    assert!(id.starts_with("sync-"), "{id}");
    let api = server.api.clone();
    let (path, body) = (format!("/v2/echo/status-sync/{id}?wait=60000"), json!({}));
    let (by_get, by_post) = (path.clone(), path);
    let second = tokio::spawn(async move { (api.get(&by_get).await, api.post(&by_post, &body).await) });
    let attempt = server.attempt(&id, 1);
    attempt.start().await;
    attempt.progress(r#"{"percent":50}"#).await;
    let now = server.api.status("echo", &id).await.expect(200);
    assert_eq!(
        (&now["status"], &now["output"], &now["workerId"]),
        (&json!("IN_PROGRESS"), &json!({"percent": 50}), &json!("w1"))
    );
    attempt.succeed_with(r#"{"n": 1e400, "a":[1]}"#).await;
    let reply = waiting.await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert!(reply.text.contains(r#""output":{"n": 1e400, "a":[1]}"#), "verbatim: {}", reply.text);
    assert!(
        reply.text.contains(r#""status":"COMPLETED""#) && reply.text.contains(r#""executionTime":12"#),
        "{}",
        reply.text
    );
    assert!(reply.text.contains(r#""workerId":"w1""#), "{}", reply.text);
    let (get, post) = second.await.unwrap();
    assert_eq!((get.text, post.text), (reply.text.clone(), reply.text));
    assert_eq!(
        sql.count("SELECT COUNT(*) FROM jobs WHERE sync_id = 1 AND retain_completed_ms = 3600000").await,
        1
    );
    // The plain spelling of the same id is another job's.
    server.api.status("echo", id.trim_start_matches("sync-")).await.expect(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_are_ended_by_the_tracker_on_sqlite() {
    waits_are_ended_by_the_tracker(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_are_ended_by_the_tracker_on_postgres() {
    waits_are_ended_by_the_tracker(Backend::Postgres).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_that_is_over_answers_200_with_the_job_as_it_is() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    let began = Instant::now();
    let reply = server.api.post("/v2/echo/runsync?wait=1000", &json!({"input": 1})).await.expect(200);
    assert_eq!(reply["status"], "IN_QUEUE");
    assert!(began.elapsed() >= Duration::from_millis(1_000));
    let id = reply["id"].as_str().unwrap();
    let reply = server.api.get(&format!("/v2/echo/status-sync/{id}?wait=50")).await.expect(200);
    assert_eq!(reply["status"], "IN_QUEUE");
}

#[tokio::test(flavor = "multi_thread")]
async fn waiters_are_counted_and_a_drain_lets_them_go() {
    let Some(mut server) =
        Server::start(Backend::Sqlite, "max_waiters = 3\nmax_waiters_per_project = 2", "").await
    else {
        return;
    };
    let id = server.api.run("echo", &json!({"input": 1})).await;
    let path = format!("/v2/echo/status-sync/{id}?wait=60000");
    let waiting: Vec<_> = (0..2)
        .map(|_| {
            let (api, path) = (server.api.clone(), path.clone());
            // A probe below may hold a place for a moment.
            tokio::spawn(async move {
                until("a place", Duration::from_secs(20), || async {
                    let reply = api.get(&path).await;
                    (reply.status != 429).then_some(reply)
                })
                .await
            })
        })
        .collect();
    let full = until("the project's places to be taken", Duration::from_secs(10), || async {
        let reply = server.api.get(&format!("/v2/echo/status-sync/{id}?wait=0")).await;
        (reply.status == 429).then_some(reply)
    })
    .await;
    assert!(
        full.text.contains("max_waiters_per_project") && full.headers["retry-after"] == "1",
        "{}",
        full.text
    );
    let reply = server.api.post("/v2/echo/runsync", &json!({"input": 1})).await;
    assert_eq!(reply.status, 429, "{}", reply.text);
    assert_eq!(
        server.sql().await.count("SELECT COUNT(*) FROM jobs").await,
        1,
        "no job that nobody can wait for"
    );
    // Another project is not held up.
    let other = server.other().post("/v2/echo/runsync?wait=1000", &json!({"input": 1})).await;
    assert_eq!(other.expect(200)["status"], "IN_QUEUE");
    server.drain();
    for task in waiting {
        let reply = tokio::time::timeout(Duration::from_secs(5), task).await.expect("released").unwrap();
        assert_eq!(reply.expect(200)["status"], "IN_QUEUE");
    }
    server.ended().await;
}

async fn stream_of(server: &Server, id: &str) -> Value {
    server.api.get(&format!("/v2/echo/stream/{id}")).await.expect(200)
}

async fn pieces_are_given_out_once(backend: Backend) {
    let Some(server) = Server::start(backend, "", "").await else { return };
    server.tracker().await;
    let id = server.api.run("echo", &json!({"input": 1})).await;
    let held = Instant::now();
    let nothing = server.api.get(&format!("/v2/echo/stream/{id}?wait=300")).await.expect(200);
    assert_eq!(nothing, json!({"id": id, "status": "IN_QUEUE", "stream": []}));
    assert!(held.elapsed() >= Duration::from_millis(300), "held, not spun");
    let api = server.api.clone();
    let path = format!("/v2/echo/stream/{id}");
    let waiting = tokio::spawn(async move { api.get(&path).await.expect(200) });
    let attempt = server.attempt(&id, 1);
    attempt.start().await;
    attempt.chunk(0, r#""a""#).await;
    let first = waiting.await.unwrap();
    // The chunk may have been committed before the wait began: either way it comes once.
    assert_eq!(first["stream"], json!([{"output": "a"}]), "{first}");
    assert_eq!(first["status"], "IN_PROGRESS");
    attempt.chunk(1, r#"{"b":2}"#).await;
    attempt.chunk(2, "null").await;
    attempt.succeed_with(r#"["a",{"b":2},null]"#).await;
    let rest = stream_of(&server, &id).await;
    assert_eq!(
        rest,
        json!({"id": id, "status": "COMPLETED", "stream": [{"output": {"b": 2}}, {"output": null}]})
    );
    for _ in 0..2 {
        let empty = stream_of(&server, &id).await;
        assert_eq!(
            empty,
            json!({"id": id, "status": "COMPLETED", "stream": []}),
            "an emptied stream stays readable"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_are_given_out_once_on_sqlite() {
    pieces_are_given_out_once(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_are_given_out_once_on_postgres() {
    pieces_are_given_out_once(Backend::Postgres).await;
}

/// Asks for pieces and hangs up after a while; gives what had arrived by then, if it was the whole answer.
async fn ask_and_hang_up(server: &Server, id: &str, after: Duration) -> Vec<u64> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let address = server.api.base().trim_start_matches("http://").to_owned();
    let mut socket = tokio::net::TcpStream::connect(address).await.expect("connected");
    let request = format!(
        "GET /v2/echo/stream/{id} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\r\n",
        server.api.key()
    );
    socket.write_all(request.as_bytes()).await.expect("sent");
    tokio::time::sleep(after).await;
    // The server ends the connection in turn; what it had sent before is still read.
    socket.shutdown().await.expect("hung up");
    let mut bytes = Vec::new();
    let _ = socket.read_to_end(&mut bytes).await;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let json = text.find('{').zip(text.rfind('}')).map(|(from, to)| &text[from..=to]);
    let answer: Option<Value> = json.and_then(|json| serde_json::from_str(json).ok());
    answer.map_or_else(Vec::new, |answer| outputs(&answer))
}

fn outputs(answer: &Value) -> Vec<u64> {
    answer["stream"].as_array().unwrap().iter().map(|piece| piece["output"].as_u64().unwrap()).collect()
}

async fn a_client_that_hangs_up_costs_no_piece(backend: Backend) {
    let Some(server) = Server::start(backend, "", "").await else { return };
    server.tracker().await;
    let id = server.api.run("echo", &json!({"input": 1})).await;
    let attempt = server.attempt(&id, 1);
    attempt.start().await;
    let mut got = Vec::new();
    // At every moment of a request: while it waits, while the pieces are read, while the answer is written.
    for n in 0..150_u32 {
        let after = Duration::from_micros(u64::from(n % 50) * 300);
        let piece = n.to_string();
        let (read, ()) = tokio::join!(ask_and_hang_up(&server, &id, after), attempt.chunk(n, &piece));
        got.extend(read);
    }
    attempt.succeed_with("[]").await;
    loop {
        let last = outputs(&stream_of(&server, &id).await);
        if last.is_empty() {
            break;
        }
        got.extend(last);
    }
    got.sort_unstable();
    got.dedup();
    assert_eq!(got, (0..150).collect::<Vec<u64>>(), "every piece reached somebody");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_costs_no_piece_on_sqlite() {
    a_client_that_hangs_up_costs_no_piece(Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_costs_no_piece_on_postgres() {
    a_client_that_hangs_up_costs_no_piece(Backend::Postgres).await;
}

/// A client whose host is gone neither reads nor hangs up: the next one gets the pieces all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_nothing_does_not_keep_the_stream() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.tracker().await;
    let id = server.api.run("echo", &json!({"input": 1})).await;
    let attempt = server.attempt(&id, 1);
    // More than the buffers of a connection take.
    let piece = format!("\"{}\"", "x".repeat(900_000));
    for n in 0..5 {
        attempt.chunk(n, &piece).await;
    }
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4_096).expect("set");
    let address = server.api.base().trim_start_matches("http://").parse().expect("an address");
    let mut silent = socket.connect(address).await.expect("connected");
    let request = format!(
        "GET /v2/echo/stream/{id} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\r\n",
        server.api.key()
    );
    silent.write_all(request.as_bytes()).await.expect("sent");
    // Its answer is under way.
    silent.read_exact(&mut [0; 16]).await.expect("the start of an answer");
    let none = stream_of(&server, &id).await;
    assert_eq!(
        (&none["status"], &none["stream"]),
        (&json!("IN_PROGRESS"), &json!([])),
        "the other one's turn"
    );
    let got = until("the pieces", Duration::from_secs(40), || async {
        let pieces = stream_of(&server, &id).await["stream"].as_array().unwrap().len();
        (pieces > 0).then_some(pieces)
    })
    .await;
    assert!(got >= 4, "{got} pieces");
    drop(silent);
}

/// A client whose requests go to either replica gets each piece once, however quickly it asks.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_of_two_replicas_gets_each_piece_once() {
    let Some(mut server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.tracker().await;
    let apis = [server.api.clone(), server.second().await];
    let id = server.api.run("echo", &json!({"input": 1})).await;
    let attempt = server.attempt(&id, 1);
    attempt.start().await;
    let path = format!("/v2/echo/stream/{id}");
    let reader = tokio::spawn(async move {
        let mut got = Vec::new();
        for api in apis.iter().cycle() {
            let answer = api.get(&path).await.expect(200);
            got.extend(outputs(&answer));
            if answer["status"] == "COMPLETED" {
                return got;
            }
        }
        got
    });
    for n in 0..100 {
        attempt.chunk(n, &n.to_string()).await;
    }
    attempt.succeed_with("[]").await;
    let got = reader.await.unwrap();
    assert_eq!(got, (0..100).collect::<Vec<u64>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_stream_is_final_with_its_last_piece_only() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.tracker().await;
    let id = server.api.run("echo", &json!({"input": 1})).await;
    let attempt = server.attempt(&id, 1);
    for n in 0..520 {
        attempt.chunk(n, &n.to_string()).await;
    }
    attempt.succeed_with("[]").await;
    let first = stream_of(&server, &id).await;
    assert_eq!(
        (first["status"].as_str(), first["stream"].as_array().unwrap().len()),
        (Some("IN_PROGRESS"), 500)
    );
    let last = stream_of(&server, &id).await;
    assert_eq!((last["status"].as_str(), last["stream"].as_array().unwrap().len()), (Some("COMPLETED"), 20));
    assert_eq!(last["stream"][19]["output"], 519);
    // Two readers at once share the pieces, none comes twice.
    let id = server.api.run("echo", &json!({"input": 1})).await;
    let attempt = server.attempt(&id, 1);
    for n in 0..20 {
        attempt.chunk(n, &n.to_string()).await;
    }
    attempt.succeed_with("[]").await;
    let (a, b) = tokio::join!(stream_of(&server, &id), stream_of(&server, &id));
    let mut seen: Vec<u64> = [&a, &b]
        .iter()
        .flat_map(|r| r["stream"].as_array().unwrap())
        .map(|c| c["output"].as_u64().unwrap())
        .collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..20).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_of_a_cancelled_job_ends() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.tracker().await;
    let id = server.api.run("echo", &json!({"input": 1})).await;
    let attempt = server.attempt(&id, 1);
    attempt.chunk(0, "1").await;
    let api = server.api.clone();
    let path = format!("/v2/echo/stream/{id}");
    assert_eq!(api.get(&path).await.expect(200)["stream"], json!([{"output": 1}]));
    let waiting = tokio::spawn({
        let (api, path) = (api.clone(), path.clone());
        async move { api.get(&path).await.expect(200) }
    });
    for _ in 0..2 {
        let reply = api.post(&format!("/v2/echo/cancel/{id}"), &json!({})).await.expect(200);
        assert_eq!(reply, json!({"id": id, "status": "CANCELLED"}));
    }
    assert_eq!(waiting.await.unwrap(), json!({"id": id, "status": "CANCELLED", "stream": []}));
    let over = api.get(&path).await;
    assert_eq!(over.status, 410);
    assert!(over.json["error"].as_str().unwrap().contains("cancelled"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_attempt_marks_its_first_piece() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.tracker().await;
    let id = server.api.run("echo", &json!({"input": 1})).await;
    server.attempt(&id, 1).chunk(0, "1").await;
    assert_eq!(stream_of(&server, &id).await["stream"], json!([{"output": 1}]));
    server.attempt(&id, 1).fail("broken").await;
    let failed = stream_of(&server, &id).await;
    assert_eq!((&failed["status"], &failed["stream"]), (&json!("FAILED"), &json!([])));
    let reply = server.api.post(&format!("/v2/echo/retry/{id}"), &json!({})).await.expect(200);
    assert_eq!(reply, json!({"id": id, "status": "IN_QUEUE"}));
    server.attempt(&id, 2).chunk(0, "2").await;
    assert_eq!(stream_of(&server, &id).await["stream"], json!([{"output": 2, "reset": true}]));
    server.attempt(&id, 2).chunk(1, "3").await;
    assert_eq!(stream_of(&server, &id).await["stream"], json!([{"output": 3}]));
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_are_shown_as_webhooks_tell_them() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.tracker().await;
    let id = server.api.run("echo", &json!({"input": 1})).await;
    server.attempt(&id, 1).fail("no \"voice\"").await;
    let job = server.api.status("echo", &id).await.expect(200);
    assert_eq!(
        (&job["status"], &job["error"], &job["output"]["error"]),
        (&json!("FAILED"), &json!("no \"voice\""), &json!("no \"voice\""))
    );
    assert!(job["delayTime"].is_u64() && job["executionTime"] == 12, "{job}");
    let native = server.api.job(&id).await;
    assert_eq!(
        (&native["error"], &native["attempt"], &native["run"]),
        (&json!("no \"voice\""), &json!(1), &json!(1))
    );
    let told: Vec<_> =
        native["history"].as_array().unwrap().iter().map(|h| h["status"].as_str().unwrap()).collect();
    assert_eq!(told, ["IN_QUEUE", "IN_PROGRESS", "FAILED"]);
    assert_eq!(server.api.get(&format!("/v1/jobs/{id}/logs")).await.text, "one line\n");
    // Retry drops the old result.
    let running = server.api.post(&format!("/v1/jobs/{id}/retry"), &json!({})).await.expect(200);
    assert_eq!(
        (&running["status"], &running["run"], &running["error"]),
        (&json!("IN_QUEUE"), &json!(2), &json!(null))
    );
    let again = server.api.post(&format!("/v2/echo/retry/{id}"), &json!({})).await;
    assert!(again.status == 409 && again.text.contains("IN_QUEUE"), "{}", again.text);
    let health = server.api.get("/v2/echo/health").await.expect(200);
    assert_eq!(
        health["jobs"],
        json!({"completed": 0, "failed": 1, "inProgress": 0, "inQueue": 1, "retried": 1})
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_output_is_streamed_from_its_blob() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.tracker().await;
    let id = server.api.run("echo", &json!({"input": 1})).await;
    let text = format!("\"{}\"", "y".repeat(3_000_000));
    let key = BlobKey::new(format!("out/{id}/1-1-7")).unwrap();
    server.blobs().put(&key, text.clone().into()).await.unwrap();
    let payload = v1::Payload {
        size_bytes: text.len() as u64,
        at: Some(v1::payload::At::BlobKey(key.as_str().to_owned())),
    };
    server.attempt(&id, 1).succeed(payload).await;
    let reply = server.api.status("echo", &id).await;
    assert_eq!(reply.json["output"].as_str().map(str::len), Some(3_000_000));
    assert_eq!(reply.headers["content-length"].to_str().unwrap(), reply.text.len().to_string());
    let native = server.api.job(&id).await;
    assert!(native.get("output").is_none(), "large outputs have a link");
    assert_eq!(native["output_bytes"], 3_000_002);
    let path = native["output_url"].as_str().unwrap().strip_prefix(server.api.base()).unwrap().to_owned();
    assert_eq!(server.api.get(&path).await.text, text);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_takes_what_is_queued_and_nothing_else() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    server.tracker().await;
    let running = server.api.run("echo", &json!({"input": 0})).await;
    server.attempt(&running, 1).start().await;
    let elsewhere = server.api.run("loud", &json!({"input": 0})).await;
    let ids = futures::future::join_all((0..30).map(|n| {
        let api = server.api.clone();
        async move { api.run("echo", &json!({"input": n})).await }
    }))
    .await;
    let refused = server.submit_only().post("/v2/echo/purge-queue", &json!({})).await;
    assert!(refused.status == 403 && refused.text.contains("admin"), "{}", refused.text);
    let purged = server.api.post("/v2/echo/purge-queue", &json!({})).await.expect(200);
    assert_eq!(purged, json!({"removed": 30, "status": "completed"}));
    for id in &ids {
        assert_eq!(server.api.status("echo", id).await.expect(200)["status"], "CANCELLED");
    }
    assert_eq!(server.api.status("echo", &running).await.expect(200)["status"], "IN_PROGRESS");
    assert_eq!(server.api.status("loud", &elsewhere).await.expect(200)["status"], "IN_QUEUE");
    let again = server.api.post("/v1/endpoints/echo/purge", &json!({})).await.expect(200);
    assert_eq!(again["removed"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_open_what_their_scopes_say() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    let id = server.api.run("echo", &json!({"input": 1})).await;
    let (status, run) = (format!("/v2/echo/status/{id}"), "/v2/echo/run");
    let body = json!({"input": 1});
    assert_eq!(server.submit_only().post(run, &body).await.status, 200);
    assert_eq!(server.submit_only().get(&status).await.status, 403);
    assert_eq!(server.read_only().get(&status).await.status, 200);
    assert_eq!(server.read_only().post(run, &body).await.status, 403);
    assert_eq!(server.read_only().get("/v1/webhooks/default/secret").await.status, 403);
    let secret = server.api.get("/v1/webhooks/default/secret").await.expect(200);
    assert!(secret["secret"].as_str().unwrap().starts_with("whsec_"), "{secret}");
    assert_eq!(server.read_only().get("/metrics").await.status, 403);
    assert_eq!(server.api.get("/metrics").await.status, 200);
    let stranger = server.api.with_key("rb_wrong_0123456789");
    let reply = stranger.get(&status).await;
    assert_eq!((reply.status, reply.headers["www-authenticate"].to_str().unwrap()), (401, "Bearer"));
    assert_eq!(server.other().get(&status).await.status, 404, "another project's job");
    // A key that is taken away stops working within seconds.
    server.sql().await.execute("UPDATE api_keys SET disabled_at_ms = 1 WHERE name = 'read'").await;
    let read_only = server.read_only();
    until_true("the key to be refused", Duration::from_secs(10), || async {
        read_only.get(&status).await.status == 401
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_rate_size_and_disk_have_their_answers() {
    let section = "submits_per_10s = 5\nmax_body_bytes = 2000\nmax_runsync_body_bytes = 3000";
    let Some(server) = Server::start(Backend::Sqlite, section, "").await else { return };
    let body = json!({"input": "x".repeat(2_500)});
    let reply = server.api.post("/v2/echo/run", &body).await;
    assert!(
        reply.status == 413 && reply.text.contains("2000") && reply.text.contains("max_body_bytes"),
        "{}",
        reply.text
    );
    let reply = server.api.post("/v2/echo/runsync?wait=1000", &body).await;
    assert_eq!(reply.status, 200, "its own limit: {}", reply.text);
    // Without a length that was told before, the bytes are counted as they come.
    let pieces: Vec<Result<&str, std::io::Error>> = vec![Ok("{\"input\":\""), Ok("yyyyyyyyyy")];
    let endless = futures::stream::iter(pieces.into_iter().chain((0..500).map(|_| Ok("zzzzzzzzzz"))));
    let reply = server
        .api
        .send(Method::POST, "/v2/echo/run", &[], reqwest::Body::wrap_stream(endless))
        .await
        .unwrap();
    assert_eq!(reply.status, 413, "{}", reply.text);
    let refused = until("the rate to be used up", Duration::from_secs(5), || async {
        let reply = server.api.post("/v2/echo/run", &json!({"input": 1})).await;
        (reply.status == 429).then_some(reply)
    })
    .await;
    let seconds: u64 = refused.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=10).contains(&seconds), "{seconds}");
    assert!(refused.text.contains("submits_per_10s"), "{}", refused.text);
    assert_eq!(server.other().post("/v2/echo/run", &json!({"input": 1})).await.status, 200, "P9");
    let section = "disk_floor_bytes = 9000000000000000000";
    let Some(full) = Server::start(Backend::Sqlite, section, "").await else { return };
    let reply = full.api.post("/v2/echo/run", &json!({"input": 1})).await;
    assert!(reply.status == 507 && reply.text.contains("disk_floor_bytes"), "{}", reply.text);
    let reply = full.api.post("/v1/batches", &json!({"endpoint": "echo", "items": [{"input": 1}]})).await;
    assert_eq!(reply.status, 507, "{}", reply.text);
    assert_eq!(full.api.get("/v2/echo/health").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_says_so_in_the_shape_of_its_route() {
    let Some(server) = Server::start(Backend::Sqlite, "", "").await else { return };
    let api = &server.api;
    let document = api.get("/openapi.json").await.expect(200);
    assert_eq!(document["openapi"], "3.1.0");
    for (method, path, status) in [
        (Method::GET, "/v2/echo/run", 405),
        (Method::DELETE, "/v2/echo/status/x", 405),
        (Method::GET, "/v2/echo/nothing", 404),
        (Method::GET, "/v2/echo/status/%FF", 400),
        (Method::POST, "/v2/a%2Ab/run", 404),
        (Method::POST, "/v2/%2E%2E%2Fx/run", 404),
        (Method::POST, "/v2/x%00/run", 404),
        (Method::POST, "/v2/%3E/run", 404),
        (Method::GET, "/v2/echo/status/%2A", 404),
        (Method::POST, "/v2/echo/cancel/17", 404),
        (Method::POST, "/v2/echo/runsync?wait=soon", 400),
    ] {
        let reply = api.call(method.clone(), path, Some(&json!({"input": 1}))).await;
        assert_eq!(reply.status, status, "{method} {path}: {}", reply.text);
        assert!(reply.json["error"].is_string(), "{method} {path}: {}", reply.text);
    }
    let reply = api.call(Method::POST, "/v2/a%2Ab/run", Some(&json!({"input": 1}))).await;
    assert!(reply.text.contains("found '*'"), "{}", reply.text);
    for (method, path, status) in [
        (Method::GET, "/nothing", 404),
        (Method::DELETE, "/v1/jobs", 405),
        (Method::GET, "/v1/jobs/%FF", 400),
        (Method::GET, "/v1/jobs/17", 404),
        (Method::GET, "/v1/jobs?limit=0", 400),
        (Method::GET, "/v1/jobs?status=RUNNING", 400),
        (Method::GET, "/v1/jobs?cursor=x", 400),
        (Method::GET, "/v1/batches/17", 404),
        (Method::GET, "/v1/stream?batch=17", 400),
    ] {
        let reply = api.call(method.clone(), path, None).await;
        assert_eq!(reply.status, status, "{method} {path}: {}", reply.text);
        assert_eq!(reply.headers["content-type"], "application/problem+json", "{method} {path}");
        assert_eq!(reply.json["status"], status, "{}", reply.text);
    }
    let reply = api.post("/v1/jobs", &json!({"endpoint": "echo", "input": 1, "policy": {"ttl": 1}})).await;
    assert_eq!(reply.json["errors"][0]["pointer"], "/policy/ttl", "{}", reply.text);
    assert!(reply.text.contains("server.min_ttl_ms"), "{}", reply.text);
}
