//! The reconciler as a program of its own; the same as `ringback serve reconciler`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ringback_service_runtime::host::main(
        "ringback-reconciler",
        "Finds what should be on its way and is not.",
        ringback_reconciler::serve,
    )
}
