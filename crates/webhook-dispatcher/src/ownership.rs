//! Which partitions are ours: leases taken, renewed, shared out fairly and given back.
//!
//! Every dispatcher shows that it lives by a row with a negative number in `partition_leases`; the partitions are
//! shared out among those that live. A partition is handed over in order: no new try, what flies ends, its outcomes
//! are written, then the lease is given back, and its next owner need not wait.
//!
//! Without that, whoever takes a partition over sends again what its former owner had in flight or had not written
//! down. So a lease that ran out is not yet a dead owner: it is taken only by a dispatcher that has itself renewed
//! without a gap for half a lease. After a stall that all of them shared (the database, the host), each finds its own
//! partitions again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use ringback_service_runtime::{Check, Shutdown};
use ringback_store::partitions::{Claim, Membership, Take, acquire, depart, keep_alive, release};
use ringback_store::{StoreError, Urgency};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::lease::{Asked, Doubts, Lease, Order};
use crate::partition::{Ended, Partition};
use crate::shared::Shared;

/// How long flights may last after the shutdown began; a POST cut off is sent again by the next owner.
const DRAIN: Duration = Duration::from_secs(10);
/// Leases are renewed this often within their life.
const RENEWALS: u32 = 6;
/// Renewals further apart than one in so many per lease are a gap, and judging others takes as long without one.
const STEADY: u32 = 2;

struct Owned {
    claim: Claim,
    lease: watch::Sender<Lease>,
    doubts: Doubts,
    task: JoinHandle<Ended>,
}

/// Keeps the leases of one dispatcher.
pub(crate) struct Ownership {
    shared: Arc<Shared>,
    me: Arc<str>,
    /// No other dispatcher can be alive.
    alone: bool,
    owned: BTreeMap<u16, Owned>,
    steadiness: Steadiness,
    check: Check,
}

impl Ownership {
    pub(crate) fn new(shared: Arc<Shared>, alone: bool, check: Check) -> Self {
        let me = format!("dispatcher-{:016x}", rand::random::<u64>()).into();
        Self { shared, me, alone, owned: BTreeMap::new(), steadiness: Steadiness::default(), check }
    }

    /// Owns partitions until the shutdown, then hands all of them over.
    pub(crate) async fn run(mut self, shutdown: Shutdown) {
        let period = self.shared.settings.lease / RENEWALS;
        loop {
            let began = Instant::now();
            match self.tick(period).await {
                Ok(()) => self.check.ok(),
                Err(error) => {
                    tracing::warn!(%error, "leases of partitions cannot be renewed");
                    self.check.fail("SQL does not answer: leases of partitions cannot be renewed");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(period.saturating_sub(began.elapsed()).max(period / 4)) => {}
                () = shutdown.triggered() => break,
            }
        }
        self.hand_over_all().await;
    }

    async fn tick(&mut self, period: Duration) -> Result<(), StoreError> {
        self.collect().await;
        let asked = Asked::now();
        let (membership, database_ms) = self.renew().await?;
        self.shared.clock.see(asked.at(), database_ms);
        let steady = self.steadiness.renewed(asked.at(), self.shared.settings.lease / STEADY);
        let partitions = self.shared.store.facts().partitions.max(1);
        for (partition, owned) in &self.owned {
            let lost = !membership.held.contains(&owned.claim);
            owned.lease.send_if_modified(|lease| {
                if lost {
                    lease.order = Order::Lost;
                } else {
                    lease.renewed(asked);
                }
                true
            });
            if lost {
                tracing::debug!(partition, "a partition was lost to another dispatcher");
            }
        }
        let members = if self.alone { 1 } else { membership.members.max(1) };
        let share = usize::from(partitions).div_ceil(members);
        self.shrink_to(share);
        let free: Vec<u16> = (0..partitions)
            .filter(|partition| !self.owned.contains_key(partition))
            .filter(|partition| self.alone || !membership.taken.contains(partition))
            .filter(|partition| self.alone || steady || !membership.lapsed.contains(partition))
            .take(share.saturating_sub(self.owned.len()))
            .collect();
        for partition in free {
            if asked.at().elapsed() > period {
                // What is owned is renewed first.
                break;
            }
            let take = match membership.lapsed.contains(&partition) {
                _ if self.alone => Take::Always,
                true => Take::Expired,
                false => Take::GivenBack,
            };
            self.take(partition, take).await?;
        }
        self.shared.meters.owns(self.owned.len());
        self.shared.process.own(self.owned.len(), usize::from(partitions));
        Ok(())
    }

    /// Renews the leases; answers also the database's clock.
    async fn renew(&self) -> Result<(Membership, i64), StoreError> {
        let (me, lease_ms) = (Arc::clone(&self.me), self.lease_ms());
        let claims: Arc<Vec<Claim>> = Arc::new(self.owned.values().map(|owned| owned.claim).collect());
        self.shared
            .store
            .write(Urgency::Now, move |tx| {
                let (me, claims) = (Arc::clone(&me), Arc::clone(&claims));
                Box::pin(async move { Ok((keep_alive(tx, &me, &claims, lease_ms).await?, tx.now_ms())) })
            })
            .await
    }

    async fn take(&mut self, partition: u16, take: Take) -> Result<(), StoreError> {
        let (me, lease_ms) = (Arc::clone(&self.me), self.lease_ms());
        let asked = Asked::now();
        let claim = self
            .shared
            .store
            .write(Urgency::Now, move |tx| {
                let me = Arc::clone(&me);
                Box::pin(async move { acquire(tx, &me, partition, lease_ms, take).await })
            })
            .await?;
        let Some(claim) = claim else { return Ok(()) };
        let (lease, seen) = watch::channel(Lease::granted(asked, self.shared.settings.lease));
        let doubts = Doubts::default();
        let work = Partition::new(Arc::clone(&self.shared), claim, seen, doubts.clone()).run();
        let task = tokio::spawn(work.map(move |ended| match ended {
            Ok(ended) => ended,
            Err(error) => {
                tracing::warn!(partition, %error, "announcements of deliveries cannot be subscribed to");
                Ended::HandedOver
            }
        }));
        match take {
            Take::Expired => {
                self.shared.meters.partition_taken_over();
                tracing::warn!(
                    partition,
                    epoch = claim.epoch,
                    "partition taken over: its owner let the lease lapse, and what it had in flight is sent again"
                );
            }
            Take::GivenBack | Take::Always => {
                tracing::debug!(partition, epoch = claim.epoch, "partition taken");
            }
        }
        self.owned.insert(partition, Owned { claim, lease, doubts, task });
        Ok(())
    }

    /// Asks the partitions beyond the fair share to hand over; their leases are given back when they have ended.
    fn shrink_to(&mut self, share: usize) {
        let working = self.owned.values().filter(|owned| owned.lease.borrow().order == Order::Own).count();
        let excess = working.saturating_sub(share);
        let last_first = self.owned.values().rev().filter(|owned| owned.lease.borrow().order == Order::Own);
        for owned in last_first.take(excess) {
            owned.lease.send_modify(|lease| lease.order = Order::HandOver);
        }
    }

    /// Gives back the leases of partitions that have ended, in order or by a panic.
    async fn collect(&mut self) {
        let ended: BTreeSet<u16> =
            self.owned.iter().filter(|(_, owned)| owned.task.is_finished()).map(|(p, _)| *p).collect();
        for partition in ended {
            if let Some(owned) = self.owned.remove(&partition) {
                match owned.task.await {
                    Ok(Ended::Lost) => {}
                    Ok(Ended::HandedOver) => self.give_back(owned.claim).await,
                    Err(error) => {
                        tracing::error!(partition, %error, "a partition broke down and is taken anew");
                        self.give_back(owned.claim).await;
                    }
                }
            }
        }
    }

    async fn give_back(&self, claim: Claim) {
        let me = Arc::clone(&self.me);
        let released = self
            .shared
            .store
            .write(Urgency::Now, move |tx| {
                let me = Arc::clone(&me);
                Box::pin(async move { release(tx, &me, claim).await })
            })
            .await;
        if let Err(error) = released {
            // It runs out by itself.
            tracing::warn!(partition = claim.partition, %error, "a lease cannot be given back");
        }
    }

    async fn hand_over_all(mut self) {
        self.check.fail("draining");
        for owned in self.owned.values() {
            owned.lease.send_modify(|lease| lease.order = Order::HandOver);
        }
        let until = tokio::time::Instant::now() + DRAIN;
        for (partition, mut owned) in std::mem::take(&mut self.owned) {
            match tokio::time::timeout_at(until, &mut owned.task).await {
                Ok(Ok(Ended::Lost)) => continue,
                Ok(Ok(Ended::HandedOver) | Err(_)) => {}
                Err(_) => {
                    owned.task.abort();
                    let tries = owned.doubts.get();
                    self.shared.meters.cut_off(tries);
                    tracing::warn!(
                        partition,
                        tries,
                        "{tries} tries in flight were cut off; they will be sent again"
                    );
                }
            }
            self.give_back(owned.claim).await;
        }
        let me = Arc::clone(&self.me);
        let departed = self
            .shared
            .store
            .write(Urgency::Now, move |tx| {
                let me = Arc::clone(&me);
                Box::pin(async move { depart(tx, &me).await })
            })
            .await;
        if let Err(error) = departed {
            tracing::debug!(%error, "the dispatcher could not say that it leaves");
        }
        self.shared.meters.owns(0);
    }

    fn lease_ms(&self) -> u64 {
        u64::try_from(self.shared.settings.lease.as_millis()).unwrap_or(u64::MAX)
    }
}

/// Since when the database has been reached without a gap: whoever was cut off itself cannot tell who else was.
#[derive(Debug, Default)]
struct Steadiness {
    since: Option<Instant>,
    last: Option<Instant>,
}

impl Steadiness {
    /// A renewal that began at `asked` went well. Answers whether there was no gap of `span`, for at least as long.
    fn renewed(&mut self, asked: Instant, span: Duration) -> bool {
        let gap = self.last.is_none_or(|last| asked.saturating_duration_since(last) >= span);
        self.last = Some(asked);
        let since = if gap { asked } else { self.since.unwrap_or(asked) };
        self.since = Some(since);
        asked.saturating_duration_since(since) >= span
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_was_cut_off_judges_nobody_for_a_while() {
        let (span, start) = (Duration::from_secs(5), Instant::now());
        let mut steadiness = Steadiness::default();
        let mut at = |seconds: u64| steadiness.renewed(start + Duration::from_secs(seconds), span);
        let steady: Vec<u64> =
            [0, 1, 3, 4, 5, 9, 14, 15, 18, 19, 24].into_iter().filter(|s| at(*s)).collect();
        // Started at 0, cut off from 9 to 14 and from 19 to 24.
        assert_eq!(steady, [5, 9, 19]);
    }
}
