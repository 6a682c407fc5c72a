//! Broker, database and receiver of one test, and the hands of api-ingest and tracker.

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]
#![allow(dead_code, unreachable_pub, reason = "several tests share this module, none uses all of it")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ringback_bus::{Bus, DeliveryAnnouncer};
use ringback_contracts::{Message as _, v1};
use ringback_domain::target::{BodyFormat, REGISTERED_TARGET_BASE, Target, WebhookFormat};
use ringback_domain::webhook::body::{self, Json, Terminal};
use ringback_domain::{JobId, JobStatus, ProjectId, TimestampMs};
use ringback_egress::{Lookup, SystemLookup};
use ringback_service_runtime::blobs::BlobStore;
use ringback_service_runtime::config::BlobsConfig;
use ringback_service_runtime::time::now_ms;
use ringback_service_runtime::{Readiness, Redacted, RingbackConfig, Shutdown, crypto_provider};
use ringback_store::deliveries::{
    AttemptView, DeliveryState, DeliveryView, JobTransition, attempts_of, deliveries_of, insert_deliveries,
    job_delivery, partition_of,
};
use ringback_store::partitions::leases;
use ringback_store::replays::{self, Replay, ReplayFilter};
use ringback_store::replays_api::{self, NewReplay};
use ringback_store::secrets::{SecretKey, add_secret};
use ringback_store::webhooks::crud::{self, Health, NewWebhook, Settings};
use ringback_store::webhooks::secrets::seal_secret;
use ringback_store::{Open, Store, Urgency};
use ringback_test_support::files::Folder;
use ringback_test_support::nats::NatsServer;
use ringback_test_support::receiver::Receiver;
use ringback_test_support::signature::new_secret;
use ringback_test_support::wait::until;
use ringback_webhook_dispatcher::{App, Deps};
use tokio::runtime::Runtime;
use uuid::Uuid;

pub const PROJECT: ProjectId = ProjectId(1);
pub const SOON: Duration = Duration::from_secs(20);
pub const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

pub struct Rig {
    pub config: RingbackConfig,
    pub store: Store,
    pub announcer: DeliveryAnnouncer,
    pub key: SecretKey,
    pub receiver: Receiver,
    pub nats: NatsServer,
    pub folder: Folder,
    pub secret: String,
}

/// A registered webhook of a test.
#[derive(Debug, Clone)]
pub struct Hook {
    pub id: u32,
    pub public_id: String,
}

impl Hook {
    pub fn target(&self) -> u32 {
        REGISTERED_TARGET_BASE + self.id
    }
}

impl Rig {
    pub async fn start() -> Option<Self> {
        Self::start_with(|_| {}).await
    }

    /// With another configuration.
    pub async fn start_with(change: impl FnOnce(&mut RingbackConfig)) -> Option<Self> {
        crypto_provider::install();
        let folder = Folder::new("dispatch");
        let broker = folder.path().join("nats");
        std::fs::create_dir(&broker).unwrap();
        let nats = NatsServer::start(&broker).await?;
        let mut config = RingbackConfig::default();
        config.nats.url = Some(nats.url());
        config.nats.user = Some(NatsServer::USER.to_owned());
        config.nats.password = Some(Redacted::new(nats.password().to_owned()));
        config.nats.install = format!("t{}", Uuid::now_v7().simple());
        config.data.dir = folder.path().to_owned();
        config.webhooks.allow_loopback = true;
        config.webhooks.partition_lease_ms = 3_000;
        config.webhooks.deadline_ms = 1_500;
        change(&mut config);
        Store::migrate(&open(folder.path())).await.unwrap();
        let store = Store::open(&open(folder.path())).await.unwrap();
        let bus = Bus::connect(&config.nats, "test").await.unwrap();
        bus.connected(SOON).await.unwrap();
        let key = SecretKey::open(&config.data.secret_key_path()).unwrap();
        let secret = new_secret();
        let rig = Self {
            announcer: DeliveryAnnouncer::new(bus, store.facts().partitions),
            receiver: Receiver::start(&secret).await,
            config,
            store,
            key,
            nats,
            folder,
            secret: secret.clone(),
        };
        rig.add_secret(&secret).await;
        Some(rig)
    }

    pub async fn add_secret(&self, secret: &str) {
        let (key, secret) = (self.key.clone(), Redacted::new(secret.to_owned()));
        self.store
            .write(Urgency::Now, move |tx| {
                let (key, secret) = (key.clone(), secret.clone());
                Box::pin(async move { add_secret(tx, &key, PROJECT, &secret).await })
            })
            .await
            .unwrap();
    }

    /// Registers a webhook that hears of nothing by itself: the test owes it what it wants. `change` sets the rest.
    pub async fn hook(&self, url: &str, change: impl FnOnce(&mut Settings)) -> Hook {
        let mut settings = Settings {
            label: String::new(),
            url: Some(url.to_owned()),
            format: WebhookFormat::Standard,
            filter: r#"{"events":["webhook.test"]}"#.to_owned(),
            headers_encrypted: None,
            retry: None,
            rate_per_second: None,
            deadline_ms: None,
            strict_order: false,
            paused: false,
        };
        change(&mut settings);
        let public_id = format!("wh_{}", Uuid::now_v7().simple());
        let new = NewWebhook {
            secret_encrypted: self.seal(&public_id, &self.secret),
            public_id: public_id.clone(),
            project: PROJECT,
            settings,
            expires_in_ms: None,
        };
        let made = self
            .store
            .write(Urgency::Now, move |tx| {
                let new = new.clone();
                Box::pin(async move { crud::create(tx, &new, 1_000).await })
            })
            .await
            .unwrap();
        let crud::Created::Made(row) = made else { panic!("made") };
        Hook { id: u32::try_from(row.id).unwrap(), public_id }
    }

    pub fn seal(&self, public_id: &str, secret: &str) -> Vec<u8> {
        seal_secret(&self.key, public_id, &Redacted::new(secret.to_owned())).unwrap()
    }

    /// Changes a webhook as its owner does.
    pub async fn change(&self, hook: &Hook, change: impl Fn(&mut Settings)) {
        let now = self.store.now_ms().await.unwrap();
        let row = crud::get(self.store.read(), PROJECT, &hook.public_id, now).await.unwrap().unwrap();
        let mut settings = row.settings();
        change(&mut settings);
        let done = self
            .store
            .write(Urgency::Now, move |tx| {
                let (row, settings) = (row.clone(), settings.clone());
                Box::pin(async move { crud::update(tx, &row, &settings, None).await })
            })
            .await
            .unwrap();
        assert!(matches!(done, crud::Updated::Done(_)));
    }

    pub async fn health(&self, hook: &Hook) -> Health {
        let now = self.store.now_ms().await.unwrap();
        crud::get(self.store.read(), PROJECT, &hook.public_id, now).await.unwrap().unwrap().health
    }

    /// Makes a replay and says so, as api-ingest does.
    pub async fn replay(&self, bus: &Bus, filter: ReplayFilter, rate: u32) -> Replay {
        let read = self.store.read();
        let (id, upto_position) = (Uuid::now_v7(), replays_api::upto_now(read).await.unwrap());
        let matched = replays::count(read, PROJECT, &filter, upto_position).await.unwrap();
        let new = NewReplay { id, project: PROJECT, filter, rate_per_second: rate, upto_position, matched };
        self.store
            .write(Urgency::Now, move |tx| {
                let new = new.clone();
                Box::pin(async move { replays_api::insert(tx, &new).await })
            })
            .await
            .unwrap();
        assert!(bus.announce_replays().await);
        replays::get(read, PROJECT, id).await.unwrap().unwrap()
    }

    pub async fn bus(&self) -> Bus {
        let bus = Bus::connect(&self.config.nats, "api").await.unwrap();
        bus.connected(SOON).await.unwrap();
        bus
    }

    /// Runs a statement that a person at the database might run.
    pub async fn sql(&self, statement: String) {
        self.store
            .write(Urgency::Now, move |tx| {
                let statement = statement.clone();
                Box::pin(async move { ringback_store::sql::execute(tx.conn(), &statement, []).await })
            })
            .await
            .unwrap();
    }

    /// Commits deliveries without telling anybody.
    pub async fn commit(&self, deliveries: &[v1::Delivery]) {
        let (partitions, rows) = (self.store.facts().partitions, Arc::new(deliveries.to_vec()));
        self.store
            .write(Urgency::Now, move |tx| {
                let rows = Arc::clone(&rows);
                Box::pin(async move { insert_deliveries(tx, partitions, &rows).await })
            })
            .await
            .unwrap();
    }

    /// Commits deliveries and announces them, as the tracker does.
    pub async fn owe(&self, deliveries: &[v1::Delivery]) {
        self.commit(deliveries).await;
        self.announce(deliveries).await;
    }

    /// Announces as the tracker does.
    pub async fn announce(&self, deliveries: &[v1::Delivery]) {
        let mut of: BTreeMap<u16, Vec<v1::Delivery>> = BTreeMap::new();
        for d in deliveries {
            let partition = partition_of(&d.owner_id, self.store.facts().partitions);
            of.entry(partition).or_default().push(d.clone());
        }
        for (partition, deliveries) in of {
            let sent = self.announcer.announce(partition, |publisher, counter| {
                v1::DeliveryEvents { publisher, counter, deliveries }.encode_to_vec().into()
            });
            assert!(sent.await);
        }
    }

    pub async fn view(&self, job: JobId) -> Vec<DeliveryView> {
        deliveries_of(self.store.read(), PROJECT, Uuid::from_bytes(*job.as_bytes())).await.unwrap()
    }

    pub async fn tries(&self, job: JobId) -> Vec<AttemptView> {
        attempts_of(self.store.read(), PROJECT, Uuid::from_bytes(*job.as_bytes())).await.unwrap()
    }

    /// Waits until all deliveries of a job have this state.
    pub async fn ends(&self, job: JobId, state: DeliveryState) -> Vec<DeliveryView> {
        until(&format!("{job} to be {}", state.as_str()), SOON, || async {
            let view = self.view(job).await;
            view.iter().all(|d| d.state == state).then_some(view)
        })
        .await
    }

    /// How many partitions each dispatcher owns.
    pub async fn owners(&self) -> BTreeMap<String, usize> {
        let mut owners = BTreeMap::new();
        for lease in leases(self.store.read()).await.unwrap() {
            *owners.entry(lease.owner).or_default() += 1;
        }
        owners
    }

    pub fn url(&self, path: &str) -> String {
        self.receiver.url(path)
    }
}

pub fn open(folder: &Path) -> Open {
    Open::url(format!("sqlite://{}/t.db", folder.display()))
}

/// A dispatcher with a runtime, a store and a connection of its own, so that it can be killed.
pub struct Dispatcher {
    runtime: Option<Runtime>,
    shutdown: Shutdown,
    task: tokio::task::JoinHandle<()>,
}

impl Dispatcher {
    pub fn start(rig: &Rig, alone: bool) -> Self {
        Self::start_with(rig, alone, Arc::new(SystemLookup))
    }

    /// With a resolver of its own.
    pub fn start_with(rig: &Rig, alone: bool, lookup: Arc<dyn Lookup>) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (config, key, shutdown) = (rig.config.clone(), rig.key.clone(), Shutdown::new());
        let (folder, stop) = (rig.folder.path().to_owned(), shutdown.clone());
        let task = runtime.spawn(async move {
            let store = Store::open(&open(&folder)).await.unwrap();
            let bus = Bus::connect(&config.nats, "dispatcher").await.unwrap();
            let blobs = BlobStore::open(&BlobsConfig::default(), &folder).unwrap();
            let readiness = Readiness::new();
            let deps = Deps { store, bus, blobs, key, readiness, shutdown: stop, alone };
            App::build_with_lookup(&config, deps, lookup).unwrap().run().await;
        });
        Self { runtime: Some(runtime), shutdown, task }
    }

    /// Ends at once, wherever it stands.
    pub fn kill(mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// Drains and ends.
    pub async fn stop(mut self) {
        self.shutdown.trigger();
        tokio::time::timeout(SOON, &mut self.task).await.expect("the drain ends").unwrap();
        self.kill();
    }
}

impl Drop for Dispatcher {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub fn job() -> JobId {
    JobId::from_uuid(Uuid::now_v7())
}

pub fn told(job: JobId, seq: u32, status: JobStatus, url: &str) -> v1::Delivery {
    let all = Target::of_submit(None, Some(url), false);
    let of = JobTransition {
        job,
        project: PROJECT,
        seq,
        run: 1,
        status,
        at: TimestampMs(now_ms()),
        traceparent: Some(TRACE),
    };
    let id = job.to_string();
    let body = body::of_transition(
        BodyFormat::RunpodWebhookV2,
        &Terminal {
            id: &id,
            status,
            delay_time_ms: 1,
            execution_time_ms: 2,
            output: Some(Json::Inline(b"{\"n\": 1.50}")),
            error: None,
            echo: None,
        },
    );
    job_delivery(&of, 0, &all[0], body)
}

/// The same for another target.
pub fn to(target: u32, delivery: v1::Delivery) -> v1::Delivery {
    v1::Delivery { target, ..delivery }
}

pub fn end(job: JobId, url: &str) -> v1::Delivery {
    told(job, 3, JobStatus::Completed, url)
}

pub fn life(job: JobId, url: &str) -> Vec<v1::Delivery> {
    vec![
        told(job, 1, JobStatus::InQueue, url),
        told(job, 2, JobStatus::InProgress, url),
        told(job, 3, JobStatus::Completed, url),
    ]
}
