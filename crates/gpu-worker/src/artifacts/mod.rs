//! Files of jobs: between the end of a handler and the outcome of its job they become artefacts, and where it is
//! asked for, the job waits until its receiver has them (P3: the attempt keeps its lease meanwhile).
//!
//! The slot is free during all this: the handler is done. A crash here runs the job again, with artefacts of its own;
//! those of the lost attempt stay fetchable until their time is over.

mod ask;
mod comfyui;
mod files;
pub(crate) mod handler_mode;
mod keep;

pub(crate) use ask::Waits;
pub(crate) use files::Outbox;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use ringback_domain::artifact::ConfirmWish;
use ringback_egress::{Client, Limits};
use ringback_service_runtime::RingbackConfig;
use ringback_service_runtime::config::{ArtifactsConfig, ConfirmMode, EndpointConfig, ExecutorConfig};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::executor::{End, JobKey};
use crate::prepare::Prepared;
use crate::shared::Shared;

/// An endpoint whose files wait for receivers fetches no jobs beyond this many times its slots.
const WAITING_PER_SLOT: usize = 4;
const WAITING_MIN: usize = 8;

/// What became of an attempt in the keeper's hands.
pub(crate) enum Kept {
    /// Its files are dealt with: this is its end.
    Ended { key: JobKey, end: End, execution_ms: u64, logs: Bytes },
    /// Its inputs are there: it may start.
    Fetched(Box<Prepared>),
}

/// Whom a receiver of artefacts is told, and how long it is waited for.
#[derive(Clone, Debug)]
pub(crate) struct Platform {
    pub(crate) receiver_url: String,
    /// Longest wait, which jobs may shorten.
    pub(crate) wait_ms: u64,
    /// Only for jobs that ask.
    pub(crate) on_request: bool,
}

/// Turns files of one endpoint's jobs into artefacts.
pub(crate) struct Keeper {
    pub(super) shared: Arc<Shared>,
    pub(super) config: ArtifactsConfig,
    /// Files are taken from here; none where the executor has no folder.
    pub(super) outbox: Option<Outbox>,
    pub(super) platform: Option<Platform>,
    pub(super) endpoint: String,
    /// Dials what jobs name.
    pub(super) egress: Option<Client>,
    slots: usize,
    /// Drain is over: nobody is waited for any more.
    pub(super) cut: CancellationToken,
    running: Mutex<HashMap<JobKey, Running>>,
    done: mpsc::UnboundedSender<Kept>,
}

struct Running {
    stop: CancellationToken,
    fetching: bool,
}

/// An attempt whose handler is done.
pub(crate) struct Work {
    pub(crate) key: JobKey,
    pub(crate) output: Bytes,
    /// The client's input, where the template needs it.
    pub(crate) input: Bytes,
    /// What the job says about the confirmation.
    pub(crate) confirm: Option<ConfirmWish>,
    pub(crate) execution_ms: u64,
    pub(crate) logs: Bytes,
    pub(crate) started_at_ms: i64,
    /// When the tracker would end the job itself.
    pub(crate) limit: Instant,
}

/// A keeper, and what it tells.
pub(crate) type WithNews = (Arc<Keeper>, mpsc::UnboundedReceiver<Kept>);

/// Why a keeper cannot be made.
pub(crate) type BuildError = String;

impl Keeper {
    /// A keeper for an endpoint that makes artefacts, and what it tells.
    pub(crate) fn new(
        config: &RingbackConfig,
        endpoint: &EndpointConfig,
        shared: &Arc<Shared>,
        outbox: Option<Outbox>,
    ) -> Result<Option<WithNews>, BuildError> {
        if !endpoint.artifacts.is_on() {
            return Ok(None);
        }
        let env = match &endpoint.executor {
            Some(ExecutorConfig::Process(process)) => process.env.clone(),
            _ => std::collections::BTreeMap::new(),
        };
        let platform = endpoint.confirm.mode.filter(|mode| mode.is_platform()).map(|mode| Platform {
            receiver_url: endpoint.confirm.receiver(&env).unwrap_or_default(),
            wait_ms: endpoint.confirm.wait_ms(&env),
            on_request: mode == ConfirmMode::OnRequest,
        });
        let egress = if endpoint.artifacts.comfyui {
            let policy =
                ringback_egress::webhook_policy(&config.webhooks).map_err(|error| error.to_string())?;
            Some(Client::new(policy, Limits::default()).map_err(|error| error.to_string())?)
        } else {
            None
        };
        let (done, kept) = mpsc::unbounded_channel();
        let keeper = Self {
            shared: Arc::clone(shared),
            config: endpoint.artifacts.clone(),
            outbox,
            platform,
            endpoint: endpoint.name.clone(),
            egress,
            slots: usize::try_from(endpoint.slots()).unwrap_or(usize::MAX),
            cut: CancellationToken::new(),
            running: Mutex::default(),
            done,
        };
        Ok(Some((Arc::new(keeper), kept)))
    }

    fn running(&self) -> MutexGuard<'_, HashMap<JobKey, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attempts in its hands.
    pub(crate) fn busy(&self) -> usize {
        self.running().len()
    }

    /// Attempts whose inputs are being fetched: each has a slot to come.
    pub(crate) fn fetching(&self) -> usize {
        self.running().values().filter(|r| r.fetching).count()
    }

    /// Whether more jobs may be fetched.
    pub(crate) fn has_room(&self) -> bool {
        self.busy() < self.slots.saturating_mul(WAITING_PER_SLOT).max(WAITING_MIN)
    }

    /// Whether jobs name files that must be there before they start.
    pub(crate) fn fetches_inputs(&self) -> bool {
        self.config.comfyui
    }

    /// Whom the receiver of this job's files is told by, and how long is waited for it in ms; none: nobody waits.
    pub(super) fn confirmation_of(&self, work: &Work) -> Option<(&Platform, u64)> {
        let platform = self.platform.as_ref()?;
        let wait_ms = ConfirmWish::wait_ms(work.confirm, platform.on_request, platform.wait_ms)?;
        Some((platform, wait_ms))
    }

    /// Takes over an attempt that succeeded.
    pub(crate) fn keep(self: &Arc<Self>, work: Work) {
        let (this, stop) = (Arc::clone(self), self.register(work.key, false));
        tokio::spawn(async move {
            let (key, execution_ms, logs) = (work.key, work.execution_ms, work.logs.clone());
            let end = tokio::select! {
                end = keep::run(&this, work) => end,
                () = stop.cancelled() => End::Stopped,
            };
            this.end(Kept::Ended { key, end, execution_ms, logs }, &key);
        });
    }

    /// Fetches what a job names, then hands it back to be started.
    pub(crate) fn fetch(self: &Arc<Self>, prepared: Prepared) {
        let key = prepared.work.key;
        let (this, stop) = (Arc::clone(self), self.register(key, true));
        tokio::spawn(async move {
            let fetched = tokio::select! {
                fetched = comfyui::fetch_inputs(&this, &prepared.work.input) => fetched,
                () = stop.cancelled() => {
                    let end = if this.cut.is_cancelled() {
                        End::HandBack { reason: "the worker is shutting down" }
                    } else {
                        End::Stopped
                    };
                    return this.end(Kept::Ended { key, end, execution_ms: 0, logs: Bytes::new() }, &key);
                }
            };
            let kept = match fetched {
                Ok(()) => Kept::Fetched(Box::new(Prepared { inputs_fetched: true, ..prepared })),
                Err(error) => {
                    let end = End::Failure { error, error_type: "DownloadFailed".to_owned(), output: None };
                    Kept::Ended { key, end, execution_ms: 0, logs: Bytes::new() }
                }
            };
            this.end(kept, &key);
        });
    }

    fn register(&self, key: JobKey, fetching: bool) -> CancellationToken {
        let stop = CancellationToken::new();
        self.running().insert(key, Running { stop: stop.clone(), fetching });
        stop
    }

    fn end(&self, kept: Kept, key: &JobKey) {
        // Told before it is forgotten: whoever sees nothing in its hands has everything in the channel.
        let _ = self.done.send(kept);
        self.running().remove(key);
    }

    /// Stops an attempt in its hands; its end follows. False: it is not here.
    pub(crate) fn stop(&self, key: &JobKey) -> bool {
        let running = self.running();
        running.get(key).map(|r| r.stop.cancel()).is_some()
    }

    /// The time of the drain is over: jobs end without their receivers' word, fetches are given up.
    pub(crate) fn cut_short(&self) {
        self.cut.cancel();
        for one in self.running().values().filter(|r| r.fetching) {
            one.stop.cancel();
        }
    }

    /// Gives up what is still being stored: it is handed back, and runs again elsewhere.
    pub(crate) fn stop_all(&self) -> Vec<JobKey> {
        self.running()
            .iter()
            .map(|(key, one)| {
                one.stop.cancel();
                *key
            })
            .collect()
    }
}
