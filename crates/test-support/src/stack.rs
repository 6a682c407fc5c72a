//! A whole Ringback from the real binary: one process (`ringback dev`) or one per service (`ringback serve`).

mod config;

pub use config::Options;

use crate::client::Client;
use crate::files::{Folder, free_port};
use crate::forwarder::Forwarder;
use crate::nats::NatsServer;
use crate::postgres::Postgres;
use crate::process::{Process, Spec};
use crate::receiver::Receiver;
use crate::signature::new_secret;
use crate::sql::Sql;
use crate::tools;
use crate::wait::until;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// Longest time a process may take to be ready on a busy machine.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// Which database a test runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// The embedded one.
    Sqlite,
    /// A real server of its own.
    Postgres,
}

/// A service, or all of them in one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// `ringback dev`.
    Dev,
    /// `ringback serve api`.
    Api,
    /// `ringback serve tracker`.
    Tracker,
    /// `ringback serve worker`.
    Worker,
    /// `ringback serve dispatcher`.
    Dispatcher,
    /// `ringback serve reconciler`.
    Reconciler,
}

impl Role {
    /// All services apart.
    pub const APART: [Self; 5] = [Self::Tracker, Self::Worker, Self::Dispatcher, Self::Reconciler, Self::Api];

    /// Its word on the command line.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Dev => "dev",
            Self::Api => "api",
            Self::Tracker => "tracker",
            Self::Worker => "worker",
            Self::Dispatcher => "dispatcher",
            Self::Reconciler => "reconciler",
        }
    }

    /// The role that has a fault point, told by its first word; `api.commit.after` belongs to the API.
    #[must_use]
    pub fn of_fault(point: &str) -> Self {
        match point.split('.').next() {
            Some("api") => Self::Api,
            Some("tracker") => Self::Tracker,
            Some("worker") => Self::Worker,
            Some("dispatcher") => Self::Dispatcher,
            Some("reconciler") => Self::Reconciler,
            _ => panic!("no role has the fault point {point}"),
        }
    }
}

/// The key that may only read, beside another one of its project.
fn reader_key(key: &str) -> String {
    format!("{key}_reader")
}

fn sqlite_in(folder: &Folder) -> String {
    format!("sqlite:{}", folder.path().join("ringback.db").display())
}

#[derive(Debug)]
struct Instance {
    role: Role,
    ops_port: u16,
    process: Process,
}

/// A running Ringback with its broker, its database and a receiver. Everything ends with it.
#[derive(Debug)]
pub struct Stack {
    // Processes first: they end before what they use.
    instances: BTreeMap<String, Instance>,
    /// The broker, for tests that stop it or delete its store.
    pub nats: NatsServer,
    /// The PostgreSQL cluster, where the test runs on one.
    pub postgres: Option<Postgres>,
    /// What Ringback's processes take for the cluster, where [`Options::forwarded`] is set.
    pub forwarder: Option<Forwarder>,
    /// Where webhooks arrive.
    pub receiver: Receiver,
    /// A client with an admin key of the project `default`.
    pub api: Client,
    /// A client with a key of the project `other`.
    pub other: Client,
    /// The secret that signs webhooks.
    pub secret: String,
    database_url: String,
    options: Options,
    /// Variables that the processes of a name get.
    variables: Vec<(String, String, String)>,
    folder: Folder,
    started_at: Instant,
}

impl Stack {
    /// `ringback dev` with its services in one process; `None` where something is missing and may be skipped.
    pub async fn dev(options: Options) -> Option<Self> {
        let mut stack = Self::prepare(options).await?;
        stack.start(Role::Dev).await;
        Some(stack)
    }

    /// One process per service; `None` where something is missing and may be skipped.
    pub async fn apart(options: Options) -> Option<Self> {
        let mut stack = Self::prepare(options).await?;
        stack.start_apart().await;
        Some(stack)
    }

    /// Starts one process per service in a prepared stack.
    pub async fn start_apart(&mut self) {
        self.migrate();
        for role in Role::APART {
            self.spawn(role, role.word(), None);
        }
        for role in Role::APART {
            self.wait_ready(role.word()).await;
        }
    }

    /// Broker, database, receiver and configuration, but no process of Ringback.
    pub async fn prepare(options: Options) -> Option<Self> {
        let folder = Folder::new("stack");
        let nats = NatsServer::start(folder.path()).await?;
        let mut forwarder = None;
        let (postgres, database_url) = match options.backend {
            Backend::Sqlite => (None, sqlite_in(&folder)),
            Backend::Postgres => {
                let server = Postgres::start().await?;
                let mut url = server.database("ringback").await;
                if options.forwarded {
                    let way = forwarder.insert(Forwarder::start(server.port()).await);
                    url = server.url_at(way.port(), "ringback");
                }
                (Some(server), url)
            }
        };
        Some(Self::put_together(options, folder, nats, postgres, forwarder, database_url).await)
    }

    /// [`Self::prepare`] with a database of its own on the servers of another stack, which must outlive this one.
    pub async fn prepare_beside(&self, options: Options) -> Self {
        let folder = Folder::new("stack");
        let database_url = match &self.postgres {
            Some(server) => server.database(&format!("ringback_{}", uuid::Uuid::now_v7().simple())).await,
            None => sqlite_in(&folder),
        };
        Self::put_together(options, folder, self.nats.guest(), None, None, database_url).await
    }

    async fn put_together(
        options: Options,
        folder: Folder,
        nats: NatsServer,
        postgres: Option<Postgres>,
        forwarder: Option<Forwarder>,
        database_url: String,
    ) -> Self {
        let secret = options.secret.clone().unwrap_or_else(new_secret);
        let receiver = Receiver::start(&secret).await;
        let listen = free_port();
        let key = format!("rb_admin_{}", uuid::Uuid::now_v7().simple());
        let other = format!("rb_other_{}", uuid::Uuid::now_v7().simple());
        let api = Client::new(&format!("http://127.0.0.1:{listen}"), &key);
        let other = api.with_key(&other);
        Self {
            instances: BTreeMap::new(),
            nats,
            postgres,
            forwarder,
            receiver,
            api,
            other,
            secret,
            database_url,
            options,
            variables: Vec::new(),
            folder,
            started_at: Instant::now(),
        }
    }

    /// Starts a role under its own name and waits until it is ready.
    pub async fn start(&mut self, role: Role) {
        self.spawn(role, role.word(), None);
        self.wait_ready(role.word()).await;
    }

    /// Starts a further process of a role (`name` must be new) and waits until it is ready.
    pub async fn start_as(&mut self, role: Role, name: &str) {
        self.spawn(role, name, None);
        self.wait_ready(name).await;
    }

    /// Starts a process without waiting; `fault` is a `RINGBACK_FAULT`, for example `tracker.commit.after@1`.
    pub fn spawn(&mut self, role: Role, name: &str, fault: Option<&str>) {
        assert!(!self.is_running(name), "{name} runs already");
        let ops_port = free_port();
        let config = self.folder.path().join(format!("{name}.toml"));
        std::fs::write(&config, self.config_text(role, name, ops_port)).expect("write a configuration");
        let mut spec = Spec::new(name, tools::ringback(), self.folder.path()).env("RUST_BACKTRACE", "1");
        spec = match role {
            Role::Dev => spec.args(["dev"]),
            _ => spec.args(["serve", role.word()]),
        };
        spec = spec.args(["--config".into(), config.into_os_string()]);
        if let Some(fault) = fault {
            spec = spec.env("RINGBACK_FAULT", fault);
        }
        for (_, variable, value) in self.variables.iter().filter(|(of, ..)| of == name) {
            spec = spec.env(variable, value);
        }
        let process = Process::spawn(spec);
        self.instances.insert(name.to_owned(), Instance { role, ops_port, process });
    }

    /// Processes started under this name from now on get a variable.
    pub fn set_variable(&mut self, name: &str, variable: &str, value: &str) {
        self.variables.push((name.to_owned(), variable.to_owned(), value.to_owned()));
    }

    /// [`Self::spawn`] in the place of a process that has ended.
    pub fn spawn_over(&mut self, role: Role, name: &str, fault: Option<&str>) {
        assert!(!self.is_running(name), "{name} runs still");
        self.instances.remove(name);
        self.spawn(role, name, fault);
    }

    /// Runs `ringback migrate`.
    pub fn migrate(&self) {
        let config = self.folder.path().join("migrate.toml");
        std::fs::write(&config, self.config_text(Role::Api, "migrate", free_port()))
            .expect("write a configuration");
        let output = self.command(["migrate".as_ref(), "--config".as_ref(), config.as_os_str()]);
        assert!(
            output.status.success(),
            "ringback migrate failed:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Runs a client verb of the CLI against this API, with its key.
    #[must_use]
    pub fn cli<I, S>(&self, args: I) -> std::process::Output
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        self.command(args)
    }

    fn command<I, S>(&self, args: I) -> std::process::Output
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        std::process::Command::new(tools::ringback())
            .args(args)
            .env("RINGBACK_URL", self.api.base())
            .env("RINGBACK_API_KEY", self.api.key())
            .current_dir(self.folder.path())
            .stdin(std::process::Stdio::null())
            .output()
            .expect("run ringback")
    }

    /// Waits until a process says that it is ready, and panics with its log if it ends before.
    pub async fn wait_ready(&mut self, name: &str) {
        let instance = self.instances.get_mut(name).unwrap_or_else(|| panic!("no process {name}"));
        let probe = match instance.role {
            Role::Dev | Role::Api => self.api.clone(),
            _ => Client::new(&format!("http://127.0.0.1:{}", instance.ops_port), ""),
        };
        let process = std::sync::Mutex::new(&mut instance.process);
        until(&format!("{name} to be ready"), READY_WITHIN, || async {
            if let Some(status) = process.lock().unwrap().exit_status() {
                panic!("{name} ended with {status} before it was ready");
            }
            probe.is_ready().await.then_some(())
        })
        .await;
    }

    /// Whether a process runs.
    pub fn is_running(&mut self, name: &str) -> bool {
        self.instances.get_mut(name).is_some_and(|instance| instance.process.is_running())
    }

    /// The process of a name.
    pub fn process(&mut self, name: &str) -> &mut Process {
        &mut self.instances.get_mut(name).unwrap_or_else(|| panic!("no process {name}")).process
    }

    /// `kill -9`.
    pub fn kill9(&mut self, name: &str) {
        self.process(name).kill9();
    }

    /// Ends a process in order.
    pub fn terminate(&mut self, name: &str) -> std::process::ExitStatus {
        self.process(name).terminate(Duration::from_secs(40))
    }

    /// Waits until a process has died of its fault point.
    pub async fn wait_dead(&mut self, name: &str, within: Duration) {
        use std::os::unix::process::ExitStatusExt as _;
        let process = std::sync::Mutex::new(self.process(name));
        let status = until(&format!("{name} to die at its fault point"), within, || async {
            process.lock().unwrap().exit_status()
        })
        .await;
        assert_eq!(status.signal(), Some(9), "{name} ended otherwise: {status}");
    }

    /// Starts a process again after its death, under the same name, without a fault.
    pub async fn start_again(&mut self, name: &str) {
        let role = self.instances[name].role;
        self.instances.remove(name);
        self.spawn(role, name, None);
        self.wait_ready(name).await;
    }

    /// Base URL of a process's health and metrics.
    #[must_use]
    pub fn ops(&self, name: &str) -> Client {
        let instance = &self.instances[name];
        match instance.role {
            Role::Dev | Role::Api => self.api.clone(),
            _ => Client::new(&format!("http://127.0.0.1:{}", instance.ops_port), ""),
        }
    }

    /// A client of the project `default` that may only read.
    #[must_use]
    pub fn reader(&self) -> Client {
        self.api.with_key(&reader_key(self.api.key()))
    }

    /// Which database it runs on.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.options.backend
    }

    /// A connection to the database, from outside.
    pub async fn sql(&self) -> Sql {
        Sql::open(&self.database_url).await
    }

    /// The folder of this stack: logs, data, configurations.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The data folder of a process.
    #[must_use]
    pub fn data_dir(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(format!("data-{name}"))
    }

    /// When the stack began.
    #[must_use]
    pub fn started_at(&self) -> Instant {
        self.started_at
    }

    /// Everything a process has logged.
    #[must_use]
    pub fn log(&self, name: &str) -> String {
        self.instances[name].process.log()
    }

    fn config_text(&self, role: Role, name: &str, ops_port: u16) -> String {
        let folder = self.folder.path().display();
        let mut options = self.options.clone();
        let quoted = |text: &str| format!("{text:?}");
        options.set_default("server", "listen", &quoted(self.api.base().trim_start_matches("http://")));
        if !matches!(role, Role::Dev | Role::Api) {
            options.set_default("server", "ops_listen", &quoted(&format!("127.0.0.1:{ops_port}")));
        }
        options.set_default("data", "dir", &quoted(&self.data_dir(name).display().to_string()));
        // Shared by all processes, as a mounted secret and a bucket would be.
        options.set_default("data", "secret_key_file", &quoted(&format!("{folder}/secret.key")));
        options.set_default("blobs", "url", &quoted(&format!("{folder}/blobs")));
        options.set_default("database", "url", &quoted(&self.database_url));
        options.set_default("nats", "url", &quoted(&self.nats.url()));
        options.set_default("nats", "user", &quoted(NatsServer::USER));
        options.set_default("nats", "password", &quoted(self.nats.password()));
        options.set_default("nats", "install", "\"test\"");
        options.text(&[
            ("default", self.api.key(), r#"["admin"]"#, Some(&self.secret)),
            ("other", self.other.key(), r#"["submit", "read"]"#, None),
        ])
    }
}
