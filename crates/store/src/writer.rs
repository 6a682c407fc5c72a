//! Group commit: the commands of all services of a process share transactions.
//!
//! One transaction runs at a time on SQLite, a few on PostgreSQL. While one runs, further commands gather; the next
//! starts at once where nothing was running, else when 64 wait or 1 ms has passed. A command that fails does not
//! fail its neighbours: the shared transaction is rolled back and each command runs again alone (P9), which is why
//! closures may run more than once.

use std::{
    any::Any,
    collections::{BTreeMap, VecDeque},
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt, future::BoxFuture};
use ringback_domain::EndpointId;
use sea_orm::{
    ConnectionTrait, DatabaseBackend, DatabaseConnection, DatabaseTransaction, SqliteTransactionMode,
    TransactionOptions, TransactionTrait,
};
use tokio::sync::{Mutex, mpsc, oneshot};

use crate::{
    StoreError,
    counters::{CounterDelta, add_counters},
    live_cache::{Known, LiveCache},
    sql,
    webhooks::registry::{Cache, Registry, next_position},
};

/// How soon a command must be committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// With the next transaction.
    Now,
    /// With the next transaction of others, at the latest after 100 ms.
    Lazy,
}

/// A running transaction.
pub struct WriteTx {
    conn: DatabaseTransaction,
    now_ms: i64,
    cache: Cache,
    live: LiveCache,
    seen: std::sync::Mutex<Seen>,
}

/// What a transaction has asked for already.
#[derive(Debug, Default)]
struct Seen {
    registry: Option<Arc<Registry>>,
    /// A command of this transaction changed webhooks or endpoints: what it sees may be rolled back.
    registry_changed: bool,
    position: Option<i64>,
    /// Live jobs that this transaction wrote.
    written: Vec<Known>,
    /// What its commands change in counts, by the row that is written.
    counts: BTreeMap<i64, BTreeMap<EndpointId, CounterDelta>>,
}

impl std::fmt::Debug for WriteTx {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteTx").field("now_ms", &self.now_ms).finish_non_exhaustive()
    }
}

impl WriteTx {
    /// The connection inside the transaction.
    #[must_use]
    pub const fn conn(&self) -> &DatabaseTransaction {
        &self.conn
    }

    /// The database's clock at the start of the transaction, Unix ms.
    #[must_use]
    pub const fn now_ms(&self) -> i64 {
        self.now_ms
    }

    /// Whether this is PostgreSQL.
    #[must_use]
    pub fn is_postgres(&self) -> bool {
        self.backend() == DatabaseBackend::Postgres
    }

    pub(crate) fn backend(&self) -> DatabaseBackend {
        self.conn.get_database_backend()
    }

    pub(crate) const fn live(&self) -> &LiveCache {
        &self.live
    }

    /// A live job as it will be once this transaction has committed.
    pub(crate) fn written(&self, known: Known) {
        self.seen().written.push(known);
    }

    /// Changes counts of endpoints: written once, with the commit, for all commands of this transaction. What reads
    /// counts inside the transaction does not see it. `writer` is [`crate::Store::counter_row`].
    pub fn count(&self, writer: i64, deltas: &BTreeMap<EndpointId, CounterDelta>) {
        let mut seen = self.seen();
        let counts = seen.counts.entry(writer).or_default();
        for (endpoint, delta) in deltas {
            counts.entry(*endpoint).or_default().add(delta);
        }
    }

    async fn write_counts(&self) -> Result<(), StoreError> {
        let counts = std::mem::take(&mut self.seen().counts);
        for (writer, deltas) in counts {
            add_counters(self, writer, &deltas).await?;
        }
        Ok(())
    }

    /// All registered webhooks and endpoints as this transaction sees them; asked once per transaction.
    ///
    /// # Errors
    /// The database's, and a corrupt row.
    pub async fn registry(&self) -> Result<Arc<Registry>, StoreError> {
        let committed = {
            let seen = self.seen();
            if let Some(registry) = &seen.registry {
                return Ok(Arc::clone(registry));
            }
            !seen.registry_changed
        };
        let registry = self.cache.read(&self.conn, committed).await?;
        self.seen().registry = Some(Arc::clone(&registry));
        Ok(registry)
    }

    /// What was asked before a change of webhooks or endpoints no longer holds.
    pub(crate) fn forget_registry(&self) {
        let mut seen = self.seen();
        seen.registry = None;
        seen.registry_changed = true;
    }

    /// The place of this transaction's deliveries in the feed: a number that rises in the order of commits on SQLite,
    /// and that readers compare with [`crate::webhooks::registry::feed_horizon`] on PostgreSQL.
    ///
    /// # Errors
    /// The database's.
    pub async fn position(&self) -> Result<i64, StoreError> {
        if let Some(position) = self.seen().position {
            return Ok(position);
        }
        let position = next_position(&self.conn).await?;
        self.seen().position = Some(position);
        Ok(position)
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

const GATHER_MAX: usize = 64;
const GATHER: Duration = Duration::from_millis(1);
const LAZY: Duration = Duration::from_millis(100);
const QUEUE_MAX: usize = 8192;
const ALONE_TRIES: u32 = 3;

trait Command: Send {
    fn run<'a>(&'a mut self, tx: &'a WriteTx) -> BoxFuture<'a, Result<(), StoreError>>;
    fn finish(self: Box<Self>, result: Result<(), StoreError>);
}

struct Typed<T, F> {
    f: F,
    out: Option<T>,
    reply: oneshot::Sender<Result<T, StoreError>>,
}

impl<T, F> Command for Typed<T, F>
where
    T: Send + 'static,
    F: for<'a> Fn(&'a WriteTx) -> BoxFuture<'a, Result<T, StoreError>> + Send + Sync + 'static,
{
    fn run<'a>(&'a mut self, tx: &'a WriteTx) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            self.out = None;
            let result = AssertUnwindSafe((self.f)(tx)).catch_unwind().await;
            self.out = Some(result.unwrap_or_else(|panic| Err(panicked(&*panic)))?);
            Ok(())
        })
    }

    fn finish(self: Box<Self>, result: Result<(), StoreError>) {
        let Self { out, reply, .. } = *self;
        let answer = result.and_then(|()| out.ok_or_else(|| StoreError::corrupt("a command left no result")));
        // A caller that no longer waits does not undo what was committed.
        let _ = reply.send(answer);
    }
}

fn panicked(panic: &(dyn Any + Send)) -> StoreError {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    StoreError::Permanent { detail: format!("a command panicked: {text}") }
}

struct Queued {
    command: Box<dyn Command>,
    urgency: Urgency,
    since: Instant,
}

/// Sends commands to the writer tasks.
#[derive(Clone)]
pub(crate) struct Writer {
    queue: mpsc::Sender<Queued>,
}

impl Writer {
    /// Starts the writer tasks on `pool`: one on SQLite, `parallel` on PostgreSQL. They end with the last sender.
    pub(crate) fn start(pool: DatabaseConnection, parallel: usize, cache: &Cache) -> Self {
        let live = LiveCache::default();
        let (queue, receiver) = mpsc::channel(QUEUE_MAX);
        let inbox = Arc::new(Mutex::new(Gathering::new(receiver)));
        let task = || {
            let pool = Pool { db: pool.clone(), cache: cache.clone(), live: live.clone() };
            work(pool, Arc::clone(&inbox))
        };
        if pool.get_database_backend() == DatabaseBackend::Sqlite {
            if let Err(error) = on_own_thread(task()) {
                tracing::warn!(%error, "no thread for the writer; it shares those of the requests");
                tokio::spawn(task());
            }
        } else {
            for _ in 0..parallel.max(1) {
                tokio::spawn(task());
            }
        }
        Self { queue }
    }

    pub(crate) async fn write<T, F>(&self, urgency: Urgency, f: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: for<'a> Fn(&'a WriteTx) -> BoxFuture<'a, Result<T, StoreError>> + Send + Sync + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let command = Box::new(Typed { f, out: None, reply });
        let queued = Queued { command, urgency, since: Instant::now() };
        self.queue.send(queued).await.map_err(|_| StoreError::transient("the store is closed"))?;
        answer.await.map_err(|_| StoreError::CommitUnknown { detail: "the store was closed".to_owned() })?
    }
}

/// Each statement is a trip to SQLite's thread and back. On the shared threads a transaction would wait after each
/// trip for its turn behind the requests, and they behind it.
fn on_own_thread(work: impl Future<Output = ()> + Send + 'static) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    std::thread::Builder::new()
        .name("store-writer".to_owned())
        .spawn(move || runtime.block_on(work))
        .map(drop)
}

/// Commands between the channel and a transaction.
struct Gathering {
    receiver: mpsc::Receiver<Queued>,
    waiting: VecDeque<Queued>,
    /// When the newest transaction ended: right after it, waiting a moment makes the next one larger.
    last_end: Option<Instant>,
}

impl Gathering {
    const fn new(receiver: mpsc::Receiver<Queued>) -> Self {
        Self { receiver, waiting: VecDeque::new(), last_end: None }
    }

    /// The commands of the next transaction; `None` when the store is closed and nothing waits.
    async fn next(&mut self) -> Option<Vec<Queued>> {
        loop {
            while self.waiting.len() < GATHER_MAX {
                match self.receiver.try_recv() {
                    Ok(queued) => self.waiting.push_back(queued),
                    Err(_) => break,
                }
            }
            let Some(start_at) = self.start_at() else {
                match self.receiver.recv().await {
                    Some(queued) => self.waiting.push_back(queued),
                    None => return None,
                }
                continue;
            };
            if self.waiting.len() >= GATHER_MAX || start_at <= Instant::now() {
                let n = self.waiting.len().min(GATHER_MAX);
                return Some(self.waiting.drain(..n).collect());
            }
            tokio::select! {
                () = tokio::time::sleep_until(start_at.into()) => {}
                received = self.receiver.recv() => match received {
                    Some(queued) => self.waiting.push_back(queued),
                    None => return Some(self.waiting.drain(..).collect()),
                },
            }
        }
    }

    /// When the next transaction may start; `None` where nothing waits.
    fn start_at(&self) -> Option<Instant> {
        let urgent = self.waiting.iter().find(|q| q.urgency == Urgency::Now).map(|q| {
            // At once when idle; after a transaction that just ended, a moment later.
            self.last_end.map_or(q.since, |end| (end + GATHER).max(q.since))
        });
        let lazy = self.waiting.front().map(|q| q.since + LAZY);
        match (urgent, lazy) {
            (Some(u), Some(l)) => Some(u.min(l)),
            (u, l) => u.or(l),
        }
    }
}

/// Where transactions begin.
struct Pool {
    db: DatabaseConnection,
    cache: Cache,
    live: LiveCache,
}

async fn work(pool: Pool, inbox: Arc<Mutex<Gathering>>) {
    loop {
        let commands = inbox.lock().await.next().await;
        let Some(commands) = commands else { return };
        metrics::histogram!("ringback_store_commands_per_transaction").record(commands.len() as f64);
        let began = Instant::now();
        commit_together(&pool, commands).await;
        metrics::histogram!("ringback_store_transaction_seconds").record(began.elapsed());
        // Where another task gathers just now, it has its own idea of when to start.
        if let Ok(mut gathering) = inbox.try_lock() {
            gathering.last_end = Some(Instant::now());
        }
    }
}

async fn commit_together(pool: &Pool, mut commands: Vec<Queued>) {
    match run_all(pool, &mut commands).await {
        Ok(()) => finish(commands, &Ok(())),
        Err(Failure::Begin(e)) | Err(Failure::Commit(e)) => finish(commands, &Err(e)),
        Err(Failure::Command(e)) if commands.len() == 1 && !e.is_transient() => finish(commands, &Err(e)),
        Err(Failure::Command(_)) => {
            for command in commands {
                commit_alone(pool, command).await;
            }
        }
    }
}

fn finish(commands: Vec<Queued>, result: &Result<(), StoreError>) {
    for queued in commands {
        queued.command.finish(result.clone());
    }
}

async fn commit_alone(pool: &Pool, command: Queued) {
    let mut commands = vec![command];
    for attempt in 1..=ALONE_TRIES {
        match run_all(pool, &mut commands).await {
            Ok(()) => return finish(commands, &Ok(())),
            Err(Failure::Command(e)) if e.is_transient() && attempt < ALONE_TRIES => {
                tokio::time::sleep(Duration::from_millis(u64::from(attempt) * 5)).await;
            }
            Err(Failure::Begin(e) | Failure::Command(e) | Failure::Commit(e)) => {
                return finish(commands, &Err(e));
            }
        }
    }
}

enum Failure {
    Begin(StoreError),
    Command(StoreError),
    Commit(StoreError),
}

async fn run_all(pool: &Pool, commands: &mut [Queued]) -> Result<(), Failure> {
    let tx = begin(pool).await.map_err(Failure::Begin)?;
    for queued in commands.iter_mut() {
        if let Err(e) = queued.command.run(&tx).await {
            // A rollback that fails closes the connection, which rolls back as well.
            let _ = tx.conn.rollback().await;
            return Err(Failure::Command(e));
        }
    }
    if let Err(e) = tx.write_counts().await {
        let _ = tx.conn.rollback().await;
        return Err(Failure::Command(e));
    }
    let WriteTx { conn, live, seen, .. } = tx;
    conn.commit().await.map_err(|e| Failure::Commit(StoreError::CommitUnknown { detail: e.to_string() }))?;
    live.put(seen.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).written);
    Ok(())
}

async fn begin(pool: &Pool) -> Result<WriteTx, StoreError> {
    let sqlite = pool.db.get_database_backend() == DatabaseBackend::Sqlite;
    let options = TransactionOptions {
        isolation_level: None,
        access_mode: None,
        sqlite_transaction_mode: sqlite.then_some(SqliteTransactionMode::Immediate),
    };
    let conn = pool.db.begin_with_options(options).await?;
    let (now_ms, position) =
        if sqlite { (now_ms(&conn).await?, None) } else { clock_and_position(&conn).await? };
    let seen = std::sync::Mutex::new(Seen { position, ..Seen::default() });
    Ok(WriteTx { conn, now_ms, cache: pool.cache.clone(), live: pool.live.clone(), seen })
}

/// PostgreSQL's clock and number of the transaction, in one question.
async fn clock_and_position(conn: &DatabaseTransaction) -> Result<(i64, Option<i64>), StoreError> {
    let row = sql::query_one(
        conn,
        "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint, pg_current_xact_id()::text::bigint",
        [],
    )
    .await?
    .ok_or_else(|| StoreError::corrupt("clock"))?;
    Ok((row.try_get_by_index(0)?, Some(row.try_get_by_index(1)?)))
}

/// The database's clock. SQLite's is this host's, so it is read without asking.
pub(crate) async fn now_ms<C: ConnectionTrait>(conn: &C) -> Result<i64, StoreError> {
    if conn.get_database_backend() == DatabaseBackend::Sqlite {
        return Ok(ringback_service_runtime::time::now_ms());
    }
    let row =
        sql::query_one(conn, "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint", []).await?;
    Ok(row.ok_or_else(|| StoreError::corrupt("clock"))?.try_get_by_index(0)?)
}
