//! The webhook dispatcher as a program of its own; the same as `ringback serve dispatcher`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ringback_service_runtime::host::main(
        "ringback-webhook-dispatcher",
        "Sends webhooks.",
        ringback_webhook_dispatcher::serve,
    )
}
