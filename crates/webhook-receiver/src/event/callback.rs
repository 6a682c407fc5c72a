//! Bodies of single senders.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use ringback_domain::JobStatus;

use super::{ParseError, read, word};

/// A job as RunPod's webhook tells it; the same fields as `/status`.
#[derive(Debug, Clone)]
pub struct RunpodJob {
    /// The job.
    pub id: String,
    /// Its state.
    pub status: JobStatus,
    /// Milliseconds in the queue.
    pub delay_time_ms: Option<u64>,
    /// Milliseconds of work.
    pub execution_time_ms: Option<u64>,
    /// What the handler gave back.
    pub output: Option<Box<RawValue>>,
    /// Why it did not complete: `error`, else `output.error`, as text.
    pub error: Option<String>,
    /// The body's field names.
    pub(super) fields: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawJob {
    id: String,
    status: Status,
    delay_time: Option<Number>,
    execution_time: Option<Number>,
    output: Option<Box<RawValue>>,
    error: Option<Box<RawValue>>,
}

/// What is looked for inside an output; an output may be any JSON.
#[derive(Deserialize)]
struct OutputProbe<'a> {
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    #[serde(borrow)]
    audio_base64: Option<Cow<'a, str>>,
}

fn probe(output: Option<&RawValue>) -> Option<OutputProbe<'_>> {
    serde_json::from_str(output?.get()).ok()
}

/// Some senders write whole milliseconds as `12.0`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Number {
    Whole(u64),
    Fraction(f64),
}

impl Number {
    fn ms(&self) -> u64 {
        match *self {
            Self::Whole(ms) => ms,
            // The cast saturates: negative and NaN become 0.
            Self::Fraction(ms) => ms as u64,
        }
    }
}

struct Status(JobStatus);

impl<'de> Deserialize<'de> for Status {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let status = JobStatus::ALL.into_iter().find(|status| status.as_str() == text);
        status.map(Self).ok_or_else(|| {
            serde::de::Error::custom(
                "status must be IN_QUEUE, IN_PROGRESS, COMPLETED, FAILED, CANCELLED or TIMED_OUT",
            )
        })
    }
}

fn text_of(value: &RawValue) -> String {
    serde_json::from_str(value.get()).unwrap_or_else(|_| value.get().to_owned())
}

impl RunpodJob {
    pub(super) fn parse(body: &[u8], fields: Vec<String>) -> Result<Self, ParseError> {
        let raw: RawJob = read("job", body)?;
        word("job", "id", &raw.id)?;
        let error = raw.error.as_deref().map(text_of).or_else(|| {
            let inside = probe(raw.output.as_deref())?.error?;
            Some(text_of(inside))
        });
        Ok(Self {
            id: raw.id,
            status: raw.status.0,
            delay_time_ms: raw.delay_time.map(|n| n.ms()),
            execution_time_ms: raw.execution_time.map(|n| n.ms()),
            error: error.filter(|_| raw.status.0 != JobStatus::Completed),
            output: raw.output,
            fields,
        })
    }

    /// `output.audio_base64`, if it is there (row A3).
    #[must_use]
    pub fn audio_base64(&self) -> Option<Cow<'_, str>> {
        probe(self.output.as_deref())?.audio_base64
    }
}

/// A run or a batch as Runflow tells it.
#[derive(Debug, Clone)]
pub struct RunflowCallback {
    /// For example `run.completed`.
    pub event: String,
    /// The run.
    pub run_id: Option<String>,
    /// The batch, instead of the run.
    pub batch_id: Option<String>,
    /// For example `succeeded`.
    pub status: Option<String>,
    /// The result; its links are short-lived.
    pub output: Option<Box<RawValue>>,
    /// The body's field names.
    pub(super) fields: Vec<String>,
}

#[derive(Deserialize)]
struct RawCallback {
    event: String,
    run_id: Option<String>,
    batch_id: Option<String>,
    status: Option<String>,
    output: Option<Box<RawValue>>,
}

impl RunflowCallback {
    pub(super) fn parse(body: &[u8], fields: Vec<String>) -> Result<Self, ParseError> {
        const SHAPE: &str = "Runflow callback";
        let raw: RawCallback = read(SHAPE, body)?;
        word(SHAPE, "event", &raw.event)?;
        match (&raw.run_id, &raw.batch_id) {
            (Some(id), _) => word(SHAPE, "run_id", id)?,
            (None, Some(id)) => word(SHAPE, "batch_id", id)?,
            (None, None) => {
                let reason = "run_id or batch_id must be a text".to_owned();
                return Err(ParseError::Field { shape: SHAPE, reason });
            }
        }
        Ok(Self {
            event: raw.event,
            run_id: raw.run_id,
            batch_id: raw.batch_id,
            status: raw.status,
            output: raw.output,
            fields,
        })
    }

    pub(super) fn subject_key(&self) -> String {
        match (&self.run_id, &self.batch_id) {
            (Some(id), _) => format!("run:{id}"),
            (None, id) => format!("batch:{}", id.as_deref().unwrap_or_default()),
        }
    }

    /// The http and https links anywhere in the output, in order, each once, at most `limit`.
    ///
    /// # Errors
    /// The output nests too deep or holds a number that no program can read.
    pub fn links(&self, limit: usize) -> Result<Vec<String>, ParseError> {
        let mut found = Vec::new();
        if let Some(output) = &self.output {
            let value: Value = read("output", output.get().as_bytes())?;
            collect(&value, limit, &mut found);
        }
        Ok(found)
    }
}

fn collect(value: &Value, limit: usize, found: &mut Vec<String>) {
    match value {
        Value::String(text) if text.starts_with("https://") || text.starts_with("http://") => {
            if found.len() < limit && !found.contains(text) {
                found.push(text.clone());
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, limit, found)),
        Value::Object(fields) => fields.values().for_each(|item| collect(item, limit, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// A whole batch, as `callback_url` gets it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BatchCallback {
    /// The batch.
    pub batch_id: String,
    /// Its state.
    pub status: String,
    /// Jobs in it.
    pub total: u64,
    /// Of them completed.
    #[serde(default)]
    pub completed: u64,
    /// Of them failed or timed out.
    #[serde(default)]
    pub failed: u64,
    /// Of them cancelled.
    #[serde(default)]
    pub cancelled: u64,
    /// The results, one JSON line per job.
    pub result_url: Option<String>,
}

/// A file is ready and its sender waits for it to be fetched (row B1).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ArtifactNotice {
    /// The job that made it.
    pub job_id: String,
    /// Where it is.
    pub download_url: String,
    /// Where to say that it was fetched.
    pub confirmation_url: String,
    /// How it should be called; not to be trusted.
    pub filename: String,
    /// What it must hash to, lower-case hex.
    #[serde(default)]
    pub sha256: Option<String>,
    /// How long it must be.
    #[serde(default)]
    pub size_bytes: Option<u64>,
}

impl ArtifactNotice {
    pub(super) fn parse(body: &[u8]) -> Result<Self, ParseError> {
        const SHAPE: &str = "artefact notice";
        let notice: Self = read(SHAPE, body)?;
        notice.check().map_err(|reason| ParseError::Field { shape: SHAPE, reason })?;
        word(SHAPE, "job_id", &notice.job_id)?;
        Ok(notice)
    }

    fn check(&self) -> Result<(), String> {
        if self.filename.len() > 4096 {
            return Err("filename must have at most 4096 bytes".to_owned());
        }
        match &self.sha256 {
            Some(hex) if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
                Err("sha256 must be 64 hex digits".to_owned())
            }
            Some(_) | None => Ok(()),
        }
    }
}
