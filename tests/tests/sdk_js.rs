//! The official JavaScript client drives a running Ringback.

use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::tools;
use ringback_tests::{handler, run_script};

#[tokio::test(flavor = "multi_thread")]
async fn version_1_1() {
    let (Some((node, folder)), Some(python)) = (tools::node(), tools::python("venv-runpod112")) else {
        return;
    };
    let program = python.display().to_string();
    let mut options = Options::new(Backend::Sqlite);
    options.endpoint("narrow", r#"{ builtin = "sleep" }"#, "slots = 1");
    options.process("plain", &[&program, &handler("plain.py")], "");
    options.process("generator", &[&program, &handler("generator.py")], "");
    let Some(stack) = Stack::dev(options).await else { return };
    let api = stack.api.clone();
    tokio::task::spawn_blocking(move || run_script(&node, "client.mjs", &api, &[("RUNPOD_SDK_DIR", folder)]))
        .await
        .expect("the script");
}
