//! JSON objects written field by field, around texts that came from outside.
//!
//! Such a text goes in verbatim, never parsed and printed again, so that a number like `1e400` or a key order survives. A
//! large one is a reference to a blob: a body is then a list of parts, and nobody copies megabytes to write a few fields
//! around them.

/// A JSON text as it came from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Json<'a> {
    /// The text itself.
    Inline(&'a [u8]),
    /// The text lies in the blob store.
    Blob {
        /// Its key.
        key: &'a str,
        /// Its length.
        size_bytes: u64,
    },
}

/// A stretch of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Bytes kept with the body.
    Inline(Vec<u8>),
    /// Bytes kept in the blob store.
    Blob {
        /// Their key.
        key: String,
        /// Their number.
        size_bytes: u64,
    },
}

/// A body: its parts in order. Neighbouring inline parts are joined.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Body {
    parts: Vec<Part>,
}

impl Body {
    /// A body that is one JSON text.
    #[must_use]
    pub fn of_json(json: Vec<u8>) -> Self {
        Self { parts: vec![Part::Inline(json)] }
    }

    /// The parts in order.
    #[must_use]
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The parts in order, without a copy.
    #[must_use]
    pub fn into_parts(self) -> Vec<Part> {
        self.parts
    }

    /// The whole body, if no part of it lies in the blob store.
    #[must_use]
    pub fn as_inline(&self) -> Option<&[u8]> {
        match self.parts.as_slice() {
            [Part::Inline(bytes)] => Some(bytes),
            _ => None,
        }
    }

    /// The length of the whole body.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.parts
            .iter()
            .map(|part| match part {
                Part::Inline(bytes) => bytes.len() as u64,
                Part::Blob { size_bytes, .. } => *size_bytes,
            })
            .sum()
    }

    fn tail(&mut self) -> &mut Vec<u8> {
        if !matches!(self.parts.last(), Some(Part::Inline(_))) {
            self.parts.push(Part::Inline(Vec::with_capacity(256)));
        }
        match self.parts.last_mut() {
            Some(Part::Inline(bytes)) => bytes,
            // An inline part was pushed just above.
            Some(Part::Blob { .. }) | None => unreachable!("the last part is inline"),
        }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.tail().extend_from_slice(bytes);
    }

    pub(super) fn push_json(&mut self, json: Json<'_>) {
        match json {
            Json::Inline(bytes) => self.push(bytes),
            Json::Blob { key, size_bytes } => {
                self.parts.push(Part::Blob { key: key.to_owned(), size_bytes });
            }
        }
    }

    pub(super) fn push_text(&mut self, text: &str) {
        let tail = self.tail();
        tail.push(b'"');
        escape_into(tail, text);
        tail.push(b'"');
    }
}

/// Writes one object field by field.
pub(super) struct Object {
    body: Body,
    empty: bool,
}

impl Object {
    pub(super) fn new() -> Self {
        let mut body = Body::default();
        body.push(b"{");
        Self { body, empty: true }
    }

    fn key(&mut self, name: &str) {
        if !self.empty {
            self.body.push(b",");
        }
        self.empty = false;
        self.body.push_text(name);
        self.body.push(b":");
    }

    pub(super) fn text(&mut self, name: &str, value: &str) -> &mut Self {
        self.key(name);
        self.body.push_text(value);
        self
    }

    pub(super) fn number(&mut self, name: &str, value: u64) -> &mut Self {
        self.key(name);
        self.body.push(value.to_string().as_bytes());
        self
    }

    pub(super) fn json(&mut self, name: &str, value: Json<'_>) -> &mut Self {
        self.key(name);
        self.body.push_json(value);
        self
    }

    /// A field only where there is something to say.
    pub(super) fn opt_text(&mut self, name: &str, value: Option<&str>) -> &mut Self {
        match value {
            Some(value) => self.text(name, value),
            None => self,
        }
    }

    /// A field only where there is something to say.
    pub(super) fn opt_json(&mut self, name: &str, value: Option<Json<'_>>) -> &mut Self {
        match value {
            Some(value) => self.json(name, value),
            None => self,
        }
    }

    /// A body as the value of a field.
    pub(super) fn body(&mut self, name: &str, value: Body) -> &mut Self {
        self.key(name);
        for part in value.parts {
            match part {
                Part::Inline(bytes) => self.body.push(&bytes),
                blob @ Part::Blob { .. } => self.body.parts.push(blob),
            }
        }
        self
    }

    /// A field whose value the caller writes, as JSON.
    pub(super) fn value(&mut self, name: &str) -> &mut Body {
        self.key(name);
        &mut self.body
    }

    pub(super) fn close(mut self) -> Body {
        self.body.push(b"}");
        self.body
    }
}

/// Escapes a text for a JSON string (RFC 8259 section 7).
fn escape_into(out: &mut Vec<u8>, text: &str) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    for &byte in text.as_bytes() {
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            0..0x20 => {
                out.extend_from_slice(b"\\u00");
                out.push(HEX[usize::from(byte >> 4)]);
                out.push(HEX[usize::from(byte & 15)]);
            }
            _ => out.push(byte),
        }
    }
}
