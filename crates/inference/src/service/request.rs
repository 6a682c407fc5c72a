//! One call of [`super::EncoderHandle::encode`]: its inputs, what has come so far, and the future that waits for it.

use crate::{
    batcher::Refusal,
    engine::{EngineError, FailureClass},
    observer::{Observer, Outcome, Timings},
    tokenize::{EncodeInput, TokenizeError, TokenizedText},
};
use futures::channel::oneshot;
use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

/// The rows of a request, in the order of its inputs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Encoded {
    /// Numbers per row.
    pub width: usize,
    /// Rows end to end: embeddings, or raw logits (see [`crate::Model::logits_to_scores`]).
    pub values: Vec<f32>,
    /// Tokens of each input, special tokens included, after truncation.
    pub tokens: Vec<u32>,
    /// Whether the input was longer than the model takes.
    pub truncated: Vec<bool>,
    /// Where the time went.
    pub timings: Timings,
}

impl Encoded {
    /// The rows.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.values.chunks_exact(self.width.max(1))
    }

    /// Tokens of all inputs.
    pub fn total_tokens(&self) -> u64 {
        self.tokens.iter().map(|tokens| u64::from(*tokens)).sum()
    }
}

/// Why a request has no rows.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum EncodeError {
    /// There is no room, or too much was asked for at once.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// An input cannot be used.
    #[error("input {index}: {source}")]
    Input {
        /// Which one.
        index: usize,
        /// Why.
        source: TokenizeError,
    },
    /// An input is larger than the service tokenises.
    #[error("input {index} has {found} bytes; at most {limit} are allowed")]
    InputTooLarge {
        /// Which one.
        index: usize,
        /// Its size.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// The deadline passed before the engine took the last input.
    #[error("the deadline passed before the inputs were computed")]
    DeadlineExceeded,
    /// The engine failed on an input of this request.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The service is ending.
    #[error("the encoder is shutting down")]
    ShuttingDown,
}

impl EncodeError {
    /// What the failure means for the request and the process.
    pub fn class(&self) -> FailureClass {
        match self {
            Self::Refused(Refusal::Full { .. }) | Self::ShuttingDown => FailureClass::Transient,
            Self::Refused(Refusal::TooMany { .. } | Refusal::TooLong { .. })
            | Self::Input { .. }
            | Self::InputTooLarge { .. }
            | Self::DeadlineExceeded => FailureClass::Permanent,
            Self::Engine(error) => error.class(),
        }
    }

    fn outcome(&self) -> Outcome {
        match self {
            Self::Refused(_) | Self::Input { .. } | Self::InputTooLarge { .. } => Outcome::Refused,
            Self::DeadlineExceeded => Outcome::Expired,
            Self::Engine(_) | Self::ShuttingDown => Outcome::Failed,
        }
    }
}

/// Resolves when all rows are there or the request has failed. Needs no particular runtime. Dropping it cancels what
/// no engine has taken yet.
#[derive(Debug)]
pub struct EncodeFuture {
    receiver: oneshot::Receiver<Result<Encoded, EncodeError>>,
    request: Option<Arc<Request>>,
}

impl EncodeFuture {
    /// A future that is ready.
    pub(super) fn ready(result: Result<Encoded, EncodeError>) -> Self {
        let (sender, receiver) = oneshot::channel();
        let _ = sender.send(result);
        Self { receiver, request: None }
    }
}

impl Future for EncodeFuture {
    type Output = Result<Encoded, EncodeError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.receiver).poll(context).map(|answer| {
            self.request = None;
            answer.unwrap_or(Err(EncodeError::ShuttingDown))
        })
    }
}

impl Drop for EncodeFuture {
    fn drop(&mut self) {
        if let Some(request) = self.request.take() {
            request.abandon();
        }
    }
}

/// What the threads know about a call.
pub(super) struct Request {
    pub(super) inputs: Vec<EncodeInput>,
    pub(super) deadline: Option<Instant>,
    received: Instant,
    /// Set when nobody waits any more, be it that the caller left or that the answer is out.
    over: AtomicBool,
    progress: Mutex<Progress>,
    observer: Arc<dyn Observer>,
}

struct Progress {
    sender: Option<oneshot::Sender<Result<Encoded, EncodeError>>>,
    encoded: Encoded,
    open: usize,
    last_batch: u64,
}

impl Request {
    pub(super) fn new(
        inputs: Vec<EncodeInput>,
        deadline: Option<Instant>,
        width: usize,
        observer: Arc<dyn Observer>,
    ) -> (Arc<Self>, EncodeFuture) {
        let (sender, receiver) = oneshot::channel();
        let count = inputs.len();
        let encoded = Encoded {
            width,
            values: vec![0.0; count * width],
            tokens: vec![0; count],
            truncated: vec![false; count],
            timings: Timings::default(),
        };
        let request = Arc::new(Self {
            inputs,
            deadline,
            received: Instant::now(),
            over: AtomicBool::new(false),
            progress: Mutex::new(Progress { sender: Some(sender), encoded, open: count, last_batch: 0 }),
            observer,
        });
        let future = EncodeFuture { receiver, request: Some(Arc::clone(&request)) };
        (request, future)
    }

    /// Whether the answer is out or nobody wants it.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes an input's tokens and the time it took to find them.
    pub(super) fn tokenized(&self, index: usize, text: &TokenizedText, took: Duration) {
        {
            let mut progress = self.progress();
            progress.encoded.tokens[index] = u32::try_from(text.ids.len()).unwrap_or(u32::MAX);
            progress.encoded.truncated[index] = text.truncated;
            progress.encoded.timings.tokenization += took;
        }
        self.observer.input(text.ids.len(), text.truncated);
    }

    /// Puts in one row. `batch` is the number of the batch it came from, so that its time counts once.
    pub(super) fn row(&self, index: usize, row: &[f32], waited: Duration, batch: u64, inference: Duration) {
        let answer = {
            let mut progress = self.progress();
            let width = progress.encoded.width;
            progress.encoded.values[index * width..(index + 1) * width].copy_from_slice(row);
            let timings = &mut progress.encoded.timings;
            timings.queue = timings.queue.max(waited);
            if progress.last_batch != batch {
                progress.last_batch = batch;
                progress.encoded.timings.inference += inference;
            }
            progress.open -= 1;
            if progress.open > 0 {
                return;
            }
            progress.encoded.timings.total = self.received.elapsed();
            progress.sender.take().map(|sender| (sender, std::mem::take(&mut progress.encoded)))
        };
        self.over.store(true, Ordering::Release);
        if let Some((sender, encoded)) = answer {
            self.observer.request(Outcome::Succeeded, self.inputs.len(), &encoded.timings);
            let _ = sender.send(Ok(encoded));
        }
    }

    /// Ends the whole request; only the first failure is told.
    pub(super) fn fail(&self, error: EncodeError) {
        self.over.store(true, Ordering::Release);
        let (sender, timings) = {
            let mut progress = self.progress();
            progress.encoded.timings.total = self.received.elapsed();
            (progress.sender.take(), progress.encoded.timings)
        };
        if let Some(sender) = sender {
            self.observer.request(error.outcome(), self.inputs.len(), &timings);
            let _ = sender.send(Err(error));
        }
    }

    fn abandon(&self) {
        self.over.store(true, Ordering::Release);
        let (sender, timings) = {
            let mut progress = self.progress();
            progress.encoded.timings.total = self.received.elapsed();
            (progress.sender.take(), progress.encoded.timings)
        };
        if sender.is_some() {
            self.observer.request(Outcome::Cancelled, self.inputs.len(), &timings);
        }
    }
}

impl std::fmt::Debug for Request {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the inputs: they are the users'.
        formatter.debug_struct("Request").field("inputs", &self.inputs.len()).finish_non_exhaustive()
    }
}
