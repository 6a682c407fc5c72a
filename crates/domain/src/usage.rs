//! Quotas of projects: how much may be used per period, and when somebody is warned.

use serde::{Deserialize, Serialize};

use crate::time::{TimestampMs, days_from_civil};

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Metric {
    /// Jobs that were accepted.
    Jobs,
    /// Tokens that completions read and wrote.
    Tokens,
}

impl Metric {
    /// Every metric.
    pub const ALL: [Self; 2] = [Self::Jobs, Self::Tokens];

    /// The word in SQL, events and views.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Jobs => "jobs",
            Self::Tokens => "tokens",
        }
    }
}

/// After which time counting begins anew, in UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Period {
    /// Each full hour.
    Hour,
    /// Midnight.
    Day,
    /// The first of the month.
    #[default]
    Month,
}

impl Period {
    /// The word in SQL, events and views.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hour => "hour",
            Self::Day => "day",
            Self::Month => "month",
        }
    }

    /// Reads [`Self::as_str`] back.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Hour, Self::Day, Self::Month].into_iter().find(|p| p.as_str() == word)
    }

    /// When the period of a moment began, and when the next one begins.
    #[must_use]
    pub fn around(self, now: TimestampMs) -> (TimestampMs, TimestampMs) {
        const DAY_MS: i64 = 86_400_000;
        let even = |length: i64| {
            let start = now.0.div_euclid(length) * length;
            (TimestampMs(start), TimestampMs(start + length))
        };
        match self {
            Self::Hour => even(3_600_000),
            Self::Day => even(DAY_MS),
            Self::Month => {
                let (year, month) = now.year_month();
                let next = if month == 12 { (year + 1, 1) } else { (year, month + 1) };
                let first = |(year, month)| TimestampMs(days_from_civil(year, month, 1) * DAY_MS);
                (first((year, month)), first(next))
            }
        }
    }
}

/// What a project may use per period; `None` = no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// How long counting goes on.
    pub period: Period,
    /// Jobs.
    pub jobs: Option<u64>,
    /// Tokens.
    pub tokens: Option<u64>,
}

impl Quota {
    /// The limit of a metric.
    #[must_use]
    pub const fn limit(&self, metric: Metric) -> Option<u64> {
        match metric {
            Metric::Jobs => self.jobs,
            Metric::Tokens => self.tokens,
        }
    }
}

/// At which parts of a limit somebody is warned, in percent, with their bits in `usage_counters.told`.
pub const WARNINGS: [(u64, i64); 2] = [(80, 1), (95, 2)];
/// The bit that says that the limit was met.
pub const EXCEEDED: i64 = 4;

/// The warnings that are due now that `used` of `limit` is used, of those that `told` does not name: the highest one,
/// and what is told from now on. Two thresholds passed at once are one warning.
#[must_use]
pub fn warning(used: u64, limit: u64, told: i64) -> Option<(u64, i64)> {
    let due = |percent: u64| u128::from(used) * 100 >= u128::from(limit) * u128::from(percent);
    let passed = WARNINGS.iter().filter(|(percent, _)| due(*percent));
    let bits = passed.clone().fold(told, |bits, (_, bit)| bits | bit);
    let fresh = passed.filter(|(_, bit)| told & bit == 0).map(|(percent, _)| *percent).max()?;
    Some((fresh, bits))
}

/// `used` of `limit` in percent, with two places.
#[must_use]
pub fn percentage(used: u64, limit: u64) -> f64 {
    if limit == 0 {
        return 100.0;
    }
    let hundredths = u128::from(used) * 10_000 / u128::from(limit);
    u32::try_from(hundredths).map_or(f64::from(u32::MAX), f64::from) / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> TimestampMs {
        TimestampMs::parse_rfc3339(text).unwrap()
    }

    #[test]
    fn periods_begin_where_the_calendar_says() {
        for (period, now, start, end) in [
            (Period::Hour, "2026-11-21T13:59:59.999Z", "2026-11-21T13:00:00Z", "2026-11-21T14:00:00Z"),
            (Period::Day, "2026-11-21T00:00:00Z", "2026-11-21", "2026-11-22"),
            (Period::Month, "2026-11-30T23:59:59Z", "2026-11-01", "2026-12-01"),
            (Period::Month, "2026-12-01T00:00:00Z", "2026-12-01", "2027-01-01"),
            (Period::Month, "2028-02-29T12:00:00Z", "2028-02-01", "2028-03-01"),
        ] {
            assert_eq!(period.around(at(now)), (at(start), at(end)), "{period:?} {now}");
            assert_eq!(Period::parse(period.as_str()), Some(period));
        }
    }

    #[test]
    fn each_threshold_is_told_once() {
        assert_eq!(warning(79, 100, 0), None);
        assert_eq!(warning(80, 100, 0), Some((80, 1)));
        assert_eq!(warning(94, 100, 1), None);
        assert_eq!(warning(95, 100, 1), Some((95, 3)));
        assert_eq!(warning(100, 100, 3), None);
        assert_eq!(warning(100, 100, 0), Some((95, 3)));
        // 80 % of 3 is 2.4.
        assert_eq!((warning(2, 3, 0), warning(3, 3, 0)), (None, Some((95, 3))));
        assert_eq!(warning(u64::MAX, u64::MAX, 0), Some((95, 3)));
    }

    #[test]
    fn percentages_have_two_places() {
        assert!((percentage(1, 3) - 33.33).abs() < 1e-9);
        assert!((percentage(200, 100) - 200.0).abs() < 1e-9);
        assert!((percentage(0, 0) - 100.0).abs() < 1e-9);
    }
}
