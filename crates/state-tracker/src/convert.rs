//! From messages to units, and from answers to messages. What a correct sender cannot have sent is refused item by
//! item, so that one malformed item costs its neighbours nothing (P9).

use std::{collections::HashSet, sync::Arc};

use bytes::Bytes;
use ringback_contracts::{ContractError, attempt_of, completion_of, job_id_of, v1};
use ringback_domain::{AttemptRef, JobId, Name, Nonce, TimestampMs};
use ringback_store::{results::StoredPayload, workers::WorkerBeat};

use crate::unit::{Beat, Chunk, Outcome, Told, Unit, What};

/// Reads a worker's id.
pub(crate) fn worker_of(id: &str) -> Result<Arc<str>, ContractError> {
    Name::parse(id).map_err(|_| ContractError::Field { field: "worker_id" })?;
    Ok(id.into())
}

fn payload_of(payload: Option<v1::Payload>) -> StoredPayload {
    let Some(payload) = payload else { return StoredPayload::default() };
    match payload.at {
        None => StoredPayload::default(),
        Some(v1::payload::At::Inline(bytes)) => {
            StoredPayload { size_bytes: bytes.len() as u64, inline: Some(bytes), ..StoredPayload::default() }
        }
        Some(v1::payload::At::BlobKey(key)) => {
            StoredPayload { blob_key: Some(key), size_bytes: payload.size_bytes, ..StoredPayload::default() }
        }
    }
}

/// Reads one outcome.
pub(crate) fn outcome_of(worker: &Arc<str>, o: v1::Outcome) -> Result<Unit, ContractError> {
    use v1::outcome::Result as R;
    let (job, attempt) = attempt_of(o.attempt.as_ref())?;
    let told = match o.result.ok_or(ContractError::Field { field: "result" })? {
        R::Success(s) => {
            // A record of an earlier release tells nothing of it.
            let said = o.completion.map(|c| Arc::new(completion_of(c)));
            Told::Succeeded { output: StoredPayload { said, ..payload_of(s.output) } }
        }
        R::Failure(f) => Told::Failed {
            error: f.error,
            error_type: Some(f.error_type).filter(|t| !t.is_empty()),
            output: payload_of(f.output),
        },
        R::Crash(c) => Told::Crashed { error: c.error },
        R::Overrun(v1::Overrun {}) => Told::Overran,
        R::HandBack(h) => Told::HandedBack { reason: h.reason },
    };
    let what = What::Outcome(Outcome {
        worker: Arc::clone(worker),
        attempt,
        told,
        started_at: TimestampMs(o.started_at_ms),
        execution_ms: o.execution_ms,
        logs: payload_of(o.logs),
    });
    Ok(Unit { job, what })
}

/// Reads one chunk.
pub(crate) fn chunk_of(worker: &Arc<str>, c: v1::Chunk) -> Result<Unit, ContractError> {
    let (job, attempt) = attempt_of(c.attempt.as_ref())?;
    let what = What::Chunk(Chunk {
        worker: Arc::clone(worker),
        attempt,
        n: c.n,
        output: c.output,
        started_at: TimestampMs(c.started_at_ms),
    });
    Ok(Unit { job, what })
}

/// Reads one attempt of a heartbeat.
pub(crate) fn beat_of(worker: &Arc<str>, b: &v1::Beat) -> Result<Unit, ContractError> {
    let (job, attempt) = attempt_of(b.attempt.as_ref())?;
    let what = What::Beat(Beat {
        worker: Arc::clone(worker),
        attempt,
        started_at: TimestampMs(b.started_at_ms),
        progress: Some(b.progress.clone()).filter(|p: &Bytes| !p.is_empty()),
    });
    Ok(Unit { job, what })
}

/// The attempts that a heartbeat lists.
pub(crate) fn listed(beat: &v1::Heartbeat) -> HashSet<(JobId, AttemptRef)> {
    beat.attempts.iter().filter_map(|b| attempt_of(b.attempt.as_ref()).ok()).collect()
}

/// The row of a worker.
pub(crate) fn worker_beat(beat: &v1::Heartbeat) -> WorkerBeat {
    let slots: Vec<serde_json::Value> = beat
        .slots
        .iter()
        .map(|s| {
            serde_json::json!({
                "endpoint_id": s.endpoint_id,
                "total": s.total,
                "busy": s.busy,
                "unavailable": s.unavailable,
            })
        })
        .collect();
    WorkerBeat {
        id: beat.worker_id.clone(),
        draining: beat.draining,
        device: beat.device.clone(),
        slots: serde_json::Value::Array(slots).to_string(),
    }
}

/// Reads a question for a grant.
pub(crate) fn ask_of(request: &v1::GrantRequest, nonce: Nonce) -> Result<Unit, ContractError> {
    let worker = worker_of(&request.worker_id)?;
    let what = What::Ask { worker, run: request.run, publish: request.publish, nonce };
    Ok(Unit { job: job_id_of(&request.job_id)?, what })
}
