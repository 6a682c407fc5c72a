//! The operator's configuration: `ringback.toml`, typed, documented and checked.
//!
//! Commands, local URLs and credentials come only from here (DESIGN 5, Access). Times are in keys that end in
//! `_ms`, sizes in keys that end in `_bytes`. Unknown keys are refused.

mod artifacts;
mod batch_templates;
mod docs;
mod encoder;
mod endpoints;
mod infrastructure;
mod problems;
mod projects;
mod secrets;
mod section;
mod server;
mod services;

pub use artifacts::{ArtifactsConfig, ConfirmConfig, ConfirmMode, RECEIVER_VARIABLE, TIMEOUT_VARIABLE};
pub use batch_templates::{
    BatchTemplate, BatchTemplateConfig, FieldRule, Missing, TemplateError, TemplateItem, TemplatePreset,
};
pub use docs::{annotated_toml, defaults_markdown};
pub use encoder::{EncoderConfig, EncoderPooling, EncoderPrecision, EncoderTask};
pub use endpoints::{
    Builtin, CommandLine, EndpointConfig, ExecutorConfig, ProcessConfig, Retention, RetentionConfig,
    RetentionPreset, WebhookEvents,
};
pub use infrastructure::{BlobsConfig, DataConfig, DatabaseConfig, NatsConfig};
pub use problems::{Problem, Problems};
pub use projects::{ApiKeyConfig, ProjectConfig, QuotaConfig, Scope, WebhookSecretConfig};
pub use secrets::SecretError;
pub use section::{FieldDoc, Section};
pub use server::ServerConfig;
pub use services::{
    LogFormat, ReconcilerConfig, TelemetryConfig, TrackerConfig, WebhookProfile, WebhooksConfig, WorkerConfig,
};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The project that exists without being named.
pub const DEFAULT_PROJECT: &str = "default";

/// Everything an operator can set. `Default` is what an empty file means.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RingbackConfig {
    /// `[server]`
    pub server: ServerConfig,
    /// `[data]`
    pub data: DataConfig,
    /// `[database]`
    pub database: DatabaseConfig,
    /// `[nats]`
    pub nats: NatsConfig,
    /// `[blobs]`
    pub blobs: BlobsConfig,
    /// `[projects.<name>]`
    pub projects: BTreeMap<String, ProjectConfig>,
    /// `[[endpoints]]`
    pub endpoints: Vec<EndpointConfig>,
    /// `[[batch_templates]]`
    pub batch_templates: Vec<BatchTemplateConfig>,
    /// `[webhooks]`
    pub webhooks: WebhooksConfig,
    /// `[worker]`
    pub worker: WorkerConfig,
    /// `[tracker]`
    pub tracker: TrackerConfig,
    /// `[reconciler]`
    pub reconciler: ReconcilerConfig,
    /// `[telemetry]`
    pub telemetry: TelemetryConfig,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key or a wrong type. The text never quotes the file, which may hold secrets.
    #[error("line {line}: {message}")]
    Parse {
        /// Line in the file, from 1; 0 where the parser does not say.
        line: usize,
        /// The parser's reason.
        message: String,
    },
    /// Values that contradict each other or cannot work.
    #[error("{0}")]
    Invalid(Problems),
}

impl RingbackConfig {
    /// Reads and validates a file.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::from_toml(&text)
    }

    /// Parses and validates.
    ///
    /// # Errors
    /// [`ConfigError::Parse`] or [`ConfigError::Invalid`].
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse {
            line: error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count() + 1),
            message: parse_message(&error),
        })?;
        config.validate()?;
        Ok(config)
    }

    /// Refuses contradictions, all of them at once, each with its key.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut p = Problems::default();
        self.server.validate(&mut p);
        self.database.validate(&mut p);
        self.nats.validate(&mut p);
        self.blobs.validate(&mut p);
        for (name, project) in &self.projects {
            project.validate(name, &mut p);
        }
        self.validate_endpoints(&mut p);
        self.validate_templates(&mut p);
        self.webhooks.validate(&mut p);
        self.worker.validate(&mut p);
        self.tracker.validate(&mut p);
        self.reconciler.validate(&mut p);
        self.telemetry.validate(&mut p);
        if p.is_empty() { Ok(()) } else { Err(ConfigError::Invalid(p)) }
    }

    fn validate_endpoints(&self, p: &mut Problems) {
        for (n, endpoint) in self.endpoints.iter().enumerate() {
            endpoint.validate(n, p);
            if !self.has_project(&endpoint.project) {
                p.add(
                    format!("endpoints[{n}].project"),
                    format!("names the project `{}`, which has no [projects.{0}] section", endpoint.project),
                );
            }
            for earlier in self.endpoints[..n].iter().filter(|other| other.project == endpoint.project) {
                if earlier.name == endpoint.name {
                    p.add(
                        format!("endpoints[{n}].name"),
                        format!("`{}` is used twice in this project", endpoint.name),
                    );
                }
                if earlier.alias.is_some() && earlier.alias == endpoint.alias {
                    p.add(format!("endpoints[{n}].alias"), "is used twice in this project");
                }
            }
        }
    }

    fn validate_templates(&self, p: &mut Problems) {
        for (n, template) in self.batch_templates.iter().enumerate() {
            template.validate(n, p);
            let known =
                self.endpoints.iter().any(|e| e.name == template.endpoint && e.project == template.project);
            if !known {
                p.add(
                    format!("batch_templates[{n}].endpoint"),
                    format!(
                        "names `{}`, which is no endpoint of project `{}`",
                        template.endpoint, template.project
                    ),
                );
            }
            let route = template.resolve().route;
            if self.batch_templates[..n].iter().any(|other| other.resolve().route == route) {
                p.add(format!("batch_templates[{n}].route"), format!("`{route}` is used twice"));
            }
        }
    }

    /// Whether a project exists: `default` always does.
    #[must_use]
    pub fn has_project(&self, name: &str) -> bool {
        name == DEFAULT_PROJECT || self.projects.contains_key(name)
    }
}

/// The parser's message without what it quotes: for a bad type it repeats the value, which may be a secret.
fn parse_message(error: &toml::de::Error) -> String {
    let message = error.message();
    match message.split_once("invalid type: ") {
        Some((_, rest)) => match rest.rsplit_once(", expected ") {
            Some((_, expected)) => format!("wrong type, expected {expected}"),
            None => "wrong type".to_owned(),
        },
        None => match message.split_once("invalid value: ") {
            Some((_, rest)) => match rest.rsplit_once(", expected ") {
                Some((_, expected)) => format!("invalid value, expected {expected}"),
                None => "invalid value".to_owned(),
            },
            None => message.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests;
