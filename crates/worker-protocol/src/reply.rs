//! The reply to a take, which knows whether it was handed to the connection.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::Stream;

use crate::child::Child;

/// Body of an assigning reply. When the connection takes the bytes, the jobs count as held by the child;
/// when the reply is dropped before that (the child hung up), they go back to the front of the queue.
pub(crate) struct TakeReply {
    child: Arc<Child>,
    jobs: Vec<String>,
    bytes: Option<Bytes>,
}

impl TakeReply {
    pub(crate) fn new(child: Arc<Child>, jobs: Vec<String>, bytes: Bytes) -> Self {
        Self { child, jobs, bytes: Some(bytes) }
    }
}

impl Stream for TakeReply {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let bytes = self.bytes.take();
        if bytes.is_some() {
            let jobs = std::mem::take(&mut self.jobs);
            self.child.handed_over(jobs);
        }
        Poll::Ready(bytes.map(Ok))
    }
}

impl Drop for TakeReply {
    fn drop(&mut self) {
        if self.bytes.is_some() {
            self.child.hand_back(std::mem::take(&mut self.jobs));
        }
    }
}
