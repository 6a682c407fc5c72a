//! Threads that turn texts into entries of the queue.

use super::{Entry, Request, Sequence, Shared};
use crate::{
    service::request::EncodeError,
    tokenize::{TokenizeError, TokenizedText},
};
use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, PoisonError},
    time::Instant,
};

/// Inputs that a thread takes at once: a large request is spread over the threads, a small one is not torn apart.
pub(super) const PIECE: usize = 16;

pub(super) fn run(shared: &Shared) {
    loop {
        let (request, range) = {
            let mut texts = shared.texts.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                if let Some(next) = texts.pop_front() {
                    break next;
                }
                // Only `close` leaves the list empty for good; it changes the health before it looks at the list.
                if Shared::closed(&shared.queue().health).is_some() {
                    return;
                }
                texts = shared.texts_changed.wait(texts).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let entries = piece(shared, &request, range.clone());
        let (waiting, tokens) = queue(shared, &request, range.len(), entries);
        shared.observer.queue(waiting, tokens);
    }
}

/// The entries of one piece; none if the request is over.
fn piece(shared: &Shared, request: &Arc<Request>, range: Range<usize>) -> Vec<Entry> {
    let mut entries = Vec::with_capacity(range.len());
    for index in range {
        if request.is_over() {
            return Vec::new();
        }
        if request.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            request.fail(EncodeError::DeadlineExceeded);
            return Vec::new();
        }
        let begun = Instant::now();
        match tokenize(shared, request, index) {
            Ok(text) => {
                let queued_at = Instant::now();
                request.tokenized(index, &text, queued_at - begun);
                entries.push(Entry {
                    tokens: text.ids.len(),
                    deadline: request.deadline,
                    payload: Sequence { request: Arc::clone(request), index, text, queued_at },
                });
            }
            Err(source) => {
                request.fail(EncodeError::Input { index, source });
                return Vec::new();
            }
        }
    }
    entries
}

fn tokenize(shared: &Shared, request: &Request, index: usize) -> Result<TokenizedText, TokenizeError> {
    // A text must not end the thread, whatever the tokenizer's libraries make of it.
    catch_unwind(AssertUnwindSafe(|| shared.model.tokenizer().encode(&request.inputs[index])))
        .unwrap_or_else(|_| Err(TokenizeError::Refused("it panicked".to_owned())))
}

/// Pushes the entries and gives back the room of inputs that have none. Answers what is queued now.
fn queue(shared: &Shared, request: &Request, admitted: usize, entries: Vec<Entry>) -> (usize, usize) {
    let mut failure = None;
    let now = {
        let mut queue = shared.queue();
        queue.batcher.release(admitted - entries.len());
        failure = Shared::closed(&queue.health).or(failure);
        if failure.is_some() {
            queue.batcher.release(entries.len());
        } else {
            for entry in entries {
                if let Err((refusal, _)) = queue.batcher.push(entry) {
                    failure = Some(refusal.into());
                }
            }
        }
        (queue.batcher.len(), queue.batcher.queued_tokens())
    };
    shared.queue_changed.notify_one();
    if let Some(error) = failure {
        request.fail(error);
    }
    now
}
