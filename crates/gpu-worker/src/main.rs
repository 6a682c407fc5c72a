//! The worker as a program of its own; the same as `ringback serve worker`.

use ringback_gpu_worker::{guard, serve};
use std::process::ExitCode;

fn main() -> ExitCode {
    // The worker starts this program again to guard a handler.
    let mut argv = std::env::args_os().skip(1);
    if argv.next().is_some_and(|verb| verb == guard::VERB) {
        return guard::run(argv);
    }
    ringback_service_runtime::host::main("ringback-gpu-worker", "Runs jobs.", serve)
}
