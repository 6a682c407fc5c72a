//! Files fetched from outside, streamed within a deadline and a cap.

use std::time::Duration;

use bytes::Bytes;
use http::header;
use tokio::time::{Instant, timeout_at};

use crate::client::{CheckedUrl, Client};
use crate::error::EgressError;

/// Hops followed: a stable link leads to a short-lived one, rarely further.
pub const MAX_REDIRECTS: usize = 3;

/// A file on its way. Whoever drops it closes the connection.
#[derive(Debug)]
pub struct Download {
    response: reqwest::Response,
    deadline: Instant,
    time: Duration,
    max_bytes: u64,
    read_bytes: u64,
}

impl Client {
    /// Opens a download. One deadline, `time`, covers everything from resolving to the last byte; at most `max_bytes`
    /// are read. Redirects are followed up to [`MAX_REDIRECTS`], each target under the same rules as the first URL.
    ///
    /// # Errors
    /// No answer came, a redirect is refused, or the announced length is over the cap.
    pub async fn download(
        &self,
        url: CheckedUrl,
        time: Duration,
        max_bytes: u64,
    ) -> Result<Download, EgressError> {
        let deadline = Instant::now() + time;
        let mut url = url;
        for _ in 0..=MAX_REDIRECTS {
            let response = timeout_at(deadline, self.http.get(url.0.clone()).send())
                .await
                .map_err(|_| EgressError::Timeout(time))?
                .map_err(|error| EgressError::from_reqwest(error, time))?;
            if !response.status().is_redirection() {
                return Download::of(response, deadline, time, max_bytes);
            }
            let target = response
                .headers()
                .get(header::LOCATION)
                .and_then(|value| value.to_str().ok())
                .and_then(|location| url.0.join(location).ok())
                .ok_or(EgressError::Redirect("a redirect without a usable location"))?;
            if url.0.scheme() == "https" && target.scheme() != "https" {
                return Err(EgressError::Redirect("a redirect from https to an unencrypted address"));
            }
            url = self.check(target.as_str())?;
        }
        Err(EgressError::Redirect("too many redirects"))
    }
}

impl Download {
    pub(crate) fn of(
        response: reqwest::Response,
        deadline: Instant,
        time: Duration,
        max_bytes: u64,
    ) -> Result<Self, EgressError> {
        if response.content_length().is_some_and(|length| length > max_bytes) {
            return Err(EgressError::TooLarge(max_bytes));
        }
        Ok(Self { response, deadline, time, max_bytes, read_bytes: 0 })
    }

    /// The status of the answer; anything but 200 is no file.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    /// The length that the server announced.
    #[must_use]
    pub fn content_length(&self) -> Option<u64> {
        self.response.content_length()
    }

    /// The next bytes, `None` at the end. A connection that ends early is an error, not an end.
    ///
    /// # Errors
    /// The deadline passed, the connection broke, or the file is over the cap.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, EgressError> {
        let chunk = timeout_at(self.deadline, self.response.chunk())
            .await
            .map_err(|_| EgressError::Timeout(self.time))?
            .map_err(|error| EgressError::from_reqwest(error, self.time))?;
        if let Some(chunk) = &chunk {
            self.read_bytes = self.read_bytes.saturating_add(chunk.len() as u64);
            if self.read_bytes > self.max_bytes {
                return Err(EgressError::TooLarge(self.max_bytes));
            }
        }
        Ok(chunk)
    }
}
