//! The HTTP client of the verbs: it speaks Ringback's native routes.

pub(crate) mod connection;
pub(crate) mod model;
pub(crate) mod problem;
pub(crate) mod sse;

use crate::error::CliError;
use connection::Target;
use problem::Problem;
use reqwest::{Method, StatusCode, header};
use serde::de::DeserializeOwned;
use std::time::Duration;

/// A path segment or query value made safe for a URL.
pub(crate) use ringback_domain::artifact::percent_encoded as encode;

/// Time in which a server must take the connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for one answer; submits are answered within 2.5 s, a big batch takes longer to send.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// A client of one server with one key. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    target: Target,
    http: reqwest::Client,
}

/// An answer's JSON, verbatim.
#[derive(Debug)]
pub(crate) struct Body {
    url: String,
    /// The text as it came.
    pub(crate) text: String,
}

impl Body {
    /// Reads it as a type.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Result<T, CliError> {
        serde_json::from_str(&self.text)
            .map_err(|error| CliError::NotOurs { url: self.url.clone(), reason: error.to_string() })
    }
}

impl Api {
    /// A client for a target.
    ///
    /// # Errors
    /// When the TLS implementation cannot be set up.
    pub(crate) fn new(target: Target) -> Result<Self, CliError> {
        ringback_service_runtime::crypto_provider::install();
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .user_agent(concat!("ringback/", env!("CARGO_PKG_VERSION")));
        if target.is_loopback() {
            // A proxy from the environment cannot reach this host's loopback.
            builder = builder.no_proxy();
        }
        let http =
            builder.build().map_err(|error| CliError::Service(format!("cannot set up HTTP: {error}")))?;
        Ok(Self { target, http })
    }

    /// Base address of the server.
    pub(crate) fn url(&self) -> &str {
        &self.target.url
    }

    /// GET of a path with a query.
    pub(crate) async fn get(&self, path: &str) -> Result<Body, CliError> {
        let request = self.request(Method::GET, path).timeout(ANSWER_TIMEOUT);
        self.finish(path, request).await
    }

    /// POST of JSON, with further headers.
    pub(crate) async fn post(
        &self,
        path: &str,
        json: String,
        headers: &[(&'static str, &str)],
    ) -> Result<Body, CliError> {
        let mut request = self.request(Method::POST, path).timeout(ANSWER_TIMEOUT);
        if !json.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json").body(json);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.finish(path, request).await
    }

    /// PATCH of JSON.
    pub(crate) async fn patch(&self, path: &str, json: String) -> Result<Body, CliError> {
        let request = self.request(Method::PATCH, path).timeout(ANSWER_TIMEOUT);
        self.finish(path, request.header(header::CONTENT_TYPE, "application/json").body(json)).await
    }

    /// DELETE.
    pub(crate) async fn delete(&self, path: &str) -> Result<Body, CliError> {
        let request = self.request(Method::DELETE, path).timeout(ANSWER_TIMEOUT);
        self.finish(path, request).await
    }

    /// GET of something that may be large or without end. The caller reads the body.
    pub(crate) async fn open(&self, path: &str) -> Result<reqwest::Response, CliError> {
        let response =
            self.request(Method::GET, path).send().await.map_err(|error| self.unreachable(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let retry_after = retry_after(&response);
        let text = response.text().await.map_err(|error| self.unreachable(&error))?;
        Err(self.refusal(status, retry_after, &text))
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.target.url));
        match &self.target.key {
            Some(key) => request.bearer_auth(key.expose()),
            None => request,
        }
    }

    async fn finish(&self, path: &str, request: reqwest::RequestBuilder) -> Result<Body, CliError> {
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        let retry_after = retry_after(&response);
        let text = response.text().await.map_err(|error| self.unreachable(&error))?;
        if status.is_success() {
            return Ok(Body { url: format!("{}{path}", self.target.url), text });
        }
        Err(self.refusal(status, retry_after, &text))
    }

    fn refusal(&self, status: StatusCode, retry_after: Option<u64>, text: &str) -> CliError {
        CliError::Refused(Problem::read(status.as_u16(), retry_after, text, self.target.key.is_some()))
    }

    /// What a failed exchange means.
    pub(crate) fn unreachable(&self, error: &reqwest::Error) -> CliError {
        CliError::Unreachable {
            url: self.target.url.clone(),
            reason: reason(error),
            hint: self.target.unreachable_hint(),
        }
    }
}

fn retry_after(response: &reqwest::Response) -> Option<u64> {
    response.headers().get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()
}

/// The innermost reason: "Connection refused" says more than "error sending request".
fn reason(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "timed out".to_owned();
    }
    let mut inner: &dyn std::error::Error = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}
