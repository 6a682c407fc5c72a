//! The end of a worker that cannot go on in this process.

use std::sync::{Arc, OnceLock};

use ringback_service_runtime::Shutdown;

/// Where an engine says that it is ruined for the whole process. The worker then fetches no more, hands back what it
/// holds, keeps its outcomes as at any end, and returns an error: a program ends with it and is started anew.
#[derive(Clone, Debug)]
pub(crate) struct Fatal {
    reason: Arc<OnceLock<String>>,
    stop: Shutdown,
}

impl Fatal {
    /// `stop` ends this worker alone.
    pub(crate) fn new(stop: Shutdown) -> Self {
        Self { reason: Arc::default(), stop }
    }

    /// Ends the worker. Only the first reason is kept.
    pub(crate) fn report(&self, reason: String) {
        if self.reason.set(reason).is_ok() {
            tracing::error!(
                reason = self.reason.get(),
                "an engine is ruined: jobs are handed back, the worker ends"
            );
            self.stop.trigger();
        }
    }

    /// Why it ends.
    pub(crate) fn reason(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }
}
