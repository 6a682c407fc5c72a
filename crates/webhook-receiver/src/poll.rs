//! Asks a provider for a job's status, as RunPod's `GET /v2/{endpoint}/status/{id}` answers it.

use async_trait::async_trait;
use http::{HeaderMap, HeaderValue, header};
use ringback_domain::webhook::url::UrlPolicy;
use ringback_egress::{BuildError, Client, Limits};
use ringback_service_runtime::Redacted;
use url::Url;

use crate::event::Event;
use crate::store::TrackedJob;
use crate::tracker::{Poll, Polled};

const ID: &str = "{id}";
const ENDPOINT: &str = "{endpoint}";
/// Longest id or endpoint, in bytes.
const MAX_NAME_BYTES: usize = 128;

/// Where a job's status is asked for: a URL with `{id}` and perhaps `{endpoint}` in its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusUrl(String);

/// Why a text is no [`StatusUrl`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StatusUrlError {
    /// Without an id all jobs would be one.
    #[error("{ID} is missing")]
    NoId,
    /// Not a URL that can be dialled.
    #[error("{0}")]
    Malformed(String),
    /// A name from outside decides nothing but a part of the path.
    #[error("{ID} and {ENDPOINT} may stand in the path only")]
    NotInPath,
}

impl StatusUrl {
    /// Reads a template.
    ///
    /// # Errors
    /// [`StatusUrlError`].
    pub fn parse(text: &str) -> Result<Self, StatusUrlError> {
        if !text.contains(ID) {
            return Err(StatusUrlError::NoId);
        }
        let url = Self(text.to_owned());
        let (one, other) = (url.base("x")?, url.base("y")?);
        if !matches!(one.scheme(), "http" | "https") || one.host().is_none() {
            return Err(StatusUrlError::Malformed("it must begin with https:// or http://".to_owned()));
        }
        let around = |url: &Url| {
            let mut url = url.clone();
            url.set_path("");
            url
        };
        if around(&one) != around(&other) || one.fragment().is_some() {
            return Err(StatusUrlError::NotInPath);
        }
        if !one.username().is_empty() || one.password().is_some() {
            return Err(StatusUrlError::Malformed(
                "a key belongs into its file, not into the URL".to_owned(),
            ));
        }
        Ok(url)
    }

    /// Whether a job's endpoint must be known.
    #[must_use]
    pub fn needs_endpoint(&self) -> bool {
        self.0.contains(ENDPOINT)
    }

    /// The rules that open exactly this address.
    ///
    /// # Errors
    /// Never for one that was parsed.
    pub fn policy(&self) -> Result<UrlPolicy, StatusUrlError> {
        Ok(ringback_egress::only(&self.base("x")?))
    }

    fn base(&self, name: &str) -> Result<Url, StatusUrlError> {
        let text = self.0.replace(ID, name).replace(ENDPOINT, name);
        Url::parse(&text).map_err(|error| StatusUrlError::Malformed(error.to_string()))
    }

    fn of(&self, job: &TrackedJob) -> String {
        // Names were checked: no character in them means anything in a path.
        self.0.replace(ID, &job.job_id).replace(ENDPOINT, &job.context)
    }
}

/// Whether a text can be a job's id or an endpoint's name inside a URL's path.
#[must_use]
pub fn is_plain_name(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
    !text.is_empty()
        && text.len() <= MAX_NAME_BYTES
        && text.bytes().all(plain)
        && text.bytes().any(|b| b != b'.')
}

/// Polls one provider with one key.
#[derive(Debug, Clone)]
pub struct StatusPoll {
    client: Client,
    url: StatusUrl,
    key: Redacted<String>,
    max_body_bytes: u64,
}

impl StatusPoll {
    /// Asks at `url` with `key` as the bearer token, dialling what `policy` allows.
    ///
    /// # Errors
    /// The HTTP client cannot be built.
    pub fn new(
        url: StatusUrl,
        key: Redacted<String>,
        policy: UrlPolicy,
        max_body_bytes: u64,
    ) -> Result<Self, BuildError> {
        let client = Client::new(policy, Limits::default())?;
        Ok(Self { client, url, key, max_body_bytes })
    }
}

#[async_trait]
impl Poll for StatusPoll {
    async fn poll(&self, job: &TrackedJob) -> Result<Polled, String> {
        let url = self.client.check(&self.url.of(job)).map_err(|error| format!("URL refused: {error}"))?;
        let mut headers = HeaderMap::new();
        let mut key = HeaderValue::try_from(format!("Bearer {}", self.key.expose()))
            .map_err(|_| "the API key holds characters that no header may hold".to_owned())?;
        key.set_sensitive(true);
        headers.insert(header::AUTHORIZATION, key);
        let answer =
            self.client.get(url, headers, self.max_body_bytes).await.map_err(|error| error.to_string())?;
        match answer.status {
            200 => {}
            404 | 410 => return Ok(Polled::Unknown),
            status @ (401 | 403) => return Err(format!("the provider refuses the API key ({status})")),
            status => return Err(format!("the provider answered {status}")),
        }
        match Event::parse(&answer.body) {
            Ok(Event::Runpod(told)) if told.id != job.job_id => {
                Err(format!("the provider answered for another job, {}", told.id))
            }
            Ok(Event::Runpod(told)) if told.status.is_terminal() => Ok(Polled::Ended(answer.body)),
            Ok(Event::Runpod(_)) => Ok(Polled::Running),
            Ok(other) => Err(format!("the provider answered with another event ({})", other.kind())),
            Err(error) => Err(format!("the provider's answer cannot be read: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_has_an_id_in_its_path_and_no_key() {
        for text in [
            "https://api.runpod.ai/v2/{endpoint}/status/{id}",
            "http://127.0.0.1:8080/v2/tts/status/{id}",
            "https://example.com/jobs/{id}?full=1",
        ] {
            assert!(StatusUrl::parse(text).is_ok(), "{text}");
        }
        for (text, expected) in [
            ("https://example.com/status", StatusUrlError::NoId),
            ("https://{id}.example.com/", StatusUrlError::NotInPath),
            ("https://example.com/?job={id}", StatusUrlError::NotInPath),
            ("https://example.com/{id}#x", StatusUrlError::NotInPath),
        ] {
            assert_eq!(StatusUrl::parse(text), Err(expected), "{text}");
        }
        for text in ["{id}", "ftp://example.com/{id}", "https://user:key@example.com/{id}", "http://{id}/"] {
            assert!(StatusUrl::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_cannot_change_the_address() {
        for name in ["job-1", "sync-0198c0de", "c80ffee4-f315-4e25-a146-0f3d98cf024b-u1", "a.b:c_d"] {
            assert!(is_plain_name(name), "{name}");
        }
        for name in ["", ".", "..", "a/b", "a?b", "a#b", "%2e", "a b", "ä", &"x".repeat(129)] {
            assert!(!is_plain_name(name), "{name}");
        }
        let url = StatusUrl::parse("https://api.runpod.ai/v2/{endpoint}/status/{id}").unwrap();
        let job =
            TrackedJob { job_id: "j-1".to_owned(), context: "tts".to_owned(), submitted_at_ms: 0, polls: 0 };
        assert_eq!(url.of(&job), "https://api.runpod.ai/v2/tts/status/j-1");
    }
}
