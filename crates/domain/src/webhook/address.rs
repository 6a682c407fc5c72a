//! Which addresses may be dialled for a URL that came from outside.
//!
//! Everything that is not plain global unicast is denied by default. The ranges are the special-purpose
//! registries of IANA plus the list of reference/webhooks.md section 6. An operator opens a range by naming a
//! network that lies wholly inside it, so that one careless `0.0.0.0/0` opens nothing.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Why an address is refused: the range it lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeniedRange {
    /// The network in CIDR notation.
    pub network: &'static str,
    /// What the network is for.
    pub purpose: &'static str,
}

impl fmt::Display for DeniedRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.purpose, self.network)
    }
}

/// The addresses an operator has opened beyond the public ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AddressPolicy {
    /// Opens `127.0.0.0/8` and `::1`.
    pub allow_loopback: bool,
    /// Opens these networks, each of which must lie inside one denied range ([`AddressPolicy::check_entry`]).
    pub allow_private: Vec<IpNet>,
}

struct V4Range(u32, u8, DeniedRange);
struct V6Range(u128, u8, DeniedRange);

const fn v4(a: u8, b: u8, c: u8, d: u8, len: u8, network: &'static str, purpose: &'static str) -> V4Range {
    V4Range(u32::from_be_bytes([a, b, c, d]), len, DeniedRange { network, purpose })
}

const fn v6(base: u128, len: u8, network: &'static str, purpose: &'static str) -> V6Range {
    V6Range(base, len, DeniedRange { network, purpose })
}

const DENIED_V4: &[V4Range] = &[
    v4(0, 0, 0, 0, 8, "0.0.0.0/8", "this network"),
    v4(10, 0, 0, 0, 8, "10.0.0.0/8", "private"),
    v4(100, 64, 0, 0, 10, "100.64.0.0/10", "carrier-grade NAT"),
    v4(127, 0, 0, 0, 8, "127.0.0.0/8", "loopback"),
    v4(169, 254, 0, 0, 16, "169.254.0.0/16", "link-local, cloud metadata"),
    v4(172, 16, 0, 0, 12, "172.16.0.0/12", "private"),
    v4(192, 0, 0, 0, 24, "192.0.0.0/24", "protocol assignments"),
    v4(192, 0, 2, 0, 24, "192.0.2.0/24", "documentation"),
    v4(192, 88, 99, 0, 24, "192.88.99.0/24", "6to4 relay"),
    v4(192, 168, 0, 0, 16, "192.168.0.0/16", "private"),
    v4(198, 18, 0, 0, 15, "198.18.0.0/15", "benchmarks"),
    v4(198, 51, 100, 0, 24, "198.51.100.0/24", "documentation"),
    v4(203, 0, 113, 0, 24, "203.0.113.0/24", "documentation"),
    v4(224, 0, 0, 0, 4, "224.0.0.0/4", "multicast"),
    v4(255, 255, 255, 255, 32, "255.255.255.255/32", "broadcast"),
    v4(240, 0, 0, 0, 4, "240.0.0.0/4", "reserved"),
];

const DENIED_V6: &[V6Range] = &[
    v6(0, 128, "::/128", "unspecified"),
    v6(1, 128, "::1/128", "loopback"),
    v6(0, 96, "::/96", "v4-compatible"),
    v6(0x0064_ff9b << 96, 96, "64:ff9b::/96", "NAT64"),
    v6(0x0064_ff9b_0001 << 80, 48, "64:ff9b:1::/48", "local NAT64"),
    v6(0x0100 << 112, 64, "100::/64", "discard"),
    v6(0x2001 << 112, 23, "2001::/23", "protocol assignments, Teredo, benchmarks"),
    v6(0x2001_0db8 << 96, 32, "2001:db8::/32", "documentation"),
    v6(0x2002 << 112, 16, "2002::/16", "6to4"),
    v6(0x3fff << 112, 20, "3fff::/20", "documentation"),
    v6(0x5f00 << 112, 16, "5f00::/16", "SRv6"),
    v6(0xfc00 << 112, 7, "fc00::/7", "unique local"),
    v6(0xfe80 << 112, 10, "fe80::/10", "link-local"),
    v6(0xfec0 << 112, 10, "fec0::/10", "site-local"),
    v6(0xff00 << 112, 8, "ff00::/8", "multicast"),
];

const NOT_GLOBAL_V6: DeniedRange = DeniedRange { network: "outside 2000::/3", purpose: "not global unicast" };

/// The denied range that `ip` lies in, or `None` for a public address. v4 addresses mapped into v6
/// (`::ffff:0:0/96`) are judged as the v4 address they stand for.
#[must_use]
pub fn denied_range(ip: IpAddr) -> Option<DeniedRange> {
    match canonical(ip) {
        IpAddr::V4(ip) => denied_v4(ip),
        IpAddr::V6(ip) => denied_v6(ip),
    }
}

fn denied_v4(ip: Ipv4Addr) -> Option<DeniedRange> {
    let bits = u32::from(ip);
    DENIED_V4.iter().find(|V4Range(base, len, _)| (bits ^ base) >> (32 - u32::from(*len)) == 0).map(|r| r.2)
}

fn denied_v6(ip: Ipv6Addr) -> Option<DeniedRange> {
    let bits = u128::from(ip);
    let listed = DENIED_V6.iter().find(|V6Range(base, len, _)| (bits ^ base) >> (128 - u32::from(*len)) == 0);
    match listed {
        Some(range) => Some(range.2),
        None if bits >> 125 != 0b001 => Some(NOT_GLOBAL_V6),
        None => None,
    }
}

fn canonical(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(ip, IpAddr::V4),
        IpAddr::V4(_) => ip,
    }
}

impl AddressPolicy {
    /// Says whether `ip` may be dialled.
    ///
    /// # Errors
    /// The denied range that it lies in, if no allowance of the operator covers it.
    pub fn check(&self, ip: IpAddr) -> Result<(), DeniedRange> {
        let ip = canonical(ip);
        let Some(range) = denied_range(ip) else { return Ok(()) };
        if self.allow_loopback && ip.is_loopback() {
            return Ok(());
        }
        let opened = self.allow_private.iter().any(|net| net.contains(&ip) && Self::check_entry(net).is_ok());
        if opened { Ok(()) } else { Err(range) }
    }

    /// Says whether an entry of [`AddressPolicy::allow_private`] opens anything: it must lie wholly inside one
    /// denied range. Call it when the configuration is read.
    ///
    /// # Errors
    /// A text that names the entry.
    pub fn check_entry(entry: &IpNet) -> Result<(), String> {
        let first = denied_range(entry.network());
        let inside = first.is_some_and(|range| {
            range.network.parse::<IpNet>().map_or(range == NOT_GLOBAL_V6, |net| net.contains(entry))
        });
        if inside {
            Ok(())
        } else {
            Err(format!(
                "{entry} does not lie inside one special-purpose range; name the private networks one by one, \
                 for example 10.0.0.0/8"
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_table_agrees_with_its_own_names() {
        for V4Range(base, len, range) in DENIED_V4 {
            let net: IpNet = range.network.parse().unwrap();
            assert_eq!(net, IpNet::new(Ipv4Addr::from(*base).into(), *len).unwrap(), "{range}");
        }
        for V6Range(base, len, range) in DENIED_V6 {
            let net: IpNet = range.network.parse().unwrap();
            assert_eq!(net, IpNet::new(Ipv6Addr::from(*base).into(), *len).unwrap(), "{range}");
        }
    }

    #[test]
    fn every_special_range_of_the_reference_is_denied() {
        for text in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "100.64.0.1",
            "100.127.255.255",
            "192.0.0.8",
            "192.88.99.1",
            "192.0.2.1",
            "198.51.100.7",
            "203.0.113.9",
            "198.18.0.1",
            "198.19.255.255",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fc00::1",
            "fdff::1",
            "fe80::1",
            "ff02::1",
            "100::1",
            "2001:db8::1",
            "3fff::1",
            "2002:7f00:1::",
            "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::1",
            "5f00::1",
            "2001::1",
            "2001:0:4136:e378::1",
            "fec0::1",
            "::7f00:1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:10.1.2.3",
            "4000::1",
            "8000::1",
            "1::1",
        ] {
            assert!(denied_range(ip(text)).is_some(), "{text} must be denied");
            assert!(AddressPolicy::default().check(ip(text)).is_err(), "{text} must be denied");
        }
    }

    #[test]
    fn public_addresses_pass() {
        for text in ["1.1.1.1", "8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1"] {
            assert_eq!(AddressPolicy::default().check(ip(text)), Ok(()), "{text}");
        }
        assert_eq!(AddressPolicy::default().check(ip("::ffff:8.8.8.8")), Ok(()));
    }

    #[test]
    fn loopback_opens_loopback_only() {
        let policy = AddressPolicy { allow_loopback: true, ..AddressPolicy::default() };
        for text in ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"] {
            assert_eq!(policy.check(ip(text)), Ok(()), "{text}");
        }
        for text in ["10.0.0.1", "169.254.169.254", "0.0.0.0", "::", "64:ff9b::7f00:1"] {
            assert!(policy.check(ip(text)).is_err(), "{text}");
        }
    }

    #[test]
    fn an_entry_opens_its_network_and_no_more() {
        let policy =
            AddressPolicy { allow_private: vec!["10.1.0.0/16".parse().unwrap()], ..AddressPolicy::default() };
        assert_eq!(policy.check(ip("10.1.2.3")), Ok(()));
        assert_eq!(policy.check(ip("::ffff:10.1.2.3")), Ok(()));
        assert!(policy.check(ip("10.2.0.1")).is_err());
    }

    #[test]
    fn a_network_wider_than_a_range_opens_nothing() {
        let wide = AddressPolicy {
            allow_private: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
            ..AddressPolicy::default()
        };
        for text in ["169.254.169.254", "10.0.0.1", "127.0.0.1", "::1", "fd00::1"] {
            assert!(wide.check(ip(text)).is_err(), "{text}");
        }
        for entry in ["0.0.0.0/0", "::/0", "8.8.8.0/24", "172.0.0.0/8"] {
            assert!(AddressPolicy::check_entry(&entry.parse().unwrap()).is_err(), "{entry}");
        }
        for entry in ["10.0.0.0/8", "192.168.4.0/24", "fd00::/8", "169.254.169.254/32"] {
            assert!(AddressPolicy::check_entry(&entry.parse().unwrap()).is_ok(), "{entry}");
        }
    }

    proptest! {
        #[test]
        fn a_mapped_address_is_judged_like_the_v4_address(bits in any::<u32>()) {
            let v4 = Ipv4Addr::from(bits);
            prop_assert_eq!(denied_range(v4.into()), denied_range(v4.to_ipv6_mapped().into()));
        }

        #[test]
        fn no_v6_address_that_hides_a_v4_one_passes(bits in any::<u32>()) {
            let low = u128::from(bits);
            for hidden in [low, (0x0064_ff9b_u128 << 96) | low, (0x2002_u128 << 112) | (low << 80)] {
                prop_assert!(denied_range(Ipv6Addr::from(hidden).into()).is_some());
            }
        }
    }
}
