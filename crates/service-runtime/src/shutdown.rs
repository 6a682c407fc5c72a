//! How a process ends: one signal drains, a second one ends at once.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit code of a process that a second signal ended: 128 + SIGINT, as shells show it.
const FORCED_EXIT_CODE: i32 = 130;

type ExitHook = Box<dyn FnOnce() + Send>;

/// The shared wish to end (cheap to clone). `triggered` = stop taking work and drain; `finished` = the drain is over,
/// close what was kept for it.
#[derive(Clone)]
pub struct Shutdown {
    draining: CancellationToken,
    over: CancellationToken,
    hooks: Arc<Mutex<Vec<ExitHook>>>,
}

impl std::fmt::Debug for Shutdown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shutdown").field("triggered", &self.is_triggered()).finish_non_exhaustive()
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Self { draining: CancellationToken::new(), over: CancellationToken::new(), hooks: Arc::default() }
    }
}

/// The work was not done when the time was up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not drained within {grace_ms} ms")]
pub struct DrainTimedOut {
    /// The time given.
    pub grace_ms: u64,
}

impl Shutdown {
    /// A shutdown that only [`Shutdown::trigger`] starts.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A shutdown that SIGTERM and SIGINT start; a second signal ends the process at once with code 130, after
    /// the hooks of [`Shutdown::on_forced_exit`].
    ///
    /// # Errors
    /// When signal handlers cannot be installed.
    pub fn on_signals() -> std::io::Result<Self> {
        let shutdown = Self::default();
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        let watched = shutdown.clone();
        tokio::spawn(async move {
            let name = next_signal(&mut term, &mut int).await;
            tracing::info!(signal = name, "draining; a second signal ends at once");
            watched.trigger();
            let name = next_signal(&mut term, &mut int).await;
            tracing::warn!(signal = name, "ending at once");
            watched.run_hooks();
            std::process::exit(FORCED_EXIT_CODE);
        });
        Ok(shutdown)
    }

    /// Starts the drain.
    pub fn trigger(&self) {
        self.draining.cancel();
    }

    /// Whether the drain has started.
    #[must_use]
    pub fn is_triggered(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Returns when the drain starts.
    pub async fn triggered(&self) {
        self.draining.cancelled().await;
    }

    /// The token behind [`Shutdown::triggered`], for child tokens.
    #[must_use]
    pub fn token(&self) -> CancellationToken {
        self.draining.clone()
    }

    /// Says that the drain is over; also starts it if nobody did.
    pub fn finish(&self) {
        self.draining.cancel();
        self.over.cancel();
    }

    /// Returns when the drain is over.
    pub async fn finished(&self) {
        self.over.cancelled().await;
    }

    /// A shutdown of one part: it starts with this one, or alone.
    #[must_use]
    pub fn child(&self) -> Self {
        Self {
            draining: self.draining.child_token(),
            over: self.over.child_token(),
            hooks: Arc::clone(&self.hooks),
        }
    }

    /// Runs before a forced exit, for what would outlive the process (a child broker). Must be quick.
    pub fn on_forced_exit(&self, hook: impl FnOnce() + Send + 'static) {
        self.hooks.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(hook));
    }

    fn run_hooks(&self) {
        let hooks = std::mem::take(&mut *self.hooks.lock().unwrap_or_else(PoisonError::into_inner));
        for hook in hooks {
            hook();
        }
    }

    /// Waits for the drain to start, then gives `work` up to `grace` to end.
    ///
    /// # Errors
    /// [`DrainTimedOut`] when the time is up; `work` is dropped then.
    pub async fn drain<T>(&self, work: impl Future<Output = T>, grace: Duration) -> Result<T, DrainTimedOut> {
        tokio::pin!(work);
        tokio::select! {
            biased;
            done = &mut work => return Ok(done),
            () = self.draining.cancelled() => {}
        }
        tokio::time::timeout(grace, work)
            .await
            .map_err(|_| DrainTimedOut { grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX) })
    }
}

async fn next_signal(term: &mut Signal, int: &mut Signal) -> &'static str {
    tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = int.recv() => "SIGINT",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn drain_gives_time_only_after_the_trigger() {
        let shutdown = Shutdown::new();
        let slow = tokio::time::sleep(Duration::from_millis(50));
        assert_eq!(
            shutdown.drain(slow, Duration::from_millis(1)).await,
            Ok(()),
            "no limit before the trigger"
        );
        shutdown.trigger();
        let slow = tokio::time::sleep(Duration::from_secs(3600));
        let timed_out = shutdown.drain(slow, Duration::from_millis(50)).await;
        assert_eq!(timed_out, Err(DrainTimedOut { grace_ms: 50 }));
    }

    #[tokio::test]
    async fn a_child_ends_alone_or_with_its_parent() {
        let parent = Shutdown::new();
        let (alone, with) = (parent.child(), parent.child());
        alone.trigger();
        assert!(!parent.is_triggered());
        parent.finish();
        with.triggered().await;
        with.finished().await;
    }
}
