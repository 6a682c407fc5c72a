//! The standard envelope and the data of its known types (rows C3, C4).

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{ParseError, read, word};

/// What `api_version` is when it is absent.
pub const DEFAULT_API_VERSION: &str = "2025-01-01";

/// An event: the envelope, and its data if the type is known.
#[derive(Debug, Clone)]
pub struct StandardEvent {
    /// The event's own id.
    pub id: String,
    /// Its type, for example `completion.finished`.
    pub kind: String,
    /// When it came about.
    pub created_at: CreatedAt,
    /// The version of the data's shape.
    pub api_version: String,
    /// Who made it.
    pub source: Option<String>,
    /// The data, typed.
    pub data: EventData,
    /// The data as it came.
    pub payload: Box<RawValue>,
}

/// A time as senders write it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum CreatedAt {
    /// Unix seconds.
    Unix(f64),
    /// RFC 3339.
    Text(String),
}

/// The data of an event. A type that is not in the catalogue keeps its payload only.
#[derive(Debug, Clone)]
pub enum EventData {
    /// `completion.started`, `.streaming`, `.finished`, `.failed`.
    Completion(Box<CompletionData>),
    /// `batch.created`, `.processing`, `.completed`, `.failed`, `.cancelled`.
    Batch(Box<BatchData>),
    /// `usage.limit_warning`, `.limit_exceeded`.
    Usage(UsageData),
    /// `model.updated`, `.deprecated`.
    Model(ModelData),
    /// `job.*`.
    Job(Box<JobData>),
    /// `artifact.ready`, `.confirmed`, `.expired`.
    Artifact(Box<ArtifactData>),
    /// Any other type.
    Unknown,
}

/// A text completion.
#[derive(Debug, Clone, Deserialize)]
pub struct CompletionData {
    /// The completion.
    pub completion_id: String,
    /// The model that writes it.
    pub model: Option<String>,
    /// Tokens read.
    pub prompt_tokens: Option<u64>,
    /// Tokens written.
    pub completion_tokens: Option<u64>,
    /// Both.
    pub total_tokens: Option<u64>,
    /// Why it ended.
    pub finish_reason: Option<String>,
    /// The text.
    pub content: Option<String>,
    /// The request's id as the client gave it.
    pub request_id: Option<String>,
    /// Why it failed.
    pub error: Option<Box<RawValue>>,
}

/// A batch.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct BatchData {
    /// The batch.
    pub batch_id: String,
    /// Its state.
    pub status: String,
    /// Requests in it.
    pub total_requests: Option<u64>,
    /// Of them completed.
    pub completed: Option<u64>,
    /// Of them failed.
    pub failed: Option<u64>,
    /// Of them cancelled.
    pub cancelled: Option<u64>,
    /// File with the results.
    pub output_file_id: Option<String>,
    /// File with the errors.
    pub error_file_id: Option<String>,
    /// How long it took.
    pub processing_time_seconds: Option<f64>,
}

/// A limit that is near or passed.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct UsageData {
    /// What is counted.
    pub metric: String,
    /// How much was used.
    pub current_usage: f64,
    /// How much may be used.
    pub limit: f64,
    /// The share used.
    pub percentage: Option<f64>,
    /// When the count starts again.
    pub reset_at: Option<String>,
}

/// A model that changed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ModelData {
    /// The model.
    pub model: String,
    /// The endpoint that runs it.
    pub endpoint: Option<String>,
    /// What ran before.
    pub previous_model: Option<String>,
    /// When it goes.
    pub deprecated_at: Option<String>,
    /// What to use instead.
    pub successor: Option<String>,
}

/// A job's transition.
#[derive(Debug, Clone, Deserialize)]
pub struct JobData {
    /// The job.
    pub job_id: String,
    /// Its state.
    pub status: Option<String>,
    /// The queue it was in.
    pub endpoint: Option<String>,
    /// What the handler gave back.
    pub output: Option<Box<RawValue>>,
    /// Why it did not complete.
    pub error: Option<Box<RawValue>>,
}

/// A file made by a job.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ArtifactData {
    /// The job that made it.
    pub job_id: String,
    /// Where it is.
    pub download_url: Option<String>,
    /// Where to say that it was fetched.
    pub confirmation_url: Option<String>,
    /// How it should be called; not to be trusted.
    pub filename: Option<String>,
    /// Its hash, hex.
    pub sha256: Option<String>,
    /// Its length.
    pub size_bytes: Option<u64>,
}

impl EventData {
    /// The job or batch that it is about.
    #[must_use]
    pub fn subject(&self) -> Option<&str> {
        match self {
            Self::Completion(data) => Some(&data.completion_id),
            Self::Batch(data) => Some(&data.batch_id),
            Self::Job(data) => Some(&data.job_id),
            Self::Artifact(data) => Some(&data.job_id),
            Self::Usage(_) | Self::Model(_) | Self::Unknown => None,
        }
    }

    fn parse(kind: &str, payload: &RawValue) -> Result<Self, ParseError> {
        let data = payload.get().as_bytes();
        Ok(match kind {
            "completion.started" | "completion.streaming" | "completion.finished" | "completion.failed" => {
                Self::Completion(Box::new(read("data of completion event", data)?))
            }
            "batch.created" | "batch.processing" | "batch.completed" | "batch.failed" | "batch.cancelled" => {
                Self::Batch(Box::new(read("data of batch event", data)?))
            }
            "usage.limit_warning" | "usage.limit_exceeded" => Self::Usage(read("data of usage event", data)?),
            "model.updated" | "model.deprecated" => Self::Model(read("data of model event", data)?),
            "job.queued" | "job.started" | "job.progress" | "job.completed" | "job.failed"
            | "job.cancelled" | "job.timed_out" | "job.retried" => {
                Self::Job(Box::new(read("data of job event", data)?))
            }
            "artifact.ready" | "artifact.confirmed" | "artifact.expired" => {
                Self::Artifact(Box::new(read("data of artifact event", data)?))
            }
            _ => Self::Unknown,
        })
    }
}

#[derive(Deserialize)]
struct Envelope {
    id: String,
    r#type: String,
    created_at: CreatedAt,
    api_version: Option<String>,
    source: Option<String>,
    data: Box<RawValue>,
}

impl StandardEvent {
    pub(super) fn parse(body: &[u8]) -> Result<Self, ParseError> {
        let envelope: Envelope = read("event", body)?;
        word("event", "id", &envelope.id)?;
        word("event", "type", &envelope.r#type)?;
        if !envelope.data.get().starts_with('{') {
            return Err(ParseError::Field { shape: "event", reason: "data must be an object".to_owned() });
        }
        let data = EventData::parse(&envelope.r#type, &envelope.data)?;
        Ok(Self {
            id: envelope.id,
            kind: envelope.r#type,
            created_at: envelope.created_at,
            api_version: envelope.api_version.unwrap_or_else(|| DEFAULT_API_VERSION.to_owned()),
            source: envelope.source,
            data,
            payload: envelope.data,
        })
    }

    /// The part of the type before the first dot.
    #[must_use]
    pub fn family(&self) -> &str {
        self.kind.split('.').next().unwrap_or_default()
    }
}
