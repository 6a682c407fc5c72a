//! Requests that wait for a job. They subscribe first, then read SQL, then wait for the tracker's announcement of the
//! committed state; a slow second look makes up for announcements that were lost.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use ringback_bus::{Announcements, Bus, BusError};
use ringback_contracts::{Message as _, job_id_of, v1};
use ringback_domain::{JobId, JobStatus, ProjectId};
use ringback_service_runtime::Shutdown;
use tokio::sync::{Notify, broadcast};

use crate::error::ApiError;

const SHARDS: usize = 32;
/// Announcements kept for a slow reader of `/v1/stream`; then it is told of a gap.
const STREAM_BUFFER: usize = 4096;
/// A waiter looks again after this long without an announcement.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// The same while NATS is away and no announcement can come.
const LOOK_AGAIN_ALONE: Duration = Duration::from_secs(1);

/// What a waiter wants to be woken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wants {
    /// Only the end.
    End,
    /// Every transition and every chunk.
    Anything,
}

struct Entry {
    id: u64,
    wants: Wants,
    wake: Arc<Notify>,
}

type Shard = Mutex<HashMap<JobId, Vec<Entry>>>;

/// Everybody who waits.
pub(crate) struct Waiters {
    bus: Bus,
    shards: Vec<Shard>,
    next_id: AtomicU64,
    count: AtomicUsize,
    per_project: Mutex<HashMap<ProjectId, u32>>,
    max: usize,
    max_per_project: u32,
    streams: broadcast::Sender<Arc<v1::TransitionEvents>>,
}

/// A place in the crowd; given back when dropped.
pub(crate) struct Waiter {
    all: Arc<Waiters>,
    project: ProjectId,
    job: JobId,
    id: u64,
    wake: Arc<Notify>,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut shard = lock(self.all.shard(self.job));
        if let Some(entries) = shard.get_mut(&self.job) {
            entries.retain(|e| e.id != self.id);
            if entries.is_empty() {
                shard.remove(&self.job);
            }
        }
        drop(shard);
        self.all.leave(self.project);
    }
}

impl Waiter {
    /// Returns when there may be something new, at the latest after a few seconds.
    pub(crate) async fn woken(&self) {
        let patience = if self.all.bus.is_connected() { LOOK_AGAIN } else { LOOK_AGAIN_ALONE };
        let _ = tokio::time::timeout(patience, self.wake.notified()).await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is one step; a panic leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Waiters {
    /// `max_per_project` 0 = only `max` applies.
    pub(crate) fn new(bus: Bus, max: u32, max_per_project: u32) -> Arc<Self> {
        Arc::new(Self {
            bus,
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            next_id: AtomicU64::new(0),
            count: AtomicUsize::new(0),
            per_project: Mutex::default(),
            max: max as usize,
            max_per_project: if max_per_project == 0 { u32::MAX } else { max_per_project },
            streams: broadcast::channel(STREAM_BUFFER).0,
        })
    }

    fn shard(&self, job: JobId) -> &Shard {
        // The last byte of a UUIDv7 is random.
        &self.shards[usize::from(job.as_bytes()[15]) % SHARDS]
    }

    /// Joins the crowd that waits for a job.
    pub(crate) fn join(
        self: &Arc<Self>,
        project: ProjectId,
        job: JobId,
        wants: Wants,
    ) -> Result<Waiter, ApiError> {
        self.enter(project)?;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let wake = Arc::new(Notify::new());
        lock(self.shard(job)).entry(job).or_default().push(Entry { id, wants, wake: Arc::clone(&wake) });
        Ok(Waiter { all: Arc::clone(self), project, job, id, wake })
    }

    fn enter(&self, project: ProjectId) -> Result<(), ApiError> {
        let full = |what: &str, max: u64, setting: &str| {
            ApiError::too_many(
                format!(
                    "{max} requests of {what} wait for jobs already (setting server.{setting}); ask for the status \
                         without waiting, or use a webhook"
                ),
                1,
            )
        };
        let mut projects = lock(&self.per_project);
        let of_project = projects.entry(project).or_insert(0);
        if self.count.load(Ordering::Relaxed) >= self.max {
            return Err(full("all projects", self.max as u64, "max_waiters"));
        }
        if *of_project >= self.max_per_project {
            return Err(full("this project", self.max_per_project.into(), "max_waiters_per_project"));
        }
        *of_project += 1;
        self.count.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn leave(&self, project: ProjectId) {
        let mut projects = lock(&self.per_project);
        if let Some(n) = projects.get_mut(&project) {
            *n = n.saturating_sub(1);
            if *n == 0 {
                projects.remove(&project);
            }
        }
        self.count.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many wait.
    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Announcements as they come, for `/v1/stream`.
    pub(crate) fn stream(&self) -> broadcast::Receiver<Arc<v1::TransitionEvents>> {
        self.streams.subscribe()
    }

    fn wake(&self, job: JobId, ended: bool) {
        if let Some(entries) = lock(self.shard(job)).get(&job) {
            for entry in entries.iter().filter(|e| ended || e.wants == Wants::Anything) {
                entry.wake.notify_one();
            }
        }
    }

    fn wake_all(&self) {
        for shard in &self.shards {
            for entry in lock(shard).values().flatten() {
                entry.wake.notify_one();
            }
        }
    }

    /// Hands announcements on until the shutdown; never ends otherwise.
    pub(crate) async fn listen(self: Arc<Self>, shutdown: Shutdown) {
        tokio::join!(
            self.follow(&shutdown, Bus::subscribe_transitions, Self::on_transitions),
            self.follow(&shutdown, async |bus: &Bus| bus.subscribe_chunks(None).await, Self::on_chunks),
        );
        // Whoever waits gets the state of the moment, so that the drain is short.
        self.wake_all();
    }

    async fn follow(
        &self,
        shutdown: &Shutdown,
        subscribe: impl AsyncFn(&Bus) -> Result<Announcements, BusError>,
        handle: impl Fn(&Self, &[u8]),
    ) {
        let mut connectivity = self.bus.connectivity();
        while !shutdown.is_triggered() {
            let mut announcements = match subscribe(&self.bus).await {
                Ok(announcements) => announcements,
                Err(error) => {
                    tracing::debug!(%error, "announcements cannot be subscribed to now");
                    tokio::select! {
                        () = tokio::time::sleep(LOOK_AGAIN_ALONE) => {}
                        () = shutdown.triggered() => {}
                    }
                    continue;
                }
            };
            loop {
                tokio::select! {
                    next = announcements.next() => match next {
                        Some(announcement) => handle(self, &announcement.payload),
                        None => break,
                    },
                    // What was announced while the connection was away is lost: everybody looks.
                    changed = connectivity.changed() => {
                        if changed.is_err() { return; }
                        self.wake_all();
                    }
                    () = shutdown.triggered() => return,
                }
            }
        }
    }

    fn on_transitions(&self, payload: &[u8]) {
        // Nobody waits: thousands of events per second need not even be read.
        let streams = self.streams.receiver_count() > 0;
        if !streams && self.count() == 0 {
            return;
        }
        let Ok(events) = v1::TransitionEvents::decode(payload) else {
            tracing::warn!("an announcement of transitions cannot be read");
            return;
        };
        for event in &events.events {
            let ended = JobStatus::from_code(i64::from(event.status)).is_some_and(JobStatus::is_terminal);
            if let Ok(job) = job_id_of(&event.job_id) {
                self.wake(job, ended);
            }
        }
        if streams {
            // Err: the last reader has just gone.
            let _ = self.streams.send(Arc::new(events));
        }
    }

    fn on_chunks(&self, payload: &[u8]) {
        if self.count() == 0 {
            return;
        }
        let Ok(events) = v1::ChunkEvents::decode(payload) else { return };
        for id in &events.job_ids {
            if let Ok(job) = job_id_of(id) {
                self.wake(job, false);
            }
        }
    }
}
