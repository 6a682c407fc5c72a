//! The configuration file of a test's processes.

use super::Backend;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// What a test wants to differ from the harness's defaults.
#[derive(Debug, Clone)]
pub struct Options {
    /// The database.
    pub backend: Backend,
    /// Whether PostgreSQL stands behind a forwarder.
    pub forwarded: bool,
    /// The secret of the webhooks; a new one where none is given.
    pub secret: Option<String>,
    sections: BTreeMap<String, BTreeMap<String, String>>,
    tables: String,
}

impl Options {
    /// Short times, loopback receivers, the endpoints `echo` and `sleep`.
    #[must_use]
    pub fn new(backend: Backend) -> Self {
        let mut options = Self {
            backend,
            forwarded: false,
            secret: None,
            sections: BTreeMap::new(),
            tables: String::new(),
        };
        for (section, key, value) in [
            ("webhooks", "allow_loopback", "true"),
            ("webhooks", "allow_http", "true"),
            ("webhooks", "deadline_ms", "3000"),
            ("webhooks", "partition_lease_ms", "1500"),
            ("worker", "heartbeat_ms", "500"),
            ("worker", "lease_ms", "1500"),
            ("worker", "ack_wait_ms", "1500"),
            ("worker", "drain_grace_ms", "5000"),
            ("reconciler", "due_interval_ms", "200"),
            ("reconciler", "stream_interval_ms", "500"),
            ("reconciler", "republish_after_ms", "1000"),
            ("reconciler", "deliveries_interval_ms", "500"),
            ("reconciler", "batches_interval_ms", "500"),
            ("reconciler", "identity_interval_ms", "1000"),
            ("nats", "request_timeout_ms", "2000"),
            ("telemetry", "log_format", "\"json\""),
            ("telemetry", "log_level", "\"info,ringback=debug\""),
        ] {
            options.set(section, key, value);
        }
        options.endpoint("echo", r#"{ builtin = "echo" }"#, "slots = 8");
        options.endpoint("sleep", r#"{ builtin = "sleep" }"#, "slots = 8");
        options
    }

    /// Sets a key; the value is TOML.
    pub fn set(&mut self, section: &str, key: &str, value: &str) -> &mut Self {
        self.sections.entry(section.to_owned()).or_default().insert(key.to_owned(), value.to_owned());
        self
    }

    /// [`Self::set`], chained by value.
    #[must_use]
    pub fn with(mut self, section: &str, key: &str, value: &str) -> Self {
        self.set(section, key, value);
        self
    }

    pub(super) fn set_default(&mut self, section: &str, key: &str, value: &str) {
        self.sections
            .entry(section.to_owned())
            .or_default()
            .entry(key.to_owned())
            .or_insert_with(|| value.to_owned());
    }

    /// Adds an endpoint: its executor as TOML, and further lines.
    pub fn endpoint(&mut self, name: &str, executor: &str, more: &str) -> &mut Self {
        write!(self.tables, "\n[[endpoints]]\nname = \"{name}\"\nexecutor = {executor}\n{more}\n")
            .expect("a string");
        self
    }

    /// Adds an endpoint that runs a Python handler.
    pub fn process(&mut self, name: &str, command: &[&str], more: &str) -> &mut Self {
        let words: Vec<String> = command.iter().map(|word| format!("{word:?}")).collect();
        let executor = format!("{{ process = {{ command = [{}], grace_ms = 1000 }} }}", words.join(", "));
        self.endpoint(name, &executor, more)
    }

    /// Adds lines after everything else, for example `[[batch_templates]]`.
    pub fn table(&mut self, text: &str) -> &mut Self {
        self.tables.push('\n');
        self.tables.push_str(text);
        self.tables.push('\n');
        self
    }

    /// The file; projects are (name, key, scopes as TOML, webhook secret).
    pub(super) fn text(&self, projects: &[(&str, &str, &str, Option<&str>)]) -> String {
        let mut out = String::new();
        for (section, keys) in &self.sections {
            writeln!(out, "[{section}]").expect("a string");
            for (key, value) in keys {
                writeln!(out, "{key} = {value}").expect("a string");
            }
            out.push('\n');
        }
        for (project, key, scopes, secret) in projects {
            writeln!(out, "[projects.{project}]").expect("a string");
            if let Some(secret) = secret {
                writeln!(out, "webhook_secrets = [{{ secret = \"{secret}\" }}]").expect("a string");
            }
            let reader = super::reader_key(key);
            writeln!(
                out,
                "api_keys = [{{ name = \"test\", key = \"{key}\", scopes = {scopes} }}, \
                 {{ name = \"reader\", key = \"{reader}\", scopes = [\"read\"] }}]\n"
            )
            .expect("a string");
        }
        out.push_str(&self.tables);
        out
    }
}
