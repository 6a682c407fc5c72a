//! A connection that knows whether it waits for the head of a request.

use std::io::{Error, ErrorKind, Result};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

const HEAD: u8 = 0;
const REQUEST: u8 = 1;
const IDLE: u8 = 2;

/// Where a connection is: shared by its stream, which sees bytes, and its service, which sees requests.
#[derive(Debug, Default)]
pub(super) struct Phase(AtomicU8);

impl Phase {
    /// A head is complete.
    pub(super) fn request(&self) {
        self.0.store(REQUEST, Ordering::Relaxed);
    }

    /// An answer is complete.
    pub(super) fn idle(&self) {
        self.0.store(IDLE, Ordering::Relaxed);
    }

    fn is(&self, phase: u8) -> bool {
        self.0.load(Ordering::Relaxed) == phase
    }
}

/// Reads fail when a head takes longer than its time.
#[derive(Debug)]
pub(super) struct WatchedStream {
    stream: TcpStream,
    phase: Arc<Phase>,
    time: Duration,
    late: Pin<Box<Sleep>>,
}

impl WatchedStream {
    pub(super) fn new(stream: TcpStream, phase: Arc<Phase>, time: Duration) -> Self {
        Self { stream, phase, time, late: Box::pin(tokio::time::sleep(time)) }
    }
}

impl AsyncRead for WatchedStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        let this = &mut *self;
        // Looked at first: bytes that drip must not keep the clock from being asked.
        if this.phase.is(HEAD) && this.late.as_mut().poll(cx).is_ready() {
            metrics::counter!("ringback_http_slow_clients_total", "part" => "header").increment(1);
            return Poll::Ready(Err(Error::new(
                ErrorKind::TimedOut,
                "the head of a request did not come in time",
            )));
        }
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        if !buf.filled().is_empty() && this.phase.is(IDLE) {
            this.phase.0.store(HEAD, Ordering::Relaxed);
            this.late.as_mut().reset(Instant::now() + this.time);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for WatchedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
