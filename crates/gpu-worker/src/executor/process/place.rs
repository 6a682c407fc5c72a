//! One place for a child, and what is known of the jobs it was given. Shared by the pool, which gives and
//! stops jobs, and the task that supervises the child.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use ringback_worker_protocol::{ChildHandle, Hub, Offer};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::ProcessSettings;
use super::lines::JobLog;
use crate::executor::{End, ExecEvent, JobKey, Work};

/// A job in a child's hands.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) key: JobKey,
    pub(super) timeout: std::time::Duration,
    /// When it was given to the child.
    pub(super) assigned: Instant,
    /// When the child took it.
    pub(super) started: Option<Instant>,
    /// `Finished` was sent; only its release is outstanding.
    pub(super) reported: bool,
    pub(super) stop: Stop,
    pub(super) log: JobLog,
}

/// How far the stop of a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// Not asked for.
    No,
    /// Asked for, not yet told to the child.
    Wanted,
    /// Told; at this moment the child is ended.
    Told(Instant),
}

#[derive(Debug, Default)]
pub(super) struct PlaceState {
    pub(super) child: Option<ChildHandle>,
    pub(super) jobs: HashMap<String, Running>,
    pub(super) trouble: Option<String>,
}

#[derive(Debug)]
pub(super) struct Place {
    pub(super) number: usize,
    pub(super) settings: Arc<ProcessSettings>,
    pub(super) hub: Hub,
    pub(super) ending: CancellationToken,
    pub(super) wake: Notify,
    /// Jobs that one child takes at once, as far as known; 0 = not yet.
    asked: Arc<watch::Sender<usize>>,
    events: mpsc::UnboundedSender<ExecEvent>,
    state: Mutex<PlaceState>,
}

impl Place {
    pub(super) fn new(
        number: usize,
        settings: Arc<ProcessSettings>,
        hub: Hub,
        events: mpsc::UnboundedSender<ExecEvent>,
        ending: CancellationToken,
        asked: Arc<watch::Sender<usize>>,
    ) -> Self {
        Self { number, settings, hub, ending, wake: Notify::new(), asked, events, state: Mutex::default() }
    }

    /// Where the child's confirm handshake is served, if it has one.
    pub(super) fn confirm_port(&self) -> Option<u16> {
        self.settings.first_port?.checked_add(u16::try_from(self.number).ok()?)
    }

    /// Jobs that a child of this place may hold.
    pub(super) fn max_jobs(&self) -> usize {
        self.settings.concurrency.unwrap_or(self.settings.slots).max(1)
    }

    /// Whether the slots need a child in this place, as far as known.
    pub(super) fn is_needed(&self) -> bool {
        let asked = *self.asked.borrow();
        self.number == 0 || (asked > 0 && self.number < self.settings.slots.div_ceil(asked))
    }

    /// Waits until the slots need a child here.
    pub(super) async fn needed(&self) {
        let mut asked = self.asked.subscribe();
        while !self.is_needed() {
            // The place itself holds the sender.
            if asked.changed().await.is_err() {
                return;
            }
        }
    }

    /// A child takes this many jobs at once.
    pub(super) fn asks(&self, whole: usize) {
        if self.settings.concurrency.is_none() {
            self.asked.send_if_modified(|known| {
                let more = whole > *known;
                *known = whole.max(*known);
                more
            });
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, PlaceState> {
        // Nothing that runs under this lock panics between two changes that belong together.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tell(&self, event: ExecEvent) {
        // The receiver goes away only after the pool has ended.
        let _ = self.events.send(event);
    }

    pub(super) fn open_slots(&self) -> usize {
        self.state().child.as_ref().map_or(0, ChildHandle::open_slots)
    }

    pub(super) fn busy(&self) -> usize {
        self.state().jobs.len()
    }

    pub(super) fn trouble(&self) -> Option<String> {
        self.state().trouble.clone()
    }

    pub(super) fn assign(&self, work: Box<Work>) -> Result<(), Box<Work>> {
        let mut state = self.state();
        let state = &mut *state;
        let Some(child) = state.child.as_ref() else { return Err(work) };
        // Never behind a running job of a handler that takes one at a time.
        let may_hold = self.settings.concurrency.unwrap_or(*self.asked.borrow());
        if state.jobs.len() >= may_hold.max(1) {
            return Err(work);
        }
        // Also a job whose attempt was reported but whose handler may still run keeps its id.
        if state.jobs.contains_key(&work.public_id) {
            return Err(work);
        }
        let offer = Offer { id: work.public_id.clone(), payload: work.job_json() };
        if child.assign(offer).is_err() {
            return Err(work);
        }
        let running = Running {
            key: work.key,
            timeout: work.timeout,
            assigned: Instant::now(),
            started: None,
            reported: false,
            stop: Stop::No,
            log: JobLog::new(self.settings.log_max_bytes),
        };
        state.jobs.insert(work.public_id, running);
        Ok(())
    }

    pub(super) fn stop(&self, key: JobKey) {
        let mut state = self.state();
        for job in state.jobs.values_mut() {
            if job.key == key && job.stop == Stop::No {
                job.stop = Stop::Wanted;
                self.wake.notify_one();
            }
        }
    }

    /// Sends `Finished` once.
    pub(super) fn report(&self, job: &mut Running, end: End) {
        if std::mem::replace(&mut job.reported, true) {
            return;
        }
        let execution_ms =
            job.started.map_or(0, |at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX));
        let logs: Bytes = job.log.take();
        self.tell(ExecEvent::Finished { key: job.key, end, execution_ms, logs });
    }

    /// Removes a job that nothing runs any more.
    pub(super) fn release(&self, state: &mut PlaceState, id: &str, end: End) {
        if let Some(mut job) = state.jobs.remove(id) {
            self.report(&mut job, end);
            self.tell(ExecEvent::Released { key: job.key });
            self.tell(ExecEvent::Capacity);
        }
    }
}
