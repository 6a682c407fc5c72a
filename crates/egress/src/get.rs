//! Small answers, read whole: what a status route says.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use tokio::time::{Instant, timeout_at};

use crate::client::{CheckedUrl, Client};
use crate::download::Download;
use crate::error::EgressError;

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Whole {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: Bytes,
}

impl Client {
    /// Asks and reads the answer to its end within the role's deadline. No redirect is followed: the headers may hold a
    /// key, which is for the address that was named.
    ///
    /// # Errors
    /// No answer came, it broke off, or it is longer than `max_bytes`.
    pub async fn get(
        &self,
        url: CheckedUrl,
        headers: HeaderMap,
        max_bytes: u64,
    ) -> Result<Whole, EgressError> {
        let time: Duration = self.limits().deadline;
        let deadline = Instant::now() + time;
        let response = timeout_at(deadline, self.http.get(url.0).headers(headers).send())
            .await
            .map_err(|_| EgressError::Timeout(time))?
            .map_err(|error| EgressError::from_reqwest(error, time))?;
        let mut download = Download::of(response, deadline, time, max_bytes)?;
        let mut body = BytesMut::new();
        while let Some(chunk) = download.chunk().await? {
            body.extend_from_slice(&chunk);
        }
        Ok(Whole { status: download.status(), body: body.freeze() })
    }
}
