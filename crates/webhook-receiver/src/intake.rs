//! The way in: a trusted body is on disk before anybody is told that it is taken.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use ringback_service_runtime::time::now_ms;
use sha2::{Digest as _, Sha256};
use tokio::sync::{Notify, oneshot};

use crate::event::{Event, ParseError};
use crate::observe::{Observer, Step};
use crate::router::RouterMetrics;
use crate::store::{Accepted, Journal, NewEvent, StoreError};
use crate::verify::Proof;
use ringback_domain::artifact::hex;

/// Longer keys are hashed.
const MAX_KEY_BYTES: usize = 300;
/// The kind of a body that nobody can read.
pub(crate) const UNREADABLE: &str = "unreadable";

/// An event that is on disk.
#[derive(Debug, Clone)]
pub struct Taken {
    /// What identifies it.
    pub key: String,
    /// Whether it is new.
    pub accepted: Accepted,
}

/// Why an event was not taken.
#[derive(Debug, Clone, thiserror::Error)]
pub enum IntakeError {
    /// It is none.
    #[error(transparent)]
    Invalid(#[from] ParseError),
    /// It could not be written down: the sender must try again.
    #[error(transparent)]
    Store(#[from] StoreError),
}

type Waiters = Mutex<HashMap<String, Vec<oneshot::Sender<()>>>>;

/// Takes events for one receiver. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Intake {
    journal: Arc<dyn Journal>,
    metrics: Arc<RouterMetrics>,
    observer: Observer,
    work: Arc<Notify>,
    waiters: Arc<Waiters>,
}

impl Intake {
    /// Takes events into `journal`.
    #[must_use]
    pub fn new(journal: Arc<dyn Journal>, metrics: Arc<RouterMetrics>, observer: Observer) -> Self {
        Self { journal, metrics, observer, work: Arc::default(), waiters: Arc::default() }
    }

    /// Who is told of steps.
    #[must_use]
    pub fn observer(&self) -> &Observer {
        &self.observer
    }

    /// The store.
    #[must_use]
    pub fn journal(&self) -> &Arc<dyn Journal> {
        &self.journal
    }

    /// Rings when there is work.
    pub(crate) fn work(&self) -> &Arc<Notify> {
        &self.work
    }

    /// Writes a trusted event down. Once this answers, a crash loses nothing.
    ///
    /// # Errors
    /// [`IntakeError::Store`]: nothing is promised, the sender must try again.
    pub async fn take(&self, proof: &Proof, event: &Event, body: Bytes) -> Result<Taken, StoreError> {
        // A signed id tells a copy from another file of the same name; without one, sending again means doing again.
        let again = matches!((proof, event), (Proof::Unsigned { .. }, Event::Artifact(_)));
        let new = new_event(Self::key_of(proof, event), event, body, again);
        self.accept(new).await
    }

    /// Writes a trusted body down that nobody can read: it is kept and shown as failed.
    ///
    /// # Errors
    /// [`StoreError`]: nothing is promised, the sender must try again.
    pub async fn take_unreadable(&self, proof: &Proof, body: Bytes) -> Result<Taken, StoreError> {
        let key = match proof {
            Proof::Standard { id, .. } => format!("id:{id}"),
            Proof::Runflow | Proof::Unsigned { .. } => format!("raw:{}", hex(&Sha256::digest(&body))),
        };
        let new = NewEvent {
            key: bounded(key),
            kind: UNREADABLE.to_owned(),
            subject: None,
            ended_job: None,
            body,
            received_at_ms: now_ms(),
            again: false,
            at_once: false,
            lane: String::new(),
        };
        self.accept(new).await
    }

    async fn accept(&self, new: NewEvent) -> Result<Taken, StoreError> {
        self.metrics.received();
        let begun = Instant::now();
        let (key, kind, subject, bytes) =
            (new.key.clone(), new.kind.clone(), new.subject.clone(), new.body.len());
        let accepted = self.journal.accept(new).await?;
        ringback_service_runtime::fault::point("receiver.accepted.after");
        self.told("received", &key, kind, subject, accepted, bytes, begun);
        Ok(Taken { key, accepted })
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one line")]
    fn told(
        &self,
        how: &'static str,
        key: &str,
        kind: String,
        subject: Option<String>,
        accepted: Accepted,
        bytes: usize,
        begun: Instant,
    ) {
        let (name, detail) = match accepted {
            Accepted::New | Accepted::Revived => (how, format!("{bytes} bytes")),
            Accepted::Waiting | Accepted::Done => ("duplicate", "already here".to_owned()),
        };
        self.observer.tell(&Step {
            name,
            kind,
            subject: subject.unwrap_or_else(|| key.to_owned()),
            detail,
            took: Some(begun.elapsed()),
            failed: false,
        });
        self.work.notify_one();
    }

    /// A poll has found how a tracked job ended: as if its webhook had come.
    pub(crate) async fn found(
        &self,
        job_id: &str,
        event: &Event,
        body: Bytes,
    ) -> Result<Accepted, StoreError> {
        let begun = Instant::now();
        let new = new_event(format!("poll:{}", event.own_key()), event, body, false);
        let (key, kind, subject, bytes) =
            (new.key.clone(), new.kind.clone(), new.subject.clone(), new.body.len());
        let accepted = self.journal.tracked_found(job_id, new).await?;
        if accepted == Accepted::New {
            self.metrics.received();
        }
        self.told("polled", &key, kind, subject, accepted, bytes, begun);
        Ok(accepted)
    }

    /// Hears of the end of the next try of an event. Ask before the event is handed over.
    pub(crate) fn wait_for(&self, key: &str) -> oneshot::Receiver<()> {
        let (tell, told) = oneshot::channel();
        let mut waiters = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
        // Those who have gone away are forgotten here, so that the table cannot grow.
        waiters.retain(|_, list| {
            list.retain(|waiter| !waiter.is_closed());
            !list.is_empty()
        });
        waiters.entry(key.to_owned()).or_default().push(tell);
        told
    }

    /// A try of an event is over.
    pub(crate) fn tried(&self, key: &str) {
        let waiting = self.waiters.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
        for waiter in waiting.into_iter().flatten() {
            // It may have gone away.
            let _ = waiter.send(());
        }
    }

    /// The key that [`Intake::take`] gives an event.
    #[must_use]
    pub(crate) fn key_of(proof: &Proof, event: &Event) -> String {
        bounded(match proof {
            Proof::Standard { id, .. } => format!("id:{id}"),
            Proof::Runflow => format!("runflow:{}", event.own_key()),
            Proof::Unsigned { .. } => format!("unsigned:{}", event.own_key()),
        })
    }
}

fn new_event(key: String, event: &Event, body: Bytes, again: bool) -> NewEvent {
    NewEvent {
        key: bounded(key),
        kind: event.kind(),
        subject: event.subject().map(str::to_owned),
        ended_job: event.ended_job().map(|(job, how)| (job.to_owned(), how)),
        body,
        received_at_ms: now_ms(),
        again,
        at_once: matches!(event, Event::Artifact(_)),
        lane: event.lane(),
    }
}

fn bounded(key: String) -> String {
    if key.len() <= MAX_KEY_BYTES { key } else { format!("sha256:{}", hex(&Sha256::digest(&key))) }
}

/// How long after its try number `attempts` an event is tried again; `None` when it is given up.
#[must_use]
pub fn retry_after(attempts: u32) -> Option<Duration> {
    const LADDER_S: [u64; 8] = [1, 5, 30, 120, 600, 1_800, 3_600, 7_200];
    let at = usize::try_from(attempts).ok()?.checked_sub(1)?;
    LADDER_S.get(at).copied().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_tried_nine_times() {
        assert_eq!(retry_after(1), Some(Duration::from_secs(1)));
        assert_eq!(retry_after(8), Some(Duration::from_secs(7_200)));
        assert_eq!(retry_after(9), None);
    }

    #[test]
    fn a_signed_id_is_the_key_and_nobody_else_can_use_it() {
        let event = Event::parse(br#"{"id":"id:x","status":"FAILED"}"#).unwrap();
        let standard = Proof::Standard { id: "x".to_owned(), timestamp_s: 0 };
        let unsigned = Proof::Unsigned { peer: "127.0.0.1".parse().unwrap() };
        assert_eq!(Intake::key_of(&standard, &event), "id:x");
        assert_eq!(Intake::key_of(&unsigned, &event), "unsigned:job:id:x:FAILED");
        assert_eq!(Intake::key_of(&Proof::Runflow, &event), "runflow:job:id:x:FAILED");
        assert_eq!(bounded("k".repeat(301)).len(), 7 + 64);
    }
}
