//! Streamed pieces are given out once.

use std::time::{Duration, Instant};

use ringback_test_support::stack::Backend;
use ringback_test_support::wait::until;
use serde_json::{Value, json};

use crate::common::Server;

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
