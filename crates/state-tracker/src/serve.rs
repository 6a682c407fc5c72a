//! The requests of workers, clients and the reconciler, each answered after its commit.

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use prost::Message as _;
use ringback_bus::{Bus, BusError, Request, Verb};
use ringback_contracts::{ContractError, endpoint_names_of, read_version, v1};
use ringback_domain::Nonce;
use ringback_service_runtime::{Shutdown, config::EndpointConfig};
use ringback_store::{
    Store, Urgency,
    endpoints::{self, EndpointRow},
    quarantine,
    workers::{live_jobs_of, upsert_workers},
};
use tokio_util::task::TaskTracker;
use v1::Verdict;

use crate::{
    artifacts::{Artifacts, Silent},
    batcher::{Batcher, FoldError},
    commands::Commands,
    convert,
    fold::stop_order,
    unit::{Answer, Unit, What},
};

/// Distinct unreadable payloads remembered, so that a sender that repeats one does not fill the quarantine.
const UNREADABLE_MAX: usize = 1_024;

/// Answers requests.
pub(crate) struct Server {
    pub(crate) bus: Bus,
    pub(crate) store: Store,
    pub(crate) batcher: Batcher,
    pub(crate) commands: Commands,
    pub(crate) artifacts: Artifacts,
    pub(crate) lease_ms: u64,
    pub(crate) concurrency: usize,
    unreadable: Mutex<HashSet<u64>>,
}

/// Why a request gets no answer: its sender repeats it.
#[derive(Debug, thiserror::Error)]
enum Silence {
    #[error(transparent)]
    Fold(#[from] FoldError),
    #[error(transparent)]
    Unreadable(#[from] ContractError),
}

impl From<prost::DecodeError> for Silence {
    fn from(error: prost::DecodeError) -> Self {
        Self::Unreadable(error.into())
    }
}

impl Server {
    pub(crate) fn new(
        bus: Bus,
        store: Store,
        batcher: Batcher,
        commands: Commands,
        artifacts: Artifacts,
        lease_ms: u64,
        concurrency: usize,
    ) -> Self {
        Self { bus, store, batcher, commands, artifacts, lease_ms, concurrency, unreadable: Mutex::default() }
    }

    /// Serves one verb until the shutdown; what has arrived by then is still answered.
    pub(crate) async fn serve(
        self: Arc<Self>,
        verb: Verb,
        shutdown: Shutdown,
        tasks: TaskTracker,
    ) -> Result<(), BusError> {
        let mut requests = self.bus.serve(verb, self.concurrency).await?;
        let mut draining = false;
        loop {
            let request = tokio::select! {
                biased;
                () = shutdown.triggered(), if !draining => {
                    draining = true;
                    requests.drain().await?;
                    continue;
                }
                request = requests.next() => request,
            };
            let Some(request) = request else { return Ok(()) };
            let this = Arc::clone(&self);
            tasks.spawn(async move { this.answer(verb, request).await });
        }
    }

    async fn answer(&self, verb: Verb, request: Request) {
        let began = std::time::Instant::now();
        let payload = request.payload.clone();
        let answered = match verb {
            Verb::Outcomes => self.outcomes(payload.clone()).await,
            Verb::Beat => self.beat(payload.clone()).await,
            Verb::Grant => self.grant(payload.clone()).await,
            Verb::Chunks => self.chunks(payload.clone()).await,
            Verb::Command => self.command(payload.clone()).await,
            Verb::Artifacts => self.artifacts(payload.clone()).await,
            Verb::Endpoints => self.endpoints(payload.clone()).await,
        };
        let label = verb.token();
        metrics::histogram!("ringback_tracker_request_seconds", "verb" => label).record(began.elapsed());
        match answered {
            Ok(reply) => {
                metrics::counter!("ringback_tracker_requests_total", "verb" => label, "answer" => "yes")
                    .increment(1);
                if let Err(error) = request.respond(reply).await {
                    tracing::debug!(%error, verb = label, "an answer was not sent; its sender repeats the request");
                }
            }
            Err(why) => {
                metrics::counter!("ringback_tracker_requests_total", "verb" => label, "answer" => "no")
                    .increment(1);
                tracing::warn!(verb = label, error = %why, "a request gets no answer; its sender repeats it");
                if let Silence::Unreadable(error) = why {
                    self.keep_unreadable(label, &error, &payload).await;
                }
            }
        }
    }

    /// Keeps an unreadable payload for people, once.
    async fn keep_unreadable(&self, kind: &'static str, error: &ContractError, payload: &Bytes) {
        let mut hasher = DefaultHasher::new();
        payload.hash(&mut hasher);
        {
            let mut known = self.unreadable.lock().unwrap_or_else(PoisonError::into_inner);
            if known.len() >= UNREADABLE_MAX || !known.insert(hasher.finish()) {
                return;
            }
        }
        metrics::counter!("ringback_tracker_quarantined_total", "kind" => kind).increment(1);
        let (text, payload) = (error.to_string(), payload.clone());
        let kept = self
            .store
            .write(Urgency::Lazy, move |tx| {
                let (text, payload) = (text.clone(), payload.clone());
                Box::pin(async move { quarantine::insert(tx, kind, &text, &payload).await })
            })
            .await;
        if let Err(error) = kept {
            tracing::warn!(%error, "an unreadable request was not kept");
        }
    }

    async fn outcomes(&self, payload: Bytes) -> Result<Bytes, Silence> {
        let batch = v1::OutcomeBatch::decode(payload)?;
        read_version(batch.version)?;
        let worker = convert::worker_of(&batch.worker_id)?;
        let read = batch.outcomes.into_iter().map(|o| convert::outcome_of(&worker, o));
        let verdicts = self.verdicts(read).await?;
        Ok(v1::OutcomeReply { verdicts }.encode_to_vec().into())
    }

    async fn chunks(&self, payload: Bytes) -> Result<Bytes, Silence> {
        let batch = v1::ChunkBatch::decode(payload)?;
        read_version(batch.version)?;
        let worker = convert::worker_of(&batch.worker_id)?;
        let read = batch.chunks.into_iter().map(|c| convert::chunk_of(&worker, c));
        let verdicts = self.verdicts(read).await?;
        Ok(v1::ChunkReply { verdicts }.encode_to_vec().into())
    }

    /// One verdict per item: a malformed one is put aside alone, and all wait again where SQL is away.
    async fn verdicts(
        &self,
        read: impl Iterator<Item = Result<Unit, ContractError>>,
    ) -> Result<Vec<i32>, Silence> {
        let mut verdicts = Vec::new();
        let mut units = Vec::new();
        for item in read {
            match item {
                Ok(unit) => {
                    verdicts.push(None);
                    units.push(unit);
                }
                Err(error) => {
                    tracing::error!(%error, "a malformed item is refused");
                    metrics::counter!("ringback_tracker_quarantined_total", "kind" => "item").increment(1);
                    verdicts.push(Some(Verdict::Quarantined));
                }
            }
        }
        let mut answers = match self.batcher.submit(units).await {
            Ok(answers) => answers.into_iter(),
            Err(FoldError::Unavailable(error)) => {
                tracing::warn!(%error, "outcomes wait: nothing can be committed now");
                Vec::new().into_iter()
            }
            Err(unknown @ FoldError::Unknown) => return Err(unknown.into()),
        };
        Ok(verdicts
            .into_iter()
            .map(|known| {
                known.unwrap_or_else(|| match answers.next() {
                    Some(Answer::Verdict(verdict)) => verdict,
                    Some(Answer::Quarantined) => Verdict::Quarantined,
                    Some(_) | None => Verdict::Retry,
                })
            })
            .map(i32::from)
            .collect())
    }

    async fn beat(&self, payload: Bytes) -> Result<Bytes, Silence> {
        let beat = v1::Heartbeat::decode(payload)?;
        read_version(beat.version)?;
        let worker = convert::worker_of(&beat.worker_id)?;
        let mut units = Vec::with_capacity(beat.attempts.len());
        for attempt in &beat.attempts {
            match convert::beat_of(&worker, attempt) {
                Ok(unit) => units.push(unit),
                Err(error) => {
                    tracing::error!(%error, %worker, "a malformed attempt in a heartbeat is ignored")
                }
            }
        }
        let listed = units.len();
        if !beat.replaces.is_empty() {
            units.extend(self.gone(&beat).await?);
        }
        if beat.full {
            self.note_worker(&beat);
        }
        let asked: Vec<_> = units
            .iter()
            .take(listed)
            .filter_map(|u| if let What::Beat(b) = &u.what { Some((u.job, b.attempt)) } else { None })
            .collect();
        let answers = self.batcher.submit(units).await?;
        let stop = asked
            .iter()
            .zip(&answers)
            .filter_map(|((job, attempt), answer)| match answer {
                Answer::Stop(Some(reason)) => Some(stop_order(*job, attempt, reason)),
                _ => None,
            })
            .collect();
        Ok(v1::HeartbeatReply { stop, lease_ms: self.lease_ms }.encode_to_vec().into())
    }

    /// The attempts of workers that this one replaces and that it does not list: their holders are gone.
    async fn gone(&self, beat: &v1::Heartbeat) -> Result<Vec<Unit>, Silence> {
        let jobs = live_jobs_of(self.store.read(), &beat.replaces).await.map_err(FoldError::from)?;
        if jobs.is_empty() {
            return Ok(Vec::new());
        }
        let workers: Arc<[String]> = beat.replaces.clone().into();
        let kept = Arc::new(convert::listed(beat));
        let gone = |job| {
            let what = What::WorkersGone { workers: Arc::clone(&workers), kept: Arc::clone(&kept) };
            Unit { job, what }
        };
        Ok(jobs.into_iter().map(gone).collect())
    }

    /// Writes down that a worker lives, with somebody else's transaction. For lists only: leases are in the jobs.
    fn note_worker(&self, beat: &v1::Heartbeat) {
        let (store, row) = (self.store.clone(), convert::worker_beat(beat));
        tokio::spawn(async move {
            let noted = store
                .write(Urgency::Lazy, move |tx| {
                    let row = row.clone();
                    Box::pin(async move { upsert_workers(tx, &[row]).await })
                })
                .await;
            if let Err(error) = noted {
                tracing::debug!(%error, "a worker's row was not written");
            }
        });
    }

    async fn grant(&self, payload: Bytes) -> Result<Bytes, Silence> {
        let request = v1::GrantRequest::decode(payload)?;
        read_version(request.version)?;
        let unit = convert::ask_of(&request, Nonce(rand::random()))?;
        let answer = match self.batcher.submit_one(unit).await? {
            Answer::Grant(answer) => answer,
            _ => v1::grant_reply::Answer::Wait(v1::grant_reply::Wait { retry_after_ms: 1_000 }),
        };
        Ok(v1::GrantReply { answer: Some(answer) }.encode_to_vec().into())
    }

    async fn artifacts(&self, payload: Bytes) -> Result<Bytes, Silence> {
        let request = v1::ArtifactRequest::decode(payload)?;
        read_version(request.version)?;
        match self.artifacts.run(request).await {
            Ok(reply) => Ok(reply.encode_to_vec().into()),
            Err(Silent::Fold(error)) => Err(error.into()),
            Err(Silent::Unreadable(error)) => Err(error.into()),
        }
    }

    /// Tells a worker the keys of its endpoints. Only what it names: a worker of one pool learns nothing of others.
    async fn endpoints(&self, payload: Bytes) -> Result<Bytes, Silence> {
        let wanted = endpoint_names_of(&v1::EndpointsRequest::decode(payload)?)?;
        let rows = endpoints::list(self.store.read()).await.map_err(FoldError::from)?;
        let is_wanted = |row: &EndpointRow| {
            wanted
                .iter()
                .any(|(project, name)| project.as_str() == row.project_name && name.as_str() == row.name)
        };
        let endpoints = rows
            .into_iter()
            .filter(is_wanted)
            .map(|row| v1::EndpointKey {
                config_revision: EndpointConfig::revision(&row.config),
                project: row.project_name,
                name: row.name,
                id: row.id.0,
            })
            .collect();
        let shards = u32::from(self.store.facts().shards);
        Ok(v1::EndpointsReply { shards, endpoints }.encode_to_vec().into())
    }

    async fn command(&self, payload: Bytes) -> Result<Bytes, Silence> {
        let command = v1::Command::decode(payload)?;
        read_version(command.version)?;
        match self.commands.run(command).await {
            Some(reply) => Ok(reply.encode_to_vec().into()),
            None => Err(FoldError::Unknown.into()),
        }
    }
}
