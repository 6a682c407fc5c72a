//! What a trusted body says, as types. Pure.
//!
//! Five shapes are known; which one it is shows in the body itself, so one endpoint can take them all:
//!
//! | shape | known by | kind, for the router |
//! |---|---|---|
//! | standard event | `type` and `data` | its `type` |
//! | Runflow | `event` and `run_id` or `batch_id` | `runflow.` + `event` |
//! | artefact notice | `download_url` and `confirmation_url` | `artifact.notice` |
//! | batch callback | `batch_id`, `status`, `total` | `ringback.batch.` + status |
//! | RunPod job | `id` and one of the six states as `status` | `runpod.` + status |

mod callback;
mod standard;

use std::collections::BTreeMap;

use ringback_domain::JobStatus;
use serde::de::{DeserializeOwned, IgnoredAny};
use sha2::{Digest as _, Sha256};
use url::Url;

use ringback_domain::artifact::hex;

pub use callback::{ArtifactNotice, BatchCallback, RunflowCallback, RunpodJob};
pub use standard::{
    ArtifactData, BatchData, CompletionData, CreatedAt, DEFAULT_API_VERSION, EventData, JobData, ModelData,
    StandardEvent, UsageData,
};

/// A trusted body, typed. What senders put inside (output, error) stays verbatim JSON, whatever numbers it holds.
#[derive(Debug, Clone)]
pub enum Event {
    /// The standard envelope.
    Standard(Box<StandardEvent>),
    /// A job as RunPod and Ringback tell it.
    Runpod(Box<RunpodJob>),
    /// A run or batch as Runflow tells it.
    Runflow(Box<RunflowCallback>),
    /// A whole batch as Ringback's `callback_url` gets it.
    Batch(BatchCallback),
    /// A file is ready and waits to be fetched (row B1).
    Artifact(ArtifactNotice),
}

/// Why a body is no event. The text names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Not JSON.
    #[error("the body is not JSON: {0}")]
    Json(String),
    /// JSON, but no object.
    #[error("the body is not a JSON object")]
    NotAnObject,
    /// None of the known shapes.
    #[error(
        "the body is no event: expected type and data, event and run_id or batch_id, download_url and \
         confirmation_url, batch_id with status and total, or id with a job's status"
    )]
    UnknownShape,
    /// A known shape with something wrong inside.
    #[error("{shape}: {reason}")]
    Field {
        /// What it was read as.
        shape: &'static str,
        /// Which field and why.
        reason: String,
    },
}

impl Event {
    /// Reads a body.
    ///
    /// # Errors
    /// [`ParseError`].
    pub fn parse(body: &[u8]) -> Result<Self, ParseError> {
        let fields = keys(body)?;
        let has = |name: &str| fields.iter().any(|field| field == name);
        if has("type") {
            return StandardEvent::parse(body).map(|event| Self::Standard(Box::new(event)));
        }
        if has("event") && (has("run_id") || has("batch_id")) {
            return RunflowCallback::parse(body, fields).map(|callback| Self::Runflow(Box::new(callback)));
        }
        if has("download_url") && has("confirmation_url") {
            return ArtifactNotice::parse(body).map(Self::Artifact);
        }
        if has("batch_id") && has("status") && has("total") {
            return read("batch callback", body).map(Self::Batch);
        }
        if has("id") && has("status") {
            return RunpodJob::parse(body, fields).map(|job| Self::Runpod(Box::new(job)));
        }
        Err(ParseError::UnknownShape)
    }

    /// What the router looks at.
    #[must_use]
    pub fn kind(&self) -> String {
        match self {
            Self::Standard(event) => event.kind.clone(),
            Self::Runpod(job) => format!("runpod.{}", job.status.as_str().to_ascii_lowercase()),
            Self::Runflow(callback) => format!("runflow.{}", callback.event),
            Self::Batch(batch) => format!("ringback.batch.{}", batch.status.to_ascii_lowercase()),
            Self::Artifact(_) => "artifact.notice".to_owned(),
        }
    }

    /// What identifies the event where no `webhook-id` does: a second copy has the same.
    #[must_use]
    pub fn own_key(&self) -> String {
        match self {
            Self::Standard(event) => format!("event:{}", event.id),
            Self::Runpod(job) => format!("job:{}:{}", job.id, job.status.as_str()),
            Self::Runflow(callback) => format!("{}:{}", callback.subject_key(), callback.event),
            Self::Batch(batch) => format!("batch:{}:{}", batch.batch_id, batch.status),
            Self::Artifact(notice) => {
                // A job's next attempt may offer another file of the same name elsewhere: that is another notice.
                let place = [notice.download_url.as_bytes(), notice.confirmation_url.as_bytes()].join(&0);
                let place = hex(&Sha256::digest(place)[..8]);
                format!("artifact:{}:{}:{place}", notice.job_id, notice.filename)
            }
        }
    }

    /// The job, run or batch that it is about, if it names one.
    #[must_use]
    pub fn subject(&self) -> Option<&str> {
        match self {
            Self::Standard(event) => event.data.subject(),
            Self::Runpod(job) => Some(&job.id),
            Self::Runflow(callback) => callback.run_id.as_deref().or(callback.batch_id.as_deref()),
            Self::Batch(batch) => Some(&batch.batch_id),
            Self::Artifact(notice) => Some(&notice.job_id),
        }
    }

    /// The job that has ended with this event, and how, if it is such an event.
    #[must_use]
    pub fn ended_job(&self) -> Option<(&str, JobStatus)> {
        match self {
            Self::Runpod(job) if job.status.is_terminal() => Some((&job.id, job.status)),
            Self::Runflow(callback) => callback.run_id.as_deref().map(|id| (id, ending(&callback.event))),
            Self::Standard(event) => {
                let ended = [
                    "job.completed",
                    "job.failed",
                    "job.cancelled",
                    "job.timed_out",
                    "completion.finished",
                    "completion.failed",
                ];
                let subject = event.data.subject().filter(|_| ended.contains(&event.kind.as_str()));
                subject.map(|id| (id, ending(&event.kind)))
            }
            Self::Runpod(_) | Self::Batch(_) | Self::Artifact(_) => None,
        }
    }

    /// The host that the work waits for, empty if it waits for none: a slow host must not hold up the others (P9).
    #[must_use]
    pub fn lane(&self) -> String {
        let link = match self {
            Self::Artifact(notice) => Some(notice.download_url.clone()),
            Self::Runflow(callback) => callback.links(1).ok().and_then(|links| links.into_iter().next()),
            Self::Standard(event) => match &event.data {
                EventData::Artifact(data) => data.download_url.clone(),
                _ => None,
            },
            Self::Runpod(_) | Self::Batch(_) => None,
        };
        let host = |link: String| {
            let url = Url::parse(&link).ok()?;
            Some(format!("{}:{}", url.host_str()?, url.port_or_known_default().unwrap_or(0)))
        };
        link.and_then(host).unwrap_or_default()
    }

    /// The names of the payload's fields, for logs: never their values.
    #[must_use]
    pub fn payload_keys(&self) -> Vec<String> {
        match self {
            Self::Standard(event) => keys(event.payload.get().as_bytes()).unwrap_or_default(),
            Self::Runpod(job) => job.fields.clone(),
            Self::Runflow(callback) => callback.fields.clone(),
            Self::Batch(_) => ["batch_id", "status", "total"].map(str::to_owned).to_vec(),
            Self::Artifact(_) => {
                ["job_id", "download_url", "confirmation_url", "filename"].map(str::to_owned).to_vec()
            }
        }
    }
}

/// The names of an object's fields; the values are passed over unread.
fn keys(body: &[u8]) -> Result<Vec<String>, ParseError> {
    match serde_json::from_slice::<BTreeMap<String, IgnoredAny>>(body) {
        Ok(fields) => Ok(fields.into_keys().collect()),
        Err(error) if error.is_data() => Err(ParseError::NotAnObject),
        Err(error) => Err(ParseError::Json(error.to_string())),
    }
}

/// Reads a body as a type; the error names the field.
fn read<T: DeserializeOwned>(shape: &'static str, body: &[u8]) -> Result<T, ParseError> {
    serde_json::from_slice(body).map_err(|error| ParseError::Field { shape, reason: error.to_string() })
}

/// The state that an event's type speaks of.
fn ending(kind: &str) -> JobStatus {
    match kind.rsplit('.').next() {
        Some("completed" | "finished") => JobStatus::Completed,
        Some("cancelled") => JobStatus::Cancelled,
        Some("timed_out") => JobStatus::TimedOut,
        _ => JobStatus::Failed,
    }
}

/// Longest id, event name or status taken from outside, in bytes.
const MAX_WORD_BYTES: usize = 256;

fn word(shape: &'static str, name: &str, text: &str) -> Result<(), ParseError> {
    if text.is_empty() || text.len() > MAX_WORD_BYTES || text.chars().any(char::is_control) {
        let reason = format!("{name} must have 1 to {MAX_WORD_BYTES} bytes and no control characters");
        return Err(ParseError::Field { shape, reason });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
