//! Whom a service tells what happened, so that this crate needs no metrics library.

use std::time::Duration;

/// One batch that an engine ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchReport {
    /// Sequences in it.
    pub sequences: usize,
    /// Tokens in it.
    pub tokens: usize,
    /// From its submission to its results.
    pub inference: Duration,
    /// Whether it gave results.
    pub succeeded: bool,
}

/// Where the time of one request went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Spent by tokenizer threads on its inputs, added up.
    pub tokenization: Duration,
    /// The longest wait of one of its sequences between tokenizer and engine.
    pub queue: Duration,
    /// The batches that it took part in, added up.
    pub inference: Duration,
    /// From the call to the answer.
    pub total: Duration,
}

/// Why a request or a sequence was not computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// All rows are there.
    Succeeded,
    /// Refused at the door: queue full, or an input that cannot be used.
    Refused,
    /// The caller went away.
    Cancelled,
    /// The deadline passed.
    Expired,
    /// The engine or the service failed.
    Failed,
}

/// Called from the threads of a service; must not block. Everything is optional.
pub trait Observer: Send + Sync + 'static {
    /// A batch ended.
    fn batch(&self, _report: &BatchReport) {}
    /// What is queued now, after each change and in the order of the changes: the queue is locked meanwhile.
    fn queue(&self, _entries: usize, _tokens: usize) {}
    /// A request ended.
    fn request(&self, _outcome: Outcome, _inputs: usize, _timings: &Timings) {}
    /// How many tokens an input had.
    fn input(&self, _tokens: usize, _truncated: bool) {}
}

/// Nobody listens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unobserved;

impl Observer for Unobserved {}
