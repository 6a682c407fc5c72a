//! Requests about artefacts to the tracker, and the waits for confirmations.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use ringback_bus::{Bus, Verb};
use ringback_contracts::{Message as _, VERSION, v1};
use ringback_domain::ArtifactId;
use tokio::sync::Notify;
use v1::artifact_refusal::Why;
use v1::artifact_reply::Reply;
use v1::artifact_request::Request;

const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// Why the tracker will not do it, whenever it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The attempt is closed.
    Obsolete,
    /// It does not understand, or does not know the artefact.
    Otherwise,
}

/// Asks until the tracker answers. Whoever must not wait for ever drops this.
pub(crate) async fn ask(bus: &Bus, timeout: Duration, request: Request) -> Result<Reply, Refused> {
    let payload: Bytes =
        v1::ArtifactRequest { version: VERSION, request: Some(request) }.encode_to_vec().into();
    let mut pause = FIRST_RETRY;
    loop {
        let answer = bus.request(Verb::Artifacts, payload.clone(), timeout).await;
        match answer.map(v1::ArtifactReply::decode) {
            Ok(Ok(v1::ArtifactReply { reply: Some(Reply::Refusal(refusal)) })) => match refusal.why() {
                Why::Unavailable => tracing::warn!(reason = refusal.detail, "artefacts wait for the tracker"),
                Why::Obsolete => return Err(Refused::Obsolete),
                Why::Unspecified | Why::NotFound | Why::OtherBytes | Why::Expired => {
                    tracing::error!(reason = refusal.detail, "the tracker refuses artefacts");
                    return Err(Refused::Otherwise);
                }
            },
            Ok(Ok(v1::ArtifactReply { reply: Some(reply) })) => return Ok(reply),
            Ok(Ok(v1::ArtifactReply { reply: None })) | Ok(Err(_)) => return Err(Refused::Otherwise),
            Err(error) => tracing::warn!(%error, "artefacts wait for the tracker"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_RETRY);
    }
}

/// Artefacts that this worker waits for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Waits(Arc<Mutex<HashMap<ArtifactId, Arc<Notify>>>>);

impl Waits {
    fn lock(&self) -> MutexGuard<'_, HashMap<ArtifactId, Arc<Notify>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a wait for some artefacts, before anybody can hear of them.
    pub(crate) fn begin(&self, ids: Vec<ArtifactId>) -> Wait {
        let wake = Arc::new(Notify::new());
        self.lock().extend(ids.iter().map(|id| (*id, Arc::clone(&wake))));
        Wait { ids, wake, waits: self.clone() }
    }

    /// The tracker announced that these need not be waited for.
    pub(crate) fn announced(&self, ids: &[Bytes]) {
        let waits = self.lock();
        for id in ids {
            if let Some(wake) = ArtifactId::from_slice(id).ok().and_then(|id| waits.get(&id)) {
                wake.notify_one();
            }
        }
    }
}

/// A wait under way; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Wait {
    pub(crate) ids: Vec<ArtifactId>,
    wake: Arc<Notify>,
    waits: Waits,
}

impl Wait {
    /// Returns when something was announced.
    pub(crate) async fn woken(&self) {
        self.wake.notified().await;
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let mut waits = self.waits.lock();
        for id in &self.ids {
            waits.remove(id);
        }
    }
}

pub(crate) fn wire(id: &ArtifactId) -> Bytes {
    Bytes::copy_from_slice(id.as_bytes())
}
