//! `ringback-count` in small: webhooks of many jobs while dispatchers are killed at random, counted at the receiver.

use ringback_test_support::files::Folder;
use ringback_test_support::postgres::Postgres;
use ringback_test_support::tools;
use std::process::Command;

/// Runs it; it says "sound" only when each id arrived, in order, with one body, and every copy is explained by a
/// kill of the process that brought the one before, or by a told lapse of its lease.
fn count(seed: &str, more: &[&str]) {
    let folder = Folder::new("count");
    let beside = |name: &str| {
        let path = tools::ringback().with_file_name(name);
        assert!(
            path.exists(),
            "{} is not built: run `cargo build --workspace --all-targets`",
            path.display()
        );
        path
    };
    let Some(nats) = tools::nats_server() else { return };
    let output = Command::new(beside("ringback-count"))
        .args(["count", "--webhooks", "3000", "--kill-every-ms", "800", "--backlog", "600", "--seed", seed])
        .args(more)
        .arg("--dispatcher")
        .arg(beside("ringback-webhook-dispatcher"))
        .arg("--data")
        .arg(folder.path())
        .arg("--nats-server")
        .arg(nats)
        .output()
        .expect("run ringback-count");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}:\n{out}\n{err}", output.status);
    assert!(out.lines().any(|line| line == "sound"), "{out}");
    let line =
        |name: &str| out.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{out}"));
    let kills: u64 =
        line("dispatchers killed").split_whitespace().last().unwrap_or_default().parse().expect("kills");
    assert!(kills >= 2, "it was too quick to be hard: {out}");
    println!("{out}");
}

#[test]
fn nothing_is_lost_while_dispatchers_are_killed_on_sqlite() {
    count("7", &[]);
}

#[tokio::test]
async fn nothing_is_lost_while_dispatchers_are_killed_on_postgres() {
    let Some(server) = Postgres::start().await else { return };
    let url = server.database("count").await;
    tokio::task::spawn_blocking(move || count("11", &["--database", &url])).await.expect("it ran");
}
