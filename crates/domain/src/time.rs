//! Points in time as the database tells them.

/// Milliseconds since the Unix epoch. Leases and limits are judged on the database's clock, so every value
/// that is compared with another comes from there or was clamped to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimestampMs(pub i64);

impl TimestampMs {
    /// This moment plus `ms`, saturating.
    #[must_use]
    pub const fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add_unsigned(ms))
    }

    /// Milliseconds from `earlier` to this moment; 0 where `earlier` is later.
    #[must_use]
    pub const fn since_ms(self, earlier: Self) -> u64 {
        if self.0 > earlier.0 { self.0.abs_diff(earlier.0) } else { 0 }
    }
}

impl TimestampMs {
    /// RFC 3339 in UTC with milliseconds: `2026-11-21T12:00:00.000Z`.
    #[must_use]
    pub fn rfc3339(self) -> String {
        let (days, ms) = (self.0.div_euclid(86_400_000), self.0.rem_euclid(86_400_000));
        let (year, month, day) = civil_from_days(days);
        let (s, ms) = (ms / 1_000, ms % 1_000);
        format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{ms:03}Z", s / 3_600, s / 60 % 60, s % 60)
    }

    /// Reads a date (`2026-12-31`, midnight in UTC) or an RFC 3339 moment with `Z` or an offset. Fractions of a second
    /// are dropped beyond milliseconds.
    #[must_use]
    pub fn parse_rfc3339(text: &str) -> Option<Self> {
        let number = |part: &str, digits: usize| -> Option<i64> {
            let plain = part.len() == digits && part.bytes().all(|b| b.is_ascii_digit());
            plain.then(|| part.parse().ok()).flatten()
        };
        let date = text.get(..10)?;
        let mut parts = date.split('-');
        let (year, month, day) =
            (number(parts.next()?, 4)?, number(parts.next()?, 2)?, number(parts.next()?, 2)?);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let days = match month {
            2 if leap => 29,
            2 => 28,
            4 | 6 | 9 | 11 => 30,
            1..=12 => 31,
            _ => return None,
        };
        if parts.next().is_some() || !(1..=days).contains(&day) {
            return None;
        }
        let midnight = days_from_civil(year, month, day) * 86_400_000;
        let Some(rest) = text.get(10..).filter(|rest| !rest.is_empty()) else { return Some(Self(midnight)) };
        let clock = rest.strip_prefix(['T', 't', ' '])?;
        let zone_at = clock.find(['Z', 'z', '+', '-'])?;
        let (clock, zone) = clock.split_at(zone_at);
        let (clock, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
        let mut parts = clock.split(':');
        let (h, m, s) = (number(parts.next()?, 2)?, number(parts.next()?, 2)?, number(parts.next()?, 2)?);
        if parts.next().is_some() || h > 23 || m > 59 || s > 60 || fraction.is_empty() {
            return None;
        }
        if !fraction.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let ms: i64 = format!("{fraction:0<3}").get(..3)?.parse().ok()?;
        let offset_min = match zone {
            "Z" | "z" => 0,
            _ => {
                let (sign, rest) = (if zone.starts_with('-') { -1 } else { 1 }, zone.get(1..)?);
                let (h, m) = rest.split_once(':')?;
                let (h, m) = (number(h, 2)?, number(m, 2)?);
                if h > 23 || m > 59 {
                    return None;
                }
                sign * (h * 60 + m)
            }
        };
        Some(Self(midnight + ((h * 60 + m - offset_min) * 60 + s) * 1_000 + ms))
    }

    /// Year and month of this moment in UTC.
    #[must_use]
    pub fn year_month(self) -> (i64, i64) {
        let (year, month, _) = civil_from_days(self.0.div_euclid(86_400_000));
        (year, month)
    }
}

/// Days since 1970-01-01 of a date, by Howard Hinnant's `days_from_civil`.
#[must_use]
pub const fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let from_march = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * from_march + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// The date of a day since 1970-01-01, by `civil_from_days`.
const fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let shifted = days.saturating_add(719_468);
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (year_of_era + era * 400 + if month <= 2 { 1 } else { 0 }, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_read_as_they_are_written() {
        for ms in [0, 951_782_400_000, 1_700_000_000_123, 4_102_444_799_999, -1, -62_135_596_800_000] {
            assert_eq!(TimestampMs::parse_rfc3339(&TimestampMs(ms).rfc3339()), Some(TimestampMs(ms)));
        }
        let read = |text| TimestampMs::parse_rfc3339(text).map(|t| t.0);
        assert_eq!(read("1970-01-02"), Some(86_400_000));
        assert_eq!(read("1970-01-01T01:00:00+01:00"), Some(0));
        assert_eq!(read("1969-12-31T23:59:59.5-00:30"), Some(1_799_500));
        for bad in [
            "",
            "2026",
            "2026-13-01",
            "2026-02-29",
            "2026-1-01",
            "2026-01-01T",
            "2026-01-01T10:00:00",
            "2026-01-01T24:00:00Z",
            "2026-01-01T10:00:00.Z",
            "2026-01-01T10:00Z",
            "tomorrow",
            "2026-01-01T10:00:00+1:00",
            "2026-01-0é",
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
        assert_eq!(TimestampMs(951_782_400_000).year_month(), (2000, 2));
    }

    #[test]
    fn moments_are_written_as_dates() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_700_000_000_123, "2023-11-14T22:13:20.123Z"),
            (4_102_444_799_999, "2099-12-31T23:59:59.999Z"),
            (-1, "1969-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(TimestampMs(ms).rfc3339(), text);
        }
    }
}
