//! `ringback-bench`: see `--help` and docs/PERFORMANCE.md.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use clap::Parser as _;
use ringback_bench::board::Board;
use ringback_bench::children::find;
use ringback_bench::error::BenchError;
use ringback_bench::instance::{Settings, WEBHOOK_SECRET};
use ringback_bench::options::{Cli, Options, Part, Sub};
use ringback_bench::postgres::{self, Postgres};
use ringback_bench::receiver::Receiver;
use ringback_bench::report::{Machine, Report};
use ringback_bench::suite::{Database, Suite};
use ringback_bench::{disk, floor, signature};
use tokio::runtime::Builder;

const UNSOUND: u8 = 1;
const NOT_MEASURED: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command {
        Some(Sub::FloorServer(args)) => block_on(Builder::new_multi_thread().worker_threads(2), async {
            floor::serve(args).await.map(|()| true)
        }),
        // Generator and receiver share one thread: on a small machine every further one is taken from the server.
        None => block_on(&mut Builder::new_current_thread(), bench(cli.options.settled())),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(UNSOUND),
        Err(error) => {
            eprintln!("ringback-bench: {error}");
            ExitCode::from(NOT_MEASURED)
        }
    }
}

fn block_on(
    builder: &mut Builder,
    work: impl Future<Output = Result<bool, BenchError>>,
) -> Result<bool, BenchError> {
    builder.enable_all().build()?.block_on(work)
}

/// Measures and prints. True: nothing lost, doubled or wrongly signed.
async fn bench(options: Options) -> Result<bool, BenchError> {
    let measured = tokio::select! {
        report = measure(&options) => report?,
        _ = tokio::signal::ctrl_c() => return Err(std::io::Error::other("interrupted").into()),
    };
    let report = measured.judge();
    if options.json {
        eprintln!("{}", report.table());
        println!("{}", serde_json::to_string_pretty(&report).map_err(std::io::Error::other)?);
    } else {
        println!("{}", report.table());
    }
    Ok(report.sound)
}

async fn measure(options: &Options) -> Result<Report, BenchError> {
    let nats_server =
        options.nats_server.clone().or_else(|| find("nats-server", &[PathBuf::from(".tools/bin")]));
    let settings = Settings {
        program: options.ringback.clone().unwrap_or_else(default_program),
        nats_server: nats_server.clone(),
        slots: options.slots,
        extra: options.ringback_arg.clone(),
    };
    let folder = data_folder(options)?;
    let machine = machine(folder.path(), options.quick)?;
    let key =
        signature::key_of(WEBHOOK_SECRET).ok_or_else(|| std::io::Error::other("bad built-in secret"))?;
    let board = Arc::new(Board::default());
    let receiver = Receiver::start(Arc::clone(&board), key, options.verify_every).await?;
    let mut report = Report {
        machine,
        databases: Vec::new(),
        skipped: Vec::new(),
        checked: 0,
        bad: 0,
        stray: 0,
        first_fault: None,
        verdicts: Vec::new(),
        sound: false,
    };
    for name in &options.database {
        let suite = Suite {
            board: Arc::clone(&board),
            receiver: &receiver,
            options,
            settings: &settings,
            nats_server: nats_server.as_deref(),
            folder: folder.path().to_owned(),
        };
        match name.as_str() {
            "sqlite" => report.databases.push(suite.run("sqlite", &Database::Sqlite).await?),
            "postgres" => match postgres::binaries() {
                Some(bin) => {
                    let server = Postgres::start(folder.path(), &bin).await?;
                    let database = Database::Temporary(Box::new(server));
                    report.databases.push(suite.run("postgres", &database).await?);
                    if let Database::Temporary(server) = database {
                        server.stop().await;
                    }
                }
                None => {
                    report.skipped.push("postgres: no folder with initdb, postgres, pg_isready and createdb on PATH or in /usr/lib/postgresql".to_owned())
                }
            },
            url if url.starts_with("postgres://") || url.starts_with("postgresql://") => {
                one_database_only(options)?;
                report.databases.push(suite.run("postgres", &Database::Url(url.to_owned())).await?);
            }
            _ => {
                return Err(BenchError::Option {
                    option: "--database",
                    reason: format!("`{name}` is neither sqlite, postgres nor a postgres:// URL"),
                });
            }
        }
    }
    report.machine.fsync_after = Some(disk::fsync(folder.path(), fsync_rounds(options.quick))?);
    let faults = receiver.faults();
    report.checked = faults.checked.load(Relaxed);
    report.bad = faults.bad.load(Relaxed);
    report.stray = faults.stray.load(Relaxed);
    report.first_fault = faults.first();
    Ok(report)
}

/// A user's database is empty only once.
fn one_database_only(options: &Options) -> Result<(), BenchError> {
    if options.wants(Part::Flat) || options.wants(Part::Endpoints) {
        let reason =
            "with a URL choose --parts idle,latency,throughput,floor: the other parts need fresh databases";
        return Err(BenchError::Option { option: "--database", reason: reason.to_owned() });
    }
    Ok(())
}

/// `ringback` beside this program, as cargo leaves them, else whatever PATH has.
fn default_program() -> PathBuf {
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name("ringback"));
    beside.filter(|program| program.exists()).unwrap_or_else(|| PathBuf::from("ringback"))
}

/// A folder that goes away at the end, on the disk of the build folder unless the user names another.
fn data_folder(options: &Options) -> Result<tempfile::TempDir, BenchError> {
    let parent = match &options.data {
        Some(folder) => folder.clone(),
        None => std::env::current_exe()?.parent().map_or_else(|| PathBuf::from("."), Path::to_owned),
    };
    std::fs::create_dir_all(&parent).map_err(|source| BenchError::file(&parent, source))?;
    let folder = tempfile::Builder::new().prefix("ringback-bench-").tempdir_in(&parent);
    let folder = folder.map_err(|source| BenchError::file(&parent, source))?;
    // PostgreSQL may run as another account and must reach its folder inside.
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755))
        .map_err(|source| BenchError::file(folder.path(), source))?;
    Ok(folder)
}

fn fsync_rounds(quick: bool) -> u32 {
    if quick { 50 } else { 400 }
}

fn machine(folder: &Path, quick: bool) -> Result<Machine, BenchError> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown CPU");
    Ok(Machine {
        cpu: model.trim_start_matches([' ', '\t', ':']).to_owned(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        load_1m: read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned(),
        fsync: disk::fsync(folder, fsync_rounds(quick))?,
        fsync_after: None,
    })
}
