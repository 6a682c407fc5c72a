//! What a receiver's answer, or the lack of one, means for a delivery.
//!
//! Rules: reference/webhooks.md sections 1 and 7. Success is 2xx, a redirect is a failure and is never followed,
//! 410 ends the target, 429 and 503 may name a wait. Faults of DNS, TLS or the address stay on the ladder,
//! because they are often mended by the owner, with their reason shown.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::schedule::SlowDown;

/// How the owner of a target wants answers to be read and tries to be spaced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// Any 2xx is success; the long ladder.
    #[default]
    #[serde(alias = "default")]
    Standard,
    /// Exactly as RunPod documents it: only 200 is success, three tries ten seconds apart.
    RunpodStrict,
}

impl Profile {
    /// The name used in the configuration and in SQL.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::RunpodStrict => "runpod-strict",
        }
    }

    /// Reads [`Profile::as_str`] back; an unknown name is `None`.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "standard" | "default" => Some(Self::Standard),
            "runpod-strict" => Some(Self::RunpodStrict),
            _ => None,
        }
    }
}

/// Why no answer came. Every one of them is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TransportFault {
    /// The name has no address, or the resolver failed.
    Dns,
    /// The handshake failed: certificate, name or protocol.
    Tls,
    /// Every address of the name lies in a denied range.
    Blocked,
    /// No connection: refused, unreachable.
    Connect,
    /// The deadline for connect, headers and body passed.
    Timeout,
    /// The connection ended before an answer.
    Closed,
    /// The answer was not HTTP, or broke its rules.
    Protocol,
    /// The URL cannot be dialled at all (it no longer fits the rules of the operator).
    Url,
    /// The body of the delivery could not be read on our side.
    Body,
}

/// The reason that is stored with a failed try: one word for machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// An answer outside 2xx (or other than 200 under `runpod-strict`).
    Status(u16),
    /// An answer 3xx.
    Redirect(u16),
    /// An answer 410.
    Gone,
    /// No answer.
    Transport(TransportFault),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(code) => write!(f, "http_{code}"),
            Self::Redirect(code) => write!(f, "redirect_{code}_not_followed"),
            Self::Gone => f.write_str("gone_410"),
            Self::Transport(fault) => f.write_str(match fault {
                TransportFault::Dns => "dns",
                TransportFault::Tls => "tls",
                TransportFault::Blocked => "blocked_address",
                TransportFault::Connect => "connect",
                TransportFault::Timeout => "timeout",
                TransportFault::Closed => "connection_closed",
                TransportFault::Protocol => "not_http",
                TransportFault::Url => "url_not_allowed",
                TransportFault::Body => "body_unavailable",
            }),
        }
    }
}

/// What a try means for its delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The receiver has it.
    Delivered,
    /// Try again when the schedule says so.
    Retry(Reason, SlowDown),
    /// Never try this target again.
    Dead(Reason),
}

/// Judges an answer. `retry_after` is the raw header, `now_s` the unix time its dates are compared with.
#[must_use]
pub fn judge_status(profile: Profile, status: u16, retry_after: Option<&str>, now_s: u64) -> Verdict {
    let success = match profile {
        Profile::Standard => (200..300).contains(&status),
        Profile::RunpodStrict => status == 200,
    };
    match status {
        _ if success => Verdict::Delivered,
        410 => Verdict::Dead(Reason::Gone),
        300..=399 => Verdict::Retry(Reason::Redirect(status), SlowDown::No),
        429 | 503 => {
            let wish = retry_after
                .and_then(|value| parse_retry_after(value, now_s))
                .map_or(if status == 429 { SlowDown::Unnamed } else { SlowDown::No }, SlowDown::For);
            Verdict::Retry(Reason::Status(status), wish)
        }
        _ => Verdict::Retry(Reason::Status(status), SlowDown::No),
    }
}

/// Judges a try without an answer.
#[must_use]
pub fn judge_fault(fault: TransportFault) -> Verdict {
    Verdict::Retry(Reason::Transport(fault), SlowDown::No)
}

/// Reads `Retry-After` (RFC 9110 section 10.2.3): seconds, or a date in the preferred form. The answer is in ms
/// from `now_s`; a date in the past is 0; what cannot be read is `None`.
#[must_use]
pub fn parse_retry_after(value: &str, now_s: u64) -> Option<u64> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) {
        return Some(value.parse::<u64>().unwrap_or(u64::MAX).saturating_mul(1000));
    }
    parse_http_date(value).map(|at_s| at_s.saturating_sub(now_s).saturating_mul(1000))
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` as unix seconds.
fn parse_http_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (_weekday, rest) = text.split_once(", ")?;
    let mut words = rest.split(' ');
    let (day, month, year, time, zone) =
        (words.next()?, words.next()?, words.next()?, words.next()?, words.next()?);
    if zone != "GMT" || words.next().is_some() {
        return None;
    }
    let day: u64 = day.parse().ok().filter(|d| (1..=31).contains(d))?;
    let month = u64::try_from(MONTHS.iter().position(|m| *m == month)?).ok()? + 1;
    let year: u64 = year.parse().ok().filter(|y| (1970..=9999).contains(y))?;
    let mut clock = time.split(':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    if clock.next().is_some() || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    Some(days_since_epoch(year, month, day) * 86_400 + hour * 3_600 + minute * 60 + second)
}

/// Days from 1970-01-01 to a date of the Gregorian calendar (years counted from March, so that the leap day is last).
fn days_since_epoch(year: u64, month: u64, day: u64) -> u64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year / 400, year % 400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(status: u16) -> Verdict {
        judge_status(Profile::Standard, status, None, 0)
    }

    #[test]
    fn any_2xx_is_success_unless_strict() {
        for status in [200, 201, 202, 204, 299] {
            assert_eq!(judge(status), Verdict::Delivered);
        }
        assert_eq!(judge_status(Profile::RunpodStrict, 200, None, 0), Verdict::Delivered);
        assert_eq!(
            judge_status(Profile::RunpodStrict, 202, None, 0),
            Verdict::Retry(Reason::Status(202), SlowDown::No)
        );
    }

    #[test]
    fn redirects_fail_and_gone_is_the_end() {
        for status in [301, 302, 303, 307, 308] {
            assert_eq!(judge(status), Verdict::Retry(Reason::Redirect(status), SlowDown::No));
        }
        assert_eq!(judge(410), Verdict::Dead(Reason::Gone));
    }

    #[test]
    fn plain_failures_are_retried() {
        for status in [100, 400, 401, 404, 418, 500, 502, 504, 599] {
            assert_eq!(judge(status), Verdict::Retry(Reason::Status(status), SlowDown::No));
        }
    }

    #[test]
    fn retry_after_counts_for_429_and_503_only() {
        let ask = |status| judge_status(Profile::Standard, status, Some("120"), 0);
        assert_eq!(ask(429), Verdict::Retry(Reason::Status(429), SlowDown::For(120_000)));
        assert_eq!(ask(503), Verdict::Retry(Reason::Status(503), SlowDown::For(120_000)));
        assert_eq!(ask(500), Verdict::Retry(Reason::Status(500), SlowDown::No));
        assert_eq!(judge(429), Verdict::Retry(Reason::Status(429), SlowDown::Unnamed));
        assert_eq!(judge(503), Verdict::Retry(Reason::Status(503), SlowDown::No));
    }

    #[test]
    fn retry_after_reads_seconds_and_dates() {
        assert_eq!(parse_retry_after(" 7 ", 0), Some(7_000));
        assert_eq!(parse_retry_after("99999999999999999999999", 0), Some(u64::MAX));
        assert_eq!(parse_retry_after("Sun, 06 Nov 1994 08:49:37 GMT", 784_111_777 - 90), Some(90_000));
        assert_eq!(parse_retry_after("Sun, 06 Nov 1994 08:49:37 GMT", 784_111_777 + 90), Some(0));
        assert_eq!(parse_retry_after("Thu, 29 Feb 2024 00:00:00 GMT", 1_709_164_800 - 1), Some(1_000));
        for bad in ["", "-1", "1.5", "soon", "Sun, 06 Nov 1994 08:49:37 CET", "Sun, 32 Nov 1994 08:49:37 GMT"]
        {
            assert_eq!(parse_retry_after(bad, 0), None, "{bad}");
        }
    }

    #[test]
    fn profiles_have_one_name() {
        for profile in [Profile::Standard, Profile::RunpodStrict] {
            assert_eq!(Profile::parse(profile.as_str()), Some(profile));
        }
        assert_eq!(Profile::parse("runpod"), None);
    }

    #[test]
    fn reasons_are_single_words() {
        for reason in [
            Reason::Status(500),
            Reason::Redirect(302),
            Reason::Gone,
            Reason::Transport(TransportFault::Blocked),
        ] {
            assert!(!reason.to_string().contains(' '), "{reason}");
        }
    }
}
