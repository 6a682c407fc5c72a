//! `ringback retry`: run ended jobs again.

use super::cancel::each;
use super::wait::TimeoutArgs;
use super::{Context, job_path, submit};
use crate::client::connection::ServerArgs;
use crate::error::CliError;
use crate::exit::Exit;

const EXAMPLES: &str = "\
Examples:
  ringback retry 01981c4e-5b0e-7c3a-9d55-2f6f0a6c1e11 --wait
  ringback ls --status FAILED --all --json | jq -r .id | xargs ringback retry

The job keeps its id and input and starts its next run; results of earlier runs are kept.
Only FAILED, TIMED_OUT and CANCELLED jobs can be retried (exit code 5 otherwise).";

/// Run failed, timed out or cancelled jobs again
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct RetryArgs {
    /// Ids of jobs
    #[arg(required = true)]
    ids: Vec<String>,
    /// Wait until the job has ended and print its output (one id only)
    #[arg(short, long)]
    wait: bool,
    #[command(flatten)]
    timeout: TimeoutArgs,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

/// Runs the verb: every id is tried; the first failure decides the exit code.
pub(crate) async fn run(ctx: &Context, args: &RetryArgs) -> Result<Exit, CliError> {
    let retry = async |id: &str| ctx.api.post(&format!("{}/retry", job_path(id)), String::new(), &[]).await;
    match args.ids.as_slice() {
        [id] if args.wait => {
            retry(id).await?;
            submit::finish(ctx, id, args.timeout).await
        }
        _ if args.wait => Err(CliError::usage(
            "--wait takes one id",
            "retry them without --wait, then follow each with `ringback watch`",
        )),
        ids => each(ctx, ids, retry).await,
    }
}
