//! The worker as a program of its own. `ringback serve worker` is the same with a command line; this one
//! exists for its role as the guard of handlers in tests and slim images.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut argv = std::env::args_os().skip(1);
    if argv.next().is_some_and(|verb| verb == ringback_gpu_worker::guard::VERB) {
        return ringback_gpu_worker::guard::run(argv);
    }
    eprintln!("run `ringback serve worker --config FILE`");
    ExitCode::from(64)
}
