//! The supervisor's side of a child.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::Child;
use super::state::{Job, Phase};
use crate::hub::Hub;
use crate::sdk::SdkVersion;

/// After a take was answered 204 the next one follows at once; within this time the child still counts
/// as waiting.
const REPOLL: Duration = Duration::from_secs(2);

/// A job for a child.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Id in the URLs of its result.
    pub id: String,
    /// The JSON object of the job, see [`crate::job_json`].
    pub payload: Bytes,
}

/// Why a job was not assigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssignError {
    /// The child gets no further jobs.
    #[error("the child is draining")]
    Draining,
    /// The child already has a job of this id: it must end first.
    #[error("the child still holds a job of this id")]
    Held,
    /// The child has as many jobs as it may have.
    #[error("the child has no free slot")]
    Full,
}

/// What became of a request to stop a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopOutcome {
    /// The child had not taken it: it is off the queue and will never start.
    NeverStarted,
    /// The child holds it. The stop goes out with its open or next stop poll; wait for
    /// [`ChildEvent::Lost`] or [`ChildEvent::Result`], and end the process if neither comes.
    Signalled {
        /// False when the child never opened a stop poll (SDK before 1.10, or a handler that blocks since
        /// its start): the signal will probably not be read.
        listening: bool,
    },
    /// The child has no such job.
    Unknown,
}

/// A job that a child had when it was removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// Id of the job.
    pub job: String,
    /// True if it was handed to the child, so that its handler may have run.
    pub taken: bool,
}

/// A child that holds nothing and only waits for a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Idle {
    /// When its latest open take arrived.
    pub waiting_since: Instant,
    /// When its last job ended, if it had any.
    pub last_job_ended: Option<Instant>,
}

/// The supervisor's side of a child. Dropping it removes the child from the hub.
#[derive(Debug)]
pub struct ChildHandle {
    hub: Hub,
    child: Arc<Child>,
}

impl ChildHandle {
    pub(crate) fn new(hub: Hub, child: Arc<Child>) -> Self {
        Self { hub, child }
    }

    /// Worker id of the child.
    pub fn worker_id(&self) -> &str {
        self.child.worker_id()
    }

    /// Gives the child a job; it starts with the child's open or next take.
    ///
    /// # Errors
    /// [`AssignError`]; the job was not taken over.
    pub fn assign(&self, offer: Offer) -> Result<(), AssignError> {
        let mut state = self.child.state();
        if state.draining || state.closed {
            return Err(AssignError::Draining);
        }
        if state.jobs.contains_key(&offer.id) {
            return Err(AssignError::Held);
        }
        if state.jobs.len() >= self.child.max_jobs {
            return Err(AssignError::Full);
        }
        if state.ended.remove(&offer.id) {
            state.ended_order.retain(|id| *id != offer.id);
        }
        let job = Job { phase: Phase::Queued(offer.payload), posting: 0, lost_after_post: false };
        state.jobs.insert(offer.id.clone(), job);
        state.queue.push_back(offer.id);
        drop(state);
        self.child.wake.notify_waiters();
        Ok(())
    }

    /// How many jobs would start at once if assigned now: the sizes of the open takes, within the limit
    /// of the registration.
    pub fn open_slots(&self) -> usize {
        let state = self.child.state();
        if state.draining || state.closed {
            return 0;
        }
        let mut open: usize = state.parked.iter().map(|(_, size, _)| size).sum();
        if open == 0
            && let Some((at, size)) = state.last_empty
            && at.elapsed() < REPOLL
        {
            open = size;
        }
        let queued = state.queue.len();
        open.saturating_sub(queued).min(self.child.max_jobs.saturating_sub(state.jobs.len()))
    }

    /// Whether the child does nothing but wait for a job, and since when.
    pub fn idle(&self) -> Option<Idle> {
        let state = self.child.state();
        if !state.jobs.is_empty() || state.draining || state.closed {
            return None;
        }
        let waiting_since = state.parked.iter().map(|(.., since)| *since).max()?;
        Some(Idle { waiting_since, last_job_ended: state.last_job_ended })
    }

    /// Jobs that the child was given and that have not ended.
    pub fn held(&self) -> usize {
        self.child.state().jobs.len()
    }

    /// Version of the SDK, once a request told it.
    pub fn sdk(&self) -> Option<SdkVersion> {
        self.child.state().sdk
    }

    /// Asks the child to stop a job.
    pub fn stop(&self, job: &str) -> StopOutcome {
        let mut state = self.child.state();
        let Some(held) = state.jobs.get(job) else { return StopOutcome::Unknown };
        if matches!(held.phase, Phase::Queued(_)) {
            state.queue.retain(|id| id != job);
            state.end(job);
            return StopOutcome::NeverStarted;
        }
        if !state.stops.iter().any(|(id, _)| id == job) {
            state.stops.push((job.to_owned(), None));
        }
        let listening = state.stop_poll_seen;
        drop(state);
        self.child.wake.notify_waiters();
        StopOutcome::Signalled { listening }
    }

    /// Forgets a job whose end the supervisor knows from elsewhere (the child's log). Its late messages
    /// are ignored.
    pub fn forget(&self, job: &str) {
        let mut state = self.child.state();
        state.queue.retain(|id| id != job);
        if state.jobs.contains_key(job) {
            state.end(job);
        }
    }

    /// Gives the child nothing more and ends its polls, so that it can finish and exit. Returns the jobs
    /// that it had not taken; those it holds stay.
    pub fn drain(&self) -> Vec<String> {
        let mut state = self.child.state();
        if state.draining { Vec::new() } else { self.child.start_drain(&mut state) }
    }

    /// Removes the child: its process is gone. Returns what it had.
    pub fn close(self) -> Vec<Unfinished> {
        self.hub.remove(self.child.worker_id());
        let mut state = self.child.state();
        state.closed = true;
        let mut left: Vec<Unfinished> = state
            .jobs
            .drain()
            .map(|(job, held)| Unfinished { job, taken: !matches!(held.phase, Phase::Queued(_)) })
            .collect();
        left.sort_unstable_by(|a, b| a.job.cmp(&b.job));
        drop(state);
        self.child.wake.notify_waiters();
        left
    }
}

impl Drop for ChildHandle {
    fn drop(&mut self) {
        self.hub.remove(self.child.worker_id());
        self.child.state().closed = true;
        self.child.wake.notify_waiters();
    }
}
