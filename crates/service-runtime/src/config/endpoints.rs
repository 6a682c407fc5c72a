//! `[[endpoints]]`: named queues and the way their jobs run.

use super::artifacts::{ArtifactsConfig, ConfirmConfig};
use super::encoder::EncoderConfig;
use super::problems::{NAME_RULE, Problems, is_name};
use super::section::section;
use super::services::WebhookProfile;
use ringback_domain::TimestampMs;
use ringback_domain::event::EndpointKind;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::path::PathBuf;

section! {
    /// One endpoint: a named queue, its executor and its policies.
    EndpointConfig {
        /// Project that owns the endpoint.
        project: String = "default".to_owned(),
        /// Name in URLs.
        name: String = String::new(),
        /// Second name of the form `owner/model`.
        alias: Option<String> = None,
        /// How jobs run: `{ builtin = "echo" }`, `{ builtin = "sleep" }`, `{ builtin = { encoder = { model = "..." } } }` or `{ process = { command = [...] } }`.
        executor: Option<ExecutorConfig> = None,
        /// Jobs that run at once on one worker. Unset: 1, and 256 for `builtin.encoder`, whose jobs share batches.
        slots: Option<u32> = None,
        /// Longest run of one attempt, in milliseconds.
        execution_timeout_ms: u64 = 600_000,
        /// Longest life of a job from its submit, in milliseconds; then it is TIMED_OUT.
        ttl_ms: u64 = 86_400_000,
        /// Attempts that may fail by a lost or crashed worker before the job is FAILED.
        max_attempts: u32 = 3,
        /// Whether an error raised by the handler is tried again too; RunPod's users expect false.
        retry_errors: bool = false,
        /// Which transitions the plain `webhook` hears of: "terminal" or "all".
        webhook_events: WebhookEvents = WebhookEvents::Terminal,
        /// "default" or "runpod-strict" for the webhooks of its jobs. Unset: as [webhooks] profile says.
        webhook_profile: Option<WebhookProfile> = None,
        /// Which values of an output become artefacts, see below. Off by default.
        artifacts: ArtifactsConfig = ArtifactsConfig::default(),
        /// Whether jobs wait until their files have arrived, see below. Off by default.
        confirm: ConfirmConfig = ConfirmConfig::default(),
        /// What its jobs are: "job", or "completion" for a language model, whose events tell tokens and text.
        kind: EndpointKind = EndpointKind::Job,
        /// The model that answers here, as events name it. A change emits `model.updated`.
        model: Option<String> = None,
        /// When the model goes: a date or RFC 3339. Setting it emits `model.deprecated`.
        deprecated_at: Option<String> = None,
        /// The model or endpoint to use instead.
        successor: Option<String> = None,
        /// How long ended jobs and delivery attempts are kept.
        retention: RetentionConfig = RetentionConfig::default(),
    }
}

/// Which transitions the field `webhook` of a job is told about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WebhookEvents {
    /// Only terminal states, as RunPod does.
    Terminal,
    /// Every transition, as `webhookv2`.
    All,
}

/// How the jobs of an endpoint run.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExecutorConfig {
    /// An engine inside the worker.
    Builtin(Builtin),
    /// A supervised child process.
    Process(ProcessConfig),
    /// A local HTTP server. Read so that the refusal can name it.
    Http(toml::Value),
    /// Another provider. Read so that the refusal can name it.
    Remote(toml::Value),
}

/// Engines inside the worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Builtin {
    /// Returns the input as the output.
    Echo,
    /// Waits `input.seconds`, then returns the input.
    Sleep,
    /// A text encoder.
    Encoder(EncoderConfig),
}

section! {
    /// A supervised child, for example an unmodified RunPod handler.
    ProcessConfig {
        /// Program and arguments; a plain string runs through `/bin/sh -c`.
        command: CommandLine = CommandLine::List(Vec::new()),
        /// Working folder of the child. Unset: the worker's.
        cwd: Option<PathBuf> = None,
        /// Environment of the child, beside a small allow list (PATH, HOME, LANG, TMPDIR ...).
        env: BTreeMap<String, String> = BTreeMap::new(),
        /// Names of the worker's environment variables that the child inherits.
        pass_env: Vec<String> = Vec::new(),
        /// Jobs that one child takes at once; the endpoint's `slots` divided by this is the number of children. Unset: as many as the handler asks for (its `concurrency_modifier`, else one); the first child tells.
        concurrency: Option<u32> = None,
        /// Time that an async handler has to react to a cancel before its process is ended, in milliseconds.
        stop_grace_ms: u64 = 3_000,
        /// Time between SIGTERM and SIGKILL, in milliseconds.
        grace_ms: u64 = 5_000,
        /// Niceness of the child, 0 to 19: a handler that keeps the CPU busy leaves the platform room to work.
        nice: u8 = 10,
        /// Stops an idle child (SIGSTOP to the command's own process, not to those that it started) until a job comes, if its SDK spins while it waits: versions 1.7.1 to 1.9.0 use a whole core. `false` for a handler whose own threads work between jobs.
        pause_idle: bool = true,
        /// Longest time from start to the first job take, in milliseconds.
        start_timeout_ms: u64 = 300_000,
    }
}

/// A command, as a list or as a shell line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum CommandLine {
    /// Program and arguments, no shell.
    List(Vec<String>),
    /// A line for `/bin/sh -c`.
    Shell(String),
}

impl CommandLine {
    /// Program and arguments to execute. Empty only where validation has refused the command.
    #[must_use]
    pub fn argv(&self) -> Vec<String> {
        match self {
            Self::List(words) => words.clone(),
            Self::Shell(line) => vec!["/bin/sh".to_owned(), "-c".to_owned(), line.clone()],
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::List(words) => words.first().is_none_or(|program| program.trim().is_empty()),
            Self::Shell(line) => line.trim().is_empty(),
        }
    }
}

/// Named sets of retention times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RetentionPreset {
    /// RunPod's times: results 30 min, `/runsync` results 1 min.
    Runpod,
    /// The orchestrator's time: everything 1 h.
    Orchestrator,
}

section! {
    /// How long things are kept after their end. A key overrides the preset.
    RetentionConfig {
        /// "runpod" (30 min, runsync 1 min) or "orchestrator" (1 h). Unset: the times below.
        preset: Option<RetentionPreset> = None,
        /// Completed and cancelled jobs with their results and chunks, in milliseconds. Default 72 h.
        completed_ms: Option<u64> = None,
        /// Failed and timed out jobs, in milliseconds. Default 7 days.
        failed_ms: Option<u64> = None,
        /// Jobs of `/runsync`, in milliseconds. Default 1 h.
        sync_ms: Option<u64> = None,
        /// Log of delivery attempts, in milliseconds. Default 30 days.
        delivery_attempts_ms: Option<u64> = None,
    }
}

/// Retention times in effect, all in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retention {
    /// Completed and cancelled jobs.
    pub completed_ms: u64,
    /// Failed and timed out jobs.
    pub failed_ms: u64,
    /// Jobs of `/runsync`.
    pub sync_ms: u64,
    /// Delivery attempts.
    pub delivery_attempts_ms: u64,
}

/// Slots of an encoder: a batch takes as many jobs of one text, and a waiting job is a task of a few kilobytes.
const ENCODER_SLOTS: u32 = 256;
/// Longest name of a model.
const MODEL_MAX_BYTES: usize = 256;
const MINUTE_MS: u64 = 60_000;
const HOUR_MS: u64 = 60 * MINUTE_MS;
const DAY_MS: u64 = 24 * HOUR_MS;
/// No policy time may exceed this; it keeps every sum of times inside i64.
const YEAR_MS: u64 = 366 * DAY_MS;

impl RetentionConfig {
    /// The times in effect: each key, else the preset, else the default.
    #[must_use]
    pub fn resolve(&self) -> Retention {
        let base = match self.preset {
            None => Retention {
                completed_ms: 72 * HOUR_MS,
                failed_ms: 7 * DAY_MS,
                sync_ms: HOUR_MS,
                delivery_attempts_ms: 30 * DAY_MS,
            },
            Some(RetentionPreset::Runpod) => Retention {
                completed_ms: 30 * MINUTE_MS,
                failed_ms: 30 * MINUTE_MS,
                sync_ms: MINUTE_MS,
                delivery_attempts_ms: 30 * DAY_MS,
            },
            Some(RetentionPreset::Orchestrator) => Retention {
                completed_ms: HOUR_MS,
                failed_ms: HOUR_MS,
                sync_ms: HOUR_MS,
                delivery_attempts_ms: HOUR_MS,
            },
        };
        Retention {
            completed_ms: self.completed_ms.unwrap_or(base.completed_ms),
            failed_ms: self.failed_ms.unwrap_or(base.failed_ms),
            sync_ms: self.sync_ms.unwrap_or(base.sync_ms),
            delivery_attempts_ms: self.delivery_attempts_ms.unwrap_or(base.delivery_attempts_ms),
        }
    }
}

impl EndpointConfig {
    /// What API and workers must agree on, as JSON, without anything secret.
    #[must_use]
    pub fn shared_json(&self) -> String {
        serde_json::json!({
            "alias": self.alias,
            "kind": self.kind.as_str(),
            "model": self.model,
            "deprecated_at": self.deprecated_at,
            "successor": self.successor,
            "slots": self.slots(),
            "execution_timeout_ms": self.execution_timeout_ms,
            "ttl_ms": self.ttl_ms,
            "max_attempts": self.max_attempts,
            "retry_errors": self.retry_errors,
            "webhook_events": self.webhook_events,
            "retention": self.retention.resolve(),
        })
        .to_string()
    }

    /// A number that differs between different [`EndpointConfig::shared_json`]s.
    #[must_use]
    pub fn revision(shared_json: &str) -> u64 {
        let digest = Sha256::digest(shared_json.as_bytes());
        digest.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// Jobs that run at once on one worker.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.slots.unwrap_or(match self.executor {
            Some(ExecutorConfig::Builtin(Builtin::Encoder(_))) => ENCODER_SLOTS,
            Some(_) | None => 1,
        })
    }

    /// An endpoint with defaults and the given executor.
    #[must_use]
    pub fn new(name: impl Into<String>, executor: ExecutorConfig) -> Self {
        Self { name: name.into(), executor: Some(executor), ..Self::default() }
    }

    pub(super) fn validate(&self, n: usize, p: &mut Problems) {
        let at = |field: &str| format!("endpoints[{n}].{field}");
        if !is_name(&self.name) {
            p.add(at("name"), NAME_RULE);
        }
        if !is_name(&self.project) {
            p.add(at("project"), NAME_RULE);
        }
        if let Some(alias) = &self.alias {
            let parts: Vec<&str> = alias.split('/').collect();
            if parts.len() != 2 || !parts.iter().all(|part| is_name(part)) {
                p.add(
                    at("alias"),
                    "must be owner/model, each part 1 to 64 characters of A-Z, a-z, 0-9, `_` and `-`",
                );
            }
        }
        match &self.executor {
            None => p.add(at("executor"), "is missing; write for example executor = { builtin = \"echo\" }"),
            Some(ExecutorConfig::Builtin(Builtin::Echo | Builtin::Sleep)) => {}
            Some(ExecutorConfig::Builtin(Builtin::Encoder(encoder))) => {
                encoder.validate(&at("executor.builtin.encoder"), p);
            }
            Some(ExecutorConfig::Process(process)) => process.validate(&at("executor.process"), p),
            Some(ExecutorConfig::Http(_)) => {
                p.add(at("executor.http"), "is not supported by this version; use process or builtin");
            }
            Some(ExecutorConfig::Remote(_)) => {
                p.add(at("executor.remote"), "is not supported by this version; use process or builtin");
            }
        }
        p.within(&at("slots"), u64::from(self.slots()), 1, 10_000);
        p.within(&at("execution_timeout_ms"), self.execution_timeout_ms, 1, YEAR_MS);
        p.within(&at("ttl_ms"), self.ttl_ms, 1, YEAR_MS);
        p.within(&at("max_attempts"), u64::from(self.max_attempts), 1, 1_000);
        for (key, value) in [("model", &self.model), ("successor", &self.successor)] {
            if value.as_ref().is_some_and(|text| text.is_empty() || text.len() > MODEL_MAX_BYTES) {
                p.add(at(key), format!("must have 1 to {MODEL_MAX_BYTES} bytes"));
            }
        }
        if self.deprecated_at.as_deref().is_some_and(|text| TimestampMs::parse_rfc3339(text).is_none()) {
            p.add(at("deprecated_at"), "is not a date such as 2026-12-31 or 2026-12-31T00:00:00Z");
        }
        self.artifacts.validate(&at("artifacts"), p);
        self.confirm.validate(&at("confirm"), &self.artifacts, p);
        let kept = self.retention.resolve();
        for (key, value) in [
            ("retention.completed_ms", kept.completed_ms),
            ("retention.failed_ms", kept.failed_ms),
            ("retention.sync_ms", kept.sync_ms),
            ("retention.delivery_attempts_ms", kept.delivery_attempts_ms),
        ] {
            p.within(&at(key), value, 1_000, 10 * YEAR_MS);
        }
    }
}

impl ProcessConfig {
    fn validate(&self, at: &str, p: &mut Problems) {
        if self.command.is_empty() {
            p.add(
                format!("{at}.command"),
                "is empty; write for example command = [\"python3\", \"handler.py\"]",
            );
        }
        for name in self.env.keys().chain(&self.pass_env) {
            if name.is_empty() || name.contains(['=', '\0']) {
                p.add(format!("{at}.env"), format!("`{}` is not a variable name", name.escape_debug()));
            }
        }
        if self.env.values().any(|value| value.contains('\0')) {
            p.add(format!("{at}.env"), "a value contains a NUL character");
        }
        if let Some(concurrency) = self.concurrency {
            p.within(&format!("{at}.concurrency"), u64::from(concurrency), 1, 1_000);
        }
        p.within(&format!("{at}.nice"), u64::from(self.nice), 0, 19);
        p.within(&format!("{at}.stop_grace_ms"), self.stop_grace_ms, 0, HOUR_MS);
        p.within(&format!("{at}.grace_ms"), self.grace_ms, 0, HOUR_MS);
        p.within(&format!("{at}.start_timeout_ms"), self.start_timeout_ms, 100, DAY_MS);
    }
}
