//! Artefacts whose time came: waits that nobody ended, ends of retention, files that were announced and never stored.
//! The tracker judges each again in its commit; blobs are deleted after it, and the rows remember until then.

use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use ringback_bus::Verb;
use ringback_contracts::{VERSION, v1};
use ringback_service_runtime::{blobs::BlobKey, fault};
use serde::Serialize;
use v1::{artifact_reply::Reply, artifact_request::Request};

use crate::context::{Context, PassError};

/// Pages of one pass; the next pass goes on.
const PAGES_PER_PASS: u32 = 50;
const ASK_WITHIN: Duration = Duration::from_secs(10);

/// What the pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Artefacts that were given up, expired or forgotten.
    pub changed: u64,
    /// Blobs deleted.
    pub blobs: u64,
    /// Blobs that could not be deleted now; the next pass tries again.
    pub left: u64,
}

pub(crate) async fn run(context: &Context) -> Result<Report, PassError> {
    let mut report = Report::default();
    for _ in 0..PAGES_PER_PASS {
        let due = Request::Due(v1::DueArtifacts { limit: context.chunk() });
        let states = ask(context, due).await?;
        report.changed += u64::from(states.changed);
        fault::point("reconciler.artifacts.blobs");
        let mut gone: Vec<Bytes> = Vec::with_capacity(states.blobs.len());
        for blob in states.blobs {
            let deleted = match BlobKey::new(blob.blob_key) {
                Ok(key) => context.blobs.delete(&key).await,
                Err(error) => Err(error),
            };
            match deleted {
                Ok(()) => gone.push(blob.id),
                Err(error) => {
                    report.left += 1;
                    tracing::warn!(%error, "the bytes of an expired artefact were not deleted");
                }
            }
        }
        report.blobs += gone.len() as u64;
        if !gone.is_empty() {
            ask(context, Request::BlobsGone(v1::ArtifactBlobsGone { ids: gone })).await?;
        }
        // What is left is due again at once: looking again now would find only that.
        if !states.more || report.left > 0 {
            break;
        }
    }
    Ok(report)
}

async fn ask(context: &Context, request: Request) -> Result<v1::ArtifactStates, PassError> {
    let message = v1::ArtifactRequest { version: VERSION, request: Some(request) };
    let answer = context.bus.request(Verb::Artifacts, message.encode_to_vec().into(), ASK_WITHIN).await?;
    let reply = v1::ArtifactReply::decode(answer)
        .map_err(|error| PassError::Refused(format!("its answer cannot be read: {error}")))?;
    match reply.reply {
        Some(Reply::States(states)) => Ok(states),
        Some(Reply::Refusal(refusal)) => Err(PassError::Refused(refusal.detail)),
        Some(Reply::Links(_)) | None => Err(PassError::Refused("an answer of another kind".to_owned())),
    }
}
