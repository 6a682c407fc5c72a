//! `[webhooks]`, `[worker]`, `[tracker]`, `[reconciler]`: how the services behind the API work.

use super::problems::{NAME_RULE, Problems, is_name};
use super::section::section;
use ringback_domain::webhook::response::Profile;
use serde::{Deserialize, Serialize};

/// Rules of acknowledgement and retry of webhooks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WebhookProfile {
    /// 2xx acknowledges; 10 s, 10 s, then 1 min up to 24 h.
    Default,
    /// 200 acknowledges; three tries, 10 s apart.
    RunpodStrict,
}

impl WebhookProfile {
    /// The rules that it means.
    #[must_use]
    pub const fn profile(self) -> Profile {
        match self {
            Self::Default => Profile::Standard,
            Self::RunpodStrict => Profile::RunpodStrict,
        }
    }
}

section! {
    /// Webhooks going out: where they may go and how they are tried.
    WebhooksConfig {
        /// Whether receivers on loopback are allowed (any port, http too). Only for development.
        allow_loopback: bool = false,
        /// Private networks that receivers may live in, for example ["10.0.0.0/8"].
        allow_private: Vec<String> = Vec::new(),
        /// Ports that receivers may use beside 80 and 443.
        allow_ports: Vec<u16> = Vec::new(),
        /// Whether plain http receivers are allowed.
        allow_http: bool = false,
        /// POSTs in flight to one target at once.
        per_target_in_flight: u32 = 64,
        /// POSTs in flight in one process at once.
        max_in_flight: u32 = 2_048,
        /// Time for connect, headers and body of one attempt together, in milliseconds.
        deadline_ms: u64 = 30_000,
        /// "default" or "runpod-strict".
        profile: WebhookProfile = WebhookProfile::Default,
        /// POSTs per second to one target that has no rate of its own; 0 for no limit.
        target_rate_per_second: u32 = 0,
        /// Failures of one target in a row after which it is left alone for a while.
        breaker_failures: u32 = 10,
        /// Failed part of the latest 64 tries of one target after which it is left alone, in percent; above 100: never.
        breaker_failure_percent: u32 = 90,
        /// How long a target is left alone at first, in milliseconds; each failed probe doubles it.
        breaker_open_ms: u64 = 1_000,
        /// How long a target is left alone at most, in milliseconds.
        breaker_open_max_ms: u64 = 60_000,
        /// A registered webhook that only fails for this long is disabled, in milliseconds; 0 for never.
        disable_after_ms: u64 = 432_000_000,
        /// Longest wait that a receiver may ask for with Retry-After, in milliseconds.
        retry_after_max_ms: u64 = 3_600_000,
        /// Part of a response body kept in the attempts log, in bytes.
        response_keep_bytes: u32 = 2_048,
        /// Time after which a dispatcher that does not renew loses its partitions, in milliseconds.
        partition_lease_ms: u64 = 10_000,
    }
}

impl WebhooksConfig {
    pub(super) fn validate(&self, p: &mut Problems) {
        for (n, cidr) in self.allow_private.iter().enumerate() {
            if !is_cidr(cidr) {
                p.add(
                    format!("webhooks.allow_private[{n}]"),
                    "must be a network such as \"10.0.0.0/8\" or \"fd00::/8\"",
                );
            }
        }
        if self.allow_ports.contains(&0) {
            p.add("webhooks.allow_ports", "contains port 0");
        }
        p.within("webhooks.per_target_in_flight", u64::from(self.per_target_in_flight), 1, 100_000);
        p.within("webhooks.max_in_flight", u64::from(self.max_in_flight), 1, 1_000_000);
        p.within("webhooks.deadline_ms", self.deadline_ms, 100, 600_000);
        p.within("webhooks.target_rate_per_second", u64::from(self.target_rate_per_second), 0, 1_000_000);
        p.within("webhooks.breaker_failures", u64::from(self.breaker_failures), 1, 1_000_000);
        p.within("webhooks.breaker_failure_percent", u64::from(self.breaker_failure_percent), 1, 1_000);
        p.within("webhooks.breaker_open_ms", self.breaker_open_ms, 1, 86_400_000);
        p.within("webhooks.breaker_open_max_ms", self.breaker_open_max_ms, 1, 86_400_000);
        p.within("webhooks.disable_after_ms", self.disable_after_ms, 0, 366 * 86_400_000);
        p.within("webhooks.partition_lease_ms", self.partition_lease_ms, 500, 600_000);
    }
}

fn is_cidr(text: &str) -> bool {
    let Some((address, bits)) = text.split_once('/') else { return false };
    let Ok(bits) = bits.parse::<u8>() else { return false };
    match address.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V4(_)) => bits <= 32,
        Ok(std::net::IpAddr::V6(_)) => bits <= 128,
        Err(_) => false,
    }
}

section! {
    /// The worker of this process.
    WorkerConfig {
        /// Name of the worker in lists. Unset: made from the host's name and a random part.
        name: Option<String> = None,
        /// Endpoints that this worker serves, as `name` or `project/name`. Empty: all.
        endpoints: Vec<String> = Vec::new(),
        /// "cpu", "auto" or "cuda:N".
        device: String = "auto".to_owned(),
        /// Time between full heartbeats, in milliseconds.
        heartbeat_ms: u64 = 10_000,
        /// Life of a lease that heartbeats renew, in milliseconds.
        lease_ms: u64 = 30_000,
        /// A job that runs longer than this is reported as started at once, in milliseconds.
        started_report_ms: u64 = 50,
        /// Time after which JetStream delivers an unacknowledged message again, in milliseconds; extended while a job runs.
        ack_wait_ms: u64 = 30_000,
        /// Time a drain waits for running jobs before it hands them back, in milliseconds.
        drain_grace_ms: u64 = 30_000,
        /// Outcomes that may wait on disk for the tracker, in bytes; when full, no more jobs are fetched.
        spool_max_bytes: u64 = 1024 * 1024 * 1024,
        /// Log text kept per job, in bytes.
        log_max_bytes: u64 = 256 * 1024,
    }
}

impl WorkerConfig {
    pub(super) fn validate(&self, p: &mut Problems) {
        if self.name.as_deref().is_some_and(|name| !is_name(name)) {
            p.add("worker.name", NAME_RULE);
        }
        for (n, endpoint) in self.endpoints.iter().enumerate() {
            if endpoint.split('/').count() > 2 || !endpoint.split('/').all(is_name) {
                p.add(format!("worker.endpoints[{n}]"), "must be an endpoint's name, or project/name");
            }
        }
        let device_ok = matches!(self.device.as_str(), "cpu" | "auto")
            || self.device.strip_prefix("cuda:").is_some_and(|n| n.parse::<u16>().is_ok());
        if !device_ok {
            p.add("worker.device", "must be \"cpu\", \"auto\" or \"cuda:N\"");
        }
        p.within("worker.heartbeat_ms", self.heartbeat_ms, 100, 600_000);
        if self.lease_ms < 2 * self.heartbeat_ms {
            p.add(
                "worker.lease_ms",
                "must be at least twice worker.heartbeat_ms, or one late heartbeat loses jobs",
            );
        }
        p.within("worker.ack_wait_ms", self.ack_wait_ms, 1_000, 3_600_000);
        p.within("worker.started_report_ms", self.started_report_ms, 0, 60_000);
        p.at_least("worker.spool_max_bytes", self.spool_max_bytes, 1024 * 1024);
        p.within("worker.drain_grace_ms", self.drain_grace_ms, 0, 86_400_000);
    }
}

section! {
    /// The state tracker.
    TrackerConfig {
        /// Requests worked on at once in one process.
        max_requests_in_flight: u32 = 256,
        /// Most events folded in one commit.
        max_events_per_commit: u32 = 512,
    }
}

impl TrackerConfig {
    pub(super) fn validate(&self, p: &mut Problems) {
        p.within("tracker.max_requests_in_flight", u64::from(self.max_requests_in_flight), 1, 65_536);
        p.within("tracker.max_events_per_commit", u64::from(self.max_events_per_commit), 1, 10_000);
    }
}

section! {
    /// The reconciler: times between its passes.
    ReconcilerConfig {
        /// Due jobs: time limits, lost messages, leases, in milliseconds.
        due_interval_ms: u64 = 1_000,
        /// Stream incarnation and counts against SQL, in milliseconds.
        stream_interval_ms: u64 = 10_000,
        /// Age of a queued job before its message is looked for, in milliseconds.
        republish_after_ms: u64 = 5_000,
        /// Deliveries that nobody owns, in milliseconds.
        deliveries_interval_ms: u64 = 10_000,
        /// Batches whose counts do not add up, in milliseconds.
        batches_interval_ms: u64 = 15_000,
        /// The identity P5 on closed windows, in milliseconds.
        identity_interval_ms: u64 = 30_000,
        /// Retention, in milliseconds.
        retention_interval_ms: u64 = 30_000,
        /// Artefacts whose time came, in milliseconds.
        artifacts_interval_ms: u64 = 10_000,
        /// Orphan consumers and streams, in milliseconds.
        orphans_interval_ms: u64 = 300_000,
        /// How long events that are no transition of a job or batch (artefacts, quotas, workers, ...) are kept with their deliveries, in milliseconds.
        events_retention_ms: u64 = 2_592_000_000,
        /// The same for events of work that goes on: job.progress and completion.streaming.
        progress_retention_ms: u64 = 86_400_000,
        /// Rows one step of a pass touches before it yields.
        chunk_rows: u32 = 500,
    }
}

impl ReconcilerConfig {
    pub(super) fn validate(&self, p: &mut Problems) {
        for (key, value) in [
            ("reconciler.due_interval_ms", self.due_interval_ms),
            ("reconciler.stream_interval_ms", self.stream_interval_ms),
            ("reconciler.republish_after_ms", self.republish_after_ms),
            ("reconciler.deliveries_interval_ms", self.deliveries_interval_ms),
            ("reconciler.batches_interval_ms", self.batches_interval_ms),
            ("reconciler.identity_interval_ms", self.identity_interval_ms),
            ("reconciler.retention_interval_ms", self.retention_interval_ms),
            ("reconciler.artifacts_interval_ms", self.artifacts_interval_ms),
            ("reconciler.orphans_interval_ms", self.orphans_interval_ms),
        ] {
            p.within(key, value, 50, 86_400_000);
        }
        for (key, value) in [
            ("reconciler.events_retention_ms", self.events_retention_ms),
            ("reconciler.progress_retention_ms", self.progress_retention_ms),
        ] {
            p.within(key, value, 1_000, 10 * 366 * 86_400_000);
        }
        p.within("reconciler.chunk_rows", u64::from(self.chunk_rows), 1, 10_000);
    }
}

/// Form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One JSON object per line.
    Json,
    /// For a person at a terminal.
    Pretty,
    /// Pretty on a terminal, JSON otherwise.
    Auto,
}

section! {
    /// Logs and traces.
    TelemetryConfig {
        /// "json", "pretty" or "auto" (pretty on a terminal).
        log_format: LogFormat = LogFormat::Auto,
        /// Level, or a filter such as "info,ringback=debug". The variable RUST_LOG wins.
        log_level: String = "info".to_owned(),
        /// OTLP collector (gRPC), for example "http://127.0.0.1:4317". Unset: no export; trace ids flow all the same.
        otlp_endpoint: Option<String> = None,
        /// Part of new traces that is exported, 0 to 1; a caller's own decision is kept.
        sampling_ratio: f64 = 1.0,
    }
}

impl TelemetryConfig {
    pub(super) fn validate(&self, p: &mut Problems) {
        if !(0.0..=1.0).contains(&self.sampling_ratio) {
            p.add("telemetry.sampling_ratio", "must be between 0 and 1");
        }
        if self.log_level.parse::<tracing_subscriber::filter::EnvFilter>().is_err() {
            p.add(
                "telemetry.log_level",
                "is not a level or filter such as \"info\" or \"info,ringback=debug\"",
            );
        }
        if let Some(endpoint) = &self.otlp_endpoint {
            let ok = url::Url::parse(endpoint).is_ok_and(|url| matches!(url.scheme(), "http" | "https"));
            if !ok {
                p.add("telemetry.otlp_endpoint", "must be a URL such as http://127.0.0.1:4317");
            }
        }
    }
}
