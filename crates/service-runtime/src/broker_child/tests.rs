use super::*;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use std::os::unix::fs::PermissionsExt;

fn pid_of(raw: u32) -> Pid {
    Pid::from_raw(i32::try_from(raw).unwrap()).unwrap()
}

fn plan(nats: &Path) -> Plan {
    std::fs::create_dir_all(nats).unwrap();
    let plan = Plan {
        program: find_nats_server().unwrap(),
        dir: nats.canonicalize().unwrap(),
        port: free_port().unwrap(),
        server_name: "ringback-test".to_owned(),
        password: Redacted::new("x".repeat(16)),
    };
    write_config(&plan).unwrap();
    plan
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn starts_restarts_on_its_port_and_stops() {
    let dir = tempfile::tempdir().unwrap();
    let nats = dir.path().join("nats");
    let broker = BrokerChild::start(&nats).await.unwrap();
    let url = broker.url();
    let first = broker.pid().unwrap();
    let mode = std::fs::metadata(config_path(&nats)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let config = broker.nats_config(&NatsConfig::default());
    assert_eq!(config.url.as_deref(), Some(url.as_str()));
    assert!(!format!("{broker:?} {config:?}").contains(config.password.as_ref().unwrap().expose()));

    kill_process(pid_of(first), Signal::KILL).unwrap();
    let mut pid = broker.watch_pid();
    let second = tokio::time::timeout(
        Duration::from_secs(10),
        pid.wait_for(|pid| pid.is_some_and(|pid| pid != first)),
    )
    .await
    .unwrap()
    .unwrap()
    .unwrap();
    assert_eq!(broker.url(), url);
    broker.stop().await;
    until("the server ends with its keeper", || test_kill_process(pid_of(second)).is_err()).await;
}

#[tokio::test]
async fn a_broker_left_behind_is_stopped_and_a_stranger_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let nats = dir.path().join("nats");
    let plan = plan(&nats);
    // Never dropped: it lives on as if its owner had been lost.
    let left = std::mem::ManuallyDrop::new(Running::start(&plan, READY_WITHIN).await.unwrap());
    let old = left.pid().unwrap();
    let broker = BrokerChild::start(&nats).await.unwrap();
    assert_ne!(broker.pid(), Some(old));
    until("the old one is gone", || test_kill_process(pid_of(old)).is_err()).await;
    broker.stop().await;

    // A pid file that names another process (this one) is not believed.
    std::fs::write(pid_path(&nats), std::process::id().to_string()).unwrap();
    stop_stale(&nats.canonicalize().unwrap()).await;
    assert!(!pid_path(&nats).exists());
}

#[tokio::test]
async fn the_server_ends_when_its_parent_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let nats = dir.path().join("nats");
    let plan = plan(&nats);
    let running = Running::start(&plan, READY_WITHIN).await.unwrap();
    let pid = running.pid().unwrap();
    // What the kernel does when a process is killed: its end of the pipe closes, nothing else is run.
    drop(running);
    until("the guard ends the server", || test_kill_process(pid_of(pid)).is_err()).await;
}
