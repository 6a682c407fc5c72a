//! One transaction: read the rows, decide through the domain, write each job once.

mod advance;
mod decide;
mod deliver;
pub(crate) mod progress;
mod registered;
mod write;

use std::collections::{BTreeMap, BTreeSet, HashMap};

pub(crate) use decide::stop_order;
use ringback_bus::JobSubject;
use ringback_contracts::v1;
use ringback_domain::{AttemptRef, BatchId, EndpointId, JobId, JobStatus, TimestampMs};
use ringback_store::{
    CounterDelta, JobRow, LockedJob, StoreError, WriteTx,
    batches_fold::BatchEnv,
    chunks_write::{NewChunk, NewProgress},
    inputs::StoredInput,
    lock_jobs_to_decide, prove,
    results::{NewAttempt, NewResult},
    workers::renew_leases,
};

use crate::unit::{Answer, Unit, What};

/// What every fold needs to know, fixed for the life of the process.
#[derive(Clone, Debug)]
pub(crate) struct Env {
    /// Life of a lease.
    pub(crate) lease_ms: u64,
    /// What a worker gets beyond an execution limit before somebody else ends the job.
    pub(crate) grace_ms: u64,
    /// Row of this process in the counters.
    pub(crate) counter_row: i64,
    /// Shards of the work queue.
    pub(crate) shards: u32,
    /// For deliveries, also those of batches.
    pub(crate) batch: BatchEnv,
}

/// What one commit leaves to be done. Everything in it is an accelerator: a sweep would find the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct After {
    pub(crate) transitions: Vec<v1::TransitionEvent>,
    pub(crate) deliveries: Vec<v1::Delivery>,
    pub(crate) publish: Vec<Publish>,
    pub(crate) drops: Vec<JobSubject>,
    pub(crate) stops: BTreeMap<String, Vec<v1::StopOrder>>,
    pub(crate) chunks: BTreeMap<EndpointId, BTreeSet<JobId>>,
    pub(crate) cancel_rest: Vec<BatchId>,
}

/// A message that is owed to the work queue.
#[derive(Clone, Debug)]
pub(crate) struct Publish {
    pub(crate) row: JobRow,
    pub(crate) must_ask: bool,
}

/// Answers in the order of the units, and what follows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Folded {
    pub(crate) answers: Vec<Answer>,
    pub(crate) after: After,
}

/// A job while it is being folded.
pub(crate) struct Entry {
    row: JobRow,
    /// Its row must be written.
    dirty: bool,
    /// Its input, where it was at hand.
    input: Option<StoredInput>,
    /// The row was not read in this transaction.
    unproven: bool,
}

/// A delivery whose bytes are made once everything is decided.
struct Owed {
    job: JobId,
    target: u16,
    seq: u32,
    run: u32,
    status: JobStatus,
    delay_ms: u64,
    execution_ms: u64,
    /// Place of the run's result in [`Out::results`], where the run ended here.
    result: Option<usize>,
}

/// A transition that registered webhooks may hear of.
struct Changed {
    job: JobId,
    seq: u32,
    run: u32,
    attempt: u32,
    status: JobStatus,
    delay_ms: u64,
    execution_ms: u64,
    /// As in [`Owed`].
    result: Option<usize>,
}

/// An attempt whose worker is lost.
struct Lost {
    job: JobId,
    worker: String,
}

/// Rows to be written and effects to be carried out.
#[derive(Default)]
struct Out {
    owed: Vec<Owed>,
    changed: Vec<Changed>,
    results: Vec<NewResult>,
    attempts: Vec<NewAttempt>,
    late: Vec<NewAttempt>,
    chunks: Vec<NewChunk>,
    progress: BTreeMap<JobId, NewProgress>,
    /// Attempts whose worker is lost.
    lost: Vec<Lost>,
    /// Jobs of which something waits to be told.
    due_news: BTreeSet<JobId>,
    counters: BTreeMap<EndpointId, CounterDelta>,
    batches: BTreeMap<BatchId, Vec<JobStatus>>,
    after: After,
}

/// What the decisions of one fold share.
struct Context<'a> {
    env: &'a Env,
    now: TimestampMs,
    /// Whether this process may judge leases: see `ringback_store::observer`.
    steady: bool,
}

impl Context<'_> {
    fn lease_until(&self) -> TimestampMs {
        self.now.plus_ms(self.env.lease_ms)
    }
}

/// Folds `units` in their order. May run more than once on the same units: nothing is kept from a former run.
pub(crate) async fn fold(
    tx: &WriteTx,
    units: &[Unit],
    steady: bool,
    env: &Env,
) -> Result<Folded, StoreError> {
    let context = Context { env, now: TimestampMs(tx.now_ms()), steady };
    let beats: Vec<(JobId, AttemptRef)> = units
        .iter()
        .filter_map(|u| if let What::Beat(beat) = &u.what { Some((u.job, beat.attempt)) } else { None })
        .collect();
    let renewed = if beats.is_empty() {
        HashMap::new()
    } else {
        renew_leases(tx, &beats, context.lease_until(), env.grace_ms).await?
    };
    let is_renewed =
        |unit: &Unit| matches!(&unit.what, What::Beat(b) if renewed.get(&unit.job) == Some(&b.attempt));
    let mut ids: Vec<JobId> = units.iter().filter(|u| !is_renewed(u)).map(|u| u.job).collect();
    ids.sort_unstable();
    ids.dedup();
    let mut jobs: HashMap<JobId, Entry> = lock_jobs_to_decide(tx, &ids)
        .await?
        .into_iter()
        .map(|(id, job)| {
            let LockedJob { row, input, unproven } = job;
            (id, Entry { row, dirty: false, input, unproven })
        })
        .collect();
    let mut out = Out::default();
    let mut answers = Vec::with_capacity(units.len());
    for unit in units {
        answers.push(if is_renewed(unit) {
            decide::renewed(unit, &mut out)
        } else {
            decide::decide(unit, jobs.get_mut(&unit.job), &mut out, &context)
        });
    }
    // What is written is guarded by its revision.
    let unproven: Vec<(JobId, i64)> =
        jobs.iter().filter(|(_, e)| e.unproven && !e.dirty).map(|(id, e)| (*id, e.row.revision)).collect();
    if !unproven.is_empty() {
        prove(tx, &unproven).await?;
    }
    let after = write::write(tx, jobs, out, &context).await?;
    Ok(Folded { answers, after })
}
