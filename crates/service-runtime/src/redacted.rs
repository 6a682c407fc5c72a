//! Secrets that cannot be printed by accident.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use url::Url;

/// What every secret looks like in logs, errors and lists.
pub const REDACTED: &str = "[redacted]";

/// A value that shows as `[redacted]` in Debug, Display and Serialize. Reading it is explicit: [`Redacted::expose`].
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Redacted<T>(T);

impl<T> Redacted<T> {
    /// Wraps a secret.
    pub const fn new(value: T) -> Self {
        Self(value)
    }

    /// The secret itself. Keep it out of formats, errors and spans.
    pub const fn expose(&self) -> &T {
        &self.0
    }

    /// Takes the secret out.
    pub fn into_inner(self) -> T {
        self.0
    }
}

impl<T> From<T> for Redacted<T> {
    fn from(value: T) -> Self {
        Self(value)
    }
}

impl<T> fmt::Debug for Redacted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

impl<T> fmt::Display for Redacted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

impl<T> Serialize for Redacted<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(REDACTED)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Redacted<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        T::deserialize(deserializer).map(Self)
    }
}

/// A URL fit for logs and lists: without user, password, query and fragment. What is no URL shows as `[redacted]`,
/// because a malformed one may hold its secret anywhere.
#[must_use]
pub fn redact_url(text: &str) -> String {
    match Url::parse(text) {
        Ok(url) if url.has_host() => {
            let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
            format!("{}://{}{port}{}", url.scheme(), url.host_str().unwrap_or_default(), url.path())
        }
        _ => REDACTED.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CANARY: &str = "canary-5f1c";

    #[test]
    fn a_secret_shows_nowhere() {
        let secret = Redacted::new(CANARY.to_owned());
        assert_eq!(format!("{secret:?} {secret}"), "[redacted] [redacted]");
        assert_eq!(serde_json::to_string(&secret).unwrap(), "\"[redacted]\"");
        assert_eq!(secret.expose(), CANARY);
        let read: Redacted<String> = serde_json::from_str("\"canary-5f1c\"").unwrap();
        assert_eq!(read.into_inner(), CANARY);
    }

    #[test]
    fn a_url_loses_its_secrets() {
        for (given, shown) in [
            ("https://u:canary-5f1c@h.example/a/b?token=canary-5f1c#canary-5f1c", "https://h.example/a/b"),
            ("http://127.0.0.1:9000/hook?x", "http://127.0.0.1:9000/hook"),
            ("postgres://me:canary-5f1c@db:5432/jobs", "postgres://db:5432/jobs"),
            ("canary-5f1c", "[redacted]"),
            ("mailto:canary-5f1c@x", "[redacted]"),
        ] {
            assert_eq!(redact_url(given), shown);
        }
    }
}
