//! Works replays off: opens ended deliveries again at their rate, and announces them like new ones.
//!
//! Whoever holds a replay's lease works on it, so a replay goes on after a crash where it stood. An announcement wakes
//! it; a slow look behind that finds what was not announced.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringback_bus::Announcements;
use ringback_service_runtime::{Shutdown, fault};
use ringback_store::deliveries::{DeliveryState, stored_of};
use ringback_store::replays::{Place, Replay, any_running, lease, next_page, reopen};
use ringback_store::{StoreError, Urgency};
use uuid::Uuid;

use crate::shared::Shared;

/// Somebody else takes a replay over after this time.
const LEASE: Duration = Duration::from_secs(10);
/// The slow look.
const LOOK: Duration = Duration::from_secs(10);
/// Pages per second of a replay with a rate.
const PAGES_PER_SECOND: u32 = 5;
/// The largest page.
const PAGE: u32 = 500;
/// Replays worked on at once, in turns.
const AT_ONCE: u32 = 32;
const RETRY: Duration = Duration::from_secs(1);

pub(crate) struct Replayer {
    shared: Arc<Shared>,
    me: Arc<str>,
    alone: bool,
    /// When each replay with a rate may go on.
    not_before: HashMap<Uuid, Instant>,
}

/// What one turn of one replay did.
enum Turn {
    /// There may be more.
    More,
    Ended,
}

impl Replayer {
    pub(crate) fn new(shared: Arc<Shared>, alone: bool) -> Self {
        let me = format!("dispatcher-{:016x}", rand::random::<u64>()).into();
        Self { shared, me, alone, not_before: HashMap::new() }
    }

    /// Works until the shutdown.
    pub(crate) async fn run(mut self, shutdown: Shutdown) {
        tokio::select! {
            () = self.work() => {}
            () = shutdown.triggered() => {}
        }
    }

    async fn work(&mut self) {
        let mut news: Option<Announcements> = None;
        loop {
            if news.is_none() {
                news = self.shared.bus.subscribe_replays().await.ok();
            }
            let pause = match self.turns().await {
                Ok(Some(at)) => at.saturating_duration_since(Instant::now()),
                Ok(None) => LOOK,
                Err(error) => {
                    tracing::warn!(%error, "replays wait for SQL");
                    RETRY
                }
            };
            match news.as_mut() {
                Some(subscription) => {
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        message = subscription.next() => if message.is_none() { news = None },
                    }
                }
                None => tokio::time::sleep(pause).await,
            }
        }
    }

    /// One page of each replay that is due. Answers when the next one is; `None` where nothing runs.
    async fn turns(&mut self) -> Result<Option<Instant>, StoreError> {
        if !any_running(self.shared.store.read()).await? {
            self.not_before.clear();
            return Ok(None);
        }
        let (me, lease_ms, alone) = (Arc::clone(&self.me), lease_ms(), self.alone);
        let works = self
            .shared
            .store
            .write(Urgency::Now, move |tx| {
                let me = Arc::clone(&me);
                Box::pin(async move { lease(tx, &me, lease_ms, AT_ONCE, alone).await })
            })
            .await?;
        self.not_before.retain(|id, _| works.iter().any(|work| work.id == *id));
        let mut next: Option<Instant> = None;
        for work in works {
            let due = self.not_before.get(&work.id).copied().unwrap_or_else(Instant::now);
            let again = if due > Instant::now() {
                due
            } else {
                match self.turn(&work).await? {
                    Turn::Ended => continue,
                    Turn::More => {
                        let pause = Duration::from_secs(page_of(work.rate_per_second).into())
                            .checked_div(work.rate_per_second)
                            .unwrap_or_default();
                        // Late pages do not make later ones faster.
                        let at = (due + pause).max(Instant::now());
                        self.not_before.insert(work.id, at);
                        at
                    }
                }
            };
            next = Some(next.map_or(again, |next| next.min(again)));
        }
        // Those that others hold are looked at when their leases run out.
        Ok(Some(next.unwrap_or_else(|| Instant::now() + LEASE)))
    }

    async fn turn(&self, work: &Replay) -> Result<Turn, StoreError> {
        let (page, more) = next_page(self.shared.store.read(), work, page_of(work.rate_per_second)).await?;
        let (page, work) = (Arc::new(page), Arc::new(work.clone()));
        let (me, keys, of) = (Arc::clone(&self.me), Arc::clone(&page), Arc::clone(&work));
        fault::point("dispatcher.replay.before");
        let opened = self
            .shared
            .store
            .write(Urgency::Now, move |tx| {
                let (me, page, work) = (Arc::clone(&me), Arc::clone(&keys), Arc::clone(&of));
                Box::pin(async move { reopen(tx, &me, &work, &page, more, lease_ms()).await })
            })
            .await?;
        fault::point("dispatcher.replay.after");
        let Some(opened) = opened else { return Ok(Turn::Ended) };
        tracing::debug!(replay = %work.id, opened, more, "deliveries were opened again");
        self.announce(&page).await?;
        Ok(if more { Turn::More } else { Turn::Ended })
    }

    /// Tells the owners of the partitions; what they do not hear is found by their sweeps.
    async fn announce(&self, page: &[Place]) -> Result<(), StoreError> {
        let mut owners: Vec<Uuid> = page.iter().map(|place| place.key.owner).collect();
        owners.sort_unstable();
        owners.dedup();
        let named: HashSet<(&[u8], u32, u32)> = page
            .iter()
            .map(|place| (place.key.owner.as_bytes().as_slice(), place.key.seq, place.key.target))
            .collect();
        let stored = stored_of(self.shared.store.read(), &owners).await?;
        let opened = stored
            .into_iter()
            .filter(|row| row.state == DeliveryState::Pending)
            .map(|row| row.delivery)
            .filter(|d| named.contains(&(&*d.owner_id, d.seq, d.target)))
            .collect();
        self.shared.announce(opened).await;
        Ok(())
    }
}

fn page_of(rate_per_second: u32) -> u32 {
    rate_per_second.max(1).div_ceil(PAGES_PER_SECOND).min(PAGE)
}

fn lease_ms() -> u64 {
    u64::try_from(LEASE.as_millis()).unwrap_or(u64::MAX)
}
