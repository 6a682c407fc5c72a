//! Which webhook URLs are accepted: the rules that need no network, shared by the submit (which answers 400) and by
//! the sender (which must not trust what was accepted under older rules).
//!
//! A name is judged again by its addresses when it is dialled; see crate `egress`.

use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;

use ::url::{Host, Url};

use super::address::{AddressPolicy, DeniedRange};

/// The longest URL taken, in bytes.
pub const MAX_URL_BYTES: usize = 2048;

/// The operator's rules for URLs of one role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UrlPolicy {
    /// Accept `http://` besides `https://`.
    pub allow_http: bool,
    /// Ports that may be dialled.
    pub ports: Vec<RangeInclusive<u16>>,
    /// Addresses that may be dialled. Where loopback is open, it is open for http and on every port.
    pub addresses: AddressPolicy,
}

impl Default for UrlPolicy {
    /// https to public addresses on the usual ports.
    fn default() -> Self {
        Self { allow_http: false, ports: vec![80..=80, 443..=443], addresses: AddressPolicy::default() }
    }
}

impl UrlPolicy {
    /// The default and this machine: what `ringback dev` uses while it listens on loopback only.
    #[must_use]
    pub fn development() -> Self {
        Self {
            addresses: AddressPolicy { allow_loopback: true, ..AddressPolicy::default() },
            ..Self::default()
        }
    }
}

/// Why a URL is refused. The texts name the setting that would allow it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Longer than [`MAX_URL_BYTES`].
    #[error("the URL has {0} bytes; at most {MAX_URL_BYTES} are allowed")]
    TooLong(usize),
    /// Spaces and control characters would be dropped silently by a lenient parser.
    #[error("the URL holds a space or a control character")]
    BadCharacter,
    /// Not an absolute URL.
    #[error("not an absolute URL: {0}")]
    Malformed(String),
    /// Neither https nor an allowed http.
    #[error("scheme {0} is not allowed: use https{hint}", hint = http_hint(.0))]
    Scheme(String),
    /// No host to dial.
    #[error("the URL has no host")]
    NoHost,
    /// A port outside the allowed ones.
    #[error("port {0} is not allowed (setting webhooks.allow_ports)")]
    Port(u16),
    /// A literal address, or the name `localhost`, in a denied range.
    #[error(
        "address {host} is not allowed: {range} (settings webhooks.allow_loopback, webhooks.allow_private)"
    )]
    Address {
        /// The host as the parser read it.
        host: String,
        /// The range it lies in.
        range: DeniedRange,
    },
}

fn http_hint(scheme: &str) -> &'static str {
    if scheme == "http" { " (setting webhooks.allow_http)" } else { "" }
}

/// Checks a URL from outside and gives it back parsed. The caller keeps the text as it was submitted and dials the
/// parsed form, whose literal addresses are normal (`http://0x7f.1/` is `127.0.0.1`).
///
/// # Errors
/// The first rule that the URL breaks.
pub fn check_url(text: &str, policy: &UrlPolicy) -> Result<Url, UrlError> {
    if text.len() > MAX_URL_BYTES {
        return Err(UrlError::TooLong(text.len()));
    }
    if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(UrlError::BadCharacter);
    }
    let url = Url::parse(text).map_err(|error| UrlError::Malformed(error.to_string()))?;
    if !matches!(url.scheme(), "https" | "http") {
        return Err(UrlError::Scheme(url.scheme().to_owned()));
    }
    if check_host(&url, policy)? == Place::Loopback {
        return Ok(url);
    }
    if url.scheme() == "http" && !policy.allow_http {
        return Err(UrlError::Scheme(url.scheme().to_owned()));
    }
    let port = url.port_or_known_default().unwrap_or(0);
    if !policy.ports.iter().any(|range| range.contains(&port)) {
        return Err(UrlError::Port(port));
    }
    Ok(url)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Loopback,
    Elsewhere,
}

fn check_host(url: &Url, policy: &UrlPolicy) -> Result<Place, UrlError> {
    let literal: IpAddr = match url.host() {
        None => return Err(UrlError::NoHost),
        Some(Host::Ipv4(ip)) => ip.into(),
        Some(Host::Ipv6(ip)) => ip.to_canonical(),
        Some(Host::Domain(name)) => {
            let name = name.strip_suffix('.').unwrap_or(name);
            if name.is_empty() {
                return Err(UrlError::NoHost);
            }
            if name != "localhost" && !name.ends_with(".localhost") {
                return Ok(Place::Elsewhere);
            }
            Ipv4Addr::LOCALHOST.into()
        }
    };
    policy.addresses.check(literal).map_err(|range| UrlError::Address {
        host: shown(url.host_str().unwrap_or_default(), literal),
        range,
    })?;
    let opened = policy.addresses.allow_loopback && literal.is_loopback();
    Ok(if opened { Place::Loopback } else { Place::Elsewhere })
}

/// The host as it was read, and the address that it means where that is not plain to see.
fn shown(host: &str, literal: IpAddr) -> String {
    let literal = literal.to_string();
    if host.trim_matches(['[', ']']) == literal { literal } else { format!("{host} ({literal})") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> UrlError {
        check_url(text, &UrlPolicy::default()).expect_err(text)
    }

    #[test]
    fn public_https_is_accepted() {
        for text in [
            "https://hooks.example.com/a?b=c",
            "https://user:pw@hooks.example.com:443/",
            "https://8.8.8.8/x",
            "https://[2606:4700::1111]/x",
            "https://localhost.example.com/",
        ] {
            assert!(check_url(text, &UrlPolicy::default()).is_ok(), "{text}");
        }
    }

    #[test]
    fn every_spelling_of_a_private_address_is_refused() {
        for text in [
            "https://127.0.0.1/",
            "https://2130706433/",
            "https://0x7f.1/",
            "https://0177.0.0.1/",
            "https://127.1/",
            "https://[::1]/",
            "https://[::ffff:127.0.0.1]/",
            "https://[::ffff:a9fe:a9fe]/",
            "https://[64:ff9b::a9fe:a9fe]/",
            "https://169.254.169.254/latest/meta-data",
            "https://10.0.0.1:8443/",
            "https://localhost/",
            "https://LOCALHOST./",
            "https://a.localhost/",
            "https://①②⑦.0.0.1/",
        ] {
            assert!(matches!(refused(text), UrlError::Address { .. }), "{text}: {:?}", refused(text));
        }
    }

    #[test]
    fn each_rule_has_its_error() {
        assert_eq!(refused("http://example.com/"), UrlError::Scheme("http".into()));
        assert!(refused("http://example.com/").to_string().contains("webhooks.allow_http"));
        assert_eq!(refused("ftp://example.com/"), UrlError::Scheme("ftp".into()));
        assert_eq!(refused("file:///etc/passwd"), UrlError::Scheme("file".into()));
        assert_eq!(refused("https://example.com:22/"), UrlError::Port(22));
        assert!(refused("https://example.com:8443/").to_string().contains("webhooks.allow_ports"));
        assert!(matches!(refused("/hook"), UrlError::Malformed(_)));
        assert!(matches!(refused(""), UrlError::Malformed(_)));
        assert!(matches!(refused("https://"), UrlError::Malformed(_)));
        assert_eq!(refused("https://exa\nmple.com/"), UrlError::BadCharacter);
        assert_eq!(refused("https://example.com/\0"), UrlError::BadCharacter);
        assert_eq!(refused(" https://example.com/"), UrlError::BadCharacter);
        let long = format!("https://example.com/{}", "a".repeat(2048));
        assert_eq!(refused(&long), UrlError::TooLong(long.len()));
        assert!(refused("https://10.0.0.1/").to_string().contains("webhooks.allow_private"));
        assert!(refused("https://10.0.0.1/").to_string().contains("address 10.0.0.1 is"));
        assert!(
            refused("https://[::ffff:192.168.0.1]/").to_string().contains("[::ffff:c0a8:1] (192.168.0.1)")
        );
    }

    #[test]
    fn development_reaches_this_machine_and_no_other() {
        let policy = UrlPolicy::development();
        for text in ["http://127.0.0.1:3000/hook", "http://localhost:80/", "http://[::1]:9/"] {
            assert!(check_url(text, &policy).is_ok(), "{text}");
        }
        for text in ["http://10.0.0.1/", "http://169.254.169.254/", "http://0.0.0.0:3000/"] {
            assert!(matches!(check_url(text, &policy), Err(UrlError::Address { .. })), "{text}");
        }
        // What is open for this machine is not open for others.
        assert_eq!(check_url("http://example.com/", &policy), Err(UrlError::Scheme("http".into())));
        assert_eq!(check_url("https://example.com:3000/", &policy), Err(UrlError::Port(3000)));
    }
}
