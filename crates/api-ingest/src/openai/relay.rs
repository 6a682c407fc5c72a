//! The answer to `"stream": true`: what the handler yields, as it comes.
//!
//! The status is held back until there is something to send, so that a refusal of the handler still has a status of its
//! own; after [`HEADERS_WITHIN`] the answer begins all the same, for proxies that give up on silence. A failure after
//! that is an event of the stream, as OpenAI's clients expect it.
//!
//! The pieces are read from SQL by a position of this request's own: `/stream/{id}` of the same job still gives all.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use futures::stream;
use ringback_domain::JobStatus;
use ringback_store::{JobRow, cursors::pieces_after, views::result_of};
use tokio::time::Instant;

use super::{
    Asked,
    answer::{completed, load},
    error::OpenAiError,
    pieces::Framing,
};
use crate::runpod::{find_job, stream::attempt_of};

/// An answer begins at the latest after this time.
const HEADERS_WITHIN: Duration = Duration::from_secs(10);
/// A stream says so often that it is alive. Proxies give up after 60 s by default.
const ALIVE_EVERY: Duration = Duration::from_secs(15);
/// A comment, which clients skip.
const ALIVE: &str = ": alive\n\n";

/// What happens next.
enum Step {
    Text(Bytes),
    /// Nothing, for as long as was asked.
    Quiet,
    Failed(OpenAiError),
    End,
}

/// A stream on its way.
struct Relay {
    asked: Asked,
    framing: Framing,
    /// Run and attempt whose pieces were given, and the next piece.
    position: (u32, u32, u32),
    /// Something was sent.
    given: bool,
    /// The handler yielded something.
    yielded: bool,
    over: bool,
}

pub(super) async fn answer(asked: Asked) -> Result<Response, OpenAiError> {
    let mut relay = Relay {
        asked,
        framing: Framing::default(),
        position: (0, 0, 0),
        given: false,
        yielded: false,
        over: false,
    };
    let first = match relay.step(Instant::now() + HEADERS_WITHIN).await {
        Step::Text(text) => text,
        Step::Quiet => Bytes::from_static(ALIVE.as_bytes()),
        Step::Failed(error) => return Err(error),
        Step::End => return Err(OpenAiError::nothing_returned()),
    };
    let rest = stream::unfold((Some(first), relay), async |(first, mut relay)| {
        let text = match first {
            Some(first) => first,
            None => relay.next().await?,
        };
        Some((Ok::<_, Infallible>(text), (None, relay)))
    });
    let mut response = Response::new(Body::from_stream(rest));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect the stream before it passes it on.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

impl Relay {
    /// The next text of a stream that has begun.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            match self.step(Instant::now() + ALIVE_EVERY).await {
                Step::Text(text) => return Some(text),
                // A comment in the middle of an event would spoil it.
                Step::Quiet if self.framing.at_boundary() => {
                    return Some(Bytes::from_static(ALIVE.as_bytes()));
                }
                Step::Quiet => {}
                Step::Failed(error) => {
                    self.over = true;
                    return Some(self.framing.failure(&error.body().to_string()).into());
                }
                Step::End => return None,
            }
        }
    }

    async fn step(&mut self, quiet: Instant) -> Step {
        match self.look(quiet).await {
            Ok(step) => step,
            Err(error) => Step::Failed(error),
        }
    }

    async fn look(&mut self, quiet: Instant) -> Result<Step, OpenAiError> {
        loop {
            if self.over {
                return Ok(Step::End);
            }
            // The waiter was there before this read: whatever comes after it wakes us.
            let Asked { api, who, endpoint, public_id, .. } = &self.asked;
            let row = find_job(api, who, endpoint, public_id).await?;
            if let Some(text) = self.pieces(&row).await? {
                return Ok(Step::Text(text));
            }
            if row.job.status().is_terminal() {
                return self.ended(&row).await;
            }
            let Asked { api, waiter, until, .. } = &self.asked;
            if api.shutdown.is_triggered() {
                return Err(OpenAiError::shutting_down());
            }
            let now = Instant::now();
            if now >= *until {
                return Err(OpenAiError::too_long(api));
            }
            if now >= quiet {
                return Ok(Step::Quiet);
            }
            tokio::select! {
                () = waiter.woken() => {}
                () = tokio::time::sleep_until(quiet.min(*until)) => {}
                () = api.shutdown.triggered() => {}
            }
        }
    }

    /// Pieces that were not sent yet.
    async fn pieces(&mut self, row: &JobRow) -> Result<Option<Bytes>, OpenAiError> {
        let Some(attempt) = attempt_of(row) else { return Ok(None) };
        let now = (row.job.run, attempt);
        if (self.position.0, self.position.1) != now {
            if self.given {
                return Err(OpenAiError::begun_again());
            }
            self.position = (now.0, now.1, 0);
            self.framing = Framing::default();
            self.yielded = false;
        }
        loop {
            let from = self.position.2;
            let read = self.asked.api.store.read();
            let (pieces, _more) = pieces_after(read, row.job.id, now.0, now.1, from).await?;
            let Some((last, _)) = pieces.last() else { return Ok(None) };
            self.position.2 = last + 1;
            let mut text = String::new();
            for (_, piece) in &pieces {
                text.push_str(&self.framing.piece(&String::from_utf8_lossy(piece)));
            }
            self.yielded = true;
            if self.framing.is_done() {
                // Clients hang up here, before the job's end is committed.
                self.asked.unwanted.keep();
            }
            if !text.is_empty() {
                self.given = true;
                return Ok(Some(text.into()));
            }
        }
    }

    /// The job has ended and all its pieces were sent.
    async fn ended(&mut self, row: &JobRow) -> Result<Step, OpenAiError> {
        self.over = true;
        self.asked.unwanted.keep();
        let status = row.job.status();
        if status == JobStatus::Completed && self.yielded {
            return Ok(self.framing.end().map_or(Step::End, |end| Step::Text(end.into())));
        }
        let api = &self.asked.api;
        let result = result_of(api.store.read(), row.job.id, row.job.run).await?;
        let result = completed(status, result)?;
        // A handler that yields nothing and returns a value: the value is the stream.
        let Some(output) = result.output else { return Err(OpenAiError::nothing_returned()) };
        let output = load(api, output).await?;
        if let Some(error) = OpenAiError::of_output(&output) {
            return Err(error);
        }
        let mut text = self.framing.piece(&String::from_utf8_lossy(&output));
        text.extend(self.framing.end());
        if text.is_empty() {
            return Err(OpenAiError::nothing_returned());
        }
        Ok(Step::Text(text.into()))
    }
}
