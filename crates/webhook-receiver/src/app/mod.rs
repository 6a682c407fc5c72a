//! A ready receiver: all routes, the work behind them, and an orderly end.

mod files;
mod routes;
mod track;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ringback_domain::webhook::url::UrlPolicy;
use ringback_egress::{BuildError, Client, Limits};
use ringback_service_runtime::listener::{self, Limits as ListenerLimits};
use ringback_service_runtime::time::now_ms;
use ringback_service_runtime::{Redacted, Shutdown};
use tokio::net::TcpListener;

use crate::fetch::{DEFAULT_DOWNLOAD_TIME, DEFAULT_MAX_FILE_BYTES, Fetcher};
use crate::folder::{Folder, FolderError};
use crate::intake::Intake;
use crate::observe::Observer;
use crate::poll::{StatusPoll, StatusUrl};
use crate::router::Router;
use crate::save::Saver;
use crate::store::{Journal, SqliteJournal, StoreError};
use crate::tracker::{Tracker, Waits};
use crate::verify::Trust;
use crate::worker::Worker;

/// Where files are served unless told otherwise.
pub const DEFAULT_PUBLIC_PREFIX: &str = "/audio-outputs";
/// How long settled events are remembered unless told otherwise.
pub const DEFAULT_RETENTION: Duration = Duration::from_secs(30 * 24 * 3600);
/// Time between two looks for what may be forgotten.
const FORGET_EVERY: Duration = Duration::from_secs(3600);
/// Time for open requests and begun work beyond the longest download.
const DRAIN_EXTRA: Duration = Duration::from_secs(15);

/// How to receive.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Where files go.
    pub dir: PathBuf,
    /// Who is trusted.
    pub trust: Trust,
    /// What may be dialled: downloads, confirmations, copies.
    pub urls: UrlPolicy,
    /// Path below which saved files are served.
    pub public_prefix: String,
    /// Put before that path in answers; empty for a path alone.
    pub public_url: String,
    /// Time for one download.
    pub download_time: Duration,
    /// Largest file.
    pub max_file_bytes: u64,
    /// Events worked off at the same time.
    pub at_once: usize,
    /// How long settled events are remembered.
    pub retention: Duration,
    /// Jobs whose webhook does not come are polled, where this is set (row C1).
    pub tracking: Option<Tracking>,
    /// What a client may cost.
    pub listener: ListenerLimits,
}

/// How jobs are polled whose webhook does not come.
#[derive(Debug, Clone)]
pub struct Tracking {
    /// Where their status is asked for.
    pub url: StatusUrl,
    /// What may be dialled for it.
    pub urls: UrlPolicy,
    /// The provider's key. Whoever has it may name jobs to track.
    pub key: Redacted<String>,
    /// When they are polled.
    pub waits: Waits,
}

impl Config {
    /// The usual limits; public https only is dialled.
    #[must_use]
    pub fn new(listen: SocketAddr, dir: PathBuf, trust: Trust) -> Self {
        Self {
            listen,
            dir,
            trust,
            urls: UrlPolicy::default(),
            public_prefix: DEFAULT_PUBLIC_PREFIX.to_owned(),
            public_url: String::new(),
            download_time: DEFAULT_DOWNLOAD_TIME,
            max_file_bytes: DEFAULT_MAX_FILE_BYTES,
            at_once: 16,
            retention: DEFAULT_RETENTION,
            tracking: None,
            listener: ListenerLimits::default(),
        }
    }
}

/// Addresses that take webhooks, with what they are for.
pub const ROUTES: [(&str, &str); 6] = [
    ("/webhooks", "everything, routed by what the body says"),
    ("/webhooks/{family}", "one family, for example /webhooks/batch"),
    ("/v1/webhooks/{event_type}", "one type, for example /v1/webhooks/batch.completed"),
    ("/api/tts/callback", "RunPod's callbacks, always acknowledged"),
    ("/artifacts", "files that wait to be fetched"),
    ("/", "as /webhooks"),
];

/// The receiver cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The address cannot be bound.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The public prefix is no plain path.
    #[error(
        "the public prefix {0:?} must begin with / and have only letters, digits, - and _ between slashes"
    )]
    Prefix(String),
    /// The folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The HTTP client.
    #[error(transparent)]
    Client(#[from] BuildError),
}

/// A receiver, bound and not yet serving.
#[derive(Debug)]
pub struct App {
    listener: TcpListener,
    local_addr: SocketAddr,
    state: Arc<State>,
    worker: Worker,
    /// How long an orderly end may take.
    grace: Duration,
    retention: Duration,
    limits: ListenerLimits,
}

/// What the routes share.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) trust: Arc<Trust>,
    pub(crate) intake: Intake,
    pub(crate) router: Router,
    pub(crate) folder: Arc<Folder>,
    pub(crate) observer: Observer,
    pub(crate) public_prefix: String,
    pub(crate) public_url: String,
    /// How long the sender of a file notice waits for its answer at most.
    pub(crate) answer_within: Duration,
    pub(crate) tracked: Option<Tracked>,
}

/// Jobs whose webhooks are awaited.
#[derive(Debug)]
pub(crate) struct Tracked {
    pub(crate) tracker: Tracker,
    pub(crate) key: Redacted<String>,
    pub(crate) needs_endpoint: bool,
}

impl App {
    /// Opens folder and store and binds the address. `router` may have handlers of one's own; those that save files
    /// are added unless their patterns are taken. Needs a TLS provider installed in the process.
    ///
    /// # Errors
    /// [`AppError`].
    pub async fn build(config: Config, router: Router, observer: Observer) -> Result<Self, AppError> {
        check_prefix(&config.public_prefix)?;
        let folder = Arc::new(Folder::open(&config.dir)?);
        let journal: Arc<dyn Journal> = Arc::new(SqliteJournal::open(&folder.store_path()).await?);
        let client = Client::new(config.urls.clone(), Limits::default())?;
        let fetcher = Fetcher::new(Arc::clone(&folder), client, config.download_time, config.max_file_bytes);
        let router = Saver::new(fetcher, Arc::clone(&journal), observer.clone()).register(router);
        let intake = Intake::new(journal, router.metrics(), observer.clone());
        let listen = |source| AppError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(listen)?;
        let local_addr = listener.local_addr().map_err(listen)?;
        let max_body_bytes = config.trust.max_body_bytes as u64;
        let tracked = config.tracking.map(|tracking| {
            let Tracking { url, urls, key, waits } = tracking;
            let needs_endpoint = url.needs_endpoint();
            let poll = StatusPoll::new(url, key.clone(), urls, max_body_bytes)?;
            let tracker = Tracker::new(intake.clone(), Arc::new(poll), waits);
            Ok::<_, BuildError>(Tracked { tracker, key, needs_endpoint })
        });
        let tracked = tracked.transpose()?;
        let worker = Worker::new(intake.clone(), router.clone(), observer.clone(), config.at_once);
        let state = Arc::new(State {
            trust: Arc::new(config.trust),
            intake,
            router,
            folder,
            observer,
            public_prefix: config.public_prefix,
            // A download and a confirmation.
            answer_within: config.download_time + Limits::default().deadline,
            public_url: config.public_url.trim_end_matches('/').to_owned(),
            tracked,
        });
        let grace = config.download_time + Limits::default().deadline + DRAIN_EXTRA;
        let (retention, limits) = (config.retention, config.listener);
        Ok(Self { listener, local_addr, state, worker, grace, retention, limits })
    }

    /// The address bound.
    #[must_use]
    pub const fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// The way in, for a [`crate::Tracker`] beside the routes.
    #[must_use]
    pub fn intake(&self) -> &Intake {
        &self.state.intake
    }

    /// Serves until the shutdown is triggered; then no more is taken, and what was begun is finished (row B4): open
    /// requests first, for they wait for downloads, then the work behind them.
    pub async fn run(self, shutdown: Shutdown) {
        let end_work = Shutdown::new();
        let work = tokio::spawn(self.worker.run(end_work.clone()));
        let forget =
            tokio::spawn(forget(Arc::clone(self.state.intake.journal()), self.retention, shutdown.clone()));
        let tracker = self.state.tracked.as_ref().map(|tracked| tracked.tracker.clone());
        let polls = tracker.map(|tracker| tokio::spawn(tracker.run(shutdown.clone())));
        let router = routes::router(self.state);
        let serve = listener::serve(self.listener, router, self.limits, shutdown.triggered());
        let served = shutdown.drain(serve, self.grace).await;
        end_work.trigger();
        if tokio::time::timeout(self.grace, work).await.is_err() {
            tracing::warn!("work that was begun is broken off; it is done again at the next start");
        }
        shutdown.trigger();
        let _ = forget.await;
        if let Some(polls) = polls {
            // A poll that is broken off is made again at the next start.
            polls.abort();
            let _ = polls.await;
        }
        if let Err(late) = served {
            tracing::warn!(%late, "open requests are broken off");
        }
    }
}

fn check_prefix(prefix: &str) -> Result<(), AppError> {
    let plain = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    let ours = ["/webhooks", "/v1", "/api", "/received", "/health", "/artifacts", "/track"];
    let first = prefix.get(1..).and_then(|rest| rest.split('/').next()).unwrap_or_default();
    let taken = ours.iter().any(|path| path[1..] == *first);
    if prefix.starts_with('/') && prefix[1..].split('/').all(plain) && !taken {
        Ok(())
    } else {
        Err(AppError::Prefix(prefix.to_owned()))
    }
}

async fn forget(journal: Arc<dyn Journal>, retention: Duration, shutdown: Shutdown) {
    loop {
        let before = now_ms().saturating_sub(i64::try_from(retention.as_millis()).unwrap_or(i64::MAX));
        if let Err(error) = journal.forget(before).await {
            tracing::warn!(%error, "old events cannot be forgotten");
        }
        tokio::select! {
            () = tokio::time::sleep(FORGET_EVERY) => {}
            () = shutdown.triggered() => return,
        }
    }
}
