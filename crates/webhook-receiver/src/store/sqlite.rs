//! The journal in one SQLite file (write-ahead log, every commit synced).

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseBackend, DatabaseConnection, DatabaseTransaction,
    DbErr, QueryResult, Statement, Value,
};

use super::writer::Writer;
use super::{
    Accepted, Closed, Counts, DueEvent, EventView, Journal, MAX_CLOSED, NewEvent, SavedFile, Settled,
    StoreError, TrackedJob, TrackedState,
};

/// The schema; each statement may be repeated. A later version adds statements.
const SCHEMA: [&str; 7] = [
    // state: 0 pending, 1 done, 2 given up. The body is dropped when it is done. ends: its subject is a job that has
    // ended with it.
    "CREATE TABLE IF NOT EXISTS events (
       key TEXT NOT NULL PRIMARY KEY, kind TEXT NOT NULL, subject TEXT, body BLOB,
       received_at_ms INTEGER NOT NULL, state INTEGER NOT NULL, attempts INTEGER NOT NULL,
       due_at_ms INTEGER NOT NULL, settled_at_ms INTEGER, error TEXT, ends INTEGER NOT NULL,
       lane TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS events_due ON events (due_at_ms, received_at_ms) WHERE state = 0",
    "CREATE INDEX IF NOT EXISTS events_settled ON events (settled_at_ms) WHERE state <> 0",
    "CREATE INDEX IF NOT EXISTS events_subject ON events (subject, received_at_ms)",
    "CREATE TABLE IF NOT EXISTS files (
       key TEXT NOT NULL, item INTEGER NOT NULL, name TEXT NOT NULL, sha256 TEXT NOT NULL,
       size_bytes INTEGER NOT NULL, PRIMARY KEY (key, item)) WITHOUT ROWID",
    // state: 0 waiting, 1 webhook came, 2 found by a poll, 3 given up.
    "CREATE TABLE IF NOT EXISTS tracked (
       job_id TEXT NOT NULL PRIMARY KEY, context TEXT NOT NULL, submitted_at_ms INTEGER NOT NULL,
       due_at_ms INTEGER NOT NULL, polls INTEGER NOT NULL, state INTEGER NOT NULL, ended_as TEXT,
       ended_at_ms INTEGER) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS tracked_due ON tracked (due_at_ms) WHERE state = 0",
];

const PENDING: i64 = 0;
const DONE: i64 = 1;
const GIVEN_UP: i64 = 2;

const BY_WEBHOOK: i64 = 1;
const BY_POLL: i64 = 2;
const STOPPED: i64 = 3;

/// The journal in one file. Cheap to clone; clones share the writer.
#[derive(Debug, Clone)]
pub struct SqliteJournal {
    read: DatabaseConnection,
    writer: Writer,
    path: PathBuf,
}

impl SqliteJournal {
    /// Opens or makes the file. One process at a time may use it: whoever opens it holds a lock on its folder.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let failed = |error: DbErr| StoreError::Database { path: path.to_owned(), reason: error.to_string() };
        let write = connect(path, false).await.map_err(failed)?;
        for statement in SCHEMA {
            write.execute_unprepared(statement).await.map_err(failed)?;
        }
        let read = connect(path, true).await.map_err(failed)?;
        Ok(Self { read, writer: Writer::start(write, path.to_owned()), path: path.to_owned() })
    }

    fn failed(&self, error: &DbErr) -> StoreError {
        StoreError::Database { path: self.path.clone(), reason: error.to_string() }
    }

    async fn all(
        &self,
        text: &str,
        values: impl IntoIterator<Item = Value>,
    ) -> Result<Vec<QueryResult>, StoreError> {
        self.read.query_all_raw(sql(text, values)).await.map_err(|error| self.failed(&error))
    }

    async fn number(
        &self,
        text: &str,
        values: impl IntoIterator<Item = Value>,
    ) -> Result<Option<i64>, StoreError> {
        let rows = self.all(text, values).await?;
        let first = rows.first().map(|row| row.try_get_by_index(0)).transpose();
        first.map(Option::flatten).map_err(|error| self.failed(&error))
    }
}

async fn connect(path: &Path, read: bool) -> Result<DatabaseConnection, DbErr> {
    // Not as a URL: a path may hold characters that mean something there.
    let file = path.to_owned();
    let mut options = ConnectOptions::new("sqlite::memory:");
    options
        .max_connections(if read { 2 } else { 1 })
        .min_connections(1)
        .acquire_timeout(Duration::from_secs(30))
        .test_before_acquire(false)
        .sqlx_logging(false)
        .idle_timeout(None::<Duration>)
        .max_lifetime(None::<Duration>)
        .map_sqlx_sqlite_opts(move |o| {
            let o = o
                .in_memory(false)
                .shared_cache(false)
                .filename(&file)
                .create_if_missing(true)
                .pragma("journal_mode", "WAL")
                .pragma("synchronous", "FULL")
                .pragma("busy_timeout", "30000")
                .pragma("journal_size_limit", "67108864");
            if read { o.pragma("query_only", "ON") } else { o }
        });
    Database::connect(options).await
}

fn sql(text: &str, values: impl IntoIterator<Item = Value>) -> Statement {
    Statement::from_sql_and_values(DatabaseBackend::Sqlite, text, values)
}

async fn run(
    tx: &DatabaseTransaction,
    text: &str,
    values: impl IntoIterator<Item = Value>,
) -> Result<u64, DbErr> {
    Ok(tx.execute_raw(sql(text, values)).await?.rows_affected())
}

fn insert_values(event: &NewEvent, state: i64) -> [Value; 9] {
    [
        event.key.as_str().into(),
        event.kind.as_str().into(),
        event.subject.clone().into(),
        event.body.to_vec().into(),
        event.received_at_ms.into(),
        state.into(),
        (state == DONE).then_some(event.received_at_ms).into(),
        i64::from(event.ended_job.is_some()).into(),
        event.lane.as_str().into(),
    ]
}

const INSERT: &str = "INSERT INTO events
    (key, kind, subject, body, received_at_ms, state, attempts, due_at_ms, settled_at_ms, ends, lane)
    VALUES ($1, $2, $3, CASE $6 WHEN 1 THEN NULL ELSE $4 END, $5, $6, 0, $5, $7, $8, $9)";

const REVIVE: &str =
    "UPDATE events SET state = 0, attempts = 0, due_at_ms = $2, settled_at_ms = NULL, error = NULL,
    body = $3, received_at_ms = $2, lane = $4 WHERE key = $1";

/// Inserts an event or says what is there. `late`: its job's end is known already.
async fn put(tx: &DatabaseTransaction, event: &NewEvent, late: bool) -> Result<Accepted, DbErr> {
    let row =
        tx.query_one_raw(sql("SELECT state FROM events WHERE key = $1", [event.key.as_str().into()])).await?;
    let Some(row) = row else {
        run(tx, INSERT, insert_values(event, if late { DONE } else { PENDING })).await?;
        return Ok(if late { Accepted::Done } else { Accepted::New });
    };
    let state: i64 = row.try_get_by_index(0)?;
    let revive = match state {
        PENDING => {
            if event.at_once {
                let hurry = "UPDATE events SET due_at_ms = $2 WHERE key = $1 AND due_at_ms > $2";
                run(tx, hurry, [event.key.as_str().into(), event.received_at_ms.into()]).await?;
            }
            return Ok(Accepted::Waiting);
        }
        DONE if !event.again => return Ok(Accepted::Done),
        DONE => Accepted::New,
        _ => Accepted::Revived,
    };
    let values: [Value; 4] = [
        event.key.as_str().into(),
        event.received_at_ms.into(),
        event.body.to_vec().into(),
        event.lane.as_str().into(),
    ];
    run(tx, REVIVE, values).await?;
    run(tx, "DELETE FROM files WHERE key = $1", [event.key.as_str().into()]).await?;
    Ok(revive)
}

async fn accept(tx: &DatabaseTransaction, event: &NewEvent) -> Result<Accepted, DbErr> {
    let mut late = false;
    if let Some((job, how)) = &event.ended_job {
        let values = [job.as_str().into(), event.received_at_ms.into(), how.as_str().into()];
        // Formats tell failures apart in different ways, but not failure from success.
        let ended = "UPDATE tracked SET state = 1, ended_at_ms = $2, ended_as = $3
            WHERE job_id = $1 AND (state <> 2 OR (ended_as = 'COMPLETED') <> ($3 = 'COMPLETED'))";
        if run(tx, ended, values).await? == 0 {
            let found = sql("SELECT 1 FROM tracked WHERE job_id = $1 AND state = 2", [job.as_str().into()]);
            late = tx.query_one_raw(found).await?.is_some();
        }
    }
    put(tx, event, late).await
}

#[async_trait]
impl Journal for SqliteJournal {
    async fn accept(&self, event: NewEvent) -> Result<Accepted, StoreError> {
        self.writer.write(move |tx| Box::pin(async move { accept(tx, &event).await })).await
    }

    async fn due(
        &self,
        now_ms: i64,
        limit: u32,
        closed: &Closed,
    ) -> Result<Vec<(String, String)>, StoreError> {
        let text = "SELECT key, lane FROM events WHERE state = 0 AND due_at_ms <= $1
            AND ($3 = 0 OR lane = '') AND ($4 = 0 OR lane <> '')
            AND lane NOT IN ($5, $6, $7, $8, $9, $10, $11, $12)
            ORDER BY due_at_ms, received_at_ms LIMIT $2";
        let mut values: Vec<Value> = vec![
            now_ms.into(),
            limit.into(),
            i64::from(closed.all_hosts).into(),
            i64::from(closed.no_host).into(),
        ];
        // Unused places hold what no lane is called.
        let hosts = closed.hosts.iter().map(String::as_str).chain(std::iter::repeat("-"));
        values.extend(hosts.take(MAX_CLOSED).map(Value::from));
        let rows = self.all(text, values).await?;
        let read = |row: &QueryResult| Ok((row.try_get_by_index(0)?, row.try_get_by_index(1)?));
        rows.iter().map(read).collect::<Result<_, DbErr>>().map_err(|error| self.failed(&error))
    }

    async fn load(&self, key: &str) -> Result<Option<DueEvent>, StoreError> {
        let text = "SELECT kind, body, attempts, received_at_ms FROM events WHERE key = $1 AND state = 0";
        let rows = self.all(text, [key.into()]).await?;
        let read = |row: &QueryResult| -> Result<DueEvent, DbErr> {
            let body: Option<Vec<u8>> = row.try_get_by_index(1)?;
            Ok(DueEvent {
                key: key.to_owned(),
                kind: row.try_get_by_index(0)?,
                body: Bytes::from(body.unwrap_or_default()),
                attempts: row.try_get_by_index(2)?,
                received_at_ms: row.try_get_by_index(3)?,
            })
        };
        rows.first().map(read).transpose().map_err(|error| self.failed(&error))
    }

    async fn next_due(&self, after_ms: i64) -> Result<Option<i64>, StoreError> {
        self.number("SELECT MIN(due_at_ms) FROM events WHERE state = 0 AND due_at_ms > $1", [after_ms.into()])
            .await
    }

    async fn settle(&self, key: &str, settled: Settled, now_ms: i64) -> Result<(), StoreError> {
        let key = key.to_owned();
        self.writer
            .write(move |tx| {
            Box::pin(async move {
                let (text, values): (&str, Vec<Value>) = match settled {
                    Settled::Done => (
                        "UPDATE events SET state = 1, body = NULL, error = NULL, settled_at_ms = $2,
                         attempts = attempts + 1 WHERE key = $1",
                        vec![key.into(), now_ms.into()],
                    ),
                    Settled::Again { due_at_ms, error } => (
                        "UPDATE events SET due_at_ms = $2, error = $3, attempts = attempts + 1 WHERE key = $1",
                        vec![key.into(), due_at_ms.into(), error.into()],
                    ),
                    Settled::GivenUp { error } => (
                        "UPDATE events SET state = 2, error = $3, settled_at_ms = $2, attempts = attempts + 1
                         WHERE key = $1",
                        vec![key.into(), now_ms.into(), error.into()],
                    ),
                };
                run(tx, text, values).await.map(|_| ())
            })
        })
            .await
    }

    async fn saved(&self, key: &str, item: u32, file: SavedFile) -> Result<(), StoreError> {
        let size = i64::try_from(file.size_bytes).unwrap_or(i64::MAX);
        let values: [Value; 5] = [key.into(), item.into(), file.name.into(), file.sha256.into(), size.into()];
        let text = "INSERT INTO files (key, item, name, sha256, size_bytes) VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT (key, item) DO UPDATE SET name = excluded.name, sha256 = excluded.sha256,
            size_bytes = excluded.size_bytes";
        self.writer.write(move |tx| Box::pin(async move { run(tx, text, values).await.map(|_| ()) })).await
    }

    async fn file(&self, key: &str, item: u32) -> Result<Option<SavedFile>, StoreError> {
        let text = "SELECT name, sha256, size_bytes FROM files WHERE key = $1 AND item = $2";
        let rows = self.all(text, [key.into(), item.into()]).await?;
        rows.first().map(saved_file).transpose().map_err(|error| self.failed(&error))
    }

    async fn about(&self, subject: &str) -> Result<Vec<EventView>, StoreError> {
        let text = "SELECT key, kind, state, received_at_ms, error FROM events WHERE subject = $1
            ORDER BY received_at_ms LIMIT 100";
        let mut views = Vec::new();
        for row in self.all(text, [subject.into()]).await? {
            let read = || -> Result<(String, EventView), DbErr> {
                let state: i64 = row.try_get_by_index(2)?;
                let view = EventView {
                    kind: row.try_get_by_index(1)?,
                    state: match state {
                        PENDING => "pending",
                        GIVEN_UP => "failed",
                        _ => "done",
                    },
                    received_at_ms: row.try_get_by_index(3)?,
                    error: row.try_get_by_index(4)?,
                    files: Vec::new(),
                };
                Ok((row.try_get_by_index(0)?, view))
            };
            let (key, mut view) = read().map_err(|error| self.failed(&error))?;
            let text = "SELECT name, sha256, size_bytes FROM files WHERE key = $1 ORDER BY item";
            let files = self.all(text, [key.into()]).await?;
            view.files = files
                .iter()
                .map(saved_file)
                .collect::<Result<_, _>>()
                .map_err(|error| self.failed(&error))?;
            views.push(view);
        }
        Ok(views)
    }

    async fn forget(&self, before_ms: i64) -> Result<u64, StoreError> {
        // Small chunks: nobody waits long behind one.
        const CHUNK: &str = "SELECT key FROM events WHERE state <> 0 AND settled_at_ms < $1 LIMIT 200";
        let mut total = 0;
        loop {
            let forgotten = self
                .writer
                .write(move |tx| {
                    Box::pin(async move {
                        let files = format!("DELETE FROM files WHERE key IN ({CHUNK})");
                        run(tx, &files, [before_ms.into()]).await?;
                        let events = format!("DELETE FROM events WHERE key IN ({CHUNK})");
                        run(tx, &events, [before_ms.into()]).await
                    })
                })
                .await?;
            total += forgotten;
            if forgotten == 0 {
                break;
            }
        }
        let tracked = "DELETE FROM tracked WHERE state <> 0 AND ended_at_ms < $1";
        self.writer
            .write(move |tx| Box::pin(async move { run(tx, tracked, [before_ms.into()]).await.map(|_| ()) }))
            .await?;
        Ok(total)
    }

    async fn counts(&self) -> Result<Counts, StoreError> {
        let mut counts = Counts::default();
        for row in self.all("SELECT state, COUNT(*) FROM events GROUP BY state", []).await? {
            let read =
                || -> Result<(i64, i64), DbErr> { Ok((row.try_get_by_index(0)?, row.try_get_by_index(1)?)) };
            let (state, count) = read().map_err(|error| self.failed(&error))?;
            let count = u64::try_from(count).unwrap_or(0);
            match state {
                PENDING => counts.pending = count,
                GIVEN_UP => counts.failed = count,
                _ => counts.done = count,
            }
        }
        let tracked = self.number("SELECT COUNT(*) FROM tracked WHERE state = 0", []).await?;
        counts.tracked = tracked.and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
        Ok(counts)
    }

    async fn track(&self, job: TrackedJob, due_at_ms: i64) -> Result<(), StoreError> {
        let values: [Value; 4] =
            [job.job_id.into(), job.context.into(), job.submitted_at_ms.into(), due_at_ms.into()];
        // A quick job's webhook may be here before its submitter has called.
        let text =
            "INSERT INTO tracked (job_id, context, submitted_at_ms, due_at_ms, polls, state, ended_at_ms)
            SELECT $1, $2, $3, $4, 0, n, CASE n WHEN 1 THEN $3 END FROM
            (SELECT EXISTS (SELECT 1 FROM events WHERE subject = $1 AND ends = 1) AS n) WHERE true
            ON CONFLICT (job_id) DO NOTHING";
        self.writer.write(move |tx| Box::pin(async move { run(tx, text, values).await.map(|_| ()) })).await
    }

    async fn tracked_due(&self, now_ms: i64, limit: u32) -> Result<Vec<TrackedJob>, StoreError> {
        let text = "SELECT job_id, context, submitted_at_ms, polls FROM tracked
            WHERE state = 0 AND due_at_ms <= $1 ORDER BY due_at_ms LIMIT $2";
        let rows = self.all(text, [now_ms.into(), limit.into()]).await?;
        let read = |row: &QueryResult| -> Result<TrackedJob, DbErr> {
            Ok(TrackedJob {
                job_id: row.try_get_by_index(0)?,
                context: row.try_get_by_index(1)?,
                submitted_at_ms: row.try_get_by_index(2)?,
                polls: row.try_get_by_index(3)?,
            })
        };
        rows.iter().map(read).collect::<Result<_, _>>().map_err(|error| self.failed(&error))
    }

    async fn tracked_next_due(&self) -> Result<Option<i64>, StoreError> {
        self.number("SELECT MIN(due_at_ms) FROM tracked WHERE state = 0", []).await
    }

    async fn tracked_found(&self, job_id: &str, event: NewEvent) -> Result<Accepted, StoreError> {
        let job_id = job_id.to_owned();
        self.writer
            .write(move |tx| {
                Box::pin(async move {
                    let how = event.ended_job.as_ref().map(|(_, how)| how.as_str().to_owned());
                    let text =
                        "UPDATE tracked SET state = 2, ended_at_ms = $2, ended_as = $3, polls = polls + 1
                    WHERE job_id = $1 AND state = 0";
                    let values = [job_id.into(), event.received_at_ms.into(), how.into()];
                    if run(tx, text, values).await? == 0 {
                        return Ok(Accepted::Done);
                    }
                    put(tx, &event, false).await
                })
            })
            .await
    }

    async fn tracked_again(&self, job_id: &str, due_at_ms: i64) -> Result<(), StoreError> {
        let values: [Value; 2] = [job_id.into(), due_at_ms.into()];
        let text = "UPDATE tracked SET due_at_ms = $2, polls = polls + 1 WHERE job_id = $1 AND state = 0";
        self.writer.write(move |tx| Box::pin(async move { run(tx, text, values).await.map(|_| ()) })).await
    }

    async fn tracked_give_up(&self, job_id: &str, now_ms: i64) -> Result<(), StoreError> {
        let values: [Value; 2] = [job_id.into(), now_ms.into()];
        let text = "UPDATE tracked SET state = 3, ended_at_ms = $2, polls = polls + 1 WHERE job_id = $1 AND state = 0";
        self.writer.write(move |tx| Box::pin(async move { run(tx, text, values).await.map(|_| ()) })).await
    }

    async fn tracked_state(&self, job_id: &str) -> Result<Option<TrackedState>, StoreError> {
        let state = self.number("SELECT state FROM tracked WHERE job_id = $1", [job_id.into()]).await?;
        Ok(state.map(|state| match state {
            BY_WEBHOOK => TrackedState::Webhook,
            BY_POLL => TrackedState::Poll,
            STOPPED => TrackedState::GivenUp,
            _ => TrackedState::Awaited,
        }))
    }
}

fn saved_file(row: &QueryResult) -> Result<SavedFile, DbErr> {
    let size: i64 = row.try_get_by_index(2)?;
    Ok(SavedFile {
        name: row.try_get_by_index(0)?,
        sha256: row.try_get_by_index(1)?,
        size_bytes: u64::try_from(size).unwrap_or(0),
    })
}

#[cfg(test)]
mod tests;
