//! The real API in this process on a port, with a real nats-server and a real database.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use ringback_api_ingest::{App, Deps};
use ringback_bus::Bus;
use ringback_service_runtime::{Readiness, RingbackConfig, Shutdown, blobs::BlobStore};
use ringback_store::{Open, Store, secrets::SecretKey};
use ringback_test_support::{
    client::Client, files::Folder, nats::NatsServer, postgres::Postgres, sql::Sql, stack::Backend, wait::until_true,
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
api_keys = [{{ name = "other", key = "{OTHER}" }}]
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
        self.task = Some(tokio::spawn(async move { app.run().await.unwrap() }));
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
        tokio::spawn(async move { app.run().await.unwrap() });
        until_true("the second API to be ready", Duration::from_secs(20), || api.is_ready()).await;
        api
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
