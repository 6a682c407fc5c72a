//! What a hub tells the supervisor of a child.

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;

use crate::result::HandlerResult;
use crate::sdk::SdkVersion;

/// Something a child did. Events of one child arrive in the order in which they happened.
#[derive(Debug)]
pub enum ChildEvent {
    /// The first authorised request: the handler's process is up and speaks the protocol.
    FirstContact {
        /// Version of the SDK, if the request told it.
        sdk: Option<SdkVersion>,
    },
    /// A take waits at the hub: jobs assigned now start at once.
    Ready {
        /// Jobs that this take accepts.
        size: usize,
        /// Jobs that the child held when it asked.
        holds: usize,
    },
    /// A take that waited was answered or given up: the child is about to do something.
    TakeOver,
    /// A take was answered with this job: from now on the child holds it.
    Taken {
        /// Id of the job.
        job: String,
    },
    /// The job ended with this result.
    Result {
        /// Id of the job.
        job: String,
        /// What the handler gave.
        result: HandlerResult,
    },
    /// The handler reported progress.
    Progress {
        /// Id of the job.
        job: String,
        /// Raw JSON of the progress value.
        output: Bytes,
    },
    /// A generator yielded. The child waits for the answer before the next yield, and the answer waits
    /// until enough permits are free: hold `permit` until the chunk is passed on.
    Chunk {
        /// Id of the job.
        job: String,
        /// Raw JSON of the yielded value.
        output: Bytes,
        /// Share of the child's chunk budget.
        permit: ChunkPermit,
    },
    /// A ping with the ids it named. Pings come from a separate process and lag by up to one interval:
    /// an id that is missing is a hint, and a ping alone does not prove that the handler lives.
    Ping {
        /// Ids of jobs in progress or queued inside the child.
        jobs: Vec<String>,
    },
    /// The SDK's own check failed; the child ends itself.
    Unhealthy(Unhealthy),
    /// The child holds nothing, although these jobs were given to it: their results will never come.
    /// For a job that was asked to stop this is the confirmation.
    Lost {
        /// Ids of the jobs.
        jobs: Vec<String>,
    },
    /// The handler asked for a fresh process. The child gets no further jobs.
    StopPodRequested {
        /// Jobs that were assigned but not yet taken; give them to somebody else.
        unstarted: Vec<String>,
    },
    /// A request named this worker but carried another key: the handler's image has credentials of its
    /// own (`~/.runpod/config.toml`), which the SDK prefers. Sent once.
    WrongKey,
}

/// Part of a child's budget for chunks that are not yet passed on; dropped when they are.
#[derive(Debug)]
pub struct ChunkPermit {
    _permit: OwnedSemaphorePermit,
}

impl ChunkPermit {
    pub(crate) fn new(permit: OwnedSemaphorePermit) -> Self {
        Self { _permit: permit }
    }
}

/// A failed check of the SDK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unhealthy {
    /// Name of the check, for example `_memory_check`.
    pub check: String,
    /// Reason given by the SDK.
    pub reason: String,
}
