//! What `ringback dev` says when it is ready.

use crate::ui::style::Style;
use crate::ui::{out, stdout_is_terminal};
use ringback_service_runtime::Redacted;
use ringback_service_runtime::config::{Builtin, CommandLine, EndpointConfig, ExecutorConfig};
use std::path::Path;
use std::time::Duration;

/// Facts of a start.
#[derive(Debug)]
pub(crate) struct Banner<'a> {
    /// Base address of the API.
    pub(crate) url: &'a str,
    /// A key, if one is known.
    pub(crate) api_key: Option<&'a Redacted<String>>,
    /// Absolute data folder.
    pub(crate) data: &'a Path,
    /// `SQLite` or `PostgreSQL`.
    pub(crate) database: &'a str,
    /// The broker: our own with its process id, or another's address.
    pub(crate) broker: &'a str,
    /// Endpoints served.
    pub(crate) endpoints: &'a [EndpointConfig],
    /// From start to ready.
    pub(crate) took: Duration,
    /// Whether only this machine can reach the API.
    pub(crate) is_private: bool,
    /// How this program was called, to be pasted.
    pub(crate) program: &'a str,
    /// Whether verbs in the current folder find the server by themselves.
    pub(crate) found_from_here: bool,
}

impl Banner<'_> {
    /// Prints it. A key goes to a terminal only: it has no place in a log file.
    pub(crate) fn print(&self, json: bool, quiet: bool) -> std::io::Result<()> {
        if json {
            return out(&self.json().to_string());
        }
        if quiet {
            return Ok(());
        }
        let style = Style::stdout();
        for line in self.lines(stdout_is_terminal(), style) {
            out(&line)?;
        }
        Ok(())
    }

    fn json(&self) -> serde_json::Value {
        let names: Vec<&str> = self.endpoints.iter().map(|endpoint| endpoint.name.as_str()).collect();
        serde_json::json!({
            "event": "ready",
            "url": self.url,
            "data": self.data,
            "connection_file": self.data.join(crate::client::connection::FILE_NAME),
            "endpoints": names,
            "pid": std::process::id(),
            "ready_ms": u64::try_from(self.took.as_millis()).unwrap_or(u64::MAX),
        })
    }

    fn lines(&self, show_key: bool, style: Style) -> Vec<String> {
        let file = self.data.join(crate::client::connection::FILE_NAME);
        let key = match self.api_key {
            Some(key) if show_key => key.expose().clone(),
            Some(_) => format!("in {}", file.display()),
            None => "as configured (only its hash is known here)".to_owned(),
        };
        let mut lines = vec![
            String::new(),
            format!(
                "  {} {}",
                style.green(&style.bold("Ringback is ready")),
                style.dim(&format!(
                    "after {:.2} s, version {}",
                    self.took.as_secs_f64(),
                    env!("CARGO_PKG_VERSION")
                )),
            ),
            String::new(),
        ];
        let facts = [
            (
                "API",
                format!(
                    "{}   {}",
                    style.bold(self.url),
                    style.dim("/v2/ENDPOINT as RunPod's, /v1 native, /healthz/ready")
                ),
            ),
            ("key", key),
            ("data", self.data.display().to_string()),
            ("runs on", format!("{}, {}", self.database, self.broker)),
        ];
        lines.extend(facts.into_iter().map(|(name, value)| fact(name, &value, style)));
        for (n, endpoint) in self.endpoints.iter().enumerate() {
            lines.push(fact(if n == 0 { "endpoints" } else { "" }, &describe(endpoint), style));
        }
        if !self.is_private {
            lines.push(String::new());
            lines.push(format!(
                "  {} other machines can reach this; receivers on this machine are refused",
                style.yellow("note:")
            ));
        }
        if let Some(endpoint) = self.endpoints.iter().find(|e| is_echo(e)).or_else(|| self.endpoints.first())
        {
            lines.extend(self.example(&endpoint.name, show_key, style));
        }
        lines.push(String::new());
        lines.push(format!(
            "  {}",
            style.dim("One line per transition follows, in UTC. Ctrl-C drains and ends.")
        ));
        lines.push(String::new());
        lines
    }

    fn example(&self, endpoint: &str, show_key: bool, style: Style) -> Vec<String> {
        let input = r#"{"hello": "world"}"#;
        let key = match self.api_key {
            Some(key) if show_key => key.expose().clone(),
            _ => "$RINGBACK_API_KEY".to_owned(),
        };
        let mut lines = vec![
            String::new(),
            format!("  {}", style.dim("A job to paste:")),
            String::new(),
            format!("    curl -s {}/v2/{endpoint}/runsync -H \"Authorization: Bearer {key}\" \\", self.url),
            format!("         -H 'Content-Type: application/json' -d '{{\"input\": {input}}}'"),
            String::new(),
        ];
        if self.found_from_here {
            lines.push(format!("  {}", style.dim("or, in another terminal in this folder:")));
            lines.push(String::new());
        } else {
            lines.push(format!("  {}", style.dim("or, in another terminal:")));
            lines.push(String::new());
            if show_key {
                lines.push(format!("    export RINGBACK_URL={} RINGBACK_API_KEY={key}", self.url));
            } else {
                lines.push(format!("    export RINGBACK_URL={}        # and RINGBACK_API_KEY", self.url));
            }
        }
        lines.push(format!("    {} submit {endpoint} '{input}' --wait", self.program));
        lines
    }
}

fn fact(name: &str, value: &str, style: Style) -> String {
    format!("  {}  {value}", style.dim(&format!("{name:<9}")))
}

/// The endpoint that takes any input makes the best example.
fn is_echo(endpoint: &EndpointConfig) -> bool {
    matches!(endpoint.executor, Some(ExecutorConfig::Builtin(Builtin::Echo)))
}

fn describe(endpoint: &EndpointConfig) -> String {
    let executor = match &endpoint.executor {
        Some(ExecutorConfig::Builtin(Builtin::Echo)) => "builtin echo".to_owned(),
        Some(ExecutorConfig::Builtin(Builtin::Sleep)) => "builtin sleep".to_owned(),
        Some(ExecutorConfig::Builtin(Builtin::Encoder(encoder))) => {
            format!("builtin encoder {}", encoder.model.display())
        }
        Some(ExecutorConfig::Process(process)) => match &process.command {
            CommandLine::List(words) => words.join(" "),
            CommandLine::Shell(line) => line.clone(),
        },
        // Refused by the configuration's own check.
        Some(ExecutorConfig::Http(_) | ExecutorConfig::Remote(_)) | None => String::new(),
    };
    let slots =
        if endpoint.slots() == 1 { "1 slot".to_owned() } else { format!("{} slots", endpoint.slots()) };
    format!("{}  ({}, {slots})", endpoint.name, crate::ui::table::cut(&executor, 60))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dev::endpoint::EndpointSpec;

    #[test]
    fn a_key_has_no_place_in_a_log_file() {
        let key = Redacted::new("canary-5f1c".to_owned());
        let endpoints = EndpointSpec::defaults();
        let banner = Banner {
            url: "http://127.0.0.1:8080",
            api_key: Some(&key),
            data: Path::new("/d"),
            database: "SQLite",
            broker: "nats-server",
            endpoints: &endpoints,
            took: Duration::from_millis(840),
            is_private: true,
            program: "target/debug/ringback",
            found_from_here: true,
        };
        let text = banner.lines(false, Style::stdout()).join("\n");
        assert!(!text.contains("canary") && text.contains("in /d/connection.json"), "{text}");
        assert!(!banner.json().to_string().contains("canary"));
        let text = banner.lines(true, Style::stdout()).join("\n");
        assert!(
            text.contains("Bearer canary-5f1c") && text.contains("echo  (builtin echo, 16 slots)"),
            "{text}"
        );
        assert!(text.contains("    target/debug/ringback submit echo"), "{text}");
    }
}
