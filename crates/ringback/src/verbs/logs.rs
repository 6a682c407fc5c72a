//! `ringback logs`: what a job's handler wrote.

use super::wait::{self, Report, TimeoutArgs};
use super::{Context, job_path};
use crate::client::connection::ServerArgs;
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::{clean, raw, stdout_is_terminal};

const EXAMPLES: &str = "\
Examples:
  ringback logs $JOB
  ringback logs $JOB --follow          waits until the job has ended, then prints
  ringback logs $JOB > job.log

A worker hands in the captured output together with the outcome, so a running job has no logs yet.";

/// Print what a job's handler wrote
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct LogsArgs {
    /// Id of a job
    id: String,
    /// Wait until the job has ended
    #[arg(short, long)]
    follow: bool,
    #[command(flatten)]
    timeout: TimeoutArgs,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

/// Runs the verb.
pub(crate) async fn run(ctx: &Context, args: &LogsArgs) -> Result<Exit, CliError> {
    if args.follow {
        wait::job(ctx, &args.id, args.timeout, Report::of_progress(ctx)).await?;
    }
    let body = ctx.api.get(&format!("{}/logs", job_path(&args.id))).await?;
    if body.text.is_empty() {
        ctx.note("no logs: the handler wrote nothing, or the job has not ended");
        return Ok(Exit::Ok);
    }
    // A program gets the bytes as they are; a terminal must not obey what a handler prints.
    let text = if stdout_is_terminal() { clean(&body.text.replace("\r\n", "\n")) } else { body.text };
    raw(text.as_bytes())?;
    if !text.ends_with('\n') {
        raw(b"\n")?;
    }
    Ok(Exit::Ok)
}
