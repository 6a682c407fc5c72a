//! The section `[egress]` of the operator's configuration.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use ipnet::IpNet;
use ringback_domain::webhook::address::AddressPolicy;
use ringback_domain::webhook::url::UrlPolicy;
use serde::{Deserialize, Serialize};

/// What may be dialled. The defaults suit a public service: https to public addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EgressConfig {
    /// Accept `http://` besides `https://`.
    pub allow_http: bool,
    /// Open this machine (`127.0.0.0/8`, `::1`). `ringback dev` sets it while it listens on loopback only.
    pub allow_loopback: bool,
    /// Private networks to open, for example `["10.20.0.0/16"]`.
    pub allow_private: Vec<IpNet>,
    /// Ports that may be dialled, for example `["443", "8000-8999"]`.
    pub ports: Vec<PortRange>,
}

impl Default for EgressConfig {
    fn default() -> Self {
        Self::from_policy(&UrlPolicy::default())
    }
}

/// A configuration that cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// An entry that opens nothing.
    #[error("egress.allow_private: {0}")]
    AllowPrivate(String),
    /// No port is left.
    #[error("egress.ports is empty: nothing could be dialled")]
    NoPorts,
}

impl EgressConfig {
    /// What `ringback dev` uses while it listens on loopback only.
    #[must_use]
    pub fn development() -> Self {
        Self::from_policy(&UrlPolicy::development())
    }

    fn from_policy(policy: &UrlPolicy) -> Self {
        Self {
            allow_http: policy.allow_http,
            allow_loopback: policy.addresses.allow_loopback,
            allow_private: policy.addresses.allow_private.clone(),
            ports: policy.ports.iter().cloned().map(PortRange).collect(),
        }
    }

    /// The rules in the form that the pure checks take; api-ingest uses the same at submit.
    ///
    /// # Errors
    /// An entry that opens nothing, or no port at all.
    pub fn policy(&self) -> Result<UrlPolicy, ConfigError> {
        for entry in &self.allow_private {
            AddressPolicy::check_entry(entry).map_err(ConfigError::AllowPrivate)?;
        }
        if self.ports.is_empty() {
            return Err(ConfigError::NoPorts);
        }
        Ok(UrlPolicy {
            allow_http: self.allow_http,
            ports: self.ports.iter().map(|range| range.0.clone()).collect(),
            addresses: AddressPolicy {
                allow_loopback: self.allow_loopback,
                allow_private: self.allow_private.clone(),
            },
        })
    }
}

/// One port or a range of ports, written `443` or `8000-8999`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortRange(pub RangeInclusive<u16>);

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.start() == self.0.end() {
            write!(f, "{}", self.0.start())
        } else {
            write!(f, "{}-{}", self.0.start(), self.0.end())
        }
    }
}

impl From<PortRange> for String {
    fn from(range: PortRange) -> Self {
        range.to_string()
    }
}

impl TryFrom<String> for PortRange {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (from, to) = text.split_once('-').unwrap_or((text, text));
        let port = |part: &str| part.trim().parse::<u16>().ok().filter(|port| *port > 0);
        match (port(from), port(to)) {
            (Some(from), Some(to)) if from <= to => Ok(Self(from..=to)),
            _ => Err(format!("{text:?} is no port (443) and no range of ports (8000-8999)")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_and_written() {
        for text in ["443", "8000-8999"] {
            assert_eq!(text.parse::<PortRange>().unwrap().to_string(), text);
        }
        for text in ["", "0", "9-8", "http", "1-70000"] {
            assert!(text.parse::<PortRange>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_default_is_public_and_development_is_local() {
        assert_eq!(EgressConfig::default().policy(), Ok(UrlPolicy::default()));
        assert_eq!(EgressConfig::development().policy(), Ok(UrlPolicy::development()));
    }

    #[test]
    fn an_entry_that_opens_everything_is_refused_by_name() {
        let config =
            EgressConfig { allow_private: vec!["0.0.0.0/0".parse().unwrap()], ..EgressConfig::default() };
        let error = config.policy().unwrap_err().to_string();
        assert!(error.contains("egress.allow_private") && error.contains("0.0.0.0/0"), "{error}");
    }
}
