//! Which handler an event goes to, and what is counted on the way (row C7).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use serde::Serialize;

use crate::event::{Event, ParseError};

/// An event as handlers get it.
#[derive(Debug, Clone)]
pub struct Received {
    /// What identifies it, the same for each copy.
    pub key: String,
    /// Its type.
    pub kind: String,
    /// The typed body.
    pub event: Event,
    /// The raw body.
    pub body: Bytes,
    /// How often it was tried before.
    pub attempts: u32,
    /// When it came, Unix ms.
    pub received_at_ms: i64,
}

/// Why a handler did not do its work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandlerError {
    /// It may work later.
    #[error("{0}")]
    Transient(String),
    /// It never will.
    #[error("{0}")]
    Permanent(String),
}

/// How an event was handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handled {
    /// A handler did its work.
    Yes,
    /// There is no handler for its type.
    Unhandled,
}

type Handler = Arc<dyn Fn(Arc<Received>) -> BoxFuture<'static, Result<(), HandlerError>> + Send + Sync>;
type Parser = Arc<dyn Fn(&[u8]) -> Result<Event, ParseError> + Send + Sync>;

/// Sends events to handlers by type. A handler is registered for a type (`batch.completed`), a family (`batch.*`) or
/// everything (`*`); the most precise registration gets the event, and only that one.
#[derive(Clone, Default)]
pub struct Router {
    handlers: BTreeMap<String, Handler>,
    parsers: BTreeMap<String, Parser>,
    metrics: Arc<RouterMetrics>,
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Router").field("handlers", &self.handlers.keys()).finish_non_exhaustive()
    }
}

impl Router {
    /// A router without handlers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers a handler; a second one for the same pattern replaces the first.
    #[must_use]
    pub fn on<F, Fut>(mut self, pattern: &str, handler: F) -> Self
    where
        F: Fn(Arc<Received>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), HandlerError>> + Send + 'static,
    {
        let handler: Handler = Arc::new(move |received| handler(received).boxed());
        self.handlers.insert(pattern.to_owned(), handler);
        self.metrics.registered.store(self.handlers.len() as u64, Ordering::Relaxed);
        self
    }

    /// Whether this very pattern has a handler.
    #[must_use]
    pub fn has(&self, pattern: &str) -> bool {
        self.handlers.contains_key(pattern)
    }

    /// Registers a parser of one's own for a type or family: it refuses what the handler could not use, before the
    /// handler sees it.
    #[must_use]
    pub fn parser<F>(mut self, pattern: &str, parser: F) -> Self
    where
        F: Fn(&[u8]) -> Result<Event, ParseError> + Send + Sync + 'static,
    {
        self.parsers.insert(pattern.to_owned(), Arc::new(parser));
        self
    }

    /// What is counted; shared by copies of the router.
    #[must_use]
    pub fn metrics(&self) -> Arc<RouterMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Hands an event to its handler.
    ///
    /// # Errors
    /// The parser refused the body, or the handler failed.
    pub async fn dispatch(&self, received: Received) -> Result<Handled, HandlerError> {
        let begun = Instant::now();
        let mut received = received;
        if let Some(parser) = find(&self.parsers, &received.kind) {
            match parser(&received.body) {
                Ok(event) => received.event = event,
                Err(error) => {
                    self.metrics.failed.fetch_add(1, Ordering::Relaxed);
                    return Err(HandlerError::Permanent(error.to_string()));
                }
            }
        }
        let Some(handler) = find(&self.handlers, &received.kind) else {
            self.metrics.unhandled.fetch_add(1, Ordering::Relaxed);
            let keys = received.event.payload_keys().join(",");
            tracing::info!(
                kind = received.kind,
                key = received.key,
                payload_keys = keys,
                "no handler for this event"
            );
            return Ok(Handled::Unhandled);
        };
        let result = handler(Arc::new(received)).await;
        match result {
            Ok(()) => {
                let took = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
                self.metrics.processing_us.fetch_add(took, Ordering::Relaxed);
                self.metrics.processed.fetch_add(1, Ordering::Relaxed);
                Ok(Handled::Yes)
            }
            Err(error) => {
                self.metrics.failed.fetch_add(1, Ordering::Relaxed);
                Err(error)
            }
        }
    }
}

/// The most precise entry: the type itself, then ever wider families, then `*`.
fn find<'a, T>(table: &'a BTreeMap<String, T>, kind: &str) -> Option<&'a T> {
    if let Some(exact) = table.get(kind) {
        return Some(exact);
    }
    let mut family = kind;
    while let Some((wider, _)) = family.rsplit_once('.') {
        if let Some(found) = table.get(&format!("{wider}.*")) {
            return Some(found);
        }
        family = wider;
    }
    table.get("*")
}

/// Counts since the process began.
#[derive(Debug, Default)]
pub struct RouterMetrics {
    received: AtomicU64,
    processed: AtomicU64,
    failed: AtomicU64,
    unhandled: AtomicU64,
    processing_us: AtomicU64,
    registered: AtomicU64,
}

/// A reading of [`RouterMetrics`], with the names of row C7.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Metrics {
    /// Trusted events that came in, duplicates included.
    pub events_received: u64,
    /// Events that a handler has worked off.
    pub events_processed: u64,
    /// Tries that failed.
    pub events_failed: u64,
    /// Events without a handler.
    pub unhandled_events: u64,
    /// Mean time of the handlers that succeeded.
    pub avg_processing_time_ms: f64,
    /// Handlers registered.
    pub registered_handlers: u64,
}

impl RouterMetrics {
    /// Counts a trusted event that came in.
    pub fn received(&self) {
        self.received.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts an event that nobody can read.
    pub fn unreadable(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// Reads the counts.
    #[must_use]
    pub fn read(&self) -> Metrics {
        let processed = self.processed.load(Ordering::Relaxed);
        let total_ms = self.processing_us.load(Ordering::Relaxed) as f64 / 1000.0;
        Metrics {
            events_received: self.received.load(Ordering::Relaxed),
            events_processed: processed,
            events_failed: self.failed.load(Ordering::Relaxed),
            unhandled_events: self.unhandled.load(Ordering::Relaxed),
            avg_processing_time_ms: if processed == 0 { 0.0 } else { total_ms / processed as f64 },
            registered_handlers: self.registered.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn received(kind: &str) -> Received {
        let body = format!(r#"{{"id":"e","type":"{kind}","created_at":"t","data":{{"secret":"canary"}}}}"#);
        Received {
            key: "k".to_owned(),
            kind: kind.to_owned(),
            event: Event::parse(body.as_bytes()).unwrap(),
            body: body.into(),
            attempts: 0,
            received_at_ms: 0,
        }
    }

    #[tokio::test]
    async fn the_most_precise_handler_gets_the_event_alone() {
        let seen: Arc<Mutex<Vec<&'static str>>> = Arc::default();
        let note = |name: &'static str| {
            let seen = Arc::clone(&seen);
            move |_: Arc<Received>| {
                seen.lock().unwrap().push(name);
                async { Ok(()) }
            }
        };
        let router = Router::new()
            .on("x.*", note("family"))
            .on("x.y.*", note("inner"))
            .on("x.done", note("exact"))
            .on("*", note("any"));
        for kind in ["x.done", "x.other", "x.y.z", "y.other"] {
            assert_eq!(router.dispatch(received(kind)).await, Ok(Handled::Yes));
        }
        assert_eq!(*seen.lock().unwrap(), ["exact", "family", "inner", "any"]);
        let read = router.metrics().read();
        assert_eq!((read.events_processed, read.registered_handlers, read.events_failed), (4, 4, 0));
    }

    #[tokio::test]
    async fn unhandled_and_failed_ones_are_counted() {
        let router = Router::new()
            .on("bad.*", |_| async { Err(HandlerError::Transient("no".to_owned())) })
            .on("strict.one", |_| async { Ok(()) })
            .parser("strict.*", |_| Err(ParseError::NotAnObject));
        assert_eq!(router.dispatch(received("new.kind")).await, Ok(Handled::Unhandled));
        assert!(matches!(router.dispatch(received("bad.one")).await, Err(HandlerError::Transient(_))));
        assert!(matches!(router.dispatch(received("strict.one")).await, Err(HandlerError::Permanent(_))));
        let text = serde_json::to_value(router.metrics().read()).unwrap();
        for (name, value) in [
            ("unhandled_events", 1),
            ("events_failed", 2),
            ("events_processed", 0),
            ("registered_handlers", 2),
        ] {
            assert_eq!(text[name], value, "{text}");
        }
        assert!(text["avg_processing_time_ms"].is_number() && text["events_received"].is_number());
    }
}
