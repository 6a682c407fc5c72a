//! What a receiver does, step by step, for whoever watches (row B5).

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// A step that was taken. No part of it holds a secret or a URL's query.
#[derive(Debug, Clone)]
pub struct Step {
    /// What was done, for example `downloaded`.
    pub name: &'static str,
    /// The event's type.
    pub kind: String,
    /// Job, run or batch; the event's key where there is none.
    pub subject: String,
    /// In words.
    pub detail: String,
    /// How long it took.
    pub took: Option<Duration>,
    /// Whether it went wrong.
    pub failed: bool,
}

type Watch = Arc<dyn Fn(&Step) + Send + Sync>;

/// Who is told of steps. Steps always go to the log as well.
#[derive(Clone, Default)]
pub struct Observer(Option<Watch>);

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

impl Observer {
    /// Calls `watch` for each step.
    pub fn new(watch: impl Fn(&Step) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(watch)))
    }

    /// Tells a step.
    pub fn tell(&self, step: &Step) {
        let took_ms = step.took.map(|took| took.as_secs_f64() * 1000.0);
        if step.failed {
            tracing::warn!(
                step = step.name,
                kind = step.kind,
                subject = step.subject,
                took_ms,
                "{}",
                step.detail
            );
        } else {
            tracing::info!(
                step = step.name,
                kind = step.kind,
                subject = step.subject,
                took_ms,
                "{}",
                step.detail
            );
        }
        if let Some(watch) = &self.0 {
            watch(step);
        }
    }
}
