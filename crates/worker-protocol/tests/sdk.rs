//! The real Python SDK against the real router, in both lines of the protocol.

mod support;

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use ringback_worker_protocol::{
    ChildEvent, ChildHandle, ChildIdentity, ErrorKind, HandlerResult, Hub, HubConfig, Offer, Registration,
    StopOutcome, environment, job_json, router,
};
use serde_json::{Value, json};
use support::{HandlerProcess, Sdk, python};
use tokio::sync::mpsc::UnboundedReceiver;

struct Rig {
    process: HandlerProcess,
    handle: ChildHandle,
    events: UnboundedReceiver<ChildEvent>,
    _folder: tempfile::TempDir,
}

impl Rig {
    async fn start(sdk: Sdk, script: &str, args: &[&str], max_jobs: usize) -> Option<Self> {
        let python = python(sdk)?;
        // A short hold keeps the tests quick and also exercises the 204.
        let hub = Hub::new(HubConfig { hold: Duration::from_secs(2), ..HubConfig::default() });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let base_url = format!("http://{}", listener.local_addr().expect("address"));
        let app = router(hub.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        let identity = ChildIdentity {
            base_url,
            endpoint: "tts".into(),
            worker_id: "w-1".into(),
            token: "t0k3n".into(),
            device: "cpu".into(),
            ping_interval_ms: 1000,
        };
        let (handle, events) = hub
            .register(Registration {
                worker_id: "w-1".into(),
                endpoint: "tts".into(),
                token: "t0k3n".into(),
                max_jobs,
            })
            .expect("registered");
        let folder = tempfile::tempdir().expect("folder");
        let process = HandlerProcess::start(&python, script, args, &environment(&identity), folder.path());
        Some(Self { process, handle, events, _folder: folder })
    }

    fn assign(&self, id: &str, input: &Value) {
        let input = input.to_string();
        let extras = [("webhook", b"\"https://x/y\"".as_slice())];
        let payload = job_json(id, input.as_bytes(), extras);
        self.handle.assign(Offer { id: id.into(), payload }).expect("assigned");
    }

    /// The next event that `pick` wants; others are dropped.
    async fn event<T>(&mut self, what: &str, mut pick: impl FnMut(ChildEvent) -> Option<T>) -> T {
        let search = async {
            while let Some(event) = self.events.recv().await {
                if let Some(found) = pick(event) {
                    return found;
                }
            }
            panic!("the hub closed before: {what}");
        };
        match tokio::time::timeout(Duration::from_secs(40), search).await {
            Ok(found) => found,
            Err(_) => panic!("no event: {what}"),
        }
    }

    async fn result(&mut self, id: &str) -> HandlerResult {
        self.event(&format!("result of {id}"), |event| match event {
            ChildEvent::Result { job, result } if job == id => Some(result),
            ChildEvent::Lost { jobs } => panic!("lost {jobs:?}"),
            _ => None,
        })
        .await
    }

    async fn run(&mut self, id: &str, input: Value) -> HandlerResult {
        self.assign(id, &input);
        self.result(id).await
    }
}

fn value(result: &HandlerResult) -> Value {
    serde_json::from_slice(result.output.as_ref().expect("output")).expect("JSON")
}

fn error(result: &HandlerResult) -> (&str, &ErrorKind) {
    let error = result.error.as_ref().expect("failed");
    (error.text.as_str(), &error.kind)
}

async fn both<F: Future<Output = ()>>(test: impl Fn(Sdk) -> F) {
    for sdk in [Sdk::V1_12, Sdk::V1_7] {
        test(sdk).await;
    }
}

#[tokio::test]
async fn every_result_body() {
    both(|sdk| async move {
        let Some(mut rig) = Rig::start(sdk, "plain.py", &[], 1).await else { return };
        let version = rig
            .event("first contact", |event| match event {
                ChildEvent::FirstContact { sdk } => Some(sdk),
                _ => None,
            })
            .await;
        // The first request may be a ping, which does not tell the version.
        if let Some(version) = version {
            assert!(version.takes_in_turn(), "{version}");
        }
        let input = json!({"text": "Zürich \u{1F600}", "n": 1.5, "deep": [[{"a": null}]]});
        assert_eq!(value(&rig.run("echo", input.clone()).await), input);
        let job = value(&rig.run("job", json!({"mode": "job"})).await);
        assert_eq!(job, json!({"id": "job", "webhook": "https://x/y"}));
        assert_eq!(value(&rig.run("none", json!({"mode": "none"})).await), Value::Null);
        assert_eq!(rig.run("empty", json!({"mode": "empty"})).await, HandlerResult::default());

        let result = rig.run("raise", json!({"mode": "raise", "text": "bad voice"})).await;
        let (text, kind) = error(&result);
        assert!(text.contains("error_traceback"), "{text}");
        let ErrorKind::Exception { error_type, message } = kind else { panic!("{kind:?}") };
        assert_eq!((error_type.as_str(), message.as_str()), ("<class 'ValueError'>", "bad voice"));

        let result = rig.run("error", json!({"mode": "error"})).await;
        assert_eq!(error(&result), ("no such voice", &ErrorKind::Returned));
        let result = rig.run("beside", json!({"mode": "error_beside"})).await;
        assert_eq!(error(&result).0, "half done");
        assert_eq!(value(&result), json!({"kept": 1}));
        let result = rig.run("nan", json!({"mode": "nan"})).await;
        assert_eq!(error(&result).1, &ErrorKind::Unreadable);

        // The same id may come again after it ended: a retry of the job.
        assert_eq!(value(&rig.run("echo", json!({"again": true})).await), json!({"again": true}));
    })
    .await;
}

#[tokio::test]
async fn output_of_30_megabytes() {
    both(|sdk| async move {
        let Some(mut rig) = Rig::start(sdk, "plain.py", &[], 1).await else { return };
        let result = rig.run("big", json!({"mode": "big", "mb": 30})).await;
        let output = result.output.expect("output");
        assert!(output.len() > 30 * 1024 * 1024, "{}", output.len());
    })
    .await;
}

#[tokio::test]
async fn a_result_over_the_limit_fails_with_the_limit() {
    let Some(mut rig) = Rig::start(Sdk::V1_12, "plain.py", &[], 1).await else { return };
    let result = rig.run("huge", json!({"mode": "big", "mb": 70})).await;
    assert_eq!(error(&result).1, &ErrorKind::TooLarge);
    assert!(error(&result).0.contains("67108864"), "{}", error(&result).0);
    // The child is none the worse for it.
    assert_eq!(value(&rig.run("next", json!({"a": 1})).await), json!({"a": 1}));
}

#[tokio::test]
async fn unserialisable_output_is_found_by_the_lost_job_rule() {
    both(|sdk| async move {
        let Some(mut rig) = Rig::start(sdk, "plain.py", &[], 1).await else { return };
        rig.assign("u", &json!({"mode": "unserialisable"}));
        let lost = rig
            .event("lost", |event| match event {
                ChildEvent::Lost { jobs } => Some(jobs),
                ChildEvent::Result { result, .. } => panic!("{result:?}"),
                _ => None,
            })
            .await;
        assert_eq!(lost, ["u"]);
        assert!(rig.process.log().contains("Error while returning job result"));
        assert_eq!(value(&rig.run("next", json!({"a": 1})).await), json!({"a": 1}));
    })
    .await;
}

#[tokio::test]
async fn progress_comes_before_the_result() {
    both(|sdk| async move {
        let Some(mut rig) = Rig::start(sdk, "plain.py", &[], 1).await else { return };
        rig.assign("p", &json!({"mode": "progress", "steps": 2, "pause": 1.0}));
        for step in 0..2 {
            let output = rig
                .event("progress", |event| match event {
                    ChildEvent::Progress { job, output } if job == "p" => Some(output),
                    _ => None,
                })
                .await;
            assert_eq!(output, Bytes::from(format!("{{\"step\": {step}}}")));
        }
        assert_eq!(value(&rig.result("p").await), json!({"steps": 2}));
    })
    .await;
}

#[tokio::test]
async fn generators_stream_in_order() {
    both(|sdk| async move {
        for args in [&[][..], &["--aggregate"], &["--async"], &["--async", "--aggregate"]] {
            let Some(mut rig) = Rig::start(sdk, "generator.py", args, 1).await else { return };
            rig.assign("g", &json!({"count": 5}));
            for n in 0..5 {
                let chunk = rig
                    .event("chunk", |event| match event {
                        ChildEvent::Chunk { output, .. } => Some(output),
                        ChildEvent::Result { result, .. } => panic!("result too early {result:?}"),
                        _ => None,
                    })
                    .await;
                assert_eq!(serde_json::from_slice::<Value>(&chunk).expect("JSON")["n"], n);
            }
            let result = rig.result("g").await;
            let expected = if args.contains(&"--aggregate") { 5 } else { 0 };
            assert_eq!(value(&result).as_array().map(Vec::len), Some(expected), "{args:?}");

            let result = rig.run("fails", json!({"count": 3, "fail_at": 1})).await;
            assert!(error(&result).0.starts_with("handler: failed at 1"), "{result:?}");
            let result = rig.run("yields", json!({"count": 3, "error_at": 2})).await;
            assert_eq!(error(&result).0, "error at 2");
        }
    })
    .await;
}

#[tokio::test]
async fn a_concurrent_handler_takes_a_batch_and_never_more_than_its_limit() {
    both(|sdk| async move {
        let Some(mut rig) = Rig::start(sdk, "concurrency.py", &["--concurrency", "4"], 3).await else {
            return;
        };
        rig.event("ready", |event| matches!(event, ChildEvent::Ready { .. }).then_some(())).await;
        assert_eq!(rig.handle.open_slots(), 3);
        for id in ["a", "b", "c"] {
            rig.assign(id, &json!({"seconds": 2.0}));
        }
        let extra = Offer { id: "d".into(), payload: job_json("d", b"{}", []) };
        assert!(rig.handle.assign(extra).is_err());
        let mut peak = 0;
        for _ in 0..3 {
            let result = rig
                .event("result", |event| match event {
                    ChildEvent::Result { result, .. } => Some(result),
                    ChildEvent::Lost { jobs } => panic!("lost {jobs:?}"),
                    _ => None,
                })
                .await;
            peak = peak.max(value(&result)["peak"].as_u64().expect("peak"));
        }
        assert_eq!(peak, 3);
    })
    .await;
}

#[tokio::test]
async fn an_async_handler_stops_and_the_stop_is_confirmed() {
    let Some(mut rig) = Rig::start(Sdk::V1_12, "async_handler.py", &[], 1).await else { return };
    let folder = tempfile::tempdir().expect("folder");
    let note = folder.path().join("cancelled");
    rig.assign("slow", &json!({"seconds": 600, "cancel_file": note}));
    rig.event("taken", |event| matches!(event, ChildEvent::Taken { .. }).then_some(())).await;
    assert!(matches!(rig.handle.stop("slow"), StopOutcome::Signalled { .. }));
    let lost = rig
        .event("stopped", |event| match event {
            ChildEvent::Lost { jobs } => Some(jobs),
            _ => None,
        })
        .await;
    assert_eq!(lost, ["slow"]);
    assert!(note.exists(), "the handler saw its cancellation");
    assert_eq!(value(&rig.run("next", json!({})).await), json!({"waited": 0}));
}

#[tokio::test]
async fn refresh_asks_for_a_fresh_process() {
    both(|sdk| async move {
        for script in ["plain.py", "refresh_config.py"] {
            let Some(mut rig) = Rig::start(sdk, script, &[], 1).await else { return };
            let result = rig.run("r", json!({"mode": "refresh"})).await;
            assert!(result.stop_pod);
            rig.event("stop pod", |event| matches!(event, ChildEvent::StopPodRequested { .. }).then_some(()))
                .await;
            let offer = Offer { id: "s".into(), payload: job_json("s", b"{}", []) };
            assert!(rig.handle.assign(offer).is_err());
            if script == "refresh_config.py" {
                let mut status = None;
                let started = std::time::Instant::now();
                while status.is_none() && started.elapsed() < Duration::from_secs(10) {
                    status = rig.process.child.try_wait().expect("wait");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                assert!(status.is_some_and(|status| status.success()), "{status:?}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_foreign_key_gets_429_and_is_told() {
    let Some(python) = python(Sdk::V1_12) else { return };
    let Some(mut rig) = Rig::start(Sdk::V1_12, "plain.py", &[], 1).await else { return };
    // The same address with another key: what a leftover ~/.runpod/config.toml in an image does.
    let folder = tempfile::tempdir().expect("folder");
    std::fs::create_dir(folder.path().join(".runpod")).expect("folder");
    std::fs::write(folder.path().join(".runpod/config.toml"), "[default]\napi_key = \"other\"\n")
        .expect("file");
    rig.event("ready", |event| matches!(event, ChildEvent::Ready { .. }).then_some(())).await;
    let env: Vec<(&str, String)> =
        std::fs::read_to_string(format!("/proc/{}/environ", rig.process.child.id()))
            .expect("environ")
            .split('\0')
            .filter_map(|pair| pair.split_once('='))
            .filter(|(name, _)| name.starts_with("RUNPOD_"))
            .map(|(name, value)| (&*Box::leak(name.to_owned().into_boxed_str()), value.to_owned()))
            .collect();
    let _other = HandlerProcess::start(&python, "plain.py", &[], &env, folder.path());
    rig.event("wrong key", |event| matches!(event, ChildEvent::WrongKey).then_some(())).await;
}
