//! `ringback dev`: broker, database, services and a worker in one process.

pub(crate) mod args;
mod banner;
mod endpoint;
mod lines;
mod settings;
mod stage;

use crate::cli::OutputArgs;
use crate::client::connection::Connection;
use crate::error::CliError;
use crate::exit::Exit;
use crate::services::migrate::migrate;
use crate::services::platform::{self, Platform, Sql};
use crate::ui::style::Style;
use args::DevArgs;
use banner::Banner;
use lines::{Lines, Look};
use ringback_contracts::{Message as _, v1::TransitionEvents};
use ringback_service_runtime::broker_child::BrokerChild;
use ringback_service_runtime::config::RingbackConfig;
use ringback_service_runtime::data_dir::DataDirLock;
use ringback_service_runtime::{Readiness, Redacted, Shutdown};
use settings::Settings;
use stage::Stages;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// A start that takes longer says what it waits for.
const SAY_WHY_AFTER: Duration = Duration::from_secs(5);
/// A subscription that cannot be made is tried again after this time.
const SUBSCRIBE_PAUSE: Duration = Duration::from_secs(1);

/// Runs the verb.
pub(crate) async fn run(args: DevArgs, output: OutputArgs) -> Result<Exit, CliError> {
    let began = Instant::now();
    let settings = Settings::new(&args, random_key)?;
    let (api_key, is_private) = (settings.api_key, settings.is_private);
    let mut config = settings.config;
    let _telemetry = platform::observe("ringback", &config)?;
    let shutdown = platform::on_signals()?;
    let lock =
        DataDirLock::acquire(&config.data.dir).map_err(|error| CliError::Service(error.to_string()))?;
    config.data.dir = lock.dir().to_owned();

    let broker = tokio::select! {
        started = start_below(&mut config) => started?,
        () = shutdown.triggered() => return Ok(Exit::Interrupted),
    };
    let up = Running::start(config, &shutdown).await;
    let up = match up {
        Ok(up) => up,
        Err(error) => {
            stop_broker(broker).await;
            return Err(error);
        }
    };
    let url = up.platform.config.server.base_url(up.address);
    let data = &up.platform.config.data.dir;
    Connection {
        url: format!("http://{}", reachable(up.address)),
        api_key: api_key.as_ref().map(|key| key.expose().clone()),
        pid: std::process::id(),
    }
    .write(data)?;
    let lines = start_lines(&up, output).await?;

    if until_ready(&up.platform.readiness, &shutdown).await {
        let broker_text = describe_broker(broker.as_ref(), &up.platform.config);
        let banner = Banner {
            url: &url,
            api_key: api_key.as_ref(),
            data,
            database: database_name(&up.platform.config)?,
            broker: &broker_text,
            endpoints: &up.platform.config.endpoints,
            took: began.elapsed(),
            is_private,
            program: &program(),
            found_from_here: std::env::current_dir().is_ok_and(|dir| {
                crate::client::connection::find(&dir)
                    .is_some_and(|(_, found)| found.pid == std::process::id())
            }),
        };
        banner.print(output.json, output.quiet)?;
        if let Some(lines) = lines {
            tokio::spawn(follow(up.platform.bus.clone(), lines, shutdown.clone()));
        }
    }
    shutdown.triggered().await;
    say(output, "draining: no new jobs; running ones end or are handed back (Ctrl-C again ends at once)");
    let data = data.clone();
    let Running { platform, sql, stages, .. } = up;
    let ended = stages.drained().await;
    shutdown.finish();
    // The connection ends before the broker does, or its loss would be reported.
    drop((platform, sql));
    tokio::task::yield_now().await;
    stop_broker(broker).await;
    Connection::retire(&data);
    say(output, &format!("stopped; everything accepted is kept in {}", data.display()));
    drop(lock);
    ended.map(|()| Exit::Ok)
}

/// The services and what they share.
struct Running {
    platform: Platform,
    sql: Sql,
    stages: Stages,
    address: SocketAddr,
}

impl Running {
    async fn start(config: RingbackConfig, shutdown: &Shutdown) -> Result<Self, CliError> {
        let sql = Sql::open(&config).await?;
        let mut platform = Platform::new(config, "ringback dev").await?;
        let (stages, address) = Stages::start(&mut platform, &sql, shutdown).await?;
        Ok(Self { platform, sql, stages, address })
    }
}

/// Broker and schema, side by side.
async fn start_below(config: &mut RingbackConfig) -> Result<Option<BrokerChild>, CliError> {
    let nats_dir = config.data.nats_dir();
    let broker = async {
        if config.nats.url.is_some() {
            return Ok(None);
        }
        BrokerChild::start(&nats_dir).await.map(Some).map_err(|error| CliError::Service(error.to_string()))
    };
    let (broker, ()) = tokio::try_join!(broker, migrate(config))?;
    if let Some(broker) = &broker {
        config.nats = broker.nats_config(&config.nats);
    }
    Ok(broker)
}

async fn stop_broker(broker: Option<BrokerChild>) {
    if let Some(broker) = broker {
        broker.stop().await;
    }
}

/// Waits until every part works; says after a while what is missing. False when the shutdown came first.
async fn until_ready(readiness: &Readiness, shutdown: &Shutdown) -> bool {
    loop {
        tokio::select! {
            () = readiness.ready() => return true,
            () = shutdown.triggered() => return false,
            () = tokio::time::sleep(SAY_WHY_AFTER) => {
                for (name, check) in readiness.snapshot().into_iter().filter(|(_, check)| !check.ok) {
                    eprintln!("waiting for {name}: {}", check.reason);
                }
            }
        }
    }
}

async fn start_lines(up: &Running, output: OutputArgs) -> Result<Option<Lines>, CliError> {
    if output.quiet {
        return Ok(None);
    }
    let rows = ringback_store::endpoints::list(up.sql.store.read())
        .await
        .map_err(|error| CliError::Service(format!("the database: {error}")))?;
    let endpoints: HashMap<i64, String> = rows.into_iter().map(|row| (row.id.0, row.name)).collect();
    Ok(Some(Lines::start(Look { json: output.json, endpoints })?))
}

/// Prints what is announced after each commit. What an outage of NATS swallows is missing here and nowhere else.
async fn follow(bus: ringback_bus::Bus, lines: Lines, shutdown: Shutdown) {
    loop {
        if let Ok(mut announcements) = bus.subscribe_transitions().await {
            loop {
                let next = tokio::select! {
                    next = announcements.next() => next,
                    () = shutdown.finished() => return,
                };
                let Some(announcement) = next else { break };
                if let Ok(events) = TransitionEvents::decode(announcement.payload)
                    && !lines.push(events)
                {
                    return;
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(SUBSCRIBE_PAUSE) => {}
            () = shutdown.finished() => return,
        }
    }
}

fn say(output: OutputArgs, text: &str) {
    if !output.quiet {
        eprintln!("{}", Style::stderr().dim(text));
    }
}

/// This program as it was called: a bare name stays one, a path stays one that can be pasted.
fn program() -> String {
    std::env::args_os()
        .next()
        .map_or_else(|| "ringback".to_owned(), |name| name.to_string_lossy().into_owned())
}

fn random_key() -> String {
    format!("rb_dev_{}", uuid::Uuid::from_bytes(rand::random()).simple())
}

/// A listener on all addresses is reached on loopback from here.
fn reachable(bound: SocketAddr) -> SocketAddr {
    match bound {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => ([127, 0, 0, 1], v4.port()).into(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => (std::net::Ipv6Addr::LOCALHOST, v6.port()).into(),
        other => other,
    }
}

fn database_name(config: &RingbackConfig) -> Result<&'static str, CliError> {
    let url: Redacted<String> =
        config.database.resolve_url(&config.data.dir).map_err(|error| CliError::Config(error.to_string()))?;
    Ok(if url.expose().starts_with("sqlite:") { "SQLite" } else { "PostgreSQL" })
}

fn describe_broker(broker: Option<&BrokerChild>, config: &RingbackConfig) -> String {
    match broker {
        Some(broker) => {
            let pid = broker.pid().map(|pid| format!(", process {pid}")).unwrap_or_default();
            format!("its own nats-server ({}{pid})", broker.url())
        }
        None => format!("NATS at {}", config.nats.url.as_deref().unwrap_or_default()),
    }
}
