//! The attempts that this worker executes now.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use ringback_contracts::{attempt_to_wire, v1};
use ringback_domain::JobId;
use ringback_domain::artifact::ConfirmWish;

use crate::executor::JobKey;
use crate::message::Message;

/// Progress in one heartbeat: NATS carries messages of 1 MiB by default.
const PROGRESS_BUDGET_BYTES: usize = 512 * 1024;

/// An attempt in execution, or one whose handler is not surely gone yet.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) key: JobKey,
    /// Index of the endpoint's loop.
    pub(crate) endpoint: usize,
    /// Taken when the attempt finishes.
    pub(crate) message: Option<Message>,
    /// The worker's clock at the start.
    pub(crate) started_at_ms: Option<i64>,
    /// Whether the tracker may know the attempt: it was granted, or a report was sent.
    pub(crate) known_to_tracker: bool,
    /// Chunks passed on so far.
    pub(crate) chunks: u32,
    /// Progress that no heartbeat has told yet.
    pub(crate) progress: Option<Bytes>,
    /// Why it was ordered to stop.
    pub(crate) stop_reason: Option<String>,
    /// The outcome is on its way; only the release is outstanding.
    pub(crate) finished: bool,
    /// Its files are being dealt with; the handler is done.
    pub(crate) keeping: bool,
    /// Nothing of its handler is left, while its files are still dealt with.
    pub(crate) released: bool,
    /// The client's input, where its files are dealt with by it.
    pub(crate) input: Bytes,
    /// What it says about the confirmation of its files.
    pub(crate) confirm: Option<ConfirmWish>,
    pub(crate) span: tracing::Span,
    pub(crate) traceparent: String,
    pub(crate) last_extended: Instant,
    /// Longest execution.
    pub(crate) timeout: Duration,
}

/// All attempts of this worker.
#[derive(Debug, Default)]
pub(crate) struct Attempts(Mutex<HashMap<JobId, Held>>);

impl Attempts {
    fn lock(&self) -> MutexGuard<'_, HashMap<JobId, Held>> {
        // Nothing under this lock panics between two changes that belong together.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a handler may still hold the job.
    pub(crate) fn holds(&self, job: &JobId) -> bool {
        self.lock().contains_key(job)
    }

    pub(crate) fn insert(&self, held: Held) {
        self.lock().insert(held.key.job, held);
    }

    /// Changes an attempt, if it is this very one.
    pub(crate) fn with<T>(&self, key: &JobKey, change: impl FnOnce(&mut Held) -> T) -> Option<T> {
        self.lock().get_mut(&key.job).filter(|held| held.key == *key).map(change)
    }

    /// Forgets an attempt, if it is this very one.
    pub(crate) fn remove(&self, key: &JobKey) -> Option<Held> {
        let mut all = self.lock();
        if all.get(&key.job).is_some_and(|held| held.key == *key) { all.remove(&key.job) } else { None }
    }

    /// Attempts that have not finished.
    pub(crate) fn live(&self) -> usize {
        self.lock().values().filter(|held| !held.finished).count()
    }

    /// What a full heartbeat says.
    pub(crate) fn beats(&self) -> Vec<v1::Beat> {
        let mut budget = PROGRESS_BUDGET_BYTES;
        self.lock()
            .values_mut()
            .filter(|held| !held.finished)
            .filter_map(|held| beat(held, &mut budget))
            .collect()
    }

    /// What an early report says about those of `keys` that still run.
    pub(crate) fn beats_of(&self, keys: &[JobKey]) -> Vec<v1::Beat> {
        let mut all = self.lock();
        let (mut beats, mut budget) = (Vec::new(), PROGRESS_BUDGET_BYTES);
        for key in keys {
            let held = all.get_mut(&key.job).filter(|held| held.key == *key && !held.finished);
            beats.extend(held.and_then(|held| beat(held, &mut budget)));
        }
        beats
    }

    /// Progress that a failed heartbeat did not deliver is told by the next, unless newer came.
    pub(crate) fn restore_progress(&self, beats: Vec<v1::Beat>) {
        let mut all = self.lock();
        for beat in beats {
            if beat.progress.is_empty() {
                continue;
            }
            let Ok((job, attempt)) = ringback_contracts::attempt_of(beat.attempt.as_ref()) else { continue };
            if let Some(held) = all.get_mut(&job).filter(|held| held.key.attempt == attempt) {
                held.progress.get_or_insert(beat.progress);
            }
        }
    }

    /// Messages whose time at the broker should be extended now.
    pub(crate) fn due_extensions(&self, every: Duration) -> Vec<Message> {
        let now = Instant::now();
        let mut due = Vec::new();
        for held in self.lock().values_mut() {
            if let Some(message) = &held.message
                && now.duration_since(held.last_extended) >= every
            {
                held.last_extended = now;
                due.push(message.clone());
            }
        }
        due
    }
}

fn beat(held: &mut Held, budget: &mut usize) -> Option<v1::Beat> {
    let started_at_ms = held.started_at_ms?;
    held.known_to_tracker = true;
    // What does not fit is told by the next heartbeat.
    let progress = held.progress.take_if(|progress| progress.len() <= *budget).unwrap_or_default();
    *budget -= progress.len();
    Some(v1::Beat {
        attempt: Some(attempt_to_wire(&held.key.job, &held.key.attempt)),
        started_at_ms,
        progress,
    })
}
