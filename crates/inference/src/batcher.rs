//! Which entries share a batch. Pure: no clock, no thread, no lock.
//!
//! First come, first served: a batch takes from the front of the queue while tokens and sequences fit, whoever they
//! belong to. There is no timer that waits for more: while an engine works, the next batch fills by itself.

use std::{collections::VecDeque, time::Instant};

/// How much a batch and the queue hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Most tokens of a batch, and so of an entry.
    pub max_batch_tokens: usize,
    /// Most sequences of a batch.
    pub max_batch_sequences: usize,
    /// No more is admitted while this many tokens are queued.
    pub max_queued_tokens: usize,
    /// Most entries admitted and not yet in a batch.
    pub max_queued_entries: usize,
}

/// Why entries are not taken.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    /// The queue holds as much as it may; later there is room.
    #[error("overloaded: {queued} {unit} are queued, at most {limit} are allowed; try again later")]
    Full {
        /// `tokens` or `inputs`.
        unit: &'static str,
        /// How many are queued.
        queued: usize,
        /// How many may be.
        limit: usize,
    },
    /// More entries at once than the queue can ever hold.
    #[error("{found} inputs at once; at most {limit} are allowed")]
    TooMany {
        /// Entries asked for.
        found: usize,
        /// Most entries.
        limit: usize,
    },
    /// One entry with more tokens than any batch holds.
    #[error("an input has {tokens} tokens; a batch holds at most {limit}")]
    TooLong {
        /// Tokens of the entry.
        tokens: usize,
        /// Most tokens of a batch.
        limit: usize,
    },
}

/// One sequence that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<T> {
    /// Tokens of the sequence.
    pub tokens: usize,
    /// After this it is not worth computing.
    pub deadline: Option<Instant>,
    /// Whom and what it is for.
    pub payload: T,
}

/// What [`Batcher::pop`] took off the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Popped<T> {
    /// The next batch, in order of arrival.
    pub batch: Vec<Entry<T>>,
    /// Entries nobody waits for any more.
    pub cancelled: Vec<Entry<T>>,
    /// Entries past their deadline.
    pub expired: Vec<Entry<T>>,
}

/// The queue in front of an engine.
#[derive(Clone, Debug)]
pub struct Batcher<T> {
    limits: BatchLimits,
    queue: VecDeque<Entry<T>>,
    queued_tokens: usize,
    admitted: usize,
}

impl<T> Batcher<T> {
    /// An empty queue.
    pub fn new(limits: BatchLimits) -> Self {
        Self { limits, queue: VecDeque::new(), queued_tokens: 0, admitted: 0 }
    }

    /// Reserves room for `entries` whose tokens are not counted yet; each is later pushed or released.
    ///
    /// # Errors
    /// [`Refusal::Full`] or [`Refusal::TooMany`]; nothing is reserved then.
    pub fn admit(&mut self, entries: usize) -> Result<(), Refusal> {
        let BatchLimits { max_queued_entries, max_queued_tokens, .. } = self.limits;
        if entries > max_queued_entries {
            return Err(Refusal::TooMany { found: entries, limit: max_queued_entries });
        }
        let waiting = self.waiting();
        if waiting + entries > max_queued_entries {
            return Err(Refusal::Full { unit: "inputs", queued: waiting, limit: max_queued_entries });
        }
        if self.queued_tokens >= max_queued_tokens {
            return Err(Refusal::Full {
                unit: "tokens",
                queued: self.queued_tokens,
                limit: max_queued_tokens,
            });
        }
        self.admitted += entries;
        Ok(())
    }

    /// Gives back room that was admitted and is not needed.
    pub fn release(&mut self, entries: usize) {
        self.admitted = self.admitted.saturating_sub(entries);
    }

    /// Queues an admitted entry.
    ///
    /// # Errors
    /// [`Refusal::TooLong`] with the entry; its room is given back.
    pub fn push(&mut self, entry: Entry<T>) -> Result<(), (Refusal, Entry<T>)> {
        self.release(1);
        let limit = self.limits.max_batch_tokens;
        if entry.tokens > limit {
            return Err((Refusal::TooLong { tokens: entry.tokens, limit }, entry));
        }
        self.queued_tokens += entry.tokens;
        self.queue.push_back(entry);
        Ok(())
    }

    /// Takes the next batch. The batch is empty only if no entry is left that anyone waits for.
    pub fn pop(&mut self, now: Instant, cancelled: impl Fn(&T) -> bool) -> Popped<T> {
        let mut popped = Popped { batch: Vec::new(), cancelled: Vec::new(), expired: Vec::new() };
        let mut tokens = 0;
        while let Some(entry) = self.queue.front() {
            let gone = cancelled(&entry.payload);
            let late = !gone && entry.deadline.is_some_and(|deadline| deadline <= now);
            if !gone && !late {
                let full = popped.batch.len() >= self.limits.max_batch_sequences.max(1);
                if full || tokens + entry.tokens > self.limits.max_batch_tokens {
                    break;
                }
            }
            let Some(entry) = self.queue.pop_front() else { break };
            self.queued_tokens -= entry.tokens;
            if gone {
                popped.cancelled.push(entry);
            } else if late {
                popped.expired.push(entry);
            } else {
                tokens += entry.tokens;
                popped.batch.push(entry);
            }
        }
        popped
    }

    /// Empties the queue, for a service that ends.
    pub fn drain(&mut self) -> Vec<Entry<T>> {
        self.queued_tokens = 0;
        self.queue.drain(..).collect()
    }

    /// Entries in the queue.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether the queue is empty.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Tokens in the queue.
    pub fn queued_tokens(&self) -> usize {
        self.queued_tokens
    }

    /// Entries admitted and not yet in a batch, whether pushed or not.
    pub fn waiting(&self) -> usize {
        self.queue.len() + self.admitted
    }
}
