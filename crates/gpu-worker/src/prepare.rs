//! From a delivered message to work: permission where it is needed, and the input where it is elsewhere.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ringback_bus::Verb;
use ringback_contracts::{Message as _, VERSION, v1};
use ringback_domain::{AttemptRef, JobId, Nonce};
use ringback_service_runtime::blobs::{BlobError, BlobKey};

use crate::executor::{JobKey, Work};
use crate::message::Message;
use crate::shared::Shared;

/// How long a message goes back when the tracker cannot be asked.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// The same when this very worker still holds the job.
const STILL_HELD: Duration = Duration::from_secs(1);

/// A job that may run.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) work: Work,
    pub(crate) message: Message,
    /// Whether the tracker opened this attempt: then it must hear how it ends.
    pub(crate) granted: bool,
    pub(crate) traceparent: String,
    /// Why it cannot run after all, though it was granted or its input is gone for good.
    pub(crate) refused: Option<Refused>,
    /// What its input names is in the folder, or it names nothing.
    pub(crate) inputs_fetched: bool,
}

/// Why a prepared job does not run.
#[derive(Debug)]
pub(crate) enum Refused {
    /// It may run elsewhere or later.
    HandBack(&'static str),
    /// It can never run.
    Fail(String),
}

/// What a message asks for.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) job_id: JobId,
    pub(crate) job: v1::JobMessage,
    pub(crate) message: Message,
    pub(crate) traceparent: String,
    pub(crate) must_ask: bool,
}

impl Incoming {
    /// Work that needs nothing more: a first delivery with its input inline.
    pub(crate) fn direct(self) -> Result<Prepared, Box<Self>> {
        let inline = match self.job.input.as_ref().and_then(|payload| payload.at.as_ref()) {
            Some(v1::payload::At::Inline(bytes)) => Some(bytes.clone()),
            Some(v1::payload::At::BlobKey(_)) | None => None,
        };
        match inline {
            Some(input) if !self.must_ask => {
                let attempt = AttemptRef { run: self.job.run, attempt: 1, nonce: Nonce(rand::random()) };
                Ok(self.prepared(attempt, false, input, None))
            }
            _ => Err(Box::new(self)),
        }
    }

    fn prepared(
        self,
        attempt: AttemptRef,
        granted: bool,
        input: Bytes,
        refused: Option<Refused>,
    ) -> Prepared {
        let work = Work {
            key: JobKey { job: self.job_id, attempt },
            public_id: self.job_id.public(self.job.sync_id),
            input,
            extra_json: self.job.extra_json,
            timeout: Duration::from_millis(self.job.execution_timeout_ms.max(1)),
        };
        Prepared {
            work,
            message: self.message,
            granted,
            traceparent: self.traceparent,
            refused,
            inputs_fetched: false,
        }
    }
}

/// Asks and fetches. `None`: the message was dealt with, there is nothing to run.
pub(crate) async fn prepare(shared: Arc<Shared>, incoming: Box<Incoming>) -> Option<Prepared> {
    let incoming = *incoming;
    let (attempt, granted) = if incoming.must_ask {
        (grant(&shared, &incoming).await?, true)
    } else {
        (AttemptRef { run: incoming.job.run, attempt: 1, nonce: Nonce(rand::random()) }, false)
    };
    match fetch(&shared, &incoming).await {
        Ok(input) => Some(incoming.prepared(attempt, granted, input, None)),
        Err(error @ (BlobError::NotFound(_) | BlobError::BadKey(_) | BlobError::TooLarge { .. })) => {
            let refused = Refused::Fail(format!("the job's input cannot be read: {error}"));
            Some(incoming.prepared(attempt, granted, Bytes::new(), Some(refused)))
        }
        Err(error) => {
            tracing::warn!(%error, job_id = %incoming.job_id, "an input cannot be fetched");
            let refused = Refused::HandBack("the job's input cannot be fetched now");
            Some(incoming.prepared(attempt, granted, Bytes::new(), Some(refused)))
        }
    }
}

async fn fetch(shared: &Shared, incoming: &Incoming) -> Result<Bytes, BlobError> {
    let payload = incoming.job.input.as_ref();
    match payload.and_then(|payload| payload.at.as_ref()) {
        Some(v1::payload::At::Inline(bytes)) => Ok(bytes.clone()),
        Some(v1::payload::At::BlobKey(key)) => {
            let key = BlobKey::new(key.clone())?;
            shared.blobs.get(&key, shared.blobs.max_blob_bytes()).await
        }
        None => Ok(Bytes::from_static(b"null")),
    }
}

/// The tracker's permission for a message that may have been worked on before.
async fn grant(shared: &Shared, incoming: &Incoming) -> Option<AttemptRef> {
    if shared.outcomes.holds(incoming.job_id).await {
        incoming.message.nak(Some(STILL_HELD)).await;
        return None;
    }
    let request = v1::GrantRequest {
        version: VERSION,
        worker_id: shared.worker_id.clone(),
        job_id: Bytes::copy_from_slice(incoming.job_id.as_bytes()),
        run: incoming.job.run,
        publish: incoming.job.publish,
    };
    let payload = request.encode_to_vec().into();
    let answer = shared.bus.request(Verb::Grant, payload, shared.settings.request_timeout).await;
    let answer = match answer.map(v1::GrantReply::decode) {
        Ok(Ok(reply)) => reply.answer,
        Ok(Err(error)) => {
            tracing::warn!(%error, "unreadable answer to a grant request");
            None
        }
        Err(error) => {
            tracing::warn!(%error, job_id = %incoming.job_id, "the tracker cannot be asked for a grant");
            None
        }
    };
    match answer {
        Some(v1::grant_reply::Answer::Run(run)) => {
            return Some(AttemptRef { run: incoming.job.run, attempt: run.attempt, nonce: Nonce(run.nonce) });
        }
        Some(v1::grant_reply::Answer::Wait(wait)) => {
            incoming.message.nak(Some(Duration::from_millis(wait.retry_after_ms.max(10)))).await;
        }
        Some(v1::grant_reply::Answer::Drop(drop)) => {
            tracing::debug!(job_id = %incoming.job_id, reason = drop.reason, "a message is void");
            incoming.message.ack().await;
        }
        None => incoming.message.nak(Some(ASK_AGAIN)).await,
    }
    None
}
