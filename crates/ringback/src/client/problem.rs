//! A refusal by the server: RFC 9457, or the shape of the compatible routes.

use crate::exit::Exit;
use serde::Deserialize;
use std::fmt;

/// What the server said.
#[derive(Debug)]
pub(crate) struct Problem {
    status: u16,
    title: String,
    detail: String,
    fields: Vec<Field>,
    retry_after_s: Option<u64>,
    had_key: bool,
    text: String,
}

#[derive(Debug, Deserialize)]
struct Field {
    #[serde(default)]
    pointer: String,
    #[serde(default)]
    detail: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Wire {
    title: String,
    detail: String,
    error: String,
    errors: Vec<Field>,
}

impl Problem {
    /// Reads a refusal; what is no JSON is kept as it is.
    pub(crate) fn read(status: u16, retry_after_s: Option<u64>, text: &str, had_key: bool) -> Self {
        let wire: Wire = serde_json::from_str(text).unwrap_or_default();
        let detail = if wire.detail.is_empty() { wire.error } else { wire.detail };
        Self {
            status,
            title: wire.title,
            detail,
            fields: wire.errors,
            retry_after_s,
            had_key,
            text: text.to_owned(),
        }
    }

    /// HTTP status.
    pub(crate) const fn status(&self) -> u16 {
        self.status
    }

    /// How the program ends.
    pub(crate) const fn exit(&self) -> Exit {
        match self.status {
            401 | 403 => Exit::Denied,
            404 | 410 => Exit::NotFound,
            409 | 412 | 428 => Exit::Conflict,
            429 | 502 | 503 | 504 | 507 => Exit::Unreachable,
            400..=499 => Exit::Usage,
            _ => Exit::Error,
        }
    }

    /// What to do next.
    pub(crate) fn hint(&self) -> String {
        match (self.status, self.had_key, self.retry_after_s) {
            (401, false, _) => {
                "give a key with --api-key or RINGBACK_API_KEY; `ringback dev` prints its own".to_owned()
            }
            (401, true, _) => {
                "the key is not known to this server; check --api-key or RINGBACK_API_KEY".to_owned()
            }
            (404, ..) if self.detail.starts_with("job") => {
                "`ringback ls` shows the jobs of this key's project".to_owned()
            }
            (_, _, Some(seconds)) => format!("try again in {seconds} s"),
            (503, ..) => "try again in a moment; a submit with --idempotency-key is never doubled".to_owned(),
            _ => String::new(),
        }
    }

    /// The server's own JSON, or its text as a string.
    pub(crate) fn as_json(&self) -> serde_json::Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| self.text.clone().into())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.detail.is_empty(), self.title.is_empty()) {
            (false, _) => f.write_str(&self.detail)?,
            (true, false) => f.write_str(&self.title)?,
            (true, true) => write!(f, "the server answered {}", self.status)?,
        }
        // A single field stands in the detail already.
        for field in self.fields.iter().filter(|field| !self.detail.contains(&field.detail)) {
            write!(f, "\n  {} {}", field.pointer, field.detail)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_shapes_are_read() {
        let native = r#"{"title":"Bad Request","detail":"2 fields","errors":[{"pointer":"/webhook","detail":"must be https"}]}"#;
        let problem = Problem::read(400, None, native, true);
        assert_eq!(problem.to_string(), "2 fields\n  /webhook must be https");
        let native = r#"{"title":"Bad Request","detail":"`webhook` must be https","errors":[{"pointer":"/webhook","detail":"must be https"}]}"#;
        assert_eq!(Problem::read(400, None, native, true).to_string(), "`webhook` must be https");
        assert_eq!(problem.exit(), Exit::Usage);
        let compatible = Problem::read(429, Some(3), r#"{"error":"too many"}"#, true);
        assert_eq!(
            (compatible.to_string(), compatible.hint()),
            ("too many".to_owned(), "try again in 3 s".to_owned())
        );
        assert_eq!(Problem::read(502, None, "<html>", true).to_string(), "the server answered 502");
    }
}
