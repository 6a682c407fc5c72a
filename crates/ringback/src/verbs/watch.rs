//! `ringback watch`: follow a job or a batch until it has ended.

use super::wait::{self, Report, TimeoutArgs};
use super::{Context, Subject, look_up, show};
use crate::client::connection::ServerArgs;
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::out;

const EXAMPLES: &str = "\
Examples:
  ringback watch 01981c4e-5b0e-7c3a-9d55-2f6f0a6c1e11
  ringback watch $BATCH --timeout 10m || echo \"ended with $?\"
  ringback watch $JOB --json | jq -r .status

With --json each transition (or count of a batch) is one line, and the last line is the job or batch itself.
Ctrl-C stops watching, not the job. Exit codes: 0 COMPLETED, 10 FAILED, 11 CANCELLED, 12 TIMED_OUT,
7 --timeout ran out, 130 Ctrl-C.";

/// Follow a job or a batch until it has ended
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct WatchArgs {
    /// Id of a job or a batch
    id: String,
    #[command(flatten)]
    timeout: TimeoutArgs,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

/// Runs the verb.
pub(crate) async fn run(ctx: &Context, args: &WatchArgs) -> Result<Exit, CliError> {
    let report = if ctx.json { Report::JsonLines } else { Report::of_progress(ctx) };
    match look_up(&ctx.api, &args.id).await? {
        Subject::Job(..) => {
            let (job, body) = wait::job(ctx, &args.id, args.timeout, report).await?;
            if ctx.json {
                out(body.text.trim())?;
                return Ok(job.state().map_or(Exit::Error, Exit::of_job));
            }
            show::result(ctx, &job).await?;
            Ok(show::end_of_job(&job))
        }
        Subject::Batch(..) => {
            let (batch, _) = wait::batch(ctx, &args.id, args.timeout, report).await?;
            if !ctx.json {
                show::batch(&batch, &[])?;
            }
            Ok(show::end_of_batch(&batch))
        }
    }
}
