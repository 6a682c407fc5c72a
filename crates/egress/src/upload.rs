//! Files put where a client wants them, streamed within a deadline.

use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use http::header;
use tokio::time::{Instant, timeout_at};

use crate::client::{CheckedUrl, Client};
use crate::error::EgressError;

impl Client {
    /// PUTs a body of a known length; answers the status. One deadline, `time`, covers everything. A redirect is
    /// answered as its status: the bytes go where the client said, or nowhere.
    ///
    /// # Errors
    /// No answer came.
    pub async fn upload<S, E>(
        &self,
        url: CheckedUrl,
        content_type: &str,
        length: u64,
        body: S,
        time: Duration,
    ) -> Result<u16, EgressError>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: std::error::Error + Send + Sync + 'static,
    {
        let request = self
            .http
            .put(url.0)
            .header(header::CONTENT_TYPE, content_type)
            // Object stores refuse a body without a length.
            .header(header::CONTENT_LENGTH, length)
            .body(reqwest::Body::wrap_stream(body))
            .send();
        let response = timeout_at(Instant::now() + time, request)
            .await
            .map_err(|_| EgressError::Timeout(time))?
            .map_err(|error| EgressError::from_reqwest(error, time))?;
        Ok(response.status().as_u16())
    }
}
