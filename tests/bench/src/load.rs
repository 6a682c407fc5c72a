//! The two ways to send jobs: as fast as they are finished (closed loop), and at a fixed rate (open loop).

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, StatusCode, Uri};
use indicatif::ProgressBar;
use tokio::task::JoinSet;

use crate::board::Board;
use crate::client::Connection;
use crate::error::BenchError;
use crate::receiver::{SLOT_KEY, job_id};

const PROGRESS_EVERY: Duration = Duration::from_millis(200);
const REFUSAL_PAUSE: Duration = Duration::from_millis(20);
/// So many refusals without one accepted job mean that nothing can be measured.
const HOPELESS_REFUSALS: u64 = 200;

/// Where jobs go.
pub struct Target {
    /// Host and port.
    pub address: String,
    /// The API key, if the server wants one.
    pub key: Option<String>,
    /// The `run` path of each endpoint; jobs take turns.
    pub paths: Vec<Uri>,
    /// The webhook of each job.
    pub webhook: String,
    /// Text in the input that gives it its size.
    pub text: String,
}

impl Target {
    /// The RunPod surface of `endpoints` at `address`.
    pub fn new(
        address: &str,
        key: Option<&str>,
        endpoints: &[String],
        webhook: String,
        text: String,
    ) -> Result<Self, BenchError> {
        let path = |name: &String| {
            format!("/v2/{name}/run").parse().map_err(|_| BenchError::Option {
                option: "endpoint",
                reason: format!("`{name}` cannot stand in a URL"),
            })
        };
        let paths = endpoints.iter().map(path).collect::<Result<Vec<Uri>, _>>()?;
        Ok(Self { address: address.to_owned(), key: key.map(str::to_owned), paths, webhook, text })
    }

    /// The bytes of job `n`.
    pub fn body(&self, n: u64) -> Bytes {
        let (text, webhook) = (&self.text, &self.webhook);
        Bytes::from(format!(r#"{{"input":{{"{SLOT_KEY}":{n},"text":"{text}"}},"webhook":"{webhook}"}}"#))
    }

    fn path(&self, n: u64) -> &Uri {
        &self.paths[n as usize % self.paths.len()]
    }
}

/// When the closed loop stops sending.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// After so many jobs.
    Jobs(u64),
    /// After so much time.
    Time(Duration),
}

/// The closed loop.
#[derive(Debug, Clone, Copy)]
pub struct Closed {
    /// Requests in flight.
    pub connections: usize,
    /// Jobs whose webhook has not come: never more than this. So a sustained rate is a drained rate.
    pub backlog: usize,
    /// The end.
    pub until: Until,
    /// Jobs count as lost when no webhook at all came for so long.
    pub patience: Duration,
}

/// The open loop.
#[derive(Debug, Clone, Copy)]
pub struct Open {
    /// Jobs per second, evenly spaced.
    pub rate: u32,
    /// How many in all.
    pub jobs: u64,
    /// As above.
    pub patience: Duration,
}

/// What was sent.
#[derive(Debug)]
pub struct Load {
    /// The slots of this load.
    pub slots: Range<u64>,
    /// Answers other than 200.
    pub refused: u64,
    /// Requests without an answer: their fate is unknown, so they cannot be lost.
    pub unknown: u64,
    /// The first refusal or transport error in words.
    pub first_trouble: Option<String>,
}

struct Sender {
    board: Arc<Board>,
    target: Arc<Target>,
    accepted: AtomicU64,
    refused: AtomicU64,
    unknown: AtomicU64,
    stalled: AtomicBool,
    trouble: Mutex<Option<String>>,
}

impl Sender {
    fn new(board: &Arc<Board>, target: &Arc<Target>) -> Arc<Self> {
        Arc::new(Self {
            board: Arc::clone(board),
            target: Arc::clone(target),
            accepted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
            stalled: AtomicBool::new(false),
            trouble: Mutex::new(None),
        })
    }

    /// Sends one job. True: accepted.
    async fn submit(&self, connection: &mut Connection, n: u64, due_ns: Option<u64>) -> bool {
        let body = self.target.body(n);
        let written_ns = self.board.now_ns();
        self.board.sent(n, due_ns.unwrap_or(written_ns), written_ns);
        let (counter, trouble) = match connection.send(Method::POST, self.target.path(n), body).await {
            Ok((StatusCode::OK, answer)) => match job_id(&answer) {
                Some(id) => {
                    self.board.answered(n, id);
                    self.accepted.fetch_add(1, Relaxed);
                    return true;
                }
                None => {
                    (&self.refused, format!("200 without a job id: {}", String::from_utf8_lossy(&answer)))
                }
            },
            Ok((status, answer)) => {
                (&self.refused, format!("{status}: {}", String::from_utf8_lossy(&answer)))
            }
            Err(error) => (&self.unknown, error.to_string()),
        };
        counter.fetch_add(1, Relaxed);
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(trouble);
        false
    }

    fn hopeless(&self) -> bool {
        self.accepted.load(Relaxed) == 0
            && self.refused.load(Relaxed) + self.unknown.load(Relaxed) >= HOPELESS_REFUSALS
    }

    fn finish(&self, slots: Range<u64>) -> Result<Load, BenchError> {
        let first_trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if self.accepted.load(Relaxed) == 0 {
            return Err(BenchError::Refused {
                url: format!("http://{}{}", self.target.address, self.target.paths[0]),
                reason: first_trouble.unwrap_or_else(|| "no job was sent".to_owned()),
            });
        }
        let (refused, unknown) = (self.refused.load(Relaxed), self.unknown.load(Relaxed));
        Ok(Load { slots, refused, unknown, first_trouble })
    }

    /// Waits until each accepted job has its webhook, or none came for `patience`.
    async fn drain(&self, from: u64, received_before: u64, patience: Duration, bar: &ProgressBar) {
        let mut last = (self.board.received(), Instant::now());
        loop {
            let received = self.board.received();
            if received != last.0 {
                last = (received, Instant::now());
            }
            bar.set_position(received - received_before);
            let enough = received - received_before >= self.accepted.load(Relaxed);
            if last.1.elapsed() > patience || (enough && self.board.missing(from..self.board.border()) == 0) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Runs the closed loop and waits for the last webhook.
pub async fn closed(
    board: &Arc<Board>,
    target: &Arc<Target>,
    plan: Closed,
    bar: &ProgressBar,
) -> Result<Load, BenchError> {
    let sender = Sender::new(board, target);
    let (from, received_before) = (board.border(), board.received());
    let permits = board.backlog.available_permits();
    board.backlog.forget_permits(permits);
    board.backlog.add_permits(plan.backlog);
    let left = Arc::new(AtomicU64::new(if let Until::Jobs(jobs) = plan.until { jobs } else { u64::MAX }));
    let deadline = if let Until::Time(time) = plan.until { Some(Instant::now() + time) } else { None };
    let mut tasks = JoinSet::new();
    for _ in 0..plan.connections {
        let connection = Connection::open(&target.address, target.key.as_deref()).await?;
        tasks.spawn(send_loop(Arc::clone(&sender), connection, Arc::clone(&left), deadline, plan.patience));
    }
    let mut tick = tokio::time::interval(PROGRESS_EVERY);
    loop {
        tokio::select! {
            ended = tasks.join_next() => if ended.is_none() { break },
            _ = tick.tick() => bar.set_position(board.received() - received_before),
        }
    }
    sender.drain(from, received_before, plan.patience, bar).await;
    board.backlog.forget_permits(board.backlog.available_permits());
    sender.finish(from..board.border())
}

async fn send_loop(
    sender: Arc<Sender>,
    mut connection: Connection,
    left: Arc<AtomicU64>,
    deadline: Option<Instant>,
    patience: Duration,
) {
    let board = &sender.board;
    let take_one = |left: u64| left.checked_sub(1);
    while deadline.is_none_or(|at| Instant::now() < at) {
        if sender.stalled.load(Relaxed) || sender.hopeless() {
            return;
        }
        if board.backlog.try_acquire().map(|permit| permit.forget()).is_err() {
            let wait =
                deadline.map_or(patience, |at| at.saturating_duration_since(Instant::now()).min(patience));
            match tokio::time::timeout(wait, board.backlog.acquire()).await {
                Ok(Ok(permit)) => permit.forget(),
                Ok(Err(_)) | Err(_) => {
                    // A full backlog for the whole patience: webhooks have stopped coming.
                    let timed_out = deadline.is_none_or(|at| Instant::now() < at);
                    sender.stalled.fetch_or(timed_out, Relaxed);
                    return;
                }
            }
        }
        if left.fetch_update(Relaxed, Relaxed, take_one).is_err() {
            return;
        }
        if !sender.submit(&mut connection, board.open(), None).await {
            board.backlog.add_permits(1);
            tokio::time::sleep(REFUSAL_PAUSE).await;
        }
    }
}

/// Runs the open loop and waits for the last webhook.
///
/// Each job has a due time that does not depend on earlier answers, and latency counts from it: a server that
/// stalls pays for all jobs that were due meanwhile (no coordinated omission). The times come from a thread of its
/// own, because the runtime's timer rounds to milliseconds.
pub async fn open(
    board: &Arc<Board>,
    target: &Arc<Target>,
    plan: Open,
    bar: &ProgressBar,
) -> Result<Load, BenchError> {
    const IDLE_CONNECTIONS: usize = 8;
    let sender = Sender::new(board, target);
    let (from, received_before) = (board.border(), board.received());
    let pool = Arc::new(Mutex::new(Vec::new()));
    for _ in 0..IDLE_CONNECTIONS {
        let connection = Connection::open(&target.address, target.key.as_deref()).await?;
        pool.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
    }
    let (due_sender, mut due) = tokio::sync::mpsc::unbounded_channel::<Instant>();
    let pacer = std::thread::spawn(move || {
        let start = Instant::now() + Duration::from_millis(5);
        for k in 0..plan.jobs {
            let at =
                start + Duration::from_nanos(k.saturating_mul(1_000_000_000) / u64::from(plan.rate.max(1)));
            std::thread::sleep(at.saturating_duration_since(Instant::now()));
            if due_sender.send(at).is_err() {
                return;
            }
        }
    });
    let mut tasks = JoinSet::new();
    let mut tick = tokio::time::interval(PROGRESS_EVERY);
    loop {
        tokio::select! {
            biased;
            at = due.recv() => {
                let Some(at) = at.filter(|_| !sender.hopeless()) else { break };
                tasks.spawn(send_one(Arc::clone(&sender), Arc::clone(&pool), board.open(), board.at_ns(at)));
            }
            Some(_) = tasks.join_next() => {}
            _ = tick.tick() => bar.set_position(board.received() - received_before),
        }
    }
    drop(due);
    while tasks.join_next().await.is_some() {}
    pacer.join().ok();
    sender.drain(from, received_before, plan.patience, bar).await;
    board.backlog.forget_permits(board.backlog.available_permits());
    sender.finish(from..board.border())
}

async fn send_one(sender: Arc<Sender>, pool: Arc<Mutex<Vec<Connection>>>, n: u64, due_ns: u64) {
    let idle = pool.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let opened = match idle {
        Some(connection) => Ok(connection),
        None => Connection::open(&sender.target.address, sender.target.key.as_deref()).await,
    };
    match opened {
        Ok(mut connection) => {
            sender.submit(&mut connection, n, Some(due_ns)).await;
            pool.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        }
        Err(error) => {
            sender.unknown.fetch_add(1, Relaxed);
            let mut trouble = sender.trouble.lock().unwrap_or_else(PoisonError::into_inner);
            trouble.get_or_insert(error.to_string());
        }
    }
}
