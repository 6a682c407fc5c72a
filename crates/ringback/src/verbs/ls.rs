//! `ringback ls`: the jobs of a project, newest first.

use super::Context;
use crate::client::connection::ServerArgs;
use crate::client::encode;
use crate::client::model::{Job, JobPage};
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::style::Style;
use crate::ui::{clean, out, table, when};
use ringback_domain::JobStatus;
use serde_json::value::RawValue;

/// Most jobs asked for at once.
const PAGE: usize = 100;

const EXAMPLES: &str = "\
Examples:
  ringback ls
  ringback ls --endpoint tts --status FAILED --limit 100
  ringback ls --batch $BATCH --all --json | jq -r 'select(.status == \"FAILED\") | .id' | xargs ringback retry";

/// List jobs, newest first
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct LsArgs {
    /// Only jobs of this endpoint
    #[arg(short, long, value_name = "NAME")]
    endpoint: Option<String>,
    /// Only jobs in this state: IN_QUEUE, IN_PROGRESS, COMPLETED, FAILED, CANCELLED, TIMED_OUT
    #[arg(short, long, value_name = "STATUS", value_parser = status, ignore_case = true)]
    status: Option<JobStatus>,
    /// Only jobs of this batch
    #[arg(short, long, value_name = "ID")]
    batch: Option<String>,
    /// Most jobs shown
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20, conflicts_with = "all")]
    limit: usize,
    /// Show all of them, however many
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

fn status(text: &str) -> Result<JobStatus, String> {
    let word = text.to_ascii_uppercase().replace('-', "_");
    JobStatus::parse(&word).ok_or_else(|| {
        let all: Vec<&str> = JobStatus::ALL.iter().map(|status| status.as_str()).collect();
        format!("is none of {}", all.join(", "))
    })
}

/// Runs the verb.
pub(crate) async fn run(ctx: &Context, args: &LsArgs) -> Result<Exit, CliError> {
    let limit = if args.all { usize::MAX } else { args.limit };
    let (mut rows, mut shown, mut cursor) = (Vec::new(), 0usize, None::<String>);
    let mut more = false;
    while shown < limit {
        let page: JobPage =
            ctx.api.get(&query(args, (limit - shown).min(PAGE), cursor.as_deref())).await?.read()?;
        shown += page.jobs.len();
        if ctx.json {
            page.jobs.iter().try_for_each(|job| out(job.get()))?;
        } else {
            rows.extend(page.jobs.iter().map(|job| row(job)).collect::<Result<Vec<_>, _>>()?);
        }
        more = page.next_cursor.is_some();
        cursor = page.next_cursor;
        if cursor.is_none() || page.jobs.is_empty() {
            break;
        }
    }
    if ctx.json {
        return Ok(Exit::Ok);
    }
    if rows.is_empty() {
        ctx.note("no jobs; submit one with `ringback submit echo '{\"hello\": \"world\"}'`");
        return Ok(Exit::Ok);
    }
    let style = Style::stdout();
    table::print(
        &["ID", "ENDPOINT", "STATUS", "AGE", "WAITED", "RAN", "TRY", "ERROR"],
        &rows,
        |column, text| if column == 2 { style.status_word(text) } else { text.to_owned() },
    )?;
    if more {
        ctx.note(&Style::stderr().dim(&format!("the newest {shown}; more with --limit N or --all")));
    }
    Ok(Exit::Ok)
}

fn query(args: &LsArgs, limit: usize, cursor: Option<&str>) -> String {
    let mut path = format!("/v1/jobs?limit={limit}");
    let filters = [
        ("endpoint", args.endpoint.as_deref()),
        ("status", args.status.map(JobStatus::as_str)),
        ("batch", args.batch.as_deref()),
        ("cursor", cursor),
    ];
    for (name, value) in filters {
        if let Some(value) = value {
            path.push_str(&format!("&{name}={}", encode(value)));
        }
    }
    path
}

fn row(job: &RawValue) -> Result<Vec<String>, CliError> {
    let job: Job = serde_json::from_str(job.get())
        .map_err(|error| CliError::NotOurs { url: "/v1/jobs".to_owned(), reason: error.to_string() })?;
    let ran = |ms: Option<u64>| ms.map(when::duration_ms).unwrap_or_default();
    let tries = match (job.run, job.attempt.unwrap_or(0)) {
        (0 | 1, 0 | 1) => String::new(),
        (run, attempt) => format!("{run}.{attempt}"),
    };
    let age = job.submitted_at.as_deref().map(|at| when::age(at, ringback_service_runtime::time::now_ms()));
    Ok(vec![
        job.id,
        job.endpoint,
        job.status,
        age.unwrap_or_default(),
        ran(job.delay_time_ms),
        ran(job.execution_time_ms),
        tries,
        job.error.map(|error| clean(&error).replace('\n', " ")).unwrap_or_default(),
    ])
}
