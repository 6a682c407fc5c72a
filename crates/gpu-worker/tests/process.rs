//! The `process` executor with real handlers on the real SDK, in both lines of the protocol.

#[path = "../../worker-protocol/tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use ringback_domain::{AttemptRef, JobId, Nonce};
use ringback_gpu_worker::testing::{End, ExecEvent, JobKey, ProcessPool, ProcessSettings, Work};
use ringback_worker_protocol::{Hub, HubConfig, router};
use serde_json::{Value, json};
use support::{Sdk, eventually, handler, python};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

const LIMIT: Duration = Duration::from_secs(60);

struct Rig {
    pool: ProcessPool,
    events: UnboundedReceiver<ExecEvent>,
    next: u8,
    folder: tempfile::TempDir,
}

/// What became of a job.
#[derive(Debug)]
struct Outcome {
    end: End,
    logs: String,
    execution_ms: u64,
}

impl Outcome {
    fn output(&self) -> Value {
        match &self.end {
            End::Success(Some(output)) => serde_json::from_slice(output).expect("JSON"),
            other => panic!("no output: {other:?}"),
        }
    }

    fn error(&self) -> (&str, &str) {
        match &self.end {
            End::Failure { error, error_type, .. } => (error, error_type),
            End::Crash { error } => (error, "crash"),
            other => panic!("no error: {other:?}"),
        }
    }
}

async fn settings(command: Vec<String>, folder: &Path) -> (ProcessSettings, Hub) {
    let hub = Hub::new(HubConfig { hold: Duration::from_secs(2), ..HubConfig::default() });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let base_url = format!("http://{}", listener.local_addr().expect("address"));
    let app = router(hub.clone());
    tokio::spawn(async move { axum::serve(listener, app).await });
    let cwd = folder.join("cwd");
    std::fs::create_dir_all(&cwd).expect("folder");
    let settings = ProcessSettings {
        endpoint: "tts".into(),
        command,
        folder: cwd,
        private_folder: false,
        env: BTreeMap::new(),
        first_port: None,
        pass_env: Vec::new(),
        visible_devices: None,
        device: "cpu".into(),
        slots: 1,
        concurrency: None,
        stop_grace: Duration::from_secs(2),
        kill_grace: Duration::from_secs(2),
        start_timeout: LIMIT,
        nice: 10,
        pause_idle: true,
        log_max_bytes: 64 * 1024,
        ping_interval: Duration::from_secs(5),
        id_prefix: "e1".into(),
        state_dir: folder.join("children"),
        guard: PathBuf::from(env!("CARGO_BIN_EXE_ringback-gpu-worker")),
        base_url,
    };
    (settings, hub)
}

fn command(python: &Path, script: &str, args: &[&str]) -> Vec<String> {
    let script = handler(script).display().to_string();
    [python.display().to_string(), script]
        .into_iter()
        .chain(args.iter().map(|arg| (*arg).to_owned()))
        .collect()
}

impl Rig {
    async fn start(
        sdk: Sdk,
        script: &str,
        args: &[&str],
        change: impl FnOnce(&mut ProcessSettings),
    ) -> Option<Self> {
        let python = python(sdk)?;
        Some(Self::start_command(command(&python, script, args), change).await)
    }

    async fn start_command(command: Vec<String>, change: impl FnOnce(&mut ProcessSettings)) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let (mut settings, hub) = settings(command, folder.path()).await;
        change(&mut settings);
        let (sender, events) = unbounded_channel();
        Self { pool: ProcessPool::start(settings, hub, sender), events, next: 0, folder }
    }

    fn work(&mut self, input: &Value, timeout: Duration) -> Work {
        self.next += 1;
        let job = JobId::from_parts(1_800_000_000_000, [self.next; 10]);
        Work {
            key: JobKey {
                job,
                attempt: AttemptRef { run: 1, attempt: 1, nonce: Nonce(u64::from(self.next)) },
            },
            public_id: job.public(false),
            input: Bytes::from(input.to_string()),
            extra_json: Bytes::from_static(b"{\"webhook\":\"https://x/y\"}"),
            timeout,
        }
    }

    async fn event(&mut self, what: &str) -> ExecEvent {
        match tokio::time::timeout(LIMIT, self.events.recv()).await {
            Ok(Some(event)) => event,
            Ok(None) => panic!("the pool has gone before: {what}"),
            Err(_) => panic!("no event: {what}; trouble: {:?}", self.pool.trouble()),
        }
    }

    async fn open(&mut self, slots: usize) {
        while self.pool.open_slots() < slots {
            let _ = tokio::time::timeout(Duration::from_millis(50), self.events.recv()).await;
            assert!(self.pool.trouble().is_none(), "{:?}", self.pool.trouble());
        }
    }

    async fn begin(&mut self, input: Value) -> JobKey {
        self.begin_for(input, LIMIT).await
    }

    async fn begin_for(&mut self, input: Value, timeout: Duration) -> JobKey {
        self.open(1).await;
        let work = self.work(&input, timeout);
        let key = work.key;
        self.pool.assign(work).expect("assigned");
        key
    }

    async fn started(&mut self, wanted: JobKey) {
        loop {
            match self.event("started").await {
                ExecEvent::Started { key } if key == wanted => return,
                ExecEvent::Finished { end, .. } => panic!("finished before it started: {end:?}"),
                _ => {}
            }
        }
    }

    async fn finished(&mut self, wanted: JobKey) -> Outcome {
        loop {
            if let ExecEvent::Finished { key, end, execution_ms, logs } = self.event("finished").await
                && key == wanted
            {
                return Outcome { end, execution_ms, logs: String::from_utf8(logs.to_vec()).expect("utf-8") };
            }
        }
    }

    async fn released(&mut self, wanted: JobKey) {
        loop {
            if let ExecEvent::Released { key } = self.event("released").await
                && key == wanted
            {
                return;
            }
        }
    }

    async fn run(&mut self, input: Value) -> Outcome {
        let key = self.begin(input).await;
        self.finished(key).await
    }
}

fn alive(pid: &str) -> bool {
    // A zombie is dead: it only waits to be collected.
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
}

/// A field of `/proc/<pid>/stat`, counted from 1 as in proc(5).
fn stat_field(pid: &str, field: usize) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process is there");
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    after_name.split_whitespace().nth(field - 3).expect("the field").to_owned()
}

fn cpu_ticks(pid: &str) -> u64 {
    [14, 15].map(|field| stat_field(pid, field).parse::<u64>().expect("a number")).iter().sum()
}

/// Share of a core, at 100 ticks a second, that the process uses.
async fn cpu_percent(pid: &str, time: Duration) -> u64 {
    let (begun, ticks) = (Instant::now(), cpu_ticks(pid));
    tokio::time::sleep(time).await;
    (cpu_ticks(pid) - ticks) * 100 / u64::try_from(begun.elapsed().as_millis() / 10).expect("few")
}

/// Waits until an idle child of SDK 1.7 has been stopped.
async fn paused(pid: &str) {
    eventually("the idle child is stopped", LIMIT, || (stat_field(pid, 3) == "T").then_some(())).await;
}

async fn read_when_there(path: &Path) -> String {
    eventually("pid file", LIMIT, || std::fs::read_to_string(path).ok().filter(|text| !text.is_empty())).await
}

#[tokio::test]
async fn plain_handlers_with_their_errors_and_logs() {
    for sdk in [Sdk::V1_12, Sdk::V1_7] {
        let Some(mut rig) = Rig::start(sdk, "plain.py", &[], |_| {}).await else { return };
        let input = json!({"text": "Zürich", "n": [1, 2.5]});
        assert_eq!(rig.run(input.clone()).await.output(), input);
        let job = rig.run(json!({"mode": "job"})).await.output();
        assert_eq!(job["webhook"], "https://x/y");

        let logged = rig.run(json!({"mode": "log", "text": "hello from the handler"})).await;
        assert!(logged.logs.contains("stdout hello from the handler\n"), "{}", logged.logs);
        assert!(logged.logs.contains("stderr hello from the handler on stderr\n"), "{}", logged.logs);
        let next = rig.run(json!({"mode": "none"})).await;
        assert!(!next.logs.contains("hello"), "{}", next.logs);

        let raised = rig.run(json!({"mode": "raise", "text": "bad voice"})).await;
        assert_eq!(raised.error().1, "<class 'ValueError'>");
        assert!(raised.logs.contains("ERROR Captured Handler Exception"), "{}", raised.logs);
        assert_eq!(rig.run(json!({"mode": "error"})).await.error(), ("no such voice", ""));

        let lost = rig.run(json!({"mode": "unserialisable"})).await;
        assert_eq!(lost.error().1, "ResultNotPosted");
        assert!(lost.logs.contains("not JSON serializable"), "{}", lost.logs);
        assert_eq!(rig.run(json!({"mode": "nan"})).await.error().1, "ResultNotJson");

        let slept = rig.run(json!({"mode": "sleep", "seconds": 0.5})).await;
        assert!((400..5000).contains(&slept.execution_ms), "{}", slept.execution_ms);
        rig.pool.end().await;
    }
}

#[tokio::test]
async fn a_child_gets_an_allow_listed_environment() {
    let rig = Rig::start(Sdk::V1_12, "plain.py", &[], |settings| {
        settings.env.insert("MODEL".into(), "m1".into());
        // Belongs to the protocol: ignored.
        settings.env.insert("RUNPOD_AI_API_KEY".into(), "mine".into());
        settings.pass_env.push("CARGO_MANIFEST_DIR".into());
    });
    let Some(mut rig) = rig.await else { return };
    let output = rig.run(json!({"mode": "environment"})).await.output();
    let names: Vec<&str> =
        output["names"].as_array().expect("list").iter().filter_map(Value::as_str).collect();
    for name in ["PATH", "MODEL", "CARGO_MANIFEST_DIR", "RUNPOD_POD_ID", "PYTHONUNBUFFERED"] {
        assert!(names.contains(&name), "{name} of {names:?}");
    }
    // Cargo sets this for the test, as an operator might set credentials for the worker.
    assert!(std::env::var_os("CARGO_PKG_NAME").is_some());
    assert!(!names.contains(&"CARGO_PKG_NAME"));
}

#[tokio::test]
async fn a_crash_has_a_reason_and_the_next_job_runs() {
    for sdk in [Sdk::V1_12, Sdk::V1_7] {
        let Some(mut rig) = Rig::start(sdk, "plain.py", &[], |_| {}).await else { return };
        let crashed = rig.run(json!({"mode": "crash", "code": 3})).await;
        let (error, kind) = crashed.error();
        assert_eq!(kind, "crash");
        assert!(error.contains("exit code 3"), "{error}");
        assert!(error.contains("about to end this process"), "{error}");
        // Also with SDK 1.7, whose list of jobs survives on disk.
        assert_eq!(rig.run(json!({"a": 1})).await.output(), json!({"a": 1}));
    }
}

#[tokio::test]
async fn children_that_share_a_folder_do_not_share_their_jobs() {
    let rig = Rig::start(Sdk::V1_7, "plain.py", &[], |settings| {
        settings.slots = 2;
        settings.private_folder = true;
    });
    let Some(mut rig) = rig.await else { return };
    rig.open(2).await;
    let first = rig.begin(json!({"mode": "sleep", "seconds": 3})).await;
    rig.started(first).await;
    let began = Instant::now();
    let second = rig.run(json!({"a": 1})).await;
    assert_eq!(second.output(), json!({"a": 1}));
    assert!(began.elapsed() < Duration::from_secs(3), "it ran beside the first");
    assert_eq!(rig.finished(first).await.output(), json!({"slept": 3}));
}

#[tokio::test]
async fn refresh_gives_the_next_job_a_fresh_process() {
    for sdk in [Sdk::V1_12, Sdk::V1_7] {
        let Some(mut rig) = Rig::start(sdk, "plain.py", &[], |_| {}).await else { return };
        let before = rig.run(json!({"mode": "refresh"})).await.output()["pid"].clone();
        let after = rig.run(json!({"mode": "pid"})).await.output()["pid"].clone();
        assert_ne!(before, after);
        eventually("the old process ends", LIMIT, || (!alive(&before.to_string())).then_some(())).await;
    }
}

#[tokio::test]
async fn a_blocking_handler_is_really_stopped() {
    for sdk in [Sdk::V1_12, Sdk::V1_7] {
        let Some(mut rig) = Rig::start(sdk, "blocking.py", &[], |_| {}).await else { return };
        let pid_file = rig.folder.path().join("pid");
        let key = rig.begin(json!({"pid_file": pid_file})).await;
        rig.started(key).await;
        let pid = read_when_there(&pid_file).await;
        rig.pool.stop(key);
        assert_eq!(rig.finished(key).await.end, End::Stopped);
        rig.released(key).await;
        assert!(!alive(&pid), "released means that nothing runs any more");
        let again = rig.run(json!({"seconds": 0})).await;
        assert_eq!(again.output(), json!({"done": true}));
    }
}

#[tokio::test]
async fn what_ignores_sigterm_is_killed_with_its_helpers() {
    let Some(mut rig) = Rig::start(Sdk::V1_12, "stubborn.py", &[], |_| {}).await else { return };
    let pid_file = rig.folder.path().join("pid");
    let key = rig.begin_for(json!({"pid_file": pid_file}), Duration::from_secs(3)).await;
    let pids = read_when_there(&pid_file).await;
    // Told at once, released when it is true.
    assert_eq!(rig.finished(key).await.end, End::Overrun);
    rig.released(key).await;
    for pid in pids.split(' ') {
        eventually("group ends", LIMIT, || (!alive(pid)).then_some(())).await;
    }
}

#[tokio::test]
async fn an_async_handler_is_cancelled_without_losing_its_process() {
    let Some(mut rig) = Rig::start(Sdk::V1_12, "async_handler.py", &[], |_| {}).await else { return };
    let note = rig.folder.path().join("cancelled");
    let key = rig.begin(json!({"seconds": 600, "cancel_file": note})).await;
    rig.started(key).await;
    rig.pool.stop(key);
    assert_eq!(rig.finished(key).await.end, End::Stopped);
    assert!(note.exists());
    assert_eq!(rig.run(json!({})).await.output(), json!({"waited": 0}));
}

#[tokio::test]
async fn one_child_runs_several_jobs_and_a_stop_spares_the_others() {
    for sdk in [Sdk::V1_12, Sdk::V1_7] {
        let args = ["--concurrency", "8"];
        let rig = Rig::start(sdk, "concurrency.py", &args, |settings| settings.slots = 3);
        let Some(mut rig) = rig.await else { return };
        rig.open(3).await;
        let mut keys = Vec::new();
        for seconds in [20.0, 4.0, 4.0] {
            let work = rig.work(&json!({"seconds": seconds}), LIMIT);
            keys.push(work.key);
            rig.pool.assign(work).expect("assigned");
        }
        let extra = rig.work(&json!({}), LIMIT);
        assert!(rig.pool.assign(extra).is_err(), "no more than the slots");
        let children = std::fs::read_dir(rig.folder.path().join("children")).expect("folder").count();
        assert_eq!(children, 1, "one child takes them all");
        rig.started(keys[2]).await;
        if sdk == Sdk::V1_12 {
            rig.pool.stop(keys[0]);
            assert_eq!(rig.finished(keys[0]).await.end, End::Stopped);
        }
        assert_eq!(rig.finished(keys[1]).await.output()["peak"], 3);
        assert_eq!(rig.finished(keys[2]).await.output()["peak"], 3);
    }
}

#[tokio::test]
async fn generators_and_progress() {
    let Some(mut rig) = Rig::start(Sdk::V1_12, "generator.py", &["--aggregate"], |_| {}).await else {
        return;
    };
    let key = rig.begin(json!({"count": 4})).await;
    let mut seen = 0;
    let end = loop {
        match rig.event("chunks").await {
            ExecEvent::Chunk { output, .. } => {
                let chunk: Value = serde_json::from_slice(&output).expect("JSON");
                assert_eq!(chunk["n"], seen);
                seen += 1;
            }
            ExecEvent::Finished { key: done, end, .. } if done == key => break end,
            _ => {}
        }
    };
    assert_eq!(seen, 4);
    let End::Success(Some(output)) = end else { panic!("{end:?}") };
    assert_eq!(serde_json::from_slice::<Value>(&output).expect("JSON").as_array().map(Vec::len), Some(4));
}

#[tokio::test]
async fn a_crash_loop_is_slowed_down_and_explained() {
    let Some(rig) = Rig::start(Sdk::V1_12, "slow_start.py", &["--crash", "2"], |_| {}).await else { return };
    let trouble = eventually("trouble", LIMIT, || rig.pool.trouble()).await;
    assert!(trouble.contains("exit code 2") && trouble.contains("cannot load the model"), "{trouble}");
    assert_eq!(rig.pool.open_slots(), 0);
}

#[tokio::test]
async fn a_missing_program_is_named() {
    let rig = Rig::start_command(vec!["/no/such/program".into()], |_| {}).await;
    let trouble = eventually("trouble", LIMIT, || rig.pool.trouble()).await;
    assert!(trouble.contains("/no/such/program"), "{trouble}");
}

#[tokio::test]
async fn the_end_of_the_pool_hands_back_and_leaves_nothing() {
    let Some(mut rig) = Rig::start(Sdk::V1_12, "blocking.py", &[], |_| {}).await else { return };
    let pid_file = rig.folder.path().join("pid");
    let key = rig.begin(json!({"pid_file": pid_file})).await;
    let pid = read_when_there(&pid_file).await;
    rig.pool.end().await;
    assert!(matches!(rig.finished(key).await.end, End::HandBack { .. }));
    assert!(!alive(&pid));
    let left = std::fs::read_dir(rig.folder.path().join("children")).expect("folder").count();
    assert_eq!(left, 0, "its folder is removed");
}

/// SDK 1.7 spins on a whole core while it waits for a job.
#[tokio::test]
async fn an_idle_child_that_would_spin_costs_nothing() {
    let patient = |settings: &mut ProcessSettings| settings.kill_grace = LIMIT;
    let Some(mut rig) = Rig::start(Sdk::V1_7, "plain.py", &[], patient).await else { return };
    for round in 0..2 {
        let pid = rig.run(json!({"mode": "pid"})).await.output()["pid"].to_string();
        paused(&pid).await;
        // Through several takes: the hub of this test holds each for 2 s.
        let percent = cpu_percent(&pid, Duration::from_secs(5)).await;
        println!("round {round}: {percent} % of a core");
        assert!(percent < 15, "an idle child uses {percent} % of a core");
    }
    // A stopped child hears SIGTERM: otherwise it would be killed only after the grace.
    let begun = Instant::now();
    rig.pool.end().await;
    assert!(begun.elapsed() < LIMIT, "it was ended by SIGKILL");
}

#[tokio::test]
async fn a_child_is_not_stopped_where_the_operator_says_so() {
    let working = |settings: &mut ProcessSettings| settings.pause_idle = false;
    let Some(mut rig) = Rig::start(Sdk::V1_7, "plain.py", &[], working).await else { return };
    let pid = rig.run(json!({"mode": "pid"})).await.output()["pid"].to_string();
    for _ in 0..30 {
        let percent = cpu_percent(&pid, Duration::from_millis(100)).await;
        assert_ne!(stat_field(&pid, 3), "T", "{percent} % of a core before");
    }
    println!("{} % of a core", cpu_percent(&pid, Duration::from_secs(2)).await);
}

/// The worker here is a process of its own, so that it can be killed: this very test program again.
#[tokio::test]
async fn a_killed_worker_leaves_no_handler() {
    if python(Sdk::V1_12).is_none() || python(Sdk::V1_7).is_none() {
        return;
    }
    for state in ["busy", "paused"] {
        killed_worker_leaves_no_handler(state).await;
    }
}

async fn killed_worker_leaves_no_handler(state: &str) {
    let folder = tempfile::tempdir().expect("folder");
    let mut worker = std::process::Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "be_a_worker", "--ignored", "--nocapture"])
        .env("RINGBACK_TEST_WORKER", folder.path())
        .env("RINGBACK_TEST_STATE", state)
        .spawn()
        .expect("starts");
    let pid = read_when_there(&folder.path().join("pid")).await;
    assert!(alive(&pid));
    if state == "paused" {
        paused(&pid).await;
    }
    worker.kill().expect("SIGKILL");
    let _ = worker.wait();
    eventually("the handler ends with its worker", Duration::from_secs(10), || (!alive(&pid)).then_some(()))
        .await;
}

/// Not a test: the worker of the test above.
#[tokio::test]
#[ignore = "run by a_killed_worker_leaves_no_handler"]
async fn be_a_worker() {
    let Some(folder) = std::env::var_os("RINGBACK_TEST_WORKER").map(PathBuf::from) else { return };
    if std::env::var("RINGBACK_TEST_STATE").is_ok_and(|state| state == "paused") {
        let Some(mut rig) = Rig::start(Sdk::V1_7, "plain.py", &[], |_| {}).await else { return };
        let pid = rig.run(json!({"mode": "pid"})).await.output()["pid"].to_string();
        std::fs::write(folder.join("pid"), pid).expect("written");
        return std::future::pending().await;
    }
    let Some(mut rig) = Rig::start(Sdk::V1_12, "blocking.py", &[], |_| {}).await else { return };
    let key = rig.begin(json!({"pid_file": folder.join("pid")})).await;
    rig.finished(key).await;
}
