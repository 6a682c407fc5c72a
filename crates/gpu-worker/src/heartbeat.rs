//! Heartbeats: what this worker holds, told in one request; the answer says what to stop.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringback_bus::Verb;
use ringback_contracts::{Message as _, VERSION, v1};
use ringback_service_runtime::fault;
use tokio::sync::mpsc;

use crate::executor::JobKey;
use crate::shared::Shared;

/// Reports that come due within this time of each other share a request.
const TOGETHER: Duration = Duration::from_millis(10);

/// The heartbeat loop's own state.
pub(crate) struct Heartbeats {
    pub(crate) shared: Arc<Shared>,
    /// Attempts to report early, with the time when.
    pub(crate) reports: mpsc::UnboundedReceiver<(Instant, JobKey)>,
    /// Worker ids of earlier lives, until the tracker has heard of them.
    pub(crate) replaces: Vec<String>,
    pub(crate) every: Duration,
}

impl Heartbeats {
    /// Runs until it is dropped.
    pub(crate) async fn run(mut self) {
        let mut early: VecDeque<(Instant, JobKey)> = VecDeque::new();
        let mut next_full = Instant::now();
        let mut connectivity = self.shared.bus.connectivity();
        loop {
            let next_early = early.iter().map(|(at, _)| *at).min();
            let next = next_early.map_or(next_full, |at| at.min(next_full));
            tokio::select! {
                report = self.reports.recv() => match report {
                    Some(report) => early.push_back(report),
                    None => return,
                },
                () = tokio::time::sleep_until(next.into()) => {}
                changed = connectivity.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    // A new connection: show at once that the attempts live.
                    if connectivity.borrow_and_update().connected {
                        next_full = Instant::now();
                    }
                }
            }
            let now = Instant::now();
            if now >= next_full {
                self.full().await;
                next_full = Instant::now() + self.every;
            }
            if early.iter().any(|(at, _)| *at <= now) {
                let keys = take_due(&mut early, now + TOGETHER);
                self.early(&keys).await;
            }
        }
    }

    /// One last word while the worker drains.
    async fn full(&mut self) {
        let mut attempts = self.shared.attempts.beats();
        attempts.extend(self.shared.outcomes.beats().await);
        let heartbeat = v1::Heartbeat {
            version: VERSION,
            worker_id: self.shared.worker_id.clone(),
            full: true,
            attempts,
            slots: self.shared.slots(),
            device: self.shared.device.clone(),
            draining: self.shared.is_draining(),
            replaces: self.replaces.clone(),
        };
        if let Some(reply) = self.send(heartbeat).await {
            if !self.replaces.is_empty() {
                self.replaces.clear();
                self.shared.forget_former_ids();
            }
            if reply.lease_ms > 0 {
                let third = Duration::from_millis(reply.lease_ms / 3);
                self.every = self.every.min(third.max(Duration::from_millis(50)));
            }
        }
    }

    /// `started` and progress, without waiting for the next full heartbeat.
    async fn early(&mut self, keys: &[JobKey]) {
        let attempts = self.shared.attempts.beats_of(keys);
        if attempts.is_empty() {
            return;
        }
        fault::point("worker.started.before");
        let heartbeat = v1::Heartbeat {
            version: VERSION,
            worker_id: self.shared.worker_id.clone(),
            full: false,
            attempts,
            slots: Vec::new(),
            device: self.shared.device.clone(),
            draining: self.shared.is_draining(),
            replaces: Vec::new(),
        };
        self.send(heartbeat).await;
        fault::point("worker.started.after");
    }

    /// A lost one is no harm: the next full heartbeat says the same.
    async fn send(&self, heartbeat: v1::Heartbeat) -> Option<v1::HeartbeatReply> {
        let payload = heartbeat.encode_to_vec().into();
        let answer = self.shared.bus.request(Verb::Beat, payload, self.shared.settings.request_timeout).await;
        let reply = match answer.map(v1::HeartbeatReply::decode) {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => {
                tracing::warn!(%error, "unreadable answer to a heartbeat");
                return self.unsent(heartbeat);
            }
            Err(error) => {
                tracing::warn!(%error, attempts = heartbeat.attempts.len(), "a heartbeat was not answered");
                return self.unsent(heartbeat);
            }
        };
        self.shared.stop_all(&reply.stop);
        Some(reply)
    }

    fn unsent(&self, heartbeat: v1::Heartbeat) -> Option<v1::HeartbeatReply> {
        self.shared.attempts.restore_progress(heartbeat.attempts);
        None
    }
}

fn take_due(early: &mut VecDeque<(Instant, JobKey)>, until: Instant) -> Vec<JobKey> {
    let mut due = Vec::new();
    early.retain(|(at, key)| {
        let take = *at <= until;
        if take && !due.contains(key) {
            due.push(*key);
        }
        !take
    });
    due
}

/// Keeps the messages of running attempts from being delivered again.
pub(crate) async fn extend(shared: Arc<Shared>) {
    let every = shared.settings.extend_every;
    let mut tick = tokio::time::interval((every / 4).max(Duration::from_millis(50)));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        for message in shared.attempts.due_extensions(every) {
            message.in_progress().await;
        }
    }
}

/// Hears stop orders as soon as the tracker has committed them; a lost one comes again with the next
/// heartbeat's answer.
pub(crate) async fn hear_stops(shared: Arc<Shared>) {
    loop {
        match shared.bus.subscribe_stop(&shared.worker_id).await {
            Ok(mut orders) => {
                while let Some(order) = orders.next().await {
                    match v1::StopOrders::decode(order.payload) {
                        Ok(orders) => {
                            shared.stop_all(&orders.stop);
                            shared.artifact_waits.announced(&orders.artifacts);
                        }
                        Err(error) => tracing::warn!(%error, "unreadable stop order"),
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "cannot hear stop orders"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
