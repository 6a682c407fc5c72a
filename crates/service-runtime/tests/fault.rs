//! Crash points, in processes of their own: this test runs itself again with `RINGBACK_FAULT` set.
#![cfg(feature = "faults")]
#![allow(clippy::unwrap_used, reason = "a test: what fails here fails it")]

use ringback_service_runtime::fault;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ROLE: &str = "RINGBACK_FAULT_TEST_HITS";

fn child(faults: &str, hits: u32) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "as_a_child_it_passes_the_points", "--nocapture"])
        .env("RINGBACK_FAULT", faults)
        .env(ROLE, hits.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn as_a_child_it_passes_the_points() {
    let hits = std::env::var(ROLE).map_or(0, |text| text.parse().unwrap());
    for _ in 0..hits {
        fault::point("a.before");
        fault::point("b.after");
    }
}

#[test]
fn the_nth_hit_kills() {
    assert!(fault::enabled());
    assert_eq!(child("b.after@3", 3).wait().unwrap().signal(), Some(9));
    assert!(child("b.after@3", 2).wait().unwrap().success());
    assert!(child("c.after@1", 3).wait().unwrap().success());
    assert_eq!(child("c@1,a.before@2", 2).wait().unwrap().signal(), Some(9));
    assert_eq!(child("a.before", 1).wait().unwrap().code(), Some(64), "a mistyped fault is refused");
}

#[test]
fn a_pause_waits_for_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("go");
    let mut paused = child(&format!("a.before@2:pause={}", file.display()), 3);
    let hit = dir.path().join("go.hit");
    let deadline = Instant::now() + Duration::from_secs(10);
    while !hit.exists() {
        assert!(Instant::now() < deadline, "the point is never hit");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(paused.try_wait().unwrap().is_none(), "it waits");
    std::fs::write(file, b"").unwrap();
    assert!(paused.wait().unwrap().success());
}
