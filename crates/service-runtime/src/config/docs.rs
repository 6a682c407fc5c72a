//! The configuration described from its own definition: a table of defaults and an annotated file.

use super::section::{FieldDoc, Section};
use super::{
    ApiKeyConfig, ArtifactsConfig, BatchTemplateConfig, BlobsConfig, ConfirmConfig, DataConfig,
    DatabaseConfig, EncoderConfig, EndpointConfig, NatsConfig, ProcessConfig, ProjectConfig, QuotaConfig,
    ReconcilerConfig, RetentionConfig, ServerConfig, TelemetryConfig, TrackerConfig, WebhookSecretConfig,
    WebhooksConfig, WorkerConfig,
};
use serde::Serialize;
use serde_json::Value;
use std::fmt::Write;

struct Documented {
    /// Header as written in the file; sub-tables of lists show their list.
    header: &'static str,
    about: &'static str,
    fields: &'static [FieldDoc],
    defaults: Value,
    /// Whether the section stands once in a file and can be written out with its defaults.
    plain: bool,
}

fn documented<S: Section + Default + Serialize>(header: &'static str, plain: bool) -> Documented {
    // Every section serializes: plain data with string keys.
    let defaults = serde_json::to_value(S::default()).unwrap_or_default();
    Documented { header, about: S::ABOUT, fields: S::FIELDS, defaults, plain }
}

fn sections() -> Vec<Documented> {
    vec![
        documented::<ServerConfig>("[server]", true),
        documented::<DataConfig>("[data]", true),
        documented::<DatabaseConfig>("[database]", true),
        documented::<NatsConfig>("[nats]", true),
        documented::<BlobsConfig>("[blobs]", true),
        documented::<ProjectConfig>("[projects.<name>]", false),
        documented::<ApiKeyConfig>("[[projects.<name>.api_keys]]", false),
        documented::<WebhookSecretConfig>("[[projects.<name>.webhook_secrets]]", false),
        documented::<QuotaConfig>("[projects.<name>.quota]", false),
        documented::<EndpointConfig>("[[endpoints]]", false),
        documented::<ProcessConfig>("[endpoints.executor.process]", false),
        documented::<EncoderConfig>("[endpoints.executor.builtin.encoder]", false),
        documented::<ArtifactsConfig>("[endpoints.artifacts]", false),
        documented::<ConfirmConfig>("[endpoints.confirm]", false),
        documented::<RetentionConfig>("[endpoints.retention]", false),
        documented::<BatchTemplateConfig>("[[batch_templates]]", false),
        documented::<WebhooksConfig>("[webhooks]", true),
        documented::<WorkerConfig>("[worker]", true),
        documented::<TrackerConfig>("[tracker]", true),
        documented::<ReconcilerConfig>("[reconciler]", true),
        documented::<TelemetryConfig>("[telemetry]", true),
    ]
}

/// The table of all keys with their defaults, as markdown. `docs/CONFIGURATION.md` is this text.
#[must_use]
pub fn defaults_markdown() -> String {
    let mut out = String::from(
        "# Configuration\n\n\
         Every key of `ringback.toml` with its default. This file is generated from the code; a test keeps it equal.\n\
         `ringback.example.toml` beside it is the same as a file to start from. Unknown keys are refused.\n",
    );
    for section in sections() {
        let _ = write!(
            out,
            "\n## `{}`\n\n{}\n\n| key | default | meaning |\n|---|---|---|\n",
            section.header,
            section.about.trim()
        );
        for field in section.fields {
            let default = match section.defaults.get(field.key) {
                None | Some(Value::Null) => "unset".to_owned(),
                Some(Value::String(text)) if text.is_empty() => "required".to_owned(),
                Some(value) => format!("`{}`", toml_value(value)),
            };
            let _ =
                writeln!(out, "| `{}` | {} | {} |", field.key, default, field.doc.trim().replace('|', "\\|"));
        }
    }
    out
}

/// An annotated `ringback.toml` that changes nothing: every key is shown with its default, commented out.
#[must_use]
pub fn annotated_toml() -> String {
    let mut out = String::from(
        "# Ringback's configuration. Every key is shown with its default; remove the `#` to change one.\n\
         # Times are in milliseconds (`_ms`), sizes in bytes (`_bytes`). Unknown keys are refused.\n",
    );
    for section in sections().into_iter().filter(|section| section.plain) {
        let _ = write!(out, "\n# {}\n{}\n", section.about.trim(), section.header);
        for field in section.fields {
            let _ = writeln!(out, "# {}", field.doc.trim());
            let _ = match section.defaults.get(field.key) {
                None | Some(Value::Null) => writeln!(out, "# {} =", field.key),
                Some(value) => writeln!(out, "# {} = {}", field.key, toml_value(value)),
            };
        }
    }
    out.push_str(EXAMPLES);
    out
}

/// JSON scalars and lists are TOML as they stand, except that TOML has no null.
fn toml_value(value: &Value) -> String {
    match value {
        Value::Object(map) if map.values().all(Value::is_null) => "{}".to_owned(),
        Value::Object(map) => {
            let fields: Vec<String> = map
                .iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| format!("{key} = {}", toml_value(value)))
                .collect();
            format!("{{ {} }}", fields.join(", "))
        }
        Value::Array(items) => {
            format!("[{}]", items.iter().map(toml_value).collect::<Vec<_>>().join(", "))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.to_string(),
    }
}

const EXAMPLES: &str = r#"
# Projects own endpoints, keys and secrets. `default` always exists.
# [projects.default]
# api_keys = [
#   { name = "app", key_env = "RINGBACK_APP_KEY", scopes = ["submit", "read"] },
#   { name = "ops", key_sha256 = "<64 hex digits>", scopes = ["admin"] },
# ]
# webhook_secrets = [{ secret_file = "/run/secrets/webhook" }]
# quota = { period = "day", jobs = 100000 }

# An endpoint is a named queue and the way its jobs run.
# [[endpoints]]
# name = "echo"
# executor = { builtin = "echo" }
# slots = 8

# Embeddings from a model of the BERT family; also under /v2/embed/openai/v1/embeddings.
# [[endpoints]]
# name = "embed"
# executor = { builtin = { encoder = { model = ".tools/models/all-MiniLM-L6-v2", task = "embed" } } }

# An unmodified RunPod handler as a supervised child.
# [[endpoints]]
# name = "tts"
# alias = "acme/tts"
# executor = { process = { command = ["python3", "-u", "handler.py"], cwd = "/srv/tts" } }
# execution_timeout_ms = 120000
# retention = { preset = "runpod", failed_ms = 86400000 }

# A language model: webhooks hear of completion.* with tokens and text.
# [[endpoints]]
# name = "chat"
# kind = "completion"
# model = "qwen3-4b"
# executor = { process = { command = ["python3", "-u", "handler.py"], cwd = "/srv/chat" } }

# Files that a handler writes become artefacts; the job ends once its receiver has them.
# [[endpoints]]
# name = "speech"
# executor = { process = { command = ["python3", "-u", "handler.py"], cwd = "/srv/speech" } }
# artifacts = { paths = true }
# confirm = { mode = "platform", receiver_url = "https://app.example/api/audio", timeout_ms = 60000 }

# A route of its own shape, mapped onto batches. The preset serves POST /tts/batch and GET /tts/batch/{id}.
# [[batch_templates]]
# preset = "tts"
# endpoint = "tts"
"#;
