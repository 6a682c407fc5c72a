//! Hybrid tracking (row C1): a job is submitted with a webhook and remembered; if the webhook has not come in time, the
//! job is polled.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::join_all;
use ringback_service_runtime::Shutdown;
use ringback_service_runtime::time::now_ms;
use tokio::sync::Notify;

use crate::event::Event;
use crate::intake::Intake;
use crate::observe::Step;
use crate::store::{StoreError, TrackedJob};

/// Jobs polled at the same time.
const POLLS_AT_ONCE: u32 = 16;
/// Longest time for one poll.
const POLL_TIME: Duration = Duration::from_secs(30);
/// Pause after the store failed.
const STORE_PAUSE: Duration = Duration::from_secs(1);

/// The kind of what is told about jobs whose webhooks are awaited.
const TRACKED: &str = "job.tracked";

/// What a poll found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Polled {
    /// The job has ended: the body that its webhook would have had.
    Ended(Bytes),
    /// It goes on.
    Running,
    /// Nobody knows it (any more).
    Unknown,
}

/// Asks for a job's status.
#[async_trait]
pub trait Poll: Send + Sync {
    /// Asks once. An error means that the answer is not known; the job is asked for again.
    async fn poll(&self, job: &TrackedJob) -> Result<Polled, String>;
}

/// When to poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waits {
    /// How long the webhook is awaited before the first poll.
    pub max_wait: Duration,
    /// Time between the first two polls; it doubles.
    pub poll_every: Duration,
    /// Longest time between two polls. RunPod keeps results for 30 minutes.
    pub poll_at_least_every: Duration,
    /// How long after the submit a job is given up.
    pub give_up: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            max_wait: Duration::from_secs(300),
            poll_every: Duration::from_secs(60),
            poll_at_least_every: Duration::from_secs(600),
            give_up: Duration::from_secs(24 * 3600),
        }
    }
}

/// Remembers submitted jobs and polls those whose webhook does not come. Cheap to clone.
#[derive(Clone)]
pub struct Tracker {
    intake: Intake,
    poll: Arc<dyn Poll>,
    waits: Waits,
    wake: Arc<Notify>,
}

impl std::fmt::Debug for Tracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracker").field("waits", &self.waits).finish_non_exhaustive()
    }
}

impl Tracker {
    /// Tracks jobs whose webhooks go through `intake`.
    #[must_use]
    pub fn new(intake: Intake, poll: Arc<dyn Poll>, waits: Waits) -> Self {
        Self { intake, poll, waits, wake: Arc::default() }
    }

    /// Remembers a job that was submitted. Its webhook may have come before.
    ///
    /// # Errors
    /// It could not be written down.
    pub async fn submitted(&self, job_id: &str, context: &str) -> Result<(), StoreError> {
        let now = now_ms();
        let begun = Instant::now();
        let job = TrackedJob {
            job_id: job_id.to_owned(),
            context: context.to_owned(),
            submitted_at_ms: now,
            polls: 0,
        };
        self.intake.journal().track(job, now.saturating_add(ms(self.waits.max_wait))).await?;
        self.wake.notify_one();
        self.intake.observer().tell(&Step {
            name: "awaited",
            kind: TRACKED.to_owned(),
            subject: job_id.to_owned(),
            detail: format!("polled if its webhook has not come in {} s", self.waits.max_wait.as_secs()),
            took: Some(begun.elapsed()),
            failed: false,
        });
        Ok(())
    }

    /// Polls what is due until the shutdown is triggered.
    pub async fn run(self, shutdown: Shutdown) {
        while !shutdown.is_triggered() {
            let pause = match self.poll_due().await {
                Ok(next) => next.map(|at| Duration::from_millis(u64::try_from(at - now_ms()).unwrap_or(0))),
                Err(error) => {
                    tracing::error!(%error, "tracked jobs cannot be read");
                    Some(STORE_PAUSE)
                }
            };
            let deadline = async {
                match pause {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = deadline => {}
                () = self.wake.notified() => {}
                () = shutdown.triggered() => {}
            }
        }
    }

    /// Polls everything that is due; says when the next job is.
    async fn poll_due(&self) -> Result<Option<i64>, StoreError> {
        loop {
            let due = self.intake.journal().tracked_due(now_ms(), POLLS_AT_ONCE).await?;
            if due.is_empty() {
                return self.intake.journal().tracked_next_due().await;
            }
            for result in join_all(due.iter().map(|job| self.poll_one(job))).await {
                result?;
            }
        }
    }

    async fn poll_one(&self, job: &TrackedJob) -> Result<(), StoreError> {
        let polled = tokio::time::timeout(POLL_TIME, self.poll.poll(job)).await;
        let reason = match polled {
            Ok(Ok(Polled::Ended(body))) => match Event::parse(&body) {
                Ok(event) => {
                    self.intake.found(&job.job_id, &event, body).await?;
                    return Ok(());
                }
                Err(error) => format!("the poll's answer is no event: {error}"),
            },
            Ok(Ok(Polled::Running)) => "the job goes on".to_owned(),
            Ok(Ok(Polled::Unknown)) => {
                return self.give_up(job, "its provider does not know it (any more)".to_owned()).await;
            }
            Ok(Err(error)) => {
                self.tell(job, "poll failed", error.clone(), true);
                error
            }
            Err(_) => format!("no answer within {} s", POLL_TIME.as_secs()),
        };
        let now = now_ms();
        if now.saturating_sub(job.submitted_at_ms) >= ms(self.waits.give_up) {
            return self.give_up(job, format!("it has not ended in time; last: {reason}")).await;
        }
        tracing::debug!(job_id = job.job_id, reason, "polled");
        let wait = ms(self.waits.poll_every)
            .saturating_mul(1_i64.checked_shl(job.polls.min(30)).unwrap_or(1))
            .clamp(1, ms(self.waits.poll_at_least_every).max(1));
        self.intake.journal().tracked_again(&job.job_id, now.saturating_add(wait)).await
    }
}

impl Tracker {
    async fn give_up(&self, job: &TrackedJob, reason: String) -> Result<(), StoreError> {
        self.intake.journal().tracked_give_up(&job.job_id, now_ms()).await?;
        self.tell(job, "given up", reason, true);
        Ok(())
    }

    fn tell(&self, job: &TrackedJob, name: &'static str, detail: String, failed: bool) {
        let (kind, subject) = (TRACKED.to_owned(), job.job_id.clone());
        self.intake.observer().tell(&Step { name, kind, subject, detail, took: None, failed });
    }
}

fn ms(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}
