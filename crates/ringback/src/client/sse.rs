//! Server-sent events: just enough of the format to read `/v1/stream`.

use super::Api;
use crate::error::CliError;
use futures::StreamExt as _;
use futures::stream::BoxStream;

/// Longest event we keep; a transition takes about 200 bytes.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// An open stream of events.
pub(crate) struct Events {
    bytes: BoxStream<'static, Result<bytes::Bytes, reqwest::Error>>,
    parser: Parser,
    ready: std::collections::VecDeque<String>,
}

impl Events {
    /// Opens a stream.
    pub(crate) async fn open(api: &Api, path: &str) -> Result<Self, CliError> {
        let response = api.open(path).await?;
        Ok(Self {
            bytes: response.bytes_stream().boxed(),
            parser: Parser::default(),
            ready: Default::default(),
        })
    }

    /// The data of the next event; `None` when the stream ends or breaks. Losing the future loses nothing.
    pub(crate) async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            let bytes = self.bytes.next().await?.ok()?;
            self.ready.extend(self.parser.feed(&bytes)?);
        }
    }
}

#[derive(Default)]
struct Parser {
    line: Vec<u8>,
    data: String,
    has_data: bool,
    after_cr: bool,
}

impl Parser {
    /// Events completed by these bytes; `None` when one grows beyond all measure.
    fn feed(&mut self, bytes: &[u8]) -> Option<Vec<String>> {
        let mut events = Vec::new();
        for &byte in bytes {
            let skip = byte == b'\n' && std::mem::take(&mut self.after_cr);
            match byte {
                _ if skip => {}
                b'\n' | b'\r' => {
                    self.after_cr = byte == b'\r';
                    events.extend(self.end_line());
                }
                _ => {
                    self.after_cr = false;
                    self.line.push(byte);
                }
            }
        }
        (self.line.len() + self.data.len() <= MAX_EVENT_BYTES).then_some(events)
    }

    fn end_line(&mut self) -> Option<String> {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            let data = std::mem::take(&mut self.data);
            return std::mem::take(&mut self.has_data).then_some(data);
        }
        let text = String::from_utf8_lossy(&line);
        let (field, value) = text.split_once(':').unwrap_or((&text, ""));
        if field == "data" {
            if self.has_data {
                self.data.push('\n');
            }
            self.data.push_str(value.strip_prefix(' ').unwrap_or(value));
            self.has_data = true;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_out_whole_however_the_bytes_are_cut() {
        let text = b": hello\nid: 1\nevent: transition\ndata: {\"a\":1}\n\n:\n\ndata: x\r\ndata:y\r\n\r\n";
        for cut in 1..text.len() {
            let mut parser = Parser::default();
            let got: Vec<String> = text.chunks(cut).flat_map(|chunk| parser.feed(chunk).unwrap()).collect();
            assert_eq!(got, ["{\"a\":1}", "x\ny"], "cut every {cut} bytes");
        }
    }

    #[test]
    fn an_event_without_end_is_refused() {
        assert!(Parser::default().feed(&vec![b'a'; MAX_EVENT_BYTES + 1]).is_none());
    }
}
