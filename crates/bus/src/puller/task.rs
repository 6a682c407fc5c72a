//! The loop behind a [`super::JobPuller`].

use super::lane::{LaneBook, PullKind};
use super::{JobDelivery, Order, PullSource, PullerSettings};
use crate::connection::{Bus, Connectivity};
use crate::error::BusError;
use crate::subjects::Subjects;
use async_nats::{Message, StatusCode, Subscriber};
use bytes::Bytes;
use futures::StreamExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, mpsc};
use tokio::time::Instant;

/// A waiting request is given up this long after its own end.
const GRACE: Duration = Duration::from_secs(2);
/// Pause after a refusal (consumer or stream missing, server leaving).
const REFUSED_PAUSE: Duration = Duration::from_millis(250);
/// A surplus message comes back after this, so that requests still waiting here do not fetch it at once again.
const SURPLUS_DELAY: Duration = Duration::from_millis(100);
/// After a stop, requests may still deliver for a moment; what comes is given back.
const LINGER: Duration = Duration::from_millis(300);
const TICK: Duration = Duration::from_secs(1);

struct Source {
    at: PullSource,
    next_subject: String,
    consumer: String,
    book: LaneBook,
}

pub(super) struct PullTask {
    bus: Bus,
    inbox: String,
    settings: PullerSettings,
    sources: Vec<Source>,
    credits: u32,
    next_pull: u64,
    /// Connection on which the requests in the books were sent.
    epoch: u64,
    /// One repair of consumers at a time.
    repairing: Arc<Mutex<()>>,
}

impl PullTask {
    pub(super) fn new(bus: Bus, inbox: String, sources: Vec<PullSource>, settings: PullerSettings) -> Self {
        let sources = sources
            .into_iter()
            .map(|at| {
                let consumer = Subjects::consumer(at.endpoint, at.lane);
                let stream = bus.subjects.stream(at.shard);
                Source {
                    at,
                    next_subject: format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"),
                    consumer,
                    book: LaneBook::default(),
                }
            })
            .collect();
        let epoch = bus.connectivity().borrow().epoch;
        Self { bus, inbox, settings, sources, credits: 0, next_pull: 0, epoch, repairing: Arc::default() }
    }
}

pub(super) async fn run(
    mut task: PullTask,
    mut subscriber: Subscriber,
    mut orders: mpsc::UnboundedReceiver<Order>,
    jobs: mpsc::UnboundedSender<JobDelivery>,
) {
    let mut connectivity = task.bus.connectivity();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    task.ensure_consumers().await;
    loop {
        // Before anything is asked: what is asked on a connection must not be forgotten as if it had died with the
        // one before, for it would be asked and delivered twice.
        task.note_connection(*connectivity.borrow_and_update());
        task.replenish().await;
        tokio::select! {
            order = orders.recv() => match order {
                Some(Order::Add(n)) => task.credits = task.credits.saturating_add(n),
                Some(Order::Stop) | None => break,
            },
            message = subscriber.next() => match message {
                Some(message) => task.take(message, &jobs).await,
                None => return,
            },
            changed = connectivity.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            now = tick.tick() => {
                let silence = task.settings.idle_heartbeat * 2 + GRACE;
                task.sources.iter_mut().for_each(|source| source.book.forget_overdue(now, silence));
            }
        }
        // Credits and messages come in bursts; one round of requests answers them all.
        while let Ok(order) = orders.try_recv() {
            match order {
                Order::Add(n) => task.credits = task.credits.saturating_add(n),
                Order::Stop => return task.linger(subscriber).await,
            }
        }
    }
    task.linger(subscriber).await;
}

impl PullTask {
    /// On another connection than before: requests died with the connection or with the server.
    fn note_connection(&mut self, now: Connectivity) {
        if !now.connected || now.epoch == self.epoch {
            return;
        }
        self.epoch = now.epoch;
        for source in &mut self.sources {
            source.book.forget_all();
            source.book.blocked_until = None;
        }
        self.repair();
    }

    /// Gives back what arrives after the stop, then ends the subscription, which voids the requests at the server.
    async fn linger(mut self, mut subscriber: Subscriber) {
        self.credits = 0;
        let until = Instant::now() + LINGER;
        while let Ok(Some(message)) = tokio::time::timeout_at(until, subscriber.next()).await {
            if let Some(delivery) = self.bus.read_delivery(&message) {
                let _ = delivery.acker.nak(None).await;
            }
        }
        let _ = subscriber.unsubscribe().await;
    }

    async fn take(&mut self, message: Message, jobs: &mpsc::UnboundedSender<JobDelivery>) {
        let now = Instant::now();
        if let Some(status) = message.status {
            self.note_status(status, &message, now);
            return;
        }
        let Some(delivery) = self.bus.read_delivery(&message) else {
            tracing::error!(subject = %message.subject, "not a job of ours on a work queue; left there");
            return;
        };
        let source = self.sources.iter_mut().find(|source| {
            source.at.lane == delivery.subject.lane && source.at.endpoint == delivery.subject.endpoint
        });
        if let Some(source) = source {
            source.book.delivered(now);
        }
        if self.credits == 0 {
            let _ = delivery.acker.nak(Some(SURPLUS_DELAY)).await;
            return;
        }
        self.credits -= 1;
        if let Err(mpsc::error::SendError(delivery)) = jobs.send(delivery) {
            let _ = delivery.acker.nak(None).await;
        }
    }

    /// Reads the end of a request. Its subject is `<inbox>.<source>.<pull>`.
    fn note_status(&mut self, status: StatusCode, message: &Message, now: Instant) {
        let Some((index, id)) = message
            .subject
            .strip_prefix(self.inbox.as_str())
            .and_then(|rest| rest.strip_prefix('.'))
            .and_then(|rest| rest.split_once('.'))
            .and_then(|(index, id)| Some((index.parse::<usize>().ok()?, id.parse::<u64>().ok()?)))
        else {
            return;
        };
        let Some(source) = self.sources.get_mut(index) else { return };
        if status == StatusCode::IDLE_HEARTBEAT {
            source.book.sign_of_life(now);
            return;
        }
        let left = message
            .headers
            .as_ref()
            .and_then(|headers| headers.get("Nats-Pending-Messages"))
            .and_then(|value| value.as_str().parse().ok());
        let kind = source.book.ended(id, left, now);
        if status == StatusCode::NOT_FOUND || status == StatusCode::TIMEOUT {
            // An expired long request says nothing about this moment: ask anew before waiting again.
            source.book.known_empty = kind == Some(PullKind::NoWait);
            return;
        }
        let description = message.description.as_deref().unwrap_or_default();
        tracing::debug!(consumer = source.consumer, %status, description, "pull refused");
        source.book.blocked_until = Some(now + REFUSED_PAUSE);
        // Full is not broken: too many workers wait at this consumer.
        if !description.contains("MaxWaiting") {
            self.repair();
        }
    }

    /// Asks for what is missing.
    ///
    /// With nothing outstanding at a queue its state is unknown, so it is asked without waiting, the first queue
    /// first: a later one gets its turn when the earlier ones are empty. When all are empty, long requests wait at
    /// each. While some wait, the queue is known to be empty, and more are added in steps of a quarter of the free
    /// slots: at thousands of jobs per second one request then serves many slots.
    async fn replenish(&mut self) {
        if self.credits == 0 || !self.bus.is_connected() {
            return;
        }
        let now = Instant::now();
        let free = self.credits;
        let several = self.sources.len() > 1;
        for index in 0..self.sources.len() {
            let book = &self.sources[index].book;
            let outstanding = book.outstanding();
            if book.is_blocked(now) {
                continue;
            }
            if outstanding == 0 && several && !book.known_empty {
                self.ask(index, PullKind::NoWait, free, now).await;
                return;
            }
            if book.waits_without_long() {
                // Its answer decides whether the next queue gets a turn.
                return;
            }
            let missing = free.saturating_sub(outstanding);
            if missing > 0 && (outstanding == 0 || missing >= free.div_ceil(4)) {
                self.ask(index, PullKind::Long, missing, now).await;
            }
        }
    }

    async fn ask(&mut self, index: usize, kind: PullKind, batch: u32, now: Instant) {
        self.next_pull += 1;
        let id = self.next_pull;
        let body = match kind {
            PullKind::NoWait => format!("{{\"batch\":{batch},\"no_wait\":true}}"),
            PullKind::Long => format!(
                "{{\"batch\":{batch},\"expires\":{},\"idle_heartbeat\":{}}}",
                self.settings.expires.as_nanos(),
                self.settings.idle_heartbeat.as_nanos()
            ),
        };
        let reply = format!("{}.{index}.{id}", self.inbox);
        let source = &mut self.sources[index];
        let sent = tokio::time::timeout(
            GRACE,
            self.bus.client.publish_with_reply(source.next_subject.clone(), reply, Bytes::from(body)),
        );
        match sent.await {
            Ok(Ok(())) => {
                let life = match kind {
                    PullKind::NoWait => GRACE,
                    PullKind::Long => self.settings.expires + GRACE,
                };
                source.book.asked(id, kind, batch, now + life, now);
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, consumer = source.consumer, "pull not sent");
                source.book.blocked_until = Some(now + REFUSED_PAUSE);
            }
            Err(_) => source.book.blocked_until = Some(now + REFUSED_PAUSE),
        }
    }

    async fn ensure_consumers(&self) {
        let _guard = self.repairing.lock().await;
        ensure(&self.bus, self.sources.iter().map(|source| source.at).collect(), self.settings).await;
    }

    /// Makes missing consumers again, in the background, one such task at a time.
    fn repair(&self) {
        let Ok(guard) = Arc::clone(&self.repairing).try_lock_owned() else { return };
        let bus = self.bus.clone();
        let sources: Vec<PullSource> = self.sources.iter().map(|source| source.at).collect();
        let settings = self.settings;
        tokio::spawn(async move {
            let _guard = guard;
            ensure(&bus, sources, settings).await;
        });
    }
}

/// A missing stream is somebody else's to make; the next refused pull leads here again.
async fn ensure(bus: &Bus, sources: Vec<PullSource>, settings: PullerSettings) {
    for source in sources {
        match bus.ensure_consumer(source.shard, source.endpoint, source.lane, settings.consumer).await {
            Ok(()) => {}
            Err(error @ (BusError::StreamMissing { .. } | BusError::Permanent(_))) => {
                tracing::warn!(%error, endpoint = source.endpoint.0, "no consumer for this endpoint yet");
            }
            Err(error) => tracing::debug!(%error, endpoint = source.endpoint.0, "consumer not ensured"),
        }
    }
}
