//! The bytes of webhooks, fixed at the transition (P4).
//!
//! Input and output are JSON texts that came from outside. They go into a body verbatim, never parsed and printed
//! again, so that a number like `1e400` or a key order survives. A large one is a reference to a blob: a body is
//! then a list of parts, and nobody copies megabytes to write a few fields around them.
//!
//! Field names and order follow RunPod's real body (reference/runpod-protocol.md section 3); the bodies of the
//! single states follow the orchestrator's `webhookv2` (DESIGN 6).

use serde::Deserialize;

use crate::batch::{BatchCounts, BatchStatus};
use crate::status::JobStatus;
use crate::target::BodyFormat;

/// A JSON text as it came from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Json<'a> {
    /// The text itself.
    Inline(&'a [u8]),
    /// The text lies in the blob store.
    Blob {
        /// Its key.
        key: &'a str,
        /// Its length.
        size_bytes: u64,
    },
}

/// A stretch of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Bytes kept with the body.
    Inline(Vec<u8>),
    /// Bytes kept in the blob store.
    Blob {
        /// Their key.
        key: String,
        /// Their number.
        size_bytes: u64,
    },
}

/// A body: its parts in order. Neighbouring inline parts are joined.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Body {
    parts: Vec<Part>,
}

impl Body {
    /// A body that is one JSON text.
    #[must_use]
    pub fn of_json(json: Vec<u8>) -> Self {
        Self { parts: vec![Part::Inline(json)] }
    }

    /// The parts in order.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The parts in order, without a copy.
    #[must_use]
    pub fn into_parts(self) -> Vec<Part> {
        self.parts
    }

    /// The whole body, if no part of it lies in the blob store.
    #[must_use]
    pub fn as_inline(&self) -> Option<&[u8]> {
        match self.parts.as_slice() {
            [Part::Inline(bytes)] => Some(bytes),
            _ => None,
        }
    }

    /// The length of the whole body.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.parts
            .iter()
            .map(|part| match part {
                Part::Inline(bytes) => bytes.len() as u64,
                Part::Blob { size_bytes, .. } => *size_bytes,
            })
            .sum()
    }

    fn tail(&mut self) -> &mut Vec<u8> {
        if !matches!(self.parts.last(), Some(Part::Inline(_))) {
            self.parts.push(Part::Inline(Vec::with_capacity(256)));
        }
        match self.parts.last_mut() {
            Some(Part::Inline(bytes)) => bytes,
            // An inline part was pushed just above.
            Some(Part::Blob { .. }) | None => unreachable!("the last part is inline"),
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        self.tail().extend_from_slice(bytes);
    }

    fn push_json(&mut self, json: Json<'_>) {
        match json {
            Json::Inline(bytes) => self.push(bytes),
            Json::Blob { key, size_bytes } => {
                self.parts.push(Part::Blob { key: key.to_owned(), size_bytes });
            }
        }
    }

    fn push_text(&mut self, text: &str) {
        let tail = self.tail();
        tail.push(b'"');
        escape_into(tail, text);
        tail.push(b'"');
    }
}

/// Writes one object field by field.
pub(super) struct Object {
    body: Body,
    empty: bool,
}

impl Object {
    pub(super) fn new() -> Self {
        let mut body = Body::default();
        body.push(b"{");
        Self { body, empty: true }
    }

    fn key(&mut self, name: &str) {
        if !self.empty {
            self.body.push(b",");
        }
        self.empty = false;
        self.body.push_text(name);
        self.body.push(b":");
    }

    pub(super) fn text(&mut self, name: &str, value: &str) -> &mut Self {
        self.key(name);
        self.body.push_text(value);
        self
    }

    pub(super) fn number(&mut self, name: &str, value: u64) -> &mut Self {
        self.key(name);
        self.body.push(value.to_string().as_bytes());
        self
    }

    pub(super) fn json(&mut self, name: &str, value: Json<'_>) -> &mut Self {
        self.key(name);
        self.body.push_json(value);
        self
    }

    /// A field only where there is something to say.
    pub(super) fn opt_text(&mut self, name: &str, value: Option<&str>) -> &mut Self {
        match value {
            Some(value) => self.text(name, value),
            None => self,
        }
    }

    /// A field only where there is something to say.
    pub(super) fn opt_json(&mut self, name: &str, value: Option<Json<'_>>) -> &mut Self {
        match value {
            Some(value) => self.json(name, value),
            None => self,
        }
    }

    /// A body as the value of a field.
    pub(super) fn body(&mut self, name: &str, value: Body) -> &mut Self {
        self.key(name);
        for part in value.parts {
            match part {
                Part::Inline(bytes) => self.body.push(&bytes),
                blob @ Part::Blob { .. } => self.body.parts.push(blob),
            }
        }
        self
    }

    pub(super) fn close(mut self) -> Body {
        self.body.push(b"}");
        self.body
    }
}

/// The body that a target of `format` gets for a transition into `told.status`. Whoever writes the transition calls
/// this once per distinct body and stores the bytes.
#[must_use]
pub fn of_transition(format: BodyFormat, told: &Terminal<'_>) -> Body {
    match (told.status, format) {
        (JobStatus::InQueue, _) => in_queue(told.id),
        (JobStatus::InProgress, _) => in_progress(told.id, told.delay_time_ms),
        (_, BodyFormat::RunpodWebhook) => terminal(told),
        (_, BodyFormat::RunpodWebhookV2) => terminal(&Terminal { echo: None, ..*told }),
        // Runflow's own body tells more than this function is given: see `runflow_body`.
        (_, BodyFormat::Runflow) => terminal(&Terminal { echo: None, ..*told }),
    }
}

/// `webhookv2` of `IN_QUEUE`: id and status.
#[must_use]
pub fn in_queue(id: &str) -> Body {
    let mut object = Object::new();
    object.text("id", id).text("status", "IN_QUEUE");
    object.close()
}

/// `webhookv2` of `IN_PROGRESS`: and how long the job waited.
#[must_use]
pub fn in_progress(id: &str, delay_time_ms: u64) -> Body {
    let mut object = Object::new();
    object.text("id", id).text("status", "IN_PROGRESS").number("delayTime", delay_time_ms);
    object.close()
}

/// What a job's last body of a run tells.
#[derive(Debug, Clone, Copy)]
pub struct Terminal<'a> {
    /// The job's id as its owner knows it (`/runsync` jobs with their prefix).
    pub id: &'a str,
    /// The state that was entered.
    pub status: JobStatus,
    /// From (re)queueing to start, 0 if it never started.
    pub delay_time_ms: u64,
    /// Of the recorded attempt, 0 if it never started.
    pub execution_time_ms: u64,
    /// What the handler gave back, if anything.
    pub output: Option<Json<'a>>,
    /// Why the job did not complete; only read when `status` is not `COMPLETED`.
    pub error: Option<&'a str>,
    /// The job's input and the target's URL, which RunPod's `webhook` body repeats and `webhookv2` does not.
    pub echo: Option<Echo<'a>>,
}

/// What RunPod's body repeats from the submit.
#[derive(Debug, Clone, Copy)]
pub struct Echo<'a> {
    /// The job's input.
    pub input: Json<'a>,
    /// The URL as it was submitted.
    pub webhook: &'a str,
}

/// The body of a terminal state. Both times are always there and always integers. A body that is not
/// `COMPLETED` has the reason twice, as `error` and as `output.error`, because receivers look in either place.
#[must_use]
pub fn terminal(end: &Terminal<'_>) -> Body {
    let error = match end.status {
        JobStatus::Completed => None,
        other => Some(end.error.unwrap_or(default_error(other))),
    };
    let mut object = Object::new();
    object.number("delayTime", end.delay_time_ms);
    if let Some(error) = error {
        object.text("error", error);
    }
    object.number("executionTime", end.execution_time_ms).text("id", end.id);
    if let Some(echo) = &end.echo {
        object.json("input", echo.input);
    }
    match error {
        Some(error) => {
            object.key("output");
            push_failed_output(&mut object.body, end.output, error);
        }
        None => {
            object.json("output", end.output.unwrap_or(Json::Inline(b"null")));
        }
    }
    object.text("status", end.status.as_str());
    if let Some(echo) = &end.echo {
        object.text("webhook", echo.webhook);
    }
    object.close()
}

fn default_error(status: JobStatus) -> &'static str {
    match status {
        JobStatus::Cancelled => "the job was cancelled",
        JobStatus::TimedOut => "the job ran out of time",
        JobStatus::InQueue | JobStatus::InProgress | JobStatus::Completed | JobStatus::Failed => {
            "the job failed"
        }
    }
}

/// The output of a job that did not complete, with `error` inside: an object gets the field, unless it has one;
/// nothing becomes an object with this field; anything else is kept beside it as `output`.
fn push_failed_output(body: &mut Body, output: Option<Json<'_>>, error: &str) {
    let raw = match output {
        Some(Json::Inline(bytes)) => bytes.trim_ascii(),
        Some(blob @ Json::Blob { .. }) => {
            body.push(b"{\"error\":");
            body.push_text(error);
            body.push(b",\"output\":");
            body.push_json(blob);
            body.push(b"}");
            return;
        }
        None => b"null",
    };
    let rest = raw.strip_prefix(b"{").map(<[u8]>::trim_ascii_start);
    match rest {
        Some(_) if has_error_field(raw) => body.push(raw),
        Some(rest) => {
            body.push(b"{\"error\":");
            body.push_text(error);
            if rest != b"}" {
                body.push(b",");
            }
            body.push(rest);
        }
        None => {
            body.push(b"{\"error\":");
            body.push_text(error);
            if raw != b"null" {
                body.push(b",\"output\":");
                body.push(raw);
            }
            body.push(b"}");
        }
    }
}

fn has_error_field(object: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Probe {
        #[serde(default, deserialize_with = "present")]
        error: bool,
    }
    fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
        serde::de::IgnoredAny::deserialize(deserializer).map(|_| true)
    }
    // A text that does not parse, or has the key twice, is left as it is.
    serde_json::from_slice::<Probe>(object).map_or(true, |probe| probe.error)
}

/// A batch when all of its jobs have ended.
#[derive(Debug, Clone, Copy)]
pub struct BatchEnd<'a> {
    /// The batch's id.
    pub batch_id: &'a str,
    /// How it ended.
    pub status: BatchStatus,
    /// How its jobs ended.
    pub counts: BatchCounts,
    /// Where the results are, one JSON line per job.
    pub result_url: &'a str,
}

/// The one body that a batch's `callback_url` gets.
#[must_use]
pub fn batch_end(end: &BatchEnd<'_>) -> Body {
    let mut object = Object::new();
    object
        .text("batch_id", end.batch_id)
        .text("status", end.status.as_str())
        .number("total", end.counts.total.into())
        .number("completed", end.counts.completed.into())
        .number("failed", end.counts.failed.into())
        .number("cancelled", end.counts.cancelled.into())
        .text("result_url", end.result_url);
    object.close()
}

/// Escapes a text for a JSON string (RFC 8259 section 7).
fn escape_into(out: &mut Vec<u8>, text: &str) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    for &byte in text.as_bytes() {
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            0..0x20 => {
                out.extend_from_slice(b"\\u00");
                out.push(HEX[usize::from(byte >> 4)]);
                out.push(HEX[usize::from(byte & 15)]);
            }
            _ => out.push(byte),
        }
    }
}

#[cfg(test)]
mod tests {
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
}
