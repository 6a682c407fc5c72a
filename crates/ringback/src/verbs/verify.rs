//! `ringback verify`: whether a received webhook is to be trusted, and why not.

use super::receive_secrets::SecretArgs;
use crate::cli::OutputArgs;
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::style::Style;
use crate::ui::{clean, out};
use ringback_service_runtime::time::now_ms;
use ringback_webhook_receiver::explain::{Report, explain, parse_headers};
use serde_json::json;
use std::io::Read as _;
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  ringback verify --secret-file webhook.secret --body body.json --headers headers.txt
  ringback verify --secret-file s --body - --header webhook-id:msg_1 --header webhook-timestamp:1763719200 \\
      --header 'webhook-signature:v1,g0hM9S...' < body.json
  ringback verify --secret-file s --body body.json --header runflow-signature:80ec8a... --ignore-age

Headers are lines `NAME: VALUE` (what `curl -D` writes) or a JSON object. Exit code 0: verified; 4: not.";

/// Check the signature of a webhook, step by step
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    secrets: SecretArgs,
    /// File with the raw body, `-` for standard input
    #[arg(long, value_name = "FILE")]
    body: PathBuf,
    /// File with the headers, `-` for standard input
    #[arg(long, value_name = "FILE")]
    headers: Option<PathBuf>,
    /// A header; repeatable
    #[arg(long, value_name = "NAME:VALUE")]
    header: Vec<String>,
    /// Check the signature alone: a capture ages
    #[arg(long, conflicts_with = "at")]
    ignore_age: bool,
    /// Judge the age as of this moment, in unix seconds
    #[arg(long, value_name = "SECONDS")]
    at: Option<i64>,
}

/// Runs the verb.
pub(crate) fn run(args: &VerifyArgs, output: &OutputArgs) -> Result<Exit, CliError> {
    let secrets = args.secrets.read()?;
    if secrets.is_empty() {
        return Err(CliError::usage(
            "no secret is given",
            "give --secret-file FILE or set RINGBACK_WEBHOOK_SECRET",
        ));
    }
    if args.headers.as_deref() == Some(Path::new("-")) && args.body == Path::new("-") {
        return Err(CliError::usage("body and headers cannot both be standard input", "save one as a file"));
    }
    let body = read(&args.body)?;
    let mut text = String::new();
    if let Some(path) = &args.headers {
        text = String::from_utf8_lossy(&read(path)?).into_owned();
    }
    let unreadable = |error: ringback_webhook_receiver::explain::HeadersError| {
        CliError::usage(error.to_string(), "write one header per line, NAME: VALUE")
    };
    let mut headers = parse_headers(&text).map_err(unreadable)?;
    for header in &args.header {
        for (name, value) in &parse_headers(header).map_err(unreadable)? {
            headers.append(name, value.clone());
        }
    }
    let now = if args.ignore_age { None } else { Some(args.at.unwrap_or_else(|| now_ms() / 1000)) };
    let report = explain(&secrets, &headers, &body, now);
    if output.json {
        out(&as_json(&report).to_string())?;
    } else {
        show(&report, output.quiet)?;
    }
    Ok(if report.verified() { Exit::Ok } else { Exit::Denied })
}

fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().read_to_end(&mut bytes).map(|_| ())
    } else {
        std::fs::read(path).map(|read| bytes = read)
    };
    read.map_err(|source| CliError::File { action: "read", path: path.to_owned(), source })?;
    Ok(bytes)
}

fn as_json(report: &Report) -> serde_json::Value {
    let checks: Vec<serde_json::Value> = report
        .checks
        .iter()
        .map(|check| json!({"check": check.name, "passed": check.passed, "detail": check.detail}))
        .collect();
    json!({
        "verified": report.verified(),
        "scheme": report.scheme,
        "checks": checks,
        "hints": report.hints,
    })
}

fn show(report: &Report, quiet: bool) -> Result<(), CliError> {
    let style = Style::stdout();
    if !quiet {
        for check in &report.checks {
            let word = if check.passed { style.green("ok    ") } else { style.red("failed") };
            out(&format!("{word}  {:<16} {}", check.name, clean(&check.detail)))?;
        }
    }
    if report.verified() {
        out(&style.green(&format!("verified ({})", report.scheme.unwrap_or_default())))?;
    } else {
        out(&style.red("not verified"))?;
        for hint in &report.hints {
            out(&format!("  {} {}", style.dim("→"), clean(hint)))?;
        }
    }
    Ok(())
}
