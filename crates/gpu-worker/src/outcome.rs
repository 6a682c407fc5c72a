//! The way of an outcome: spool, tracker, acknowledgement.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use ringback_bus::{Bus, BusError, Verb};
use ringback_contracts::{Message as _, VERSION, attempt_of, completion_to_wire, v1};
use ringback_domain::event::Completion;
use ringback_domain::{AttemptRef, JobId};
use ringback_service_runtime::blobs::{BlobError, BlobKey, BlobStore};
use ringback_service_runtime::fault;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};

use crate::message::Message;
use crate::spool::SpoolWriter;

/// An outcome of a short job goes to disk only when the tracker has not answered within this time: until it
/// is committed the job's message is unacknowledged, so a crash means that the job runs again, which
/// at-least-once execution allows. Several commits of a tracker under full load fit into it: with less, the spool's
/// syncs contend with the very commits that make them needless.
const SPOOL_AFTER: Duration = Duration::from_millis(100);
/// A longer execution is worth a record at once.
const EXPENSIVE_MS: u64 = 500;
const MAX_BATCH: usize = 500;
const MAX_BATCH_BYTES: usize = 512 * 1024;
/// From this age on, an outcome's attempt is named in heartbeats.
const NAMED_AFTER: Duration = Duration::from_secs(1);
/// Requests under way at once; a further one starts only for a batch that is worth it.
const MAX_IN_FLIGHT: usize = 4;
const WORTH_IT: usize = 32;
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// Above these no more jobs are fetched.
const MAX_PENDING: usize = 8 * 1024;
const MAX_PENDING_BYTES: u64 = 256 * 1024 * 1024;
/// Logs above this size travel as a blob.
const INLINE_LOG_BYTES: usize = 64 * 1024;

/// A finished attempt.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) outcome: v1::Outcome,
    /// Absent for outcomes of an earlier life of this worker.
    pub(crate) message: Option<Message>,
    /// Its number in the spool, where it comes from there.
    pub(crate) spool_id: Option<u64>,
}

enum Command {
    Finished(Box<Finished>),
    Beats(oneshot::Sender<Vec<v1::Beat>>),
    Holds(JobId, oneshot::Sender<bool>),
    SpoolAll,
}

#[derive(Debug, Default)]
struct Gauges {
    pending: AtomicUsize,
    bytes: AtomicU64,
}

/// The sender's side. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Outcomes {
    commands: mpsc::UnboundedSender<Command>,
    gauges: Arc<Gauges>,
    spool: Arc<SpoolWriter>,
    changed: Arc<Notify>,
}

/// What the actor needs.
pub(crate) struct OutcomeSettings {
    pub(crate) bus: Bus,
    pub(crate) blobs: BlobStore,
    pub(crate) worker_id: String,
    pub(crate) request_timeout: Duration,
    pub(crate) extend_every: Duration,
    pub(crate) first_id: u64,
}

impl Outcomes {
    pub(crate) fn start(
        settings: OutcomeSettings,
        spool: SpoolWriter,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let (commands, receiver) = mpsc::unbounded_channel();
        let outcomes =
            Self { commands, gauges: Arc::default(), spool: Arc::new(spool), changed: Arc::default() };
        let actor = Actor {
            next_id: settings.first_id,
            settings,
            spool: Arc::clone(&outcomes.spool),
            gauges: Arc::clone(&outcomes.gauges),
            changed: Arc::clone(&outcomes.changed),
            pending: HashMap::new(),
            ready: VecDeque::new(),
            retries: VecDeque::new(),
            requests: FuturesUnordered::new(),
            uploads: FuturesUnordered::new(),
            unspooled: VecDeque::new(),
        };
        let task = tokio::spawn(actor.run(receiver));
        (outcomes, task)
    }

    /// Takes over an outcome: it will reach the tracker, or wait in the spool.
    pub(crate) fn send(&self, finished: Finished) {
        // Counted here, so that a burst is seen before the actor runs.
        self.gauges.pending.fetch_add(1, Ordering::Relaxed);
        // The actor lives as long as any sender.
        let _ = self.commands.send(Command::Finished(Box::new(finished)));
    }

    /// Whether more jobs may be fetched.
    pub(crate) fn has_room(&self) -> bool {
        self.pending() < MAX_PENDING
            && self.gauges.bytes.load(Ordering::Relaxed) < MAX_PENDING_BYTES
            && !self.spool.is_full()
    }

    pub(crate) fn pending(&self) -> usize {
        self.gauges.pending.load(Ordering::Relaxed)
    }

    pub(crate) fn spool(&self) -> &SpoolWriter {
        &self.spool
    }

    /// Returns after the number of outcomes under way has changed.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Attempts whose outcome is on its way: they keep their leases.
    pub(crate) async fn beats(&self) -> Vec<v1::Beat> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Beats(reply));
        answer.await.unwrap_or_default()
    }

    /// Whether an outcome of this job is on its way.
    pub(crate) async fn holds(&self, job: JobId) -> bool {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Holds(job, reply));
        answer.await.unwrap_or(false)
    }

    /// Waits until everything is committed, at most this long; what is left is spooled.
    pub(crate) async fn drain(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while self.pending() > 0 && Instant::now() < end {
            let _ = tokio::time::timeout(Duration::from_millis(20), self.changed()).await;
        }
        let _ = self.commands.send(Command::SpoolAll);
        self.pending() == 0
    }
}

struct Pending {
    outcome: v1::Outcome,
    message: Option<Message>,
    since: Instant,
    spooled: bool,
    last_extended: Instant,
    tries: u32,
    bytes: usize,
}

type Answer = (Vec<u64>, Result<Vec<v1::Verdict>, BusError>);

/// What became of large payloads.
#[derive(Default)]
struct Uploaded {
    id: u64,
    output: Option<v1::Payload>,
    /// What that output says of a completion.
    completion: Option<v1::Completion>,
    logs: Option<v1::Payload>,
    failed: Option<BlobError>,
}

struct Actor {
    settings: OutcomeSettings,
    spool: Arc<SpoolWriter>,
    gauges: Arc<Gauges>,
    changed: Arc<Notify>,
    next_id: u64,
    pending: HashMap<u64, Pending>,
    ready: VecDeque<u64>,
    retries: VecDeque<(Instant, u64)>,
    requests: FuturesUnordered<BoxFuture<'static, Answer>>,
    uploads: FuturesUnordered<BoxFuture<'static, Uploaded>>,
    /// In order of age.
    unspooled: VecDeque<u64>,
}

impl Actor {
    async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        let mut tick = tokio::time::interval(Duration::from_millis(10));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut slow = tokio::time::interval(Duration::from_secs(1));
        slow.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let ticking = !self.unspooled.is_empty() || !self.retries.is_empty();
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => {
                        self.command(command);
                        while let Ok(command) = commands.try_recv() {
                            self.command(command);
                        }
                    }
                    None => break,
                },
                Some(answer) = self.requests.next() => self.answered(answer).await,
                Some(uploaded) = self.uploads.next() => self.uploaded(uploaded),
                _ = tick.tick(), if ticking => self.tick(),
                _ = slow.tick(), if !self.pending.is_empty() => self.extend().await,
            }
            self.flush();
        }
        self.spool_all();
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Finished(finished) => self.accept(*finished),
            Command::Beats(reply) => {
                // A young one is about to be committed; naming it would only make work.
                let waiting = self
                    .pending
                    .values()
                    .filter(|pending| pending.message.is_none() || pending.since.elapsed() >= NAMED_AFTER);
                let beats = waiting.map(|pending| v1::Beat {
                    attempt: pending.outcome.attempt.clone(),
                    started_at_ms: pending.outcome.started_at_ms,
                    progress: Bytes::new(),
                });
                let _ = reply.send(beats.collect());
            }
            Command::Holds(job, reply) => {
                let id = job.as_bytes();
                let holds = self.pending.values().any(|pending| {
                    pending.outcome.attempt.as_ref().is_some_and(|attempt| attempt.job_id.as_ref() == id)
                });
                let _ = reply.send(holds);
            }
            Command::SpoolAll => self.spool_all(),
        }
    }

    fn accept(&mut self, finished: Finished) {
        let id = finished.spool_id.unwrap_or(self.next_id);
        self.next_id = self.next_id.max(id + 1);
        let bytes = finished.outcome.encoded_len();
        let now = Instant::now();
        let expensive = finished.outcome.execution_ms >= EXPENSIVE_MS;
        let spooled = finished.spool_id.is_some();
        let pending = Pending {
            outcome: finished.outcome,
            message: finished.message,
            since: now,
            spooled,
            last_extended: now,
            tries: 0,
            bytes,
        };
        self.gauges.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.pending.insert(id, pending);
        if !spooled {
            self.unspooled.push_back(id);
            if expensive || bytes > MAX_BATCH_BYTES {
                self.spool_one(id);
            }
        }
        self.prepare(id);
    }

    /// Moves large payloads to the blob store, then queues the outcome.
    fn prepare(&mut self, id: u64) {
        let Some(pending) = self.pending.get_mut(&id) else { return };
        let limit = usize::try_from(self.settings.blobs.inline_max_bytes()).unwrap_or(usize::MAX);
        let output =
            output_of(&mut pending.outcome).and_then(|payload| large_inline(payload.as_ref(), limit));
        let logs = large_inline(pending.outcome.logs.as_ref(), INLINE_LOG_BYTES);
        if output.is_none() && logs.is_none() {
            self.ready.push_back(id);
            return;
        }
        let name = attempt_of(pending.outcome.attempt.as_ref());
        let Ok((job, attempt)) = name else {
            // Made by us, so this cannot be; the tracker will quarantine it.
            self.ready.push_back(id);
            return;
        };
        let blobs = self.settings.blobs.clone();
        self.uploads.push(Box::pin(async move {
            let mut done = Uploaded { id, ..Uploaded::default() };
            if let Some(bytes) = output {
                done.completion = completion_in(bytes.clone()).await;
                match put(&blobs, "out", &job, &attempt, bytes).await {
                    Ok(payload) => done.output = Some(payload),
                    Err(error) => done.failed = Some(error),
                }
            }
            if let Some(bytes) = logs
                && done.failed.is_none()
            {
                match put(&blobs, "logs", &job, &attempt, bytes).await {
                    Ok(payload) => done.logs = Some(payload),
                    Err(error) => done.failed = Some(error),
                }
            }
            done
        }));
    }

    fn uploaded(&mut self, uploaded: Uploaded) {
        let Uploaded { id, output, completion, logs, failed } = uploaded;
        let Some(pending) = self.pending.get_mut(&id) else { return };
        if let Some(payload) = output
            && let Some(slot) = output_of(&mut pending.outcome)
        {
            *slot = Some(payload);
            pending.outcome.completion = completion;
        }
        if let Some(payload) = logs {
            pending.outcome.logs = Some(payload);
        }
        let Some(error) = failed else {
            self.shrunk(id);
            self.ready.push_back(id);
            return;
        };
        if matches!(error, BlobError::TooLarge { .. }) {
            // Trying again cannot help: the job fails with the limit.
            pending.outcome.result = Some(v1::outcome::Result::Failure(v1::Failure {
                error: format!("the handler's output is too large: {error}"),
                error_type: "ResultTooLarge".to_owned(),
                output: None,
            }));
            self.shrunk(id);
            self.ready.push_back(id);
            return;
        }
        tracing::warn!(%error, "an output cannot be stored; it waits");
        self.retry_later(id);
    }

    /// The payloads have left memory.
    fn shrunk(&mut self, id: u64) {
        if let Some(pending) = self.pending.get_mut(&id) {
            let bytes = pending.outcome.encoded_len();
            let before = std::mem::replace(&mut pending.bytes, bytes);
            self.gauges.bytes.fetch_sub(before.saturating_sub(bytes) as u64, Ordering::Relaxed);
        }
    }

    /// At once when idle; while requests are under way, in batches that are worth one.
    fn flush(&mut self) {
        while !self.ready.is_empty()
            && (self.requests.is_empty()
                || (self.requests.len() < MAX_IN_FLIGHT && self.ready.len() >= WORTH_IT))
        {
            self.send_batch();
        }
    }

    fn send_batch(&mut self) {
        let mut ids = Vec::new();
        let mut outcomes = Vec::new();
        let mut bytes = 0;
        while ids.len() < MAX_BATCH {
            let Some(id) = self.ready.front().copied() else { break };
            let Some(pending) = self.pending.get(&id) else {
                self.ready.pop_front();
                continue;
            };
            if !ids.is_empty() && bytes + pending.bytes > MAX_BATCH_BYTES {
                break;
            }
            bytes += pending.bytes;
            outcomes.push(pending.outcome.clone());
            ids.push(id);
            self.ready.pop_front();
        }
        if ids.is_empty() {
            return;
        }
        metrics::histogram!("ringback_worker_outcome_batch_size").record(ids.len() as f64);
        let batch =
            v1::OutcomeBatch { version: VERSION, worker_id: self.settings.worker_id.clone(), outcomes };
        let payload = Bytes::from(batch.encode_to_vec());
        let (bus, timeout) = (self.settings.bus.clone(), self.settings.request_timeout);
        self.requests.push(Box::pin(async move {
            fault::point("worker.outcome.before");
            let answer = bus.request(Verb::Outcomes, payload, timeout).await;
            fault::point("worker.outcome.after");
            let verdicts = answer.and_then(|answer| {
                v1::OutcomeReply::decode(answer)
                    .map(|reply| reply.verdicts().collect::<Vec<_>>())
                    .map_err(|error| BusError::Transient(format!("unreadable answer: {error}")))
            });
            (ids, verdicts)
        }));
    }

    async fn answered(&mut self, (ids, verdicts): Answer) {
        match verdicts {
            Ok(verdicts) if verdicts.len() == ids.len() => {
                for (id, verdict) in ids.into_iter().zip(verdicts) {
                    self.judged(id, verdict).await;
                }
            }
            Ok(_) => self.all_later(ids, "the tracker answered for another number of outcomes"),
            Err(error) => self.all_later(ids, &error.to_string()),
        }
        self.changed.notify_waiters();
    }

    fn all_later(&mut self, ids: Vec<u64>, reason: &str) {
        tracing::warn!(outcomes = ids.len(), reason, "outcomes wait for the tracker");
        for id in ids {
            self.retry_later(id);
        }
    }

    fn retry_later(&mut self, id: u64) {
        if let Some(pending) = self.pending.get_mut(&id) {
            let pause = FIRST_RETRY.saturating_mul(1 << pending.tries.min(8)).min(LONGEST_RETRY);
            pending.tries = pending.tries.saturating_add(1);
            self.retries.push_back((Instant::now() + pause, id));
        }
    }

    /// Acknowledges last: only now is the outcome safe.
    async fn judged(&mut self, id: u64, verdict: v1::Verdict) {
        match verdict {
            v1::Verdict::Unspecified | v1::Verdict::Retry => return self.retry_later(id),
            v1::Verdict::Committed
            | v1::Verdict::Obsolete
            | v1::Verdict::Requeued
            | v1::Verdict::Quarantined => {}
        }
        let Some(pending) = self.pending.remove(&id) else { return };
        if let Some(message) = &pending.message {
            match verdict {
                v1::Verdict::Requeued => message.nak(None).await,
                v1::Verdict::Quarantined => message.term().await,
                _ => message.ack().await,
            }
        }
        if verdict == v1::Verdict::Quarantined {
            tracing::error!(attempt = ?pending.outcome.attempt, "the tracker could not apply an outcome and keeps it for people");
        }
        if pending.spooled {
            self.spool.done(id);
        }
        self.gauges.pending.fetch_sub(1, Ordering::Relaxed);
        self.gauges.bytes.fetch_sub(pending.bytes as u64, Ordering::Relaxed);
    }

    fn tick(&mut self) {
        let now = Instant::now();
        while let Some(&id) = self.unspooled.front() {
            match self.pending.get(&id) {
                Some(pending) if !pending.spooled && now.duration_since(pending.since) < SPOOL_AFTER => break,
                Some(pending) if !pending.spooled => self.spool_one(id),
                // Committed, or spooled already.
                Some(_) | None => {}
            }
            self.unspooled.pop_front();
        }
        let due: Vec<u64> = self.retries.iter().filter(|(at, _)| *at <= now).map(|(_, id)| *id).collect();
        if !due.is_empty() {
            self.retries.retain(|(at, _)| *at > now);
            for id in due {
                self.prepare(id);
            }
        }
    }

    fn spool_one(&mut self, id: u64) {
        if let Some(pending) = self.pending.get_mut(&id)
            && !std::mem::replace(&mut pending.spooled, true)
        {
            self.spool.append(id, pending.outcome.encode_to_vec());
        }
    }

    fn spool_all(&mut self) {
        let ids: Vec<u64> = self.pending.keys().copied().collect();
        for id in ids {
            self.spool_one(id);
        }
    }

    async fn extend(&mut self) {
        let now = Instant::now();
        for pending in self.pending.values_mut() {
            if let Some(message) = &pending.message
                && now.duration_since(pending.last_extended) >= self.settings.extend_every
            {
                pending.last_extended = now;
                message.in_progress().await;
            }
        }
    }
}

/// Where an outcome keeps its output.
fn output_of(outcome: &mut v1::Outcome) -> Option<&mut Option<v1::Payload>> {
    match outcome.result.as_mut()? {
        v1::outcome::Result::Success(success) => Some(&mut success.output),
        v1::outcome::Result::Failure(failure) => Some(&mut failure.output),
        v1::outcome::Result::Crash(_)
        | v1::outcome::Result::Overrun(_)
        | v1::outcome::Result::HandBack(_) => None,
    }
}

fn large_inline(payload: Option<&v1::Payload>, limit: usize) -> Option<Bytes> {
    match payload?.at.as_ref()? {
        v1::payload::At::Inline(bytes) if bytes.len() > limit => Some(bytes.clone()),
        v1::payload::At::Inline(_) | v1::payload::At::BlobKey(_) => None,
    }
}

/// What a large output says of a completion, read while it is at hand. One at a time: parsed JSON is several times its
/// text.
async fn completion_in(output: Bytes) -> Option<v1::Completion> {
    static ONE: Semaphore = Semaphore::const_new(1);
    // Never closed.
    let _one = ONE.acquire().await.ok()?;
    let read = tokio::task::spawn_blocking(move || Completion::of_large(&output));
    read.await.ok().flatten().map(completion_to_wire)
}

/// The key names the attempt, so that writing it again writes the same.
async fn put(
    blobs: &BlobStore,
    kind: &str,
    job: &JobId,
    attempt: &AttemptRef,
    bytes: Bytes,
) -> Result<v1::Payload, BlobError> {
    let AttemptRef { run, attempt, nonce } = attempt;
    let key = BlobKey::new(format!("{kind}/{}/{run}-{attempt}-{:016x}", job.simple(), nonce.0))?;
    let size_bytes = bytes.len() as u64;
    fault::point("worker.blob.before");
    blobs.put(&key, bytes).await?;
    fault::point("worker.blob.after");
    Ok(v1::Payload { at: Some(v1::payload::At::BlobKey(key.as_str().to_owned())), size_bytes })
}
