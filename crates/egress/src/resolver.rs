//! Name resolution inside the connector: only answers that the policy allows are handed on.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use ringback_domain::webhook::address::AddressPolicy;

use crate::error::DialFault;
use crate::timings::Clock;

/// Asks for the addresses of a name. Tests bring their own to play a hostile name server.
pub trait Lookup: Send + Sync + 'static {
    /// All addresses of `host`, in the order of preference.
    fn lookup(&self, host: String) -> BoxFuture<'static, io::Result<Vec<IpAddr>>>;
}

/// The resolver of the operating system.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemLookup;

impl Lookup for SystemLookup {
    fn lookup(&self, host: String) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> {
        async move { Ok(tokio::net::lookup_host((host, 0)).await?.map(|addr| addr.ip()).collect()) }.boxed()
    }
}

type Answer = Result<Arc<[IpAddr]>, Arc<io::Error>>;
type InFlight = Arc<Mutex<HashMap<String, Shared<BoxFuture<'static, Answer>>>>>;

/// Resolves, filters, and asks only once at a time for each name: the system's resolver blocks a thread per
/// question, and a name whose server never answers must not take them all (P9). Nothing is cached beyond that.
pub(crate) struct GuardedResolver {
    policy: Arc<AddressPolicy>,
    lookup: Arc<dyn Lookup>,
    in_flight: InFlight,
}

impl GuardedResolver {
    pub(crate) fn new(policy: Arc<AddressPolicy>, lookup: Arc<dyn Lookup>) -> Self {
        Self { policy, lookup, in_flight: InFlight::default() }
    }

    fn ask(&self, host: &str) -> Shared<BoxFuture<'static, Answer>> {
        let mut in_flight = self.in_flight.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(asked) = in_flight.get(host) {
            return asked.clone();
        }
        let (question, host, table) =
            (self.lookup.lookup(host.to_owned()), host.to_owned(), Arc::clone(&self.in_flight));
        let key = host.clone();
        // A task of its own, so that the entry goes away even if everybody who asked has given up.
        let task = tokio::spawn(async move {
            let answer = question.await.map(Arc::from).map_err(Arc::new);
            table.lock().unwrap_or_else(PoisonError::into_inner).remove(&host);
            answer
        });
        let asked = async move { task.await.unwrap_or_else(|lost| Err(Arc::new(io::Error::other(lost)))) }
            .boxed()
            .shared();
        in_flight.insert(key, asked.clone());
        asked
    }
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let policy = Arc::clone(&self.policy);
        let asked = self.ask(name.as_str());
        let (clock, since) = (Clock::current(), Instant::now());
        Box::pin(async move {
            let found = asked.await;
            if let Some(clock) = clock {
                clock.resolved(since);
            }
            let found = found.map_err(|error| DialFault::Dns(error.to_string()))?;
            let mut denied = None;
            let mut allowed = Vec::with_capacity(found.len());
            for &ip in found.iter() {
                match policy.check(ip) {
                    Ok(()) => allowed.push(SocketAddr::new(ip, 0)),
                    Err(range) => denied = Some(DialFault::Blocked { ip, range }),
                }
            }
            if allowed.is_empty() {
                let fault = denied.unwrap_or_else(|| DialFault::Dns("the name has no address".to_owned()));
                return Err(fault.into());
            }
            let addrs: Addrs = Box::new(allowed.into_iter());
            Ok(addrs)
        })
    }
}
