//! Conversions that refuse what a correct sender cannot have sent.

use prost::Message;
use ringback_domain::webhook::response::Profile;
use ringback_domain::{
    AttemptRef, BatchId, JobId, JobStatus, Nonce,
    event::Completion,
    job::EndReason,
    target::{BodyFormat, EventScope, Target},
};
use thiserror::Error;

use crate::{VERSION, v1};

/// A message that cannot be understood. Permanent: sending it again does not help.
#[derive(Debug, Error)]
pub enum ContractError {
    /// Not a protobuf message of this type.
    #[error("the message cannot be decoded")]
    Decode(#[from] prost::DecodeError),
    /// Written by a release that this one does not know.
    #[error("message version {got} is not one of those this release reads (up to {VERSION})")]
    Version {
        /// Version found.
        got: u32,
    },
    /// A field that must be there is absent or malformed.
    #[error("field `{field}` is missing or malformed")]
    Field {
        /// The field's name in proto/.
        field: &'static str,
    },
}

/// Accepts the versions this release can read.
pub const fn read_version(got: u32) -> Result<(), ContractError> {
    if got >= 1 && got <= VERSION { Ok(()) } else { Err(ContractError::Version { got }) }
}

/// What is known of a completion, as a worker sends it.
#[must_use]
pub fn completion_to_wire(c: Completion) -> v1::Completion {
    let Completion {
        model,
        content,
        content_cut,
        finish_reason,
        prompt_tokens,
        completion_tokens,
        total_tokens,
    } = c;
    v1::Completion {
        model,
        content,
        content_cut,
        finish_reason,
        prompt_tokens,
        completion_tokens,
        total_tokens,
    }
}

/// Reads [`completion_to_wire`] back.
#[must_use]
pub fn completion_of(c: v1::Completion) -> Completion {
    Completion {
        model: c.model,
        content: c.content,
        content_cut: c.content_cut,
        finish_reason: c.finish_reason,
        prompt_tokens: c.prompt_tokens,
        completion_tokens: c.completion_tokens,
        total_tokens: c.total_tokens,
    }
}

/// Reads a 16-byte job id.
pub fn job_id_of(bytes: &[u8]) -> Result<JobId, ContractError> {
    JobId::from_slice(bytes).map_err(|_| ContractError::Field { field: "job_id" })
}

/// Reads a 16-byte batch id; empty bytes mean none.
pub fn batch_id_of(bytes: &[u8]) -> Result<Option<BatchId>, ContractError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    BatchId::from_slice(bytes).map(Some).map_err(|_| ContractError::Field { field: "batch_id" })
}

/// Reads the fence of a worker's message.
pub fn attempt_of(attempt: Option<&v1::Attempt>) -> Result<(JobId, AttemptRef), ContractError> {
    let a = attempt.ok_or(ContractError::Field { field: "attempt" })?;
    if a.run == 0 || a.attempt == 0 {
        return Err(ContractError::Field { field: "attempt.run" });
    }
    Ok((job_id_of(&a.job_id)?, AttemptRef { run: a.run, attempt: a.attempt, nonce: Nonce(a.nonce) }))
}

/// Writes the fence of a worker's message.
#[must_use]
pub fn attempt_to_wire(job: &JobId, r: &AttemptRef) -> v1::Attempt {
    v1::Attempt {
        job_id: bytes::Bytes::copy_from_slice(job.as_bytes()),
        run: r.run,
        attempt: r.attempt,
        nonce: r.nonce.0,
    }
}

/// A payload from bytes that are small enough to be inline.
#[must_use]
pub fn payload_of(inline: bytes::Bytes) -> v1::Payload {
    v1::Payload { size_bytes: inline.len() as u64, at: Some(v1::payload::At::Inline(inline)) }
}

/// Reads `jobs.targets`.
pub fn targets_of(stored: &[u8]) -> Result<Vec<Target>, ContractError> {
    let wire = v1::Targets::decode(stored)?;
    Ok(wire
        .targets
        .into_iter()
        .map(|t| Target {
            url: t.url,
            scope: if t.all_events { EventScope::All } else { EventScope::Terminal },
            format: match (t.runflow, t.v2_body) {
                (true, _) => BodyFormat::Runflow,
                (false, true) => BodyFormat::RunpodWebhookV2,
                (false, false) => BodyFormat::RunpodWebhook,
            },
            profile: match t.profile {
                1 => Some(Profile::Standard),
                2 => Some(Profile::RunpodStrict),
                _ => None,
            },
        })
        .collect())
}

/// Writes `jobs.targets`.
#[must_use]
pub fn targets_to_bytes(targets: &[Target]) -> Vec<u8> {
    let wire = v1::Targets {
        targets: targets
            .iter()
            .map(|t| v1::Target {
                url: t.url.clone(),
                all_events: t.scope == EventScope::All,
                v2_body: t.format == BodyFormat::RunpodWebhookV2,
                runflow: t.format == BodyFormat::Runflow,
                profile: match t.profile {
                    None => 0,
                    Some(Profile::Standard) => 1,
                    Some(Profile::RunpodStrict) => 2,
                },
            })
            .collect(),
    };
    wire.encode_to_vec()
}

/// Entries kept per job; older ones in the middle are dropped, the first one stays.
const HISTORY_MAX_ENTRIES: usize = 200;

/// Appends one entry to `jobs.history`. Protobuf concatenates repeated fields, so nothing is decoded until the
/// history grows past its cap.
pub fn history_append(
    history: &mut Vec<u8>,
    seq: u32,
    status: JobStatus,
    run: u32,
    attempt: u32,
    at_ms: i64,
    reason: Option<EndReason>,
) {
    let entry = v1::HistoryEntry {
        seq,
        status: u32::from(status.code()),
        run,
        attempt,
        at_ms,
        reason: reason.map_or(0, |r| u32::from(r.code()) + 1),
    };
    if history.len() > HISTORY_MAX_ENTRIES * 24
        && let Ok(mut kept) = v1::History::decode(history.as_slice())
        && kept.entries.len() >= HISTORY_MAX_ENTRIES
    {
        kept.entries.drain(1..=kept.entries.len() / 2);
        *history = kept.encode_to_vec();
    }
    history.extend(v1::History { entries: vec![entry] }.encode_to_vec());
}

/// Reads `jobs.history`.
pub fn history_of(stored: &[u8]) -> Result<v1::History, ContractError> {
    Ok(v1::History::decode(stored)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_read_back() {
        let mut t = Target::of_submit(Some("https://a/x?y=1"), Some("https://b"), false);
        t.push(Target::of_callback("https://c"));
        assert_eq!(targets_of(&targets_to_bytes(&t)).unwrap(), t);
        assert!(targets_of(&[]).unwrap().is_empty());
    }

    #[test]
    fn history_keeps_its_first_entry_and_stays_bounded() {
        let mut h = Vec::new();
        for seq in 1..=10_000 {
            history_append(
                &mut h,
                seq,
                JobStatus::InQueue,
                1,
                0,
                1_800_000_000_000,
                Some(EndReason::WorkerLost),
            );
        }
        assert!(h.len() < 16_384, "{}", h.len());
        let entries = history_of(&h).unwrap().entries;
        assert_eq!(entries[0].seq, 1);
        assert_eq!(entries.last().unwrap().seq, 10_000);
    }

    #[test]
    fn a_worker_cannot_speak_for_run_or_attempt_zero() {
        let id = JobId::from_parts(1, [1; 10]);
        let good = AttemptRef { run: 1, attempt: 1, nonce: Nonce(u64::MAX) };
        assert_eq!(attempt_of(Some(&attempt_to_wire(&id, &good))).unwrap(), (id, good));
        for bad in [AttemptRef { run: 0, ..good }, AttemptRef { attempt: 0, ..good }] {
            assert!(attempt_of(Some(&attempt_to_wire(&id, &bad))).is_err());
        }
        assert!(attempt_of(None).is_err());
        assert!(job_id_of(&[0; 15]).is_err());
        assert!(read_version(0).is_err() && read_version(2).is_err() && read_version(1).is_ok());
    }
}
