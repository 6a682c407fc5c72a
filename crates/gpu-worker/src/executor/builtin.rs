//! `builtin`: engines inside the worker. `echo` returns its input; `sleep` waits `input.seconds`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::{End, ExecEvent, JobKey, Work};

/// Longest sleep: a year, as the longest execution limit.
const MAX_SECONDS: f64 = 366.0 * 86_400.0;

/// Jobs that wait.
#[derive(Debug)]
pub(crate) struct SleepPool {
    slots: usize,
    running: Arc<Mutex<HashMap<JobKey, AbortHandle>>>,
    events: mpsc::UnboundedSender<ExecEvent>,
}

impl SleepPool {
    /// A pool for `slots` jobs at once.
    pub(crate) fn new(slots: usize, events: mpsc::UnboundedSender<ExecEvent>) -> Self {
        Self { slots, running: Arc::default(), events }
    }

    pub(crate) fn open_slots(&self) -> usize {
        self.slots.saturating_sub(self.running().len())
    }

    pub(crate) fn busy(&self) -> usize {
        self.running().len()
    }

    pub(crate) fn assign(&self, work: Work) {
        let (events, running, key) = (self.events.clone(), Arc::clone(&self.running), work.key);
        let began = Instant::now();
        let _ = events.send(ExecEvent::Started { key });
        // Locked over the spawn, so that a sleep of no time is registered before it ends.
        let mut registered = self.running();
        let task = tokio::spawn(async move {
            let end = sleep(&work).await;
            lock(&running).remove(&key);
            finish(&events, key, end, began);
        });
        registered.insert(key, task.abort_handle());
    }

    pub(crate) fn stop(&self, key: JobKey) {
        self.end_one(key, End::Stopped);
    }

    /// Hands back everything that still waits.
    pub(crate) fn end(&self) {
        let keys: Vec<JobKey> = self.running().keys().copied().collect();
        for key in keys {
            self.end_one(key, End::HandBack { reason: "the worker is shutting down" });
        }
    }

    fn end_one(&self, key: JobKey, end: End) {
        // Whoever removes it tells its end: this, or the task itself.
        if let Some(task) = self.running().remove(&key) {
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

async fn sleep(work: &Work) -> End {
    #[derive(Deserialize)]
    struct Input {
        seconds: f64,
    }
    let asked = serde_json::from_slice::<Input>(&work.input).map(|input| input.seconds);
    let Some(seconds) = asked.ok().filter(|seconds| (0.0..=MAX_SECONDS).contains(seconds)) else {
        return End::Failure {
            error: format!("input.seconds must be a number from 0 to {MAX_SECONDS}"),
            error_type: "BadInput".to_owned(),
            output: None,
        };
    };
    let wanted = Duration::from_secs_f64(seconds);
    tokio::time::sleep(wanted.min(work.timeout)).await;
    if wanted > work.timeout { End::Overrun } else { End::Success(Some(work.input.clone())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringback_domain::{AttemptRef, JobId, Nonce};

    fn work(input: &str, timeout: Duration) -> Work {
        let attempt = AttemptRef { run: 1, attempt: 1, nonce: Nonce(5) };
        Work {
            key: JobKey { job: JobId::from_parts(1, [1; 10]), attempt },
            public_id: "j".into(),
            input: Bytes::copy_from_slice(input.as_bytes()),
            extra_json: Bytes::new(),
            timeout,
        }
    }

    async fn end_of(input: &str, timeout: Duration) -> End {
        let (events, mut seen) = mpsc::unbounded_channel();
        let pool = SleepPool::new(1, events);
        pool.assign(work(input, timeout));
        loop {
            match seen.recv().await.expect("event") {
                ExecEvent::Finished { end, .. } => return end,
                _ => continue,
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn sleeps_fails_and_overruns() {
        let hour = Duration::from_secs(3600);
        let input = r#"{"seconds": 30, "x": 1}"#;
        assert_eq!(end_of(input, hour).await, End::Success(Some(Bytes::from_static(input.as_bytes()))));
        assert_eq!(end_of(input, Duration::from_secs(5)).await, End::Overrun);
        for bad in ["{}", "[]", r#"{"seconds": -1}"#, r#"{"seconds": 1e300}"#, r#"{"seconds": "1"}"#] {
            assert!(matches!(end_of(bad, hour).await, End::Failure { .. }), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_stopped_sleep_ends_once() {
        let (events, mut seen) = mpsc::unbounded_channel();
        let pool = SleepPool::new(1, events);
        let job = work(r#"{"seconds": 3600}"#, Duration::from_secs(9000));
        let key = job.key;
        pool.assign(job);
        assert_eq!((pool.open_slots(), pool.busy()), (0, 1));
        pool.stop(key);
        pool.stop(key);
        pool.end();
        assert_eq!(pool.open_slots(), 1);
        drop(pool);
        let mut ends = Vec::new();
        while let Some(event) = seen.recv().await {
            if let ExecEvent::Finished { end, .. } = event {
                ends.push(end);
            }
        }
        assert_eq!(ends, [End::Stopped]);
    }
}
