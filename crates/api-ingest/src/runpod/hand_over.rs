//! The answer of `/stream` that carries pieces: the cursor moves once the connection has taken the whole answer.
//!
//! A client that gave up (RunPod's Python client does after 10 s) asks again and must get what it missed; one that got
//! its answer must not get the same again. Readers of one job take turns, and a turn lasts from reading the pieces
//! until the cursor has moved or the answer was dropped. What can happen:
//!
//! - The client hangs up while it waits, or while the pieces are read: the server drops the request. The cursor was
//!   not touched; the next request gets the pieces.
//! - It hangs up while the answer is written: the body is dropped before its end, the turn ends, the cursor stays.
//! - The connection took everything: the cursor moves, and only then does the body end, so that a client that asks
//!   again at once, be it another replica, finds it moved. If the database is slow the body ends after
//!   [`MOVED_WITHIN`] all the same; in this process the next reader still waits for its turn.
//! - The process dies, or the database fails, between the last byte and the move: the pieces come again.
//! - The client neither reads nor hangs up (its host is gone): after [`TURN_MAX`] the next reader gets its turn, and
//!   the same pieces.
//! - Two requests overlap: the second waits for its turn and gets what the first left. On two replicas both may get
//!   the same pieces; the move names the position that they were read at, so only one of them moves the cursor.
//!
//! What was sent and then lost on the way (the client's host failed) is not noticed: no later request tells it apart.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use futures::stream;
use ringback_domain::JobId;
use ringback_store::{
    Urgency,
    cursors::{CursorStep, advance},
};
use tokio::{sync::OwnedMutexGuard, task::AbortHandle};

use crate::state::Api;

/// The body is passed on in pieces of this size, so that a connection that does not take them is noticed.
const FRAME_BYTES: usize = 64 * 1024;
/// How long the end of the answer waits for the cursor.
const MOVED_WITHIN: Duration = Duration::from_secs(1);
/// How long an answer that the connection does not take keeps other readers waiting.
const TURN_MAX: Duration = Duration::from_secs(10);

/// Turns of the readers of streams, for jobs that have a reader now.
#[derive(Default)]
pub(crate) struct StreamTurns(Mutex<HashMap<JobId, Weak<tokio::sync::Mutex<()>>>>);

impl StreamTurns {
    pub(super) fn of(&self, job: JobId) -> Arc<tokio::sync::Mutex<()>> {
        // Nothing panics while the map is locked.
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(turn) = turns.get(&job).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::new(tokio::sync::Mutex::new(()));
        turns.insert(job, Arc::downgrade(&turn));
        turn
    }
}

/// A reader's turn. Ends when it is dropped, or after [`TURN_MAX`].
struct Turn {
    held: Arc<Mutex<Option<OwnedMutexGuard<()>>>>,
    limit: AbortHandle,
}

impl Turn {
    fn new(turn: OwnedMutexGuard<()>) -> Self {
        let held = Arc::new(Mutex::new(Some(turn)));
        let limited = Arc::clone(&held);
        let limit = tokio::spawn(async move {
            tokio::time::sleep(TURN_MAX).await;
            drop(limited.lock().unwrap_or_else(PoisonError::into_inner).take());
        });
        Self { held, limit: limit.abort_handle() }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.limit.abort();
        drop(self.held.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// An answer on its way to a client.
pub(super) struct HandOver {
    api: Arc<Api>,
    /// What the connection has not taken yet.
    rest: Bytes,
    step: CursorStep,
    turn: Turn,
}

impl HandOver {
    pub(super) fn new(api: Arc<Api>, body: Bytes, step: CursorStep, turn: OwnedMutexGuard<()>) -> Self {
        Self { api, rest: body, step, turn: Turn::new(turn) }
    }

    pub(super) fn into_response(self) -> Response {
        let frames = stream::unfold(self, async |mut answer| {
            if answer.rest.is_empty() {
                answer.taken().await;
                return None;
            }
            let frame = answer.rest.split_to(answer.rest.len().min(FRAME_BYTES));
            Some((Ok::<_, std::convert::Infallible>(frame), answer))
        });
        // Of unknown length: the connection asks for the end, which tells that it took everything.
        let mut response = Response::new(Body::from_stream(frames));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }

    async fn taken(self) {
        // Lets the connection write what it took and look whether the client is still there; if not, this ends here.
        tokio::task::yield_now().await;
        let Self { api, rest: _, step, turn } = self;
        // On its own: from here on the answer counts as given, also if the client hangs up now.
        let moved = tokio::spawn(async move {
            let moved =
                api.store.write(Urgency::Now, move |tx| Box::pin(async move { advance(tx, step).await }));
            if let Err(error) = moved.await {
                tracing::warn!(%error, "a stream's cursor was not moved: its last pieces will be given out again");
            }
            drop(turn);
        });
        let _ = tokio::time::timeout(MOVED_WITHIN, moved).await;
    }
}
