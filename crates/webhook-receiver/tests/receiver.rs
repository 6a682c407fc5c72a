//! The ready receiver over real sockets: what is answered, what lies on disk, what survives hostile servers.

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ringback_domain::webhook::signature::{self, SigningKey};
use ringback_test_support::wait::until;
use ringback_webhook_receiver::Router;
use serde_json::json;
use support::{Options, Rig, SECRET, Source};

#[tokio::test(flavor = "multi_thread")]
async fn a_classic_notice_is_downloaded_confirmed_and_answered() {
    let rig = Rig::start(Options::default()).await;
    let source = Source::start().await;
    let (status, answer) = rig.post("/artifacts", &source.notice("job-1", "/file", "test.wav")).await;
    let expected = json!({"success": true, "job_id": "job-1", "audioUrl": "/audio-outputs/test.wav"});
    assert_eq!((status, answer), (200, expected));
    assert_eq!(rig.file("test.wav"), b"RIFF file");
    let confirmed = &source.confirmations()[0];
    assert_eq!((&confirmed["job_id"], &confirmed["status"]), (&json!("job-1"), &json!("downloaded")));
    assert!(confirmed["timestamp"].as_i64().unwrap() > 1_700_000_000_000, "{confirmed}");
    assert_eq!(confirmed["sha256"].as_str().unwrap().len(), 64);
    let (_, about) = rig.get_json("/received/job-1").await;
    assert_eq!(
        (&about["status"], &about["audioUrl"]),
        (&json!("completed"), &json!("/audio-outputs/test.wav"))
    );
    let served = rig.get("/audio-outputs/test.wav").await;
    assert_eq!((served.status, served.body.as_ref()), (200, b"RIFF file".as_slice()));
    for (name, value) in [
        ("content-disposition", "attachment"),
        ("x-content-type-options", "nosniff"),
        ("content-type", "application/octet-stream"),
    ] {
        assert_eq!(served.headers[name], value);
    }
    assert!(served.headers["content-security-policy"].to_str().unwrap().contains("sandbox"));
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_cannot_leave_the_folder_and_never_overwrite() {
    let rig = Rig::start(Options::default()).await;
    let source = Source::start().await;
    for (n, (name, expected)) in [
        ("../../../escape.wav", "escape.wav"),
        ("/etc/cron.d/escape.wav", "escape-2.wav"),
        ("..\\..\\escape.wav", "escape-3.wav"),
        ("a\0.wav", "a_.wav"),
        (".ringback-receiver", "ringback-receiver"),
        ("..", "file"),
        ("NUL", "_NUL"),
        ("evil\u{202e}vaw.exe", "evil_vaw.exe"),
    ]
    .into_iter()
    .enumerate()
    {
        let notice = source.notice(&format!("job-{n}"), &format!("/file?n={n}"), name);
        let (status, answer) = rig.post("/webhooks", &notice).await;
        assert_eq!(
            (status, &answer["audioUrl"]),
            (200, &json!(format!("/audio-outputs/{expected}"))),
            "{name}"
        );
        assert_eq!(rig.file(expected), format!("RIFF file{n}").as_bytes(), "{name}");
    }
    let outside: Vec<_> = std::fs::read_dir(rig.parent()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(outside, ["out"], "nothing but the folder itself");
    for path in [
        "/audio-outputs/..%2f..%2fetc%2fpasswd",
        "/audio-outputs/.ringback-receiver",
        "/audio-outputs/a%00.wav",
    ] {
        assert_eq!(rig.get(path).await.status, 404, "{path}");
    }
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_servers_cost_a_deadline_and_leave_nothing() {
    let rig = Rig::start(Options {
        download_time: Duration::from_secs(2),
        max_file_bytes: 100_000,
        ..Options::default()
    })
    .await;
    let source = Source::start().await;
    for (path, reason) in [
        ("/drip", "no answer within 2000 ms"),
        ("/silent", "no answer within 2000 ms"),
        ("/endless", "larger than 100000 bytes"),
        ("/cut", "ended before an answer"),
        ("/error", "the server answered 500"),
        ("/to-metadata", "169.254.169.254"),
    ] {
        let name = format!("{}.wav", &path[1..]);
        let (status, answer) = rig.post("/artifacts", &source.notice(&path[1..], path, &name)).await;
        assert_eq!((status, &answer["success"]), (502, &json!(false)), "{path}: {answer}");
        assert!(answer["error"].as_str().unwrap().contains(reason), "{path}: {answer}");
        assert!(!rig.has(&name), "{path}");
    }
    let mut wrong = source.notice("wrong-hash", "/file", "hash.wav");
    wrong["sha256"] = json!("0".repeat(64));
    assert!(rig.post("/artifacts", &wrong).await.1["error"].as_str().unwrap().contains("sha256"));
    let mut wrong = source.notice("wrong-size", "/file", "size.wav");
    wrong["size_bytes"] = json!(3);
    assert!(rig.post("/artifacts", &wrong).await.1["error"].as_str().unwrap().contains("3 were announced"));
    let mut inside = source.notice("inside", "/file", "inside.wav");
    inside["download_url"] = json!("http://10.0.0.1/file");
    assert!(rig.post("/artifacts", &inside).await.1["error"].as_str().unwrap().contains("10.0.0.1"));
    assert!(source.confirmations().is_empty());
    assert_eq!(rig.names(), Vec::<String>::new(), "no file became visible");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_hangs_up_does_not_stop_the_download() {
    let rig = Rig::start(Options::default()).await;
    let source = Source::start().await;
    let notice = source.notice("job-1", "/gated", "late.wav");
    let impatient = tokio::time::timeout(Duration::from_millis(300), rig.post("/artifacts", &notice));
    assert!(impatient.await.is_err(), "the download is still under way");
    source.open_gate();
    until("the confirmation", support::SOON, || async { source.confirmations().into_iter().next() }).await;
    assert_eq!(rig.file("late.wav"), b"RIFF gated");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orderly_end_waits_for_the_download_under_way() {
    let rig = Rig::start(Options::default()).await;
    let source = Source::start().await;
    let notice = source.notice("job-1", "/gated", "late.wav");
    let asked = tokio::spawn(rig.posting("/artifacts", &notice));
    until("the download", support::SOON, || async { source.is_waiting().then_some(()) }).await;
    rig.shutdown();
    source.open_gate();
    let (status, answer) = asked.await.unwrap();
    assert_eq!((status, &answer["success"]), (200, &json!(true)), "{answer}");
    let dir = rig.dir();
    rig.stop().await;
    assert_eq!(std::fs::read(dir.path().join("out/late.wav")).unwrap(), b"RIFF gated");
    assert_eq!(source.confirmations().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orderly_end_waits_for_copies_behind_the_answer_too() {
    let rig = Rig::start(Options::default()).await;
    let source = Source::start().await;
    let body = json!({"event": "run.completed", "run_id": "r1", "output": [source.url("/gated")]});
    assert_eq!(rig.post_runflow("/webhooks", &body).await.0, 200);
    until("the download", support::SOON, || async { source.is_waiting().then_some(()) }).await;
    rig.shutdown();
    let dir = rig.dir();
    let ended = tokio::spawn(rig.stop());
    // The listener is closed first; the copy still goes on.
    source.open_gate();
    ended.await.unwrap();
    assert_eq!(std::fs::read(dir.path().join("out/r1-1-gated")).unwrap(), b"RIFF gated");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_file_of_the_next_attempt_is_fetched_while_the_last_ones_is_lost() {
    let rig = Rig::start(Options::default()).await;
    let (gone, source) = (Source::start().await, Source::start().await);
    assert_eq!(rig.post("/artifacts", &gone.notice("job-1", "/error", "a.wav")).await.0, 502);
    let (status, answer) = rig.post("/artifacts", &source.notice("job-1", "/file", "a.wav")).await;
    assert_eq!((status, &answer["audioUrl"]), (200, &json!("/audio-outputs/a.wav")), "{answer}");
    assert_eq!(rig.file("a.wav"), b"RIFF file");
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_sent_again_is_tried_at_once_however_long_its_next_try_is_away() {
    let rig = Rig::start(Options::default()).await;
    let source = Source::start().await;
    let notice = source.notice("job-1", "/error", "a.wav");
    // The waits grow to 30 s, which no sender has; each copy makes a try of its own.
    for copy in 1..=4 {
        let answer = tokio::time::timeout(Duration::from_secs(20), rig.post("/artifacts", &notice)).await;
        assert_eq!(answer.unwrap().0, 502, "copy {copy}");
    }
    assert!(source.downloads() >= 4, "{}", source.downloads());
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_never_answers_holds_up_nobody_else() {
    let rig = Rig::start(Options::default()).await;
    let (dead, good) = (Source::start().await, Source::start().await);
    for n in 0..60 {
        let body =
            json!({"event": "run.completed", "run_id": format!("dead-{n}"), "output": [dead.url("/silent")]});
        assert_eq!(rig.post_runflow("/webhooks", &body).await.0, 200);
    }
    until("the dead host's share to be taken", support::SOON, || async {
        (dead.downloads() >= 4).then_some(())
    })
    .await;
    let (status, answer) = rig.post("/artifacts", &good.notice("job-1", "/file", "a.wav")).await;
    assert_eq!((status, &answer["success"]), (200, &json!(true)), "{answer}");
    assert_eq!(rig.post("/webhooks", &json!({"id": "j-2", "status": "FAILED", "error": "x"})).await.0, 200);
    rig.settled("j-2").await;
    assert_eq!(dead.downloads(), 4, "a quarter of the places");
    rig.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_artifact_event_is_answered_first_and_fetched_behind() {
    let rig = Rig::start(Options { hosts: None, ..Options::default() }).await;
    let source = Source::start().await;
    let mut data = source.notice("job-1", "/gated", "speech.wav");
    data["size_bytes"] = json!(10);
    let event = json!({"id": "evt_1", "type": "artifact.ready", "created_at": "2026-11-21T12:00:00.250Z", "data": data});
    assert_eq!(rig.post_signed("/webhooks", "m", &event).await, (200, json!({"received": true})));
    source.open_gate();
    rig.settled("job-1").await;
    assert_eq!((rig.names(), source.confirmations().len()), (vec!["speech.wav".to_owned()], 1));
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_of_ones_own_replaces_ours_and_may_panic_once() {
    let tries = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&tries);
    let router = Router::new().on("runpod.*", move |received| {
        let counted = Arc::clone(&counted);
        async move {
            assert_eq!(received.attempts as usize, counted.fetch_add(1, Ordering::SeqCst));
            assert!(received.attempts > 0, "a bug that goes away");
            Ok(())
        }
    });
    let rig = Rig::start(Options { router, ..Options::default() }).await;
    assert_eq!(rig.post("/webhooks", &json!({"id": "j", "status": "COMPLETED"})).await.0, 200);
    rig.settled("j").await;
    assert_eq!((tries.load(Ordering::SeqCst), rig.names()), (2, Vec::new()));
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_confirmation_is_sent_again_without_a_second_download() {
    let rig = Rig::start(Options::default()).await;
    let source = Source::start().await;
    source.refuse_confirmations(1);
    let (status, answer) = rig.post("/artifacts", &source.notice("job-1", "/file", "a.wav")).await;
    assert_eq!((status, &answer["success"]), (200, &json!(true)), "the file is here: {answer}");
    until("the confirmation", support::SOON, || async { source.confirmations().into_iter().next() }).await;
    rig.settled("job-1").await;
    assert_eq!(source.downloads(), 1);
    // Sent again on purpose: the next attempt of a job may have made another file.
    rig.post("/artifacts", &source.notice("job-1", "/file", "a.wav")).await;
    assert_eq!((source.downloads(), rig.names()), (2, vec!["a.wav".to_owned()]));
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_callback_keeps_result_and_audio_and_bears_duplicates() {
    let rig = Rig::start(Options::default()).await;
    let audio = STANDARD.encode(b"RIFF\0\0\0\0WAVEfmt ");
    let body = json!({"id": "j-1", "status": "COMPLETED", "delayTime": 1, "executionTime": 2,
        "output": {"audio_base64": audio}});
    for _ in 0..3 {
        assert_eq!(rig.post("/api/tts/callback", &body).await, (200, json!({"acknowledged": true})));
    }
    rig.settled("j-1").await;
    assert_eq!(rig.names(), ["j-1.json", "j-1.wav"]);
    assert_eq!(rig.file("j-1.wav"), b"RIFF\0\0\0\0WAVEfmt ");
    assert_eq!(rig.file("j-1.json"), body.to_string().as_bytes(), "verbatim");
    // A failure has its reason in either place; what nobody can read is acknowledged and kept.
    let failed = json!({"id": "j-2", "status": "FAILED", "output": {"error": "no voice"}});
    assert_eq!(rig.post("/api/tts/callback", &failed).await.0, 200);
    rig.settled("j-2").await;
    assert_eq!(
        rig.post("/api/tts/callback", &json!({"what": "is this"})).await,
        (200, json!({"acknowledged": true}))
    );
    let given_up =
        || async { (rig.get_json("/webhooks/metrics").await.1["events_given_up"] == 1).then_some(()) };
    until("the unreadable one to be kept", support::SOON, given_up).await;
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_and_its_linked_files_are_copied_behind_the_answer() {
    let rig = Rig::start(Options::default()).await;
    let source = Source::start().await;
    let body = json!({"event": "run.completed", "run_id": "r1", "status": "succeeded", "output": {
        "images": [{"url": source.url("/file?sig=canary")}, {"url": source.url("/gated")}]}});
    assert_eq!(rig.post_runflow("/webhooks", &body).await, (200, json!({"received": true})));
    until("the first copy", support::SOON, || async { rig.has("r1-1-file").then_some(()) }).await;
    assert_eq!(rig.post_runflow("/webhooks", &body).await.0, 200, "a duplicate while it is worked off");
    source.open_gate();
    rig.settled("r1").await;
    assert_eq!(rig.names(), ["r1-1-file", "r1-2-gated", "r1.json"]);
    let (_, about) = rig.get_json("/received/r1").await;
    assert_eq!(about["events"].as_array().unwrap().len(), 1, "{about}");
    assert!(!rig.steps().contains("canary"), "no URL's query in what is told:\n{}", rig.steps());
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_styles_of_endpoints_and_their_refusals() {
    let rig = Rig::start(Options::default()).await;
    let event = |id: &str, kind: &str| {
        json!({"id": id, "type": kind, "created_at": "2026-11-21T10:00:00Z",
            "data": {"completion_id": "c", "model": "m", "metric": "m", "current_usage": 1, "limit": 2}})
    };
    let received = (200, json!({"received": true}));
    for path in ["/", "/webhooks", "/webhooks/completion", "/v1/webhooks/completion.finished"] {
        assert_eq!(
            rig.post_signed(path, "completion.finished", &event(path, "completion.finished")).await,
            received
        );
    }
    for path in ["/webhooks/batch", "/v1/webhooks/completion.failed", "/artifacts"] {
        let (status, problem) = rig.post_signed(path, "x", &event("x", "completion.finished")).await;
        assert_eq!((status, &problem["code"]), (400, &json!("wrong_route")), "{path}");
    }
    let (status, problem) = rig
        .post_signed(
            "/webhooks",
            "bad",
            &json!({"id": "e", "type": "usage.limit_warning", "created_at": "t", "data": {}}),
        )
        .await;
    assert!(status == 400 && problem["detail"].as_str().unwrap().contains("metric"), "{problem}");
    assert_eq!(rig.get("/webhooks").await.status, 405);
    assert_eq!(rig.get("/nowhere").await.status, 404);
    assert_eq!(rig.post_as("/webhooks", "text/plain", "{}").await, 415);
    rig.post_signed("/webhooks", "galaxy", &event("g", "galaxy.born")).await;
    let body = until("the events to be worked off", support::SOON, || async {
        let body = rig.get_json("/webhooks/metrics").await.1;
        (body["events_processed"] == 4 && body["unhandled_events"] == 1).then_some(body)
    })
    .await;
    assert_eq!((&body["events_received"], &body["events_failed"]), (&json!(5), &json!(0)));
    assert!(body["avg_processing_time_ms"].is_number() && body["registered_handlers"].as_u64().unwrap() >= 9);
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_an_old_timestamp_and_an_altered_body_are_refused() {
    let rig = Rig::start(Options { hosts: None, ..Options::default() }).await;
    let body = json!({"id": "j", "status": "FAILED"}).to_string();
    let now = ringback_service_runtime::time::now_ms() / 1000;
    let sign = |secret: &str, at: i64, body: &str| {
        signature::sign(&[SigningKey::parse(secret).unwrap().0], "m", at, body.as_bytes())
    };
    for (signature, at, status, code) in [
        (sign(SECRET, now, &body), now, 200, ""),
        (sign("whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", now, &body), now, 401, "no_match"),
        (sign(SECRET, now - 400, &body), now - 400, 401, "too_old"),
        (sign(SECRET, now + 400, &body), now + 400, 401, "too_new"),
        (sign(SECRET, now, "{}"), now, 401, "no_match"),
    ] {
        let at = at.to_string();
        let headers =
            [("webhook-id", "m"), ("webhook-timestamp", at.as_str()), ("webhook-signature", &signature)];
        let (got, answer) = rig.post_with("/webhooks", &headers, &body).await;
        assert_eq!((got, answer["code"].as_str().unwrap_or_default()), (status, code));
    }
    let (status, answer) = rig.post_with("/webhooks", &[], &body).await;
    assert_eq!((status, &answer["code"]), (401, &json!("unsigned")));
    rig.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_cannot_be_written_answers_no_success_and_is_tried_again() {
    let rig = Rig::start(Options::default()).await;
    let source = Source::start().await;
    // Not by permissions, which root does not feel: the place for unfinished files is gone.
    let parts = rig.dir().path().join("out/.ringback-receiver/parts");
    std::fs::remove_dir(&parts).unwrap();
    let (status, answer) = rig.post("/artifacts", &source.notice("job-1", "/file", "a.wav")).await;
    assert_eq!(status, 502);
    assert!(answer["error"].as_str().unwrap().contains("cannot be saved"), "{answer}");
    std::fs::create_dir(&parts).unwrap();
    until("the next try", support::SOON, || async { source.confirmations().into_iter().next() }).await;
    assert_eq!(rig.file("a.wav"), b"RIFF file");
    rig.stop().await;
}
