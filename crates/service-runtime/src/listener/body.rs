//! Bodies on their way in and out.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use hyper::body::{Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep};

use super::BODY_BYTES_PER_SECOND;
use super::io::Phase;

/// A request's body came too slowly. Found in the chain of the error of whoever reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the request body came too slowly: {} bytes in {} s", .bytes, .after.as_secs())]
pub struct BodyTooSlow {
    /// What had come.
    pub bytes: u64,
    /// When it was given up.
    pub after: Duration,
}

impl BodyTooSlow {
    /// Looks for it in what reading a body failed with.
    #[must_use]
    pub fn find(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(found) = error.downcast_ref::<Self>() {
                return Some(*found);
            }
            next = error.source();
        }
        None
    }
}

/// A request's body that must come at a pace.
#[derive(Debug)]
pub(super) struct PacedBody {
    body: Incoming,
    begun: Option<Instant>,
    time: Duration,
    bytes: u64,
    /// Made when the body is first waited for: most are here with their head.
    late: Option<Pin<Box<Sleep>>>,
}

impl PacedBody {
    pub(super) fn new(body: Incoming, time: Duration) -> Self {
        Self { body, begun: None, time, bytes: 0, late: None }
    }

    fn allowed(&self) -> Duration {
        let earned_ms = self.bytes.saturating_mul(1000) / BODY_BYTES_PER_SECOND;
        self.time + Duration::from_millis(earned_ms)
    }
}

impl HttpBody for PacedBody {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        let this = &mut *self;
        // The clock starts when somebody reads: until then the client may have been kept waiting by us.
        let begun = *this.begun.get_or_insert_with(Instant::now);
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            if let Some(Ok(frame)) = &frame {
                this.bytes += frame.data_ref().map_or(0, Bytes::len) as u64;
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let deadline = begun + this.allowed();
        let late = this.late.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if late.deadline() != deadline {
            late.as_mut().reset(deadline);
        }
        if late.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        metrics::counter!("ringback_http_slow_clients_total", "part" => "body").increment(1);
        let slow = BodyTooSlow { bytes: this.bytes, after: begun.elapsed() };
        Poll::Ready(Some(Err(slow.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body; when it is gone, the connection waits for its next request.
#[derive(Debug)]
pub(super) struct AnswerBody {
    body: Body,
    phase: Arc<Phase>,
}

impl AnswerBody {
    pub(super) fn new(body: Body, phase: Arc<Phase>) -> Self {
        Self { body, phase }
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        self.phase.idle();
    }
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
