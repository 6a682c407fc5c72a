//! The arguments.

use crate::dev::args::DevArgs;
use crate::services::migrate::MigrateArgs;
use crate::services::serve::ServeArgs;
use crate::verbs::{
    batch::BatchArgs, bench::BenchArgs, cancel::CancelArgs, deliveries::DeliveriesArgs, get::GetArgs,
    listen::ListenArgs, logs::LogsArgs, ls::LsArgs, purge::PurgeArgs, receive::ReceiveArgs,
    replay::ReplayArgs, retry::RetryArgs, submit::SubmitArgs, verify::VerifyArgs, watch::WatchArgs,
    webhook::WebhookArgs,
};
use clap::{CommandFactory as _, Parser, Subcommand};

const OVERVIEW: &str = "\
Try it:
  ringback dev                                            starts everything on this machine
  ringback submit echo '{\"hello\": \"world\"}' --wait      in another terminal, same folder
  ringback ls

Exit codes:
   0 done                     4 key refused            10 job failed
   1 error                    5 conflict               11 job cancelled
   2 refused, bad usage       6 unreachable            12 job timed out
   3 not found                7 --timeout ran out     130 Ctrl-C

`ringback help VERB` shows each verb with examples.";

/// A self-hosted GPU job service whose callbacks always arrive
#[derive(Debug, Parser)]
#[command(name = "ringback", version, after_help = OVERVIEW, max_term_width = 110)]
#[command(propagate_version = false, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How a verb speaks.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputArgs {
    /// Machine output: one JSON value, or JSON lines, on standard output
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No progress and no notes on standard error
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// No colours (as NO_COLOR does)
    #[arg(long, global = true)]
    pub(crate) no_color: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Dev(DevArgs),
    Serve(ServeArgs),
    Migrate(MigrateArgs),
    Submit(SubmitArgs),
    Batch(BatchArgs),
    Watch(WatchArgs),
    Get(GetArgs),
    Ls(LsArgs),
    Logs(LogsArgs),
    Cancel(CancelArgs),
    Retry(RetryArgs),
    Purge(PurgeArgs),
    Webhook(WebhookArgs),
    Deliveries(DeliveriesArgs),
    Replay(ReplayArgs),
    Listen(ListenArgs),
    Receive(ReceiveArgs),
    Verify(VerifyArgs),
    Bench(BenchArgs),
    /// Print a completion script for a shell
    #[command(after_long_help = "\
Examples:
  source <(ringback completion bash)
  ringback completion zsh > ~/.zfunc/_ringback
  ringback completion fish > ~/.config/fish/completions/ringback.fish")]
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Prints a completion script.
pub(crate) fn completion(shell: clap_complete::Shell) {
    clap_complete::generate(shell, &mut Cli::command(), "ringback", &mut std::io::stdout());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_teaches_by_example() {
        for verb in Cli::command().get_subcommands() {
            let help = verb.get_after_long_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Examples:\n  "), "`ringback help {}` has no example", verb.get_name());
        }
    }
}
