//! Ringback's command line and all-in-one.

mod cli;
mod client;
mod dev;
mod error;
mod exit;
mod private_file;
mod services;
mod ui;
mod verbs;

use clap::Parser as _;
use cli::{Cli, Command};
use error::CliError;
use exit::Exit;
use std::process::ExitCode;

/// A job's way through the services is many small, short-lived allocations on several threads; glibc's allocator took
/// a fifth of the process's time under load.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // The worker starts this program again to guard a handler: no argument parsing, no runtime of ours before it.
    let mut argv = std::env::args_os().skip(1);
    if argv.next().is_some_and(|verb| verb == ringback_gpu_worker::guard::VERB) {
        return ringback_gpu_worker::guard::run(argv);
    }
    let cli = Cli::parse();
    if cli.output.no_color {
        ui::style::never();
    }
    let json = cli.output.json;
    match run(cli) {
        Ok(exit) => exit.into(),
        Err(error) => {
            error.report(json);
            error.exit().into()
        }
    }
}

fn run(cli: Cli) -> Result<Exit, CliError> {
    let output = cli.output;
    match cli.command {
        Command::Dev(args) => services::shared_runtime()?.block_on(dev::run(args, output)),
        Command::Serve(args) => services::runtime()?.block_on(services::serve::run(args)),
        Command::Migrate(args) => verb(services::migrate::run(args)),
        Command::Submit(args) => {
            verb(verbs::submit::run(&verbs::Context::new(&args.server, &output)?, &args))
        }
        Command::Batch(args) => verb(verbs::batch::run(&verbs::Context::new(&args.server, &output)?, &args)),
        Command::Watch(args) => verb(verbs::watch::run(&verbs::Context::new(&args.server, &output)?, &args)),
        Command::Get(args) => verb(verbs::get::run(&verbs::Context::new(&args.server, &output)?, &args)),
        Command::Ls(args) => verb(verbs::ls::run(&verbs::Context::new(&args.server, &output)?, &args)),
        Command::Logs(args) => verb(verbs::logs::run(&verbs::Context::new(&args.server, &output)?, &args)),
        Command::Cancel(args) => {
            verb(verbs::cancel::run(&verbs::Context::new(&args.server, &output)?, &args))
        }
        Command::Retry(args) => verb(verbs::retry::run(&verbs::Context::new(&args.server, &output)?, &args)),
        Command::Purge(args) => verb(verbs::purge::run(&verbs::Context::new(&args.server, &output)?, &args)),
        Command::Webhook(args) => verb(verbs::webhook::run(&output, &args)),
        Command::Deliveries(args) => verb(verbs::deliveries::run(&output, &args)),
        Command::Replay(args) => verb(verbs::replay::run(&output, &args)),
        Command::Listen(args) => {
            verb(verbs::listen::run(&verbs::Context::new(&args.server, &output)?, &args))
        }
        Command::Receive(args) => services::runtime()?.block_on(verbs::receive::run(args, output)),
        Command::Bench(args) => verb(verbs::bench::run(&verbs::Context::new(&args.server, &output)?, &args)),
        Command::Verify(args) => verbs::verify::run(&args, &output),
        Command::Completion { shell } => {
            cli::completion(shell);
            Ok(Exit::Ok)
        }
    }
}

/// A verb does one thing after another: one thread is enough and starts quickest.
fn verb(work: impl Future<Output = Result<Exit, CliError>>) -> Result<Exit, CliError> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}
