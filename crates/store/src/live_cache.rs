//! Live jobs as this process wrote them last, so that the common job is not read back for its end.
//!
//! Only on SQLite, where each row that is read costs a trip between threads while the one writer waits. An entry is
//! the row at some revision and is never trusted on its own:
//!
//! - whoever decides from it and writes is guarded by that revision ([`crate::update_jobs`]): another process that
//!   changed the row meanwhile makes the write fail, and the repetition reads SQL;
//! - whoever decides from it and does *not* write proves it in the same transaction ([`prove`]). Without that, the
//!   outcome of a run that another process started would be answered as obsolete from an old row, and be lost.
//!
//! An entry is taken out by its use, comes in after a commit only, and leaves with the end of the job. Whoever changes
//! rows without deciding from them (leases, retention) makes the revision rise, so such an entry is merely useless.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ringback_domain::JobId;
use sea_orm::DatabaseBackend;

use crate::{
    JobRow, StoreError, WriteTx,
    inputs::StoredInput,
    lock_jobs,
    sql::{self, LIST, Rows},
};

/// Most jobs kept.
const JOBS_MAX: usize = 4_096;
/// Longest inline input kept beside its job.
const INPUT_MAX_BYTES: usize = 1_024;

/// A job that was committed.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    row: JobRow,
    input: Option<StoredInput>,
}

impl Known {
    pub(crate) fn new(row: JobRow, input: Option<StoredInput>) -> Self {
        let input = input.filter(|i| {
            i.extra.is_none()
                && i.secret_extra_encrypted.is_none()
                && matches!(&i.input, crate::submit::InputAt::Inline(b) if b.len() <= INPUT_MAX_BYTES)
        });
        Self { row, input }
    }
}

/// The live jobs of one process.
#[derive(Clone, Debug, Default)]
pub(crate) struct LiveCache(Arc<Mutex<Entries>>);

#[derive(Debug, Default)]
struct Entries {
    jobs: HashMap<JobId, Known>,
    /// Oldest first; may name jobs that are gone.
    order: VecDeque<JobId>,
}

impl LiveCache {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After the commit that wrote them.
    pub(crate) fn put(&self, known: Vec<Known>) {
        if known.is_empty() {
            return;
        }
        let mut entries = self.entries();
        for k in known {
            let id = k.row.job.id;
            if entries.jobs.insert(id, k).is_none() {
                entries.order.push_back(id);
            }
        }
        while entries.jobs.len() > JOBS_MAX || entries.order.len() > 2 * JOBS_MAX {
            let Some(oldest) = entries.order.pop_front() else { break };
            entries.jobs.remove(&oldest);
        }
    }

    fn take(&self, ids: &[JobId]) -> Vec<Known> {
        let mut entries = self.entries();
        ids.iter().filter_map(|id| entries.jobs.remove(id)).collect()
    }
}

/// A job to decide about.
#[derive(Clone, Debug)]
pub struct LockedJob {
    /// Its row.
    pub row: JobRow,
    /// Its input, where it happened to be at hand.
    pub input: Option<StoredInput>,
    /// The row was not read in this transaction: write it guarded by its revision, or call [`prove`].
    pub unproven: bool,
}

/// Like [`lock_jobs`], but takes what this process wrote last instead of reading it, where it can. `ids` must be sorted
/// and without repetition.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn lock_jobs_to_decide(
    tx: &WriteTx,
    ids: &[JobId],
) -> Result<HashMap<JobId, LockedJob>, StoreError> {
    let mut jobs: HashMap<JobId, LockedJob> = tx
        .live()
        .take(ids)
        .into_iter()
        .map(|k| (k.row.job.id, LockedJob { row: k.row, input: k.input, unproven: true }))
        .collect();
    let unknown: Vec<JobId> = ids.iter().copied().filter(|id| !jobs.contains_key(id)).collect();
    if !unknown.is_empty() {
        for (id, row) in lock_jobs(tx, &unknown).await? {
            jobs.insert(id, LockedJob { row, input: None, unproven: false });
        }
    }
    #[cfg(debug_assertions)]
    compare(tx, &jobs).await?;
    Ok(jobs)
}

const REVISIONS: Rows = Rows {
    name: "jobs.revisions",
    before: "SELECT id, revision FROM jobs WHERE id IN (",
    casts: LIST,
    after: ")",
};

/// Proves rows from which nothing was written.
///
/// # Errors
/// [`StoreError::Transient`] where somebody else wrote one of them: decide again. The database's.
pub async fn prove(tx: &WriteTx, rows: &[(JobId, i64)]) -> Result<(), StoreError> {
    let found = REVISIONS.query(tx.conn(), rows, |(id, _), v| v.push(sql::id(id.as_bytes()))).await?;
    let mut revisions: HashMap<Vec<u8>, i64> = HashMap::with_capacity(found.len());
    for row in &found {
        revisions.insert(row.try_get_by_index(0)?, row.try_get_by_index(1)?);
    }
    if rows.iter().any(|(id, revision)| revisions.get(id.as_bytes().as_slice()) != Some(revision)) {
        return Err(StoreError::Transient { detail: "a job changed while it was folded".to_owned() });
    }
    Ok(())
}

impl WriteTx {
    /// Keeps a live job for its next event, if the transaction commits. `row` is as it was just written, with its
    /// revision.
    pub fn remember(&self, row: JobRow, input: Option<StoredInput>) {
        let sqlite = self.backend() == DatabaseBackend::Sqlite;
        if sqlite && row.job.state.ended().is_none() {
            self.written(Known::new(row, input));
        }
    }
}

/// In debug builds each row taken is held against the one in SQL.
#[cfg(debug_assertions)]
async fn compare(tx: &WriteTx, jobs: &HashMap<JobId, LockedJob>) -> Result<(), StoreError> {
    let taken: Vec<JobId> = jobs.values().filter(|j| j.unproven).map(|j| j.row.job.id).collect();
    if taken.is_empty() {
        return Ok(());
    }
    let stored = crate::select_jobs(tx.conn(), &taken).await?;
    let inputs = crate::inputs::select_inputs(tx.conn(), &taken).await?;
    for id in &taken {
        let (Some(job), Some(row)) = (jobs.get(id), stored.get(id)) else { continue };
        if job.row.revision == row.revision {
            assert_eq!(&job.row, row, "a kept job differs from its row");
            if let (Some(kept), Some(input)) = (&job.input, inputs.get(id)) {
                assert_eq!(kept.input, input.input, "a kept input differs from its row");
            }
        }
    }
    Ok(())
}
