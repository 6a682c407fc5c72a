//! What registered webhooks were told of live jobs between their transitions: at most one event per half second and
//! job, and none to a target that has not taken the last one.

use std::collections::{HashMap, HashSet};

use ringback_contracts::job_id_of;
use ringback_domain::JobId;
use sea_orm::{ConnectionTrait, QueryResult, Value};
use uuid::Uuid;

use crate::{
    StoreError, WriteTx,
    sql::{self, LIST, Rows, get_u32},
};

/// Bit of [`Notice::waiting`]: a progress value was not told.
pub const PROGRESS: u32 = 1;
/// Bit of [`Notice::waiting`]: text of a completion was not told.
pub const STREAMING: u32 = 2;
/// Bit of [`Notice::waiting`] that stands in the row only: a target is behind.
const SOMEBODY: u32 = 4;
/// The text that is collected goes no further: the end has all of it.
pub const CONTENT_MAX_BYTES: usize = 64 * 1024;

/// What was told of one attempt, and what waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The job.
    pub job: JobId,
    /// Its run.
    pub run: u32,
    /// Its attempt: another one begins anew.
    pub attempt: u32,
    /// When something was told last, Unix ms.
    pub told_at_ms: i64,
    /// What came and was offered to nobody yet.
    pub waiting: u32,
    /// The completion's text so far.
    pub content: String,
    /// Number of the next piece of text.
    pub next_n: u32,
    /// What each target was told.
    pub last: Vec<Told>,
}

/// Where one target stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// Its number.
    pub target: u32,
    /// The last event that it got.
    pub event: Uuid,
    /// Bit of what that event told.
    pub kind: u32,
    /// Bits of what came while it had not taken that event.
    pub behind: u32,
}

impl Notice {
    /// Nothing was told yet.
    #[must_use]
    pub const fn new(job: JobId, run: u32, attempt: u32) -> Self {
        Self {
            job,
            run,
            attempt,
            told_at_ms: 0,
            waiting: 0,
            content: String::new(),
            next_n: 0,
            last: Vec::new(),
        }
    }

    /// Adds the text of piece `n`, unless it is there already.
    pub fn append(&mut self, n: u32, text: &str) {
        if n < self.next_n {
            return;
        }
        self.next_n = n + 1;
        let room = CONTENT_MAX_BYTES.saturating_sub(self.content.len());
        let cut = (0..=room.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        self.content.push_str(&text[..cut]);
        self.waiting |= STREAMING;
    }

    /// What a target was told.
    #[must_use]
    pub fn of(&self, target: u32) -> Option<&Told> {
        self.last.iter().find(|t| t.target == target)
    }

    /// Notes the event that a target got, and what it has yet to get.
    pub fn told(&mut self, told: Told) {
        self.last.retain(|t| t.target != told.target);
        self.last.push(told);
    }

    /// Whether anything waits for anybody.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.waiting != 0 || self.last.iter().any(|t| t.behind != 0)
    }

    fn stored_waiting(&self) -> u32 {
        let somebody = self.last.iter().any(|t| t.behind != 0);
        self.waiting | if somebody { SOMEBODY } else { 0 }
    }
}

const TARGET_BYTES: usize = 20;
/// Begins, in the place of an event's key, the second entry of a target: its bits follow. No key begins like that.
const BITS: [u8; 14] = [0; 14];

/// An entry with the last event of each target; a second one where it is behind.
fn encode_last(last: &[Told]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(last.len() * TARGET_BYTES);
    for told in last {
        bytes.extend_from_slice(&told.target.to_be_bytes());
        bytes.extend_from_slice(told.event.as_bytes());
        if told.behind != 0 {
            bytes.extend_from_slice(&told.target.to_be_bytes());
            bytes.extend_from_slice(&BITS);
            bytes.extend([told.kind, told.behind].map(|bits| bits.to_be_bytes()[3]));
        }
    }
    bytes
}

fn decode_last(bytes: &[u8]) -> Result<Vec<Told>, StoreError> {
    let corrupt = || StoreError::corrupt("progress_notices.last");
    let (chunks, rest) = bytes.as_chunks::<TARGET_BYTES>();
    if !rest.is_empty() {
        return Err(corrupt());
    }
    let mut last: Vec<Told> = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let (target, id) = chunk.split_at(4);
        let target = u32::from_be_bytes(target.try_into().map_err(|_| corrupt())?);
        if let Some([kind, behind]) = id.strip_prefix(&BITS) {
            let told = last.last_mut().filter(|t| t.target == target).ok_or_else(corrupt)?;
            (told.kind, told.behind) = (u32::from(*kind), u32::from(*behind));
        } else {
            let event = Uuid::from_slice(id).map_err(|_| corrupt())?;
            last.push(Told { target, event, kind: 0, behind: 0 });
        }
    }
    Ok(last)
}

const SELECT: Rows = Rows {
    name: "progress_notices.select",
    before: "SELECT job_id, run, attempt, told_at_ms, waiting, content, next_n, last FROM progress_notices \
             WHERE job_id IN (",
    casts: LIST,
    after: ")",
};

/// The notices of these jobs.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn notices(tx: &WriteTx, jobs: &[JobId]) -> Result<HashMap<JobId, Notice>, StoreError> {
    let rows = SELECT.query(tx.conn(), jobs, |id, v| v.push(sql::id(id.as_bytes()))).await?;
    rows.iter().map(|row| read(row).map(|notice| (notice.job, notice))).collect()
}

fn read(row: &QueryResult) -> Result<Notice, StoreError> {
    Ok(Notice {
        job: job_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?,
        run: get_u32(row, 1, "progress_notices.run")?,
        attempt: get_u32(row, 2, "progress_notices.attempt")?,
        told_at_ms: row.try_get_by_index(3)?,
        waiting: get_u32(row, 4, "progress_notices.waiting")? & !SOMEBODY,
        content: row.try_get_by_index(5)?,
        next_n: get_u32(row, 6, "progress_notices.next_n")?,
        last: decode_last(&row.try_get_by_index::<Vec<u8>>(7)?)?,
    })
}

const UPSERT: Rows = Rows {
    name: "progress_notices.upsert",
    before: "INSERT INTO progress_notices (job_id, run, attempt, told_at_ms, waiting, content, next_n, last) VALUES ",
    casts: &[""; 8],
    after: " ON CONFLICT (job_id) DO UPDATE SET run = excluded.run, attempt = excluded.attempt, \
            told_at_ms = excluded.told_at_ms, waiting = excluded.waiting, content = excluded.content, \
            next_n = excluded.next_n, last = excluded.last",
};

/// Writes notices.
///
/// # Errors
/// The database's.
pub async fn put_notices(tx: &WriteTx, notices: &[Notice]) -> Result<(), StoreError> {
    UPSERT
        .execute(tx.conn(), notices, |n, v| {
            v.extend([
                sql::id(n.job.as_bytes()),
                sql::int(n.run),
                sql::int(n.attempt),
                Value::from(n.told_at_ms),
                sql::int(n.stored_waiting()),
                // PostgreSQL's texts hold no NUL.
                Value::from(n.content.replace('\0', "")),
                sql::int(n.next_n),
                Value::from(encode_last(&n.last)),
            ]);
        })
        .await
        .map(drop)
}

const DROP: Rows = Rows {
    name: "progress_notices.drop",
    before: "DELETE FROM progress_notices WHERE job_id IN (",
    casts: LIST,
    after: ") RETURNING last",
};

/// Forgets jobs whose attempt is over: what waited gives way to the transition. Answers the last event that each target
/// got, which is the only one that it may not have taken yet.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn drop_notices(tx: &WriteTx, jobs: &[JobId]) -> Result<Vec<(u32, Uuid)>, StoreError> {
    let rows = DROP.query(tx.conn(), jobs, |id, v| v.push(sql::id(id.as_bytes()))).await?;
    let mut last = Vec::new();
    for row in &rows {
        let told = decode_last(&row.try_get_by_index::<Vec<u8>>(0)?)?;
        last.extend(told.iter().map(|t| (t.target, t.event)));
    }
    Ok(last)
}

const OVERTAKE: Rows = Rows {
    name: "events.overtake",
    before: "UPDATE events SET overtaken = 1 WHERE id IN (",
    casts: LIST,
    after: ")",
};

/// Notes that the attempt which these events tell of is over: dispatchers end as superseded what is still pending.
///
/// # Errors
/// The database's.
pub async fn overtake(tx: &WriteTx, events: &[Uuid]) -> Result<(), StoreError> {
    OVERTAKE.execute(tx.conn(), events, |id, v| v.push(sql::id(id.as_bytes()))).await.map(drop)
}

/// Jobs of which something waits that may be told since `before_ms`.
///
/// # Errors
/// The database's.
pub async fn waiting<C: ConnectionTrait>(
    conn: &C,
    before_ms: i64,
    limit: u32,
) -> Result<Vec<JobId>, StoreError> {
    let rows = sql::query(
        conn,
        "SELECT job_id FROM progress_notices WHERE waiting > 0 AND told_at_ms <= $1 ORDER BY told_at_ms LIMIT $2",
        [Value::from(before_ms), sql::int(limit)],
    )
    .await?;
    rows.iter().map(|row| Ok(job_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?)).collect()
}

const PENDING: Rows = Rows {
    name: "progress_notices.pending",
    before: "SELECT owner_id, target FROM deliveries WHERE seq = 1 AND state = 0 AND owner_id IN (",
    casts: LIST,
    after: ")",
};

/// Which of these events wait for which targets.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn pending(tx: &WriteTx, events: &[Uuid]) -> Result<HashSet<(u32, Uuid)>, StoreError> {
    let rows = PENDING.query(tx.conn(), events, |id, v| v.push(sql::id(id.as_bytes()))).await?;
    rows.iter()
        .map(|row| {
            let owner = Uuid::from_slice(&row.try_get_by_index::<Vec<u8>>(0)?)
                .map_err(|_| StoreError::corrupt("deliveries.owner_id"))?;
            Ok((get_u32(row, 1, "deliveries.target")?, owner))
        })
        .collect()
}

const VALUES: Rows = Rows {
    name: "job_progress.values",
    before: "SELECT job_id, value FROM job_progress WHERE job_id IN (",
    casts: LIST,
    after: ")",
};

/// The last progress values of these jobs.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn values(tx: &WriteTx, jobs: &[JobId]) -> Result<HashMap<JobId, Vec<u8>>, StoreError> {
    let rows = VALUES.query(tx.conn(), jobs, |id, v| v.push(sql::id(id.as_bytes()))).await?;
    rows.iter()
        .map(|row| Ok((job_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?, row.try_get_by_index(1)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_taken_once_and_up_to_the_cap() {
        let mut notice = Notice::new(JobId::from_parts(1, [1; 10]), 1, 1);
        for (n, text) in [(0, "a"), (1, "é"), (1, "again"), (0, "late"), (3, "b")] {
            notice.append(n, text);
        }
        assert_eq!((notice.content.as_str(), notice.next_n, notice.waiting), ("aéb", 4, STREAMING));
        notice.append(4, &"é".repeat(CONTENT_MAX_BYTES));
        assert!(notice.content.len() <= CONTENT_MAX_BYTES && notice.content.len() > CONTENT_MAX_BYTES - 2);
        notice.append(5, "more");
        assert!(notice.content.len() <= CONTENT_MAX_BYTES);
    }

    #[test]
    fn targets_read_back() {
        let told = |target, event, kind, behind| Told { target, event, kind, behind };
        let last = vec![
            told(65_537, Uuid::from_u128(7 << 80), 0, 0),
            told(u32::MAX, Uuid::from_u128(u128::MAX), STREAMING, PROGRESS | STREAMING),
            told(65_538, Uuid::from_u128(1 << 80), 0, PROGRESS),
        ];
        let bytes = encode_last(&last);
        assert_eq!(bytes.len(), 5 * TARGET_BYTES);
        assert_eq!(decode_last(&bytes).unwrap(), last);
        assert!(decode_last(&[0; 21]).is_err());
        assert!(decode_last(&bytes[40..60]).is_err(), "bits of nobody");
    }
}
