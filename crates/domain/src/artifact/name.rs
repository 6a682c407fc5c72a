//! File names from outside, made harmless.

/// Most bytes of a kept name; file systems take 255.
pub const MAX_NAME_BYTES: usize = 200;

/// A file name from anything a handler wrote: the last component of a path of either system, without control
/// characters, separators and quotes, not hidden, not empty, of bounded length.
#[must_use]
pub fn file_name(from: &str) -> String {
    let last = from.rsplit(['/', '\\']).next().unwrap_or_default();
    let mut name: String = last
        .chars()
        .map(|c| {
            let bad = c.is_control()
                || matches!(c, '"' | '<' | '>' | ':' | '|' | '?' | '*' | '\u{2028}' | '\u{2029}')
                // Marks that turn the direction of writing show another name than is stored.
                || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
            if bad { '_' } else { c }
        })
        .collect();
    // Dots and spaces in any mixture: a dot behind a space would hide the name once the space is gone.
    name = name.trim_matches(|c: char| c == '.' || c.is_whitespace()).to_owned();
    if name.len() > MAX_NAME_BYTES {
        name = shortened(&name);
    }
    if name.is_empty() { "file".to_owned() } else { name }
}

/// Cut in the middle, so that the extension stays.
fn shortened(name: &str) -> String {
    let extension = name.rsplit_once('.').map(|(_, e)| e).filter(|e| e.len() <= 16);
    let room = MAX_NAME_BYTES - extension.map_or(0, |e| e.len() + 1);
    let cut = (0..=room).rev().find(|&n| name.is_char_boundary(n)).unwrap_or(0);
    let stem = name[..cut].trim_end_matches('.');
    extension.map_or_else(|| stem.to_owned(), |e| format!("{stem}.{e}"))
}

/// The name as one segment of a URL.
#[must_use]
pub fn url_segment(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    if name == "confirm" {
        // The last segment `confirm` is where the receipt is told.
        out.push('_');
    }
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push_str(&super::hex(&[byte]).to_ascii_uppercase());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_cannot_lead_anywhere() {
        for (from, to) in [
            ("test.wav", "test.wav"),
            ("../../etc/passwd", "passwd"),
            ("..\\..\\boot.ini", "boot.ini"),
            ("/abs/олень.png", "олень.png"),
            ("..", "file"),
            (".", "file"),
            ("", "file"),
            ("a/", "file"),
            (".bashrc", "bashrc"),
            ("a\r\nSet-Cookie: x", "a__Set-Cookie_ x"),
            ("a\0b", "a_b"),
            ("evil\u{202e}gpj.exe", "evil_gpj.exe"),
            ("x\"; filename=\"y", "x_; filename=_y"),
            ("name. ", "name"),
            (". .x", "x"),
        ] {
            assert_eq!(file_name(from), to, "{from:?}");
        }
        let long = file_name(&format!("{}.flac", "ü".repeat(300)));
        assert!(long.len() <= MAX_NAME_BYTES && long.ends_with(".flac"), "{long}");
    }

    proptest! {
        #[test]
        fn any_name_is_one_plain_component(from in ".*") {
            let name = file_name(&from);
            prop_assert!(!name.is_empty() && name.len() <= MAX_NAME_BYTES);
            prop_assert!(!name.contains(['/', '\\', '\0', '"', '\r', '\n']) && name != "." && name != "..");
            prop_assert!(!name.starts_with('.'));
            // Doing it again changes nothing.
            prop_assert_eq!(file_name(&name), name.clone());
            let segment = url_segment(&name);
            prop_assert!(segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.~%".contains(&b)));
        }
    }
}
