//! `ringback cancel`: end jobs or batches.

use super::{Context, batch_path, is_not_found, job_path};
use crate::client::connection::ServerArgs;
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::out;
use crate::ui::style::Style;
use serde::Deserialize;

const EXAMPLES: &str = "\
Examples:
  ringback cancel 01981c4e-5b0e-7c3a-9d55-2f6f0a6c1e11
  ringback ls --status IN_QUEUE --endpoint tts --json | jq -r .id | xargs ringback cancel

Cancelling is idempotent: a job that has already ended keeps its state, which is printed.";

/// Cancel jobs or batches
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct CancelArgs {
    /// Ids of jobs or batches
    #[arg(required = true)]
    ids: Vec<String>,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

#[derive(Deserialize)]
struct Answer {
    status: String,
}

/// Runs the verb: every id is tried; the first failure decides the exit code.
pub(crate) async fn run(ctx: &Context, args: &CancelArgs) -> Result<Exit, CliError> {
    each(ctx, &args.ids, async |id| {
        match ctx.api.post(&format!("{}/cancel", job_path(id)), String::new(), &[]).await {
            Err(error) if is_not_found(&error) => {
                match ctx.api.post(&format!("{}/cancel", batch_path(id)), String::new(), &[]).await {
                    Err(second) if is_not_found(&second) => Err(error),
                    other => other,
                }
            }
            other => other,
        }
    })
    .await
}

/// Does something with each id and prints the state that comes back.
pub(crate) async fn each(
    ctx: &Context,
    ids: &[String],
    action: impl AsyncFn(&str) -> Result<crate::client::Body, CliError>,
) -> Result<Exit, CliError> {
    let mut exit = Exit::Ok;
    for id in ids {
        let done = match action(id).await {
            Ok(body) => body.read::<Answer>().map(|answer| (body, answer)),
            Err(error) => Err(error),
        };
        match done {
            Ok((body, _)) if ctx.json => out(body.text.trim())?,
            Ok((_, answer)) => out(&format!("{id}  {}", Style::stdout().status_word(&answer.status)))?,
            Err(error) => {
                error.report(ctx.json);
                if exit == Exit::Ok {
                    exit = error.exit();
                }
            }
        }
    }
    Ok(exit)
}
