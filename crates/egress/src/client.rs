//! The client of one role.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use ringback_domain::webhook::url::{UrlError, UrlPolicy};
use tokio::time::{Instant, timeout_at};
use url::Url;

use crate::error::EgressError;
use crate::judge::Judge;
use crate::resolver::{GuardedResolver, Lookup, SystemLookup};
use crate::timings::{Clock, Permit, Timings};

/// A timer that fires so much too late tells that the process was stopped or starved.
const LATE: Duration = Duration::from_millis(50);
/// How long it then looks for what came in meanwhile.
const LATE_LOOK: Duration = Duration::from_millis(500);

/// Limits of one role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// For resolving, connecting, the headers of the answer and its body together.
    pub deadline: Duration,
    /// How long the answer's body may take after its headers, within the deadline. The verdict is in the headers
    /// already.
    pub body_time: Duration,
    /// How much of the answer's body is read.
    pub max_body_bytes: usize,
    /// How long an unused connection is kept. Servers close theirs after 2 s (gunicorn) or 5 s (Node, uvicorn);
    /// being earlier avoids sending into a closing connection.
    pub keep_alive: Duration,
    /// Unused connections kept per receiver.
    pub max_idle_per_host: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            body_time: Duration::from_secs(2),
            max_body_bytes: 4096,
            keep_alive: Duration::from_millis(1900),
            max_idle_per_host: 256,
        }
    }
}

/// The client could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No TLS provider is installed for the process.
    #[error("no TLS provider is installed in this process: install one before the first client is built")]
    NoCryptoProvider,
    /// The client's own reason; mostly missing CA certificates.
    #[error("the HTTP client cannot be built ({0}); are CA certificates installed (SSL_CERT_FILE)?")]
    Http(String),
}

/// A URL that passed the rules of its client. A literal address never passes through the resolver, so the rules are
/// applied to the very value that is dialled; only [`Client::check`] makes one.
#[derive(Clone)]
pub struct CheckedUrl(pub(crate) Url);

impl std::fmt::Debug for CheckedUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Path and query may be secrets.
        write!(f, "CheckedUrl({})", self.0.host_str().unwrap_or_default())
    }
}

/// A request to send.
#[derive(Debug)]
pub struct Post {
    /// Where to.
    pub url: CheckedUrl,
    /// All headers but those of the transport.
    pub headers: HeaderMap,
    /// The body; cheap to copy.
    pub body: Bytes,
    /// A deadline of the receiver's own, in place of the role's.
    pub deadline: Option<Duration>,
}

/// How a request ended, and where its time went.
#[derive(Debug)]
pub struct Posted {
    /// The answer, or why there is none; the class is in [`EgressError::fault`].
    pub result: Result<Answer, EgressError>,
    /// Where the time went.
    pub timings: Timings,
}

/// What came back.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// `Retry-After` as sent, if it is text.
    pub retry_after: Option<String>,
    /// The beginning of the body.
    pub body: Bytes,
    /// Whether the body was longer, or too slow to be read to its end.
    pub truncated: bool,
    /// Who answered.
    pub remote: Option<SocketAddr>,
}

/// The client of one role. Cheap to copy; copies share their connections.
#[derive(Clone)]
pub struct Client {
    pub(crate) http: reqwest::Client,
    judge: Arc<Judge>,
    limits: Limits,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("policy", self.judge.policy()).field("limits", &self.limits).finish()
    }
}

impl Client {
    /// A client that resolves names like the rest of the system.
    ///
    /// # Errors
    /// No TLS provider, or no CA certificates.
    pub fn new(policy: UrlPolicy, limits: Limits) -> Result<Self, BuildError> {
        Self::with_lookup(policy, limits, Arc::new(SystemLookup))
    }

    /// A client with a resolver of its own.
    ///
    /// # Errors
    /// No TLS provider, or no CA certificates.
    pub fn with_lookup(
        policy: UrlPolicy,
        limits: Limits,
        lookup: Arc<dyn Lookup>,
    ) -> Result<Self, BuildError> {
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            return Err(BuildError::NoCryptoProvider);
        }
        let resolver = GuardedResolver::new(Arc::new(policy.addresses.clone()), lookup);
        let http = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .http1_only()
            .tcp_nodelay(true)
            .pool_idle_timeout(limits.keep_alive)
            .pool_max_idle_per_host(limits.max_idle_per_host)
            .dns_resolver(resolver)
            .connector_layer(crate::timings::layer())
            .build()
            .map_err(|error| BuildError::Http(error.without_url().to_string()))?;
        Ok(Self { http, judge: Arc::new(Judge::new(policy)), limits })
    }

    /// The limits that this client keeps.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Judges a URL by the rules that need no network.
    ///
    /// # Errors
    /// The rule it breaks.
    pub fn check(&self, url: &str) -> Result<CheckedUrl, UrlError> {
        self.judge.check(url).map(CheckedUrl)
    }

    /// Sends a request and reads its answer within the limits. A connection that ends before any answer is tried once
    /// more at once: it was mostly a kept connection that the receiver had just given up, and the receiver can drop the
    /// second copy by its `webhook-id`.
    pub async fn post(&self, post: Post) -> Posted {
        self.post_clocked(post, Clock::start(None)).await
    }

    /// The same as long as `permit` holds: once it does not, nothing more is sent, and a request of which nothing was
    /// sent ends as [`EgressError::Withdrawn`]. What is on its way is not broken off.
    pub async fn post_while(&self, post: Post, permit: Permit) -> Posted {
        self.post_clocked(post, Clock::start(Some(permit))).await
    }

    async fn post_clocked(&self, post: Post, clock: Clock) -> Posted {
        let result = clock.measure(self.post_within(post, &clock)).await;
        Posted { result, timings: clock.read() }
    }

    async fn post_within(&self, post: Post, clock: &Clock) -> Result<Answer, EgressError> {
        if !clock.may_begin() {
            return Err(EgressError::Withdrawn);
        }
        let time = post.deadline.unwrap_or(self.limits.deadline);
        let deadline = Instant::now() + time;
        let first = self
            .send(post.url.0.clone(), post.headers.clone(), post.body.clone(), time, deadline, clock)
            .await;
        match first {
            // Which may have been sent: without a permit it stays with what is known.
            Err(closed @ EgressError::Closed(_)) if clock.may_begin() => {
                match self.send(post.url.0, post.headers, post.body, time, deadline, clock).await {
                    Err(EgressError::Withdrawn) => Err(closed),
                    other => other,
                }
            }
            other => other,
        }
    }

    async fn send(
        &self,
        url: Url,
        headers: HeaderMap,
        body: Bytes,
        time: Duration,
        deadline: Instant,
        clock: &Clock,
    ) -> Result<Answer, EgressError> {
        let mut request = std::pin::pin!(self.http.post(url).headers(headers).body(body).send());
        let mut sent = timeout_at(deadline, &mut request).await;
        if sent.is_err() && deadline.elapsed() > LATE {
            // Whoever stood still finds its time over before it looks at its sockets: the answer may be there.
            sent = timeout_at(Instant::now() + LATE_LOOK, &mut request).await;
        }
        let mut response = sent
            .map_err(|_| EgressError::Timeout(time))?
            .map_err(|error| EgressError::from_reqwest(error, time))?;
        clock.first_byte();
        let mut answer = Answer {
            status: response.status().as_u16(),
            retry_after: response
                .headers()
                .get(header::RETRY_AFTER)
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned),
            body: Bytes::new(),
            truncated: false,
            remote: response.remote_addr(),
        };
        // The status is the verdict: a body that drips or never ends costs the receiver its connection, not us our time.
        if response.content_length() != Some(0) {
            let end = deadline.min(Instant::now() + self.limits.body_time);
            let mut body = BytesMut::new();
            answer.truncated =
                !matches!(timeout_at(end, self.read_body(&mut response, &mut body)).await, Ok(true));
            answer.body = body.freeze();
        }
        Ok(answer)
    }

    /// Reads to the end or to the cap; true if the end was reached.
    async fn read_body(&self, response: &mut reqwest::Response, into: &mut BytesMut) -> bool {
        while let Ok(chunk) = response.chunk().await {
            let Some(chunk) = chunk else { return true };
            let room = self.limits.max_body_bytes.saturating_sub(into.len());
            into.extend_from_slice(&chunk[..chunk.len().min(room)]);
            if chunk.len() > room {
                return false;
            }
        }
        false
    }
}
