//! Jobs that are tasks of this process: one task per job, which is ended by aborting it.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::{End, ExecEvent, JobKey, Work};

/// What a task does.
pub(crate) trait Run: Send + Sync + std::fmt::Debug {
    /// Runs one job. Dropping the future cancels it.
    fn run(self: Arc<Self>, work: Work) -> BoxFuture<'static, End>;

    /// Why no job can run now.
    fn trouble(&self) -> Option<String> {
        None
    }
}

/// The jobs of an endpoint that run in this process.
#[derive(Debug)]
pub(crate) struct TaskPool {
    slots: usize,
    run: Arc<dyn Run>,
    running: Arc<Mutex<HashMap<JobKey, AbortHandle>>>,
    events: mpsc::UnboundedSender<ExecEvent>,
}

impl TaskPool {
    /// A pool for `slots` jobs at once.
    pub(crate) fn new(slots: usize, events: mpsc::UnboundedSender<ExecEvent>, run: Arc<dyn Run>) -> Self {
        Self { slots, run, running: Arc::default(), events }
    }

    pub(crate) fn open_slots(&self) -> usize {
        if self.run.trouble().is_some() {
            return 0;
        }
        self.slots.saturating_sub(self.running().len())
    }

    pub(crate) fn busy(&self) -> usize {
        self.running().len()
    }

    pub(crate) fn trouble(&self) -> Option<String> {
        self.run.trouble()
    }

    pub(crate) fn assign(&self, work: Work) {
        let (events, running, key) = (self.events.clone(), Arc::clone(&self.running), work.key);
        let began = Instant::now();
        let _ = events.send(ExecEvent::Started { key });
        let job = Arc::clone(&self.run).run(work);
        // Locked over the spawn, so that a job of no time is registered before it ends.
        let mut registered = self.running();
        let task = tokio::spawn(async move {
            // A panic costs its job, and neither the slot nor the worker. The job is dropped with what it held.
            let end = AssertUnwindSafe(job).catch_unwind().await.unwrap_or_else(|_| End::Failure {
                error: "the engine panicked; the worker's log has the reason".to_owned(),
                error_type: "EngineError".to_owned(),
                output: None,
            });
            // Whoever removes it tells its end: this, or a stop.
            if lock(&running).remove(&key).is_some() {
                finish(&events, key, end, began);
            }
        });
        registered.insert(key, task.abort_handle());
    }

    pub(crate) fn stop(&self, key: JobKey) {
        self.end_one(key, End::Stopped);
    }

    /// Hands back everything that still runs.
    pub(crate) fn end(&self) {
        let keys: Vec<JobKey> = self.running().keys().copied().collect();
        for key in keys {
            self.end_one(key, End::HandBack { reason: "the worker is shutting down" });
        }
    }

    fn end_one(&self, key: JobKey, end: End) {
        let task = self.running().remove(&key);
        if let Some(task) = task {
            task.abort();
            finish(&self.events, key, end, Instant::now());
        }
    }

    fn running(&self) -> MutexGuard<'_, HashMap<JobKey, AbortHandle>> {
        lock(&self.running)
    }
}

fn lock(running: &Mutex<HashMap<JobKey, AbortHandle>>) -> MutexGuard<'_, HashMap<JobKey, AbortHandle>> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

fn finish(events: &mpsc::UnboundedSender<ExecEvent>, key: JobKey, end: End, began: Instant) {
    let execution_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    // The receiver goes away only with the worker.
    let _ = events.send(ExecEvent::Finished { key, end, execution_ms, logs: Bytes::new() });
    let _ = events.send(ExecEvent::Released { key });
    let _ = events.send(ExecEvent::Capacity);
}
