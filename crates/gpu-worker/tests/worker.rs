//! The whole worker against a real nats-server. The tracker is played by the test, on the real subjects, so
//! that it can be away, hesitate and give orders.

#[path = "../../worker-protocol/tests/support/mod.rs"]
mod support;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use ringback_bus::{Bus, JobPublisher, JobSubject, Lane, Publication, Subjects, Verb};
use ringback_contracts::{Message, VERSION, job_id_of, payload_of, v1};
use ringback_domain::{EndpointId, JobId};
use ringback_gpu_worker::{App, ServedEndpoint, WorkerParts, served_endpoints};
use ringback_service_runtime::blobs::{BlobKey, BlobStore};
use ringback_service_runtime::config::{Builtin, CommandLine, EndpointConfig, ExecutorConfig, ProcessConfig};
use ringback_service_runtime::{Readiness, RingbackConfig, Shutdown, crypto_provider};
use ringback_test_support::nats::NatsServer;
use serde_json::{Value, json};
use support::{Sdk, eventually, handler, python};
use tokio::task::JoinHandle;

const LIMIT: Duration = Duration::from_secs(40);
const SHARDS: u32 = 2;
const ENDPOINT: EndpointId = EndpointId(5);

/// What the played tracker was told and how it answers.
#[derive(Default)]
struct Told {
    outcomes: Vec<v1::Outcome>,
    beats: Vec<v1::Heartbeat>,
    chunks: Vec<v1::Chunk>,
    /// Verdict per job; COMMITTED otherwise.
    verdicts: HashMap<JobId, v1::Verdict>,
    grants: HashMap<JobId, Vec<v1::grant_reply::Answer>>,
    asked: Vec<v1::GrantRequest>,
    stop: Vec<v1::StopOrder>,
}

#[derive(Clone, Default)]
struct Tracker {
    told: Arc<Mutex<Told>>,
    away: Arc<AtomicBool>,
}

impl Tracker {
    fn told<T>(&self, look: impl FnOnce(&mut Told) -> T) -> T {
        look(&mut self.told.lock().expect("told"))
    }

    async fn serve(&self, bus: &Bus) {
        for verb in [Verb::Outcomes, Verb::Beat, Verb::Grant, Verb::Chunks] {
            let mut requests = bus.serve(verb, 64).await.expect("served");
            let tracker = self.clone();
            tokio::spawn(async move {
                while let Some(request) = requests.next().await {
                    if tracker.away.load(Ordering::SeqCst) {
                        continue;
                    }
                    let answer = tracker.answer(verb, request.payload.clone());
                    request.respond(answer).await.expect("answered");
                }
            });
        }
        bus.flush().await.expect("subscribed");
    }

    fn answer(&self, verb: Verb, payload: Bytes) -> Bytes {
        self.told(|told| match verb {
            Verb::Outcomes => {
                let batch = v1::OutcomeBatch::decode(payload).expect("batch");
                let verdicts =
                    batch.outcomes.iter().map(|outcome| verdict(told, outcome.attempt.as_ref()) as i32);
                let verdicts = verdicts.collect();
                told.outcomes.extend(batch.outcomes);
                v1::OutcomeReply { verdicts }.encode_to_vec().into()
            }
            Verb::Beat => {
                told.beats.push(v1::Heartbeat::decode(payload).expect("beat"));
                v1::HeartbeatReply { stop: told.stop.clone(), lease_ms: 30_000 }.encode_to_vec().into()
            }
            Verb::Grant => {
                let request = v1::GrantRequest::decode(payload).expect("grant");
                let job = job_id_of(&request.job_id).expect("id");
                told.asked.push(request);
                let answers = told.grants.entry(job).or_default();
                let answer = if answers.is_empty() { drop_it() } else { answers.remove(0) };
                v1::GrantReply { answer: Some(answer) }.encode_to_vec().into()
            }
            Verb::Chunks => {
                let batch = v1::ChunkBatch::decode(payload).expect("chunks");
                let verdicts = vec![v1::Verdict::Committed as i32; batch.chunks.len()];
                told.chunks.extend(batch.chunks);
                v1::ChunkReply { verdicts }.encode_to_vec().into()
            }
            Verb::Artifacts => unreachable!("no endpoint of these tests makes artefacts"),
            Verb::Command => unreachable!("workers send no commands"),
            Verb::Endpoints => unreachable!("these workers are given their endpoints"),
        })
    }

    async fn outcome(&self, job: JobId) -> v1::Outcome {
        eventually("outcome", LIMIT, || {
            self.told(|told| told.outcomes.iter().find(|o| id(o) == job).cloned())
        })
        .await
    }
}

fn drop_it() -> v1::grant_reply::Answer {
    v1::grant_reply::Answer::Drop(v1::grant_reply::Drop { reason: "ended".into() })
}

fn verdict(told: &mut Told, attempt: Option<&v1::Attempt>) -> v1::Verdict {
    let job = attempt.and_then(|attempt| job_id_of(&attempt.job_id).ok()).expect("id");
    // Once: the next outcome of the job is committed.
    told.verdicts.remove(&job).unwrap_or(v1::Verdict::Committed)
}

fn id(outcome: &v1::Outcome) -> JobId {
    job_id_of(&outcome.attempt.as_ref().expect("attempt").job_id).expect("id")
}

fn output(outcome: &v1::Outcome) -> Value {
    let Some(v1::outcome::Result::Success(success)) = &outcome.result else { panic!("{:?}", outcome.result) };
    match success.output.as_ref().and_then(|payload| payload.at.as_ref()) {
        Some(v1::payload::At::Inline(bytes)) => serde_json::from_slice(bytes).expect("JSON"),
        other => panic!("{other:?}"),
    }
}

struct Rig {
    nats: NatsServer,
    bus: Bus,
    publisher: JobPublisher,
    tracker: Tracker,
    config: RingbackConfig,
    blobs: BlobStore,
    folder: tempfile::TempDir,
    next: u8,
}

struct Worker {
    shutdown: Shutdown,
    task: JoinHandle<()>,
}

impl Worker {
    async fn stop(self) {
        self.shutdown.trigger();
        tokio::time::timeout(LIMIT, self.task).await.expect("drained").expect("no panic");
    }
}

impl Rig {
    async fn start() -> Option<Self> {
        crypto_provider::install();
        let folder = tempfile::tempdir().expect("folder");
        let nats = NatsServer::start(folder.path()).await?;
        let mut config = RingbackConfig::default();
        config.nats.url = Some(nats.url());
        config.nats.user = Some(NatsServer::USER.to_owned());
        config.nats.password = Some(nats.password().to_owned().into());
        config.nats.install = "t1".into();
        config.nats.request_timeout_ms = 1_000;
        config.data.dir = folder.path().join("data");
        config.worker.heartbeat_ms = 300;
        config.worker.ack_wait_ms = 2_000;
        config.worker.drain_grace_ms = 300;
        let bus = Bus::connect(&config.nats, "test").await.expect("bus");
        bus.connected(LIMIT).await.expect("connected");
        bus.ensure_streams(SHARDS, "epoch").await.expect("streams");
        let tracker = Tracker::default();
        tracker.serve(&bus).await;
        let blobs = BlobStore::open(&config.blobs, &config.data.dir).expect("blobs");
        let publisher = bus.job_publisher();
        Some(Self { nats, bus, publisher, tracker, config, blobs, folder, next: 0 })
    }

    async fn worker(&self, executor: ExecutorConfig, slots: u32) -> Worker {
        let mut endpoint = EndpointConfig::new("main", executor);
        endpoint.slots = Some(slots);
        let bus = Bus::connect(&self.config.nats, "worker").await.expect("bus");
        let readiness = Readiness::new();
        let parts = WorkerParts {
            bus,
            blobs: self.blobs.clone(),
            readiness: readiness.clone(),
            endpoints: vec![ServedEndpoint { id: ENDPOINT, config: endpoint }],
            shards: SHARDS,
            guard: Some(PathBuf::from(env!("CARGO_BIN_EXE_ringback-gpu-worker"))),
        };
        let app = App::build(&self.config, parts).expect("built");
        let shutdown = Shutdown::new();
        let running = shutdown.clone();
        let task = tokio::spawn(async move { app.run(running).await.expect("runs") });
        Worker { shutdown, task }
    }

    fn job(&mut self) -> JobId {
        self.next += 1;
        JobId::from_parts(1_800_000_000_000 + u64::from(self.next), [self.next; 10])
    }

    fn subject(job: JobId) -> JobSubject {
        let shard = Subjects::shard_of(ENDPOINT, SHARDS);
        JobSubject { shard, endpoint: ENDPOINT, lane: Lane::Hi, job, run: 1, publish: 1 }
    }

    async fn publish(&self, job: JobId, input: v1::Payload, must_ask: bool) {
        let message = v1::JobMessage {
            version: VERSION,
            job_id: Bytes::copy_from_slice(job.as_bytes()),
            run: 1,
            publish: 1,
            project_id: 1,
            endpoint_id: ENDPOINT.0,
            endpoint: "main".into(),
            must_ask,
            input: Some(input),
            extra_json: Bytes::from_static(b"{\"webhook\": \"https://x\"}"),
            execution_timeout_ms: 60_000,
            ..v1::JobMessage::default()
        };
        let payload = message.encode_to_vec().into();
        let publication = Publication { subject: Self::subject(job), payload, traceparent: None };
        assert!(self.publisher.publish(publication).await.is_stored());
    }

    async fn submit(&mut self, input: Value) -> JobId {
        let job = self.job();
        self.publish(job, payload_of(input.to_string().into()), false).await;
        job
    }

    async fn gone(&self, job: JobId) {
        let end = std::time::Instant::now() + LIMIT;
        while self.bus.has_job(&Self::subject(job)).await.expect("asked") {
            assert!(std::time::Instant::now() < end, "the message of {job} is still there");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn is_there(&self, job: JobId) -> bool {
        self.bus.has_job(&Self::subject(job)).await.expect("asked")
    }

    async fn beat_naming(&self, job: JobId) -> v1::Beat {
        eventually("beat", LIMIT, || {
            self.tracker.told(|told| {
                let beats = told.beats.iter().flat_map(|beat| &beat.attempts);
                beats
                    .rev()
                    .find(|beat| beat.attempt.as_ref().is_some_and(|a| a.job_id == job.as_bytes()[..]))
                    .cloned()
            })
        })
        .await
    }
}

fn echo() -> ExecutorConfig {
    ExecutorConfig::Builtin(Builtin::Echo)
}

fn sleep() -> ExecutorConfig {
    ExecutorConfig::Builtin(Builtin::Sleep)
}

fn run_it(attempt: u32, nonce: u64) -> v1::grant_reply::Answer {
    v1::grant_reply::Answer::Run(v1::grant_reply::Run { attempt, nonce })
}

#[tokio::test(flavor = "multi_thread")]
async fn every_echo_job_has_one_outcome_and_leaves_the_queue() {
    let Some(mut rig) = Rig::start().await else { return };
    // Nothing is late here, however slow the machine is: no message comes twice and no outcome is sent twice.
    rig.config.worker.ack_wait_ms = 120_000;
    rig.config.nats.request_timeout_ms = 60_000;
    let worker = rig.worker(echo(), 8).await;
    let mut jobs = Vec::new();
    for n in 0..200 {
        jobs.push(rig.submit(json!({"n": n})).await);
    }
    for (n, job) in jobs.iter().enumerate() {
        let outcome = rig.tracker.outcome(*job).await;
        assert_eq!(output(&outcome), json!({"n": n}));
        assert_eq!(outcome.attempt.map(|a| (a.run, a.attempt)), Some((1, 1)));
    }
    for job in &jobs {
        rig.gone(*job).await;
    }
    assert!(rig.tracker.told(|told| told.asked.is_empty()), "no message was delivered without a slot for it");
    let told: Vec<JobId> = rig.tracker.told(|told| told.outcomes.iter().map(id).collect());
    assert_eq!(told.len(), told.iter().collect::<HashSet<_>>().len(), "each outcome once");
    worker.stop().await;
}

/// The worker is there before the tracker, and the tracker before the API has brought all endpoints into SQL.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_asks_for_its_endpoints_until_they_are_there() {
    let Some(rig) = Rig::start().await else { return };
    let config = RingbackConfig::from_toml(
        "[[endpoints]]\nname = \"a\"\nexecutor = { builtin = \"echo\" }\n\
         [[endpoints]]\nname = \"b\"\nexecutor = { builtin = \"echo\" }\n",
    )
    .expect("a configuration");
    let (readiness, shutdown) = (Readiness::new(), Shutdown::new());
    let waiting = tokio::spawn({
        let (config, bus) = (config.clone(), rig.bus.clone());
        let (readiness, shutdown) = (readiness.clone(), shutdown.clone());
        async move { served_endpoints(&config, &bus, &readiness, &shutdown).await }
    });
    let why = || readiness.snapshot().remove("endpoints").map_or_else(String::new, |check| check.reason);
    eventually("the missing tracker is named", LIMIT, || why().contains("state-tracker").then_some(())).await;
    let mut requests = rig.bus.serve(Verb::Endpoints, 4).await.expect("served");
    let mut known = 1;
    let served = loop {
        let request = requests.next().await.expect("asked");
        let asked = v1::EndpointsRequest::decode(request.payload.clone()).expect("a request");
        let keys = asked.endpoints.iter().zip(40_i64..).take(known).map(|(e, id)| v1::EndpointKey {
            project: e.project.clone(),
            name: e.name.clone(),
            id,
            config_revision: 0,
        });
        let reply = v1::EndpointsReply { shards: 3, endpoints: keys.collect() };
        request.respond(reply.encode_to_vec().into()).await.expect("answered");
        if known == 2 {
            break waiting.await.expect("no panic").expect("served").expect("no shutdown");
        }
        eventually("the missing endpoint is named", LIMIT, || why().contains("`b`").then_some(())).await;
        known = 2;
    };
    let ids: Vec<_> = served.endpoints.iter().map(|e| (e.config.name.as_str(), e.id.0)).collect();
    assert_eq!((served.shards, ids), (3, vec![("a", 40), ("b", 41)]));
    assert!(why().is_empty(), "{}", why());

    // Without a tracker, a shutdown ends the wait.
    drop(requests);
    shutdown.trigger();
    let none = served_endpoints(&config, &rig.bus, &Readiness::new(), &shutdown).await.expect("no error");
    assert!(none.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_job_is_reported_early_extended_and_stopped_by_order() {
    let Some(mut rig) = Rig::start().await else { return };
    let worker = rig.worker(sleep(), 2).await;
    let (first, second) =
        (rig.submit(json!({"seconds": 3600})).await, rig.submit(json!({"seconds": 3600})).await);
    let beat = rig.beat_naming(first).await;
    rig.beat_naming(second).await;
    assert!(beat.started_at_ms > 0);
    // Longer than the ack wait: it would have come again, and a grant would have been asked for.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(rig.tracker.told(|told| told.asked.is_empty()));

    // One order by the answer to a heartbeat, one by itself.
    let order =
        |beat: &v1::Beat| v1::StopOrder { attempt: beat.attempt.clone(), reason: "cancel_requested".into() };
    rig.tracker.told(|told| told.stop.push(order(&beat)));
    rig.gone(first).await;
    let other = rig.beat_naming(second).await;
    let orders = v1::StopOrders { stop: vec![order(&other)], ..v1::StopOrders::default() }.encode_to_vec();
    let worker_id =
        rig.tracker.told(|told| told.beats.last().map(|beat| beat.worker_id.clone())).expect("beat");
    assert!(rig.bus.announce_stop(&worker_id, orders.into()).await);
    rig.gone(second).await;
    assert!(rig.tracker.told(|told| told.outcomes.is_empty()), "a stopped attempt has no outcome");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn outcomes_wait_for_the_tracker_and_survive_the_worker() {
    let Some(mut rig) = Rig::start().await else { return };
    let worker = rig.worker(echo(), 4).await;
    rig.tracker.away.store(true, Ordering::SeqCst);
    let job = rig.submit(json!({"kept": true})).await;
    // It waits in the spool, and its message is not acknowledged.
    let spool = rig.folder.path().join("data/spool");
    eventually("spooled", LIMIT, || {
        let files = std::fs::read_dir(&spool).ok()?.filter_map(Result::ok);
        let bytes: u64 = files
            .filter(|file| file.file_name().to_string_lossy().starts_with("outcomes-"))
            .filter_map(|file| file.metadata().ok())
            .map(|meta| meta.len())
            .sum();
        (bytes > 0).then_some(())
    })
    .await;
    assert!(rig.is_there(job).await);
    let former = {
        worker.task.abort();
        let _ = worker.task.await;
        rig.tracker.told(|told| told.beats.first().map(|beat| beat.worker_id.clone()))
    };
    rig.tracker.away.store(false, Ordering::SeqCst);
    rig.tracker.told(|told| told.grants.insert(job, vec![drop_it(); 3]));
    let again = rig.worker(echo(), 4).await;
    assert_eq!(output(&rig.tracker.outcome(job).await), json!({"kept": true}));
    rig.gone(job).await;
    let replaces: Vec<String> =
        rig.tracker.told(|told| told.beats.iter().flat_map(|beat| beat.replaces.clone()).collect());
    if let Some(former) = former {
        assert!(replaces.contains(&former), "{former} of {replaces:?}");
    } else {
        assert!(!replaces.is_empty());
    }
    again.stop().await;
    let third = rig.worker(echo(), 4).await;
    let marker = rig.submit(json!(1)).await;
    rig.tracker.outcome(marker).await;
    let count = rig.tracker.told(|told| told.outcomes.iter().filter(|o| id(o) == job).count());
    assert_eq!(count, 1, "a committed outcome is not sent again");
    third.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_was_out_before_needs_a_grant() {
    let Some(mut rig) = Rig::start().await else { return };
    let (run, wait, void) = (rig.job(), rig.job(), rig.job());
    rig.tracker.told(|told| {
        let later = v1::grant_reply::Answer::Wait(v1::grant_reply::Wait { retry_after_ms: 50 });
        told.grants.insert(run, vec![run_it(2, 77)]);
        told.grants.insert(wait, vec![later.clone(), later, run_it(5, 78)]);
    });
    for job in [run, wait, void] {
        rig.publish(job, payload_of(Bytes::from_static(b"[1]")), true).await;
    }
    let worker = rig.worker(echo(), 1).await;
    let attempt = |outcome: v1::Outcome| outcome.attempt.map(|a| (a.attempt, a.nonce));
    assert_eq!(attempt(rig.tracker.outcome(run).await), Some((2, 77)));
    assert_eq!(attempt(rig.tracker.outcome(wait).await), Some((5, 78)));
    for job in [run, wait, void] {
        rig.gone(job).await;
    }
    assert!(rig.tracker.told(|told| told.outcomes.iter().all(|o| id(o) != void)));
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn verdicts_decide_what_becomes_of_the_message() {
    let Some(mut rig) = Rig::start().await else { return };
    let jobs = [rig.job(), rig.job(), rig.job(), rig.job()];
    let [requeued, retried, quarantined, obsolete] = jobs;
    rig.tracker.told(|told| {
        told.verdicts.insert(requeued, v1::Verdict::Requeued);
        told.verdicts.insert(retried, v1::Verdict::Retry);
        told.verdicts.insert(quarantined, v1::Verdict::Quarantined);
        told.verdicts.insert(obsolete, v1::Verdict::Obsolete);
        told.grants.insert(requeued, vec![run_it(2, 9)]);
    });
    for job in jobs {
        rig.publish(job, payload_of(Bytes::from_static(b"{}")), false).await;
    }
    let worker = rig.worker(echo(), 4).await;
    for job in jobs {
        rig.gone(job).await;
    }
    let attempts = |job| -> Vec<u32> {
        rig.tracker.told(|told| {
            let of_job = told.outcomes.iter().filter(|o| id(o) == job);
            of_job.filter_map(|o| o.attempt.as_ref().map(|a| a.attempt)).collect()
        })
    };
    assert_eq!(attempts(requeued), [1, 2], "given back, granted, run again");
    assert_eq!(attempts(retried), [1, 1], "the same outcome sent again");
    assert_eq!(attempts(quarantined), [1]);
    assert_eq!(attempts(obsolete), [1]);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_hands_back_what_runs() {
    let Some(mut rig) = Rig::start().await else { return };
    let worker = rig.worker(sleep(), 1).await;
    let job = rig.submit(json!({"seconds": 3600})).await;
    rig.beat_naming(job).await;
    rig.tracker.told(|told| told.verdicts.insert(job, v1::Verdict::Requeued));
    worker.stop().await;
    let outcome = rig.tracker.outcome(job).await;
    assert!(matches!(outcome.result, Some(v1::outcome::Result::HandBack(_))), "{:?}", outcome.result);
    assert!(rig.is_there(job).await, "its message is back in the queue");
    rig.tracker.told(|told| {
        told.outcomes.clear();
        told.grants.insert(job, vec![run_it(2, 5)]);
    });
    let other = rig.worker(echo(), 1).await;
    rig.tracker.outcome(job).await;
    rig.gone(job).await;
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_payloads_travel_as_blobs() {
    let Some(mut rig) = Rig::start().await else { return };
    let worker = rig.worker(echo(), 1).await;
    let job = rig.job();
    let usage = json!({"prompt_tokens": 7, "completion_tokens": 5});
    let large = Bytes::from(json!({"text": "y".repeat(600_000), "usage": usage}).to_string());
    let key = BlobKey::new(format!("in/{}", job.simple())).expect("key");
    rig.blobs.put(&key, large.clone()).await.expect("put");
    let at = Some(v1::payload::At::BlobKey(key.as_str().to_owned()));
    rig.publish(job, v1::Payload { at, size_bytes: large.len() as u64 }, false).await;
    let outcome = rig.tracker.outcome(job).await;
    let said = outcome.completion.expect("what it says of a completion");
    assert_eq!((said.total_tokens, said.content_cut), (Some(12), true));
    let Some(v1::outcome::Result::Success(success)) = outcome.result else { panic!("{:?}", outcome.result) };
    let payload = success.output.expect("output");
    assert_eq!(payload.size_bytes, large.len() as u64);
    let Some(v1::payload::At::BlobKey(stored)) = payload.at else { panic!("inline") };
    let stored = BlobKey::new(stored).expect("key");
    assert_eq!(rig.blobs.get(&stored, u64::MAX).await.expect("stored"), large);

    // An input that is gone for good fails its job and says so.
    let lost = rig.job();
    let at = Some(v1::payload::At::BlobKey(format!("in/{}", lost.simple())));
    rig.publish(lost, v1::Payload { at, size_bytes: 1 }, false).await;
    let outcome = rig.tracker.outcome(lost).await;
    let Some(v1::outcome::Result::Failure(failure)) = outcome.result else { panic!("{:?}", outcome.result) };
    assert!(failure.error.contains("does not exist"), "{}", failure.error);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_streams_before_its_outcome_and_its_log_comes_along() {
    let Some(python) = python(Sdk::V1_12) else { return };
    let Some(mut rig) = Rig::start().await else { return };
    let script = handler("generator.py").display().to_string();
    let command = CommandLine::List(vec![python.display().to_string(), script]);
    let process =
        ProcessConfig { command, cwd: Some(rig.folder.path().to_owned()), ..ProcessConfig::default() };
    let worker = rig.worker(ExecutorConfig::Process(process), 1).await;
    let job = rig.submit(json!({"count": 20})).await;
    let outcome = rig.tracker.outcome(job).await;
    assert_eq!(outcome.chunks, 20);
    let order: Vec<u32> = rig.tracker.told(|told| told.chunks.iter().map(|chunk| chunk.n).collect());
    assert_eq!(order, (0..20).collect::<Vec<_>>(), "all of them, in order, before the outcome");
    let logs = outcome.logs.and_then(|payload| payload.at).expect("logs");
    let v1::payload::At::Inline(logs) = logs else { panic!("blob") };
    assert!(String::from_utf8_lossy(&logs).contains("Finished running generator"), "{logs:?}");
    rig.gone(job).await;

    let fails = rig.submit(json!({"count": 1, "size": 1_200_000})).await;
    let outcome = rig.tracker.outcome(fails).await;
    let Some(v1::outcome::Result::Failure(failure)) = outcome.result else { panic!("{:?}", outcome.result) };
    assert!(failure.error.contains("limit is 1000000 bytes"), "{}", failure.error);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_broker_may_vanish_with_everything() {
    let Some(mut rig) = Rig::start().await else { return };
    let worker = rig.worker(sleep(), 4).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(rig.submit(json!({"seconds": 6})).await);
    }
    for job in &held {
        rig.beat_naming(*job).await;
    }
    rig.nats.kill9();
    rig.nats.delete_store();
    rig.nats.start_again().await;
    rig.bus.connected(LIMIT).await.expect("connected");
    rig.bus.ensure_streams(SHARDS, "epoch").await.expect("streams");
    // The new stream numbers its messages from 1 again: an old acknowledgement must not remove them.
    let mut fresh = Vec::new();
    for _ in 0..3 {
        fresh.push(rig.submit(json!({"seconds": 3600})).await);
    }
    for job in &held {
        let outcome = rig.tracker.outcome(*job).await;
        assert_eq!(output(&outcome), json!({"seconds": 6}));
    }
    // Time for wrong acknowledgements to arrive.
    rig.bus.flush().await.expect("flushed");
    tokio::time::sleep(Duration::from_millis(500)).await;
    for job in &fresh {
        assert!(rig.is_there(*job).await, "{job} was removed by an acknowledgement of another message");
    }
    worker.shutdown.trigger();
    let _ = tokio::time::timeout(LIMIT, worker.task).await;
}
