//! Why a request had no answer. No text here holds the URL.

use std::error::Error;
use std::net::IpAddr;
use std::time::Duration;

use ringback_domain::webhook::address::DeniedRange;
use ringback_domain::webhook::response::TransportFault;
use ringback_domain::webhook::url::UrlError;

/// What our resolver says inside the connector; found again in the chain of the client's error.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum DialFault {
    #[error("{0}")]
    Dns(String),
    #[error("resolves to {ip}, which is not allowed: {range}")]
    Blocked { ip: IpAddr, range: DeniedRange },
    #[error("it may no longer begin")]
    Withdrawn,
}

/// A request that had no answer.
#[derive(Debug, thiserror::Error)]
pub enum EgressError {
    /// The URL breaks a rule of the operator.
    #[error("URL refused: {0}")]
    Url(#[from] UrlError),
    /// The name resolves to denied addresses only.
    #[error("the name {0}")]
    Blocked(String),
    /// The name cannot be resolved.
    #[error("the name cannot be resolved: {0}")]
    Dns(String),
    /// The TLS handshake failed.
    #[error("TLS failed: {0}")]
    Tls(String),
    /// No connection.
    #[error("no connection: {0}")]
    Connect(String),
    /// The deadline passed.
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The connection ended before the answer.
    #[error("the connection ended before an answer: {0}")]
    Closed(String),
    /// The answer is not HTTP.
    #[error("the answer is not HTTP: {0}")]
    Protocol(String),
    /// More bytes than the role takes.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(u64),
    /// More redirects than are followed, or one that leads nowhere.
    #[error("{0}")]
    Redirect(&'static str),
    /// Its permit ended before anything was sent: nobody was told, and nothing was learnt.
    #[error("it may no longer begin")]
    Withdrawn,
}

impl EgressError {
    /// The class of the fault, by which a delivery is judged and counted.
    #[must_use]
    pub fn fault(&self) -> TransportFault {
        match self {
            Self::Url(UrlError::Address { .. }) | Self::Blocked(_) => TransportFault::Blocked,
            Self::Url(_) => TransportFault::Url,
            Self::Dns(_) => TransportFault::Dns,
            Self::Tls(_) => TransportFault::Tls,
            Self::Connect(_) | Self::Withdrawn => TransportFault::Connect,
            Self::Timeout(_) => TransportFault::Timeout,
            Self::Closed(_) => TransportFault::Closed,
            Self::Protocol(_) | Self::TooLarge(_) | Self::Redirect(_) => TransportFault::Protocol,
        }
    }

    pub(crate) fn from_reqwest(error: reqwest::Error, deadline: Duration) -> Self {
        if let Some(fault) = find::<DialFault>(&error) {
            return match fault {
                DialFault::Dns(text) => Self::Dns(text.clone()),
                DialFault::Blocked { .. } => Self::Blocked(fault.to_string()),
                DialFault::Withdrawn => Self::Withdrawn,
            };
        }
        if let Some(tls) = find::<rustls::Error>(&error) {
            return Self::Tls(tls.to_string());
        }
        let timed_out = error.is_timeout();
        let connecting = error.is_connect();
        let error = error.without_url();
        let text = deepest(&error);
        if timed_out {
            return Self::Timeout(deadline);
        }
        if connecting {
            return Self::Connect(text);
        }
        match find::<hyper::Error>(&error) {
            Some(http) if http.is_parse() || http.is_parse_too_large() || http.is_user() => {
                Self::Protocol(text)
            }
            _ => Self::Closed(text),
        }
    }
}

/// The first error of type `E` in a chain. I/O errors hide theirs from `source`, so they are opened.
fn find<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(current) = next {
        if let Some(found) = current.downcast_ref::<E>() {
            return Some(found);
        }
        let wrapped = current.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = match wrapped {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => current.source(),
        };
    }
    None
}

fn deepest(error: &(dyn Error + 'static)) -> String {
    let mut current = error;
    while let Some(source) = current.source() {
        current = source;
    }
    current.to_string()
}
