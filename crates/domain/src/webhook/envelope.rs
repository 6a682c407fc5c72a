//! The typed envelope of registered webhooks: `{id, type, created_at, api_version, source, data}`.
//!
//! Its bytes are fixed at the transition like those of every other body (P4): output, progress and metadata go in
//! verbatim, and a large output stays a reference to its blob.

use super::body::{Body, Json, Object};
use crate::{
    batch::{BatchCounts, BatchStatus},
    event::EventType,
    status::JobStatus,
    time::TimestampMs,
};

/// `api_version` of every envelope.
pub const API_VERSION: &str = "2025-01-01";
/// `source` of every envelope.
pub const SOURCE: &str = "ringback";

/// The envelope around `data`.
#[must_use]
pub fn standard(id: &str, event: EventType, at: TimestampMs, data: Body) -> Body {
    let mut object = Object::new();
    object
        .text("id", id)
        .text("type", event.name())
        .text("created_at", &at.rfc3339())
        .text("api_version", API_VERSION)
        .text("source", SOURCE)
        .body("data", data);
    object.close()
}

/// What events tell of a job.
#[derive(Debug, Clone, Copy)]
pub struct JobFacts<'a> {
    /// The job's id as its owner knows it.
    pub job_id: &'a str,
    /// Name of its endpoint.
    pub endpoint: &'a str,
    /// The state that was entered.
    pub status: JobStatus,
    /// Its run.
    pub run: u32,
    /// The attempt, 0 where none began.
    pub attempt: u32,
    /// Place among the job's transitions; 0 for what is no transition.
    pub sequence: u32,
    /// From (re)queueing to start.
    pub delay_ms: u64,
    /// Of the recorded attempt.
    pub execution_ms: u64,
    /// What the handler gave back.
    pub output: Option<Json<'a>>,
    /// Why the job did not complete.
    pub error: Option<&'a str>,
    /// Class of the error, as the handler told it.
    pub error_type: Option<&'a str>,
    /// Its batch.
    pub batch_id: Option<&'a str>,
    /// The client's own name for it within a batch.
    pub client_ref: Option<&'a str>,
    /// The client's metadata, a JSON object.
    pub metadata: Option<&'a [u8]>,
}

impl JobFacts<'_> {
    fn identity(&self, object: &mut Object) {
        object
            .text("job_id", self.job_id)
            .text("endpoint", self.endpoint)
            .text("status", self.status.as_str());
        object.number("run", self.run.into());
        if self.attempt > 0 {
            object.number("attempt", self.attempt.into());
        }
        if self.sequence > 0 {
            object.number("sequence", self.sequence.into());
        }
        if self.status != JobStatus::InQueue {
            object.number("delay_time_ms", self.delay_ms);
        }
        if self.status.is_terminal() {
            object.number("execution_time_ms", self.execution_ms);
        }
    }

    fn error(&self, object: &mut Object) {
        if self.status.is_terminal() && self.status != JobStatus::Completed {
            object.opt_text("error", self.error).opt_text("error_type", self.error_type);
        }
    }

    fn belongings(&self, object: &mut Object) {
        object
            .opt_text("batch_id", self.batch_id)
            .opt_text("client_ref", self.client_ref)
            .opt_json("metadata", self.metadata.map(Json::Inline));
    }
}

/// `data` of a job's transition.
#[must_use]
pub fn job(facts: &JobFacts<'_>) -> Body {
    let mut object = Object::new();
    facts.identity(&mut object);
    if facts.status == JobStatus::Completed {
        object.json("output", facts.output.unwrap_or(Json::Inline(b"null")));
    } else if facts.status.is_terminal() {
        object.opt_json("output", facts.output);
    }
    facts.error(&mut object);
    facts.belongings(&mut object);
    object.close()
}

/// `data` of `job.progress`: `value` is what the handler told, verbatim JSON.
#[must_use]
pub fn progress(facts: &JobFacts<'_>, value: &[u8]) -> Body {
    let mut object = Object::new();
    facts.identity(&mut object);
    object.json("progress", Json::Inline(value));
    facts.belongings(&mut object);
    object.close()
}

/// What events of a completion tell beside its job. What is not known is absent.
#[derive(Debug, Clone, Copy, Default)]
pub struct CompletionFacts<'a> {
    /// The model that answers.
    pub model: Option<&'a str>,
    /// The id that the client gave the request.
    pub request_id: Option<&'a str>,
    /// Tokens read.
    pub prompt_tokens: Option<u64>,
    /// Tokens written.
    pub completion_tokens: Option<u64>,
    /// Their sum, as told or added up.
    pub total_tokens: Option<u64>,
    /// Why it ended.
    pub finish_reason: Option<&'a str>,
    /// The text so far.
    pub content: Option<&'a str>,
    /// Whether that is only the beginning of it.
    pub content_cut: bool,
}

/// `data` of `completion.*`.
#[must_use]
pub fn completion(facts: &JobFacts<'_>, of: &CompletionFacts<'_>) -> Body {
    let mut object = Object::new();
    object
        .text("completion_id", facts.job_id)
        .opt_text("model", of.model)
        .opt_text("request_id", of.request_id);
    for (name, tokens) in [
        ("prompt_tokens", of.prompt_tokens),
        ("completion_tokens", of.completion_tokens),
        ("total_tokens", of.total_tokens),
    ] {
        if let Some(tokens) = tokens {
            object.number(name, tokens);
        }
    }
    object.opt_text("finish_reason", of.finish_reason).opt_text("content", of.content);
    if of.content_cut {
        object.json("content_truncated", Json::Inline(b"true"));
    }
    facts.identity(&mut object);
    facts.error(&mut object);
    facts.belongings(&mut object);
    object.close()
}

/// What events tell of a batch.
#[derive(Debug, Clone, Copy)]
pub struct BatchFacts<'a> {
    /// The batch's id.
    pub batch_id: &'a str,
    /// Name of its endpoint.
    pub endpoint: &'a str,
    /// Its status.
    pub status: BatchStatus,
    /// How its jobs ended so far.
    pub counts: BatchCounts,
    /// From its opening to its end, or to now.
    pub processing_ms: u64,
    /// File of the successes; once it has ended.
    pub output_file_id: Option<&'a str>,
    /// File of the failures; once it has ended.
    pub error_file_id: Option<&'a str>,
    /// Where both are fetched without a key; once it has ended.
    pub output_file_url: Option<&'a str>,
    /// The same of the failures.
    pub error_file_url: Option<&'a str>,
    /// The client's metadata, a JSON object.
    pub metadata: Option<&'a [u8]>,
}

/// `data` of `batch.*`.
#[must_use]
pub fn batch(facts: &BatchFacts<'_>) -> Body {
    let file = |id: Option<&str>, object: &mut Object, name: &str| {
        match id {
            Some(id) => object.text(name, id),
            None => object.json(name, Json::Inline(b"null")),
        };
    };
    let mut object = Object::new();
    object
        .text("batch_id", facts.batch_id)
        .text("endpoint", facts.endpoint)
        .text("status", facts.status.as_str())
        .number("total_requests", facts.counts.total.into())
        .number("completed", facts.counts.completed.into())
        .number("failed", facts.counts.failed.into())
        .number("cancelled", facts.counts.cancelled.into());
    file(facts.output_file_id, &mut object, "output_file_id");
    file(facts.error_file_id, &mut object, "error_file_id");
    object
        .opt_text("output_file_url", facts.output_file_url)
        .opt_text("error_file_url", facts.error_file_url);
    let (s, ms) = (facts.processing_ms / 1_000, facts.processing_ms % 1_000);
    let seconds = format!("{s}.{ms:03}");
    object.json("processing_time_seconds", Json::Inline(seconds.as_bytes()));
    object.opt_json("metadata", facts.metadata.map(Json::Inline));
    object.close()
}

#[cfg(test)]
mod tests {
    use super::super::body::Part;
    use super::*;

    fn text(body: &Body) -> &str {
        std::str::from_utf8(body.as_inline().unwrap()).unwrap()
    }

    const FACTS: JobFacts<'_> = JobFacts {
        job_id: "j-1",
        endpoint: "echo",
        status: JobStatus::Completed,
        run: 2,
        attempt: 1,
        sequence: 6,
        delay_ms: 3,
        execution_ms: 40,
        output: Some(Json::Inline(b"{ \"b\":1e400 }")),
        error: Some("ignored"),
        error_type: None,
        batch_id: None,
        client_ref: Some("a\"b"),
        metadata: Some(b"{\"tenant\":\"x\"}"),
    };

    #[test]
    fn the_envelope_has_its_fields_in_order_and_its_data_verbatim() {
        let body = standard("evt_1_6", EventType::JobCompleted, TimestampMs(1_700_000_000_123), job(&FACTS));
        assert_eq!(
            text(&body),
            r#"{"id":"evt_1_6","type":"job.completed","created_at":"2023-11-14T22:13:20.123Z","api_version":"2025-01-01","source":"ringback","data":{"job_id":"j-1","endpoint":"echo","status":"COMPLETED","run":2,"attempt":1,"sequence":6,"delay_time_ms":3,"execution_time_ms":40,"output":{ "b":1e400 },"client_ref":"a\"b","metadata":{"tenant":"x"}}}"#
        );
    }

    #[test]
    fn a_large_output_stays_a_blob() {
        let facts = JobFacts { output: Some(Json::Blob { key: "k", size_bytes: 9 }), ..FACTS };
        let body = standard("e", EventType::JobCompleted, TimestampMs(0), job(&facts));
        let kinds: Vec<bool> = body.parts().iter().map(|p| matches!(p, Part::Blob { .. })).collect();
        assert_eq!(kinds, [false, true, false]);
        assert!(matches!(body.parts().last(), Some(Part::Inline(end)) if end.ends_with(b"}}}")));
    }

    #[test]
    fn states_tell_what_is_known_by_then() {
        let at = |status, sequence| {
            text(&job(&JobFacts { status, sequence, attempt: 0, metadata: None, client_ref: None, ..FACTS }))
                .to_owned()
        };
        assert_eq!(
            at(JobStatus::InQueue, 1),
            r#"{"job_id":"j-1","endpoint":"echo","status":"IN_QUEUE","run":2,"sequence":1}"#
        );
        assert!(at(JobStatus::InProgress, 2).ends_with(r#""sequence":2,"delay_time_ms":3}"#));
        assert!(at(JobStatus::Failed, 3).ends_with(r#""output":{ "b":1e400 },"error":"ignored"}"#));
    }

    #[test]
    fn completions_and_batches_have_the_fields_of_their_row() {
        let of = CompletionFacts {
            model: Some("m"),
            request_id: Some("r"),
            prompt_tokens: Some(1),
            completion_tokens: Some(2),
            total_tokens: Some(3),
            finish_reason: Some("stop"),
            content: Some("hi\n"),
            content_cut: false,
        };
        assert!(text(&completion(&FACTS, &of)).starts_with(
            r#"{"completion_id":"j-1","model":"m","request_id":"r","prompt_tokens":1,"completion_tokens":2,"total_tokens":3,"finish_reason":"stop","content":"hi\n","job_id":"j-1","#
        ));
        let facts = BatchFacts {
            batch_id: "b",
            endpoint: "echo",
            status: BatchStatus::Completed,
            counts: BatchCounts { total: 3, completed: 2, failed: 1, cancelled: 0 },
            processing_ms: 12_034,
            output_file_id: Some("file-b-output"),
            error_file_id: None,
            output_file_url: Some("https://x.test/b/output.jsonl"),
            error_file_url: None,
            metadata: None,
        };
        assert_eq!(
            text(&batch(&facts)),
            r#"{"batch_id":"b","endpoint":"echo","status":"COMPLETED","total_requests":3,"completed":2,"failed":1,"cancelled":0,"output_file_id":"file-b-output","error_file_id":null,"output_file_url":"https://x.test/b/output.jsonl","processing_time_seconds":12.034}"#
        );
    }
}
