//! From the operator's configuration to the rules of a role.

use std::net::IpAddr;

use ipnet::IpNet;
use ringback_domain::webhook::address::AddressPolicy;
use ringback_domain::webhook::url::UrlPolicy;
use ringback_service_runtime::config::WebhooksConfig;
use url::{Host, Url};

/// A configuration that cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not a network.
    #[error("webhooks.allow_private: {0:?} is not a network such as \"10.0.0.0/8\"")]
    NotANetwork(String),
    /// An entry that opens nothing.
    #[error("webhooks.allow_private: {0}")]
    AllowPrivate(String),
}

/// The rules for webhook URLs: what api-ingest checks at submit and what the dispatcher dials.
///
/// # Errors
/// An entry of `webhooks.allow_private` that is no network, or that opens nothing.
pub fn webhook_policy(config: &WebhooksConfig) -> Result<UrlPolicy, ConfigError> {
    let mut allow_private = Vec::with_capacity(config.allow_private.len());
    for text in &config.allow_private {
        let entry: IpNet = text.parse().map_err(|_| ConfigError::NotANetwork(text.clone()))?;
        AddressPolicy::check_entry(&entry).map_err(ConfigError::AllowPrivate)?;
        allow_private.push(entry);
    }
    let mut policy = UrlPolicy {
        allow_http: config.allow_http,
        addresses: AddressPolicy { allow_loopback: config.allow_loopback, allow_private },
        ..UrlPolicy::default()
    };
    policy.ports.extend(config.allow_ports.iter().map(|&port| port..=port));
    Ok(policy)
}

/// The rules of a role that dials one address, named by whoever runs the program: its scheme, its port, and its network
/// where it is a private one. Nothing else is open.
#[must_use]
pub fn only(url: &Url) -> UrlPolicy {
    let literal: Option<IpAddr> = match url.host() {
        Some(Host::Ipv4(ip)) => Some(ip.into()),
        Some(Host::Ipv6(ip)) => Some(ip.into()),
        Some(Host::Domain(_)) | None => None,
    };
    let private = literal.map(IpNet::from).filter(|net| AddressPolicy::check_entry(net).is_ok());
    let port = url.port_or_known_default().unwrap_or(0);
    UrlPolicy {
        allow_http: url.scheme() == "http",
        ports: vec![port..=port],
        addresses: AddressPolicy { allow_loopback: true, allow_private: private.into_iter().collect() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringback_domain::webhook::url::check_url;

    #[test]
    fn only_the_named_address_is_open() {
        for url in [
            "http://localhost:3000/hook",
            "http://127.0.0.1:9/",
            "http://10.1.2.3:8080/x",
            "https://example.com/",
        ] {
            assert!(check_url(url, &only(&url.parse().unwrap())).is_ok(), "{url}");
        }
        let policy = only(&"http://10.1.2.3:8080/x".parse().unwrap());
        for url in ["http://10.1.2.4:8080/x", "http://10.1.2.3:8081/x", "http://169.254.169.254:8080/"] {
            assert!(check_url(url, &policy).is_err(), "{url}");
        }
        let tls = only(&"https://example.com/".parse().unwrap());
        assert!(check_url("http://example.com:443/", &tls).is_err());
    }

    #[test]
    fn the_default_is_public_https() {
        assert_eq!(webhook_policy(&WebhooksConfig::default()), Ok(UrlPolicy::default()));
        let local = WebhooksConfig { allow_loopback: true, ..WebhooksConfig::default() };
        assert_eq!(webhook_policy(&local), Ok(UrlPolicy::development()));
    }

    #[test]
    fn ports_are_added_to_the_usual_ones() {
        let config = WebhooksConfig { allow_ports: vec![8443], ..WebhooksConfig::default() };
        assert_eq!(webhook_policy(&config).unwrap().ports, [80..=80, 443..=443, 8443..=8443]);
    }

    #[test]
    fn an_entry_that_opens_everything_is_refused_by_name() {
        for (entry, expected) in [("0.0.0.0/0", "0.0.0.0/0"), ("ten", "ten"), ("8.8.8.0/24", "8.8.8.0/24")] {
            let config =
                WebhooksConfig { allow_private: vec![entry.to_owned()], ..WebhooksConfig::default() };
            let error = webhook_policy(&config).unwrap_err().to_string();
            assert!(error.contains("webhooks.allow_private") && error.contains(expected), "{error}");
        }
    }
}
