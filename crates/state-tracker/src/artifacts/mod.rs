//! Artefacts: the requests of workers, of the API and of the reconciler about files, each answered after its commit.
//!
//! An artefact never changes a job. What a worker says is fenced by its attempt; a repeated request finds its rows
//! done and is answered as the first one was.

mod tell;

use std::sync::Arc;

use bytes::Bytes;
use ringback_bus::Bus;
use ringback_contracts::{ContractError, attempt_of, v1};
use ringback_domain::{ArtifactId, AttemptRef, JobId, ProjectId, artifact::ArtifactState};
use ringback_service_runtime::fault;
use ringback_store::{
    Store, StoreError, Urgency, WriteTx,
    artifacts::{self, ArtifactRow, NewArtifact, Stored},
    secrets::SecretKey,
};
use v1::{artifact_refusal::Why, artifact_reply::Reply, artifact_request::Request as R};

use crate::{
    after::Announcer,
    batcher::{Batcher, FoldError},
    convert::worker_of,
    unit::{Beat, Unit, What},
};
use tell::{Heard, Teller};

/// Rows that one request of the reconciler works off.
const DUE_MAX: u32 = 200;

/// Carries out requests about artefacts.
pub(crate) struct Artifacts {
    store: Store,
    bus: Bus,
    batcher: Batcher,
    announcer: Arc<Announcer>,
    teller: Arc<Teller>,
}

/// What one transaction answers, and what follows its commit.
#[derive(Clone, Debug, Default)]
struct Done {
    reply: Option<Reply>,
    deliveries: Vec<v1::Delivery>,
    /// Workers that wait, and the artefacts that they need not wait for any more.
    wake: Vec<(String, ArtifactId)>,
    /// For metrics and logs: what became of which artefact.
    changed: Vec<(ArtifactRow, Heard)>,
}

/// Why a request is not answered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Silent {
    #[error(transparent)]
    Fold(#[from] FoldError),
    #[error(transparent)]
    Unreadable(#[from] ContractError),
}

impl Artifacts {
    pub(crate) fn new(
        store: Store,
        bus: Bus,
        batcher: Batcher,
        announcer: Arc<Announcer>,
        key: SecretKey,
        public_url: String,
    ) -> Self {
        let partitions = store.facts().partitions;
        let teller = Arc::new(Teller { key, public_url, partitions });
        Self { store, bus, batcher, announcer, teller }
    }

    /// Carries out one request.
    pub(crate) async fn run(&self, request: v1::ArtifactRequest) -> Result<v1::ArtifactReply, Silent> {
        let done = match request.request {
            Some(R::Reserve(r)) => self.reserve(r).await,
            Some(R::Ready(r)) => self.ready(r).await,
            Some(R::Look(r)) => self.look(&r.ids).await,
            Some(R::Close(r)) => self.close(&r.ids).await,
            Some(R::Confirm(r)) => self.confirm(r).await,
            Some(R::Remove(r)) => self.remove(r).await,
            Some(R::Due(r)) => self.due(r.limit).await,
            Some(R::BlobsGone(r)) => self.blobs_gone(&r.ids).await,
            None => Ok(refused(Why::Unspecified, "the request is empty or of a later release")),
        };
        let done = match done {
            Ok(done) => done,
            Err(Silent::Fold(FoldError::Unavailable(error))) => {
                tracing::warn!(%error, "a request about artefacts waits: nothing can be committed now");
                refused(Why::Unavailable, "the database is not available now; try again")
            }
            Err(silent) => return Err(silent),
        };
        fault::point("tracker.artifact.after");
        for (row, heard) in &done.changed {
            tell::note(row, *heard);
        }
        for (worker, id) in done.wake {
            let artifacts = vec![Bytes::copy_from_slice(id.as_bytes())];
            let message = v1::StopOrders { stop: Vec::new(), artifacts };
            self.bus.announce_stop(&worker, prost::Message::encode_to_vec(&message).into()).await;
        }
        self.announcer.announce_deliveries(done.deliveries).await;
        Ok(v1::ArtifactReply { reply: done.reply })
    }

    async fn write<F>(&self, f: F) -> Result<Done, Silent>
    where
        F: for<'a> Fn(&'a WriteTx) -> futures::future::BoxFuture<'a, Result<Done, StoreError>>
            + Send
            + Sync
            + 'static,
    {
        fault::point("tracker.artifact.before");
        Ok(self.store.write(Urgency::Now, f).await.map_err(FoldError::from)?)
    }

    /// The attempt may be one that the tracker has not heard of: a first attempt needs no permission, and a short one
    /// is told by its outcome alone. So it is told first, as a heartbeat would.
    async fn reserve(&self, r: v1::ReserveArtifacts) -> Result<Done, Silent> {
        let worker = worker_of(&r.worker_id)?;
        let (job, attempt) = attempt_of(r.attempt.as_ref())?;
        let new = r.artifacts.into_iter().map(new_of).collect::<Result<Vec<_>, _>>()?;
        let what = What::Beat(Beat {
            worker: Arc::clone(&worker),
            attempt,
            started_at: ringback_domain::TimestampMs(r.started_at_ms),
            progress: None,
        });
        self.batcher.submit_one(Unit { job, what }).await?;
        let keep_ms = r.keep_ms;
        self.write(move |tx| {
            let (worker, new) = (Arc::clone(&worker), new.clone());
            Box::pin(async move {
                let Some(fenced) = artifacts::fence(tx, job, &attempt).await? else { return Ok(obsolete()) };
                artifacts::reserve(tx, job, &attempt, &fenced, &worker, keep_ms, &new).await?;
                Ok(states(std::iter::empty()))
            })
        })
        .await
    }

    async fn ready(&self, r: v1::ReadyArtifacts) -> Result<Done, Silent> {
        let (job, attempt) = attempt_of(r.attempt.as_ref())?;
        let stored = r.artifacts.into_iter().map(stored_of).collect::<Result<Vec<_>, _>>()?;
        let confirm = r.confirm.map(|wish| (wish.receiver_url, wish.wait_ms));
        let (keep_ms, teller) = (r.keep_ms, Arc::clone(&self.teller));
        self.write(move |tx| {
            let (stored, confirm, teller) = (stored.clone(), confirm.clone(), Arc::clone(&teller));
            Box::pin(async move {
                make_ready(tx, job, attempt, &stored, keep_ms, confirm.as_ref(), &teller).await
            })
        })
        .await
    }

    async fn look(&self, ids: &[Bytes]) -> Result<Done, Silent> {
        let mut rows = Vec::with_capacity(ids.len());
        for id in ids_of(ids)? {
            rows.extend(
                artifacts::artifact_by_id(self.store.read(), id)
                    .await
                    .map_err(FoldError::from)?
                    .map(|row| (row.id, row.state)),
            );
        }
        Ok(states(rows.into_iter()))
    }

    /// The worker stops waiting. What was confirmed meanwhile stays so: the answer tells.
    async fn close(&self, ids: &[Bytes]) -> Result<Done, Silent> {
        let ids = ids_of(ids)?;
        self.write(move |tx| {
            let ids = ids.clone();
            Box::pin(async move {
                let mut changed = Vec::new();
                let mut rows = artifacts::lock(tx, &ids).await?;
                for row in rows.iter_mut().filter(|row| row.state == ArtifactState::Ready) {
                    artifacts::give_up(tx, row).await?;
                    changed.push((row.clone(), Heard::GivenUp));
                }
                Ok(Done { changed, ..states(rows.iter().map(|row| (row.id, row.state))) })
            })
        })
        .await
    }

    async fn confirm(&self, r: v1::ConfirmArtifact) -> Result<Done, Silent> {
        let id = id_of(&r.id)?;
        let teller = Arc::clone(&self.teller);
        self.write(move |tx| {
            let (told, teller) = (r.sha256.clone(), Arc::clone(&teller));
            Box::pin(async move { confirm(tx, id, &told, &teller).await })
        })
        .await
    }

    async fn remove(&self, r: v1::RemoveArtifact) -> Result<Done, Silent> {
        let (id, project) = (id_of(&r.id)?, ProjectId(r.project_id));
        let teller = Arc::clone(&self.teller);
        self.write(move |tx| {
            let teller = Arc::clone(&teller);
            Box::pin(async move {
                let rows = artifacts::lock(tx, &[id]).await?;
                let Some(mut row) = rows.into_iter().find(|row| row.project == project) else {
                    return Ok(refused(Why::NotFound, "no such artefact"));
                };
                let mut done = Done::default();
                if row.state != ArtifactState::Expired {
                    expire(tx, &mut row, "removed", &teller, &mut done).await?;
                }
                done.reply = states(std::iter::once((row.id, row.state))).reply;
                Ok(done)
            })
        })
        .await
    }

    async fn due(&self, limit: u32) -> Result<Done, Silent> {
        let limit = limit.clamp(1, DUE_MAX);
        let teller = Arc::clone(&self.teller);
        self.write(move |tx| {
            let teller = Arc::clone(&teller);
            Box::pin(async move { work_off(tx, limit, &teller).await })
        })
        .await
    }

    async fn blobs_gone(&self, ids: &[Bytes]) -> Result<Done, Silent> {
        let ids = ids_of(ids)?;
        self.write(move |tx| {
            let ids = ids.clone();
            Box::pin(async move {
                let changed = artifacts::blobs_gone(tx, &ids).await?;
                let changed = u32::try_from(changed).unwrap_or(u32::MAX);
                let states = v1::ArtifactStates { changed, ..v1::ArtifactStates::default() };
                Ok(Done { reply: Some(Reply::States(states)), ..Done::default() })
            })
        })
        .await
    }
}

async fn make_ready(
    tx: &WriteTx,
    job: JobId,
    attempt: AttemptRef,
    stored: &[Stored],
    keep_ms: u64,
    confirm: Option<&(String, u64)>,
    teller: &Teller,
) -> Result<Done, StoreError> {
    if artifacts::fence(tx, job, &attempt).await?.is_none() {
        return Ok(obsolete());
    }
    let ids: Vec<ArtifactId> = stored.iter().map(|s| s.id).collect();
    let mut done = Done::default();
    let mut links = Vec::with_capacity(ids.len());
    for mut row in artifacts::lock(tx, &ids).await? {
        if (row.job, row.run, row.attempt) != (job, attempt.run, attempt.attempt) {
            return Ok(refused(Why::NotFound, "an artefact of another attempt"));
        }
        let Some(now) = stored.iter().find(|s| s.id == row.id) else { continue };
        if row.state == ArtifactState::Uploading {
            artifacts::make_ready(tx, &mut row, now, keep_ms, confirm.map(|(_, wait_ms)| *wait_ms)).await?;
            let receiver = confirm.map(|(url, _)| url.as_str()).filter(|url| !url.is_empty());
            done.deliveries.extend(teller.ready(tx, &row, receiver).await?);
            done.changed.push((row.clone(), Heard::Ready));
        }
        links.push(teller.link(&row));
    }
    if links.len() != stored.len() {
        return Ok(refused(Why::NotFound, "an artefact that was not announced"));
    }
    done.reply = Some(Reply::Links(v1::ArtifactLinks { links }));
    Ok(done)
}

async fn confirm(tx: &WriteTx, id: ArtifactId, told: &[u8], teller: &Teller) -> Result<Done, StoreError> {
    let Some(mut row) = artifacts::lock(tx, &[id]).await?.pop() else {
        return Ok(refused(Why::NotFound, "no such artefact"));
    };
    match row.state {
        ArtifactState::Uploading => return Ok(refused(Why::NotFound, "no such artefact")),
        ArtifactState::Expired => {
            return Ok(refused(Why::Expired, "the artefact's time is over and its bytes are gone"));
        }
        ArtifactState::Ready | ArtifactState::Unconfirmed | ArtifactState::Confirmed => {}
    }
    if !told.is_empty() && told != row.sha256 {
        let hex = ringback_domain::artifact::hex;
        let detail = format!(
            "the file was not received whole: its sha256 is {}, the confirmation says {}; fetch it again",
            hex(&row.sha256),
            hex(told)
        );
        return Ok(refused(Why::OtherBytes, &detail));
    }
    let mut done = Done::default();
    if row.state != ArtifactState::Confirmed {
        artifacts::confirm(tx, &mut row, !told.is_empty()).await?;
        done.deliveries = teller.confirmed(tx, &row).await?;
        done.changed.push((row.clone(), Heard::Confirmed));
    }
    // Also where it was confirmed before: the worker may have missed it.
    done.wake.push((row.worker.clone(), row.id));
    done.reply = states(std::iter::once((row.id, row.state))).reply;
    Ok(done)
}

async fn expire(
    tx: &WriteTx,
    row: &mut ArtifactRow,
    reason: &'static str,
    teller: &Teller,
    done: &mut Done,
) -> Result<(), StoreError> {
    let was_told = row.state != ArtifactState::Uploading;
    artifacts::expire(tx, row).await?;
    if was_told {
        done.deliveries.extend(teller.expired(tx, row, reason).await?);
        done.wake.push((row.worker.clone(), row.id));
    }
    done.changed.push((row.clone(), Heard::Expired));
    Ok(())
}

/// Rows whose time came: waits of workers that are gone, ends of retention, blobs that are still there, and rows that
/// nothing is left of. What a delivery still needs is kept past its time.
async fn work_off(tx: &WriteTx, limit: u32, teller: &Teller) -> Result<Done, StoreError> {
    let rows = artifacts::lock_due(tx, limit).await?;
    let more = rows.len() == limit as usize;
    let mut done = Done::default();
    let (mut blobs, mut forgotten) = (Vec::new(), Vec::new());
    let mut changed: u32 = 0;
    let is_over = |row: &&ArtifactRow| {
        !matches!(row.state, ArtifactState::Expired | ArtifactState::Uploading)
            && row.expires_at_ms <= tx.now_ms()
    };
    let over: Vec<ArtifactRow> = rows.iter().filter(is_over).cloned().collect();
    let held = artifacts::held_artifacts(tx, &over).await?;
    for mut row in rows {
        if let Some(until) = held.get(&row.id) {
            artifacts::postpone(tx, &mut row, *until).await?;
            continue;
        }
        match row.state {
            ArtifactState::Expired => match &row.blob_key {
                None => forgotten.push(row.id),
                Some(key) => blobs.push(blob(row.id, key)),
            },
            ArtifactState::Ready if row.expires_at_ms > tx.now_ms() => {
                artifacts::give_up(tx, &mut row).await?;
                done.wake.push((row.worker.clone(), row.id));
                done.changed.push((row, Heard::GivenUp));
                changed += 1;
            }
            ArtifactState::Ready
            | ArtifactState::Confirmed
            | ArtifactState::Unconfirmed
            | ArtifactState::Uploading => {
                expire(tx, &mut row, "retention", teller, &mut done).await?;
                blobs.extend(row.blob_key.as_deref().map(|key| blob(row.id, key)));
                changed += 1;
            }
        }
    }
    changed += u32::try_from(artifacts::forget(tx, &forgotten).await?).unwrap_or(0);
    let states = v1::ArtifactStates { states: Vec::new(), blobs, changed, more };
    done.reply = Some(Reply::States(states));
    Ok(done)
}

fn blob(id: ArtifactId, key: &str) -> v1::ArtifactBlob {
    v1::ArtifactBlob { id: wire(id), blob_key: key.to_owned() }
}

fn wire(id: ArtifactId) -> Bytes {
    Bytes::copy_from_slice(id.as_bytes())
}

fn states(of: impl Iterator<Item = (ArtifactId, ArtifactState)>) -> Done {
    let states = of.map(|(id, state)| v1::ArtifactStateOf { id: wire(id), state: u32::from(state.code()) });
    let states = v1::ArtifactStates { states: states.collect(), ..v1::ArtifactStates::default() };
    Done { reply: Some(Reply::States(states)), ..Done::default() }
}

fn refused(why: Why, detail: &str) -> Done {
    let refusal = v1::ArtifactRefusal { why: why.into(), detail: detail.to_owned() };
    Done { reply: Some(Reply::Refusal(refusal)), ..Done::default() }
}

fn obsolete() -> Done {
    refused(Why::Obsolete, "the attempt is closed")
}

fn id_of(bytes: &[u8]) -> Result<ArtifactId, ContractError> {
    ArtifactId::from_slice(bytes).map_err(|_| ContractError::Field { field: "id" })
}

fn ids_of(all: &[Bytes]) -> Result<Vec<ArtifactId>, ContractError> {
    all.iter().map(|id| id_of(id)).collect()
}

fn new_of(a: v1::NewArtifact) -> Result<NewArtifact, ContractError> {
    let name = ringback_domain::artifact::file_name(&a.name);
    if a.blob_key.is_empty() {
        return Err(ContractError::Field { field: "blob_key" });
    }
    Ok(NewArtifact { id: id_of(&a.id)?, name, content_type: a.content_type, blob_key: a.blob_key })
}

fn stored_of(a: v1::StoredArtifact) -> Result<Stored, ContractError> {
    if a.sha256.len() != 32 {
        return Err(ContractError::Field { field: "sha256" });
    }
    Ok(Stored { id: id_of(&a.id)?, size_bytes: a.size_bytes, sha256: a.sha256.to_vec() })
}
