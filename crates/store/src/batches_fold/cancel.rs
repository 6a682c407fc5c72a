//! Cancelling batches: the durable marker, and what is left to do behind it.

use ringback_contracts::{batch_id_of, job_id_of};
use ringback_domain::{
    BatchId, JobId, ProjectId,
    batch::{BatchStatus, CancelMarker},
};
use sea_orm::{ConnectionTrait, Value};

use crate::{StoreError, WriteTx, sql};

/// What a request to cancel a batch found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelMark {
    /// No such batch of this project, or it was never opened.
    NotFound,
    /// It has ended: nothing is left to cancel.
    Ended(BatchStatus),
    /// Its jobs are to be cancelled.
    Marked,
    /// Nobody asked for a cancellation, and this call did not either.
    NotMarked,
}

/// Leaves the durable marker of a client's request (or, without `by_request`, looks at what marker there is). The
/// first marker stays.
///
/// # Errors
/// The database's.
pub async fn mark_cancelled(
    tx: &WriteTx,
    project: ProjectId,
    id: BatchId,
    by_request: bool,
) -> Result<CancelMark, StoreError> {
    if by_request {
        sql::execute(
            tx.conn(),
            "UPDATE batches SET cancel_marker = $3, next_check_at_ms = $4, revision = revision + 1 \
             WHERE id = $1 AND project_id = $2 AND cancel_marker = 0 AND status = 0 AND opened_at_ms IS NOT NULL",
            [
                sql::id(id.as_bytes()),
                Value::from(project.0),
                sql::int(CancelMarker::ByRequest.code()),
                Value::from(tx.now_ms()),
            ],
        )
        .await?;
    }
    let row = sql::query_one(
        tx.conn(),
        "SELECT status, cancel_marker FROM batches WHERE id = $1 AND project_id = $2 AND opened_at_ms IS NOT NULL",
        [sql::id(id.as_bytes()), Value::from(project.0)],
    )
    .await?;
    let Some(row) = row else { return Ok(CancelMark::NotFound) };
    let status =
        BatchStatus::from_code(row.try_get_by_index(0)?).ok_or(StoreError::corrupt("batches.status"))?;
    Ok(if status != BatchStatus::InProgress {
        CancelMark::Ended(status)
    } else if row.try_get_by_index::<i64>(1)? == 0 {
        CancelMark::NotMarked
    } else {
        CancelMark::Marked
    })
}

/// Jobs of a batch that have not ended, in order.
///
/// # Errors
/// The database's.
pub async fn live_jobs<C: ConnectionTrait>(
    conn: &C,
    id: BatchId,
    limit: u32,
) -> Result<Vec<JobId>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT id FROM jobs WHERE batch_id = $1 AND state < 2 ORDER BY batch_index LIMIT $2",
        [sql::id(id.as_bytes()), sql::int(limit)],
    )
    .await?;
    rows.iter().map(|row| Ok(job_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?)).collect()
}

/// Notes that no live job is left of a batch that is being cancelled.
///
/// # Errors
/// The database's.
pub async fn cancel_worked_off(tx: &WriteTx, id: BatchId) -> Result<(), StoreError> {
    sql::execute(
        tx.conn(),
        "UPDATE batches SET cancel_done = 1, revision = revision + 1, \
         next_check_at_ms = CASE WHEN status = 0 THEN NULL ELSE next_check_at_ms END \
         WHERE id = $1 AND cancel_marker > 0 AND cancel_done = 0",
        [sql::id(id.as_bytes())],
    )
    .await
    .map(drop)
}

/// A batch whose cancellation is not worked off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkedBatch {
    /// Its id.
    pub id: BatchId,
    /// Its owner.
    pub project: ProjectId,
}

/// Batches whose cancellation was asked for before `before_ms` and is not worked off.
///
/// # Errors
/// The database's.
pub async fn unfinished_cancels<C: ConnectionTrait>(
    conn: &C,
    before_ms: i64,
    limit: u32,
) -> Result<Vec<MarkedBatch>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT id, project_id FROM batches WHERE next_check_at_ms <= $1 AND cancel_marker > 0 AND cancel_done = 0 \
         AND opened_at_ms IS NOT NULL ORDER BY next_check_at_ms LIMIT $2",
        [Value::from(before_ms), sql::int(limit)],
    )
    .await?;
    rows.iter()
        .map(|row| {
            Ok(MarkedBatch {
                id: batch_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?
                    .ok_or(StoreError::corrupt("batches.id"))?,
                project: ProjectId(row.try_get_by_index(1)?),
            })
        })
        .collect()
}
