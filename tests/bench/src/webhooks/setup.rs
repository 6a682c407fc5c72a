//! Broker, database, dispatchers, and the hand that owes deliveries.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use ringback_bus::{Bus, DeliveryAnnouncer};
use ringback_contracts::{Message as _, v1};
use ringback_domain::{ProjectId, TimestampMs};
use ringback_service_runtime::Redacted;
use ringback_service_runtime::config::{DataConfig, NatsConfig};
use ringback_store::deliveries::{delivery_counts, insert_deliveries, partition_of};
use ringback_store::secrets::{SecretKey, add_secret};
use ringback_store::{Open, Store, Urgency};
use tempfile::TempDir;
use tokio::process::Command;
use uuid::Uuid;

use super::copies::{Causes, Lapse, Tenure};
use super::{Cli, failed};
use crate::children::{Running, find, free_port};
use crate::error::BenchError;
use crate::instance::WEBHOOK_SECRET;

/// The project that owes everything.
const PROJECT: ProjectId = ProjectId(1);
const READY: Duration = Duration::from_secs(60);

/// The members of a dispatcher's log line that count here.
#[derive(serde::Deserialize)]
struct Said {
    timestamp: String,
    message: String,
    partition: u16,
    tries: Option<u64>,
    renewed_ms_ago: Option<u64>,
}

/// Everything but the receiver.
pub(super) struct Rig {
    /// SQL.
    pub(super) store: Store,
    announcer: DeliveryAnnouncer,
    program: PathBuf,
    config: String,
    starts: u32,
    _nats: Running,
    folder: TempDir,
}

impl Rig {
    /// Starts the broker and sets the database up.
    pub(super) async fn start(cli: &Cli) -> Result<Self, BenchError> {
        let parent = match &cli.data {
            Some(folder) => folder.clone(),
            None => std::env::current_exe()?.parent().map_or_else(|| PathBuf::from("."), Path::to_owned),
        };
        let folder = tempfile::Builder::new().prefix("ringback-count-").tempdir_in(parent)?;
        let port = free_port()?;
        let nats = start_nats(cli, folder.path(), port).await?;
        let url =
            cli.database.clone().unwrap_or_else(|| format!("sqlite://{}/t.db", folder.path().display()));
        let open = Open::url(url.clone());
        Store::migrate(&open).await.map_err(failed)?;
        let store = Store::open(&open).await.map_err(failed)?;
        let config = format!(
            "[data]\ndir = {:?}\n[database]\nurl = {url:?}\n[nats]\nurl = \"nats://127.0.0.1:{port}\"\n\
             [webhooks]\nallow_loopback = true\npartition_lease_ms = 2000\n\
             [telemetry]\nlog_format = \"json\"\nlog_level = \"info,ringback_webhook_dispatcher::ownership=debug\"\n",
            folder.path()
        );
        let data = DataConfig { dir: folder.path().to_owned(), ..DataConfig::default() };
        let key = SecretKey::open(&data.secret_key_path()).map_err(failed)?;
        let secret = Redacted::new(WEBHOOK_SECRET.to_owned());
        store
            .write(Urgency::Now, move |tx| {
                let (key, secret) = (key.clone(), secret.clone());
                Box::pin(async move { add_secret(tx, &key, PROJECT, &secret).await })
            })
            .await
            .map_err(failed)?;
        let nats_config =
            NatsConfig { url: Some(format!("nats://127.0.0.1:{port}")), ..NatsConfig::default() };
        let bus = Bus::connect(&nats_config, "count").await.map_err(failed)?;
        bus.connected(READY).await.map_err(failed)?;
        let announcer = DeliveryAnnouncer::new(bus, store.facts().partitions);
        let beside =
            std::env::current_exe().ok().map(|own| own.with_file_name("ringback-webhook-dispatcher"));
        let program = cli
            .dispatcher
            .clone()
            .or_else(|| beside.filter(|program| program.exists()))
            .unwrap_or_else(|| PathBuf::from("ringback-webhook-dispatcher"));
        Ok(Self { store, announcer, program, config, starts: 0, _nats: nats, folder })
    }

    /// Starts a dispatcher, the next by number; it is ready when it is.
    pub(super) fn dispatcher(&mut self) -> Result<Running, BenchError> {
        self.starts += 1;
        let config = self.folder.path().join(format!("dispatcher-{}.toml", self.starts));
        let text = self.config.clone();
        std::fs::write(&config, text).map_err(|source| BenchError::file(&config, source))?;
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(&config);
        let log = self.log(self.starts);
        let hint = "build it with `cargo build --release -p ringback-webhook-dispatcher` or name it with --dispatcher";
        Running::start("ringback-webhook-dispatcher", command, log, None, hint)
    }

    /// The number of the dispatcher that was started last.
    pub(super) fn starts(&self) -> u32 {
        self.starts
    }

    fn log(&self, start: u32) -> PathBuf {
        self.folder.path().join(format!("dispatcher-{start}.log"))
    }

    /// Owners of partitions, and leases that lapsed with tries in flight, as dispatchers have said.
    pub(super) fn causes(&self) -> Result<Causes, BenchError> {
        let mut causes = Causes::default();
        for process in 1..=self.starts {
            let log = self.log(process);
            let text = std::fs::read(&log).map_err(|source| BenchError::file(&log, source))?;
            for line in text.split(|byte| *byte == b'\n') {
                let Ok(said) = serde_json::from_slice::<Said>(line) else { continue };
                let Some(TimestampMs(at_ms)) = TimestampMs::parse_rfc3339(&said.timestamp) else { continue };
                let partition = said.partition;
                if said.message.starts_with("partition taken") {
                    causes.tenures.push(Tenure { partition, process, from_ms: at_ms });
                }
                if let (Some(tries @ 1..), Some(ago)) = (said.tries, said.renewed_ms_ago)
                    && said.message.starts_with("lease lapsed with")
                {
                    let from_ms = at_ms.saturating_sub_unsigned(ago);
                    causes.lapses.push(Lapse { partition, from_ms, until_ms: at_ms, tries });
                }
            }
        }
        Ok(causes)
    }

    /// Commits deliveries, and announces them as the tracker does if `announced`.
    pub(super) async fn owe(&self, deliveries: Vec<v1::Delivery>, announced: bool) -> Result<(), BenchError> {
        let (partitions, rows) = (self.store.facts().partitions, Arc::new(deliveries));
        let inserted = Arc::clone(&rows);
        self.store
            .write(Urgency::Now, move |tx| {
                let rows = Arc::clone(&inserted);
                Box::pin(async move { insert_deliveries(tx, partitions, &rows).await })
            })
            .await
            .map_err(failed)?;
        if !announced {
            return Ok(());
        }
        let mut of: BTreeMap<u16, Vec<v1::Delivery>> = BTreeMap::new();
        for d in rows.iter() {
            of.entry(partition_of(&d.owner_id, partitions)).or_default().push(d.clone());
        }
        for (partition, deliveries) in of {
            self.announcer
                .announce(partition, |publisher, counter| {
                    v1::DeliveryEvents { publisher, counter, deliveries }.encode_to_vec().into()
                })
                .await;
        }
        Ok(())
    }

    /// Owed, delivered and neither, as SQL counts them.
    pub(super) async fn books(&self) -> Result<(u64, u64, u64), BenchError> {
        let counts = delivery_counts(self.store.read()).await.map_err(failed)?;
        Ok((counts.pending, counts.delivered, counts.total() - counts.pending - counts.delivered))
    }
}

async fn start_nats(cli: &Cli, folder: &Path, port: u16) -> Result<Running, BenchError> {
    let program = cli
        .nats_server
        .clone()
        .or_else(|| find("nats-server", &[PathBuf::from(".tools/bin")]))
        .ok_or_else(|| failed("nats-server is missing: name it with --nats-server"))?;
    let config = folder.join("nats.conf");
    let text = format!(
        "listen: \"127.0.0.1:{port}\"\nmax_payload: 8MB\njetstream {{ store_dir: \"{}\" }}\n",
        folder.join("nats").display()
    );
    std::fs::write(&config, text).map_err(|source| BenchError::file(&config, source))?;
    let mut command = Command::new(program);
    command.arg("-c").arg(&config);
    let mut nats = Running::start("nats-server", command, folder.join("nats.log"), None, "")?;
    let answers = async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok();
    nats.until_ready("a listening port", READY, answers).await?;
    Ok(nats)
}

/// One delivery with the number `n` in its body.
pub(super) fn delivery(owner: Uuid, seq: u32, last: bool, url: &str, n: u64) -> v1::Delivery {
    let body = format!(
        r#"{{"id":"{owner}","status":"{}","delayTime":3,"executionTime":17,"output":{{"bench_n":{n},"text":"{}"}}}}"#,
        if last { "COMPLETED" } else { "IN_PROGRESS" },
        "x".repeat(128)
    );
    let part = v1::BodyPart {
        size_bytes: body.len() as u64,
        part: Some(v1::body_part::Part::Inline(Bytes::from(body))),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    v1::Delivery {
        owner_id: Bytes::copy_from_slice(owner.as_bytes()),
        seq,
        target: 0,
        project_id: PROJECT.0,
        url: url.to_owned(),
        terminal: last,
        event: if last { 2 } else { 1 },
        body: Some(v1::BodyParts { parts: vec![part] }),
        created_at_ms: i64::try_from(now.as_millis()).unwrap_or(i64::MAX),
        run: 1,
        ..v1::Delivery::default()
    }
}
