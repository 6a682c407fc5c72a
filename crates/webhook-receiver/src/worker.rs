//! The work behind the answer: what is on disk is handed to the router, again and again until it is settled.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use ringback_service_runtime::Shutdown;
use ringback_service_runtime::time::now_ms;
use tokio::task::JoinSet;

use crate::event::Event;
use crate::intake::{Intake, UNREADABLE, retry_after};
use crate::observe::{Observer, Step};
use crate::router::{Handled, HandlerError, Received, Router};
use crate::store::{Closed, DueEvent, Settled};

/// Pause after the store failed.
const STORE_PAUSE: Duration = Duration::from_secs(1);

/// Works events off, so many at a time. Those that wait for hosts have their own places, and each host may take only a
/// share of them: a host that drips costs the others nothing (P9).
#[derive(Debug, Clone)]
pub struct Worker {
    intake: Intake,
    router: Router,
    observer: Observer,
    at_once: usize,
}

/// What is under way: the lane of each event by its key.
type Busy = HashMap<String, String>;

impl Worker {
    /// A worker for what `intake` takes.
    #[must_use]
    pub fn new(intake: Intake, router: Router, observer: Observer, at_once: usize) -> Self {
        Self { intake, router, observer, at_once: at_once.max(1) }
    }

    /// Works until the shutdown is triggered, then waits for what it has begun. What waits stays on disk.
    pub async fn run(self, shutdown: Shutdown) {
        let mut running: JoinSet<String> = JoinSet::new();
        let mut busy = Busy::new();
        let work = std::sync::Arc::clone(self.intake.work());
        while !shutdown.is_triggered() {
            let pause = self.start_due(&mut running, &mut busy).await;
            tokio::select! {
                () = work.notified() => {}
                Some(ended) = running.join_next() => {
                    // A task answers its key; it cannot panic outside of the handler.
                    if let Ok(key) = ended {
                        busy.remove(&key);
                    }
                }
                () = sleep(pause) => {}
                () = shutdown.triggered() => {}
            }
        }
        while running.join_next().await.is_some() {}
    }

    /// Starts what is due as far as there is room; says how long until more is due.
    async fn start_due(&self, running: &mut JoinSet<String>, busy: &mut Busy) -> Option<Duration> {
        let now = now_ms();
        let journal = self.intake.journal();
        // Those under way are due as well, so there may be that many more.
        let limit = u32::try_from(2 * self.at_once + busy.len()).unwrap_or(u32::MAX);
        loop {
            let closed = self.closed(busy);
            if closed.all_hosts && closed.no_host {
                return None;
            }
            let asked = async {
                let due = journal.due(now, limit, &closed).await?;
                Ok::<_, crate::store::StoreError>((due, journal.next_due(now).await?))
            };
            let (due, next) = match asked.await {
                Ok(found) => found,
                Err(error) => {
                    tracing::error!(%error, "what is to be worked off cannot be read");
                    return Some(STORE_PAUSE);
                }
            };
            let mut passed_over = false;
            for (key, lane) in due {
                if busy.contains_key(&key) {
                    continue;
                }
                if !self.has_room(busy, &lane) {
                    passed_over = true;
                    continue;
                }
                busy.insert(key.clone(), lane);
                let worker = self.clone();
                running.spawn(async move {
                    worker.work_off(&key).await;
                    key
                });
            }
            // A lane that filled up just now may have hidden others behind the limit.
            if !passed_over || self.closed(busy) == closed {
                return next.map(|at| Duration::from_millis(u64::try_from(at - now).unwrap_or(0)));
            }
        }
    }

    /// Places of one host among those of all hosts.
    fn per_host(&self) -> usize {
        (self.at_once / 4).max(1)
    }

    fn has_room(&self, busy: &Busy, lane: &str) -> bool {
        if lane.is_empty() {
            return busy.values().filter(|lane| lane.is_empty()).count() < self.at_once;
        }
        let hosts = busy.values().filter(|lane| !lane.is_empty()).count();
        hosts < self.at_once && busy.values().filter(|other| *other == lane).count() < self.per_host()
    }

    fn closed(&self, busy: &Busy) -> Closed {
        let mut hosts: Vec<String> =
            busy.values().filter(|lane| !lane.is_empty() && !self.has_room(busy, lane)).cloned().collect();
        hosts.sort_unstable();
        hosts.dedup();
        let with_host = busy.values().filter(|lane| !lane.is_empty()).count();
        Closed {
            all_hosts: with_host >= self.at_once,
            no_host: busy.len() - with_host >= self.at_once,
            hosts,
        }
    }

    async fn work_off(&self, key: &str) {
        let event = match self.intake.journal().load(key).await {
            Ok(Some(event)) => event,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(%error, key, "an event cannot be read");
                return tokio::time::sleep(STORE_PAUSE).await;
            }
        };
        let begun = Instant::now();
        let kind = event.kind.clone();
        let tries = event.attempts + 1;
        let (subject, result) = self.attempt(event).await;
        let (name, detail) = match &result {
            Ok(Handled::Yes) => ("done", String::new()),
            Ok(Handled::Unhandled) => ("unhandled", "no handler for this type".to_owned()),
            Err(error) => ("failed", error.to_string()),
        };
        let settled = match result {
            Ok(_) => Settled::Done,
            Err(HandlerError::Permanent(error)) => Settled::GivenUp { error },
            Err(HandlerError::Transient(error)) => match retry_after(tries) {
                None => Settled::GivenUp { error },
                Some(wait) => {
                    let wait_ms = i64::try_from(wait.as_millis()).unwrap_or(i64::MAX);
                    Settled::Again { due_at_ms: now_ms().saturating_add(wait_ms), error }
                }
            },
        };
        let (name, detail) = match &settled {
            Settled::Again { due_at_ms, .. } => {
                let wait_s = (due_at_ms - now_ms()).max(0) / 1000;
                ("retry", format!("{detail}; try {tries} of this event, next in {wait_s} s"))
            }
            Settled::Done | Settled::GivenUp { .. } => (name, detail),
        };
        let step = Step {
            name,
            kind,
            subject: subject.unwrap_or_else(|| key.to_owned()),
            detail,
            took: Some(begun.elapsed()),
            failed: settled != Settled::Done,
        };
        ringback_service_runtime::fault::point("receiver.settle.before");
        if let Err(error) = self.intake.journal().settle(key, settled, now_ms()).await {
            // It is worked off once more: handlers must bear that.
            tracing::error!(%error, key, "the end of an event cannot be written down");
            tokio::time::sleep(STORE_PAUSE).await;
        }
        self.observer.tell(&step);
        self.intake.tried(key);
    }

    async fn attempt(&self, due: DueEvent) -> (Option<String>, Result<Handled, HandlerError>) {
        let event = match Event::parse(&due.body) {
            Ok(event) if due.kind != UNREADABLE => event,
            Ok(_) => return (None, Err(HandlerError::Permanent("the body came as unreadable".to_owned()))),
            Err(error) => {
                self.router.metrics().unreadable();
                return (None, Err(HandlerError::Permanent(error.to_string())));
            }
        };
        let subject = event.subject().map(str::to_owned);
        let received = Received {
            key: due.key,
            kind: due.kind,
            event,
            body: due.body,
            attempts: due.attempts,
            received_at_ms: due.received_at_ms,
        };
        let handled = AssertUnwindSafe(self.router.dispatch(received)).catch_unwind().await;
        let panicked = || Err(HandlerError::Transient("the handler panicked".to_owned()));
        (subject, handled.unwrap_or_else(|_| panicked()))
    }
}

async fn sleep(pause: Option<Duration>) {
    match pause {
        Some(pause) => tokio::time::sleep(pause).await,
        None => std::future::pending().await,
    }
}
