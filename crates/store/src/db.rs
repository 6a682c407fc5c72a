//! Opening the database.

use std::{fmt, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use sea_orm::{ConnectOptions, Database, DatabaseBackend, DatabaseConnection, Value};

use crate::{
    StoreError, sql,
    webhooks::registry::{Cache, Registry},
    writer::{self, Urgency, WriteTx, Writer},
};

/// How to open a store.
#[derive(Clone, Debug)]
pub struct Open {
    /// `sqlite://PATH` or `postgres://…`. May hold a password: never logged.
    pub url: ringback_service_runtime::Redacted<String>,
    /// Connections for reading.
    pub readers: u32,
    /// Transactions at once on PostgreSQL; SQLite has one writer.
    pub writers: u32,
    /// Longest wait for a connection, and of SQLite for a lock.
    pub acquire_timeout: Duration,
    /// Shards of the work queue, fixed when the database is first set up.
    pub shards: u16,
    /// Partitions of the deliveries, fixed when the database is first set up.
    pub partitions: u16,
}

impl Open {
    /// With the usual sizes.
    #[must_use]
    pub fn url(url: impl Into<String>) -> Self {
        Self {
            url: ringback_service_runtime::Redacted::new(url.into()),
            readers: 4,
            writers: 4,
            acquire_timeout: Duration::from_secs(5),
            shards: 8,
            partitions: 8,
        }
    }
}

/// Facts about this database, fixed when it was set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Shards of the work queue.
    pub shards: u16,
    /// Partitions of the deliveries.
    pub partitions: u16,
    /// Changes when a backup is restored; copied into streams and messages.
    pub db_epoch: String,
}

/// The SQL store. Cheap to clone; all clones in a process share one writer.
#[derive(Clone)]
pub struct Store {
    read: DatabaseConnection,
    writer: Writer,
    facts: Arc<Facts>,
    registry: Cache,
    /// Random per process; the row it writes in `endpoint_counters`.
    counter_row: i64,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("facts", &self.facts).finish_non_exhaustive()
    }
}

impl Store {
    /// Connects. The schema must be current: see [`Self::migrate`].
    pub async fn open(open: &Open) -> Result<Self, StoreError> {
        let sqlite = is_sqlite(open)?;
        let write = connect(open, sqlite, Pool::Write).await?;
        let read = connect(open, sqlite, Pool::Read).await?;
        if !sqlite {
            refuse_lossy_commits(&write).await?;
        }
        if !ringback_store_migrations::is_current(&write).await? {
            return Err(StoreError::Permanent {
                detail: "the schema is not current: run `ringback migrate`".to_owned(),
            });
        }
        let facts = Arc::new(read_facts(&write).await?);
        let registry = Cache::default();
        let writer = Writer::start(write, open.writers as usize, &registry);
        Ok(Self { read, writer, facts, registry, counter_row: i64::from(rand::random::<u32>()) })
    }

    /// Brings the schema up to date and fixes the facts of a new database. Safe to repeat.
    pub async fn migrate(open: &Open) -> Result<(), StoreError> {
        let db = connect(open, is_sqlite(open)?, Pool::Write).await?;
        ringback_store_migrations::up(&db).await?;
        let epoch = format!("{:016x}", rand::random::<u64>());
        for (key, value) in [
            ("shards", open.shards.max(1).to_string()),
            ("partitions", open.partitions.max(1).to_string()),
            ("db_epoch", epoch),
        ] {
            sql::execute(
                &db,
                "INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING",
                [Value::from(key), Value::from(value)],
            )
            .await?;
        }
        db.close().await?;
        Ok(())
    }

    /// A connection for reading. Reads see what was committed before they began.
    #[must_use]
    pub const fn read(&self) -> &DatabaseConnection {
        &self.read
    }

    /// Runs `f` in a transaction that others may share; answers after the commit.
    ///
    /// `f` may run more than once (see [`crate::Urgency`] and the writer): it must not keep anything from a former
    /// run, and does no I/O but SQL (P7). After [`StoreError::CommitUnknown`], read back before telling anybody.
    pub async fn write<T, F>(&self, urgency: Urgency, f: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: for<'a> Fn(&'a WriteTx) -> BoxFuture<'a, Result<T, StoreError>> + Send + Sync + 'static,
    {
        self.writer.write(urgency, f).await
    }

    /// All registered webhooks and endpoints as they are now.
    ///
    /// # Errors
    /// The database's, and a corrupt row.
    pub async fn registry(&self) -> Result<Arc<Registry>, StoreError> {
        self.registry.read(&self.read, true).await
    }

    /// The facts of this database.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The database's clock, Unix ms.
    pub async fn now_ms(&self) -> Result<i64, StoreError> {
        writer::now_ms(&self.read).await
    }

    /// The row of `endpoint_counters` that this process writes.
    #[must_use]
    pub const fn counter_row(&self) -> i64 {
        self.counter_row
    }

    /// Whether the database answers.
    pub async fn ping(&self) -> Result<(), StoreError> {
        sql::query_one(&self.read, "SELECT 1", []).await.map(|_| ())
    }
}

fn is_sqlite(open: &Open) -> Result<bool, StoreError> {
    let url = open.url.expose();
    if url.starts_with("sqlite:") {
        Ok(true)
    } else if url.starts_with("postgres:") || url.starts_with("postgresql:") {
        Ok(false)
    } else {
        Err(StoreError::Permanent { detail: "database.url must begin with sqlite: or postgres:".to_owned() })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pool {
    Read,
    Write,
}

/// Prepared statements kept per connection: hot ones come in seven to nineteen sizes each.
const STATEMENTS: usize = 600;

async fn connect(open: &Open, sqlite: bool, pool: Pool) -> Result<DatabaseConnection, StoreError> {
    let mut options = ConnectOptions::new(open.url.expose().clone());
    let size = match pool {
        Pool::Read => open.readers.max(1),
        Pool::Write if sqlite => 1,
        Pool::Write => open.writers.max(1),
    };
    options
        .max_connections(size)
        .min_connections(1)
        .acquire_timeout(open.acquire_timeout)
        .connect_timeout(Duration::from_secs(5))
        .test_before_acquire(!sqlite)
        .sqlx_logging(false)
        .record_stmt_in_spans(false);
    if sqlite {
        let busy_ms = open.acquire_timeout.as_millis().to_string();
        // An embedded connection does not age, and closing the last one would checkpoint the log.
        options.idle_timeout(None::<Duration>).max_lifetime(None::<Duration>);
        options.map_sqlx_sqlite_opts(move |o| {
            // FULL: a commit is on disk when it is answered (P1). The log is folded back every 1,000 pages by
            // SQLite itself.
            let o = o
                .create_if_missing(true)
                .pragma("journal_mode", "WAL")
                .pragma("synchronous", "FULL")
                .pragma("busy_timeout", busy_ms.clone())
                .pragma("cache_size", if pool == Pool::Read { "-4000" } else { "-8000" })
                .pragma("temp_store", "MEMORY")
                .pragma("wal_autocheckpoint", "4000")
                .pragma("journal_size_limit", "67108864")
                .statement_cache_capacity(STATEMENTS);
            if pool == Pool::Read { o.pragma("query_only", "ON") } else { o }
        });
    } else {
        options
            .map_sqlx_postgres_opts(|o| o.statement_cache_capacity(STATEMENTS).application_name("ringback"));
    }
    Ok(Database::connect(options).await?)
}

/// A commit that PostgreSQL answers before it is on disk breaks P1.
async fn refuse_lossy_commits(db: &DatabaseConnection) -> Result<(), StoreError> {
    for setting in ["synchronous_commit", "fsync"] {
        let row = sql::query_one(db, &format!("SHOW {setting}"), []).await?;
        let value: String = row.ok_or_else(|| StoreError::corrupt("setting"))?.try_get_by_index(0)?;
        if value == "off" {
            return Err(StoreError::Permanent {
                detail: format!(
                    "PostgreSQL runs with {setting} = off; Ringback needs it on (P1): set {setting} = on"
                ),
            });
        }
    }
    Ok(())
}

async fn read_facts(db: &DatabaseConnection) -> Result<Facts, StoreError> {
    debug_assert!(matches!(db.get_database_backend(), DatabaseBackend::Sqlite | DatabaseBackend::Postgres));
    let get = async |key: &'static str| -> Result<String, StoreError> {
        let row = sql::query_one(db, "SELECT value FROM meta WHERE key = $1", [Value::from(key)]).await?;
        Ok(row.ok_or_else(|| StoreError::corrupt("meta"))?.try_get_by_index::<String>(0)?)
    };
    let number = |text: String| text.parse::<u16>().map_err(|_| StoreError::corrupt("meta"));
    Ok(Facts {
        shards: number(get("shards").await?)?,
        partitions: number(get("partitions").await?)?,
        db_epoch: get("db_epoch").await?,
    })
}
