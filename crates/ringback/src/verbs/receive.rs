//! `ringback receive`: a ready receiver that saves what webhooks bring.

use super::receive_secrets::SecretArgs;
use super::receive_tracking::TrackingArgs;
use crate::cli::OutputArgs;
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::style::Style;
use crate::ui::{clean, when};
use ringback_domain::webhook::address::AddressPolicy;
use ringback_domain::webhook::url::UrlPolicy;
use ringback_service_runtime::Shutdown;
use ringback_service_runtime::config::TelemetryConfig;
use ringback_service_runtime::time::now_ms;
use ringback_webhook_receiver::app::{DEFAULT_PUBLIC_PREFIX, ROUTES};
use ringback_webhook_receiver::verify::{DEFAULT_MAX_BODY_BYTES, LARGEST_MAX_BODY_BYTES};
use ringback_webhook_receiver::{App, AppError, Config, HostList, Observer, Router, Secrets, Step, Trust};
use serde_json::json;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  ringback receive --dir out --secret-file webhook.secret
  RINGBACK_WEBHOOK_SECRET=whsec_... ringback receive --dir out --json
  ringback receive --dir out --allow-unsigned --allow-from 10.1.0.0/16 --listen 0.0.0.0:8090
  ringback receive --dir out --allow-unsigned --allow-from 127.0.0.1 --allow-loopback
  ringback receive --dir out --secret-file webhook.secret \\
    --poll-url 'https://ringback.example.com/v2/{endpoint}/status/{id}' --api-key-file api.key

Every event is on disk before it is answered; the work comes after, also after a crash. Files go to DIR and are
served below /audio-outputs. docs/RECEIVING.md shows the addresses and a curl to try it.";

/// Receive webhooks: verify them, save results and files, confirm downloads
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct ReceiveArgs {
    /// Folder for what is received; made if missing
    #[arg(long)]
    dir: PathBuf,
    /// Address to listen on; beyond this machine put a proxy with TLS in front
    #[arg(long, default_value = "127.0.0.1:8090")]
    listen: SocketAddr,
    #[command(flatten)]
    secrets: SecretArgs,
    /// Take requests without a signature, from the hosts of --allow-from only
    #[arg(long, requires = "allow_from")]
    allow_unsigned: bool,
    /// Address or network that may send without a signature; repeatable
    #[arg(long, value_name = "CIDR", requires = "allow_unsigned")]
    allow_from: Vec<String>,
    /// Download from and confirm to this machine too (http and any port)
    #[arg(long)]
    allow_loopback: bool,
    /// Download from and confirm to a private network too; repeatable
    #[arg(long, value_name = "CIDR")]
    allow_private: Vec<ipnet::IpNet>,
    /// Download over http too
    #[arg(long)]
    allow_http: bool,
    /// Download from a further port beside 80 and 443; repeatable
    #[arg(long, value_name = "PORT")]
    allow_port: Vec<u16>,
    /// Path below which saved files are served
    #[arg(long, default_value = DEFAULT_PUBLIC_PREFIX)]
    public_prefix: String,
    /// Put before that path in answers, for example https://hooks.example.com
    #[arg(long, default_value = "")]
    public_url: String,
    /// Largest body of a webhook, in bytes
    #[arg(long, default_value_t = DEFAULT_MAX_BODY_BYTES)]
    max_body_bytes: usize,
    /// Largest file to download, in bytes
    #[arg(long, default_value_t = ringback_webhook_receiver::fetch::DEFAULT_MAX_FILE_BYTES)]
    max_file_bytes: u64,
    /// Time for one download
    #[arg(long, default_value = "60s", value_name = "TIME", value_parser = when::parse_span_ms)]
    download_timeout: u64,
    #[command(flatten)]
    tracking: TrackingArgs,
}

/// Runs the verb until a signal ends it.
pub(crate) async fn run(args: ReceiveArgs, output: OutputArgs) -> Result<Exit, CliError> {
    // Steps are printed by the observer; here go faults of the machine only (RUST_LOG shows more).
    let telemetry = TelemetryConfig { log_level: "error".to_owned(), ..TelemetryConfig::default() };
    let _telemetry = ringback_service_runtime::telemetry::init("ringback-receive", &telemetry)
        .map_err(|error| CliError::Config(error.to_string()))?;
    ringback_service_runtime::crypto_provider::install();
    let config = config(&args)?;
    let shutdown = Shutdown::on_signals()?;
    let observer = Observer::new(move |step| print(step, output.json));
    let app = App::build(config, Router::new(), observer).await.map_err(refused)?;
    banner(&args, &app, &output);
    app.run(shutdown).await;
    Ok(Exit::Ok)
}

fn refused(error: AppError) -> CliError {
    match error {
        AppError::Prefix(_) => CliError::usage(error.to_string(), "choose another --public-prefix"),
        AppError::Listen { .. } => CliError::usage(error.to_string(), "choose another address with --listen"),
        AppError::Folder(_) | AppError::Store(_) | AppError::Client(_) => {
            CliError::Service(error.to_string())
        }
    }
}

fn config(args: &ReceiveArgs) -> Result<Config, CliError> {
    let secrets = Secrets::parse(&args.secrets.read()?)
        .map_err(|error| CliError::usage(error.to_string(), "give it as its sender shows it"))?;
    if secrets.is_empty() && !args.allow_unsigned {
        return Err(CliError::usage(
            "no secret is given, so nothing could be verified",
            "give --secret-file FILE or RINGBACK_WEBHOOK_SECRET; for senders that do not sign: --allow-unsigned \
             --allow-from CIDR",
        ));
    }
    let unsigned = if args.allow_unsigned {
        let hosts = HostList::parse(&args.allow_from)
            .map_err(|error| CliError::usage(format!("--allow-from: {error}"), "for example 10.1.0.0/16"))?;
        Some(hosts)
    } else {
        None
    };
    if args.max_body_bytes == 0 || args.max_body_bytes > LARGEST_MAX_BODY_BYTES {
        return Err(CliError::usage(
            format!("--max-body-bytes must be 1 to {LARGEST_MAX_BODY_BYTES}"),
            "large results are better sent as links",
        ));
    }
    for entry in &args.allow_private {
        AddressPolicy::check_entry(entry).map_err(|error| {
            CliError::usage(format!("--allow-private: {error}"), "name the networks one by one")
        })?;
    }
    let mut urls = UrlPolicy {
        allow_http: args.allow_http,
        addresses: AddressPolicy {
            allow_loopback: args.allow_loopback,
            allow_private: args.allow_private.clone(),
        },
        ..UrlPolicy::default()
    };
    urls.ports.extend(args.allow_port.iter().map(|&port| port..=port));
    let trust = Trust { secrets, unsigned, max_body_bytes: args.max_body_bytes };
    let mut config = Config::new(args.listen, args.dir.clone(), trust);
    config.urls = urls;
    config.public_prefix.clone_from(&args.public_prefix);
    config.public_url.clone_from(&args.public_url);
    config.download_time = Duration::from_millis(args.download_timeout);
    config.max_file_bytes = args.max_file_bytes;
    config.tracking = args.tracking.read(&args.allow_private)?;
    Ok(config)
}

fn banner(args: &ReceiveArgs, app: &App, output: &OutputArgs) {
    let url = format!("http://{}", app.local_addr());
    if output.json {
        let routes: Vec<&str> = ROUTES.iter().map(|(path, _)| *path).collect();
        line(&json!({"step": "listening", "url": url, "dir": args.dir, "routes": routes}).to_string());
        return;
    }
    if output.quiet {
        return;
    }
    let style = Style::stdout();
    line(&format!("receiving at {}, saving to {}", style.bold(&url), args.dir.display()));
    for (path, what) in ROUTES {
        line(&format!("  POST {path:<27} {}", style.dim(what)));
    }
    if args.tracking.is_on() {
        line(&format!("  POST {:<27} {}", "/track", style.dim("jobs to poll should their webhook not come")));
    }
    line(&format!("  GET  {:<27} {}", format!("{}/NAME", args.public_prefix), style.dim("saved files")));
    line(&format!("  GET  {:<27} {}", "/received/ID", style.dim("what came for a job, run or batch")));
    line(&format!("  GET  {:<27} {}", "/webhooks/metrics", style.dim("counts")));
    if args.allow_unsigned {
        line(&format!("  unsigned requests are taken from {}", args.allow_from.join(", ")));
    }
    if !args.listen.ip().is_loopback() {
        line("  this is plain http: let a proxy with TLS in front be the only one that reaches it");
    }
}

/// One line per step, with its duration (row B5).
fn print(step: &Step, json: bool) {
    let took_ms = step.took.map(|took| (took.as_secs_f64() * 1_000_000.0).round() / 1000.0);
    if json {
        let object = json!({
            "at_ms": now_ms(),
            "step": step.name,
            "type": step.kind,
            "subject": step.subject,
            "detail": step.detail,
            "took_ms": took_ms,
            "failed": step.failed,
        });
        line(&object.to_string());
        return;
    }
    let style = Style::stdout();
    let name = format!("{:<15}", step.name);
    let name = if step.failed { style.red(&name) } else { style.green(&name) };
    let took = took_ms.map(|ms| format!("  {}", style.dim(&format!("{ms} ms")))).unwrap_or_default();
    let (kind, subject, detail) = (clean(&step.kind), clean(&step.subject), clean(&step.detail));
    line(&format!("{}  {name}  {kind}  {subject}  {detail}{took}", when::clock_ms(now_ms())));
}

/// Whoever read the lines may have gone; receiving goes on.
fn line(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}
