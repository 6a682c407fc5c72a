//! An event of the feed on its way to the receiver on this machine.

use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use ringback_egress::{CheckedUrl, Client, Limits, Post};
use serde::Deserialize;

use crate::error::CliError;

#[derive(Debug, Deserialize)]
pub(super) struct Event {
    pub(super) id: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) cursor: String,
    pub(super) owner_id: String,
    headers: std::collections::BTreeMap<String, String>,
    pub(super) body: String,
    body_encoding: String,
}

impl Event {
    fn bytes(&self) -> Result<Bytes, CliError> {
        use base64::Engine as _;
        if self.body_encoding != "base64" {
            return Ok(Bytes::copy_from_slice(self.body.as_bytes()));
        }
        base64::engine::general_purpose::STANDARD
            .decode(&self.body)
            .map(Bytes::from)
            .map_err(|error| CliError::NotOurs { url: "/v1/events".to_owned(), reason: error.to_string() })
    }

    /// The headers as the server signed them. One that cannot be a header is not ours.
    fn header_map(&self) -> HeaderMap {
        self.headers
            .iter()
            .filter_map(|(name, value)| {
                Some((HeaderName::try_from(name.as_str()).ok()?, HeaderValue::try_from(value.as_str()).ok()?))
            })
            .collect()
    }
}

/// The receiver on this machine.
pub(super) struct Forward {
    client: Client,
    url: CheckedUrl,
}

impl Forward {
    pub(super) fn new(text: &str, deadline: Duration) -> Result<Self, CliError> {
        let wrong = |reason: String| {
            CliError::usage(
                format!("--forward-to is refused: {reason}"),
                "write for example --forward-to http://localhost:3000/hook",
            )
        };
        let url = url::Url::parse(text).map_err(|e| wrong(e.to_string()))?;
        let policy = ringback_egress::only(&url);
        let limits = Limits { deadline, ..Limits::default() };
        ringback_service_runtime::crypto_provider::install();
        let client = Client::new(policy, limits).map_err(|e| CliError::Service(e.to_string()))?;
        let url = client.check(text).map_err(|e| wrong(e.to_string()))?;
        Ok(Self { client, url })
    }

    /// What the receiver answered, and how long it took.
    pub(super) async fn send(&self, event: &Event) -> Result<(Result<u16, String>, Duration), CliError> {
        let post =
            Post { url: self.url.clone(), headers: event.header_map(), body: event.bytes()?, deadline: None };
        let began = Instant::now();
        let posted = self.client.post(post).await;
        let answer = posted.result.map(|answer| answer.status).map_err(|error| error.to_string());
        Ok((answer, began.elapsed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_address_is_one_of_http() {
        let wait = Duration::from_secs(1);
        assert!(Forward::new("http://localhost:3000/hook", wait).is_ok());
        for url in ["localhost:3000", "ftp://localhost/", "/hook", ""] {
            assert!(Forward::new(url, wait).is_err(), "{url}");
        }
    }

    #[test]
    fn bytes_and_headers_stay_as_they_came() {
        let event: Event = serde_json::from_value(json!({
            "id": "msg_1", "type": "t", "cursor": "c", "owner_id": "o", "body": "/wAB", "body_encoding": "base64",
            "headers": {"webhook-id": "msg_1", "bad header": "x"},
        }))
        .unwrap();
        assert_eq!(event.bytes().unwrap().as_ref(), [255, 0, 1]);
        assert_eq!(event.header_map().len(), 1);
    }
}
