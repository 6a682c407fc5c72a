//! `ringback purge`: cancel everything that waits in an endpoint's queue.

use super::Context;
use crate::client::connection::ServerArgs;
use crate::client::encode;
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::out;
use serde::Deserialize;
use std::io::{IsTerminal as _, Write as _};

const EXAMPLES: &str = "\
Examples:
  ringback purge tts              asks first
  ringback purge tts --yes

Queued jobs become CANCELLED and their webhooks say so; running jobs go on. Needs a key with the scope admin.";

/// Cancel all queued jobs of an endpoint
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct PurgeArgs {
    /// Endpoint's name
    endpoint: String,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

#[derive(Deserialize)]
struct Purged {
    removed: u64,
}

/// Runs the verb.
pub(crate) async fn run(ctx: &Context, args: &PurgeArgs) -> Result<Exit, CliError> {
    if !args.yes && !confirmed(&args.endpoint)? {
        return Err(CliError::usage("not purged", "the typed name is not the endpoint's"));
    }
    let path = format!("/v1/endpoints/{}/purge", encode(&args.endpoint));
    let body = ctx.api.post(&path, String::new(), &[]).await?;
    if ctx.json {
        out(body.text.trim())?;
    } else {
        let purged: Purged = body.read()?;
        out(&format!("{} queued jobs of {} are cancelled", purged.removed, args.endpoint))?;
    }
    Ok(Exit::Ok)
}

fn confirmed(endpoint: &str) -> Result<bool, CliError> {
    if !std::io::stdin().is_terminal() {
        return Err(CliError::usage("purging needs a confirmation", "add --yes where nobody can be asked"));
    }
    eprint!("All queued jobs of `{endpoint}` will be cancelled. Type its name to go on: ");
    std::io::stderr().flush()?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    Ok(line.trim() == endpoint)
}
