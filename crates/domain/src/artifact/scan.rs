//! Finds the values of a handler's output that may be files, with their places, so that they are replaced and every
//! other byte stays as it is.

use std::{borrow::Cow, ops::Range};

/// A longer text is no path.
pub const MAX_PATH_BYTES: usize = 4096;
/// Deeper values are left alone; parsers refuse such documents anyway.
const MAX_DEPTH: usize = 128;

/// What to look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Texts that may be paths.
    pub paths: bool,
    /// Base64 under a key that says so, and data URLs.
    pub base64: bool,
}

/// Where a file's bytes come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source<'a> {
    /// A text that may be a path.
    Path(Cow<'a, str>),
    /// Base64 text.
    Base64(Cow<'a, str>),
}

/// A value that may be a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// The bytes of the document that a replacement takes.
    pub span: Range<usize>,
    /// Where its bytes come from.
    pub source: Source<'a>,
    /// Name told beside it.
    pub name: Option<Cow<'a, str>>,
    /// Type told in a data URL.
    pub content_type: Option<String>,
    /// Whether the value is one of a list in the form of RunPod's ComfyUI worker.
    pub comfyui: bool,
}

/// Looks through a valid JSON document. Of a document that is not valid, what comes before the fault is looked at.
#[must_use]
pub fn scan(json: &[u8], wanted: Wanted) -> Vec<Found<'_>> {
    let mut scanner = Scanner { json, at: 0, wanted, found: Vec::new() };
    let _ = scanner.value(0, None);
    scanner.found
}

/// The document with other values in the given places, which must be in order and apart from each other.
#[must_use]
pub fn replace(json: &[u8], places: &[(Range<usize>, String)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(json.len());
    let mut from = 0;
    for (span, text) in places {
        let (Some(before), true) = (json.get(from..span.start), span.end <= json.len()) else { continue };
        out.extend_from_slice(before);
        out.extend_from_slice(text.as_bytes());
        from = span.end;
    }
    out.extend_from_slice(json.get(from..).unwrap_or_default());
    out
}

struct Scanner<'a> {
    json: &'a [u8],
    at: usize,
    wanted: Wanted,
    found: Vec<Found<'a>>,
}

/// The members of an object that tell of a file.
#[derive(Default)]
struct Members<'a> {
    base64: Option<Cow<'a, str>>,
    data: Option<Cow<'a, str>>,
    name: Option<Cow<'a, str>>,
    kind_is_base64: bool,
    /// Places in the list of what was found of members that are texts.
    own: Vec<usize>,
}

impl<'a> Scanner<'a> {
    fn space(&mut self) {
        while self.json.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
    }

    fn take(&mut self, byte: u8) -> Option<()> {
        self.space();
        (self.json.get(self.at) == Some(&byte)).then(|| self.at += 1)
    }

    fn value(&mut self, depth: usize, key: Option<&str>) -> Option<()> {
        if depth > MAX_DEPTH {
            return None;
        }
        self.space();
        match self.json.get(self.at)? {
            b'{' => self.object(depth),
            b'[' => self.list(depth, key),
            b'"' => {
                let (span, text) = self.string()?;
                self.text(span, text, key);
                Some(())
            }
            _ => {
                while self.json.get(self.at).is_some_and(|b| !b",]}".contains(b) && !b.is_ascii_whitespace())
                {
                    self.at += 1;
                }
                Some(())
            }
        }
    }

    fn list(&mut self, depth: usize, key: Option<&str>) -> Option<()> {
        self.take(b'[')?;
        if self.take(b']').is_some() {
            return Some(());
        }
        loop {
            // Each of a list `images_base64` is base64 too.
            self.value(depth + 1, key)?;
            if self.take(b',').is_none() {
                return self.take(b']');
            }
        }
    }

    fn object(&mut self, depth: usize) -> Option<()> {
        self.space();
        let start = self.at;
        let before = self.found.len();
        let mut members = Members::default();
        self.take(b'{')?;
        if self.take(b'}').is_some() {
            return Some(());
        }
        loop {
            self.space();
            let (_, key) = self.string()?;
            self.take(b':')?;
            self.space();
            if self.json.get(self.at) == Some(&b'"') {
                let (span, text) = self.string()?;
                match &*key {
                    "base64" => members.base64 = Some(text.clone()),
                    "data" => members.data = Some(text.clone()),
                    "filename" | "file_name" | "name" => members.name = Some(text.clone()),
                    "type" => members.kind_is_base64 = text == "base64",
                    _ => {}
                }
                let found = self.found.len();
                self.text(span, text, Some(&key));
                members.own.extend(found..self.found.len());
            } else {
                self.value(depth + 1, Some(&key))?;
            }
            if self.take(b',').is_none() {
                break;
            }
        }
        self.take(b'}')?;
        self.whole_object(start, before, members);
        Some(())
    }

    /// An object that is a file as a whole, or whose `filename` names its one file.
    fn whole_object(&mut self, start: usize, before: usize, members: Members<'a>) {
        let span = start..self.at;
        let whole = if !self.wanted.base64 {
            None
        } else if members.kind_is_base64 {
            members.data.map(|text| (text, true))
        } else {
            members.base64.map(|text| (text, false))
        };
        if let Some((text, comfyui)) = whole {
            let (content_type, text) = data_url(text);
            self.found.truncate(before);
            self.found.push(Found {
                span,
                source: Source::Base64(text),
                name: members.name,
                content_type,
                comfyui,
            });
            return;
        }
        let is_base64 =
            |n: &&usize| matches!(self.found.get(**n), Some(Found { source: Source::Base64(_), .. }));
        let mut base64 = members.own.iter().filter(is_base64);
        if let (Some(&one), None, Some(name)) = (base64.next(), base64.next(), members.name)
            && let Some(found) = self.found.get_mut(one)
        {
            found.name = Some(name);
        }
    }

    fn text(&mut self, span: Range<usize>, text: Cow<'a, str>, key: Option<&str>) {
        let found = if self.wanted.base64 && text.starts_with("data:") {
            let (content_type, rest) = data_url(text);
            content_type.map(|kind| (Source::Base64(rest), Some(kind)))
        } else if self.wanted.base64
            && let Some(stem) = key.and_then(|key| key.strip_suffix("_base64"))
            && !stem.is_empty()
            && !text.is_empty()
        {
            Some((Source::Base64(text), None))
        } else if self.wanted.paths && may_be_path(&text) {
            Some((Source::Path(text), None))
        } else {
            None
        };
        if let Some((source, content_type)) = found {
            self.found.push(Found { span, source, name: None, content_type, comfyui: false });
        }
    }

    /// A string with its quotes' span, escapes undone.
    fn string(&mut self) -> Option<(Range<usize>, Cow<'a, str>)> {
        self.space();
        let start = self.at;
        if self.json.get(start) != Some(&b'"') {
            return None;
        }
        let (mut end, mut escapes) = (start + 1, false);
        loop {
            match self.json.get(end)? {
                b'"' => break,
                b'\\' => {
                    escapes = true;
                    end += 2;
                }
                _ => end += 1,
            }
        }
        self.at = end + 1;
        let span = start..self.at;
        let text = if escapes {
            Cow::Owned(serde_json::from_slice::<String>(self.json.get(span.clone())?).ok()?)
        } else {
            Cow::Borrowed(std::str::from_utf8(self.json.get(start + 1..end)?).ok()?)
        };
        Some((span, text))
    }
}

fn may_be_path(text: &str) -> bool {
    (1..=MAX_PATH_BYTES).contains(&text.len())
        && !text.contains(['\0', '\n', '\r'])
        && !text.contains("://")
        && !text.starts_with("data:")
}

/// Type and base64 of a data URL; other text comes back as it is.
fn data_url(text: Cow<'_, str>) -> (Option<String>, Cow<'_, str>) {
    let head = text.get(..text.len().min(200)).or_else(|| text.get(..text.find(',').unwrap_or(0)));
    let Some((kind, at)) = head
        .and_then(|head| head.strip_prefix("data:"))
        .and_then(|head| head.split_once(";base64,"))
        .map(|(kind, _)| (kind.to_owned(), "data:".len() + kind.len() + ";base64,".len()))
    else {
        return (None, text);
    };
    let rest = match text {
        Cow::Borrowed(text) => Cow::Borrowed(text.get(at..).unwrap_or_default()),
        Cow::Owned(text) => Cow::Owned(text.get(at..).unwrap_or_default().to_owned()),
    };
    (Some(kind), rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOTH: Wanted = Wanted { paths: true, base64: true };
    const BASE64: Wanted = Wanted { paths: false, base64: true };

    fn texts(json: &str, wanted: Wanted) -> Vec<(String, String)> {
        scan(json.as_bytes(), wanted)
            .into_iter()
            .map(|f| {
                let text = match f.source {
                    Source::Path(t) => format!("path {t}"),
                    Source::Base64(t) => format!("base64 {t}"),
                };
                (json[f.span].to_owned(), text)
            })
            .collect()
    }

    #[test]
    fn finds_paths_base64_and_data_urls() {
        let json = r#"{"a":"out\/x.wav","n":1e400,"audio_base64":"QUJD","d":"data:image/png;base64,iVBO","l":["y"]}"#;
        let found = texts(json, BOTH);
        assert_eq!(
            found,
            [
                (r#""out\/x.wav""#.to_owned(), "path out/x.wav".to_owned()),
                (r#""QUJD""#.to_owned(), "base64 QUJD".to_owned()),
                (r#""data:image/png;base64,iVBO""#.to_owned(), "base64 iVBO".to_owned()),
                (r#""y""#.to_owned(), "path y".to_owned()),
            ]
        );
        assert_eq!(scan(json.as_bytes(), BASE64)[1].content_type.as_deref(), Some("image/png"));
        assert_eq!(scan(json.as_bytes(), Wanted { paths: false, base64: false }), []);
    }

    #[test]
    fn an_object_may_be_one_file() {
        let json =
            r#"{"images":[{"filename":"a.png","type":"base64","data":"QUJD"},{"type":"s3_url","data":"x"}]}"#;
        let found = scan(json.as_bytes(), BASE64);
        assert_eq!(found.len(), 1);
        assert_eq!(&json[found[0].span.clone()], r#"{"filename":"a.png","type":"base64","data":"QUJD"}"#);
        assert!(found[0].comfyui && found[0].name.as_deref() == Some("a.png"));
        let json = r#"{"file":{"base64":"QUJD","filename":"b.txt"}}"#;
        let found = scan(json.as_bytes(), BOTH);
        assert_eq!((found.len(), found[0].name.as_deref()), (1, Some("b.txt")));
        let json = r#"{"audio_base64":"QUJD","filename":"c.wav","more":{"x_base64":"QUJD"}}"#;
        let found = scan(json.as_bytes(), BASE64);
        assert_eq!((found.len(), found[0].name.as_deref()), (2, Some("c.wav")));
        assert_eq!(found[1].name, None);
    }

    #[test]
    fn only_the_found_places_change() {
        let json = br#" { "a" : "x" , "n": 12345678901234567890123 , "b":"y"} "#;
        let places: Vec<_> = scan(json, BOTH).into_iter().map(|f| (f.span, "{}".to_owned())).collect();
        assert_eq!(replace(json, &places), br#" { "a" : {} , "n": 12345678901234567890123 , "b":{}} "#);
        assert_eq!(replace(json, &[]), json);
    }

    #[test]
    fn broken_and_deep_documents_do_no_harm() {
        for json in ["", "{", "[\"a", "{\"a\":}", "\"\\", "{\"k\"", "nul", "[1,]", "\"\\ud800\""] {
            let _ = scan(json.as_bytes(), BOTH);
        }
        let _ = scan("[".repeat(1_000_000).as_bytes(), BOTH);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for found in scan(&bytes, BOTH) {
                prop_assert!(found.span.end <= bytes.len());
            }
        }

        #[test]
        fn spans_are_in_order_and_apart(texts in proptest::collection::vec(".{0,20}", 0..10)) {
            let json = serde_json::to_vec(&serde_json::json!({"l": texts, "x_base64": "AA", "f": {"base64": "AA"}})).unwrap();
            let found = scan(&json, BOTH);
            for pair in found.windows(2) {
                prop_assert!(pair[0].span.end <= pair[1].span.start);
            }
            let places: Vec<_> = found.into_iter().map(|f| (f.span, "0".to_owned())).collect();
            prop_assert!(serde_json::from_slice::<serde_json::Value>(&replace(&json, &places)).is_ok());
        }
    }
}
