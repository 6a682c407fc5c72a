//! Commands of clients and of the reconciler. Long ones work in chunks; a marker in SQL outlives a crash between two.

use ringback_contracts::{batch_id_of, job_id_of, v1};
use ringback_domain::{BatchId, EndpointId, JobId, JobStatus, ProjectId, job::CancelReason};
use ringback_store::{
    Store, StoreError, Urgency,
    batches_fold::{CancelMark, cancel_worked_off, live_jobs, mark_cancelled},
    due::purgeable_jobs,
};
use v1::{command::Command as C, command_reply::Reply, refusal::Why};

use crate::{
    batcher::{Batcher, FoldError},
    unit::{Answer, Unit, What},
};

/// Most jobs that one chunk touches.
const CHUNK_MAX: u32 = 500;

/// Carries out commands.
#[derive(Clone)]
pub(crate) struct Commands {
    pub(crate) store: Store,
    pub(crate) batcher: Batcher,
}

impl Commands {
    /// Carries out one command. `None` = stay silent: its fate is unknown and the sender repeats it.
    pub(crate) async fn run(&self, command: v1::Command) -> Option<v1::CommandReply> {
        let result = match command.command {
            Some(C::Cancel(c)) => self.cancel(c).await,
            Some(C::Retry(c)) => self.retry(c).await,
            Some(C::Purge(c)) => self.purge(c).await,
            Some(C::CancelBatch(c)) => self.cancel_batch(c).await,
            Some(C::CheckDue(c)) => self.check_due(c).await,
            Some(C::Republish(c)) => self.republish(c).await,
            None => Ok(refusal(Why::Unspecified, "the command is empty or of a later release", None)),
        };
        match result {
            Ok(reply) => Some(v1::CommandReply { reply: Some(reply) }),
            Err(FoldError::Unknown) => None,
            Err(FoldError::Unavailable(error)) => {
                tracing::warn!(%error, "a command was refused for now");
                let reply = refusal(Why::Unavailable, "the database is not available now; try again", None);
                Some(v1::CommandReply { reply: Some(reply) })
            }
        }
    }

    async fn cancel(&self, c: v1::CancelJob) -> Result<Reply, FoldError> {
        let Ok(job) = job_id_of(&c.job_id) else { return Ok(not_found()) };
        let project = Some(ProjectId(c.project_id));
        let what = What::Cancel { project, reason: CancelReason::Requested };
        Ok(job_reply(self.batcher.submit_one(Unit { job, what }).await?))
    }

    async fn retry(&self, c: v1::RetryJob) -> Result<Reply, FoldError> {
        let Ok(job) = job_id_of(&c.job_id) else { return Ok(not_found()) };
        let what =
            What::Retry { project: ProjectId(c.project_id), native: c.native, expected_run: c.expected_run };
        Ok(job_reply(self.batcher.submit_one(Unit { job, what }).await?))
    }

    async fn purge(&self, c: v1::PurgeQueue) -> Result<Reply, FoldError> {
        let limit = c.limit.clamp(1, CHUNK_MAX);
        let jobs = purgeable_jobs(self.store.read(), c.project_id, EndpointId(c.endpoint_id), limit).await?;
        let more = jobs.len() == limit as usize;
        let changed = self.cancel_all(jobs, Some(ProjectId(c.project_id)), CancelReason::Purged).await?;
        Ok(Reply::Count(v1::CountReply { changed, more }))
    }

    async fn cancel_batch(&self, c: v1::CancelBatch) -> Result<Reply, FoldError> {
        let Ok(Some(batch)) = batch_id_of(&c.batch_id) else { return Ok(not_found()) };
        let done = Reply::Count(v1::CountReply { changed: 0, more: false });
        match self.mark(ProjectId(c.project_id), batch, c.by_request).await? {
            CancelMark::NotFound => return Ok(not_found()),
            CancelMark::Ended(_) | CancelMark::NotMarked => return Ok(done),
            CancelMark::Marked => {}
        }
        let (changed, more) = self.cancel_chunk(batch, c.limit).await?;
        Ok(Reply::Count(v1::CountReply { changed, more }))
    }

    async fn mark(
        &self,
        project: ProjectId,
        batch: BatchId,
        by_request: bool,
    ) -> Result<CancelMark, FoldError> {
        let write = self
            .store
            .write(Urgency::Now, move |tx| Box::pin(mark_cancelled(tx, project, batch, by_request)))
            .await;
        Ok(write?)
    }

    /// Cancels a chunk of a marked batch: how many changed, and whether more may be left.
    pub(crate) async fn cancel_chunk(&self, batch: BatchId, limit: u32) -> Result<(u32, bool), FoldError> {
        let limit = limit.clamp(1, CHUNK_MAX);
        let jobs = live_jobs(self.store.read(), batch, limit).await?;
        if jobs.is_empty() {
            self.store.write(Urgency::Now, move |tx| Box::pin(cancel_worked_off(tx, batch))).await?;
            return Ok((0, false));
        }
        // Even a full chunk's successor must look: it is what writes down that nothing is left.
        let changed = self.cancel_all(jobs, None, CancelReason::Batch).await?;
        Ok((changed, true))
    }

    async fn cancel_all(
        &self,
        jobs: Vec<JobId>,
        project: Option<ProjectId>,
        reason: CancelReason,
    ) -> Result<u32, FoldError> {
        let units =
            jobs.into_iter().map(|job| Unit { job, what: What::Cancel { project, reason } }).collect();
        Ok(changed(&self.batcher.submit(units).await?))
    }

    async fn check_due(&self, c: v1::CheckDue) -> Result<Reply, FoldError> {
        let units = c
            .job_ids
            .iter()
            .filter_map(|id| job_id_of(id).ok())
            .map(|job| Unit { job, what: What::Due })
            .collect();
        let changed = changed(&self.batcher.submit(units).await?);
        Ok(Reply::Count(v1::CountReply { changed, more: false }))
    }

    async fn republish(&self, c: v1::Republish) -> Result<Reply, FoldError> {
        let units = c
            .jobs
            .iter()
            .filter_map(|j| {
                let what = What::MessageLost { run: j.run, publish: j.publish };
                job_id_of(&j.job_id).ok().map(|job| Unit { job, what })
            })
            .collect();
        let changed = changed(&self.batcher.submit(units).await?);
        Ok(Reply::Count(v1::CountReply { changed, more: false }))
    }
}

impl From<StoreError> for FoldError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::CommitUnknown { .. } => Self::Unknown,
            StoreError::Transient { .. } | StoreError::Duplicate { .. } | StoreError::Permanent { .. } => {
                Self::Unavailable(error)
            }
        }
    }
}

fn changed(answers: &[Answer]) -> u32 {
    let n = answers.iter().filter(|a| matches!(a, Answer::Job(j) if j.changed)).count();
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn job_reply(answer: Answer) -> Reply {
    match answer {
        Answer::Job(j) => Reply::Job(v1::JobReply {
            job_id: bytes::Bytes::copy_from_slice(j.job.as_bytes()),
            status: u32::from(j.status.code()),
            seq: j.seq,
            run: j.run,
            changed: j.changed,
        }),
        Answer::NotFound => not_found(),
        Answer::Conflict { status, detail } => refusal(Why::Conflict, &detail, Some(status)),
        Answer::Quarantined => {
            refusal(Why::Unspecified, "the command could not be applied and was put aside", None)
        }
        Answer::Verdict(_) | Answer::Stop(_) | Answer::Grant(_) => {
            refusal(Why::Unspecified, "the command has no such answer", None)
        }
    }
}

fn not_found() -> Reply {
    refusal(Why::NotFound, "no such job or batch", None)
}

fn refusal(why: Why, detail: &str, status: Option<JobStatus>) -> Reply {
    let status = status.map_or(0, |s| u32::from(s.code()));
    Reply::Refusal(v1::Refusal { why: why.into(), detail: detail.to_owned(), status })
}
