//! File names that are safe on every file system: one plain component of a path, whatever came in (row B5).

use std::fmt;

use super::name::{FALLBACK, MAX_NAME_BYTES, cut, last_part, numbered};

/// Longest name with its number.
const MAX_NUMBERED_BYTES: usize = 255;
/// Devices on Windows, with any extension.
const RESERVED: [&str; 4] = ["CON", "PRN", "AUX", "NUL"];

/// A name that stays in its folder: letters and digits (of any script), `.`, `_`, `-`; never hidden, never empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SafeName(String);

impl SafeName {
    /// Makes a name out of anything: the last component of a path, every other character replaced by `_`.
    #[must_use]
    pub fn from_untrusted(given: &str) -> Self {
        let mapped: String = last_part(given).chars().map(allowed_or_underscore).collect();
        // A leading dot hides a file, a leading dash is an option; Windows drops dots at the end.
        let name = mapped.trim_start_matches(['.', '-']).trim_end_matches('.');
        let name = if name.is_empty() { FALLBACK } else { name };
        // Room for the underscore, so that a safe name stays as it is when it is named again.
        let reserved = is_reserved(name.split('.').next().unwrap_or_default());
        let name = cut(name, MAX_NAME_BYTES - usize::from(reserved));
        Self(if reserved { format!("_{name}") } else { name })
    }

    /// Takes a name only if it is already safe: what a file server looks up.
    #[must_use]
    pub fn exactly(given: &str) -> Option<Self> {
        let stem = given.split('.').next().unwrap_or_default();
        let safe = !given.is_empty()
            && given.len() <= MAX_NUMBERED_BYTES
            && given.chars().all(|c| allowed_or_underscore(c) == c)
            && !given.starts_with(['.', '-'])
            && !given.ends_with('.')
            && !is_reserved(stem);
        safe.then(|| Self(given.to_owned()))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The same name with a number, for when it is taken.
    #[must_use]
    pub fn numbered(&self, number: u32) -> Self {
        Self(numbered(&self.0, number))
    }
}

impl fmt::Display for SafeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn allowed_or_underscore(c: char) -> char {
    // Letters and digits of every script, but no marks, joiners, direction overrides, separators or look-alikes of dots
    // and slashes: none of those is alphanumeric.
    if c.is_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' }
}

fn is_reserved(stem: &str) -> bool {
    let upper = stem.to_ascii_uppercase();
    let numbered = ["COM", "LPT"].iter().any(|device| {
        upper.strip_prefix(device).is_some_and(|rest| rest.len() == 1 && rest.as_bytes()[0].is_ascii_digit())
    });
    numbered || RESERVED.contains(&upper.as_str())
}

#[cfg(test)]
mod tests {
    use std::path::{Component, Path};

    use proptest::prelude::*;

    use super::*;

    fn safe(given: &str) -> String {
        SafeName::from_untrusted(given).0
    }

    #[test]
    fn ordinary_names_stay() {
        for name in ["test.wav", "a-b_c.1.mp3", "日本語.wav", "Ärger.flac", "output", "a.b.c.tar.gz"] {
            assert_eq!(safe(name), name);
            assert!(SafeName::exactly(name).is_some());
        }
    }

    #[test]
    fn nothing_leads_out_of_the_folder() {
        for (given, expected) in [
            ("../../etc/passwd", "passwd"),
            ("/etc/shadow", "shadow"),
            ("..\\..\\windows\\system.ini", "system.ini"),
            ("C:\\temp\\x.wav", "x.wav"),
            ("..", "file"),
            (".", "file"),
            ("", "file"),
            ("///", "file"),
            ("a/..", "a"),
            ("....//....//x", "x"),
            ("..%2f..%2fetc%2fpasswd", "_2f.._2fetc_2fpasswd"),
            ("a\0.wav", "a_.wav"),
            ("test.wav\0.png", "test.wav_.png"),
            (".bashrc", "bashrc"),
            (".ringback-receiver", "ringback-receiver"),
            ("-rf", "rf"),
            ("x\n\r\t.wav", "x___.wav"),
            ("con", "_con"),
            ("NUL.wav", "_NUL.wav"),
            ("com1.txt", "_com1.txt"),
            ("lpt9", "_lpt9"),
            ("com10", "com10"),
            // Direction override, zero-width joiner, full-width slash, one-dot leader.
            ("a\u{202e}vaw.exe", "a_vaw.exe"),
            ("a\u{200d}b", "a_b"),
            ("..\u{ff0f}..\u{ff0f}x", "_.._x"),
            ("\u{2024}\u{2024}/x", "x"),
            ("name. ", "name._"),
            ("name...", "name"),
            ("a b:c*d?e\"f<g>h|i", "a_b_c_d_e_f_g_h_i"),
            ("$(rm -rf ~).wav", "__rm_-rf___.wav"),
        ] {
            assert_eq!(safe(given), expected, "{given:?}");
        }
    }

    #[test]
    fn a_long_name_keeps_its_extension() {
        let name = safe(&format!("{}.wav", "ü".repeat(300)));
        assert!(name.ends_with("ü.wav") && name.len() <= MAX_NAME_BYTES, "{name}");
        assert!(safe(&"x".repeat(5000)).len() <= MAX_NAME_BYTES);
        assert!(safe(&format!("x.{}", "y".repeat(5000))).len() <= MAX_NAME_BYTES);
    }

    #[test]
    fn a_number_goes_before_the_extension() {
        let name = |text: &str| SafeName::from_untrusted(text);
        assert_eq!(name("a.wav").numbered(2).as_str(), "a-2.wav");
        assert_eq!(name("a").numbered(3).as_str(), "a-3");
        assert_eq!(name("a.tar.gz").numbered(2).as_str(), "a.tar-2.gz");
    }

    fn anything() -> impl Strategy<Value = String> {
        prop_oneof![
            any::<String>(),
            "[./\\\\a-c\0 ]{0,20}",
            proptest::collection::vec(
                prop_oneof![
                    Just("..".to_owned()),
                    Just("/".to_owned()),
                    Just("\\".to_owned()),
                    Just("\0".to_owned()),
                    Just("\u{202e}".to_owned()),
                    Just("NUL".to_owned()),
                    Just(".".to_owned()),
                    "[a-z]{1,300}",
                ],
                0..8
            )
            .prop_map(|parts| parts.concat()),
        ]
    }

    proptest! {
        #[test]
        fn the_result_is_one_plain_component(given in anything(), number in 2_u32..10_000) {
            let name = SafeName::from_untrusted(&given);
            for text in [name.as_str(), name.numbered(number).as_str()] {
                let parts: Vec<Component<'_>> = Path::new(text).components().collect();
                prop_assert!(matches!(parts.as_slice(), [Component::Normal(_)]), "{:?}", text);
                prop_assert!(!text.starts_with(['.', '-']) && !text.ends_with('.'));
                prop_assert!(text.len() <= 255);
                prop_assert!(text.chars().all(|c| c.is_alphanumeric() || matches!(c, '.' | '_' | '-')));
                let joined = Path::new("/out").join(text);
                prop_assert_eq!(joined.parent(), Some(Path::new("/out")));
            }
            prop_assert!(name.as_str().len() <= MAX_NAME_BYTES);
            // Making safe what is safe changes nothing, so the file server finds what was saved.
            prop_assert_eq!(SafeName::exactly(name.as_str()), Some(name.clone()));
            prop_assert!(SafeName::exactly(name.numbered(number).as_str()).is_some());
        }
    }
}
