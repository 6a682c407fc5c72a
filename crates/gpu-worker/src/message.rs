//! The work queue message behind an attempt, and when it may still be acknowledged.
//!
//! An acknowledgement names a sequence number of a stream. If the broker's store was lost and the stream
//! made anew (P6), the same number belongs to another job. So after every reconnect the incarnation of the
//! streams is compared, and messages of a former incarnation are let go of in silence: their jobs are
//! published again by the reconciler.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ringback_bus::{Acker, Bus, Connectivity};
use ringback_service_runtime::fault;
use tokio::sync::watch;

/// Pause between looks at the streams after a reconnect.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Which streams this worker's messages belong to.
#[derive(Debug)]
pub(crate) struct Streams {
    bus: Bus,
    connectivity: watch::Receiver<Connectivity>,
    incarnations: Mutex<HashMap<u32, String>>,
    /// Connect epoch for which the incarnations were compared.
    verified: AtomicU64,
    /// Rises when a stream turned out to be another one.
    generation: AtomicU64,
}

/// A message in this worker's hands.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    acker: Acker,
    streams: Arc<Streams>,
    generation: u64,
}

impl Streams {
    pub(crate) fn new(bus: Bus, shards: impl IntoIterator<Item = u32>) -> Self {
        let incarnations = shards.into_iter().map(|shard| (shard, String::new())).collect();
        Self {
            connectivity: bus.connectivity(),
            bus,
            incarnations: Mutex::new(incarnations),
            verified: AtomicU64::new(0),
            generation: AtomicU64::new(0),
        }
    }

    /// Wraps a delivered message.
    pub(crate) fn message(self: &Arc<Self>, acker: Acker) -> Message {
        Message { acker, streams: Arc::clone(self), generation: self.generation.load(Ordering::Acquire) }
    }

    /// Compares the streams after each connect, for ever.
    pub(crate) async fn watch(self: Arc<Self>) {
        let mut connectivity = self.bus.connectivity();
        loop {
            let now = *connectivity.borrow_and_update();
            if now.connected && self.verified.load(Ordering::Acquire) != now.epoch {
                if self.compare().await {
                    self.verified.store(now.epoch, Ordering::Release);
                } else {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                continue;
            }
            if connectivity.changed().await.is_err() {
                return;
            }
        }
    }

    /// False when it could not be found out.
    async fn compare(&self) -> bool {
        let shards: Vec<u32> =
            self.incarnations.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect();
        let mut differs = false;
        for shard in shards {
            // A missing stream is about to be made anew: wait for it.
            let Ok(Some(state)) = self.bus.stream_state(shard).await else { return false };
            let mut known = self.incarnations.lock().unwrap_or_else(PoisonError::into_inner);
            let before = known.insert(shard, state.incarnation.clone());
            differs |= before.is_some_and(|before| !before.is_empty() && before != state.incarnation);
        }
        if differs {
            tracing::warn!("the work queue was made anew; messages of the former one are let go");
            self.generation.fetch_add(1, Ordering::AcqRel);
        }
        true
    }

    fn is_current(&self, generation: u64) -> bool {
        let now = *self.connectivity.borrow();
        now.connected
            && self.verified.load(Ordering::Acquire) == now.epoch
            && self.generation.load(Ordering::Acquire) == generation
    }
}

impl Message {
    /// Done. Not sent when the message may belong to another stream: a delivery that comes again is answered
    /// by a grant request.
    pub(crate) async fn ack(&self) {
        fault::point("worker.ack.before");
        if self.may_speak() {
            log(self.acker.ack().await);
        }
        fault::point("worker.ack.after");
    }

    /// Back to the queue, at once or after a delay.
    pub(crate) async fn nak(&self, delay: Option<Duration>) {
        if self.may_speak() {
            log(self.acker.nak(delay).await);
        }
    }

    /// Out of the queue, not done.
    pub(crate) async fn term(&self) {
        if self.may_speak() {
            log(self.acker.term().await);
        }
    }

    /// Still at work.
    pub(crate) async fn in_progress(&self) {
        if self.may_speak() {
            log(self.acker.in_progress().await);
        }
    }

    fn may_speak(&self) -> bool {
        self.streams.is_current(self.generation)
    }
}

fn log(sent: Result<(), ringback_bus::BusError>) {
    if let Err(error) = sent {
        // The message is delivered again after the ack wait, which is the same as after a lost one.
        tracing::debug!(%error, "an acknowledgement was not sent");
    }
}
