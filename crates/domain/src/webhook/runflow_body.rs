//! Runflow's bodies: what `callback_url` and webhooks of format `runflow` get (reference/webhooks.md section 2).
//!
//! Times end in `+00:00`, never in `Z`. Event names spell `cancelled`; the status of a run spells `canceled`.

use super::body::{Body, Json, Object};
use crate::{
    batch::{BatchCounts, BatchStatus},
    status::JobStatus,
    time::TimestampMs,
};

/// The status of a run as Runflow spells it.
#[must_use]
pub const fn run_status(status: JobStatus) -> &'static str {
    match status {
        JobStatus::InQueue => "queued",
        JobStatus::InProgress => "running",
        JobStatus::Completed => "succeeded",
        JobStatus::Failed | JobStatus::TimedOut => "failed",
        JobStatus::Cancelled => "canceled",
    }
}

/// The event of a run's end; `None` for a state that is no end.
#[must_use]
pub const fn run_event(status: JobStatus) -> Option<&'static str> {
    match status {
        JobStatus::InQueue | JobStatus::InProgress => None,
        JobStatus::Completed => Some("run.completed"),
        JobStatus::Failed | JobStatus::TimedOut => Some("run.failed"),
        JobStatus::Cancelled => Some("run.cancelled"),
    }
}

/// The status of a batch as Runflow spells it: what of it succeeded decides.
#[must_use]
pub const fn batch_status(status: BatchStatus, counts: &BatchCounts) -> &'static str {
    match status {
        BatchStatus::InProgress => "running",
        BatchStatus::Cancelled => "cancelled",
        BatchStatus::Completed | BatchStatus::Failed => {
            if counts.completed == counts.total {
                "succeeded"
            } else if counts.completed > 0 {
                "partial_succeeded"
            } else {
                "failed"
            }
        }
    }
}

/// The event of a batch's end; `None` for a state that is no end.
#[must_use]
pub fn batch_event(status: BatchStatus, counts: &BatchCounts) -> Option<&'static str> {
    Some(match batch_status(status, counts) {
        "succeeded" => "batch.succeeded",
        "partial_succeeded" => "batch.partial_succeeded",
        "failed" => "batch.failed",
        "cancelled" => "batch.cancelled",
        _ => return None,
    })
}

/// A moment as Runflow writes it.
#[must_use]
pub fn time(at: TimestampMs) -> String {
    let mut text = at.rfc3339();
    if text.ends_with('Z') {
        text.pop();
    }
    text.push_str("+00:00");
    text
}

/// A run that has ended.
#[derive(Debug, Clone, Copy)]
pub struct RunEnd<'a> {
    /// Its id as the client knows it.
    pub run_id: &'a str,
    /// How it ended.
    pub status: JobStatus,
    /// What the handler gave back.
    pub output: Option<Json<'a>>,
    /// Why it did not complete.
    pub error: Option<&'a str>,
    /// Class of the error.
    pub error_type: Option<&'a str>,
    /// Length of the recorded attempt.
    pub duration_ms: u64,
    /// When it was submitted.
    pub created_at: TimestampMs,
    /// When it ended.
    pub completed_at: TimestampMs,
    /// The client's `metadata`, verbatim JSON.
    pub metadata: Option<&'a [u8]>,
}

/// The error envelope that stands in `output` of a failed run.
fn error_envelope(status: JobStatus, error: Option<&str>, error_type: Option<&str>) -> Body {
    let default = if status == JobStatus::TimedOut { "the run ran out of time" } else { "the run failed" };
    let kind = if status == JobStatus::TimedOut { "timeout" } else { "execution_error" };
    let mut inner = Object::new();
    inner.text("type", error_type.unwrap_or(kind)).text("message", error.unwrap_or(default));
    let mut outer = Object::new();
    outer.body("error", inner.close());
    outer.close()
}

/// The body of a run's end: `event, run_id, status, output, duration_ms, created_at, completed_at, metadata`.
#[must_use]
pub fn run_end(end: &RunEnd<'_>) -> Body {
    let mut object = Object::new();
    object
        .text("event", run_event(end.status).unwrap_or("run.updated"))
        .text("run_id", end.run_id)
        .text("status", run_status(end.status));
    match end.status {
        JobStatus::Failed | JobStatus::TimedOut => {
            object.body("output", error_envelope(end.status, end.error, end.error_type));
        }
        JobStatus::Completed => {
            object.json("output", end.output.unwrap_or(Json::Inline(b"null")));
        }
        JobStatus::Cancelled | JobStatus::InQueue | JobStatus::InProgress => {
            object.json("output", Json::Inline(b"null"));
        }
    }
    object
        .number("duration_ms", end.duration_ms)
        .text("created_at", &time(end.created_at))
        .text("completed_at", &time(end.completed_at))
        .json("metadata", Json::Inline(end.metadata.unwrap_or(b"null")));
    object.close()
}

/// A run in the output of a batch.
#[derive(Debug, Clone)]
pub struct BatchItem {
    /// Place in the batch, from 0.
    pub index: u32,
    /// Its id.
    pub run_id: String,
    /// Where it stands.
    pub status: JobStatus,
    /// The client's name for it.
    pub client_ref: Option<String>,
}

/// A batch that has ended.
#[derive(Debug, Clone, Copy)]
pub struct BatchEnd<'a> {
    /// Its id.
    pub batch_id: &'a str,
    /// How it ended.
    pub status: BatchStatus,
    /// How its runs ended.
    pub counts: BatchCounts,
    /// Its runs in order, where they are few enough to tell.
    pub items: Option<&'a [BatchItem]>,
    /// Where the outputs are, one JSON line per run.
    pub result_url: &'a str,
    /// When it was submitted.
    pub created_at: TimestampMs,
    /// When it ended.
    pub completed_at: TimestampMs,
    /// The client's `metadata`, verbatim JSON.
    pub metadata: Option<&'a [u8]>,
}

/// The body of a batch's end: that of a run with `batch_id`, and counts as its output.
#[must_use]
pub fn batch_end(end: &BatchEnd<'_>) -> Body {
    let status = batch_status(end.status, &end.counts);
    let mut output = Object::new();
    match end.items {
        Some(items) => output.json("items", Json::Inline(&items_json(items))),
        None => output.json("items", Json::Inline(b"null")),
    };
    output
        .number("succeeded", end.counts.completed.into())
        .number("failed", end.counts.failed.into())
        .number("cancelled", end.counts.cancelled.into())
        .number("total", end.counts.total.into())
        .text("result_url", end.result_url);
    let mut object = Object::new();
    object
        .text("event", &format!("batch.{status}"))
        .text("batch_id", end.batch_id)
        .text("status", status)
        .body("output", output.close())
        .number("duration_ms", end.completed_at.since_ms(end.created_at))
        .text("created_at", &time(end.created_at))
        .text("completed_at", &time(end.completed_at))
        .json("metadata", Json::Inline(end.metadata.unwrap_or(b"null")));
    object.close()
}

fn items_json(items: &[BatchItem]) -> Vec<u8> {
    let mut list = Vec::with_capacity(2 + items.len() * 120);
    list.push(b'[');
    for (n, item) in items.iter().enumerate() {
        if n > 0 {
            list.push(b',');
        }
        let mut object = Object::new();
        object
            .number("sequence_index", item.index.into())
            .text("run_id", &item.run_id)
            .text("status_code", run_status(item.status));
        match &item.client_ref {
            Some(text) => object.text("client_ref", text),
            None => object.json("client_ref", Json::Inline(b"null")),
        };
        // No part of it lies in the blob store.
        list.extend_from_slice(object.close().as_inline().unwrap_or_default());
    }
    list.push(b']');
    list
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const CREATED: TimestampMs = TimestampMs(1_700_000_000_000);

    fn end(status: JobStatus) -> RunEnd<'static> {
        RunEnd {
            run_id: "r-1",
            status,
            output: Some(Json::Inline(b"{ \"url\":1e400 }")),
            error: Some("no \"voice\""),
            error_type: None,
            duration_ms: 12,
            created_at: CREATED,
            completed_at: TimestampMs(CREATED.0 + 1_234),
            metadata: Some(br#"{ "order":7 }"#),
        }
    }

    fn text(body: &Body) -> &str {
        std::str::from_utf8(body.as_inline().unwrap()).unwrap()
    }

    #[test]
    fn a_completed_run_has_the_documented_fields_and_its_output_verbatim() {
        assert_eq!(
            text(&run_end(&end(JobStatus::Completed))),
            "{\"event\":\"run.completed\",\"run_id\":\"r-1\",\"status\":\"succeeded\",\"output\":{ \"url\":1e400 },\
             \"duration_ms\":12,\"created_at\":\"2023-11-14T22:13:20.000+00:00\",\
             \"completed_at\":\"2023-11-14T22:13:21.234+00:00\",\"metadata\":{ \"order\":7 }}"
        );
    }

    #[test]
    fn other_ends_have_an_error_envelope_or_null() {
        let value = |status| serde_json::from_str::<Value>(text(&run_end(&end(status)))).unwrap();
        let failed = value(JobStatus::Failed);
        assert_eq!((&failed["event"], &failed["status"]), (&json!("run.failed"), &json!("failed")));
        assert_eq!(
            failed["output"],
            json!({"error": {"type": "execution_error", "message": "no \"voice\""}})
        );
        let late = value(JobStatus::TimedOut);
        assert_eq!(
            (&late["event"], &late["output"]["error"]["type"]),
            (&json!("run.failed"), &json!("timeout"))
        );
        let cancelled = value(JobStatus::Cancelled);
        assert_eq!(
            (&cancelled["event"], &cancelled["status"], &cancelled["output"]),
            (&json!("run.cancelled"), &json!("canceled"), &Value::Null)
        );
    }

    #[test]
    fn a_batch_tells_its_counts_and_runs() {
        let counts = BatchCounts { total: 3, completed: 1, failed: 1, cancelled: 1 };
        let items = [BatchItem {
            index: 0,
            run_id: "r".to_owned(),
            status: JobStatus::Cancelled,
            client_ref: Some("c".to_owned()),
        }];
        let body = batch_end(&BatchEnd {
            batch_id: "b-1",
            status: BatchStatus::Completed,
            counts,
            items: Some(&items),
            result_url: "https://x.test/r",
            created_at: CREATED,
            completed_at: TimestampMs(CREATED.0 + 5),
            metadata: None,
        });
        let value: Value = serde_json::from_str(text(&body)).unwrap();
        assert_eq!(
            value["output"],
            json!({"items": [{"sequence_index": 0, "run_id": "r", "status_code": "canceled", "client_ref": "c"}],
                   "succeeded": 1, "failed": 1, "cancelled": 1, "total": 3, "result_url": "https://x.test/r"})
        );
        assert_eq!(
            (&value["event"], &value["batch_id"], &value["metadata"], &value["duration_ms"]),
            (&json!("batch.partial_succeeded"), &json!("b-1"), &Value::Null, &json!(5))
        );
        for (completed, want) in [(3, "succeeded"), (0, "failed")] {
            let counts = BatchCounts { total: 3, completed, failed: 3 - completed, cancelled: 0 };
            assert_eq!(batch_status(BatchStatus::Completed, &counts), want);
        }
        assert_eq!(batch_status(BatchStatus::Cancelled, &counts), "cancelled");
    }
}
