//! A tracker with a real broker and a real database, asked over NATS as workers and clients ask it.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a failed step of a test is its report")]

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use bytes::Bytes;
use prost::Message;
use ringback_bus::{Bus, JobSubject, Lane, Verb};
use ringback_contracts::{VERSION, attempt_to_wire, payload_of, v1};
use ringback_domain::{AttemptRef, BatchId, EndpointId, JobId, JobStatus, Nonce, ProjectId, target::Target};
use ringback_service_runtime::{Readiness, Redacted, RingbackConfig, Shutdown};
use ringback_state_tracker::{App, Handles};
use ringback_store::{
    JobRow, Open, Store, Urgency,
    batches::{NewBatch, insert_batch, open_batch},
    books,
    secrets::SecretKey,
    select_jobs, sql,
    submit::{Admission, InputAt, Submit, insert_submits},
    webhooks::bump_registry,
};
use ringback_test_support::{files::Folder, nats::NatsServer, postgres::Postgres};

/// Each scenario on SQLite as a test of its own, and all of them on one PostgreSQL cluster, each with a database of its
/// own. The number is the lease in ms.
macro_rules! scenarios {
    ($($name:ident: $lease_ms:literal,)*) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let Some((nats, _folder)) = $crate::rig::broker().await else { return };
                let mut rig = $crate::rig::Rig::sqlite(&nats, $lease_ms).await;
                super::$name(&mut rig).await;
                rig.stop().await;
            })*
        }

        #[tokio::test(flavor = "multi_thread")]
        async fn postgres() {
            use futures::FutureExt as _;
            let Some((nats, _folder)) = rig::broker().await else { return };
            let Some(postgres) = ringback_test_support::postgres::Postgres::start().await else { return };
            let all: Vec<(&str, u64, for<'a> fn(&'a mut Rig) -> futures::future::BoxFuture<'a, ()>)> =
                vec![$((stringify!($name), $lease_ms, |rig| $name(rig).boxed())),*];
            for (name, lease_ms, scenario) in all {
                eprintln!("{name}");
                let mut rig = Rig::postgres(&nats, &postgres, lease_ms).await;
                scenario(&mut rig).await;
                rig.stop().await;
            }
        }
    };
}

pub(crate) const PROJECT: ProjectId = ProjectId(1);
pub(crate) const ENDPOINT: EndpointId = EndpointId(7);
pub(crate) const HOOK: &str = "https://receiver.example/hook";

/// Fresh numbers for ids and nonces.
pub(crate) fn fresh() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

pub(crate) struct Rig {
    pub(crate) store: Store,
    pub(crate) bus: Bus,
    pub(crate) config: RingbackConfig,
    pub(crate) open: Open,
    shutdowns: Vec<Shutdown>,
    running: Vec<tokio::task::JoinHandle<()>>,
    // Last: the programs end after those who use them.
    _folder: Option<Folder>,
}

/// The broker of a test program.
pub(crate) async fn broker() -> Option<(NatsServer, Folder)> {
    ringback_service_runtime::crypto_provider::install();
    let folder = Folder::new("tracker-nats");
    Some((NatsServer::start(folder.path()).await?, folder))
}

impl Rig {
    /// A rig on a new SQLite file.
    pub(crate) async fn sqlite(nats: &NatsServer, lease_ms: u64) -> Self {
        let folder = Folder::new("tracker");
        let open = Open::url(format!("sqlite:{}", folder.path().join("t.db").display()));
        Self::start(nats, open, lease_ms, Some(folder)).await
    }

    /// A rig on a new PostgreSQL database.
    pub(crate) async fn postgres(nats: &NatsServer, postgres: &Postgres, lease_ms: u64) -> Self {
        let open = Open::url(postgres.database(&format!("t{}", fresh())).await);
        Self::start(nats, open, lease_ms, None).await
    }

    async fn start(nats: &NatsServer, open: Open, lease_ms: u64, folder: Option<Folder>) -> Self {
        let open = Open { shards: 2, partitions: 4, ..open };
        Store::migrate(&open).await.unwrap();
        let store = Store::open(&open).await.unwrap();
        let mut config = RingbackConfig::default();
        config.nats.url = Some(nats.url());
        config.nats.user = Some(NatsServer::USER.to_owned());
        config.nats.password = Some(Redacted::new(nats.password().to_owned()));
        config.nats.install = format!("t{}-{}", std::process::id(), fresh());
        config.worker.lease_ms = lease_ms;
        let bus = Bus::connect(&config.nats, "test").await.unwrap();
        bus.connected(Duration::from_secs(10)).await.unwrap();
        bus.ensure_streams(2, &store.facts().db_epoch).await.unwrap();
        let rig =
            Self { store, bus, config, open, shutdowns: Vec::new(), running: Vec::new(), _folder: folder };
        rig.execute(
            "INSERT INTO endpoints (id, project_id, name, config, created_at_ms, updated_at_ms) \
             VALUES (7, 1, 'speech', '{}', 0, 0)",
        )
        .await;
        rig
    }

    /// Starts a replica of the tracker with its own connection pool and its own connection to NATS.
    pub(crate) async fn tracker(&mut self) {
        let store = Store::open(&self.open).await.unwrap();
        let bus = Bus::connect(&self.config.nats, "tracker").await.unwrap();
        let readiness = Readiness::new();
        let handles = Handles {
            store,
            bus,
            secret_key: SecretKey::from_bytes(&[7; 32]),
            public_url: "https://ringback.example".to_owned(),
            readiness: readiness.clone(),
        };
        let shutdown = Shutdown::new();
        let app = App::build(&self.config, handles);
        let stop = shutdown.clone();
        self.running.push(tokio::spawn(async move { app.run(stop).await.unwrap() }));
        self.shutdowns.push(shutdown);
        tokio::time::timeout(Duration::from_secs(10), readiness.ready()).await.unwrap();
        // Subscriptions reach the server in the order in which they were made: one answer means all stand.
        ringback_test_support::wait::until("the tracker to answer", Duration::from_secs(10), || async {
            let command = v1::Command { version: VERSION, command: None };
            self.bus.request(Verb::Command, encode(&command), Duration::from_millis(500)).await.ok()
        })
        .await;
    }

    /// Ends all replicas in order.
    pub(crate) async fn stop(&mut self) {
        for shutdown in self.shutdowns.drain(..) {
            shutdown.trigger();
        }
        for running in self.running.drain(..) {
            running.await.unwrap();
        }
    }

    pub(crate) async fn execute(&self, text: &'static str) {
        self.store
            .write(Urgency::Now, move |tx| {
                Box::pin(async move { sql::execute(tx.conn(), text, []).await.map(drop) })
            })
            .await
            .unwrap();
    }

    pub(crate) async fn number(&self, text: &str) -> i64 {
        let row = sql::query_one(self.store.read(), text, []).await.unwrap().unwrap();
        row.try_get_by_index::<i64>(0).unwrap()
    }

    /// Inserts jobs as api-ingest does.
    pub(crate) async fn submit(&self, submits: Vec<Submit>) -> Vec<JobId> {
        let ids = submits.iter().map(|s| s.id).collect();
        let submits = std::sync::Arc::new(submits);
        let (counter, partitions) = (self.store.counter_row(), self.store.facts().partitions);
        self.store
            .write(Urgency::Now, move |tx| {
                let submits = std::sync::Arc::clone(&submits);
                Box::pin(async move {
                    let all: Vec<&Submit> = submits.iter().collect();
                    insert_submits(tx, counter, partitions, &all).await.map(drop)
                })
            })
            .await
            .unwrap();
        ids
    }

    /// Submits one job and answers what became of it.
    pub(crate) async fn try_submit(&self, submit: Submit) -> Admission {
        let (counter, partitions) = (self.store.counter_row(), self.store.facts().partitions);
        self.store
            .write(Urgency::Now, move |tx| {
                let submit = submit.clone();
                Box::pin(
                    async move { Ok(insert_submits(tx, counter, partitions, &[&submit]).await?.remove(0)) },
                )
            })
            .await
            .unwrap()
    }

    pub(crate) async fn job(&self) -> JobId {
        self.submit(vec![new_job()]).await[0]
    }

    pub(crate) async fn row(&self, id: JobId) -> JobRow {
        select_jobs(self.store.read(), &[id]).await.unwrap().remove(&id).unwrap()
    }

    pub(crate) async fn status(&self, id: JobId) -> JobStatus {
        self.row(id).await.job.status()
    }

    /// Makes an open batch of `n` jobs.
    pub(crate) async fn batch(&self, n: u32, cancel_rest: bool) -> (BatchId, Vec<JobId>) {
        let id = BatchId::from_parts(now_ms(), random());
        let new = NewBatch {
            id,
            project: PROJECT,
            endpoint: ENDPOINT,
            total: n,
            cancel_rest,
            callback_url: Some("https://receiver.example/batch".to_owned()),
            callback_runflow: false,
            template: None,
            metadata: None,
            idempotency_key: None,
            request_hash: None,
            traceparent: None,
        };
        let partitions = self.store.facts().partitions;
        self.store
            .write(Urgency::Now, move |tx| {
                let new = new.clone();
                Box::pin(async move { insert_batch(tx, partitions, &new).await.map(drop) })
            })
            .await
            .unwrap();
        let jobs = (0..n).map(|i| Submit { batch: Some((id, i)), ..new_job() }).collect();
        let jobs = self.submit(jobs).await;
        let partitions = self.store.facts().partitions;
        let opened =
            self.store.write(Urgency::Now, move |tx| Box::pin(open_batch(tx, partitions, id))).await.unwrap();
        assert!(opened.is_some());
        (id, jobs)
    }

    pub(crate) async fn ask<R: Message + Default>(&self, verb: Verb, message: &impl Message) -> R {
        let answer = self.bus.request(verb, encode(message), Duration::from_secs(10)).await.unwrap();
        R::decode(answer).unwrap()
    }

    pub(crate) async fn outcomes(&self, worker: &str, outcomes: Vec<v1::Outcome>) -> Vec<v1::Verdict> {
        let batch = v1::OutcomeBatch { version: VERSION, worker_id: worker.to_owned(), outcomes };
        let reply: v1::OutcomeReply = self.ask(Verb::Outcomes, &batch).await;
        reply.verdicts().collect()
    }

    pub(crate) async fn outcome(&self, worker: &str, outcome: v1::Outcome) -> v1::Verdict {
        self.outcomes(worker, vec![outcome]).await[0]
    }

    /// An early heartbeat; answers the stop orders.
    pub(crate) async fn beat(&self, worker: &str, attempts: &[(JobId, AttemptRef)]) -> Vec<v1::StopOrder> {
        self.heartbeat(v1::Heartbeat { full: false, ..beat_of(worker, attempts) }).await
    }

    pub(crate) async fn heartbeat(&self, beat: v1::Heartbeat) -> Vec<v1::StopOrder> {
        let reply: v1::HeartbeatReply = self.ask(Verb::Beat, &beat).await;
        assert_eq!(reply.lease_ms, self.config.worker.lease_ms);
        reply.stop
    }

    pub(crate) async fn grant(
        &self,
        worker: &str,
        job: JobId,
        run: u32,
        publish: u32,
    ) -> v1::grant_reply::Answer {
        let request = v1::GrantRequest {
            version: VERSION,
            worker_id: worker.to_owned(),
            job_id: id_bytes(job),
            run,
            publish,
        };
        self.ask::<v1::GrantReply>(Verb::Grant, &request).await.answer.unwrap()
    }

    pub(crate) async fn command(&self, command: v1::command::Command) -> v1::command_reply::Reply {
        let command = v1::Command { version: VERSION, command: Some(command) };
        self.ask::<v1::CommandReply>(Verb::Command, &command).await.reply.unwrap()
    }

    pub(crate) async fn cancel(&self, project: ProjectId, job: JobId) -> v1::command_reply::Reply {
        let cancel = v1::CancelJob { project_id: project.0, job_id: id_bytes(job) };
        self.command(v1::command::Command::Cancel(cancel)).await
    }

    pub(crate) async fn retry(&self, job: JobId, native: bool) -> v1::command_reply::Reply {
        self.retry_after(job, 0, native).await
    }

    /// Asks for another run as somebody who saw `expected_run`.
    pub(crate) async fn retry_after(
        &self,
        job: JobId,
        expected_run: u32,
        native: bool,
    ) -> v1::command_reply::Reply {
        let retry = v1::RetryJob { project_id: PROJECT.0, job_id: id_bytes(job), native, expected_run };
        self.command(v1::command::Command::Retry(retry)).await
    }

    pub(crate) async fn check_due(&self, jobs: &[JobId]) -> u32 {
        let due = v1::CheckDue { job_ids: jobs.iter().map(|j| id_bytes(*j)).collect() };
        match self.command(v1::command::Command::CheckDue(due)).await {
            v1::command_reply::Reply::Count(count) => count.changed,
            other => panic!("{other:?}"),
        }
    }

    /// P5 over everything.
    pub(crate) async fn books_balance(&self) {
        let all = books::Window { from_ms: 0, to_ms: 1 << 47 };
        let books = books::books_of(self.store.read(), all).await.unwrap();
        assert!(books.balance(), "{books:?}");
        assert!(books::offenders(self.store.read(), all, 10).await.unwrap().is_empty());
    }
}

pub(crate) fn now_ms() -> u64 {
    ringback_service_runtime::time::now_ms().unsigned_abs()
}

pub(crate) fn random() -> [u8; 10] {
    let mut bytes = [0; 10];
    bytes[2..].copy_from_slice(&fresh().wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    bytes
}

pub(crate) fn encode(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}

pub(crate) fn id_bytes(id: JobId) -> Bytes {
    Bytes::copy_from_slice(id.as_bytes())
}

/// A job with one target for its end and one for every transition.
pub(crate) fn new_job() -> Submit {
    let id = JobId::from_parts(now_ms(), random());
    let input = InputAt::Inline(Bytes::from_static(b"{\"text\": \"hi\"}"));
    Submit {
        execution_timeout_ms: 600_000,
        retain_completed_ms: 3_600_000,
        retain_failed_ms: 3_600_000,
        targets: Target::of_submit(Some(HOOK), Some("https://receiver.example/all"), false),
        extra: Some(Bytes::from_static(b"{\"policy\":{}}")),
        ..Submit::new(id, PROJECT, ENDPOINT, input)
    }
}

/// Registers a webhook, as another process does; answers its key.
pub(crate) async fn webhook(rig: &Rig, format: i64, filter: serde_json::Value) -> i64 {
    let public_id = format!("wh_{}", fresh());
    rig.store
        .write(Urgency::Now, move |tx| {
            let (public_id, filter) = (public_id.clone(), filter.to_string());
            Box::pin(async move {
                let row = sql::query_one(
                    tx.conn(),
                    "INSERT INTO webhooks (public_id, project_id, label, url, format, filter, strict_order, paused, \
                     enable_epoch, created_at_ms, updated_at_ms) \
                     VALUES ($1, 1, '', 'https://hooks.example/x', $2, $3, 0, 0, 1, 0, 0) RETURNING id",
                    [public_id.into(), format.into(), filter.into()],
                )
                .await?;
                bump_registry(tx).await?;
                Ok(row.unwrap().try_get_by_index::<i64>(0)?)
            })
        })
        .await
        .unwrap()
}

pub(crate) fn first() -> AttemptRef {
    AttemptRef { run: 1, attempt: 1, nonce: Nonce(fresh()) }
}

fn outcome_of(job: JobId, attempt: AttemptRef, result: v1::outcome::Result) -> v1::Outcome {
    v1::Outcome {
        attempt: Some(attempt_to_wire(&job, &attempt)),
        result: Some(result),
        started_at_ms: ringback_service_runtime::time::now_ms(),
        execution_ms: 3,
        ..v1::Outcome::default()
    }
}

pub(crate) fn success(job: JobId, attempt: AttemptRef, output: &'static str) -> v1::Outcome {
    let output = Some(payload_of(Bytes::from_static(output.as_bytes())));
    outcome_of(job, attempt, v1::outcome::Result::Success(v1::Success { output }))
}

pub(crate) fn failure(job: JobId, attempt: AttemptRef, error: &str) -> v1::Outcome {
    let failure = v1::Failure { error: error.to_owned(), error_type: "ValueError".to_owned(), output: None };
    outcome_of(job, attempt, v1::outcome::Result::Failure(failure))
}

pub(crate) fn crash(job: JobId, attempt: AttemptRef) -> v1::Outcome {
    outcome_of(job, attempt, v1::outcome::Result::Crash(v1::Crash { error: "exit code 3".to_owned() }))
}

pub(crate) fn hand_back(job: JobId, attempt: AttemptRef) -> v1::Outcome {
    let back = v1::HandBack { reason: "drain".to_owned() };
    outcome_of(job, attempt, v1::outcome::Result::HandBack(back))
}

pub(crate) fn beat_of(worker: &str, attempts: &[(JobId, AttemptRef)]) -> v1::Heartbeat {
    v1::Heartbeat {
        version: VERSION,
        worker_id: worker.to_owned(),
        full: true,
        attempts: attempts
            .iter()
            .map(|(job, r)| v1::Beat {
                attempt: Some(attempt_to_wire(job, r)),
                started_at_ms: ringback_service_runtime::time::now_ms(),
                progress: Bytes::new(),
            })
            .collect(),
        slots: vec![v1::WorkerSlots {
            endpoint_id: ENDPOINT.0,
            total: 4,
            busy: 1,
            unavailable: String::new(),
        }],
        device: "cpu".to_owned(),
        draining: false,
        replaces: Vec::new(),
    }
}

/// The subject of a job's message.
pub(crate) fn subject(job: JobId, run: u32, publish: u32) -> JobSubject {
    JobSubject { shard: 1, endpoint: ENDPOINT, lane: Lane::Hi, job, run, publish }
}
