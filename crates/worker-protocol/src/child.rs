//! One child: what it was given, what it holds, which polls it has open.

mod handle;
mod state;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, Semaphore, mpsc};

use crate::event::{ChildEvent, ChunkPermit, Unhealthy};
use crate::hub::{HubConfig, Registration};
use crate::result::{DoneBody, HandlerResult};
use crate::sdk::SdkVersion;
use state::{Phase, State};

pub use handle::{AssignError, ChildHandle, Idle, Offer, StopOutcome, Unfinished};

/// A stop is told again after this time while its job is still held: the SDK ignores a stop for a job that
/// it has queued but not yet started.
const STOP_AGAIN: Duration = Duration::from_secs(1);

/// What a take gets.
pub(crate) enum Take {
    /// These jobs: ids and payloads.
    Jobs(Vec<(String, Bytes)>),
    /// Nothing now.
    Nothing,
    /// Nothing ever again.
    Draining,
}

/// What a stop poll gets.
pub(crate) struct Stops {
    /// Jobs to stop, told now.
    pub(crate) due: Vec<String>,
    /// When to look again although nothing changed.
    pub(crate) again: Option<Instant>,
    /// The child shall end.
    pub(crate) draining: bool,
}

/// State of one child, shared by its handle and the routes.
#[derive(Debug)]
pub(crate) struct Child {
    worker_id: String,
    endpoint: String,
    token: Vec<u8>,
    max_jobs: usize,
    overlap_grace: Duration,
    chunk_budget: u32,
    chunk_permits: Arc<Semaphore>,
    state: Mutex<State>,
    wake: Notify,
    events: mpsc::UnboundedSender<ChildEvent>,
}

impl Child {
    pub(crate) fn new(
        registration: Registration,
        config: &HubConfig,
        events: mpsc::UnboundedSender<ChildEvent>,
    ) -> Self {
        let budget = config.chunk_budget_bytes.clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize));
        Self {
            worker_id: registration.worker_id,
            endpoint: registration.endpoint,
            token: registration.token.into_bytes(),
            max_jobs: registration.max_jobs.max(1),
            overlap_grace: config.overlap_grace,
            chunk_budget: u32::try_from(budget).unwrap_or(u32::MAX),
            chunk_permits: Arc::new(Semaphore::new(budget)),
            state: Mutex::default(),
            wake: Notify::new(),
            events,
        }
    }

    pub(crate) fn worker_id(&self) -> &str {
        &self.worker_id
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(crate) fn token(&self) -> &[u8] {
        &self.token
    }

    /// A future that ends at the next change; call `enable` on it before looking.
    pub(crate) fn changed(&self) -> Notified<'_> {
        self.wake.notified()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in this file panics between two changes that belong together.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: ChildEvent) {
        // The supervisor is gone only when the child is being removed.
        let _ = self.events.send(event);
    }

    /// Notes an authorised request.
    pub(crate) fn contact(&self, sdk: Option<SdkVersion>) {
        let mut state = self.state();
        if state.sdk.is_none() {
            state.sdk = sdk;
        }
        if !state.contacted {
            state.contacted = true;
            self.tell(ChildEvent::FirstContact { sdk });
        }
    }

    pub(crate) fn wrong_key(&self) {
        let mut state = self.state();
        if !state.wrong_key_told {
            state.wrong_key_told = true;
            self.tell(ChildEvent::WrongKey);
        }
    }

    /// Applies the lost-job rule: called once per take, when it arrives.
    ///
    /// A take that says `job_in_progress=0` and arrives after an assigning reply was handed to the
    /// connection proves that the child holds nothing (SDK 1.7.9 and later take in turn and lower the flag
    /// only after the result call returned).
    pub(crate) fn take_arrived(&self, holds_nothing: bool) {
        if !holds_nothing {
            return;
        }
        let now = Instant::now();
        let mut state = self.state();
        let in_turn = state.sdk.is_some_and(SdkVersion::takes_in_turn);
        let mut lost = Vec::new();
        for (id, job) in &mut state.jobs {
            let Phase::Held(since) = job.phase else { continue };
            if !in_turn && now.duration_since(since) < self.overlap_grace {
                continue;
            }
            if job.posting > 0 {
                job.lost_after_post = true;
            } else {
                lost.push(id.clone());
            }
        }
        self.lose(&mut state, lost);
    }

    fn lose(&self, state: &mut State, mut lost: Vec<String>) {
        if lost.is_empty() {
            return;
        }
        lost.sort_unstable();
        for job in &lost {
            state.end(job);
        }
        self.tell(ChildEvent::Lost { jobs: lost });
    }

    /// Gives up to `want` queued jobs to a take.
    pub(crate) fn try_take(&self, want: usize) -> Take {
        let mut state = self.state();
        if state.draining || state.closed {
            return Take::Draining;
        }
        let mut jobs = Vec::new();
        while jobs.len() < want {
            let Some(id) = state.queue.pop_front() else { break };
            if let Some(job) = state.jobs.get_mut(&id)
                && let Phase::Queued(payload) = &job.phase
            {
                let payload = payload.clone();
                job.phase = Phase::Replying(payload.clone());
                jobs.push((id, payload));
            }
        }
        if !jobs.is_empty() {
            state.last_empty = None;
        }
        if jobs.is_empty() { Take::Nothing } else { Take::Jobs(jobs) }
    }

    /// The connection took the reply: the child holds these jobs.
    pub(crate) fn handed_over(&self, jobs: Vec<String>) {
        let mut state = self.state();
        for id in jobs {
            if let Some(job) = state.jobs.get_mut(&id) {
                job.phase = Phase::Held(Instant::now());
                self.tell(ChildEvent::Taken { job: id });
            }
        }
    }

    /// The reply was dropped unsent: the jobs are first in the queue again.
    pub(crate) fn hand_back(&self, jobs: Vec<String>) {
        let mut state = self.state();
        for id in jobs.into_iter().rev() {
            if let Some(job) = state.jobs.get_mut(&id)
                && let Phase::Replying(payload) = &job.phase
            {
                job.phase = Phase::Queued(payload.clone());
                state.queue.push_front(id);
            }
        }
        drop(state);
        self.wake.notify_waiters();
    }

    /// Notes an open take that accepts `size` jobs; the ticket closes it.
    pub(crate) fn park(self: &Arc<Self>, size: usize) -> ParkTicket {
        let mut state = self.state();
        let number = state.next_park;
        state.next_park += 1;
        state.parked.push((number, size, Instant::now()));
        let holds = state.jobs.values().filter(|job| !matches!(job.phase, Phase::Queued(_))).count();
        self.tell(ChildEvent::Ready { size, holds });
        ParkTicket { child: Arc::clone(self), number }
    }

    /// Notes that a take of this size ends with 204.
    pub(crate) fn answered_empty(&self, size: usize) {
        self.state().last_empty = Some((Instant::now(), size));
    }

    /// What a stop poll gets now.
    pub(crate) fn take_stops(&self) -> Stops {
        let now = Instant::now();
        let mut state = self.state();
        state.stop_poll_seen = true;
        let mut due = Vec::new();
        let mut again = None;
        for (id, told) in &mut state.stops {
            match told.map(|at| at + STOP_AGAIN) {
                Some(next) if next > now => again = Some(again.map_or(next, |at: Instant| at.min(next))),
                Some(_) | None => {
                    *told = Some(now);
                    due.push(id.clone());
                }
            }
        }
        Stops { due, again, draining: state.draining || state.closed }
    }

    pub(crate) fn ping(&self, jobs: Vec<String>, unhealthy: Option<Unhealthy>) {
        if let Some(unhealthy) = unhealthy {
            self.tell(ChildEvent::Unhealthy(unhealthy));
        } else {
            self.tell(ChildEvent::Ping { jobs });
        }
    }

    /// Notes that a result of this job is being read.
    pub(crate) fn begin_post(self: &Arc<Self>, job: &str) -> PostTicket {
        if let Some(held) = self.state().jobs.get_mut(job) {
            held.posting += 1;
        }
        PostTicket { child: Arc::clone(self), job: job.to_owned() }
    }

    fn end_post(&self, job: &str) {
        let mut state = self.state();
        let Some(held) = state.jobs.get_mut(job) else { return };
        held.posting = held.posting.saturating_sub(1);
        if held.posting == 0 && held.lost_after_post {
            self.lose(&mut state, vec![job.to_owned()]);
        }
    }

    /// Takes what a child posted. Late and unknown ones are ignored: the answer is 200 all the same.
    pub(crate) fn posted(&self, job: &str, body: DoneBody) {
        let mut state = self.state();
        if !state.jobs.contains_key(job) {
            let late = state.ended.contains(job);
            tracing::debug!(worker = %self.worker_id, job, late, "ignored a post for a job that is not held");
            return;
        }
        match body {
            DoneBody::Progress(output) => self.tell(ChildEvent::Progress { job: job.to_owned(), output }),
            DoneBody::Final(result) => self.finished(&mut state, job, result),
        }
    }

    fn finished(&self, state: &mut State, job: &str, result: HandlerResult) {
        let stop_pod = result.stop_pod;
        state.end(job);
        self.tell(ChildEvent::Result { job: job.to_owned(), result });
        if stop_pod && !state.draining {
            let unstarted = self.start_drain(state);
            self.tell(ChildEvent::StopPodRequested { unstarted });
        }
    }

    /// Passes a chunk on, after waiting for room.
    pub(crate) async fn chunk(&self, job: &str, output: Bytes) {
        let need = u32::try_from(output.len()).unwrap_or(u32::MAX).clamp(1, self.chunk_budget);
        let Ok(permit) = Arc::clone(&self.chunk_permits).acquire_many_owned(need).await else { return };
        let state = self.state();
        if state.jobs.contains_key(job) {
            let permit = ChunkPermit::new(permit);
            self.tell(ChildEvent::Chunk { job: job.to_owned(), output, permit });
        }
    }

    fn start_drain(&self, state: &mut State) -> Vec<String> {
        state.draining = true;
        let unstarted: Vec<String> = state.queue.drain(..).collect();
        for job in &unstarted {
            state.jobs.remove(job);
        }
        self.wake.notify_waiters();
        unstarted
    }
}

/// An open take.
pub(crate) struct ParkTicket {
    child: Arc<Child>,
    number: u64,
}

impl Drop for ParkTicket {
    fn drop(&mut self) {
        self.child.state().parked.retain(|(number, ..)| *number != self.number);
        self.child.tell(ChildEvent::TakeOver);
    }
}

/// A result that is being read; ends with the request, also when the connection breaks.
pub(crate) struct PostTicket {
    child: Arc<Child>,
    job: String,
}

impl Drop for PostTicket {
    fn drop(&mut self) {
        self.child.end_post(&self.job);
    }
}
