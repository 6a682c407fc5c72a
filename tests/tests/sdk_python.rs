//! The official Python client, sync and async classes, in two versions, drives a running Ringback.

use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::tools;
use ringback_tests::{handler, run_script};

async fn drive(environment: &str, backend: Backend) {
    let Some(python) = tools::python(environment) else { return };
    let program = python.display().to_string();
    let mut options = Options::new(backend);
    options.endpoint("narrow", r#"{ builtin = "sleep" }"#, "slots = 1");
    options.process("plain", &[&program, &handler("plain.py")], "");
    options.process("generator", &[&program, &handler("generator.py")], "");
    options.process("aggregate", &[&program, &handler("generator.py"), "--aggregate"], "");
    let Some(stack) = Stack::dev(options).await else { return };
    let api = stack.api.clone();
    tokio::task::spawn_blocking(move || run_script(&python, "client.py", &api, &[]))
        .await
        .expect("the script");
}

#[tokio::test(flavor = "multi_thread")]
async fn version_1_12_on_sqlite() {
    drive("venv-runpod112", Backend::Sqlite).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn version_1_7_on_postgres() {
    drive("venv-runpod17", Backend::Postgres).await;
}
