//! What a child writes: read line by line, attributed to jobs, kept up to a limit.

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;
use ringback_service_runtime::time::now_ms;
use serde::Deserialize;
use tokio::net::unix::pipe;

/// A longer line is cut into pieces of this size.
const MAX_LINE_BYTES: usize = 64 * 1024;
/// Lines of stderr kept for the reason of a crash.
const TAIL_LINES: usize = 20;
const TAIL_LINE_BYTES: usize = 500;

/// Which stream a line came on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Out,
    Err,
}

/// One line of a child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) stream: Stream,
    pub(super) text: String,
}

/// Both outputs of a child.
#[derive(Debug)]
pub(super) struct LineReader {
    out: Half,
    err: Half,
    ready: VecDeque<Line>,
}

#[derive(Debug)]
struct Half {
    stream: Stream,
    pipe: Option<pipe::Receiver>,
    rest: Vec<u8>,
}

impl LineReader {
    pub(super) fn new(out: pipe::Receiver, err: pipe::Receiver) -> Self {
        Self {
            out: Half { stream: Stream::Out, pipe: Some(out), rest: Vec::new() },
            err: Half { stream: Stream::Err, pipe: Some(err), rest: Vec::new() },
            ready: VecDeque::new(),
        }
    }

    /// The next line; never returns once both streams have ended. Cancelling loses nothing.
    pub(super) async fn next(&mut self) -> Line {
        loop {
            if let Some(line) = self.ready.pop_front() {
                return line;
            }
            tokio::select! {
                () = self.out.readable() => self.out.read(&mut self.ready),
                () = self.err.readable() => self.err.read(&mut self.ready),
            }
        }
    }

    /// What is there now, without waiting.
    pub(super) fn take_ready(&mut self) -> Vec<Line> {
        self.out.read(&mut self.ready);
        self.err.read(&mut self.ready);
        self.ready.drain(..).collect()
    }

    /// Whether both streams have ended.
    pub(super) fn ended(&self) -> bool {
        self.out.pipe.is_none() && self.err.pipe.is_none() && self.ready.is_empty()
    }
}

impl Half {
    async fn readable(&self) {
        match &self.pipe {
            // An error shows again when reading.
            Some(pipe) => {
                let _ = pipe.readable().await;
            }
            None => std::future::pending().await,
        }
    }

    fn read(&mut self, ready: &mut VecDeque<Line>) {
        let mut buffer = [0_u8; 16 * 1024];
        let ended = loop {
            let Some(pipe) = &self.pipe else { return };
            match pipe.try_read(&mut buffer) {
                Ok(0) => break true,
                Ok(count) => self.rest.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break false,
                Err(_) => break true,
            }
            self.cut(ready);
        };
        if ended {
            self.pipe = None;
            if !self.rest.is_empty() {
                let rest = std::mem::take(&mut self.rest);
                self.push(&rest, ready);
            }
        }
    }

    /// Moves whole lines out of the rest.
    fn cut(&mut self, ready: &mut VecDeque<Line>) {
        let rest = std::mem::take(&mut self.rest);
        let mut from = 0;
        while from < rest.len() {
            let piece = &rest[from..];
            match piece.iter().take(MAX_LINE_BYTES).position(|byte| *byte == b'\n') {
                Some(end) => {
                    self.push(&piece[..end], ready);
                    from += end + 1;
                }
                None if piece.len() >= MAX_LINE_BYTES => {
                    self.push(&piece[..MAX_LINE_BYTES], ready);
                    from += MAX_LINE_BYTES;
                }
                None => break,
            }
        }
        self.rest = rest[from..].to_vec();
    }

    fn push(&self, bytes: &[u8], ready: &mut VecDeque<Line>) {
        let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
        ready.push_back(Line { stream: self.stream, text: String::from_utf8_lossy(bytes).into_owned() });
    }
}

/// What a line says about itself.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Attribution {
    /// The SDK names the job.
    Job {
        /// Id of the job.
        job: String,
        /// The message inside the SDK's JSON.
        text: String,
    },
    /// The SDK's own chatter (`Jobs in queue: 1`).
    Sdk,
    /// Anything else: the handler's output.
    Handler(String),
}

/// The SDK writes `{"requestId": id or null, "message", "level"}` because `RUNPOD_ENDPOINT_ID` is set.
pub(super) fn attribute(text: &str) -> Attribution {
    #[derive(Deserialize)]
    struct SdkLine {
        #[serde(rename = "requestId")]
        request_id: Option<String>,
        message: String,
        level: String,
    }
    let Ok(line) = serde_json::from_str::<SdkLine>(text) else {
        return Attribution::Handler(text.to_owned());
    };
    let text = format!("{} {}", line.level, line.message);
    match line.request_id {
        Some(job) => Attribution::Job { job, text },
        None if matches!(line.level.as_str(), "ERROR" | "WARN") => Attribution::Handler(text),
        None => Attribution::Sdk,
    }
}

/// The last lines of stderr, for the reason of a crash.
#[derive(Debug, Default)]
pub(super) struct Tail(VecDeque<String>);

impl Tail {
    pub(super) fn push(&mut self, text: &str) {
        if text.trim().is_empty() {
            return;
        }
        if self.0.len() == TAIL_LINES {
            self.0.pop_front();
        }
        self.0.push_back(text.chars().take(TAIL_LINE_BYTES).collect());
    }

    pub(super) fn text(&self) -> String {
        self.0.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

/// Log lines of one job: the first and the last ones, when there are more than fit.
#[derive(Debug)]
pub(super) struct JobLog {
    head: Vec<u8>,
    tail: VecDeque<String>,
    tail_bytes: usize,
    dropped: u64,
    max_bytes: usize,
}

impl JobLog {
    pub(super) fn new(max_bytes: usize) -> Self {
        Self { head: Vec::new(), tail: VecDeque::new(), tail_bytes: 0, dropped: 0, max_bytes }
    }

    pub(super) fn push(&mut self, stream: Stream, text: &str) {
        let name = match stream {
            Stream::Out => "stdout",
            Stream::Err => "stderr",
        };
        let line = format!("{} {name} {text}\n", timestamp(now_ms()));
        if self.tail.is_empty() && self.head.len() + line.len() <= self.max_bytes / 2 {
            self.head.extend_from_slice(line.as_bytes());
            return;
        }
        self.tail_bytes += line.len();
        self.tail.push_back(line);
        while self.tail_bytes > self.max_bytes / 2 {
            let Some(old) = self.tail.pop_front() else { break };
            self.tail_bytes -= old.len();
            self.dropped += 1;
        }
    }

    pub(super) fn take(&mut self) -> Bytes {
        let mut all = std::mem::take(&mut self.head);
        if self.dropped > 0 {
            all.extend_from_slice(format!("... {} lines left out ...\n", self.dropped).as_bytes());
        }
        for line in self.tail.drain(..) {
            all.extend_from_slice(line.as_bytes());
        }
        self.tail_bytes = 0;
        self.dropped = 0;
        all.into()
    }
}

/// RFC 3339 in UTC with milliseconds. Days to dates: Howard Hinnant's `civil_from_days`.
fn timestamp(unix_ms: i64) -> String {
    let (seconds, ms) = (unix_ms.div_euclid(1000), unix_ms.rem_euclid(1000));
    let (days, second_of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(timestamp(1_709_164_800_123), "2024-02-29T00:00:00.123Z");
        assert_eq!(timestamp(1_795_223_999_999), "2026-11-21T01:19:59.999Z");
    }

    #[test]
    fn the_sdk_names_jobs_and_the_rest_is_the_handlers() {
        let named = attribute(r#"{"requestId": "j1", "message": "Started.", "level": "INFO"}"#);
        assert_eq!(named, Attribution::Job { job: "j1".into(), text: "INFO Started.".into() });
        let chatter = attribute(r#"{"requestId": null, "message": "Jobs in queue: 1", "level": "INFO"}"#);
        assert_eq!(chatter, Attribution::Sdk);
        let error = attribute(r#"{"requestId": null, "message": "trace", "level": "ERROR"}"#);
        assert_eq!(error, Attribution::Handler("ERROR trace".into()));
        assert_eq!(attribute("hello {"), Attribution::Handler("hello {".into()));
        assert_eq!(attribute("{\"a\": 1}"), Attribution::Handler("{\"a\": 1}".into()));
    }

    #[test]
    fn a_long_log_keeps_its_ends() {
        let mut log = JobLog::new(2000);
        for n in 0..1000 {
            log.push(Stream::Out, &format!("line {n}"));
        }
        let text = String::from_utf8(log.take().to_vec()).expect("utf-8");
        assert!(text.len() < 2200, "{}", text.len());
        assert!(text.contains("line 0\n") && text.contains("line 999\n") && text.contains("lines left out"));
    }

    #[tokio::test]
    async fn lines_of_any_length_and_a_last_one_without_an_end() {
        use tokio::io::AsyncWriteExt;
        let (mut to_out, out) = pipe::pipe().expect("pipe");
        let (to_err, err) = pipe::pipe().expect("pipe");
        let mut reader = LineReader::new(out, err);
        let writing = tokio::spawn(async move {
            to_out.write_all(b"one\r\n\ntwo").await.expect("write");
            to_out.write_all(&vec![b'x'; MAX_LINE_BYTES + 10]).await.expect("write");
            to_out.write_all(b"\nend").await.expect("write");
            drop((to_out, to_err));
        });
        let mut seen = Vec::new();
        while !reader.ended() {
            let line = tokio::time::timeout(std::time::Duration::from_millis(500), reader.next()).await;
            let Ok(line) = line else { break };
            seen.push(line.text);
        }
        writing.await.expect("written");
        assert_eq!(seen[..2], ["one".to_owned(), String::new()]);
        assert_eq!(seen[2].len(), MAX_LINE_BYTES);
        assert_eq!(seen[3].len(), 13);
        assert_eq!(seen.last().map(String::as_str), Some("end"));
    }
}
