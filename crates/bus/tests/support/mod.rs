//! A real nats-server and a bus connected to it.

#![allow(dead_code, reason = "each test file uses its own part of this")]
#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

use bytes::Bytes;
use ringback_bus::{
    Bus, ConsumerSettings, JobDelivery, JobPuller, JobSubject, Lane, Publication, PullSource, PullerSettings,
};
use ringback_domain::{EndpointId, JobId};
use ringback_service_runtime::broker_child::BrokerChild;
use ringback_service_runtime::config::NatsConfig;
use std::time::Duration;
use tokio::time::{Instant, timeout};

pub(crate) const ENDPOINT: EndpointId = EndpointId(9);
pub(crate) const SHARD: u32 = 1;
pub(crate) const EPOCH: &str = "epoch-1";
pub(crate) const SOON: Duration = Duration::from_secs(10);
/// Long enough for a message that should not come.
pub(crate) const QUIET: Duration = Duration::from_millis(300);

pub(crate) struct Rig {
    pub(crate) broker: BrokerChild,
    pub(crate) bus: Bus,
    pub(crate) config: NatsConfig,
    _dir: tempfile::TempDir,
}

impl Rig {
    pub(crate) async fn start() -> Self {
        ringback_service_runtime::crypto_provider::install();
        let dir = tempfile::tempdir().unwrap();
        let broker = BrokerChild::start(&dir.path().join("nats")).await.unwrap();
        let base =
            NatsConfig { install: "test".to_owned(), request_timeout_ms: 2_000, ..NatsConfig::default() };
        let config = broker.nats_config(&base);
        let bus = Bus::connect(&config, "test").await.unwrap();
        bus.connected(SOON).await.unwrap();
        Self { broker, bus, config, _dir: dir }
    }

    pub(crate) async fn with_stream() -> Self {
        let rig = Self::start().await;
        rig.bus.ensure_stream(SHARD, EPOCH).await.unwrap();
        rig
    }

    /// Ends the server with SIGKILL and waits until this bus has lost and found it again.
    pub(crate) async fn kill_server(&self) {
        let mut pid = self.broker.watch_pid();
        let old = pid.borrow().unwrap();
        let mut connectivity = self.bus.connectivity();
        let epoch = connectivity.borrow().epoch;
        let raw = rustix::process::Pid::from_raw(i32::try_from(old).unwrap()).unwrap();
        rustix::process::kill_process(raw, rustix::process::Signal::KILL).unwrap();
        timeout(SOON, pid.wait_for(|pid| pid.is_some_and(|pid| pid != old))).await.unwrap().unwrap();
        timeout(SOON, connectivity.wait_for(|now| now.connected && now.epoch > epoch))
            .await
            .unwrap()
            .unwrap();
    }

    pub(crate) async fn pull(&self, lanes: &[Lane], ack_wait: Duration) -> JobPuller {
        let sources =
            lanes.iter().map(|&lane| PullSource { shard: SHARD, endpoint: ENDPOINT, lane }).collect();
        let settings = PullerSettings {
            consumer: ConsumerSettings { ack_wait },
            expires: Duration::from_secs(4),
            idle_heartbeat: Duration::from_secs(1),
        };
        self.bus.pull_jobs(sources, settings).await.unwrap()
    }
}

pub(crate) fn job(n: u16, lane: Lane) -> JobSubject {
    let mut random = [0; 10];
    random[8..].copy_from_slice(&n.to_be_bytes());
    JobSubject {
        shard: SHARD,
        endpoint: ENDPOINT,
        lane,
        job: JobId::from_parts(1_700_000_000_000, random),
        run: 1,
        publish: 1,
    }
}

pub(crate) fn publication(n: u16, lane: Lane) -> Publication {
    Publication { subject: job(n, lane), payload: Bytes::from(format!("job {n}")), traceparent: None }
}

pub(crate) async fn next(puller: &mut JobPuller) -> JobDelivery {
    timeout(SOON, puller.next()).await.expect("a job in time").expect("the puller lives")
}

pub(crate) async fn none_comes(puller: &mut JobPuller) {
    if let Ok(Some(job)) = timeout(QUIET, puller.next()).await {
        panic!("unexpected {:?}, delivery {}", job.subject, job.num_delivered);
    }
}

/// Polls until the condition holds.
pub(crate) async fn until<F, Fut>(what: &str, condition: F)
where
    F: Fn() -> Fut,
    Fut: Future<Output = bool>,
{
    let deadline = Instant::now() + SOON;
    while !condition().await {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
