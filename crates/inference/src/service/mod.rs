//! Tokenizer threads, one thread that owns the engine and the queue, one that hands out results.
//!
//! The queue is read as late as possible: a batch is made when the engine can take it, up to
//! [`Engine::pipeline_depth`] at a time, so an engine on a device has exactly one batch prefetched.

mod engine_thread;
mod finisher;
mod request;
mod tokenizers;

pub use request::{EncodeError, EncodeFuture, Encoded};

use crate::{
    batcher::{BatchLimits, Batcher},
    engine::{Engine, EngineError, EngineInfo},
    model::Model,
    observer::Observer,
    priority,
    tokenize::{EncodeInput, TokenizedText},
};
use request::Request;
use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread::{self, JoinHandle},
    time::Instant,
};

/// Settings of a service. Limits beyond what the engine takes are lowered to that.
#[derive(Clone, Debug)]
pub struct ServiceOptions {
    /// Most tokens of a batch.
    pub max_batch_tokens: usize,
    /// Most sequences of a batch.
    pub max_batch_sequences: usize,
    /// No request is taken while this many tokens wait.
    pub max_queued_tokens: usize,
    /// Most inputs that wait, and so most inputs of one request.
    pub max_queued_inputs: usize,
    /// Largest input in bytes.
    pub max_input_bytes: usize,
    /// Tokenizer threads; 0 means one per core.
    pub tokenizer_threads: usize,
}

impl Default for ServiceOptions {
    fn default() -> Self {
        Self {
            max_batch_tokens: 16_384,
            max_batch_sequences: 2_048,
            max_queued_tokens: 1 << 20,
            max_queued_inputs: 1 << 16,
            max_input_bytes: 1 << 20,
            tokenizer_threads: 0,
        }
    }
}

/// Why a service did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The largest batch did not run.
    #[error("the engine did not warm up: {0}")]
    WarmUp(#[from] EngineError),
    /// The system gave no thread.
    #[error("a thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
}

/// How the engine is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceHealth {
    /// It works.
    Ready,
    /// Its last check failed; another batch may work.
    Degraded(EngineError),
    /// No further batch can work in this process.
    Poisoned(EngineError),
    /// The service was told to end.
    Stopped,
}

/// A running encoder. Dropping it ends it as [`EncoderService::shutdown`] does.
#[derive(Debug)]
pub struct EncoderService {
    handle: EncoderHandle,
    threads: Vec<JoinHandle<()>>,
}

/// Where requests go in. Cheap to clone; works until the service ends.
#[derive(Clone, Debug)]
pub struct EncoderHandle {
    shared: Arc<Shared>,
}

/// One sequence on its way through the engine.
struct Sequence {
    request: Arc<Request>,
    index: usize,
    text: TokenizedText,
    queued_at: Instant,
}

type Entry = crate::batcher::Entry<Sequence>;

struct Shared {
    model: Model,
    info: EngineInfo,
    options: ServiceOptions,
    observer: Arc<dyn Observer>,
    queue: Mutex<Queue>,
    queue_changed: Condvar,
    texts: Mutex<VecDeque<(Arc<Request>, Range<usize>)>>,
    texts_changed: Condvar,
}

struct Queue {
    batcher: Batcher<Sequence>,
    health: ServiceHealth,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells what is queued, under the lock of the queue: told after it, an older state could be the last that is heard
    /// and stand for as long as nothing comes.
    fn tell(&self, queue: &Queue) {
        self.observer.queue(queue.batcher.len(), queue.batcher.queued_tokens());
    }

    /// Why nothing more is taken, once that is so.
    fn closed(health: &ServiceHealth) -> Option<EncodeError> {
        match health {
            ServiceHealth::Ready | ServiceHealth::Degraded(_) => None,
            ServiceHealth::Poisoned(error) => Some(EncodeError::Engine(error.clone())),
            ServiceHealth::Stopped => Some(EncodeError::ShuttingDown),
        }
    }

    /// Takes no more and fails what waits.
    fn close(&self, health: ServiceHealth) {
        let entries = {
            let mut queue = self.queue();
            if Self::closed(&queue.health).is_none() {
                queue.health = health;
            }
            let entries = queue.batcher.drain();
            self.tell(&queue);
            entries
        };
        self.queue_changed.notify_all();
        let texts = {
            let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *texts)
        };
        self.texts_changed.notify_all();
        let why = {
            let mut queue = self.queue();
            queue.batcher.release(texts.iter().map(|(_, range)| range.len()).sum());
            Self::closed(&queue.health).unwrap_or(EncodeError::ShuttingDown)
        };
        let waiting = entries.into_iter().map(|entry| entry.payload.request);
        for request in waiting.chain(texts.into_iter().map(|(request, _)| request)) {
            request.fail(why.clone());
        }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Shared").field("engine", &self.info).finish_non_exhaustive()
    }
}

impl EncoderService {
    /// Starts the threads and warms the engine up, which blocks until the largest batch has run.
    ///
    /// # Errors
    /// If that batch fails, or the system gives no threads.
    pub fn start(
        model: Model,
        engine: Box<dyn Engine>,
        mut options: ServiceOptions,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, StartError> {
        let info = engine.info().clone();
        options.max_batch_tokens = options.max_batch_tokens.clamp(1, info.max_batch_tokens);
        options.max_batch_sequences = options.max_batch_sequences.clamp(1, info.max_batch_sequences);
        let limits = BatchLimits {
            max_batch_tokens: options.max_batch_tokens,
            max_batch_sequences: options.max_batch_sequences,
            max_queued_tokens: options.max_queued_tokens.max(1),
            max_queued_entries: options.max_queued_inputs.max(1),
        };
        let tokenizer_threads = match options.tokenizer_threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            given => given,
        };
        let shared = Arc::new(Shared {
            model,
            info,
            options,
            observer,
            queue: Mutex::new(Queue { batcher: Batcher::new(limits), health: ServiceHealth::Ready }),
            queue_changed: Condvar::new(),
            texts: Mutex::new(VecDeque::new()),
            texts_changed: Condvar::new(),
        });
        // From here on a dropped `service` ends the threads that were started.
        let mut service = Self { handle: EncoderHandle { shared: Arc::clone(&shared) }, threads: Vec::new() };
        let (results, received) = mpsc::channel();
        let (warm, warmed) = mpsc::channel();
        let of = Arc::clone(&shared);
        service.spawn("encoder-engine", move || engine_thread::run(&of, engine, &results, &warm))?;
        service.spawn("encoder-results", move || finisher::run(&received))?;
        for _ in 0..tokenizer_threads {
            let of = Arc::clone(&shared);
            service.spawn("encoder-tokens", move || tokenizers::run(&of))?;
        }
        match warmed.recv() {
            Ok(Ok(())) => Ok(service),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => {
                let detail = "its thread ended while it warmed up".to_owned();
                Err(EngineError::Poisoned { detail }.into())
            }
        }
    }

    fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), StartError> {
        let body = move || {
            priority::lower();
            body();
        };
        self.threads.push(thread::Builder::new().name(name.to_owned()).spawn(body)?);
        Ok(())
    }

    /// Where requests go in.
    pub fn handle(&self) -> EncoderHandle {
        self.handle.clone()
    }

    /// Fails what is queued, lets the engine finish what it has begun, and waits for the threads.
    pub fn shutdown(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.handle.shared.close(ServiceHealth::Stopped);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for EncoderService {
    fn drop(&mut self) {
        self.end();
    }
}

impl EncoderHandle {
    /// Encodes `inputs`, one row each. The rows may come from several batches, shared with other callers.
    ///
    /// Nothing waits for the future to be polled: the work begins at once. An entry that no engine has taken at
    /// `deadline` fails the request.
    pub fn encode(&self, inputs: Vec<EncodeInput>, deadline: Option<Instant>) -> EncodeFuture {
        let shared = &self.shared;
        let count = inputs.len();
        if count == 0 {
            return EncodeFuture::ready(Ok(Encoded {
                width: shared.info.output_width,
                ..Encoded::default()
            }));
        }
        let (request, future) =
            Request::new(inputs, deadline, shared.info.output_width, Arc::clone(&shared.observer));
        if let Err(error) = self.admit(&request) {
            request.fail(error);
            return future;
        }
        {
            let mut texts = shared.texts.lock().unwrap_or_else(PoisonError::into_inner);
            // `close` changes the health before it empties the list: what it did not see there is ours to give back.
            let mut queue = shared.queue();
            if let Some(error) = Shared::closed(&queue.health) {
                queue.batcher.release(count);
                drop((queue, texts));
                request.fail(error);
                return future;
            }
            drop(queue);
            let pieces = (0..count)
                .step_by(tokenizers::PIECE)
                .map(|start| (Arc::clone(&request), start..count.min(start + tokenizers::PIECE)));
            texts.extend(pieces);
        }
        if count > tokenizers::PIECE {
            shared.texts_changed.notify_all();
        } else {
            shared.texts_changed.notify_one();
        }
        future
    }

    fn admit(&self, request: &Request) -> Result<(), EncodeError> {
        let limit = self.shared.options.max_input_bytes;
        let sizes = request.inputs.iter().map(EncodeInput::bytes);
        if let Some((index, found)) = sizes.enumerate().find(|(_, bytes)| *bytes > limit) {
            return Err(EncodeError::InputTooLarge { index, found, limit });
        }
        let mut queue = self.shared.queue();
        if let Some(error) = Shared::closed(&queue.health) {
            return Err(error);
        }
        Ok(queue.batcher.admit(request.inputs.len())?)
    }

    /// How the engine is.
    pub fn health(&self) -> ServiceHealth {
        self.shared.queue().health.clone()
    }

    /// What the engine is.
    pub fn engine(&self) -> &EngineInfo {
        &self.shared.info
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.shared.model
    }

    /// The settings in force.
    pub fn options(&self) -> &ServiceOptions {
        &self.shared.options
    }

    /// Inputs admitted and not yet in a batch.
    pub fn waiting(&self) -> usize {
        self.shared.queue().batcher.waiting()
    }
}
