//! The real API in this process on a port, with a real nats-server and a real database.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use bytes::Bytes;
use ringback_api_ingest::{App, Deps};
use ringback_bus::{Bus, Verb};
use ringback_contracts::{Message as _, VERSION, attempt_to_wire, payload_of, v1};
use ringback_domain::{AttemptRef, JobId, Nonce};
use ringback_service_runtime::{Readiness, RingbackConfig, Shutdown, blobs::BlobStore};
use ringback_store::{Open, Store, secrets::SecretKey};
use ringback_test_support::{
    client::Client, files::Folder, nats::NatsServer, postgres::Postgres, sql::Sql, stack::Backend,
    wait::until_true,
};

pub const ADMIN: &str = "rb_admin_0123456789abcdef";
pub const SUBMIT_ONLY: &str = "rb_submit_0123456789abcdef";
pub const READ_ONLY: &str = "rb_read_0123456789abcdef";
pub const OTHER: &str = "rb_other_0123456789abcdef";

/// A running API. Parts end in the order of the fields.
pub struct Server {
    pub api: Client,
    pub store: Store,
    pub bus: Bus,
    pub config: RingbackConfig,
    shutdown: Shutdown,
    task: Option<tokio::task::JoinHandle<()>>,
    pub nats: NatsServer,
    pub postgres: Option<Postgres>,
    url: String,
    pub folder: Folder,
}

/// Two projects, a few endpoints, receivers on loopback allowed.
pub fn base_config(more: &str) -> String {
    format!(
        r#"
[webhooks]
allow_loopback = true
allow_http = true
[projects.default]
api_keys = [
  {{ name = "admin", key = "{ADMIN}", scopes = ["admin"] }},
  {{ name = "submit", key = "{SUBMIT_ONLY}", scopes = ["submit"] }},
  {{ name = "read", key = "{READ_ONLY}", scopes = ["read"] }},
]
[projects.other]
api_keys = [{{ name = "other", key = "{OTHER}", scopes = ["admin"] }}]
[[endpoints]]
name = "echo"
executor = {{ builtin = "echo" }}
[[endpoints]]
name = "loud"
executor = {{ builtin = "echo" }}
webhook_events = "all"
[[endpoints]]
project = "other"
name = "echo"
executor = {{ builtin = "echo" }}
{more}
"#
    )
}

impl Server {
    /// Starts everything; `None` where something is missing and may be skipped.
    pub async fn start(backend: Backend, server_section: &str, more: &str) -> Option<Self> {
        ringback_service_runtime::crypto_provider::install();
        let folder = Folder::new("api");
        let nats = NatsServer::start(folder.path()).await?;
        let (postgres, url) = match backend {
            Backend::Sqlite => (None, format!("sqlite:{}", folder.path().join("ringback.db").display())),
            Backend::Postgres => {
                let server = Postgres::start().await?;
                let url = server.database("ringback").await;
                (Some(server), url)
            }
        };
        let text = format!("[server]\nlisten = \"127.0.0.1:0\"\n{server_section}\n{}", base_config(more));
        let mut config = RingbackConfig::from_toml(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        config.data.dir = folder.path().join("data");
        std::fs::create_dir_all(&config.data.dir).unwrap();
        config.nats.url = Some(nats.url());
        config.nats.user = Some(NatsServer::USER.to_owned());
        config.nats.password = Some(nats.password().to_owned().into());
        config.nats.install = "api-test".to_owned();
        config.nats.request_timeout_ms = 1_000;
        Store::migrate(&Open::url(url.clone())).await.unwrap();
        let store = Store::open(&Open::url(url.clone())).await.unwrap();
        let bus = Bus::connect(&config.nats, "api-test").await.unwrap();
        bus.connected(Duration::from_secs(10)).await.unwrap();
        let mut server = Self {
            api: Client::new("http://127.0.0.1:1", ADMIN),
            store,
            bus,
            config,
            shutdown: Shutdown::new(),
            task: None,
            nats,
            postgres,
            url,
            folder,
        };
        server.serve().await;
        Some(server)
    }

    async fn serve(&mut self) {
        self.shutdown = Shutdown::new();
        let deps = Deps {
            store: self.store.clone(),
            bus: self.bus.clone(),
            blobs: BlobStore::open(&self.config.blobs, &self.config.data.dir).unwrap(),
            key: SecretKey::open(&self.config.data.secret_key_path()).unwrap(),
            readiness: Readiness::new(),
            shutdown: self.shutdown.clone(),
        };
        let app = App::build(&self.config, deps).await.unwrap();
        self.api = Client::new(&format!("http://{}", app.local_addr()), ADMIN);
        self.task = Some(tokio::spawn(app.run()));
        let api = self.api.clone();
        until_true("the API to be ready", Duration::from_secs(20), || api.is_ready()).await;
    }

    /// A further server on the same database and broker, as a second replica has them.
    pub async fn second(&mut self) -> Client {
        let store = Store::open(&Open::url(self.url.clone())).await.unwrap();
        let deps = Deps {
            store,
            bus: Bus::connect(&self.config.nats, "api-test-2").await.unwrap(),
            blobs: self.blobs(),
            key: SecretKey::open(&self.config.data.secret_key_path()).unwrap(),
            readiness: Readiness::new(),
            shutdown: self.shutdown.clone(),
        };
        let app = App::build(&self.config, deps).await.unwrap();
        let api = Client::new(&format!("http://{}", app.local_addr()), ADMIN);
        tokio::spawn(app.run());
        until_true("the second API to be ready", Duration::from_secs(20), || api.is_ready()).await;
        api
    }

    /// The real state-tracker beside the API. Returns once it answers.
    pub async fn tracker(&self) {
        let handles = ringback_state_tracker::Handles {
            store: self.store.clone(),
            bus: self.bus.clone(),
            secret_key: SecretKey::open(&self.config.data.secret_key_path()).unwrap(),
            public_url: "http://public.test".to_owned(),
            readiness: Readiness::new(),
        };
        let app = ringback_state_tracker::App::build(&self.config, handles);
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move { app.run(shutdown).await.unwrap() });
        let bus = self.bus.clone();
        until_true("the tracker to answer", Duration::from_secs(10), || async {
            let nothing = v1::OutcomeBatch { version: VERSION, worker_id: "probe".into(), outcomes: vec![] };
            bus.request(Verb::Outcomes, nothing.encode_to_vec().into(), Duration::from_secs(1)).await.is_ok()
        })
        .await;
    }

    /// What a worker says about the first attempt of a job's run.
    pub fn attempt(&self, id: &str, run: u32) -> Attempt {
        let job = JobId::parse_public(id).unwrap().0;
        Attempt { bus: self.bus.clone(), job, at: AttemptRef { run, attempt: 1, nonce: Nonce(7) } }
    }

    pub fn submit_only(&self) -> Client {
        self.api.with_key(SUBMIT_ONLY)
    }
    pub fn read_only(&self) -> Client {
        self.api.with_key(READ_ONLY)
    }
    pub fn other(&self) -> Client {
        self.api.with_key(OTHER)
    }

    /// A connection of its own to the database.
    pub async fn sql(&self) -> Sql {
        Sql::open(&self.url).await
    }

    pub fn blobs(&self) -> BlobStore {
        BlobStore::open(&self.config.blobs, &self.config.data.dir).unwrap()
    }

    /// Begins the drain.
    pub fn drain(&self) {
        self.shutdown.trigger();
    }

    /// Waits for the end of the drain.
    pub async fn ended(&mut self) {
        if let Some(task) = self.task.take() {
            tokio::time::timeout(Duration::from_secs(20), task).await.expect("the drain ends").unwrap();
        }
    }
}

const WITHIN: Duration = Duration::from_secs(10);

/// A worker's voice: the messages that a real one sends.
pub struct Attempt {
    bus: Bus,
    job: JobId,
    pub at: AttemptRef,
}

impl Attempt {
    fn wire(&self) -> Option<v1::Attempt> {
        Some(attempt_to_wire(&self.job, &self.at))
    }

    async fn beat(&self, progress: Bytes) {
        let beat = v1::Beat {
            attempt: self.wire(),
            started_at_ms: ringback_service_runtime::time::now_ms(),
            progress: Some(progress).filter(|p| !p.is_empty()).unwrap_or_default(),
        };
        let heartbeat = v1::Heartbeat {
            version: VERSION,
            worker_id: "w1".into(),
            attempts: vec![beat],
            ..v1::Heartbeat::default()
        };
        self.bus.request(Verb::Beat, heartbeat.encode_to_vec().into(), WITHIN).await.unwrap();
    }

    pub async fn start(&self) {
        self.beat(Bytes::new()).await;
    }

    pub async fn progress(&self, json: &str) {
        self.beat(Bytes::copy_from_slice(json.as_bytes())).await;
    }

    pub async fn chunk(&self, n: u32, json: &str) {
        let chunk = v1::Chunk {
            attempt: self.wire(),
            n,
            output: Bytes::copy_from_slice(json.as_bytes()),
            started_at_ms: ringback_service_runtime::time::now_ms(),
        };
        let batch = v1::ChunkBatch { version: VERSION, worker_id: "w1".into(), chunks: vec![chunk] };
        self.bus.request(Verb::Chunks, batch.encode_to_vec().into(), WITHIN).await.unwrap();
    }

    pub async fn succeed(&self, output: v1::Payload) {
        self.end(v1::outcome::Result::Success(v1::Success { output: Some(output) })).await;
    }

    pub async fn succeed_with(&self, json: &str) {
        self.succeed(payload_of(Bytes::copy_from_slice(json.as_bytes()))).await;
    }

    pub async fn fail(&self, error: &str) {
        let failure = v1::Failure { error: error.into(), ..v1::Failure::default() };
        self.end(v1::outcome::Result::Failure(failure)).await;
    }

    async fn end(&self, result: v1::outcome::Result) {
        let outcome = v1::Outcome {
            attempt: self.wire(),
            result: Some(result),
            started_at_ms: ringback_service_runtime::time::now_ms(),
            execution_ms: 12,
            logs: Some(payload_of(Bytes::from_static(b"one line"))),
            ..v1::Outcome::default()
        };
        let batch = v1::OutcomeBatch { version: VERSION, worker_id: "w1".into(), outcomes: vec![outcome] };
        let reply = self.bus.request(Verb::Outcomes, batch.encode_to_vec().into(), WITHIN).await.unwrap();
        let reply = v1::OutcomeReply::decode(reply).unwrap();
        assert_eq!(reply.verdicts, [v1::Verdict::Committed as i32]);
    }
}
