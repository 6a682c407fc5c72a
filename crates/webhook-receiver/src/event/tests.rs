use serde_json::{Value, json};

use super::*;

fn parse(value: &Value) -> Result<Event, ParseError> {
    Event::parse(value.to_string().as_bytes())
}

fn event(kind: &str, data: &Value) -> Value {
    json!({"id": "evt_1", "type": kind, "created_at": "2026-11-21T10:00:00Z", "data": data})
}

fn standard(value: &Value) -> StandardEvent {
    match parse(value).unwrap() {
        Event::Standard(event) => *event,
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_type_of_the_catalogue_is_typed() {
    let completion = json!({"completion_id": "c1", "model": "m", "prompt_tokens": 3, "completion_tokens": 4,
        "total_tokens": 7, "finish_reason": "stop", "content": "hi", "request_id": "mine"});
    let batch = json!({"batch_id": "b1", "status": "completed", "total_requests": 2, "completed": 2, "failed": 0,
        "output_file_id": "f1", "error_file_id": null, "processing_time_seconds": 1.5});
    let usage = json!({"metric": "tokens", "current_usage": 80, "limit": 100, "percentage": 80.0,
        "reset_at": "2026-12-01T00:00:00Z"});
    for kind in ["started", "streaming", "finished", "failed"] {
        let EventData::Completion(data) = standard(&event(&format!("completion.{kind}"), &completion)).data
        else {
            panic!("{kind}");
        };
        assert_eq!((data.total_tokens, data.request_id.as_deref()), (Some(7), Some("mine")));
    }
    for kind in ["created", "processing", "completed", "failed", "cancelled"] {
        let EventData::Batch(data) = standard(&event(&format!("batch.{kind}"), &batch)).data else {
            panic!("{kind}");
        };
        assert_eq!((data.total_requests, data.processing_time_seconds), (Some(2), Some(1.5)));
    }
    for kind in ["limit_warning", "limit_exceeded"] {
        let EventData::Usage(data) = standard(&event(&format!("usage.{kind}"), &usage)).data else {
            panic!("{kind}");
        };
        assert_eq!((data.current_usage, data.limit), (80.0, 100.0));
    }
    for kind in ["updated", "deprecated"] {
        let data = standard(&event(&format!("model.{kind}"), &json!({"model": "m", "successor": "n"}))).data;
        assert!(matches!(data, EventData::Model(ModelData { successor: Some(_), .. })));
    }
    let data =
        standard(&event("artifact.ready", &json!({"job_id": "j", "download_url": "https://x/y"}))).data;
    assert_eq!(data.subject(), Some("j"));
}

#[test]
fn defaults_and_unknown_types() {
    let known =
        standard(&event("usage.limit_warning", &json!({"metric": "m", "current_usage": 1, "limit": 2})));
    assert_eq!((known.api_version.as_str(), known.source), (DEFAULT_API_VERSION, None));
    let mut other = event("galaxy.born", &json!({"stars": 7}));
    other["api_version"] = json!("2026-01-01");
    other["source"] = json!("here");
    other["created_at"] = json!(1_763_719_200);
    let other = standard(&other);
    assert!(matches!(other.data, EventData::Unknown));
    assert_eq!(other.payload.get(), r#"{"stars":7}"#);
    assert_eq!((other.api_version.as_str(), other.source.as_deref()), ("2026-01-01", Some("here")));
    assert_eq!(other.created_at, CreatedAt::Unix(1_763_719_200.0));
}

#[test]
fn invalid_payloads_are_refused_with_the_field() {
    let mut no_id = event("x.y", &json!({}));
    no_id.as_object_mut().unwrap().remove("id");
    let mut no_time = event("x.y", &json!({}));
    no_time.as_object_mut().unwrap().remove("created_at");
    for (body, expected) in [
        (no_id, "missing field `id`"),
        (no_time, "missing field `created_at`"),
        (event("x.y", &json!([1])), "data must be an object"),
        (json!({"id": 1, "type": "a", "created_at": "t", "data": {}}), "expected a string"),
        (json!({"id": "", "type": "a", "created_at": "t", "data": {}}), "id must have"),
        (event("completion.finished", &json!({"model": "m"})), "completion_id"),
        (event("batch.completed", &json!({"batch_id": "b"})), "status"),
        (event("usage.limit_warning", &json!({"metric": "m", "current_usage": "8", "limit": 1})), "f64"),
        (json!({"event": "run.completed", "run_id": 7}), "expected a string"),
        (json!({"event": "", "run_id": "r"}), "event must have"),
        (json!({"id": "j", "status": "DONE"}), "IN_QUEUE, IN_PROGRESS"),
        (json!({"id": "j\n", "status": "FAILED"}), "id must have"),
        (json!({"job_id": "j", "download_url": "u", "confirmation_url": "u"}), "filename"),
        (
            json!({"job_id": "j", "download_url": "u", "confirmation_url": "u", "filename": "f", "sha256": "x"}),
            "sha256",
        ),
        (json!({"hello": "world"}), "no event"),
        (json!([1, 2]), "not a JSON object"),
    ] {
        let error = parse(&body).unwrap_err().to_string();
        assert!(error.contains(expected), "{body}: {error}");
    }
    assert!(matches!(Event::parse(b"{"), Err(ParseError::Json(_))));
}

#[test]
fn a_job_as_runpod_tells_it() {
    let body = json!({"id": "j-1", "status": "COMPLETED", "delayTime": 5, "executionTime": 7.0,
        "output": {"audio_base64": "UklGRg=="}, "input": {}, "webhook": "https://x"});
    let event = parse(&body).unwrap();
    assert_eq!((event.kind().as_str(), event.own_key().as_str()), ("runpod.completed", "job:j-1:COMPLETED"));
    assert_eq!(event.ended_job(), Some(("j-1", JobStatus::Completed)));
    let Event::Runpod(job) = &event else { panic!() };
    assert_eq!((job.delay_time_ms, job.execution_time_ms), (Some(5), Some(7)));
    assert_eq!(job.audio_base64().as_deref(), Some("UklGRg=="));
    assert_eq!(
        event.payload_keys(),
        ["delayTime", "executionTime", "id", "input", "output", "status", "webhook"]
    );
}

#[test]
fn the_reason_of_a_failure_is_found_in_either_place() {
    for (body, expected) in [
        (json!({"id": "j", "status": "FAILED", "error": "one", "output": {"error": "two"}}), Some("one")),
        (json!({"id": "j", "status": "FAILED", "output": {"error": "two"}}), Some("two")),
        (json!({"id": "j", "status": "TIMED_OUT", "error": {"code": 3}}), Some("{\"code\":3}")),
        (json!({"id": "j", "status": "CANCELLED", "error": null}), None),
        (json!({"id": "j", "status": "COMPLETED", "output": {"error": "data"}}), None),
    ] {
        let Event::Runpod(job) = parse(&body).unwrap() else { panic!() };
        assert_eq!(job.error.as_deref(), expected, "{body}");
    }
}

#[test]
fn runs_and_batches_as_runflow_tells_them() {
    let body = json!({"event": "run.completed", "run_id": "r1", "status": "succeeded", "metadata": null,
        "output": {"images": [{"url": "https://a/1.png"}, {"url": "https://a/2.png"}, {"url": "https://a/1.png"}]}});
    let event = parse(&body).unwrap();
    assert_eq!(
        (event.kind().as_str(), event.own_key().as_str()),
        ("runflow.run.completed", "run:r1:run.completed")
    );
    let Event::Runflow(callback) = &event else { panic!() };
    assert_eq!(callback.links(10).unwrap(), ["https://a/1.png", "https://a/2.png"]);
    assert_eq!(callback.links(1).unwrap(), ["https://a/1.png"]);
    let batch =
        parse(&json!({"event": "batch.succeeded", "batch_id": "b1", "output": {"total": 1}})).unwrap();
    assert_eq!((batch.own_key().as_str(), batch.subject()), ("batch:b1:batch.succeeded", Some("b1")));
    assert_eq!(batch.ended_job(), None);
}

#[test]
fn our_own_batch_callback_and_the_classic_notice() {
    let body = json!({"batch_id": "b1", "status": "COMPLETED", "total": 3, "completed": 2, "failed": 1,
        "cancelled": 0, "result_url": "https://x/r"});
    let batch = parse(&body).unwrap();
    assert_eq!(batch.kind(), "ringback.batch.completed");
    let body = json!({"job_id": "j", "download_url": "http://h/a", "confirmation_url": "http://h/c", "filename": "../x"});
    let notice = parse(&body).unwrap();
    assert_eq!(notice.kind(), "artifact.notice");
    assert!(notice.own_key().starts_with("artifact:j:../x:"), "{}", notice.own_key());
    let mut elsewhere = body;
    elsewhere["download_url"] = json!("http://other/a");
    assert_ne!(
        parse(&elsewhere).unwrap().own_key(),
        notice.own_key(),
        "the next attempt offers another file"
    );
}

#[test]
fn what_is_inside_may_be_any_json() {
    let body = br#"{"id":"j","status":"COMPLETED","output":{"n":1e400,"audio_base64":"UklG"}}"#;
    let Event::Runpod(job) = Event::parse(body).unwrap() else { panic!() };
    assert_eq!(job.output.as_ref().unwrap().get(), r#"{"n":1e400,"audio_base64":"UklG"}"#);
    assert_eq!(job.audio_base64().as_deref(), Some("UklG"));
    let body =
        br#"{"id":"e","type":"job.completed","created_at":"t","data":{"job_id":"j","output":[1e400]}}"#;
    let event = Event::parse(body).unwrap();
    assert_eq!(
        (event.ended_job(), event.payload_keys()),
        (Some(("j", JobStatus::Completed)), vec!["job_id".into(), "output".into()])
    );
    for output in ["null", "7", "\"text\"", "[]"] {
        let body = format!(r#"{{"id":"j","status":"FAILED","output":{output}}}"#);
        let Event::Runpod(job) = Event::parse(body.as_bytes()).unwrap() else { panic!() };
        assert_eq!((job.error.as_deref(), job.audio_base64().is_some()), (None, false));
    }
}

proptest::proptest! {
    #[test]
    fn no_body_makes_it_panic(body in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
        let _ = Event::parse(&body);
    }
}

#[test]
fn work_is_told_apart_by_the_host_that_it_waits_for() {
    let notice = json!({"job_id": "j", "download_url": "http://pod-7:8000/a", "confirmation_url": "x", "filename": "f"});
    let run = json!({"event": "run.completed", "run_id": "r", "output": ["https://cdn.test/1", "https://other.test/2"]});
    let ready = event("artifact.ready", &json!({"job_id": "j", "download_url": "https://Store.test/x"}));
    for (body, lane) in [
        (notice, "pod-7:8000"),
        (run, "cdn.test:443"),
        (ready, "store.test:443"),
        (json!({"id": "j", "status": "COMPLETED", "output": "https://cdn.test/1"}), ""),
        (json!({"job_id": "j", "download_url": "nonsense", "confirmation_url": "x", "filename": "f"}), ""),
    ] {
        assert_eq!(parse(&body).unwrap().lane(), lane, "{body}");
    }
}

/// Every example of the catalogue that Ringback sends.
#[test]
fn what_ringback_sends_is_typed() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../contracts/src/catalogue");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        let entry: Value = serde_json::from_str(&text).unwrap();
        let event = standard(&entry["example"]);
        let operational = ["worker", "webhook", "delivery"].contains(&event.family());
        assert_eq!(matches!(event.data, EventData::Unknown), operational, "{}", event.kind);
        count += 1;
    }
    assert!(count > 20, "{count}");
}
