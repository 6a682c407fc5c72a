//! The worker as a service.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ringback_bus::{Bus, BusError, Lane, PullSource, PullerSettings, Subjects};
use ringback_contracts::{Message as _, v1};
use ringback_domain::EndpointId;
use ringback_service_runtime::blobs::BlobStore;
use ringback_service_runtime::config::{
    Builtin, EncoderConfig, EndpointConfig, ExecutorConfig, ProcessConfig,
};
use ringback_service_runtime::config::{ConfirmMode, RECEIVER_VARIABLE, TIMEOUT_VARIABLE};
use ringback_service_runtime::{Readiness, RingbackConfig, Shutdown};
use ringback_worker_protocol::Hub;
use rustix::fs::{FlockOperation, flock};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::artifacts::handler_mode::Handshakes;
use crate::artifacts::{Keeper, Kept, Outbox};
use crate::attempts::Attempts;
use crate::chunks;
use crate::device::{Device, DeviceChoice, DeviceError};
use crate::endpoint::{EndpointLoop, Executor};
use crate::executor::encoder::{Encoder, LoadFailed};
use crate::executor::process::{ProcessPool, ProcessSettings, wait_for_old_children};
use crate::executor::sleep::Sleep;
use crate::executor::tasks::TaskPool;
use crate::executor::{ExecEvent, JobKey};
use crate::fatal::Fatal;
use crate::heartbeat::{self, Heartbeats};
use crate::listen;
use crate::message::Streams;
use crate::outcome::{Finished, OutcomeSettings, Outcomes};
use crate::shared::{EndpointLink, Settings, Shared};
use crate::spool::{Replayed, Spool, SpoolError, SpoolWriter};

/// How long a start waits for the handlers of an earlier life.
const OLD_CHILDREN_LIMIT: Duration = Duration::from_secs(30);
/// How long a drained worker waits for its last outcomes; then they stay in the spool.
const LAST_OUTCOMES: Duration = Duration::from_secs(10);
/// Interval of the SDK's pings.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// The longest name that leaves room for the random part in 64 characters.
const NAME_CHARS: usize = 40;

/// Why a worker cannot start.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// `worker.device`.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// An endpoint without an executor that this worker has.
    #[error("endpoint {name} has no executor that this worker can run")]
    Executor {
        /// Its name.
        name: String,
    },
    /// The spool.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// Another process owns the spool.
    #[error("the spool {path} is in use by another worker; give each worker its own data.dir")]
    SpoolInUse {
        /// The folder.
        path: PathBuf,
    },
    /// A file or socket of the worker.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Handlers of an earlier life do not end.
    #[error("handlers of an earlier worker are still alive: {0}; end them first")]
    OldChildren(String),
    /// Artefacts of an endpoint.
    #[error("endpoint {name}: {reason}")]
    Artifacts {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A built-in encoder cannot start.
    #[error("endpoint {name}: {source}")]
    Encoder {
        /// Its name.
        name: String,
        /// What is wrong.
        source: Box<LoadFailed>,
    },
    /// An engine is ruined for the whole process. Its jobs were handed back.
    #[error("this process cannot go on: {0}")]
    Ruined(String),
    /// NATS.
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// An endpoint that this worker serves.
#[derive(Clone, Debug)]
pub struct ServedEndpoint {
    /// Its key in SQL, the token in subjects.
    pub id: EndpointId,
    /// Its configuration.
    pub config: EndpointConfig,
}

/// What a worker is given.
#[derive(Debug)]
pub struct WorkerParts {
    /// The connection to NATS.
    pub bus: Bus,
    /// Large payloads.
    pub blobs: BlobStore,
    /// Where its checks go: `worker`, and `worker:<endpoint>` for each endpoint.
    pub readiness: Readiness,
    /// The endpoints to serve, those of the configuration that `worker.endpoints` names.
    pub endpoints: Vec<ServedEndpoint>,
    /// Number of shards of the work queue.
    pub shards: u32,
    /// Program that acts as the guard of handlers, see [`crate::guard`]. Unset: the running program.
    pub guard: Option<PathBuf>,
}

/// A worker, ready to run.
#[derive(Debug)]
pub struct App {
    config: RingbackConfig,
    parts: WorkerParts,
    device: DeviceChoice,
    guard: PathBuf,
}

impl App {
    /// Checks the configuration. Nothing is started yet.
    ///
    /// # Errors
    /// [`WorkerError::Device`], [`WorkerError::Executor`], [`WorkerError::Io`].
    pub fn build(config: &RingbackConfig, parts: WorkerParts) -> Result<Self, WorkerError> {
        let device = config.worker.device.parse()?;
        for endpoint in &parts.endpoints {
            match endpoint.config.executor {
                Some(ExecutorConfig::Builtin(Builtin::Encoder(ref encoder))) => {
                    Encoder::check(encoder, device).map_err(encoder_failed(&endpoint.config))?;
                }
                Some(
                    ExecutorConfig::Builtin(Builtin::Echo | Builtin::Sleep) | ExecutorConfig::Process(_),
                ) => {}
                Some(ExecutorConfig::Http(_) | ExecutorConfig::Remote(_)) | None => {
                    return Err(WorkerError::Executor { name: endpoint.config.name.clone() });
                }
            }
        }
        let guard = match &parts.guard {
            Some(program) => program.clone(),
            None => std::env::current_exe().map_err(io("cannot find the running program"))?,
        };
        Ok(Self { config: config.clone(), parts, device, guard })
    }

    /// Runs until the shutdown is triggered and the drain is over. Outcomes that the tracker has not
    /// committed by then stay in the spool and are sent at the next start.
    ///
    /// # Errors
    /// [`WorkerError`] when it cannot start.
    pub async fn run(self, shutdown: Shutdown) -> Result<(), WorkerError> {
        let ready = self.parts.readiness.register("worker");
        let choice = self.device;
        let device = tokio::task::spawn_blocking(move || Device::detect(choice))
            .await
            .map_err(|error| WorkerError::Io { what: "device detection".into(), source: error.into() })??;
        tracing::info!(device = %device.name, "device");
        metrics::gauge!("ringback_worker_device", "device" => device.name.clone()).set(1.0);
        if let Some(gpu) = &device.pci_bus_id {
            tokio::spawn(crate::nvml::watch(gpu.clone(), shutdown.clone()));
        }

        let spool_dir = self.config.data.spool_dir();
        let (_lock, spool, replayed) = open_spool(&spool_dir)?;
        let children_dir = self.config.data.dir.join("children");
        ready.fail("waiting for the handlers of an earlier worker to end");
        let old = wait_for_old_children(&children_dir, OLD_CHILDREN_LIMIT)
            .await
            .map_err(io(format!("cannot read {}", children_dir.display())))?;
        if !old.is_empty() {
            return Err(WorkerError::OldChildren(old.join(", ")));
        }

        let worker_id = worker_id(self.config.worker.name.as_deref());
        let ids_file = spool_dir.join("worker-ids");
        let former = remember_id(&ids_file, &worker_id)?;
        // A ruined engine ends this worker, not the process's other services.
        let stop = shutdown.child();
        let fatal = Fatal::new(stop.clone());
        let ids = Ids { worker_id, file: ids_file, former };
        let running = Running::start(&self, device, ids, spool, replayed, &fatal).await?;
        ready.ok();
        running.until_drained(&ready, stop).await;
        // The last acknowledgements; a lost one costs a redelivery.
        let _ = self.parts.bus.flush().await;
        match fatal.reason() {
            Some(reason) => Err(WorkerError::Ruined(reason.to_owned())),
            None => Ok(()),
        }
    }
}

fn open_spool(folder: &Path) -> Result<(std::fs::File, Spool, Vec<Replayed>), WorkerError> {
    let cannot = || io(format!("cannot use {}", folder.display()));
    std::fs::create_dir_all(folder).map_err(cannot())?;
    let lock = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(folder.join("lock"))
        .map_err(cannot())?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            return Err(WorkerError::SpoolInUse { path: folder.to_owned() });
        }
        Err(errno) => return Err(cannot()(errno.into())),
    }
    let (spool, replayed) = Spool::open(folder)?;
    if !replayed.is_empty() {
        tracing::info!(outcomes = replayed.len(), "outcomes of an earlier worker are sent now");
    }
    Ok((lock, spool, replayed))
}

/// Who this worker is, and was.
struct Ids {
    worker_id: String,
    file: PathBuf,
    former: Vec<String>,
}

/// A started worker.
struct Running {
    shared: Arc<Shared>,
    loops: Vec<EndpointLoop>,
    tasks: JoinSet<()>,
    outcome_task: tokio::task::JoinHandle<()>,
}

impl Running {
    async fn start(
        app: &App,
        device: Device,
        ids: Ids,
        spool: Spool,
        replayed: Vec<Replayed>,
        fatal: &Fatal,
    ) -> Result<Self, WorkerError> {
        let Ids { worker_id, file: ids_file, former } = ids;
        let worker = &app.config.worker;
        let ack_wait = Duration::from_millis(worker.ack_wait_ms);
        let settings = Settings {
            request_timeout: Duration::from_millis(app.config.nats.request_timeout_ms),
            started_report: Duration::from_millis(worker.started_report_ms),
            extend_every: ack_wait / 3,
            ack_wait,
            drain_grace: Duration::from_millis(worker.drain_grace_ms),
        };
        let outcome_settings = OutcomeSettings {
            bus: app.parts.bus.clone(),
            blobs: app.parts.blobs.clone(),
            worker_id: worker_id.clone(),
            request_timeout: settings.request_timeout,
            extend_every: settings.extend_every,
            first_id: spool.next_id(),
        };
        let writer = SpoolWriter::start(spool, worker.spool_max_bytes)?;
        let (outcomes, outcome_task) = Outcomes::start(outcome_settings, writer);
        replay(&outcomes, replayed);

        let (chunk_tx, chunk_rx) = mpsc::unbounded_channel();
        let (report_tx, report_rx) = mpsc::unbounded_channel();
        let shards =
            app.parts.endpoints.iter().map(|endpoint| Subjects::shard_of(endpoint.id, app.parts.shards));
        let streams = Arc::new(Streams::new(app.parts.bus.clone(), shards));
        let (links, stops): (Vec<_>, Vec<_>) = app.parts.endpoints.iter().map(link).unzip();
        let shared = Arc::new(Shared {
            bus: app.parts.bus.clone(),
            blobs: app.parts.blobs.clone(),
            streams: Arc::clone(&streams),
            attempts: Attempts::default(),
            outcomes: outcomes.clone(),
            chunks: chunk_tx,
            reports: report_tx,
            endpoints: links,
            worker_id: worker_id.clone(),
            device: device.name.clone(),
            settings,
            ids_file,
            draining: AtomicBool::new(false),
            artifact_waits: crate::artifacts::Waits::default(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(streams.watch());
        tasks.spawn(chunks::run(
            app.parts.bus.clone(),
            worker_id,
            shared.settings.request_timeout,
            outcomes,
            chunk_rx,
        ));
        tasks.spawn(heartbeat::extend(Arc::clone(&shared)));
        tasks.spawn(heartbeat::hear_stops(Arc::clone(&shared)));
        let every = Duration::from_millis(worker.heartbeat_ms);
        let beats = Heartbeats { shared: Arc::clone(&shared), reports: report_rx, replaces: former, every };
        tasks.spawn(beats.run());
        let loops = start_loops(app, &device, &shared, stops, &mut tasks, fatal).await?;
        Ok(Self { shared, loops, tasks, outcome_task })
    }

    /// Runs the loops to their end, then sends what is left.
    async fn until_drained(mut self, ready: &ringback_service_runtime::Check, shutdown: Shutdown) {
        let mut running = JoinSet::new();
        for one in self.loops.drain(..) {
            running.spawn(one.run(shutdown.clone()));
        }
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        let mut draining = false;
        while !running.is_empty() || (self.shared.endpoints.is_empty() && !draining) {
            tokio::select! {
                Some(ended) = running.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        // The service is restarted as a whole, and with it everything this loop held.
                        std::panic::resume_unwind(error.into_panic());
                    }
                }
                _ = tick.tick() => watch_spool(&self.shared, ready),
                () = shutdown.triggered(), if !draining => {
                    draining = true;
                    self.shared.draining.store(true, Ordering::Relaxed);
                    ready.fail("draining");
                }
            }
        }
        if !self.shared.outcomes.drain(LAST_OUTCOMES).await {
            let left = self.shared.outcomes.pending();
            tracing::warn!(left, "outcomes stay in the spool until the next start");
        }
        // What remains ends with its channels; the spool's thread writes the rest when the actor is gone.
        self.tasks.shutdown().await;
        drop(self.shared);
        let _ = self.outcome_task.await;
    }
}

fn watch_spool(shared: &Shared, ready: &ringback_service_runtime::Check) {
    let spool = shared.outcomes.spool();
    metrics::gauge!("ringback_worker_spool_bytes").set(spool.bytes() as f64);
    metrics::gauge!("ringback_worker_spool_depth").set(spool.depth() as f64);
    metrics::gauge!("ringback_worker_outcomes_pending").set(shared.outcomes.pending() as f64);
    metrics::gauge!("ringback_worker_attempts_live").set(shared.attempts.live() as f64);
    if shared.is_draining() {
        return;
    }
    if spool.is_full() {
        ready.fail(
            "the spool is full or cannot be written: no jobs are fetched until the tracker takes outcomes",
        );
    } else {
        ready.ok();
    }
}

/// Sends what an earlier life left behind.
fn replay(outcomes: &Outcomes, replayed: Vec<Replayed>) {
    for Replayed { id, payload } in replayed {
        match v1::Outcome::decode(payload.as_slice()) {
            Ok(outcome) => outcomes.send(Finished { outcome, message: None, spool_id: Some(id) }),
            // The checksum was right: another release wrote it. It stays for that one.
            Err(error) => {
                tracing::error!(%error, id, "a spooled outcome cannot be read; it stays in the spool")
            }
        }
    }
}

fn link(endpoint: &ServedEndpoint) -> (EndpointLink, mpsc::UnboundedReceiver<JobKey>) {
    let (stops, receiver) = mpsc::unbounded_channel();
    let link = EndpointLink {
        id: endpoint.id,
        stops,
        total: usize::try_from(endpoint.config.slots()).unwrap_or(usize::MAX),
        busy: AtomicUsize::new(0),
        trouble: Mutex::default(),
    };
    (link, receiver)
}

async fn start_loops(
    app: &App,
    device: &Device,
    shared: &Arc<Shared>,
    stops: Vec<mpsc::UnboundedReceiver<JobKey>>,
    tasks: &mut JoinSet<()>,
    fatal: &Fatal,
) -> Result<Vec<EndpointLoop>, WorkerError> {
    let mut hub = None;
    let shared_folders = shared_folders(&app.parts.endpoints)?;
    let mut loops = Vec::new();
    for (index, (endpoint, stops)) in app.parts.endpoints.iter().zip(stops).enumerate() {
        // First of all: it makes the folders that children share.
        let (keeper, kept) = keeper_of(app, endpoint, shared)?;
        if endpoint.config.confirm.mode == Some(ConfirmMode::Handler) {
            serve_handshakes(endpoint, tasks).await?;
        }
        let (events_tx, events) = mpsc::unbounded_channel();
        let slots = usize::try_from(endpoint.config.slots()).unwrap_or(usize::MAX);
        let executor = match &endpoint.config.executor {
            Some(ExecutorConfig::Builtin(Builtin::Echo)) => Executor::Echo { slots },
            Some(ExecutorConfig::Builtin(Builtin::Sleep)) => {
                Executor::Tasks(TaskPool::new(slots, events_tx, Arc::new(Sleep)))
            }
            Some(ExecutorConfig::Builtin(Builtin::Encoder(encoder))) => {
                let engine = load_encoder(app, endpoint, encoder, fatal).await?;
                Executor::Tasks(TaskPool::new(slots, events_tx, Arc::new(engine)))
            }
            Some(ExecutorConfig::Process(process)) => {
                if hub.is_none() {
                    hub = Some(listen::for_children(tasks).await?);
                }
                let (hub, base_url) = hub.as_ref().map(|(hub, url)| (hub.clone(), url.clone())).unzip();
                let settings =
                    process_settings(app, device, endpoint, process, base_url.unwrap_or_default())?;
                let private_folder =
                    shared_folders.get(&settings.folder).is_some_and(|children| *children > 1);
                let settings = ProcessSettings { private_folder, ..settings };
                match hub {
                    Some(hub) => start_pool(settings, hub, events_tx),
                    None => continue,
                }
            }
            Some(ExecutorConfig::Http(_) | ExecutorConfig::Remote(_)) | None => {
                return Err(WorkerError::Executor { name: endpoint.config.name.clone() });
            }
        };
        let shard = Subjects::shard_of(endpoint.id, app.parts.shards);
        let sources = Lane::ALL.map(|lane| PullSource { shard, endpoint: endpoint.id, lane }).to_vec();
        let mut puller = PullerSettings::default();
        puller.consumer.ack_wait = shared.settings.ack_wait;
        loops.push(EndpointLoop {
            index,
            name: endpoint.config.name.clone(),
            shared: Arc::clone(shared),
            executor,
            puller: app.parts.bus.pull_jobs(sources, puller).await?,
            events,
            stops,
            ready: app.parts.readiness.register(format!("worker:{}", endpoint.config.name)),
            credits: 0,
            preparing: 0,
            waiting: std::collections::VecDeque::new(),
            keeper,
            kept,
        });
    }
    Ok(loops)
}

/// Reads the weights and warms the engine up, on a thread that may block.
async fn load_encoder(
    app: &App,
    endpoint: &ServedEndpoint,
    encoder: &EncoderConfig,
    fatal: &Fatal,
) -> Result<Encoder, WorkerError> {
    let (config, encoder, device) = (endpoint.config.clone(), encoder.clone(), app.device);
    let (data_dir, fatal) = (app.config.data.dir.clone(), fatal.clone());
    tokio::task::spawn_blocking(move || {
        Encoder::load(&config, &encoder, device, &data_dir, fatal).map_err(encoder_failed(&config))
    })
    .await
    .map_err(|error| WorkerError::Io { what: "loading a model".into(), source: error.into() })?
}

fn encoder_failed(config: &EndpointConfig) -> impl FnOnce(LoadFailed) -> WorkerError {
    let name = config.name.clone();
    move |source| WorkerError::Encoder { name, source: Box::new(source) }
}

/// Where the files of an endpoint's handlers are, with the folder made.
fn outbox_of(endpoint: &ServedEndpoint) -> Result<Option<Outbox>, WorkerError> {
    let config = &endpoint.config;
    let Some(ExecutorConfig::Process(process)) = &config.executor else { return Ok(None) };
    let outbox = Outbox { cwd: folder_of(process)?, folder: config.artifacts.folder.clone() };
    outbox.prepare().map_err(io(format!("cannot make {}", outbox.cwd.join(&outbox.folder).display())))?;
    Ok(Some(outbox))
}

type KeeperOf = (Option<Arc<Keeper>>, mpsc::UnboundedReceiver<Kept>);

fn keeper_of(app: &App, endpoint: &ServedEndpoint, shared: &Arc<Shared>) -> Result<KeeperOf, WorkerError> {
    if !endpoint.config.artifacts.is_on() {
        return Ok((None, mpsc::unbounded_channel().1));
    }
    let outbox = outbox_of(endpoint)?;
    let made = Keeper::new(&app.config, &endpoint.config, shared, outbox)
        .map_err(|reason| WorkerError::Artifacts { name: endpoint.config.name.clone(), reason })?;
    Ok(made.map_or_else(|| (None, mpsc::unbounded_channel().1), |(keeper, kept)| (Some(keeper), kept)))
}

/// Serves what handlers that tell their receiver themselves expect, one port per child.
async fn serve_handshakes(endpoint: &ServedEndpoint, tasks: &mut JoinSet<()>) -> Result<(), WorkerError> {
    let config = &endpoint.config;
    let (Some(ExecutorConfig::Process(process)), Some(outbox)) = (&config.executor, outbox_of(endpoint)?)
    else {
        return Ok(());
    };
    let handshakes = Handshakes::new(&config.name, outbox);
    for n in 0..children_of(config, process) {
        let mut address = config.confirm.listen;
        let port = u32::from(address.port()) + n;
        address.set_port(u16::try_from(port).map_err(|_| WorkerError::Artifacts {
            name: config.name.clone(),
            reason: format!("confirm.listen: there is no port {port} for another child"),
        })?);
        let what = || io(format!("cannot listen on {address} (confirm.listen of endpoint {})", config.name));
        let listener = tokio::net::TcpListener::bind(address).await.map_err(what())?;
        tracing::info!(endpoint = config.name, %address, "files and confirmations of handlers");
        tasks.spawn(Arc::clone(&handshakes).serve(listener));
    }
    Ok(())
}

/// The operator's variables, and in mode "handler" those of the handshake. In mode "platform" the handler must not
/// tell the receiver a second time.
fn environment_of(config: &EndpointConfig, process: &ProcessConfig) -> BTreeMap<String, String> {
    let mut env = process.env.clone();
    match config.confirm.mode {
        None => {}
        Some(ConfirmMode::Platform | ConfirmMode::OnRequest) => {
            env.remove(RECEIVER_VARIABLE);
            env.remove(TIMEOUT_VARIABLE);
        }
        Some(ConfirmMode::Handler) => {
            let seconds = config.confirm.wait_ms(&process.env).div_ceil(1_000);
            env.extend(config.confirm.receiver(&process.env).map(|url| (RECEIVER_VARIABLE.to_owned(), url)));
            env.insert(TIMEOUT_VARIABLE.to_owned(), seconds.to_string());
        }
    }
    env
}

fn start_pool(settings: ProcessSettings, hub: Hub, events: mpsc::UnboundedSender<ExecEvent>) -> Executor {
    Executor::Process(ProcessPool::start(settings, hub, events))
}

fn folder_of(process: &ProcessConfig) -> Result<PathBuf, WorkerError> {
    match &process.cwd {
        Some(folder) => std::path::absolute(folder).map_err(io(format!("cwd {}", folder.display()))),
        None => std::env::current_dir().map_err(io("the working folder")),
    }
}

/// The most children that an endpoint can have here.
fn children_of(config: &EndpointConfig, process: &ProcessConfig) -> u32 {
    config.slots().div_ceil(process.concurrency.unwrap_or(1).max(1)).max(1)
}

/// How many children would run in each folder.
fn shared_folders(endpoints: &[ServedEndpoint]) -> Result<HashMap<PathBuf, u32>, WorkerError> {
    let mut all = HashMap::new();
    for endpoint in endpoints {
        if let Some(ExecutorConfig::Process(process)) = &endpoint.config.executor {
            *all.entry(folder_of(process)?).or_default() += children_of(&endpoint.config, process);
        }
    }
    Ok(all)
}

fn process_settings(
    app: &App,
    device: &Device,
    endpoint: &ServedEndpoint,
    process: &ProcessConfig,
    base_url: String,
) -> Result<ProcessSettings, WorkerError> {
    let count = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
    let state_dir = app.config.data.dir.join("children");
    Ok(ProcessSettings {
        endpoint: endpoint.config.name.clone(),
        command: process.command.argv(),
        folder: folder_of(process)?,
        private_folder: false,
        env: environment_of(&endpoint.config, process),
        first_port: (endpoint.config.confirm.mode == Some(ConfirmMode::Handler))
            .then(|| endpoint.config.confirm.listen.port()),
        pass_env: process.pass_env.clone(),
        visible_devices: device.visible_devices.clone(),
        device: device.name.clone(),
        slots: count(endpoint.config.slots()),
        concurrency: process.concurrency.map(count),
        stop_grace: Duration::from_millis(process.stop_grace_ms),
        kill_grace: Duration::from_millis(process.grace_ms),
        start_timeout: Duration::from_millis(process.start_timeout_ms),
        nice: i32::from(process.nice),
        pause_idle: process.pause_idle,
        log_max_bytes: usize::try_from(app.config.worker.log_max_bytes).unwrap_or(usize::MAX),
        ping_interval: PING_INTERVAL,
        id_prefix: format!("e{}", endpoint.id),
        // Absolute: the child runs in another folder.
        state_dir: std::path::absolute(&state_dir).map_err(io(format!("{}", state_dir.display())))?,
        guard: app.guard.clone(),
        base_url,
    })
}

/// The configured name, or the host's, with a random part: no two lives share an id.
fn worker_id(name: Option<&str>) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name
        .unwrap_or(host.trim())
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '_' || c == '-' { c } else { '-' })
        .take(NAME_CHARS)
        .collect();
    let name = if name.is_empty() { "worker" } else { name.as_str() };
    format!("{name}-{:08x}", rand::random::<u32>())
}

/// Notes this life's id beside those of earlier lives, which it returns.
fn remember_id(file: &Path, id: &str) -> Result<Vec<String>, WorkerError> {
    let cannot = || io(format!("cannot use {}", file.display()));
    let former: Vec<String> = match std::fs::read_to_string(file) {
        Ok(text) => text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(cannot()(error)),
    };
    let all = former.iter().map(String::as_str).chain([id]).collect::<Vec<_>>().join("\n");
    let part = file.with_extension("part");
    std::fs::write(&part, format!("{all}\n")).and_then(|()| std::fs::rename(&part, file)).map_err(cannot())?;
    Ok(former)
}

pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> WorkerError {
    let what = what.into();
    move |source| WorkerError::Io { what, source }
}
