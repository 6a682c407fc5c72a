//! The row of a batch while it is counted.

use ringback_contracts::batch_id_of;
use ringback_domain::{
    BatchId, EndpointId, ProjectId,
    batch::{BatchCounts, BatchStatus, CancelMarker},
    webhook::runflow_body::BatchItem as RunflowItem,
};
use sea_orm::{QueryResult, Value};

use super::Counted;
use crate::{
    StoreError, WriteTx,
    deliveries::insert_deliveries,
    sql::{self, LIST, Rows, get_u32},
};

#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) id: BatchId,
    pub(super) project: ProjectId,
    pub(super) revision: i64,
    pub(super) seq: u32,
    pub(super) status: BatchStatus,
    pub(super) counts: BatchCounts,
    pub(super) cancel_rest: bool,
    pub(super) marker: CancelMarker,
    pub(super) cancel_done: bool,
    pub(super) callback_url: Option<String>,
    pub(super) next_check_at_ms: Option<i64>,
    pub(super) ended_at_ms: Option<i64>,
    pub(super) owed: u32,
    pub(super) traceparent: Option<String>,
    pub(super) endpoint: EndpointId,
    pub(super) opened_at_ms: Option<i64>,
    pub(super) created_at_ms: i64,
    pub(super) metadata: Option<Vec<u8>>,
    pub(super) processing_told: bool,
    /// Its one body is Runflow's.
    pub(super) callback_runflow: bool,
    /// Its runs, where Runflow's body tells them.
    pub(super) items: Option<Vec<RunflowItem>>,
}

macro_rules! columns {
    () => {
        "SELECT id, project_id, revision, seq, status, total, completed, failed, cancelled, cancel_rest, \
         cancel_marker, cancel_done, callback_url, next_check_at_ms, ended_at_ms, owed, traceparent, endpoint_id, \
         opened_at_ms, created_at_ms, metadata, processing_told, callback_format FROM batches \
         WHERE id IN ("
    };
}

const SELECT: Rows = Rows { name: "batches.fold", before: columns!(), casts: LIST, after: ") ORDER BY id" };
const LOCK: Rows =
    Rows { name: "batches.lock", before: columns!(), casts: LIST, after: ") ORDER BY id FOR UPDATE" };

fn read(row: &QueryResult) -> Result<Row, StoreError> {
    Ok(Row {
        id: batch_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?.ok_or(StoreError::corrupt("batches.id"))?,
        project: ProjectId(row.try_get_by_index(1)?),
        revision: row.try_get_by_index(2)?,
        seq: get_u32(row, 3, "batches.seq")?,
        status: BatchStatus::from_code(row.try_get_by_index(4)?)
            .ok_or(StoreError::corrupt("batches.status"))?,
        counts: BatchCounts {
            total: get_u32(row, 5, "batches.total")?,
            completed: get_u32(row, 6, "batches.completed")?,
            failed: get_u32(row, 7, "batches.failed")?,
            cancelled: get_u32(row, 8, "batches.cancelled")?,
        },
        cancel_rest: row.try_get_by_index::<i64>(9)? != 0,
        marker: CancelMarker::from_code(row.try_get_by_index(10)?)
            .ok_or(StoreError::corrupt("batches.cancel_marker"))?,
        cancel_done: row.try_get_by_index::<i64>(11)? != 0,
        callback_url: row.try_get_by_index(12)?,
        next_check_at_ms: row.try_get_by_index(13)?,
        ended_at_ms: row.try_get_by_index(14)?,
        owed: get_u32(row, 15, "batches.owed")?,
        traceparent: row.try_get_by_index(16)?,
        endpoint: EndpointId(row.try_get_by_index(17)?),
        opened_at_ms: row.try_get_by_index(18)?,
        created_at_ms: row.try_get_by_index(19)?,
        metadata: row.try_get_by_index(20)?,
        processing_told: row.try_get_by_index::<i64>(21)? != 0,
        callback_runflow: row.try_get_by_index::<i64>(22)? != 0,
        items: None,
    })
}

pub(super) async fn lock(tx: &WriteTx, ids: &[BatchId]) -> Result<Vec<Row>, StoreError> {
    debug_assert!(ids.is_sorted(), "rows are locked in sorted order");
    let rows = if tx.is_postgres() { &LOCK } else { &SELECT };
    rows.query(tx.conn(), ids, |id, v| v.push(sql::id(id.as_bytes()))).await?.iter().map(read).collect()
}

const UPDATE: Rows = Rows {
    name: "batches.update",
    before: "UPDATE batches SET revision = batches.revision + 1, seq = v.column3, status = v.column4, \
             completed = v.column5, failed = v.column6, cancelled = v.column7, cancel_marker = v.column8, \
             cancel_done = v.column9, ended_at_ms = v.column10, next_check_at_ms = v.column11, owed = v.column12, \
             processing_told = v.column13 \
             FROM (VALUES ",
    casts: &[
        "bytea", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint",
        "bigint", "bigint", "bigint",
    ],
    after: ") AS v WHERE batches.id = v.column1 AND batches.revision = v.column2",
};

pub(super) async fn write(
    tx: &WriteTx,
    rows: &[Row],
    partitions: u16,
    counted: &Counted,
) -> Result<(), StoreError> {
    let written = UPDATE
        .execute(tx.conn(), rows, |r, v| {
            v.extend([
                sql::id(r.id.as_bytes()),
                Value::from(r.revision),
                sql::int(r.seq),
                sql::int(r.status.code()),
                sql::int(r.counts.completed),
                sql::int(r.counts.failed),
                sql::int(r.counts.cancelled),
                sql::int(r.marker.code()),
                Value::from(i64::from(r.cancel_done)),
                Value::from(r.ended_at_ms),
                Value::from(r.next_check_at_ms),
                sql::int(r.owed),
                Value::from(i64::from(r.processing_told)),
            ]);
        })
        .await?;
    if written != rows.len() as u64 {
        return Err(StoreError::transient("a batch changed while it was counted"));
    }
    insert_deliveries(tx, partitions, &counted.deliveries).await?;
    Ok(())
}
