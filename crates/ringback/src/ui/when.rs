//! Times as people read them.

/// Milliseconds as a short text: `8 ms`, `1.24 s`, `3 m 05 s`, `2 h 10 m`, `4 d 3 h`.
pub(crate) fn duration_ms(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{}.{:02} s", ms / 1000, ms % 1000 / 10),
        60_000..3_600_000 => format!("{} m {:02} s", ms / 60_000, ms % 60_000 / 1000),
        3_600_000..86_400_000 => format!("{} h {:02} m", ms / 3_600_000, ms % 3_600_000 / 60_000),
        _ => format!("{} d {} h", ms / 86_400_000, ms % 86_400_000 / 3_600_000),
    }
}

/// Time since an RFC 3339 moment, for lists: `12 s`, `5 m`, `3 h`, `2 d`. Empty if it cannot be read.
pub(crate) fn age(at: &str, now_ms: i64) -> String {
    let Some(at_ms) = parse_rfc3339_ms(at) else { return String::new() };
    let s = (now_ms - at_ms).max(0) / 1000;
    match s {
        0..120 => format!("{s} s"),
        120..7_200 => format!("{} m", s / 60),
        7_200..172_800 => format!("{} h", s / 3600),
        _ => format!("{} d", s / 86_400),
    }
}

/// The clock time of an RFC 3339 UTC moment, with milliseconds: `09:30:01.123`.
pub(crate) fn clock(at: &str) -> String {
    at.get(11..).map_or_else(|| at.to_owned(), |time| time.trim_end_matches('Z').to_owned())
}

/// The UTC clock time of Unix milliseconds: `09:30:01.123`.
pub(crate) fn clock_ms(at_ms: i64) -> String {
    let of_day = at_ms.rem_euclid(86_400_000);
    let (h, m, s, ms) = (of_day / 3_600_000, of_day / 60_000 % 60, of_day / 1000 % 60, of_day % 1000);
    format!("{h:02}:{m:02}:{s:02}.{ms:03}")
}

/// Reads what the API writes: `2026-11-21T09:30:01.123Z`, in UTC.
pub(crate) fn parse_rfc3339_ms(text: &str) -> Option<i64> {
    let number = |range: std::ops::Range<usize>| text.get(range)?.parse::<i64>().ok();
    let bytes = text.as_bytes();
    if bytes.len() < 20 || bytes[4] != b'-' || bytes[10] != b'T' || *bytes.last()? != b'Z' {
        return None;
    }
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (h, m, s) = (number(11..13)?, number(14..16)?, number(17..19)?);
    let ms = if bytes[19] == b'.' { number(20..23)? } else { 0 };
    // Days since 1970 of the proleptic Gregorian calendar, counted in years that begin in March.
    let (y, mo) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let era = y.div_euclid(400);
    let of_era = y.rem_euclid(400);
    let days =
        era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + (153 * mo + 2) / 5 + day - 1 - 719_468;
    Some(((days * 24 + h) * 60 + m) * 60_000 + s * 1000 + ms)
}

/// Reads a time span: `500ms`, `90` or `90s`, `5m`, `2h`, `1d`. A bare number is seconds. Gives milliseconds.
///
/// # Errors
/// The text is something else, or 0.
pub(crate) fn parse_span_ms(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no time span; write for example 90s, 5m, 2h or 500ms");
    let text_trimmed = text.trim();
    let digits = text_trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text_trimmed.len());
    let (number, unit) = text_trimmed.split_at(digits);
    let unit_ms = match unit.trim() {
        "ms" => 1.0,
        "" | "s" => 1_000.0,
        "m" | "min" => 60_000.0,
        "h" => 3_600_000.0,
        "d" => 86_400_000.0,
        _ => return Err(wrong()),
    };
    let ms = number.parse::<f64>().map_err(|_| wrong())? * unit_ms;
    if !(1.0..=3.2e11).contains(&ms) {
        return Err(wrong());
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to lie in 1..3.2e11"
    )]
    let ms = ms.round() as u64;
    Ok(ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_read_back() {
        assert_eq!(parse_rfc3339_ms("1970-01-01T00:00:00.000Z"), Some(0));
        assert_eq!(parse_rfc3339_ms("2000-02-29T12:00:00.250Z"), Some(951_825_600_250));
        assert_eq!(parse_rfc3339_ms("2026-11-21T01:30:00Z"), Some(1_795_224_600_000));
        assert_eq!(parse_rfc3339_ms("yesterday"), None);
        assert_eq!(clock("2026-11-21T01:30:00.123Z"), "01:30:00.123");
        assert_eq!(clock_ms(951_825_600_250), "12:00:00.250");
        assert_eq!(age("1970-01-01T00:00:00.000Z", 119_000), "119 s");
        assert_eq!(age("1970-01-01T00:00:00.000Z", 120_000), "2 m");
    }

    #[test]
    fn spans() {
        for (text, ms) in [
            ("90", 90_000),
            ("90s", 90_000),
            ("500ms", 500),
            ("1.5m", 90_000),
            ("2h", 7_200_000),
            ("1d", 86_400_000),
        ] {
            assert_eq!(parse_span_ms(text), Ok(ms), "{text}");
        }
        for bad in ["", "0", "-1", "5y", "1e9999", "ten"] {
            assert!(parse_span_ms(bad).is_err(), "{bad}");
        }
        for (ms, text) in [
            (8, "8 ms"),
            (1_240, "1.24 s"),
            (185_000, "3 m 05 s"),
            (7_800_000, "2 h 10 m"),
            (356_400_000, "4 d 3 h"),
        ] {
            assert_eq!(duration_ms(ms), text);
        }
    }
}
