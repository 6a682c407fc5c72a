//! The bytes of webhooks, fixed at the transition (P4).
//!
//! Field names and order follow RunPod's real body (reference/runpod-protocol.md section 3); the bodies of the
//! single states follow the orchestrator's `webhookv2` (DESIGN 6).

use serde::Deserialize;

pub(super) use super::object::Object;
pub use super::object::{Body, Json, Part};
use crate::batch::{BatchCounts, BatchStatus};
use crate::status::JobStatus;
use crate::target::BodyFormat;

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
            push_failed_output(object.value("output"), end.output, error);
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

#[cfg(test)]
mod tests;
