//! The client verbs against a running Ringback: what they print, what they change, how they exit.

use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::tools;
use ringback_tests::{SOON, handler};
use serde_json::{Value, json};
use std::process::Output;

/// Exit codes, as the command line documents them.
const OK: i32 = 0;
const REFUSED: i32 = 2;
const NOT_FOUND: i32 = 3;
const DENIED: i32 = 4;
const CONFLICT: i32 = 5;
const UNREACHABLE: i32 = 6;
const WAIT_TIMED_OUT: i32 = 7;
const JOB_FAILED: i32 = 10;
const JOB_CANCELLED: i32 = 11;
const JOB_TIMED_OUT: i32 = 12;

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8").trim_end().to_owned()
}

fn exited(stack: &Stack, args: &[&str], code: i32) -> Output {
    let output = stack.cli(args);
    assert_eq!(
        output.status.code(),
        Some(code),
        "ringback {args:?}\n{}\n{}",
        text(&output),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn said(stack: &Stack, args: &[&str], code: i32) -> String {
    text(&exited(stack, args, code))
}

fn json_of(stack: &Stack, args: &[&str], code: i32) -> Value {
    let said = said(stack, args, code);
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("{args:?} printed no JSON ({error}): {said}"))
}

fn one_job(stack: &Stack) {
    let output = said(stack, &["submit", "echo", r#"{"hello": "world", "big": 1e400}"#, "--wait"], OK);
    assert!(output.contains("world") && output.contains("1e400"), "numbers are kept verbatim: {output}");
    let id = said(stack, &["submit", "echo", r#"{"n": 1}"#, "--idempotency-key", "cli-1"], OK);
    assert_eq!(said(stack, &["submit", "echo", r#"{"n": 1}"#, "--idempotency-key", "cli-1"], OK), id);
    said(stack, &["watch", &id, "--timeout", "30s"], OK);
    let job = json_of(stack, &["get", &id, "--json"], OK);
    assert_eq!((&job["id"], &job["status"]), (&json!(id), &json!("COMPLETED")));
    assert_eq!(said(stack, &["get", &id, "--output"], OK).replace(' ', ""), r#"{"n":1}"#);
    let shown = said(stack, &["get", &id], OK);
    assert!(shown.contains("COMPLETED") && shown.contains(&id), "{shown}");
    let listed = said(stack, &["ls", "--endpoint", "echo", "--json"], OK);
    let ids: Vec<Value> = listed
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON lines")["id"].clone())
        .collect();
    assert_eq!(ids[0], json!(id), "newest first");
    assert_eq!(ids.len(), 2);
    exited(stack, &["retry", &id], CONFLICT);
}

fn ends(stack: &Stack) {
    said(stack, &["submit", "timed", r#"{"seconds": 60}"#, "--wait"], JOB_TIMED_OUT);
    let id = said(stack, &["submit", "sleep", r#"{"seconds": 60}"#], OK);
    exited(stack, &["watch", &id, "--timeout", "1s"], WAIT_TIMED_OUT);
    assert!(said(stack, &["cancel", &id], OK).contains("CANCELLED"));
    assert!(said(stack, &["cancel", &id], OK).contains("CANCELLED"), "cancel is idempotent");
    exited(stack, &["watch", &id], JOB_CANCELLED);
    let again = json_of(stack, &["retry", &id, "--json"], OK);
    assert_eq!(again["run"], 2, "{again}");
    said(stack, &["cancel", &id], OK);
}

fn batches(stack: &Stack) {
    let items = stack.folder().join("items.jsonl");
    let lines: Vec<String> = (0..25).map(|n| json!({"input": {"n": n}}).to_string()).collect();
    std::fs::write(&items, lines.join("\n")).expect("write");
    let (items, results) = (items.display().to_string(), stack.folder().join("results.jsonl"));
    let file = results.display().to_string();
    let batch = json_of(stack, &["batch", "echo", &items, "--wait", "--results", &file, "--json"], OK);
    assert_eq!((&batch["total"], &batch["completed"]), (&json!(25), &json!(25)), "{batch}");
    let order: Vec<u64> = std::fs::read_to_string(results)
        .expect("results")
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).expect("JSON")["output"]["n"].as_u64().expect("a number")
        })
        .collect();
    assert_eq!(order, (0..25).collect::<Vec<_>>(), "results are in item order");
    let id = batch["batch_id"].as_str().expect("an id");
    let all = said(stack, &["ls", "--batch", id, "--all", "--json"], OK);
    assert_eq!(all.lines().count(), 25);
    std::fs::write(stack.folder().join("bad.jsonl"), "{\"input\": 1}\n{\"text\": 2}\n").expect("write");
    let output = exited(stack, &["batch", "echo", "bad.jsonl"], REFUSED);
    assert!(String::from_utf8_lossy(&output.stderr).contains("line 2"));
}

async fn purge(stack: &Stack) {
    let running = said(stack, &["submit", "narrow", r#"{"seconds": 60}"#], OK);
    stack.api.wait_status("narrow", &running, "IN_PROGRESS", SOON).await;
    for _ in 0..3 {
        said(stack, &["submit", "narrow", r#"{"seconds": 60}"#], OK);
    }
    exited(stack, &["purge", "narrow"], REFUSED);
    assert_eq!(json_of(stack, &["purge", "narrow", "--yes", "--json"], OK)["removed"], 3);
    assert_eq!(stack.api.job(&running).await["status"], "IN_PROGRESS");
    said(stack, &["cancel", &running], OK);
}

fn logs_and_failure(stack: &Stack) {
    let id = said(stack, &["submit", "plain", r#"{"mode": "log", "text": "a word"}"#], OK);
    let logs = said(stack, &["logs", &id, "--follow"], OK);
    assert!(logs.contains("a word on stderr"), "{logs}");
    let output =
        exited(stack, &["submit", "plain", r#"{"mode": "raise", "text": "no voice"}"#, "--wait"], JOB_FAILED);
    assert!(String::from_utf8_lossy(&output.stderr).contains("no voice"));
}

fn refusals(stack: &Stack) {
    exited(stack, &["submit", "nothing", "{}"], NOT_FOUND);
    exited(stack, &["submit", "echo", "{not json"], REFUSED);
    exited(stack, &["get", "0197a7b2-0000-7000-8000-000000000000"], NOT_FOUND);
    exited(stack, &["ls", "--api-key", "rb_wrong_0123456789"], DENIED);
    exited(stack, &["ls", "--url", "http://127.0.0.1:9"], UNREACHABLE);
    exited(stack, &["purge", "echo", "--yes", "--api-key", stack.other.key()], DENIED);
    let output = stack.cli(["ls", "--status", "SLEEPING"]);
    assert_eq!(output.status.code(), Some(REFUSED));
    for shell in ["bash", "zsh", "fish"] {
        assert!(said(stack, &["completion", shell], OK).contains("ringback"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_verb() {
    let mut options = Options::new(Backend::Sqlite);
    options.endpoint("timed", r#"{ builtin = "sleep" }"#, "execution_timeout_ms = 700");
    options.endpoint("narrow", r#"{ builtin = "sleep" }"#, "slots = 1");
    let python = tools::python("venv-runpod112");
    if let Some(python) = &python {
        options.process("plain", &[&python.display().to_string(), &handler("plain.py")], "");
    }
    let Some(stack) = Stack::dev(options).await else { return };
    one_job(&stack);
    ends(&stack);
    batches(&stack);
    purge(&stack).await;
    refusals(&stack);
    if python.is_some() {
        logs_and_failure(&stack);
    }
}

/// `ringback dev` alone, as the README shows it: no configuration, its own broker, found again by its data folder.
#[tokio::test(flavor = "multi_thread")]
async fn dev_without_any_configuration() {
    use ringback_test_support::client::Client;
    use ringback_test_support::files::{Folder, free_port};
    use ringback_test_support::process::{Process, Spec};
    use ringback_test_support::wait::until;
    use std::time::{Duration, Instant};

    if tools::need(
        tools::tool("bin/nats-server").exists().then_some(()),
        "nats-server",
        "run tools/setup nats",
    )
    .is_none()
    {
        return;
    }
    let folder = Folder::new("dev");
    let path = format!("{}:{}", tools::tool("bin").display(), std::env::var("PATH").expect("PATH"));
    let listen = format!("127.0.0.1:{}", free_port());
    let start = || {
        let mut spec = Spec::new("dev", tools::ringback(), folder.path()).args(["dev", "--listen", &listen]);
        spec.cwd = Some(folder.path().to_owned());
        Process::spawn(spec.env("PATH", &path))
    };
    let verb = |args: &[&str]| {
        let output = std::process::Command::new(tools::ringback())
            .args(args)
            .current_dir(folder.path())
            .env_remove("RINGBACK_URL")
            .env_remove("RINGBACK_API_KEY")
            .output()
            .expect("run ringback");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        text(&output)
    };
    let begun = Instant::now();
    let mut dev = start();
    let probe = Client::new(&format!("http://{listen}"), "");
    until("ringback dev to be ready", Duration::from_secs(20), || async {
        probe.is_ready().await.then_some(())
    })
    .await;
    println!("ready after {:?}", begun.elapsed());
    assert!(verb(&["submit", "echo", r#"{"hello": "dev"}"#, "--wait"]).contains("dev"));
    let slow = verb(&["submit", "sleep", r#"{"seconds": 2}"#]);

    // A second one in the same folder is refused by name.
    let second = std::process::Command::new(tools::ringback())
        .args(["dev", "--listen", &format!("127.0.0.1:{}", free_port())])
        .current_dir(folder.path())
        .env("PATH", &path)
        .output()
        .expect("run ringback");
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("in use by process"));

    // Killed: its broker is stale, its jobs are not lost.
    dev.kill9();
    let mut dev = start();
    until("ringback dev to be ready again", Duration::from_secs(20), || async {
        probe.is_ready().await.then_some(())
    })
    .await;
    verb(&["watch", &slow, "--timeout", "60s"]);
    let status = dev.terminate(Duration::from_secs(40));
    assert!(status.success(), "SIGTERM drains and ends in order: {status}");
    // Beyond loopback only when told so.
    let public = std::process::Command::new(tools::ringback())
        .args(["dev", "--listen", "0.0.0.0:0"])
        .current_dir(folder.path())
        .output()
        .expect("run ringback");
    assert_eq!(public.status.code(), Some(REFUSED));
}
