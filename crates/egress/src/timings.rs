//! Where the time of a request went, and whether it may still begin: measured and asked inside the connector and the
//! resolver.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tower::BoxError;
use tower::util::MapFutureLayer;

use crate::error::DialFault;

tokio::task_local! {
    static CLOCK: Clock;
}

/// Not measured: a kept connection needs no name and no handshake.
const NONE: u64 = u64::MAX;

/// Where the time of a request went. What did not happen, as on a kept connection, is `None`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// The answer of the resolver.
    pub dns: Option<Duration>,
    /// A new connection: name, TCP and TLS.
    pub connect: Option<Duration>,
    /// From the start of the request to the headers of the answer.
    pub first_byte: Option<Duration>,
}

/// Says whether a request may still begin. It is asked before each sending and once more when a new connection stands,
/// for names and handshakes take their time, and a process may have slept meanwhile.
#[derive(Clone)]
pub struct Permit(Arc<dyn Fn() -> bool + Send + Sync>);

impl Permit {
    /// Asks `holds` each time.
    pub fn new(holds: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(holds))
    }

    pub(crate) fn holds(&self) -> bool {
        (self.0)()
    }
}

impl std::fmt::Debug for Permit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Permit")
    }
}

#[derive(Debug)]
struct Marks {
    permit: Option<Permit>,
    began: Instant,
    dns_us: AtomicU64,
    connect_us: AtomicU64,
    first_byte_us: AtomicU64,
}

/// Takes the times of one request. Connector and resolver find it in their task.
#[derive(Debug, Clone)]
pub(crate) struct Clock(Arc<Marks>);

impl Clock {
    pub(crate) fn start(permit: Option<Permit>) -> Self {
        Self(Arc::new(Marks {
            permit,
            began: Instant::now(),
            dns_us: AtomicU64::new(NONE),
            connect_us: AtomicU64::new(NONE),
            first_byte_us: AtomicU64::new(NONE),
        }))
    }

    /// Runs `work` so that the clock is found from inside it.
    pub(crate) fn measure<F: Future>(&self, work: F) -> impl Future<Output = F::Output> {
        CLOCK.scope(self.clone(), work)
    }

    /// The clock of the request that this task works for, if it works for one.
    pub(crate) fn current() -> Option<Self> {
        CLOCK.try_with(Self::clone).ok()
    }

    /// Whether the request may still begin.
    pub(crate) fn may_begin(&self) -> bool {
        self.0.permit.as_ref().is_none_or(Permit::holds)
    }

    pub(crate) fn resolved(&self, since: Instant) {
        set(&self.0.dns_us, since);
    }

    fn connected(&self, since: Instant) {
        set(&self.0.connect_us, since);
    }

    pub(crate) fn first_byte(&self) {
        set(&self.0.first_byte_us, self.0.began);
    }

    pub(crate) fn read(&self) -> Timings {
        Timings {
            dns: get(&self.0.dns_us),
            connect: get(&self.0.connect_us),
            first_byte: get(&self.0.first_byte_us),
        }
    }
}

fn set(mark: &AtomicU64, since: Instant) {
    let us = u64::try_from(since.elapsed().as_micros()).unwrap_or(NONE - 1);
    mark.store(us, Ordering::Relaxed);
}

fn get(mark: &AtomicU64) -> Option<Duration> {
    let us = mark.load(Ordering::Relaxed);
    (us != NONE).then(|| Duration::from_micros(us))
}

/// Measures each new connection, also one that fails, and gives up one whose request may no longer begin.
pub(crate) fn layer<Fut, C>()
-> MapFutureLayer<impl FnMut(Fut) -> BoxFuture<'static, Result<C, BoxError>> + Clone>
where
    Fut: Future<Output = Result<C, BoxError>> + Send + 'static,
{
    MapFutureLayer::new(|connecting: Fut| -> BoxFuture<'static, Result<C, BoxError>> {
        let (clock, since) = (Clock::current(), Instant::now());
        Box::pin(async move {
            let connection = connecting.await;
            let Some(clock) = clock else { return connection };
            clock.connected(since);
            if connection.is_ok() && !clock.may_begin() {
                return Err(DialFault::Withdrawn.into());
            }
            connection
        })
    })
}
