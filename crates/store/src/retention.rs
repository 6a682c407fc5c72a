//! Removing what is past its time, in small chunks, so that the books still balance (P5).
//!
//! A chunk is one transaction: rows go together with what belongs to them, and what was owed and delivered by them is
//! added to `purged_totals`. A job with a pending delivery stays, and one with a dead delivery stays for
//! [`KEEP_DEAD_MS`], because a person may still want it sent; so do the jobs of a batch with such a delivery, because
//! its body has a link to their results.

use std::collections::{BTreeSet, HashMap};

use ringback_contracts::{batch_id_of, job_id_of};
use ringback_domain::{BatchId, JobId, ProjectId, TimestampMs};
use sea_orm::{ConnectionTrait, QueryResult, Value};
use uuid::Uuid;

use crate::{
    StoreError, WriteTx,
    sql::{self, LIST, Rows},
};

/// How long a dead delivery keeps its job.
pub const KEEP_DEAD_MS: i64 = 30 * 86_400_000;
/// When a job that could not go yet is looked at again.
const POSTPONE_MS: i64 = 3_600_000;

/// Ended jobs past their retention, the longest due first. Jobs of a batch that still runs are kept for its results.
///
/// # Errors
/// The database's.
pub async fn ended_jobs<C: ConnectionTrait>(
    conn: &C,
    now_ms: i64,
    limit: u32,
) -> Result<Vec<JobId>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT id FROM jobs WHERE next_check_at_ms <= $1 AND state >= 2 AND (batch_id IS NULL OR NOT EXISTS \
         (SELECT 1 FROM batches b WHERE b.id = jobs.batch_id AND b.status = 0 AND b.opened_at_ms IS NOT NULL)) \
         ORDER BY next_check_at_ms LIMIT $2",
        [Value::from(now_ms), sql::int(limit)],
    )
    .await?;
    let mut ids: Vec<JobId> = rows.iter().map(job_id).collect::<Result<_, _>>()?;
    ids.sort_unstable();
    Ok(ids)
}

fn job_id(row: &QueryResult) -> Result<JobId, StoreError> {
    Ok(job_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?)
}

/// What a chunk removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Purged {
    /// Jobs.
    pub jobs: u64,
    /// Batches.
    pub batches: u64,
    /// Events that are no transition.
    pub events: u64,
    /// Deliveries they owed, by their own count.
    pub owed: i64,
    /// Deliveries removed, counted from the rows.
    pub deliveries: i64,
    /// Rows that stay for their deliveries and are looked at later.
    pub postponed: u64,
    /// Blobs that no row but `blob_trash` names any more; the caller deletes them after the commit. A key that ends in
    /// a slash stands for everything below it.
    pub blobs: Vec<String>,
}

const LOCK_POSTGRES: Rows = Rows {
    name: "retention.lock",
    before: "SELECT id, owed, next_check_at_ms, state, batch_id FROM jobs WHERE id IN (",
    casts: LIST,
    after: ") ORDER BY id FOR UPDATE",
};
const LOCK_SQLITE: Rows = Rows {
    name: "retention.select",
    before: "SELECT id, owed, next_check_at_ms, state, batch_id FROM jobs WHERE id IN (",
    casts: LIST,
    after: ") ORDER BY id",
};

const HELD: Rows = Rows {
    name: "retention.held",
    before: "SELECT owner_id, state, MAX(COALESCE(ended_at_ms, created_at_ms)) FROM deliveries WHERE state IN (0, 2) \
             AND owner_id IN (",
    casts: LIST,
    after: ") GROUP BY owner_id, state",
};

const BLOBS: [Rows; 3] = [
    Rows {
        name: "retention.blobs.inputs",
        before: "SELECT input_blob_key FROM job_inputs WHERE input_blob_key IS NOT NULL AND job_id IN (",
        casts: LIST,
        after: ")",
    },
    Rows {
        name: "retention.blobs.outputs",
        before: "SELECT output_blob_key FROM results WHERE output_blob_key IS NOT NULL AND job_id IN (",
        casts: LIST,
        after: ")",
    },
    Rows {
        name: "retention.blobs.logs",
        before: "SELECT logs_blob_key FROM results WHERE logs_blob_key IS NOT NULL AND job_id IN (",
        casts: LIST,
        after: ")",
    },
];

/// Jobs with more than one attempt, or ended by something else than a success: an attempt that was lost or came too
/// late may have stored an output that no result names.
const MAY_HAVE_MORE: Rows = Rows {
    name: "retention.may_have_more",
    before: "SELECT id FROM jobs WHERE (run > 1 OR last_attempt > 1 OR state > 2) AND id IN (",
    casts: LIST,
    after: ")",
};

const TRASH: Rows = Rows {
    name: "retention.trash",
    before: "INSERT INTO blob_trash (blob_key, added_at_ms) VALUES ",
    casts: &["", ""],
    after: " ON CONFLICT (blob_key) DO NOTHING",
};

const FORGET_TRASH: Rows = Rows {
    name: "retention.forget_trash",
    before: "DELETE FROM blob_trash WHERE blob_key IN (",
    casts: LIST,
    after: ")",
};

/// Blobs that were to be deleted before `before_ms` and still are, the oldest first.
///
/// # Errors
/// The database's.
pub async fn trash<C: ConnectionTrait>(
    conn: &C,
    before_ms: i64,
    limit: u32,
) -> Result<Vec<String>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT blob_key FROM blob_trash WHERE added_at_ms <= $1 ORDER BY added_at_ms LIMIT $2",
        [Value::from(before_ms), sql::int(limit)],
    )
    .await?;
    rows.iter().map(|row| Ok(row.try_get_by_index(0)?)).collect()
}

/// These blobs are deleted.
///
/// # Errors
/// The database's.
pub async fn forget_trash(tx: &WriteTx, keys: &[String]) -> Result<u64, StoreError> {
    FORGET_TRASH.execute(tx.conn(), keys, |key, v| v.push(Value::from(key.as_str()))).await
}

const DELETE_DELIVERIES: Rows = Rows {
    name: "retention.deliveries",
    before: "DELETE FROM deliveries WHERE owner_id IN (",
    casts: LIST,
    after: ")",
};

macro_rules! delete {
    ($table:literal, $column:literal) => {
        Rows {
            name: concat!("retention.", $table),
            before: concat!("DELETE FROM ", $table, " WHERE ", $column, " IN ("),
            casts: LIST,
            after: ")",
        }
    };
}

/// Children first: whoever reads a job finds all of it or nothing.
const DELETE: [Rows; 9] = [
    delete!("delivery_attempts", "owner_id"),
    delete!("chunks", "job_id"),
    delete!("stream_cursors", "job_id"),
    delete!("job_progress", "job_id"),
    delete!("progress_notices", "job_id"),
    delete!("attempts", "job_id"),
    delete!("results", "job_id"),
    delete!("job_inputs", "job_id"),
    delete!("jobs", "id"),
];

/// Removes ended jobs past their retention with everything that belongs to them. Each is judged again under its
/// lock: one that was retried meanwhile stays. `ids` must be sorted.
///
/// # Errors
/// The database's.
pub async fn purge_jobs(tx: &WriteTx, ids: &[JobId]) -> Result<Purged, StoreError> {
    let lock = if tx.is_postgres() { &LOCK_POSTGRES } else { &LOCK_SQLITE };
    let rows = lock.query(tx.conn(), ids, |id, v| v.push(sql::id(id.as_bytes()))).await?;
    let mut due: Vec<(JobId, Option<BatchId>, i64)> = Vec::with_capacity(rows.len());
    for row in &rows {
        let check: Option<i64> = row.try_get_by_index(2)?;
        if check.is_some_and(|at| at <= tx.now_ms()) && row.try_get_by_index::<i64>(3)? >= 2 {
            let batch = row.try_get_by_index::<Option<Vec<u8>>>(4)?;
            let batch = batch.map(|id| batch_id_of(&id)).transpose()?.flatten();
            due.push((job_id(row)?, batch, row.try_get_by_index(1)?));
        }
    }
    let batches: BTreeSet<&BatchId> = due.iter().filter_map(|(_, batch, _)| batch.as_ref()).collect();
    let jobs = due.iter().map(|(id, ..)| id.as_bytes());
    let held = held(tx, jobs.chain(batches.into_iter().map(BatchId::as_bytes))).await?;
    let (mut stay, mut go) = (Vec::new(), Vec::new());
    for (id, batch, owed) in due {
        let own = held.get(id.as_bytes());
        match own.max(batch.as_ref().and_then(|batch| held.get(batch.as_bytes()))) {
            Some(until) => stay.push((id, *until)),
            None => go.push((id, owed)),
        }
    }
    postpone(tx, &stay).await?;
    let mut purged = Purged {
        jobs: go.len() as u64,
        owed: go.iter().map(|(_, owed)| owed).sum(),
        postponed: stay.len() as u64,
        ..Purged::default()
    };
    remove_jobs(tx, &go.into_iter().map(|(id, _)| id).collect::<Vec<_>>(), &mut purged).await?;
    book(tx, &purged).await?;
    Ok(purged)
}

/// Owners that must stay, and until when.
pub(crate) async fn held<'a>(
    tx: &WriteTx,
    owners: impl Iterator<Item = &'a [u8; 16]>,
) -> Result<HashMap<[u8; 16], i64>, StoreError> {
    let owners: Vec<&[u8; 16]> = owners.collect();
    let rows = HELD.query(tx.conn(), &owners, |id, v| v.push(sql::id(id))).await?;
    let mut held = HashMap::new();
    for row in &rows {
        let owner: [u8; 16] = row
            .try_get_by_index::<Vec<u8>>(0)?
            .try_into()
            .map_err(|_| StoreError::corrupt("deliveries.owner_id"))?;
        let pending = row.try_get_by_index::<i64>(1)? == 0;
        let until = if pending {
            tx.now_ms() + POSTPONE_MS
        } else {
            row.try_get_by_index::<i64>(2)?.saturating_add(KEEP_DEAD_MS)
        };
        if until > tx.now_ms() {
            let entry = held.entry(owner).or_insert(until);
            *entry = (*entry).min(until);
        }
    }
    Ok(held)
}

const POSTPONE: Rows = Rows {
    name: "retention.postpone",
    before: "UPDATE jobs SET next_check_at_ms = v.column2, revision = jobs.revision + 1 FROM (VALUES ",
    casts: &["bytea", "bigint"],
    after: ") AS v WHERE jobs.id = v.column1",
};

async fn postpone(tx: &WriteTx, stay: &[(JobId, i64)]) -> Result<(), StoreError> {
    POSTPONE
        .execute(tx.conn(), stay, |(id, until), v| v.extend([sql::id(id.as_bytes()), Value::from(*until)]))
        .await
        .map(drop)
}

async fn remove_jobs(tx: &WriteTx, ids: &[JobId], purged: &mut Purged) -> Result<(), StoreError> {
    for rows in &BLOBS {
        for row in rows.query(tx.conn(), ids, |id, v| v.push(sql::id(id.as_bytes()))).await? {
            purged.blobs.push(row.try_get_by_index(0)?);
        }
    }
    for row in MAY_HAVE_MORE.query(tx.conn(), ids, |id, v| v.push(sql::id(id.as_bytes()))).await? {
        let job = job_id(&row)?;
        purged.blobs.extend(["out", "logs"].map(|kind| format!("{kind}/{}/", job.simple())));
    }
    let now_ms = tx.now_ms();
    TRASH
        .execute(tx.conn(), &purged.blobs, |key, v| {
            v.extend([Value::from(key.as_str()), Value::from(now_ms)]);
        })
        .await?;
    let deliveries =
        DELETE_DELIVERIES.execute(tx.conn(), ids, |id, v| v.push(sql::id(id.as_bytes()))).await?;
    purged.deliveries += i64::try_from(deliveries).unwrap_or(i64::MAX);
    for rows in &DELETE {
        rows.execute(tx.conn(), ids, |id, v| v.push(sql::id(id.as_bytes()))).await?;
    }
    Ok(())
}

/// Keeps the books: both sides of P5.
async fn book(tx: &WriteTx, purged: &Purged) -> Result<(), StoreError> {
    if purged.owed == 0 && purged.deliveries == 0 {
        return Ok(());
    }
    sql::execute(
        tx.conn(),
        "INSERT INTO purged_totals (id, owed, deliveries) VALUES (1, $1, $2) ON CONFLICT (id) DO UPDATE SET \
         owed = purged_totals.owed + excluded.owed, deliveries = purged_totals.deliveries + excluded.deliveries",
        [Value::from(purged.owed), Value::from(purged.deliveries)],
    )
    .await
    .map(drop)
}

/// Ended batches past their time whose jobs are all gone.
///
/// # Errors
/// The database's.
pub async fn ended_batches<C: ConnectionTrait>(
    conn: &C,
    now_ms: i64,
    limit: u32,
) -> Result<Vec<BatchId>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT id FROM batches WHERE next_check_at_ms <= $1 AND status > 0 AND NOT EXISTS \
         (SELECT 1 FROM jobs j WHERE j.batch_id = batches.id) ORDER BY next_check_at_ms LIMIT $2",
        [Value::from(now_ms), sql::int(limit)],
    )
    .await?;
    rows.iter()
        .map(|row| {
            batch_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?.ok_or(StoreError::corrupt("batches.id"))
        })
        .collect()
}

/// Removes an ended batch with its delivery, unless that one is pending or dead for less than [`KEEP_DEAD_MS`].
///
/// # Errors
/// The database's.
pub async fn purge_batch(tx: &WriteTx, id: BatchId) -> Result<Purged, StoreError> {
    if let Some(until) = held(tx, std::iter::once(id.as_bytes())).await?.get(id.as_bytes()) {
        sql::execute(
            tx.conn(),
            "UPDATE batches SET next_check_at_ms = $2, revision = revision + 1 WHERE id = $1",
            [sql::id(id.as_bytes()), Value::from(*until)],
        )
        .await?;
        return Ok(Purged { postponed: 1, ..Purged::default() });
    }
    let row = sql::query_one(
        tx.conn(),
        "DELETE FROM batches WHERE id = $1 AND status > 0 RETURNING owed",
        [sql::id(id.as_bytes())],
    )
    .await?;
    let Some(row) = row else { return Ok(Purged::default()) };
    let mut purged = Purged { batches: 1, owed: row.try_get_by_index(0)?, ..Purged::default() };
    let removed = DELETE_DELIVERIES.execute(tx.conn(), &[id], |id, v| v.push(sql::id(id.as_bytes()))).await?;
    purged.deliveries = i64::try_from(removed).unwrap_or(i64::MAX);
    delete!("delivery_attempts", "owner_id")
        .execute(tx.conn(), &[id], |id, v| v.push(sql::id(id.as_bytes())))
        .await?;
    book(tx, &purged).await?;
    Ok(purged)
}

/// Which events a retention time is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Events {
    /// All.
    All,
    /// Those of work that goes on: progress and streamed text.
    Passing,
}

/// Events older than `before_ms` that nobody waits for: none of their deliveries is pending, and none died within
/// [`KEEP_DEAD_MS`]. The oldest first.
///
/// # Errors
/// The database's.
pub async fn ended_events<C: ConnectionTrait>(
    conn: &C,
    which: Events,
    before_ms: i64,
    now_ms: i64,
    limit: u32,
) -> Result<Vec<Uuid>, StoreError> {
    // As the partial index says it.
    let only = match which {
        Events::All => "",
        Events::Passing => "e.type IN (7, 21) AND ",
    };
    let rows = sql::query(
        conn,
        &format!(
            "SELECT id FROM events e WHERE {only}e.created_at_ms < $1 AND NOT EXISTS (SELECT 1 FROM deliveries d \
             WHERE d.owner_id = e.id AND (d.state = 0 OR (d.state = 2 AND d.ended_at_ms > $2))) \
             ORDER BY e.created_at_ms LIMIT $3"
        ),
        [Value::from(before_ms), Value::from(now_ms.saturating_sub(KEEP_DEAD_MS)), sql::int(limit)],
    )
    .await?;
    let mut ids = rows
        .iter()
        .map(|row| {
            Uuid::from_slice(&row.try_get_by_index::<Vec<u8>>(0)?)
                .map_err(|_| StoreError::corrupt("events.id"))
        })
        .collect::<Result<Vec<_>, _>>()?;
    ids.sort_unstable();
    Ok(ids)
}

const LOCK_EVENTS_POSTGRES: Rows = Rows {
    name: "retention.events.lock",
    before: "SELECT id, owed FROM events WHERE id IN (",
    casts: LIST,
    after: ") ORDER BY id FOR UPDATE",
};
const LOCK_EVENTS_SQLITE: Rows = Rows {
    name: "retention.events.select",
    before: "SELECT id, owed FROM events WHERE id IN (",
    casts: LIST,
    after: ") ORDER BY id",
};

/// Removes events with their deliveries. Each is judged again: one whose delivery is pending (a replay) or died lately
/// stays. `ids` must be sorted.
///
/// # Errors
/// The database's.
pub async fn purge_events(tx: &WriteTx, ids: &[Uuid]) -> Result<Purged, StoreError> {
    let lock = if tx.is_postgres() { &LOCK_EVENTS_POSTGRES } else { &LOCK_EVENTS_SQLITE };
    let rows = lock.query(tx.conn(), ids, |id, v| v.push(sql::id(id.as_bytes()))).await?;
    let mut found: Vec<([u8; 16], i64)> = Vec::with_capacity(rows.len());
    for row in &rows {
        let id: Vec<u8> = row.try_get_by_index(0)?;
        found.push((id.try_into().map_err(|_| StoreError::corrupt("events.id"))?, row.try_get_by_index(1)?));
    }
    let held = held(tx, found.iter().map(|(id, _)| id)).await?;
    let go: Vec<&([u8; 16], i64)> = found.iter().filter(|(id, _)| !held.contains_key(id)).collect();
    let mut purged = Purged {
        events: go.len() as u64,
        owed: go.iter().map(|(_, owed)| owed).sum(),
        postponed: held.len() as u64,
        ..Purged::default()
    };
    let removed = DELETE_DELIVERIES.execute(tx.conn(), &go, |(id, _), v| v.push(sql::id(id))).await?;
    purged.deliveries = i64::try_from(removed).unwrap_or(i64::MAX);
    for rows in [delete!("delivery_attempts", "owner_id"), delete!("events", "id")] {
        rows.execute(tx.conn(), &go, |(id, _), v| v.push(sql::id(id))).await?;
    }
    book(tx, &purged).await?;
    Ok(purged)
}

/// Removes a chunk of the jobs of a batch that was never opened, and the batch with its last one. Nobody was told of
/// them: no delivery of theirs may have been sent. Answers whether the batch is gone.
///
/// # Errors
/// The database's.
pub async fn remove_unopened(tx: &WriteTx, id: BatchId, limit: u32) -> Result<(bool, Purged), StoreError> {
    let lock = if tx.is_postgres() { " FOR UPDATE" } else { "" };
    let open = sql::query_one(
        tx.conn(),
        &format!(
            "SELECT opened_at_ms, next_check_at_ms, project_id, total, created_at_ms FROM batches WHERE id = $1{lock}"
        ),
        [sql::id(id.as_bytes())],
    )
    .await?;
    let Some(row) = open else { return Ok((true, Purged::default())) };
    let opened = row.try_get_by_index::<Option<i64>>(0)?.is_some();
    let due = row.try_get_by_index::<Option<i64>>(1)?.is_some_and(|at| at <= tx.now_ms());
    if opened || !due {
        return Ok((true, Purged::default()));
    }
    let rows = sql::query(
        tx.conn(),
        "SELECT id, owed FROM jobs WHERE batch_id = $1 ORDER BY batch_index LIMIT $2",
        [sql::id(id.as_bytes()), sql::int(limit)],
    )
    .await?;
    let mut purged = Purged { jobs: rows.len() as u64, ..Purged::default() };
    let mut ids = Vec::with_capacity(rows.len());
    for row in &rows {
        ids.push(job_id(row)?);
        purged.owed += row.try_get_by_index::<i64>(1)?;
    }
    uncount(tx, &ids).await?;
    remove_jobs(tx, &ids, &mut purged).await?;
    let gone = rows.len() < limit as usize;
    if gone {
        purged.batches =
            sql::execute(tx.conn(), "DELETE FROM batches WHERE id = $1", [sql::id(id.as_bytes())]).await?;
        crate::usage::give_back_jobs(
            tx,
            ProjectId(row.try_get_by_index(2)?),
            sql::get_u64(&row, 3, "batches.total")?,
            TimestampMs(row.try_get_by_index(4)?),
        )
        .await?;
    }
    book(tx, &purged).await?;
    Ok((gone, purged))
}

const QUEUED: Rows = Rows {
    name: "retention.queued",
    before: "SELECT endpoint_id, COUNT(*) FROM jobs WHERE state = 0 AND id IN (",
    casts: LIST,
    after: ") GROUP BY endpoint_id",
};

/// Takes queued jobs that vanish without an end out of the counts of their endpoint.
async fn uncount(tx: &WriteTx, ids: &[JobId]) -> Result<(), StoreError> {
    let rows = QUEUED.query(tx.conn(), ids, |id, v| v.push(sql::id(id.as_bytes()))).await?;
    let mut deltas = std::collections::BTreeMap::new();
    for row in &rows {
        let endpoint = ringback_domain::EndpointId(row.try_get_by_index(0)?);
        let delta: &mut crate::CounterDelta = deltas.entry(endpoint).or_default();
        delta.queued -= row.try_get_by_index::<i64>(1)?;
    }
    // Row 0 belongs to no process: its writers are those that fold counters.
    crate::add_counters(tx, 0, &deltas).await
}

/// Removes a chunk of delivery attempts older than `before_ms` from ended deliveries; answers how many. They are
/// a log: no promise rests on them.
///
/// # Errors
/// The database's.
pub async fn purge_delivery_attempts(tx: &WriteTx, before_ms: i64, limit: u32) -> Result<u64, StoreError> {
    sql::execute(
        tx.conn(),
        "DELETE FROM delivery_attempts WHERE (owner_id, seq, target, n) IN (SELECT owner_id, seq, target, n \
         FROM delivery_attempts WHERE owner_id < $3 AND at_ms < $1 LIMIT $2)",
        // Whoever was tried before that moment was made before it: the key's range spares a scan of the table.
        [Value::from(before_ms), sql::int(limit), crate::books::key(before_ms.max(0).unsigned_abs())],
    )
    .await
}
