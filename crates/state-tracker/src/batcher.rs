//! Waiting requests of all kinds become one transaction: while one commits, the next gathers.

use std::{ops::Range, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use ringback_service_runtime::{Shutdown, fault};
use ringback_store::{Store, StoreError, Urgency, observer::Observer, quarantine};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::task::TaskTracker;

use crate::{
    after::Announcer,
    fold::{After, Env, Folded, fold},
    unit::{Answer, Unit},
};

/// Requests that may wait for a transaction.
const QUEUE_MAX: usize = 4_096;
/// A command that fails because a row changed meanwhile decides again at once, this often.
const CONFLICT_TRIES: u32 = 3;

/// Why a request has no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum FoldError {
    /// Nothing was committed: ask again.
    #[error("not now: {0}")]
    Unavailable(StoreError),
    /// Nobody knows whether it was committed: stay silent, the sender repeats.
    #[error("the fate of the commit is unknown")]
    Unknown,
}

struct Waiting {
    units: Vec<Unit>,
    reply: oneshot::Sender<Result<Vec<Answer>, FoldError>>,
}

/// Sends units to the batcher. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Batcher {
    queue: mpsc::Sender<Waiting>,
}

/// What the batcher works with.
pub(crate) struct Parts {
    pub(crate) store: Store,
    pub(crate) env: Arc<Env>,
    pub(crate) observer: Observer,
    pub(crate) announcer: Arc<Announcer>,
    pub(crate) max_events: usize,
    /// Transactions at once: on SQLite there is one writer anyway.
    pub(crate) parallel: usize,
}

impl Batcher {
    /// Starts the batcher. It ends when all its senders are gone.
    pub(crate) fn start(parts: Parts, tasks: &TaskTracker) -> Self {
        let (queue, receiver) = mpsc::channel(QUEUE_MAX);
        tasks.spawn(gather(Arc::new(parts), receiver, tasks.clone()));
        Self { queue }
    }

    /// Answers in the order of the units, after their commit.
    pub(crate) async fn submit(&self, units: Vec<Unit>) -> Result<Vec<Answer>, FoldError> {
        if units.is_empty() {
            return Ok(Vec::new());
        }
        let (reply, answer) = oneshot::channel();
        let closed =
            || FoldError::Unavailable(StoreError::Transient { detail: "the tracker ends".to_owned() });
        self.queue.send(Waiting { units, reply }).await.map_err(|_| closed())?;
        answer.await.map_err(|_| FoldError::Unknown)?
    }

    /// [`Self::submit`] for one unit.
    pub(crate) async fn submit_one(&self, unit: Unit) -> Result<Answer, FoldError> {
        let mut answers = self.submit(vec![unit]).await?;
        answers.pop().ok_or(FoldError::Unknown)
    }
}

async fn gather(parts: Arc<Parts>, mut queue: mpsc::Receiver<Waiting>, tasks: TaskTracker) {
    let free = Arc::new(Semaphore::new(parts.parallel.max(1)));
    let mut held: Option<Waiting> = None;
    loop {
        // Never closed by us.
        let Ok(permit) = Arc::clone(&free).acquire_owned().await else { return };
        let first = match held.take() {
            Some(waiting) => waiting,
            None => match queue.recv().await {
                Some(waiting) => waiting,
                None => return,
            },
        };
        let mut events = first.units.len();
        let mut batch = vec![first];
        while events < parts.max_events {
            let Ok(next) = queue.try_recv() else { break };
            if events + next.units.len() > parts.max_events {
                held = Some(next);
                break;
            }
            events += next.units.len();
            batch.push(next);
        }
        tasks.spawn(work(Arc::clone(&parts), batch, permit));
    }
}

async fn work(parts: Arc<Parts>, batch: Vec<Waiting>, permit: OwnedSemaphorePermit) {
    let mut units = Vec::with_capacity(batch.iter().map(|w| w.units.len()).sum());
    let mut waiters = Vec::with_capacity(batch.len());
    for waiting in batch {
        waiters.push((waiting.units.len(), waiting.reply));
        units.extend(waiting.units);
    }
    metrics::histogram!("ringback_tracker_fold_size").record(units.len() as f64);
    let units: Arc<[Unit]> = units.into();
    let all = 0..units.len();
    let result = parts.commit(&units, all).await;
    // The next transaction begins while this one's answers go out.
    drop(permit);
    match result {
        Ok(folded) => {
            fault::point("tracker.reply.before");
            let mut answers = folded.answers.into_iter();
            for (n, reply) in waiters {
                // A sender that no longer waits repeats its request.
                let _ = reply.send(Ok(answers.by_ref().take(n).collect()));
            }
            parts.announcer.announce(folded.after).await;
        }
        Err(error) => {
            for (_, reply) in waiters {
                let _ = reply.send(Err(error.clone()));
            }
        }
    }
}

impl Parts {
    /// Commits a stretch of the units; one that cannot be applied is found by halving and put aside (P9).
    fn commit<'a>(
        &'a self,
        units: &'a Arc<[Unit]>,
        part: Range<usize>,
    ) -> BoxFuture<'a, Result<Folded, FoldError>> {
        Box::pin(async move {
            let error = match self.transaction(units, part.clone()).await {
                Ok(folded) => return Ok(folded),
                Err(error) => error,
            };
            match error {
                StoreError::CommitUnknown { .. } => Err(FoldError::Unknown),
                StoreError::Transient { .. } => Err(FoldError::Unavailable(error)),
                StoreError::Duplicate { .. } | StoreError::Permanent { .. } if part.len() == 1 => {
                    self.put_aside(&units[part.start], &error).await?;
                    Ok(Folded { answers: vec![Answer::Quarantined], after: After::default() })
                }
                StoreError::Duplicate { .. } | StoreError::Permanent { .. } => {
                    let middle = part.start + part.len() / 2;
                    let mut folded = self.commit(units, part.start..middle).await?;
                    let rest = self.commit(units, middle..part.end).await?;
                    folded.answers.extend(rest.answers);
                    folded.after.join(rest.after);
                    Ok(folded)
                }
            }
        })
    }

    async fn transaction(&self, units: &Arc<[Unit]>, part: Range<usize>) -> Result<Folded, StoreError> {
        for last in (0..CONFLICT_TRIES).rev() {
            fault::point("tracker.commit.before");
            let (units, part, env) = (Arc::clone(units), part.clone(), Arc::clone(&self.env));
            let steady = self.observer.is_steady();
            let began = std::time::Instant::now();
            let result = self
                .store
                .write(Urgency::Now, move |tx| {
                    let (units, part, env) = (Arc::clone(&units), part.clone(), Arc::clone(&env));
                    Box::pin(async move { fold(tx, &units[part], steady, &env).await })
                })
                .await;
            metrics::histogram!("ringback_tracker_commit_seconds").record(began.elapsed());
            match result {
                Ok(folded) => {
                    fault::point("tracker.commit.after");
                    return Ok(folded);
                }
                Err(error @ StoreError::Transient { .. }) => {
                    self.observer.cut_off("a commit failed");
                    if last == 0 {
                        return Err(error);
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(error @ StoreError::CommitUnknown { .. }) => {
                    self.observer.cut_off("a commit is unknown");
                    return Err(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(StoreError::Transient { detail: "rows keep changing".to_owned() })
    }

    async fn put_aside(&self, unit: &Unit, error: &StoreError) -> Result<(), FoldError> {
        let kind = unit.what.kind();
        tracing::error!(job_id = %unit.job, kind, %error, "put aside: it cannot be applied");
        metrics::counter!("ringback_tracker_quarantined_total", "kind" => kind).increment(1);
        let (text, payload) = (error.to_string(), format!("{unit:?}").into_bytes());
        self.store
            .write(Urgency::Now, move |tx| {
                let (text, payload) = (text.clone(), payload.clone());
                Box::pin(async move { quarantine::insert(tx, kind, &text, &payload).await })
            })
            .await
            .map_err(FoldError::Unavailable)
    }
}

impl After {
    fn join(&mut self, other: Self) {
        self.transitions.extend(other.transitions);
        self.deliveries.extend(other.deliveries);
        self.publish.extend(other.publish);
        self.drops.extend(other.drops);
        for (worker, orders) in other.stops {
            self.stops.entry(worker).or_default().extend(orders);
        }
        for (endpoint, jobs) in other.chunks {
            self.chunks.entry(endpoint).or_default().extend(jobs);
        }
        self.cancel_rest.extend(other.cancel_rest);
    }
}

/// Ends together with the service.
pub(crate) async fn until_drained(tasks: &TaskTracker, shutdown: &Shutdown, grace: Duration) {
    tasks.close();
    if shutdown.drain(tasks.wait(), grace).await.is_err() {
        tracing::warn!("some requests were not finished in time; their senders repeat them");
    }
}
