//! The API as a program of its own; the same as `ringback serve api`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ringback_service_runtime::host::main(
        "ringback-api-ingest",
        "Takes jobs over HTTP and answers clients.",
        ringback_api_ingest::serve,
    )
}
