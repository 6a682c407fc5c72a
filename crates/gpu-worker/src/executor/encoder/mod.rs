//! `builtin.encoder`: a text encoder in this process. All jobs of the endpoint share one queue of texts, so many jobs
//! of one text fill a batch as one job of many texts does.
//!
//! What a job may meet: a cancel or a time limit drops the future, and with it what no batch has taken yet; a text that
//! cannot be used fails its job with the text's index; an engine that is ruined (a sticky GPU error) hands all jobs back
//! and ends the worker, see [`Fatal`].

mod input;
mod load;
mod metrics;
mod output;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use ringback_inference::{
    EncodeError, EncodeInput, Encoded, EncoderHandle, EncoderService, EngineError, FailureClass, Refusal,
    ServiceHealth,
};
use tokio::sync::Semaphore;

pub use load::LoadFailed;

use super::tasks::Run;
use super::{End, Work};
use crate::fatal::Fatal;
use input::{Asked, BadInput, Limits, Request};

/// Inputs of this size are read, and outputs of this many numbers written, on a thread that may block.
const BLOCKING_BYTES: usize = 32 * 1024;
const BLOCKING_NUMBERS: usize = 16 * 1024;
/// A queue that is full is asked again after this time.
const FULL_PAUSE: Duration = Duration::from_millis(20);
/// A job whose engine failed for now keeps its slot so long before it goes back.
const FAILED_PAUSE: Duration = Duration::from_secs(1);

/// A loaded model and its engine.
pub(crate) struct Encoder {
    handle: EncoderHandle,
    /// Ends with the executor.
    _service: EncoderService,
    /// One permit per text that may wait: a job waits for its room here rather than being refused.
    room: Semaphore,
    room_size: usize,
    limits: Limits,
    model_name: String,
    started_s: i64,
    fatal: Fatal,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").field("model", &self.model_name).finish_non_exhaustive()
    }
}

impl Run for Encoder {
    fn run(self: Arc<Self>, work: Work) -> BoxFuture<'static, End> {
        Box::pin(async move {
            let timeout = work.timeout;
            let deadline = Instant::now() + timeout;
            tokio::time::timeout(timeout, self.job(work.input, deadline)).await.unwrap_or(End::Overrun)
        })
    }

    fn trouble(&self) -> Option<String> {
        match self.handle.health() {
            ServiceHealth::Ready => None,
            ServiceHealth::Degraded(error) | ServiceHealth::Poisoned(error) => Some(error.to_string()),
            ServiceHealth::Stopped => Some("the encoder has stopped".to_owned()),
        }
    }
}

impl Encoder {
    async fn job(self: &Arc<Self>, input: Bytes, deadline: Instant) -> End {
        let limits = self.limits;
        let large = input.len() > BLOCKING_BYTES;
        let asked = match on_thread(large, move || input::read(&input, limits)).await {
            Ok(Asked::Encode(request)) => request,
            Ok(Asked::Models) => return End::Success(Some(output::models(&self.model_name, self.started_s))),
            Err(BadInput::Field(text)) => return End::bad_input(text),
            Err(BadInput::Route(text)) => {
                let error = serde_json::json!({"message": text, "type": "not_found_error", "code": 404});
                return End::Failure {
                    error: error.to_string(),
                    error_type: "NotFound".to_owned(),
                    output: None,
                };
            }
        };
        let room = u32::try_from(asked.inputs.len().min(self.room_size)).unwrap_or(u32::MAX);
        // Closed never; the order of waiters is that of their jobs.
        let Ok(_room) = self.room.acquire_many(room).await else { return back("the encoder has stopped") };
        match self.encode(&asked.inputs, deadline).await {
            Ok(encoded) => self.answer(asked, encoded).await,
            Err(error) => {
                if matches!(&error, EncodeError::Engine(e) if e.class() == FailureClass::Transient) {
                    // The job comes again: not at once, and not a thousand times a second.
                    tokio::time::sleep(FAILED_PAUSE).await;
                }
                self.failed(&asked, error)
            }
        }
    }

    async fn encode(&self, inputs: &[EncodeInput], deadline: Instant) -> Result<Encoded, EncodeError> {
        loop {
            match self.handle.encode(inputs.to_vec(), Some(deadline)).await {
                // Room is given before an input counts as taken: the two may differ for a moment.
                Err(EncodeError::Refused(Refusal::Full { .. })) => tokio::time::sleep(FULL_PAUSE).await,
                ended => return ended,
            }
        }
    }

    async fn answer(self: &Arc<Self>, request: Request, encoded: Encoded) -> End {
        if let Some(index) = encoded.truncated.iter().position(|cut| *cut).filter(|_| request.refuse_long) {
            let most = self.handle.model().encoder().max_seq_len;
            return End::bad_input(format!(
                "`{}[{index}]` has more than the {most} tokens that the model reads; shorten it, or send \"truncate\": true",
                request.field
            ));
        }
        let large = encoded.values.len() > BLOCKING_NUMBERS;
        let this = Arc::clone(self);
        let written = on_thread(large, move || {
            output::render(this.handle.model(), &this.model_name, &request, encoded)
        });
        End::Success(Some(written.await))
    }

    fn failed(&self, request: &Request, error: EncodeError) -> End {
        let field = request.field;
        match error {
            EncodeError::Input { index, source } => End::bad_input(format!("`{field}[{index}]`: {source}")),
            EncodeError::InputTooLarge { index, found, limit } => End::bad_input(format!(
                "`{field}[{index}]` has {found} bytes, at most {limit} are allowed (setting max_input_bytes)"
            )),
            EncodeError::Refused(Refusal::TooMany { .. } | Refusal::TooLong { .. }) => {
                End::bad_input(error.to_string())
            }
            EncodeError::Refused(Refusal::Full { .. }) | EncodeError::ShuttingDown => {
                back("the encoder is shutting down")
            }
            EncodeError::DeadlineExceeded => End::Overrun,
            EncodeError::Engine(error) => match error.class() {
                FailureClass::Permanent => End::Failure {
                    error: error.to_string(),
                    error_type: "EngineError".to_owned(),
                    output: None,
                },
                FailureClass::Transient => back("the engine failed for now"),
                FailureClass::Poisoned => self.poisoned(&error),
            },
        }
    }

    /// Nothing can be computed in this process any more.
    fn poisoned(&self, error: &EngineError) -> End {
        self.fatal.report(format!("{error} (model {})", self.model_name));
        back("the engine is ruined: the worker ends")
    }
}

fn back(reason: &'static str) -> End {
    End::HandBack { reason }
}

/// Runs something short at once, something long on a thread that may block.
async fn on_thread<T: Send + 'static>(long: bool, work: impl FnOnce() -> T + Send + 'static) -> T {
    if !long {
        return work();
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only a runtime that ends drops such a task.
            Err(_) => std::future::pending().await,
        },
    }
}
