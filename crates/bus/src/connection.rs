//! One connection per process, kept for ever, with its state to be watched.

use crate::error::BusError;
use crate::subjects::Subjects;
use async_nats::{Client, ConnectOptions, Event, HeaderMap};
use ringback_service_runtime::config::NatsConfig;
use ringback_service_runtime::time::now_ms;
use ringback_service_runtime::trace_context::TRACEPARENT;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// The state of the connection. Observers of leases judge nobody lost within one lease of `connected_since`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connectivity {
    /// Whether the connection stands now.
    pub connected: bool,
    /// Wall clock of the last connect, milliseconds since 1970; 0 before the first.
    pub connected_since_ms: i64,
    /// The same on the monotonic clock.
    pub connected_since: Option<Instant>,
    /// Rises with every connect: what was asked in an earlier epoch may be lost.
    pub epoch: u64,
}

/// Ringback's connection to NATS (cheap to clone).
#[derive(Debug, Clone)]
pub struct Bus {
    pub(crate) client: Client,
    pub(crate) subjects: Arc<Subjects>,
    pub(crate) request_timeout: Duration,
    pub(crate) replicas: u32,
    pub(crate) publishes_in_flight: usize,
    connectivity: watch::Receiver<Connectivity>,
}

/// A dead connection is noticed within two of these.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);
const LONGEST_RECONNECT_DELAY: Duration = Duration::from_secs(2);

impl Bus {
    /// Connects in the background and for ever; returns at once, also while NATS is away. Call
    /// `ringback_service_runtime::crypto_provider::install` before.
    ///
    /// # Errors
    /// [`BusError::Permanent`] when the configuration cannot work: no URL, unreadable credentials.
    pub async fn connect(config: &NatsConfig, client_name: &str) -> Result<Self, BusError> {
        let url =
            config.url.as_deref().ok_or_else(|| BusError::Permanent("nats.url is not set".to_owned()))?;
        let servers: Vec<&str> = url.split(',').map(str::trim).collect();
        let (sender, connectivity) = watch::channel(Connectivity {
            connected: false,
            connected_since_ms: 0,
            connected_since: None,
            epoch: 0,
        });
        let sender = Arc::new(sender);
        let options = authenticated(config)
            .await?
            .name(client_name)
            .connection_timeout(Duration::from_millis(config.connect_timeout_ms))
            .request_timeout(None)
            .ping_interval(PING_INTERVAL)
            .max_reconnects(None)
            .retry_on_initial_connect()
            .reconnect_delay_callback(reconnect_delay)
            .event_callback(move |event| {
                note(&sender, &event);
                async {}
            });
        let client =
            options.connect(servers).await.map_err(|error| BusError::Permanent(error.to_string()))?;
        tokio::spawn(complain(connectivity.clone()));
        Ok(Self {
            client,
            subjects: Arc::new(Subjects::new(config.install.clone())),
            request_timeout: Duration::from_millis(config.request_timeout_ms),
            replicas: config.replicas,
            publishes_in_flight: usize::try_from(config.max_publishes_in_flight).unwrap_or(1024),
            connectivity,
        })
    }

    /// The names of this installation.
    #[must_use]
    pub fn subjects(&self) -> &Subjects {
        &self.subjects
    }

    /// The connection's state, to be watched.
    #[must_use]
    pub fn connectivity(&self) -> watch::Receiver<Connectivity> {
        self.connectivity.clone()
    }

    /// Whether the connection stands now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connectivity.borrow().connected
    }

    /// Waits for the connection.
    ///
    /// # Errors
    /// [`BusError::Disconnected`] when it does not stand within `timeout`.
    pub async fn connected(&self, timeout: Duration) -> Result<(), BusError> {
        if self.is_connected() {
            return Ok(());
        }
        let mut connectivity = self.connectivity.clone();
        match tokio::time::timeout(timeout, connectivity.wait_for(|now| now.connected)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(BusError::Disconnected),
        }
    }

    /// Sends what is buffered; call it before the process ends, or the last acknowledgements are lost.
    ///
    /// # Errors
    /// [`BusError::Timeout`] or [`BusError::Transient`].
    pub async fn flush(&self) -> Result<(), BusError> {
        let timeout = self.request_timeout;
        tokio::time::timeout(timeout, self.client.flush())
            .await
            .map_err(|_| BusError::Timeout { subject: "flush".to_owned(), timeout_ms: millis(timeout) })?
            .map_err(|error| BusError::Transient(error.to_string()))
    }
}

/// Says in the log that there is no connection, for as long as there is none: a wrong address or password shows
/// nowhere else, because connecting never ends.
async fn complain(mut connectivity: watch::Receiver<Connectivity>) {
    loop {
        // Err means that the connection and everyone who used it are gone.
        match tokio::time::timeout(COMPLAIN_EVERY, connectivity.wait_for(|now| now.connected)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return,
            Err(_) => {
                tracing::warn!("still not connected to NATS; check nats.url, nats.user and the password");
                continue;
            }
        }
        if connectivity.wait_for(|now| !now.connected).await.is_err() {
            return;
        }
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Headers with the trace context, if there is one.
pub(crate) fn trace_headers(traceparent: Option<&str>) -> Option<HeaderMap> {
    traceparent.map(|traceparent| {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, traceparent);
        headers
    })
}

/// The trace context of a message.
pub(crate) fn traceparent_of(headers: Option<&HeaderMap>) -> Option<String> {
    headers.and_then(|headers| headers.get(TRACEPARENT)).map(|value| value.as_str().to_owned())
}

async fn authenticated(config: &NatsConfig) -> Result<ConnectOptions, BusError> {
    let mut options = ConnectOptions::new();
    if let Some(path) = &config.creds_file {
        options = options
            .credentials_file(path)
            .await
            .map_err(|error| BusError::Permanent(format!("nats.creds_file: {error}")))?;
    }
    if let Some(user) = &config.user {
        let password = config
            .resolve_password()
            .map_err(|error| BusError::Permanent(error.to_string()))?
            .ok_or_else(|| BusError::Permanent("nats.password is not set".to_owned()))?;
        options = options.user_and_password(user.clone(), password.into_inner());
    }
    if let Some(path) = &config.ca_file {
        options = options.add_root_certificates(path.clone());
    }
    Ok(options)
}

/// Quick at first (a restarted server is back in a moment), at most 2 s, spread so that workers do not return as one.
fn reconnect_delay(attempts: usize) -> Duration {
    let doubled = Duration::from_millis(20 << attempts.min(7));
    doubled.min(LONGEST_RECONNECT_DELAY).mul_f64(rand::random_range(0.5..1.0))
}

fn note(sender: &watch::Sender<Connectivity>, event: &Event) {
    match event {
        Event::Connected => {
            sender.send_modify(|now| {
                *now = Connectivity {
                    connected: true,
                    connected_since_ms: now_ms(),
                    connected_since: Some(Instant::now()),
                    epoch: now.epoch + 1,
                };
            });
            tracing::info!("connected to NATS");
        }
        Event::Disconnected => {
            sender.send_modify(|now| now.connected = false);
            tracing::warn!("NATS connection lost");
        }
        // By ourselves: the last handle was dropped.
        Event::Closed => {
            sender.send_modify(|now| now.connected = false);
            tracing::debug!("NATS connection closed");
        }
        Event::SlowConsumer(sid) => {
            tracing::warn!(sid, "messages were dropped: this process reads too slowly")
        }
        Event::LameDuckMode | Event::Draining => tracing::info!(%event, "NATS server is going away"),
        Event::ServerError(error) => tracing::warn!(%error, "NATS server error"),
        Event::ClientError(error) => tracing::warn!(%error, "NATS client error"),
    }
}
