//! File names from outside, made harmless, and texts as parts of URLs.

/// Most bytes of a kept name; file systems take 255.
pub const MAX_NAME_BYTES: usize = 200;

/// Longest extension that is kept when a name is cut, with its dot.
const MAX_EXTENSION_BYTES: usize = 16;
/// What a name without any usable character becomes.
pub(super) const FALLBACK: &str = "file";

/// The name that an artefact is shown and offered under, from anything a handler wrote: the last component of a path of
/// either system, without control characters, separators and quotes, not hidden, not empty, of bounded length. Whoever
/// writes to a disk for others takes a [`super::SafeName`], which knows fewer characters.
#[must_use]
pub fn file_name(from: &str) -> String {
    let name: String = last_part(from)
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
    let name = cut(name.trim_matches(is_margin), MAX_NAME_BYTES);
    if name.is_empty() { FALLBACK.to_owned() } else { name }
}

fn is_margin(c: char) -> bool {
    c == '.' || c.is_whitespace()
}

/// The last component of a path of either system that says anything.
pub(super) fn last_part(path: &str) -> &str {
    path.rsplit(['/', '\\']).find(|part| !part.trim_matches(is_margin).is_empty()).unwrap_or_default()
}

/// Stem and extension with its dot; the extension is empty if there is none worth keeping.
pub(super) fn split(name: &str) -> (&str, &str) {
    match name.rfind('.') {
        Some(at) if at > 0 && name.len() - at <= MAX_EXTENSION_BYTES => name.split_at(at),
        _ => (name, ""),
    }
}

/// The same name with a number before the extension, for when it is taken: `a.wav` becomes `a-2.wav`.
#[must_use]
pub fn numbered(name: &str, number: u32) -> String {
    let (stem, extension) = split(name);
    format!("{stem}-{number}{extension}")
}

/// Cut before the extension, which stays.
pub(super) fn cut(name: &str, room: usize) -> String {
    if name.len() <= room {
        return name.to_owned();
    }
    let (stem, extension) = split(name);
    let mut end = room - extension.len();
    while !stem.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{extension}", stem[..end].trim_end_matches(is_margin))
}

/// The name as one segment of a URL.
#[must_use]
pub fn url_segment(name: &str) -> String {
    let segment = percent_encoded(name);
    // The last segment `confirm` is where the receipt is told.
    if segment == "confirm" { format!("_{segment}") } else { segment }
}

/// A text as one segment of a URL's path or one value of its query: all but letters, digits and `-_.~` of ASCII encoded.
#[must_use]
pub fn percent_encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            out.push(char::from(byte));
        } else {
            use std::fmt::Write as _;
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
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
            ("a/", "a"),
            ("a/ .. /", "a"),
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
        let gap = file_name(&format!("{} {}", "x".repeat(MAX_NAME_BYTES - 1), "y".repeat(99)));
        assert_eq!(file_name(&gap), gap, "a cut leaves no margin");
    }

    #[test]
    fn nothing_leaves_its_segment() {
        assert_eq!(percent_encoded("a-B_9.~"), "a-B_9.~");
        assert_eq!(percent_encoded("../x?y=&é"), "..%2Fx%3Fy%3D%26%C3%A9");
        assert_eq!((url_segment("confirm").as_str(), url_segment("x y").as_str()), ("_confirm", "x%20y"));
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
