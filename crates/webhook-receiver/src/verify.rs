//! Whether a request is to be trusted: over its raw body, before anything reads it. Pure: the clock and the peer are
//! arguments.

use std::fmt;
use std::net::IpAddr;

use http::HeaderMap;
use ipnet::IpNet;
use ringback_domain::webhook::{runflow, signature};

use crate::secret::Secrets;

/// Longest `webhook-id` taken, in bytes.
pub const MAX_ID_BYTES: usize = 256;
/// Body cap unless told otherwise: RunPod's results end at 20 MB.
pub const DEFAULT_MAX_BODY_BYTES: usize = 32 * 1024 * 1024;
/// Largest cap that makes sense: all bodies that are being read share this much memory.
pub const LARGEST_MAX_BODY_BYTES: usize = 256 * 1024 * 1024;

/// Headers that only a proxy adds.
const PROXY_HEADERS: [&str; 4] = ["forwarded", "x-forwarded-for", "x-real-ip", "via"];

/// Networks whose unsigned requests are taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostList(Vec<IpNet>);

/// A host list that cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostListError {
    /// No entry.
    #[error("unsigned requests need a list of hosts that may send them")]
    Empty,
    /// Not an address or a network.
    #[error("{0:?} is not an address or a network such as 10.0.0.0/8")]
    NotANetwork(String),
    /// Everybody.
    #[error("{0} lets everybody send unsigned requests; name the networks of your senders")]
    Everybody(IpNet),
}

impl HostList {
    /// Reads addresses and networks.
    ///
    /// # Errors
    /// [`HostListError`].
    pub fn parse<S: AsRef<str>>(entries: &[S]) -> Result<Self, HostListError> {
        let mut list = Vec::with_capacity(entries.len());
        for entry in entries {
            let entry = entry.as_ref();
            let net: IpNet = entry
                .parse()
                .or_else(|_| entry.parse::<IpAddr>().map(IpNet::from))
                .map_err(|_| HostListError::NotANetwork(entry.to_owned()))?;
            if net.prefix_len() == 0 {
                return Err(HostListError::Everybody(net));
            }
            list.push(net);
        }
        if list.is_empty() { Err(HostListError::Empty) } else { Ok(Self(list)) }
    }

    /// Whether `ip` is listed. v4 addresses mapped into v6 are judged as what they stand for.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.0.iter().any(|net| net.contains(&ip))
    }
}

impl fmt::Display for HostList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, net) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{net}")?;
        }
        Ok(())
    }
}

/// What a receiver trusts.
#[derive(Debug, Clone)]
pub struct Trust {
    /// Live secrets, of all senders.
    pub secrets: Secrets,
    /// Who may send without a signature; nobody if `None`.
    pub unsigned: Option<HostList>,
    /// Largest body taken.
    pub max_body_bytes: usize,
}

impl Trust {
    /// Only signed requests, bodies up to [`DEFAULT_MAX_BODY_BYTES`].
    #[must_use]
    pub fn signed(secrets: Secrets) -> Self {
        Self { secrets, unsigned: None, max_body_bytes: DEFAULT_MAX_BODY_BYTES }
    }
}

/// Why a request is trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// A Standard Webhooks signature fits.
    Standard {
        /// The message's id, the same on each retry.
        id: String,
        /// When this attempt was signed, unix seconds.
        timestamp_s: i64,
    },
    /// `Runflow-Signature` fits. It signs neither id nor time.
    Runflow,
    /// The sender's address is listed.
    Unsigned {
        /// Its address.
        peer: IpAddr,
    },
}

/// Why a request is not trusted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The body is over the cap.
    #[error("the body is larger than {max_bytes} bytes")]
    TooLarge {
        /// The cap.
        max_bytes: usize,
    },
    /// Part of the three headers.
    #[error("the header {0} is missing")]
    MissingHeader(&'static str),
    /// Twice the same header: nobody can tell which one counts.
    #[error("the header {0} is there more than once")]
    RepeatedHeader(&'static str),
    /// Not visible ASCII, empty or too long.
    #[error("the header {0} is empty, longer than {MAX_ID_BYTES} bytes or not visible ASCII")]
    BadHeader(&'static str),
    /// The timestamp is not a number of seconds.
    #[error("webhook-timestamp is not a number of unix seconds")]
    BadTimestamp,
    /// Signed too long ago, or the clocks differ.
    #[error("webhook-timestamp is {age_s} s in the past; at most {} s are allowed", signature::TOLERANCE_S)]
    TooOld {
        /// How long ago.
        age_s: i64,
    },
    /// Signed in the future: the clocks differ.
    #[error(
        "webhook-timestamp is {ahead_s} s in the future; at most {} s are allowed",
        signature::TOLERANCE_S
    )]
    TooNew {
        /// How far.
        ahead_s: i64,
    },
    /// No item of the list begins with `v1,`.
    #[error("webhook-signature has no v1 item")]
    NoV1,
    /// No item fits any of our secrets.
    #[error("no v1 signature fits: the secret differs or the body was altered ({secrets} secret(s) tried)")]
    NoMatch {
        /// How many were tried.
        secrets: usize,
    },
    /// Runflow's header is malformed or does not fit.
    #[error("{reason} ({secrets} secret(s) tried)")]
    Runflow {
        /// What is wrong with it.
        reason: runflow::VerifyError,
        /// How many were tried.
        secrets: usize,
    },
    /// Signed, and we have no secret to check it with.
    #[error("the request is signed and this receiver has no secret to check it with")]
    NoSecret,
    /// Not signed.
    #[error("the request has no signature (webhook-signature or Runflow-Signature)")]
    Unsigned,
    /// Not signed, and from somewhere else than the listed hosts.
    #[error("the request has no signature and {peer} is not among the hosts that may send unsigned ones")]
    UnsignedHost {
        /// Where it came from.
        peer: IpAddr,
    },
    /// Not signed and handed on by a proxy, behind which every host looks the same.
    #[error(
        "the request has no signature and came through a proxy (header {0}), so its host cannot be judged"
    )]
    UnsignedThroughProxy(&'static str),
    /// Not signed, and nobody knows where it came from.
    #[error("the request has no signature and its host is unknown")]
    UnknownPeer,
}

impl Refusal {
    /// A short stable name, for counters and machine output.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "too_large",
            Self::MissingHeader(_) => "missing_header",
            Self::RepeatedHeader(_) => "repeated_header",
            Self::BadHeader(_) => "bad_header",
            Self::BadTimestamp => "bad_timestamp",
            Self::TooOld { .. } => "too_old",
            Self::TooNew { .. } => "too_new",
            Self::NoV1 => "no_v1",
            Self::NoMatch { .. } | Self::Runflow { .. } => "no_match",
            Self::NoSecret => "no_secret",
            Self::Unsigned => "unsigned",
            Self::UnsignedHost { .. } => "unsigned_host",
            Self::UnsignedThroughProxy(_) => "unsigned_through_proxy",
            Self::UnknownPeer => "unknown_peer",
        }
    }
}

/// The three headers, under one of their two sets of names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StandardHeaders<'a> {
    pub(crate) id: &'a str,
    pub(crate) timestamp: &'a str,
    pub(crate) signatures: &'a str,
}

const NAMES: [[&str; 3]; 2] = [
    [signature::ID_HEADER, signature::TIMESTAMP_HEADER, signature::SIGNATURE_HEADER],
    ["svix-id", "svix-timestamp", "svix-signature"],
];

/// The headers of Standard Webhooks, `None` if there is not one of them.
pub(crate) fn standard_headers(headers: &HeaderMap) -> Result<Option<StandardHeaders<'_>>, Refusal> {
    let Some(names) = NAMES.iter().find(|names| names.iter().any(|name| headers.contains_key(*name))) else {
        return Ok(None);
    };
    let [id, timestamp, signatures] = *names;
    let id_text = single(headers, id)?;
    if id_text.len() > MAX_ID_BYTES {
        return Err(Refusal::BadHeader(id));
    }
    Ok(Some(StandardHeaders {
        id: id_text,
        timestamp: single(headers, timestamp)?,
        signatures: single(headers, signatures)?,
    }))
}

fn single<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<&'a str, Refusal> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().ok_or(Refusal::MissingHeader(name))?;
    if values.next().is_some() {
        return Err(Refusal::RepeatedHeader(name));
    }
    let text = value.to_str().map_err(|_| Refusal::BadHeader(name))?;
    if text.is_empty() { Err(Refusal::BadHeader(name)) } else { Ok(text) }
}

impl Trust {
    /// Judges a request. A signature that is there must fit: a wrong one is never taken for none, unless this receiver
    /// has no secret at all and takes the sender's unsigned requests.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn verify(
        &self,
        headers: &HeaderMap,
        body: &[u8],
        peer: Option<IpAddr>,
        now_s: i64,
    ) -> Result<Proof, Refusal> {
        if body.len() > self.max_body_bytes {
            return Err(Refusal::TooLarge { max_bytes: self.max_body_bytes });
        }
        if self.secrets.is_empty() && self.unsigned.is_some() {
            return self.unsigned(headers, peer);
        }
        if let Some(standard) = standard_headers(headers)? {
            return self.standard(standard, body, now_s);
        }
        if headers.contains_key(runflow::SIGNATURE_HEADER) {
            let given = single(headers, runflow::SIGNATURE_HEADER)?;
            let secrets = self.some_secret()?;
            return runflow::verify(self.secrets.runflow(), given, body)
                .map(|()| Proof::Runflow)
                .map_err(|reason| Refusal::Runflow { reason, secrets });
        }
        self.unsigned(headers, peer)
    }

    fn some_secret(&self) -> Result<usize, Refusal> {
        if self.secrets.is_empty() { Err(Refusal::NoSecret) } else { Ok(self.secrets.len()) }
    }

    fn standard(&self, given: StandardHeaders<'_>, body: &[u8], now_s: i64) -> Result<Proof, Refusal> {
        let secrets = self.some_secret()?;
        let stamp: i64 = given.timestamp.parse().map_err(|_| Refusal::BadTimestamp)?;
        if !given.signatures.split(' ').any(|item| item.starts_with("v1,")) {
            return Err(Refusal::NoV1);
        }
        signature::verify(self.secrets.standard(), given.id, given.timestamp, given.signatures, body, now_s)
            .map(|()| Proof::Standard { id: given.id.to_owned(), timestamp_s: stamp })
            .map_err(|error| match error {
                signature::VerifyError::BadTimestamp => Refusal::BadTimestamp,
                signature::VerifyError::TooOld => Refusal::TooOld { age_s: now_s.saturating_sub(stamp) },
                signature::VerifyError::TooNew => Refusal::TooNew { ahead_s: stamp.saturating_sub(now_s) },
                signature::VerifyError::NoMatch => Refusal::NoMatch { secrets },
            })
    }

    fn unsigned(&self, headers: &HeaderMap, peer: Option<IpAddr>) -> Result<Proof, Refusal> {
        let list = self.unsigned.as_ref().ok_or(Refusal::Unsigned)?;
        if let Some(name) = PROXY_HEADERS.into_iter().find(|name| headers.contains_key(*name)) {
            return Err(Refusal::UnsignedThroughProxy(name));
        }
        let peer = peer.ok_or(Refusal::UnknownPeer)?.to_canonical();
        if list.contains(peer) { Ok(Proof::Unsigned { peer }) } else { Err(Refusal::UnsignedHost { peer }) }
    }
}

#[cfg(test)]
mod tests;
