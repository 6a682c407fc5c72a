//! Making batches: the batch's row first, then its jobs in chunks, then one transaction that opens it. Until then
//! nobody sees, sends or runs anything of it; a process that dies leaves rows that the reconciler removes.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use ringback_contracts::v1;
use ringback_domain::{BatchId, JobId, ProjectId};
use ringback_service_runtime::{RingbackConfig, config::BatchTemplate, fault};
use ringback_store::{
    StoreError, Urgency, WriteTx,
    batches::{
        BatchRow, BatchStart, NewBatch, UNOPENED_LIFE_MS, batch, give_up_batch, insert_batch, open_batch,
    },
    submit::{Admission, Inserted, committed_ids, insert_submits},
};

use crate::{
    catalog::{Catalog, Endpoint},
    error::ApiError,
    state::Api,
    submit::{
        outbound::Sent,
        pipeline::{Pending, other_request, over_quota},
        place_inputs,
    },
};

/// Jobs per transaction.
const CHUNK: usize = 500;
/// First deliveries of its jobs are held for longer than an unopened batch lives; opening announces them at once.
const HOLD_MS: u64 = UNOPENED_LIFE_MS + 300_000;
/// All of it must be inserted within this time.
const WITHIN: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(100);
/// An unopened batch of this age whose request is repeated is taken for one whose maker died.
const ABANDONED_AFTER_MS: u64 = 30_000;

/// A batch to be made; its jobs in order.
pub(crate) struct BatchRequest {
    pub(crate) new: NewBatch,
    pub(crate) jobs: Vec<Pending>,
}

/// What was made, or made by an earlier request with the same key.
pub(crate) struct BatchAccepted {
    pub(crate) id: BatchId,
    pub(crate) total: u32,
    pub(crate) new: bool,
}

/// Ids of a batch's jobs: ascending in the order of its items.
pub(crate) fn job_ids(n: usize) -> Vec<JobId> {
    let now = u64::try_from(ringback_service_runtime::time::now_ms()).unwrap_or(0);
    let mut ids: Vec<JobId> = (0..n).map(|_| JobId::from_parts(now, rand::random())).collect();
    ids.sort_unstable();
    ids
}

/// A new batch id.
pub(crate) fn new_batch_id() -> BatchId {
    BatchId::from_parts(u64::try_from(ringback_service_runtime::time::now_ms()).unwrap_or(0), rand::random())
}

/// Gives an unfinished batch up when its request ends before it was opened.
struct Unfinished {
    api: Arc<Api>,
    id: BatchId,
    done: bool,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let (api, id) = (Arc::clone(&self.api), self.id);
        tokio::spawn(async move {
            let given_up = api
                .store
                .write(Urgency::Lazy, move |tx| Box::pin(async move { give_up_batch(tx, id).await }))
                .await;
            if let Err(error) = given_up {
                tracing::warn!(batch_id = %id, %error, "an unfinished batch is left to the reconciler");
            }
        });
    }
}

/// Makes a batch and answers after it was opened (P1).
pub(crate) async fn create(api: &Arc<Api>, mut request: BatchRequest) -> Result<BatchAccepted, ApiError> {
    let until = Instant::now() + WITHIN;
    let (id, total) = (request.new.id, request.new.total);
    if let Some(known) = begin(api, &request.new, until).await? {
        return Ok(BatchAccepted { id: known.id, total: known.counts.total, new: false });
    }
    let mut guard = Unfinished { api: Arc::clone(api), id, done: false };
    for (index, job) in request.jobs.iter_mut().enumerate() {
        job.submit.batch = Some((id, u32::try_from(index).unwrap_or(u32::MAX)));
        job.submit.hold_deliveries_ms = HOLD_MS;
    }
    place_inputs(api, request.jobs.iter_mut().map(|job| &mut job.submit)).await?;
    let jobs: Vec<Arc<Pending>> = request.jobs.into_iter().map(Arc::new).collect();
    let mut sent = Vec::with_capacity(jobs.len());
    for chunk in jobs.chunks(CHUNK) {
        sent.push(insert_chunk(api, Arc::from(chunk), until).await?);
    }
    let created = open(api, id, until).await?;
    guard.done = true;
    let outbound = Arc::clone(&api.outbound);
    tokio::spawn(async move {
        outbound.announce_deliveries(&created).await;
        for chunk in sent {
            outbound.send_all(chunk).await;
        }
    });
    Ok(BatchAccepted { id, total, new: true })
}

/// Runs a command again while SQL is away. It must be safe to repeat after an unknown commit.
async fn repeat<T: Send + 'static, F>(api: &Api, until: Instant, command: F) -> Result<T, StoreError>
where
    F: for<'a> Fn(&'a WriteTx) -> BoxFuture<'a, Result<T, StoreError>> + Send + Sync + Clone + 'static,
{
    loop {
        fault::point("api.commit.before");
        let result = api.store.write(Urgency::Now, command.clone()).await;
        fault::point("api.commit.after");
        match result {
            Err(e) if e.is_transient() && Instant::now() < until => tokio::time::sleep(PAUSE).await,
            other => return other,
        }
    }
}

/// Inserts the batch's row, or answers the batch that the same request made before.
async fn begin(api: &Arc<Api>, new: &NewBatch, until: Instant) -> Result<Option<BatchRow>, ApiError> {
    // A repeated request waits this long for the first one to open its batch.
    let patience = Instant::now() + Duration::from_millis(api.limits.submit_timeout_ms);
    let partitions = api.store.facts().partitions;
    loop {
        let row = new.clone();
        let inserted = repeat(api, until, move |tx| {
            let row = row.clone();
            Box::pin(async move { insert_batch(tx, partitions, &row).await })
        })
        .await;
        let known = match inserted {
            Ok(BatchStart::Made(told)) => {
                api.outbound.announce_deliveries(&told).await;
                return Ok(None);
            }
            Ok(BatchStart::Known(known)) => *known,
            Ok(BatchStart::Refused(refused)) => {
                api.outbound.announce_deliveries(&refused.deliveries).await;
                return Err(over_quota(&refused.over));
            }
            // After an unknown commit the id is there already; after a race the key is.
            Err(StoreError::Duplicate { .. }) => match batch(api.store.read(), new.id).await? {
                Some(_) => return Ok(None),
                None => continue,
            },
            Err(error) => return Err(error.into()),
        };
        if known.id == new.id {
            return Ok(None);
        }
        if known.request_hash != new.request_hash {
            return Err(other_request());
        }
        if known.opened_at.is_some() {
            return Ok(Some(known));
        }
        let age = api.store.now_ms().await?.saturating_sub(known.created_at.0);
        if u64::try_from(age).unwrap_or(0) > ABANDONED_AFTER_MS {
            let id = known.id;
            repeat(api, until, move |tx| Box::pin(async move { give_up_batch(tx, id).await })).await?;
        } else if Instant::now() > patience {
            return Err(ApiError::unavailable(
                "the same request is being worked on; try again with the same key",
            ));
        } else {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

async fn insert_chunk(api: &Api, chunk: Arc<[Arc<Pending>]>, until: Instant) -> Result<Vec<Sent>, ApiError> {
    let facts = (api.store.counter_row(), api.store.facts().partitions);
    let rows = Arc::clone(&chunk);
    let inserted = repeat(api, until, move |tx| {
        let rows = Arc::clone(&rows);
        Box::pin(async move {
            let submits: Vec<_> = rows.iter().map(|p| &p.submit).collect();
            // A former try may have been committed after all.
            let ids: Vec<JobId> = submits.iter().map(|s| s.id).collect();
            let there: HashSet<JobId> = committed_ids(tx.conn(), &ids).await?.into_iter().collect();
            if there.len() == ids.len() {
                return Ok(None);
            }
            insert_submits(tx, facts.0, facts.1, &submits).await.map(Some)
        })
    })
    .await?;
    let Some(admissions) = inserted else {
        // Committed by a try whose answer was lost: the reconciler publishes these.
        return Ok(Vec::new());
    };
    Ok(chunk
        .iter()
        .zip(admissions)
        .filter_map(|(pending, admission)| match admission {
            Admission::Inserted(inserted) => {
                let Inserted { row, deliveries } = *inserted;
                Some(Sent { pending: Arc::clone(pending), row, deliveries })
            }
            // Jobs of a batch carry no idempotency key, and were counted with it.
            Admission::Existing(_) | Admission::Refused(_) => None,
        })
        .collect())
}

/// Opens the batch; answers what registered webhooks are owed for that.
async fn open(api: &Api, id: BatchId, until: Instant) -> Result<Vec<v1::Delivery>, ApiError> {
    let partitions = api.store.facts().partitions;
    let opened =
        repeat(api, until, move |tx| Box::pin(async move { open_batch(tx, partitions, id).await })).await?;
    if let Some(created) = opened {
        return Ok(created);
    }
    // After an unknown commit the second try finds it open; the dispatcher's sweep finds what is owed.
    if batch(api.store.read(), id).await?.is_some_and(|b| b.opened_at.is_some()) {
        return Ok(Vec::new());
    }
    Err(ApiError::unavailable(
        "the batch took too long to insert and was given up; nothing of it runs: send it again",
    ))
}

/// The batch templates of the configuration, by route.
#[derive(Debug, Default)]
pub(crate) struct Templates {
    by_route: HashMap<String, (BatchTemplate, ProjectId, Arc<Endpoint>)>,
}

impl Templates {
    pub(crate) fn new(config: &RingbackConfig, catalog: &Catalog) -> Self {
        let mut by_route = HashMap::new();
        for template in config.batch_templates.iter().map(|t| t.resolve()) {
            // Validation has made sure that the endpoint exists.
            let Some(project) = catalog.project(&template.project) else { continue };
            let Ok(endpoint) = catalog.find(project, &template.endpoint) else { continue };
            by_route.insert(template.route.clone(), (template, project, Arc::clone(endpoint)));
        }
        Self { by_route }
    }

    pub(crate) fn routes(&self) -> impl Iterator<Item = &str> {
        self.by_route.keys().map(String::as_str)
    }

    /// The template of a route, for keys of its project.
    pub(crate) fn find(
        &self,
        route: &str,
        project: ProjectId,
    ) -> Result<(&BatchTemplate, &Arc<Endpoint>), ApiError> {
        match self.by_route.get(route) {
            Some((template, owner, endpoint)) if *owner == project => Ok((template, endpoint)),
            Some(_) | None => Err(ApiError::not_found("no such route; /openapi.json lists all routes")),
        }
    }
}
