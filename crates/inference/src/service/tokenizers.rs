//! Threads that turn texts into entries of the queue.

use super::{Entry, Request, Sequence, Shared};
use crate::service::request::EncodeError;
use std::{
    ops::Range,
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
        queue(shared, &request, range.len(), entries);
    }
}

/// The entries of one piece; none if the request is over.
fn piece(shared: &Shared, request: &Arc<Request>, range: Range<usize>) -> Result<Vec<Entry>, EncodeError> {
    let mut entries = Vec::with_capacity(range.len());
    for index in range {
        if request.is_over() {
            return Ok(Vec::new());
        }
        if request.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(EncodeError::DeadlineExceeded);
        }
        let begun = Instant::now();
        let encoded = shared.model.tokenizer().encode(&request.inputs[index]);
        let text = encoded.map_err(|source| EncodeError::Input { index, source })?;
        let queued_at = Instant::now();
        request.tokenized(index, &text, queued_at - begun);
        entries.push(Entry {
            tokens: text.ids.len(),
            deadline: request.deadline,
            payload: Sequence { request: Arc::clone(request), index, text, queued_at },
        });
    }
    Ok(entries)
}

/// Pushes the entries and gives back the room of inputs that have none, before the request hears of a failure.
fn queue(shared: &Shared, request: &Request, admitted: usize, entries: Result<Vec<Entry>, EncodeError>) {
    let (mut entries, mut failure) = match entries {
        Ok(entries) => (entries, None),
        Err(error) => (Vec::new(), Some(error)),
    };
    {
        let mut queue = shared.queue();
        if let Some(error) = Shared::closed(&queue.health) {
            entries.clear();
            failure = Some(error);
        }
        queue.batcher.release(admitted - entries.len());
        for entry in entries {
            if let Err((refusal, _)) = queue.batcher.push(entry) {
                failure = Some(refusal.into());
            }
        }
        shared.tell(&queue);
    }
    shared.queue_changed.notify_one();
    if let Some(error) = failure {
        request.fail(error);
    }
}
