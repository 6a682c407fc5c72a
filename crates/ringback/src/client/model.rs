//! What the native routes answer, as far as the verbs show it. Unknown members are left alone.

use ringback_domain::JobStatus;
use serde::Deserialize;
use serde_json::value::RawValue;

/// A job.
#[derive(Debug, Deserialize)]
pub(crate) struct Job {
    pub(crate) id: String,
    pub(crate) endpoint: String,
    pub(crate) status: String,
    #[serde(default)]
    pub(crate) run: u32,
    #[serde(default)]
    pub(crate) attempt: Option<u32>,
    #[serde(default)]
    pub(crate) submitted_at: Option<String>,
    #[serde(default)]
    pub(crate) delay_time_ms: Option<u64>,
    #[serde(default)]
    pub(crate) execution_time_ms: Option<u64>,
    #[serde(default)]
    pub(crate) worker_id: Option<String>,
    #[serde(default)]
    pub(crate) error: Option<String>,
    #[serde(default)]
    pub(crate) output: Option<Box<RawValue>>,
    /// Size of an output that is too large to stand in the job.
    #[serde(default)]
    pub(crate) output_bytes: Option<u64>,
    #[serde(default)]
    pub(crate) batch_id: Option<String>,
    #[serde(default)]
    pub(crate) client_ref: Option<String>,
    #[serde(default)]
    pub(crate) history: Vec<HistoryEntry>,
    #[serde(default)]
    pub(crate) deliveries: DeliveryCounts,
    #[serde(default)]
    pub(crate) artifacts: Vec<Artifact>,
}

/// A file of a job.
#[derive(Debug, Deserialize)]
pub(crate) struct Artifact {
    pub(crate) filename: String,
    pub(crate) size_bytes: u64,
    pub(crate) state: String,
}

impl Job {
    /// The state, `None` for a word of a newer server.
    pub(crate) fn state(&self) -> Option<JobStatus> {
        JobStatus::parse(&self.status)
    }

    /// Whether the run has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.state().is_some_and(JobStatus::is_terminal)
    }
}

/// One line of a job's timeline.
#[derive(Debug, Deserialize)]
pub(crate) struct HistoryEntry {
    pub(crate) status: String,
    #[serde(default)]
    pub(crate) run: u32,
    #[serde(default)]
    pub(crate) attempt: Option<u32>,
    #[serde(default)]
    pub(crate) at: String,
    #[serde(default)]
    pub(crate) reason: Option<String>,
}

/// Deliveries of a job by state.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct DeliveryCounts {
    pub(crate) pending: u64,
    pub(crate) delivered: u64,
    pub(crate) dead: u64,
    pub(crate) superseded: u64,
    pub(crate) cancelled: u64,
}

impl DeliveryCounts {
    /// How many were ever owed.
    pub(crate) const fn total(&self) -> u64 {
        self.pending + self.delivered + self.dead + self.superseded + self.cancelled
    }
}

/// A page of jobs, each verbatim.
#[derive(Debug, Deserialize)]
pub(crate) struct JobPage {
    pub(crate) jobs: Vec<Box<RawValue>>,
    #[serde(default)]
    pub(crate) next_cursor: Option<String>,
}

/// Webhooks of a job.
#[derive(Debug, Deserialize)]
pub(crate) struct DeliveryList {
    pub(crate) deliveries: Vec<Delivery>,
}

/// One webhook.
#[derive(Debug, Deserialize)]
pub(crate) struct Delivery {
    #[serde(default)]
    pub(crate) event: String,
    #[serde(default)]
    pub(crate) url: String,
    pub(crate) state: String,
    #[serde(default)]
    pub(crate) attempts: u32,
    #[serde(default)]
    pub(crate) next_attempt_at: Option<String>,
    #[serde(default)]
    pub(crate) last_status: Option<u16>,
    #[serde(default)]
    pub(crate) last_error: Option<String>,
    #[serde(default)]
    pub(crate) delivered_at: Option<String>,
}

/// A batch.
#[derive(Debug, Deserialize)]
pub(crate) struct Batch {
    pub(crate) batch_id: String,
    pub(crate) status: String,
    pub(crate) total: u64,
    #[serde(default)]
    pub(crate) completed: u64,
    #[serde(default)]
    pub(crate) failed: u64,
    #[serde(default)]
    pub(crate) cancelled: u64,
    #[serde(default)]
    pub(crate) result_url: Option<String>,
}

impl Batch {
    /// Jobs that have ended.
    pub(crate) const fn ended(&self) -> u64 {
        self.completed + self.failed + self.cancelled
    }

    /// Whether the batch has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.status != "IN_PROGRESS"
    }
}

/// A transition in the event stream: a hint that there is something to read.
#[derive(Debug, Deserialize)]
pub(crate) struct Transition {
    pub(crate) job_id: String,
}
