//! From what a handler yields to the text of a server-sent stream. Pure.
//!
//! vLLM's worker yields raw text of such a stream, cut anywhere: it is passed on as it is, up to the end of the last
//! whole event. Anything else is one event.

use std::borrow::Cow;

use serde_json::value::RawValue;

const DONE: &str = "[DONE]";
/// How a line of a server-sent stream may begin.
const FIELDS: [&str; 5] = ["data:", "event:", "id:", "retry:", ":"];

/// What the texts are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Texts {
    #[default]
    Unknown,
    /// Pieces of a server-sent stream.
    Events,
    /// Something else, which is not looked into.
    Plain,
}

/// How far a stream is.
#[derive(Debug, Default)]
pub(super) struct Framing {
    texts: Texts,
    /// An event that is not whole yet. Clients can do nothing with half of one, and if the worker is lost it can still
    /// be left out.
    held: String,
    /// What was sent last ended in the middle of a line.
    open: bool,
    /// Events were made here, so their end is ours to tell too.
    framed: bool,
    /// The stream said by itself that it is over.
    done: bool,
}

impl Framing {
    /// Whether a new event or a comment may begin here.
    pub(super) fn at_boundary(&self) -> bool {
        !self.open
    }

    /// Whether the client was told that nothing more comes: it may hang up now.
    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    /// The text of one yielded value; empty while it is not a whole event.
    pub(super) fn piece(&mut self, json: &str) -> String {
        let mut out = String::new();
        self.append(json.trim(), &mut out);
        self.done |= out.contains(DONE);
        out
    }

    fn append(&mut self, json: &str, out: &mut String) {
        match json.as_bytes().first() {
            None => {}
            Some(b'"') => match serde_json::from_str::<Cow<'_, str>>(json) {
                Ok(text) => self.text(&text, out),
                // Half of a pair of surrogates: no text, but still a value.
                Err(_) => self.event(json, out),
            },
            // Yields that a handler collected.
            Some(b'[') => match serde_json::from_str::<Vec<&RawValue>>(json) {
                Ok(all) => all.into_iter().for_each(|one| self.append(one.get(), out)),
                Err(_) => self.event(json, out),
            },
            Some(_) => self.event(json, out),
        }
    }

    fn text(&mut self, text: &str, out: &mut String) {
        self.held.push_str(text);
        if self.texts == Texts::Unknown {
            let held = self.held.as_str();
            self.texts = if FIELDS.iter().any(|field| held.starts_with(field)) {
                Texts::Events
            } else if FIELDS.iter().any(|field| field.starts_with(held)) {
                return;
            } else {
                Texts::Plain
            };
        }
        match self.texts {
            Texts::Unknown => {}
            Texts::Plain => {
                out.push_str(&self.held);
                self.held.clear();
                self.open = !ends_event(out);
            }
            Texts::Events => {
                let whole = ["\n\n", "\r\n\r\n", "\r\r"]
                    .iter()
                    .filter_map(|end| self.held.rfind(end).map(|at| at + end.len()))
                    .max();
                if let Some(end) = whole {
                    out.extend(self.held.drain(..end));
                }
            }
        }
    }

    fn event(&mut self, json: &str, out: &mut String) {
        self.framed = true;
        out.push_str(&std::mem::take(&mut self.held));
        if (out.is_empty() && self.open) || !(out.is_empty() || ends_event(out)) {
            out.push_str("\n\n");
        }
        out.push_str("data: ");
        // Outside of its texts JSON may hold line breaks, which would end the event's line.
        out.extend(json.chars().map(|c| if matches!(c, '\n' | '\r') { ' ' } else { c }));
        out.push_str("\n\n");
        self.open = false;
    }

    /// A failure in the middle of a stream, as OpenAI's clients read it.
    pub(super) fn failure(&mut self, body: &str) -> String {
        self.held.clear();
        let mut out = String::new();
        self.event(body, &mut out);
        out
    }

    /// What ends the stream: what was not whole, and where the handler did not say so that it is over.
    pub(super) fn end(&mut self) -> Option<String> {
        let mut out = std::mem::take(&mut self.held);
        self.done |= out.contains(DONE);
        if self.framed && !std::mem::replace(&mut self.done, true) {
            if !(out.is_empty() || ends_event(&out)) {
                out.push_str("\n\n");
            }
            out.push_str(&format!("data: {DONE}\n\n"));
        }
        (!out.is_empty()).then_some(out)
    }
}

fn ends_event(text: &str) -> bool {
    ["\n\n", "\r\r", "\r\n\r\n"].iter().any(|end| text.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(pieces: &[&str]) -> String {
        let mut framing = Framing::default();
        let mut text: String = pieces.iter().map(|piece| framing.piece(piece)).collect();
        text.extend(framing.end());
        text
    }

    #[test]
    fn raw_text_is_passed_on_as_it_is() {
        let pieces = [r#""data: {\"a\":1}\n\nda""#, r#""ta: {\"a\":\"ü\"}\n""#, r#""\ndata: [DONE]\n\n""#];
        assert_eq!(all(&pieces), "data: {\"a\":1}\n\ndata: {\"a\":\"ü\"}\n\ndata: [DONE]\n\n");
        assert_eq!(all(&[r#""just text""#]), "just text");
    }

    #[test]
    fn objects_become_events_and_an_end() {
        assert_eq!(
            all(&[r#"{"a":1}"#, "{\n\"b\":2}"]),
            "data: {\"a\":1}\n\ndata: { \"b\":2}\n\ndata: [DONE]\n\n"
        );
        assert_eq!(all(&[r#"[{"a":1},{"b":2}]"#]), "data: {\"a\":1}\n\ndata: {\"b\":2}\n\ndata: [DONE]\n\n");
        assert_eq!(all(&[r#""half""#, r#"{"a":1}"#]), "half\n\ndata: {\"a\":1}\n\ndata: [DONE]\n\n");
        assert_eq!(all(&[r#"["x\n\n",{"a":1}]"#]), "x\n\ndata: {\"a\":1}\n\ndata: [DONE]\n\n");
        assert_eq!(all(&[]), "");
    }

    #[test]
    fn half_an_event_waits_for_its_rest() {
        let mut framing = Framing::default();
        for (piece, sent) in [
            (r#""da""#, ""),
            (r#""ta: 1\n\ndata: 2""#, "data: 1\n\n"),
            (r#""\n""#, ""),
            (r#""\ndata: 3\r\n\r\ndata: [DO""#, "data: 2\n\ndata: 3\r\n\r\n"),
        ] {
            assert_eq!(framing.piece(piece), sent, "{piece}");
            assert!(framing.at_boundary() && !framing.is_done());
        }
        assert_eq!(framing.piece(r#""NE]\n\n""#), "data: [DONE]\n\n");
        assert!(framing.is_done());
        framing.piece(r#""data: {\"half""#);
        assert_eq!(framing.failure(r#"{"error":1}"#), "data: {\"error\":1}\n\n");
    }

    #[test]
    fn a_failure_in_a_plain_text_begins_a_line() {
        let mut framing = Framing::default();
        assert_eq!(framing.piece(r#""plain""#), "plain");
        assert!(!framing.at_boundary());
        assert_eq!(framing.failure("{}"), "\n\ndata: {}\n\n");
    }

    #[test]
    fn a_lone_surrogate_is_still_passed_on() {
        assert_eq!(all(&[r#""\ud800""#]), "data: \"\\ud800\"\n\ndata: [DONE]\n\n");
    }
}
