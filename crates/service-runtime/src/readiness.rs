//! Named readiness checks, each with a reason, each a value that can be watched.

use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// What a check says: ready, or the reason why not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckState {
    /// Whether the part works.
    pub ok: bool,
    /// Why not, for a person; empty when ok.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// The handle of one check. The part that owns it tells its state; a dropped handle fails its check.
#[derive(Debug)]
pub struct Check {
    state: watch::Sender<CheckState>,
    changed: Arc<watch::Sender<u64>>,
}

impl Check {
    /// The part works.
    pub fn ok(&self) {
        self.set(CheckState { ok: true, reason: String::new() });
    }

    /// The part does not work; `reason` is shown to operators and must hold no secret.
    pub fn fail(&self, reason: impl Into<String>) {
        self.set(CheckState { ok: false, reason: reason.into() });
    }

    fn set(&self, state: CheckState) {
        let differs = self.state.send_if_modified(|current| {
            let differs = *current != state;
            *current = state;
            differs
        });
        if differs {
            self.changed.send_modify(|n| *n += 1);
        }
    }
}

impl Drop for Check {
    fn drop(&mut self) {
        self.fail("stopped");
    }
}

/// All checks of a process (cheap to clone). Without any check it is ready.
#[derive(Debug, Clone)]
pub struct Readiness {
    checks: Arc<Mutex<BTreeMap<String, watch::Receiver<CheckState>>>>,
    changed: Arc<watch::Sender<u64>>,
}

impl Default for Readiness {
    fn default() -> Self {
        Self { checks: Arc::default(), changed: Arc::new(watch::channel(0).0) }
    }
}

impl Readiness {
    /// An empty registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a check, not ready until told otherwise. A name in use is replaced (a restarted service).
    #[must_use]
    pub fn register(&self, name: impl Into<String>) -> Check {
        let (state, seen) = watch::channel(CheckState { ok: false, reason: "starting".to_owned() });
        self.lock().insert(name.into(), seen);
        self.changed.send_modify(|n| *n += 1);
        Check { state, changed: Arc::clone(&self.changed) }
    }

    /// Every check with its state.
    #[must_use]
    pub fn snapshot(&self) -> BTreeMap<String, CheckState> {
        self.lock().iter().map(|(name, seen)| (name.clone(), seen.borrow().clone())).collect()
    }

    /// Whether every check is ok.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.lock().values().all(|seen| seen.borrow().ok)
    }

    /// The value of one check, to be watched.
    #[must_use]
    pub fn watch(&self, name: &str) -> Option<watch::Receiver<CheckState>> {
        self.lock().get(name).cloned()
    }

    /// Returns once every check is ok.
    pub async fn ready(&self) {
        let mut changes = self.changed.subscribe();
        while !self.is_ready() {
            // The registry holds the sender, so the channel cannot be closed here.
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, watch::Receiver<CheckState>>> {
        // The map is changed by single inserts, so a panic elsewhere cannot leave it half done.
        self.checks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_when_every_check_is_ok() {
        let readiness = Readiness::new();
        let nats = readiness.register("nats");
        let sql = readiness.register("sql");
        assert!(!readiness.is_ready());
        nats.ok();
        assert!(!readiness.is_ready());
        let waiter = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.ready().await }
        });
        sql.ok();
        waiter.await.unwrap();
        nats.fail("connection lost");
        assert_eq!(readiness.snapshot()["nats"].reason, "connection lost");
        assert!(!readiness.is_ready());
        nats.ok();
        drop(sql);
        assert_eq!(readiness.snapshot()["sql"], CheckState { ok: false, reason: "stopped".to_owned() });
    }
}
