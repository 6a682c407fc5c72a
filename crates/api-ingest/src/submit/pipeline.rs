//! Group commit of submits (P1): whatever waits when a transaction begins goes into it together.
//!
//! A command is queued at the store while submits wait; it takes them only when its transaction runs, so the busier
//! the store, the larger the groups. A command that fails is split until the row at fault stands alone (P9).

use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use ringback_domain::{JobId, JobStatus};
use ringback_service_runtime::fault;
use ringback_store::{
    Store, StoreError, Urgency, WriteTx,
    submit::{Admission, InputAt, Inserted, Submit, committed_ids, insert_submits},
    usage::OverQuota,
};
use tokio::sync::oneshot;

use super::outbound::{Outbound, Sent};
use crate::{catalog::Endpoint, error::ApiError};

/// Most submits of one command, and the bytes of inputs after which no more are taken.
const GROUP_MAX: usize = 256;
const GROUP_MAX_BYTES: usize = 8 * 1024 * 1024;
/// Submits that may wait; further ones are told to come again.
const WAITING_MAX: usize = 20_000;
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// A submit that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Accepted {
    pub(crate) id: JobId,
    pub(crate) sync_id: bool,
    pub(crate) status: JobStatus,
    /// False when an earlier request with the same idempotency key made it.
    pub(crate) new: bool,
}

impl Accepted {
    pub(crate) fn public_id(&self) -> String {
        self.id.public(self.sync_id)
    }
}

type Reply = oneshot::Sender<Result<Accepted, ApiError>>;

/// A submit on its way to SQL.
pub(crate) struct Pending {
    pub(crate) submit: Submit,
    pub(crate) endpoint: Arc<Endpoint>,
    /// Secret members in the clear, for the message.
    pub(crate) secret_extra: Option<Bytes>,
    reply: Mutex<Option<Reply>>,
    /// Nobody waits for it any more: it is not inserted, unless that is happening already.
    abandoned: AtomicBool,
    since: Instant,
}

impl Pending {
    pub(crate) fn new(submit: Submit, endpoint: Arc<Endpoint>, secret_extra: Option<Bytes>) -> Self {
        Self {
            submit,
            endpoint,
            secret_extra,
            reply: Mutex::new(None),
            abandoned: AtomicBool::new(false),
            since: Instant::now(),
        }
    }

    fn answer(&self, result: Result<Accepted, ApiError>) {
        let reply = self.reply.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(reply) = reply {
            // Whoever no longer waits has been told 503 or is gone.
            let _ = reply.send(result);
        }
    }

    fn inline_bytes(&self) -> usize {
        match &self.submit.input {
            InputAt::Inline(bytes) => bytes.len(),
            InputAt::Blob { .. } => 0,
        }
    }
}

type Group = Arc<Vec<Arc<Pending>>>;

#[derive(Default)]
struct Waiting {
    submits: VecDeque<Arc<Pending>>,
    /// A command is queued at the store that will take them.
    scheduled: bool,
}

/// The way of submits into SQL.
pub(crate) struct Submits {
    store: Store,
    outbound: Arc<Outbound>,
    waiting: Mutex<Waiting>,
    timeout: Duration,
}

/// Marks a submit as abandoned unless it was answered: on a time-out, and when the client hangs up.
struct Abandon<'a>(&'a Pending, bool);

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        if !self.1 {
            self.0.abandoned.store(true, Ordering::Relaxed);
        }
    }
}

impl Submits {
    pub(crate) fn new(store: Store, outbound: Arc<Outbound>, timeout: Duration) -> Arc<Self> {
        Arc::new(Self { store, outbound, waiting: Mutex::default(), timeout })
    }

    /// Inserts a job and answers after its commit, or 503 in time.
    pub(crate) async fn submit(self: &Arc<Self>, pending: Pending) -> Result<Accepted, ApiError> {
        let (reply, answer) = oneshot::channel();
        let pending = Arc::new(pending);
        *pending.reply.lock().unwrap_or_else(PoisonError::into_inner) = Some(reply);
        self.enqueue(Arc::clone(&pending))?;
        let mut guard = Abandon(&pending, false);
        let late = || {
            ApiError::unavailable(format!(
                "the job was not committed within {} ms; submit it again (with the same Idempotency-Key, so that it \
                 cannot run twice)",
                self.timeout.as_millis()
            ))
        };
        match tokio::time::timeout(self.timeout, answer).await {
            Ok(Ok(result)) => {
                guard.1 = true;
                metrics::histogram!("ringback_api_submit_seconds").record(pending.since.elapsed());
                result
            }
            // The group's task ended without an answer: a panic below it.
            Ok(Err(_)) => Err(ApiError::unavailable("the submit was lost on its way; try again")),
            Err(_) => Err(late()),
        }
    }

    fn enqueue(self: &Arc<Self>, pending: Arc<Pending>) -> Result<(), ApiError> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.submits.len() >= WAITING_MAX {
            return Err(ApiError::unavailable("too many submits wait for the database; try again"));
        }
        waiting.submits.push_back(pending);
        if !waiting.scheduled {
            waiting.scheduled = true;
            tokio::spawn(Arc::clone(self).command());
        }
        Ok(())
    }

    /// The submits of the command that runs now. What is left gets a command of its own.
    fn take(self: &Arc<Self>) -> Group {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let mut group = Vec::with_capacity(waiting.submits.len().min(GROUP_MAX));
        let mut bytes = 0;
        while let Some(next) = waiting.submits.front() {
            bytes += next.inline_bytes();
            if group.len() == GROUP_MAX || (bytes > GROUP_MAX_BYTES && !group.is_empty()) {
                break;
            }
            group.extend(waiting.submits.pop_front());
        }
        waiting.scheduled = !waiting.submits.is_empty();
        if waiting.scheduled {
            tokio::spawn(Arc::clone(self).command());
        }
        Arc::new(group)
    }

    async fn command(self: Arc<Self>) {
        let taken: Arc<OnceLock<Group>> = Arc::default();
        fault::point("api.commit.before");
        let result = {
            let (this, taken) = (Arc::clone(&self), Arc::clone(&taken));
            let facts = self.facts();
            self.store
                .write(Urgency::Now, move |tx| {
                    let (this, taken) = (Arc::clone(&this), Arc::clone(&taken));
                    Box::pin(async move {
                        // A second run of this closure works on the same submits.
                        let group = Arc::clone(taken.get_or_init(|| this.take()));
                        insert_group(tx, facts, &group).await
                    })
                })
                .await
        };
        fault::point("api.commit.after");
        // Where no transaction began, nobody has taken them yet.
        let group = Arc::clone(taken.get_or_init(|| self.take()));
        metrics::histogram!("ringback_api_submits_per_command_size").record(group.len() as f64);
        self.settle(group, result).await;
    }

    fn facts(&self) -> (i64, u16) {
        (self.store.counter_row(), self.store.facts().partitions)
    }

    /// Writes a fixed group: second tries and halves of groups that failed.
    fn write_again(self: Arc<Self>, group: Group) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let facts = self.facts();
            let rows = Arc::clone(&group);
            let result = self
                .store
                .write(Urgency::Now, move |tx| {
                    let rows = Arc::clone(&rows);
                    Box::pin(async move { insert_group(tx, facts, &rows).await })
                })
                .await;
            self.settle(group, result).await;
        })
    }

    async fn settle(self: Arc<Self>, group: Group, result: Result<Vec<Option<Admission>>, StoreError>) {
        let error = match result {
            Ok(admissions) => return self.accepted(&group, admissions),
            Err(error) => error,
        };
        match error {
            StoreError::CommitUnknown { .. } => self.read_back(group).await,
            StoreError::Transient { .. } => {
                let (late, rest): (Vec<_>, Vec<_>) =
                    group.iter().cloned().partition(|p| p.since.elapsed() + RETRY_PAUSE >= self.timeout);
                for pending in late {
                    pending.answer(Err(error.clone().into()));
                }
                if !rest.is_empty() {
                    tokio::time::sleep(RETRY_PAUSE).await;
                    self.write_again(Arc::new(rest)).await;
                }
            }
            StoreError::Duplicate { .. } | StoreError::Permanent { .. } if group.len() > 1 => {
                let (a, b) = group.split_at(group.len() / 2);
                let (a, b) = (Arc::new(a.to_vec()), Arc::new(b.to_vec()));
                Arc::clone(&self).write_again(a).await;
                self.write_again(b).await;
            }
            StoreError::Duplicate { .. } => {
                // Another process has just inserted the same idempotency key: the next look finds it.
                let late = group.iter().any(|p| p.since.elapsed() + RETRY_PAUSE >= self.timeout);
                if late {
                    self.fail(&group, &error);
                } else {
                    tokio::time::sleep(RETRY_PAUSE).await;
                    self.write_again(group).await;
                }
            }
            StoreError::Permanent { .. } => self.fail(&group, &error),
        }
    }

    fn fail(&self, group: &Group, error: &StoreError) {
        for pending in group.iter() {
            pending.answer(Err(error.clone().into()));
        }
    }

    /// The fate of the commit is unknown: the rows tell, once SQL answers again.
    async fn read_back(self: Arc<Self>, group: Group) {
        let ids: Vec<JobId> = group.iter().map(|p| p.submit.id).collect();
        let mut rest: Vec<Arc<Pending>> = group.to_vec();
        loop {
            rest.retain(|p| p.since.elapsed() + RETRY_PAUSE < self.timeout);
            if rest.is_empty() {
                // Those without an answer are told 503 by their own time limit. Rows that were committed after all
                // are found and published by the reconciler.
                return;
            }
            tokio::time::sleep(RETRY_PAUSE).await;
            let Ok(found) = committed_ids(self.store.read(), &ids).await else { continue };
            let found: HashSet<JobId> = found.into_iter().collect();
            // A commit whose answer was lost may still be under way: what is absent is asked for again.
            for pending in rest.extract_if(.., |p| found.contains(&p.submit.id)) {
                pending.answer(Ok(Accepted {
                    id: pending.submit.id,
                    sync_id: pending.submit.sync_id,
                    status: JobStatus::InQueue,
                    new: true,
                }));
            }
        }
    }

    fn accepted(&self, group: &Group, admissions: Vec<Option<Admission>>) {
        let mut sent = Vec::with_capacity(group.len());
        let mut told = Vec::new();
        for (pending, admission) in group.iter().zip(admissions) {
            match admission {
                None => pending.answer(Err(ApiError::unavailable("the submit was given up"))),
                Some(Admission::Existing(known)) if known.same_request => pending.answer(Ok(Accepted {
                    id: known.id,
                    sync_id: known.sync_id,
                    status: known.status,
                    new: false,
                })),
                Some(Admission::Existing(_)) => pending.answer(Err(other_request())),
                Some(Admission::Refused(refused)) => {
                    pending.answer(Err(over_quota(&refused.over)));
                    told.extend(refused.deliveries);
                }
                Some(Admission::Inserted(inserted)) => {
                    let Inserted { row, deliveries } = *inserted;
                    pending.answer(Ok(Accepted {
                        id: row.job.id,
                        sync_id: row.sync_id,
                        status: row.job.status(),
                        new: true,
                    }));
                    sent.push(Sent { pending: Arc::clone(pending), row, deliveries });
                }
            }
        }
        metrics::counter!("ringback_api_jobs_accepted_total").increment(sent.len() as u64);
        if !sent.is_empty() {
            Arc::clone(&self.outbound).send(sent);
        }
        if !told.is_empty() {
            let outbound = Arc::clone(&self.outbound);
            tokio::spawn(async move { outbound.announce_deliveries(&told).await });
        }
    }
}

pub(crate) fn other_request() -> ApiError {
    ApiError::conflict(
        "this Idempotency-Key was used for another request (endpoint or body differ); use a new key for a new request",
    )
}

/// A submit beyond a quota of its project.
pub(crate) fn over_quota(over: &OverQuota) -> ApiError {
    let wait_ms = over.reset_at.since_ms(over.now);
    ApiError::too_many(
        format!(
            "the quota of {} {} per {} is used up ({} used); counting begins anew at {} (setting \
             projects.<name>.quota.{})",
            over.limit,
            over.metric.as_str(),
            over.quota.period.as_str(),
            over.used,
            over.reset_at.rfc3339(),
            over.metric.as_str(),
        ),
        wait_ms.div_ceil(1_000).max(1),
    )
}

async fn insert_group(
    tx: &WriteTx,
    (counter_row, partitions): (i64, u16),
    group: &Group,
) -> Result<Vec<Option<Admission>>, StoreError> {
    let live: Vec<bool> = group.iter().map(|p| !p.abandoned.load(Ordering::Relaxed)).collect();
    let submits: Vec<&Submit> =
        group.iter().zip(&live).filter(|(_, live)| **live).map(|(p, _)| &p.submit).collect();
    let mut admissions = insert_submits(tx, counter_row, partitions, &submits).await?.into_iter();
    fault::point("api.commit.during");
    Ok(live.into_iter().map(|live| if live { admissions.next() } else { None }).collect())
}

#[cfg(test)]
mod tests {
    use ringback_bus::Bus;
    use ringback_domain::{EndpointId, ProjectId, policy::Policy};
    use ringback_service_runtime::config::{NatsConfig, RetentionConfig};
    use ringback_store::Open;

    use super::*;

    fn endpoint() -> Arc<Endpoint> {
        Arc::new(Endpoint {
            id: EndpointId(1),
            project: ProjectId(1),
            name: "e".into(),
            alias: None,
            slots: 1,
            shard: 1,
            all_events: false,
            webhook_profile: None,
            kind: ringback_domain::event::EndpointKind::Job,
            policy: Policy::default(),
            execution_timeout_ms: 1_000,
            ttl_ms: 1_000,
            retention: RetentionConfig::default().resolve(),
            confirm: crate::catalog::Confirms::No,
        })
    }

    fn pending(id: JobId) -> Pending {
        let input = InputAt::Inline(Bytes::from_static(b"1"));
        let submit = Submit::new(id, ProjectId(1), EndpointId(1), input);
        Pending::new(submit, endpoint(), None)
    }

    /// SQLite in a folder; nothing listens where NATS should be.
    async fn submits(folder: &tempfile::TempDir, timeout: Duration) -> (Arc<Submits>, Store) {
        ringback_service_runtime::crypto_provider::install();
        let open = Open::url(format!("sqlite:{}", folder.path().join("t.db").display()));
        Store::migrate(&open).await.unwrap();
        let store = Store::open(&open).await.unwrap();
        let nats = NatsConfig { url: Some("nats://127.0.0.1:9".into()), ..NatsConfig::default() };
        let bus = Bus::connect(&nats, "t").await.unwrap();
        let outbound = Outbound::new(bus, store.facts().clone());
        (Submits::new(store.clone(), outbound, timeout), store)
    }

    fn id(n: u8) -> JobId {
        JobId::from_parts(1_800_000_000_000, [n; 10])
    }

    #[tokio::test]
    async fn a_bad_row_fails_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (submits, store) = submits(&folder, Duration::from_millis(1_500)).await;
        // Two rows with the same id cannot both be inserted; they share a command with 20 good ones.
        let all = (0..20).chain([3]).map(|n| submits.submit(pending(id(n))));
        let results = futures::future::join_all(all).await;
        assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 20, "{results:?}");
        assert!(results[3].is_ok() != results[20].is_ok(), "one of the two stands");
        let ids: Vec<JobId> = (0..20).map(id).collect();
        assert_eq!(committed_ids(store.read(), &ids).await.unwrap().len(), 20);
    }

    #[tokio::test]
    async fn what_nobody_waits_for_is_not_inserted() {
        let folder = tempfile::tempdir().unwrap();
        let (submits, store) = submits(&folder, Duration::from_secs(5)).await;
        // The store's writer is busy until we let it go.
        let (let_go, hold) = tokio::sync::watch::channel(false);
        let writer = store.clone();
        let blocker = tokio::spawn(async move {
            writer
                .write(Urgency::Now, move |_| {
                    let mut hold = hold.clone();
                    Box::pin(async move {
                        let _ = hold.wait_for(|go| *go).await;
                        Ok(())
                    })
                })
                .await
        });
        tokio::task::yield_now().await;
        let client = tokio::spawn({
            let submits = Arc::clone(&submits);
            async move { submits.submit(pending(id(1))).await }
        });
        let other = tokio::spawn({
            let submits = Arc::clone(&submits);
            async move { submits.submit(pending(id(2))).await }
        });
        while submits.waiting.lock().unwrap().submits.len() < 2 {
            tokio::task::yield_now().await;
        }
        // The client hangs up.
        client.abort();
        let _ = client.await;
        let_go.send(true).unwrap();
        blocker.await.unwrap().unwrap();
        assert!(other.await.unwrap().is_ok());
        assert_eq!(committed_ids(store.read(), &[id(1), id(2)]).await.unwrap(), [id(2)]);
    }

    #[tokio::test]
    async fn an_unknown_commit_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let (submits, store) = submits(&folder, Duration::from_millis(800)).await;
        submits.submit(pending(id(1))).await.unwrap();
        let (mut there, mut absent) = (pending(id(1)), pending(id(2)));
        let ((a, committed), (b, lost)) = (oneshot::channel(), oneshot::channel());
        *there.reply.get_mut().unwrap() = Some(a);
        *absent.reply.get_mut().unwrap() = Some(b);
        let group: Group = Arc::new(vec![Arc::new(there), Arc::new(absent)]);
        let unknown = StoreError::CommitUnknown { detail: "the connection broke".into() };
        Arc::clone(&submits).settle(group, Err(unknown)).await;
        assert_eq!(committed.await.unwrap().unwrap().id, id(1));
        assert!(lost.await.is_err(), "whose fate stays unknown is not told that it was accepted");
        assert_eq!(committed_ids(store.read(), &[id(2)]).await.unwrap(), []);
    }
}
