//! `ringback-count`: the dispatcher alone, counted at the receiver. See `--help`.

use std::process::ExitCode;

use clap::Parser as _;
use ringback_bench::webhooks::{Cli, run};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("ringback-count: {error}");
            return ExitCode::from(2);
        }
    };
    match runtime.block_on(run(cli)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("ringback-count: {error}");
            ExitCode::from(2)
        }
    }
}
