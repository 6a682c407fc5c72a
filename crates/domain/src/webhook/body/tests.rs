//! Bodies, byte for byte.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn text(body: &Body) -> &str {
    std::str::from_utf8(body.as_inline().unwrap()).unwrap()
}

fn value(body: &Body) -> Value {
    serde_json::from_slice(body.as_inline().unwrap()).unwrap()
}

fn failed(output: Option<&'static [u8]>) -> Body {
    terminal(&Terminal {
        id: "j",
        status: JobStatus::Failed,
        delay_time_ms: 1,
        execution_time_ms: 2,
        output: output.map(Json::Inline),
        error: Some("no voice"),
        echo: None,
    })
}

#[test]
fn earlier_states_have_the_orchestrators_bodies() {
    assert_eq!(text(&in_queue("a-1")), r#"{"id":"a-1","status":"IN_QUEUE"}"#);
    assert_eq!(text(&in_progress("a-1", 17)), r#"{"id":"a-1","status":"IN_PROGRESS","delayTime":17}"#);
}

#[test]
fn a_completed_job_has_runpods_body_with_input_and_output_verbatim() {
    let body = terminal(&Terminal {
        id: "a-1",
        status: JobStatus::Completed,
        delay_time_ms: 0,
        execution_time_ms: 12,
        output: Some(Json::Inline(b"{ \"b\":1e400,\"a\":0.10 }")),
        error: Some("ignored"),
        echo: Some(Echo { input: Json::Inline(b"[ 1,  2 ]"), webhook: "https://x.test/h?a=\"" }),
    });
    assert_eq!(
        text(&body),
        r#"{"delayTime":0,"executionTime":12,"id":"a-1","input":[ 1,  2 ],"output":{ "b":1e400,"a":0.10 },"status":"COMPLETED","webhook":"https://x.test/h?a=\""}"#
    );
}

#[test]
fn a_completed_job_without_output_says_null() {
    let body = terminal(&Terminal {
        id: "a",
        status: JobStatus::Completed,
        delay_time_ms: 0,
        execution_time_ms: 0,
        output: None,
        error: None,
        echo: None,
    });
    assert_eq!(
        text(&body),
        r#"{"delayTime":0,"executionTime":0,"id":"a","output":null,"status":"COMPLETED"}"#
    );
}

#[test]
fn a_failure_shows_its_reason_in_both_places() {
    let cases: [(Option<&'static [u8]>, Value); 8] = [
        (None, json!({"error": "no voice"})),
        (Some(b"null"), json!({"error": "no voice"})),
        (Some(b"{}"), json!({"error": "no voice"})),
        (Some(b" { } "), json!({"error": "no voice"})),
        (Some(b"{\"part\": 1}"), json!({"error": "no voice", "part": 1})),
        (Some(b"{\"error\": {\"code\": 3}}"), json!({"error": {"code": 3}})),
        (Some(b"[1,2]"), json!({"error": "no voice", "output": [1, 2]})),
        (Some(b"{\"deep\":{\"error\":1}}"), json!({"error": "no voice", "deep": {"error": 1}})),
    ];
    for (output, expected) in cases {
        let body = value(&failed(output));
        assert_eq!(body["error"], "no voice");
        assert_eq!(body["output"], expected);
        assert_eq!((body["delayTime"].as_u64(), body["executionTime"].as_u64()), (Some(1), Some(2)));
    }
}

#[test]
fn a_job_that_was_cancelled_without_words_still_has_an_error() {
    for status in [JobStatus::Failed, JobStatus::Cancelled, JobStatus::TimedOut] {
        let body = value(&terminal(&Terminal {
            id: "a",
            status,
            delay_time_ms: 0,
            execution_time_ms: 0,
            output: None,
            error: None,
            echo: None,
        }));
        assert!(!body["error"].as_str().unwrap().is_empty());
        assert_eq!(body["error"], body["output"]["error"]);
    }
}

#[test]
fn each_format_has_its_body_for_each_state() {
    let told = |status| Terminal {
        id: "a",
        status,
        delay_time_ms: 4,
        execution_time_ms: 5,
        output: Some(Json::Inline(b"7")),
        error: None,
        echo: Some(Echo { input: Json::Inline(b"{}"), webhook: "https://x.test/" }),
    };
    let body = |format, status| value(&of_transition(format, &told(status)));
    assert_eq!(
        body(BodyFormat::RunpodWebhookV2, JobStatus::InQueue),
        json!({"id": "a", "status": "IN_QUEUE"})
    );
    assert_eq!(
        body(BodyFormat::RunpodWebhookV2, JobStatus::InProgress),
        json!({"id": "a", "status": "IN_PROGRESS", "delayTime": 4})
    );
    assert_eq!(
        body(BodyFormat::RunpodWebhookV2, JobStatus::Completed),
        json!({"id": "a", "status": "COMPLETED", "delayTime": 4, "executionTime": 5, "output": 7})
    );
    assert_eq!(
        body(BodyFormat::RunpodWebhook, JobStatus::Completed),
        json!({"id": "a", "status": "COMPLETED", "delayTime": 4, "executionTime": 5, "output": 7,
               "input": {}, "webhook": "https://x.test/"})
    );
}

#[test]
fn large_pieces_are_referred_to_and_not_copied() {
    let body = terminal(&Terminal {
        id: "a",
        status: JobStatus::Completed,
        delay_time_ms: 0,
        execution_time_ms: 0,
        output: Some(Json::Blob { key: "out/a/1", size_bytes: 30_000_000 }),
        error: None,
        echo: Some(Echo { input: Json::Blob { key: "in/a", size_bytes: 5 }, webhook: "https://x.test/" }),
    });
    let parts = body.parts();
    assert_eq!(parts.len(), 5);
    assert_eq!(parts[1], Part::Blob { key: "in/a".into(), size_bytes: 5 });
    assert_eq!(parts[3], Part::Blob { key: "out/a/1".into(), size_bytes: 30_000_000 });
    let filled: Vec<u8> = parts
        .iter()
        .flat_map(|part| match part {
            Part::Inline(bytes) => bytes.clone(),
            Part::Blob { .. } => b"[]".to_vec(),
        })
        .collect();
    assert!(serde_json::from_slice::<Value>(&filled).is_ok());
    assert!(body.as_inline().is_none());
    assert!(body.size_bytes() > 30_000_005);
}

#[test]
fn a_batch_tells_its_counts() {
    let body = batch_end(&BatchEnd {
        batch_id: "b",
        status: BatchStatus::Completed,
        counts: BatchCounts { total: 3, completed: 1, failed: 1, cancelled: 1 },
        result_url: "https://api.test/v1/batches/b/results",
    });
    assert_eq!(
        value(&body),
        json!({"batch_id": "b", "status": "COMPLETED", "total": 3, "completed": 1, "failed": 1,
               "cancelled": 1, "result_url": "https://api.test/v1/batches/b/results"})
    );
}

proptest! {
    #[test]
    fn texts_survive_the_escape(input in any::<String>()) {
        let body = value(&in_queue(&input));
        prop_assert_eq!(body["id"].as_str(), Some(input.as_str()));
    }

    #[test]
    fn every_failed_body_is_json_with_an_error(
        error in any::<String>(),
        keys in proptest::collection::btree_map("[a-e]{0,5}", any::<i32>(), 0..4),
        spaced in any::<bool>(),
    ) {
        let output = if spaced {
            serde_json::to_vec_pretty(&keys).unwrap()
        } else {
            serde_json::to_vec(&keys).unwrap()
        };
        let body = value(&terminal(&Terminal {
            id: "j", status: JobStatus::Failed, delay_time_ms: 0, execution_time_ms: 0,
            output: Some(Json::Inline(&output)), error: Some(&error), echo: None,
        }));
        prop_assert_eq!(body["error"].as_str(), Some(error.as_str()));
        for (key, number) in &keys {
            prop_assert_eq!(&body["output"][key], &json!(number));
        }
    }
}
