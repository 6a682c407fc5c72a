//! Pulling jobs: exactly as many messages as there are free slots, nothing ahead.
//!
//! Own pull requests (ADR-13) over one inbox, because the client's stream prefetches and its one-message fetch costs
//! a subscription each. The server tells how each request ended: `404` nothing there (no_wait), `408` expired, `409`
//! consumer gone or server leaving, `503` nobody there; `100` is an idle heartbeat.

mod delivery;
mod lane;
mod task;

pub use delivery::{Acker, JobDelivery};

use crate::connection::Bus;
use crate::consumers::ConsumerSettings;
use crate::error::BusError;
use crate::subjects::Lane;
use ringback_domain::EndpointId;
use std::time::Duration;
use tokio::sync::mpsc;

/// A queue to pull from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PullSource {
    /// Shard of the endpoint.
    pub shard: u32,
    /// The endpoint.
    pub endpoint: EndpointId,
    /// The lane.
    pub lane: Lane,
}

/// How a puller works.
#[derive(Debug, Clone, Copy)]
pub struct PullerSettings {
    /// Settings of the consumers, which the puller makes when they are missing.
    pub consumer: ConsumerSettings,
    /// Longest life of one pull request.
    pub expires: Duration,
    /// Time between signs of life of a waiting pull request; at most half of `expires`.
    pub idle_heartbeat: Duration,
}

impl Default for PullerSettings {
    fn default() -> Self {
        Self {
            consumer: ConsumerSettings { ack_wait: Duration::from_secs(30) },
            expires: Duration::from_secs(30),
            idle_heartbeat: Duration::from_secs(5),
        }
    }
}

#[derive(Debug)]
enum Order {
    Add(u32),
    Stop,
}

/// Adds free slots to a puller (cheap to clone).
#[derive(Debug, Clone)]
pub struct PullCredits(mpsc::UnboundedSender<Order>);

impl PullCredits {
    /// `n` more messages may be delivered.
    pub fn add(&self, n: u32) {
        // Err means that the puller has ended: there is nothing to fetch for.
        let _ = self.0.send(Order::Add(n));
    }
}

/// Jobs of one endpoint as they come. Each takes one credit.
#[derive(Debug)]
pub struct JobPuller {
    orders: mpsc::UnboundedSender<Order>,
    jobs: mpsc::UnboundedReceiver<JobDelivery>,
}

impl Bus {
    /// Starts pulling from `sources`, the first one first: a later one is asked only when the earlier ones have
    /// nothing. Nothing is pulled before [`JobPuller::add_credits`]. Missing consumers are made; a missing stream is
    /// waited for. Survives reconnects and the loss of the server's state.
    ///
    /// Lanes share the credits. In the rare case that two lanes deliver into the last free slot, the surplus message
    /// is given back at once and is redelivered (`num_delivered` 2, so its holder asks for a grant).
    ///
    /// # Errors
    /// Transient when the inbox cannot be subscribed.
    pub async fn pull_jobs(
        &self,
        sources: Vec<PullSource>,
        settings: PullerSettings,
    ) -> Result<JobPuller, BusError> {
        let inbox = self.client.new_inbox();
        let subscriber = self
            .client
            .subscribe(format!("{inbox}.>"))
            .await
            .map_err(|error| BusError::Transient(error.to_string()))?;
        let (orders, orders_in) = mpsc::unbounded_channel();
        // Bounded by the credits: no more than they allow is ever sent.
        let (jobs_out, jobs) = mpsc::unbounded_channel();
        tokio::spawn(task::run(
            task::PullTask::new(self.clone(), inbox, sources, settings),
            subscriber,
            orders_in,
            jobs_out,
        ));
        Ok(JobPuller { orders, jobs })
    }
}

impl JobPuller {
    /// `n` more messages may be delivered: `n` slots became free.
    pub fn add_credits(&self, n: u32) {
        let _ = self.orders.send(Order::Add(n));
    }

    /// A handle that adds credits from elsewhere.
    #[must_use]
    pub fn credits(&self) -> PullCredits {
        PullCredits(self.orders.clone())
    }

    /// The next job; none after [`JobPuller::stop`] once everything delivered was taken.
    pub async fn next(&mut self) -> Option<JobDelivery> {
        self.jobs.recv().await
    }

    /// A job that is already here.
    pub fn try_next(&mut self) -> Option<JobDelivery> {
        self.jobs.try_recv().ok()
    }

    /// Stops pulling. What still arrives is given back to the queue at once; what is already in [`JobPuller::next`]
    /// is the caller's to run or give back.
    pub fn stop(&self) {
        let _ = self.orders.send(Order::Stop);
    }
}
