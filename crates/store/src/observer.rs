//! Who may say that somebody is lost: only an observer that was not cut off itself.
//!
//! Leases run out during an outage of the broker or of SQL, and while this process is stopped or starved, although
//! their holders live. An [`Observer`] knows since when it has seen everything without a break; nobody is judged lost
//! before that is a full lease (DESIGN 3.6).

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use ringback_service_runtime::time::now_ms;
use tokio::time::Instant;

use crate::Store;

/// How often the observer looks at itself.
const TICK: Duration = Duration::from_millis(250);
/// Ticks between two questions to SQL.
const TICKS_PER_PING: u32 = 4;

type BrokerSince = dyn Fn() -> Option<Instant> + Send + Sync;

/// Knows since when this process sees broker and SQL without a break. Cheap to clone.
#[derive(Clone)]
pub struct Observer {
    inner: Arc<Inner>,
}

struct Inner {
    steady_since: Mutex<Instant>,
    broker_since: Box<BrokerSince>,
    period: Duration,
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observer").field("steady", &self.is_steady()).finish_non_exhaustive()
    }
}

impl Observer {
    /// An observer that begins to see now. `period` is the lease; `broker_since` tells since when the broker's
    /// connection stands, `None` while it does not.
    pub fn new(period: Duration, broker_since: impl Fn() -> Option<Instant> + Send + Sync + 'static) -> Self {
        let inner =
            Inner { steady_since: Mutex::new(Instant::now()), broker_since: Box::new(broker_since), period };
        Self { inner: Arc::new(inner) }
    }

    /// Something was missed: SQL failed, or this process stood still.
    pub fn cut_off(&self, why: &str) {
        tracing::debug!(why, "the observer was cut off: no lease is judged for one lease period");
        metrics::counter!("ringback_observer_cut_off_total").increment(1);
        *self.inner.steady_since.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Whether everything was seen for a full lease.
    #[must_use]
    pub fn is_steady(&self) -> bool {
        let Some(broker) = (self.inner.broker_since)() else { return false };
        let own = *self.inner.steady_since.lock().unwrap_or_else(PoisonError::into_inner);
        own.max(broker).elapsed() >= self.inner.period
    }

    /// Watches this process and SQL. Runs for ever; drop it to stop.
    pub async fn watch(&self, store: &Store) {
        let stalled = (self.inner.period / 6).max(2 * TICK);
        let mut ticks = 0_u32;
        loop {
            let (began, wall) = (Instant::now(), now_ms());
            tokio::time::sleep(TICK).await;
            let slept = began.elapsed();
            // A suspended machine stops the monotonic clock but not the database's.
            let passed = Duration::from_millis(now_ms().abs_diff(wall));
            if slept > stalled || passed > slept + stalled {
                self.cut_off("this process stood still");
            }
            ticks = ticks.wrapping_add(1);
            if ticks.is_multiple_of(TICKS_PER_PING) {
                match tokio::time::timeout(stalled, store.ping()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => self.cut_off("SQL does not answer"),
                    Err(_) => self.cut_off("SQL answers too slowly"),
                }
            }
            metrics::gauge!("ringback_observer_steady").set(f64::from(u8::from(self.is_steady())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn nobody_is_lost_before_a_full_lease_was_seen() {
        let lease = Duration::from_secs(30);
        let broker = Arc::new(Mutex::new(Some(Instant::now())));
        let seen = Arc::clone(&broker);
        let observer = Observer::new(lease, move || *seen.lock().unwrap());
        assert!(!observer.is_steady());
        tokio::time::advance(lease).await;
        assert!(observer.is_steady());

        *broker.lock().unwrap() = None;
        assert!(!observer.is_steady(), "the broker is away");
        *broker.lock().unwrap() = Some(Instant::now());
        tokio::time::advance(lease - Duration::from_millis(1)).await;
        assert!(!observer.is_steady(), "the broker is back for less than a lease");
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(observer.is_steady());

        observer.cut_off("test");
        tokio::time::advance(lease - Duration::from_millis(1)).await;
        assert!(!observer.is_steady());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(observer.is_steady());
    }
}
