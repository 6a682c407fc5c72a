//! `ringback dev`: the all-in-one.

pub(crate) mod args;
mod endpoint;
mod settings;

use crate::cli::OutputArgs;
use crate::error::CliError;
use crate::exit::Exit;
use args::DevArgs;

/// Runs the verb.
pub(crate) async fn run(args: DevArgs, _output: OutputArgs) -> Result<Exit, CliError> {
    let settings = settings::Settings::new(&args, || "x".to_owned())?;
    Err(CliError::Service(format!("{settings:?}")))
}
