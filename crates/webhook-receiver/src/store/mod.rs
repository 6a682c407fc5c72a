//! What a receiver remembers: events until they are worked off, their ids for as long as a sender may repeat them,
//! files saved for them, and jobs whose webhook is awaited.
//!
//! [`Journal`] is the contract; [`SqliteJournal`] keeps it in one file.

mod sqlite;
mod writer;

use std::path::PathBuf;

use async_trait::async_trait;
use bytes::Bytes;
use ringback_domain::JobStatus;

pub use sqlite::SqliteJournal;

/// The store failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The database said no.
    #[error("the receiver's store {path}: {reason}")]
    Database {
        /// Its file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// It is closed.
    #[error("the receiver's store is closed")]
    Closed,
}

/// An event to remember.
#[derive(Debug, Clone)]
pub struct NewEvent {
    /// What identifies it: a second one with the same key is a duplicate.
    pub key: String,
    /// What the router looks at.
    pub kind: String,
    /// Job, run or batch that it is about.
    pub subject: Option<String>,
    /// The job that ends with it, and how.
    pub ended_job: Option<(String, JobStatus)>,
    /// The raw body.
    pub body: Bytes,
    /// When it came, Unix ms.
    pub received_at_ms: i64,
    /// Do it again although it is done: the sender says so by sending it again (classic artefact notices, whose next
    /// attempt may bring another file under the same name).
    pub again: bool,
    /// Its sender waits for the work: if it is here and waits for its next try, that try is now.
    pub at_once: bool,
    /// The host that its work waits for, empty if it waits for none.
    pub lane: String,
}

/// Lanes in which no more is started now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Closed {
    /// All lanes that have a host.
    pub all_hosts: bool,
    /// The lane without a host.
    pub no_host: bool,
    /// Single hosts; at most [`MAX_CLOSED`] are looked at.
    pub hosts: Vec<String>,
}

/// Most single hosts that are closed at a time.
pub const MAX_CLOSED: usize = 8;

/// What became of an event that was handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepted {
    /// It is on disk and will be worked off.
    New,
    /// It was there and waits or is being worked off.
    Waiting,
    /// It was there and is done.
    Done,
    /// It was there and had been given up; it is tried again.
    Revived,
}

/// An event to work off.
#[derive(Debug, Clone)]
pub struct DueEvent {
    /// Its key.
    pub key: String,
    /// Its kind.
    pub kind: String,
    /// The raw body.
    pub body: Bytes,
    /// Tries so far.
    pub attempts: u32,
    /// When it came, Unix ms.
    pub received_at_ms: i64,
}

/// How a try ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settled {
    /// Done.
    Done,
    /// Once more, later.
    Again {
        /// When, Unix ms.
        due_at_ms: i64,
        /// Why.
        error: String,
    },
    /// Never again; the body is kept for a person to look at.
    GivenUp {
        /// Why.
        error: String,
    },
}

/// A file saved for an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedFile {
    /// Its name in the folder.
    pub name: String,
    /// Its hash, lower-case hex.
    pub sha256: String,
    /// Its length.
    pub size_bytes: u64,
}

/// An event as a person or a client asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventView {
    /// Its kind.
    pub kind: String,
    /// `pending`, `done` or `failed`.
    pub state: &'static str,
    /// When it came, Unix ms.
    pub received_at_ms: i64,
    /// Why the last try failed.
    pub error: Option<String>,
    /// Files saved for it.
    pub files: Vec<SavedFile>,
}

/// A job whose webhook is awaited (row C1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrackedJob {
    /// The job.
    pub job_id: String,
    /// What the caller wants to find again when it is polled, for example the endpoint.
    pub context: String,
    /// When it was submitted, Unix ms.
    pub submitted_at_ms: i64,
    /// Polls so far.
    pub polls: u32,
}

/// Where the wait for a tracked job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrackedState {
    /// Its webhook is awaited; from `max_wait` on it is polled.
    Awaited,
    /// Its webhook came.
    Webhook,
    /// A poll found its end.
    Poll,
    /// Nobody knows it any more, or the time is up.
    GivenUp,
}

impl TrackedState {
    /// As clients read it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Awaited => "awaited",
            Self::Webhook => "webhook",
            Self::Poll => "poll",
            Self::GivenUp => "given_up",
        }
    }
}

/// How many events are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Waiting to be worked off.
    pub pending: u64,
    /// Done.
    pub done: u64,
    /// Given up.
    pub failed: u64,
    /// Jobs whose webhook is awaited.
    pub tracked: u64,
}

/// The store of a receiver. Every change is durable when it is answered.
#[async_trait]
pub trait Journal: Send + Sync + std::fmt::Debug {
    /// Remembers an event. If it ends a tracked job, the wait is over in the same commit. A poll that has already
    /// brought the job's end makes its late webhook a duplicate, unless one of them tells of success and the other does
    /// not: then the job was run again meanwhile.
    async fn accept(&self, event: NewEvent) -> Result<Accepted, StoreError>;
    /// Keys and lanes of the events to work off now, oldest first, without those of closed lanes.
    async fn due(
        &self,
        now_ms: i64,
        limit: u32,
        closed: &Closed,
    ) -> Result<Vec<(String, String)>, StoreError>;
    /// An event that is still to be worked off.
    async fn load(&self, key: &str) -> Result<Option<DueEvent>, StoreError>;
    /// When the next event is due of those that are not due yet.
    async fn next_due(&self, after_ms: i64) -> Result<Option<i64>, StoreError>;
    /// Writes down how a try ended.
    async fn settle(&self, key: &str, settled: Settled, now_ms: i64) -> Result<(), StoreError>;
    /// Writes down a file saved for an event. `item` numbers the files of an event.
    async fn saved(&self, key: &str, item: u32, file: SavedFile) -> Result<(), StoreError>;
    /// The file saved for an event under this number.
    async fn file(&self, key: &str, item: u32) -> Result<Option<SavedFile>, StoreError>;
    /// What came for a job, run or batch, oldest first.
    async fn about(&self, subject: &str) -> Result<Vec<EventView>, StoreError>;
    /// Forgets what was settled before `before_ms`. Answers how many events.
    async fn forget(&self, before_ms: i64) -> Result<u64, StoreError>;
    /// Counts events by state.
    async fn counts(&self) -> Result<Counts, StoreError>;

    /// Remembers a job whose webhook is awaited, to be polled from `due_at_ms` on. A second time changes nothing.
    async fn track(&self, job: TrackedJob, due_at_ms: i64) -> Result<(), StoreError>;
    /// Jobs to poll now.
    async fn tracked_due(&self, now_ms: i64, limit: u32) -> Result<Vec<TrackedJob>, StoreError>;
    /// When the next job is to be polled.
    async fn tracked_next_due(&self) -> Result<Option<i64>, StoreError>;
    /// A poll has found the job's end: remembers `event` as if it had come, unless the webhook has come meanwhile.
    async fn tracked_found(&self, job_id: &str, event: NewEvent) -> Result<Accepted, StoreError>;
    /// Poll again at `due_at_ms`.
    async fn tracked_again(&self, job_id: &str, due_at_ms: i64) -> Result<(), StoreError>;
    /// Stops waiting.
    async fn tracked_give_up(&self, job_id: &str, now_ms: i64) -> Result<(), StoreError>;
    /// Where the wait stands; `None` for a job that is not tracked.
    async fn tracked_state(&self, job_id: &str) -> Result<Option<TrackedState>, StoreError>;
}
