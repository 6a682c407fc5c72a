//! The state tracker as a program of its own; the same as `ringback serve tracker`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ringback_service_runtime::host::main(
        "ringback-state-tracker",
        "Changes the state of jobs.",
        ringback_state_tracker::serve,
    )
}
