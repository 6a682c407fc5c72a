//! The registered webhooks as the dispatcher serves them: how, whether at all, and what changed.
//!
//! One task reads the registry when its number in SQL has risen, and hands a new view to all partitions. Whoever meets
//! a target that the view does not know asks for a fresh one; what is not in there either was deleted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderName, HeaderValue};
use ringback_domain::event::EventType;
use ringback_domain::target::{REGISTERED_TARGET_BASE, registered_webhook};
use ringback_domain::webhook::response::Profile;
use ringback_domain::webhook::schedule::RetryPolicy;
use ringback_service_runtime::Shutdown;
use ringback_store::deliveries::DeliveryState;
use ringback_store::secrets::SecretKey;
use ringback_store::webhooks::secrets::open_headers;
use ringback_store::webhooks::{Registry, Webhook};
use ringback_store::{Store, StoreError};
use tokio::sync::{Notify, watch};

use crate::book::{Rules, Standing};
use crate::clock::Clock;

/// The number in SQL is compared this often; whoever changes something in this process asks at once.
const LOOK: Duration = Duration::from_millis(500);
/// A webhook that said 410 takes nothing while that is being written down, at most so long.
const SUSPENDED: Duration = Duration::from_secs(30);
/// Headers of the transport and of ours, which nobody else sets.
const RESERVED: [&str; 6] = ["host", "content-length", "transfer-encoding", "connection", "te", "upgrade"];

/// A registered webhook ready to be sent to.
#[derive(Debug)]
pub(crate) struct Served {
    pub webhook: Arc<Webhook>,
    pub rules: Arc<Rules>,
    pub headers: HeaderMap,
    pub deadline: Option<Duration>,
    expired: bool,
}

/// All registered webhooks at one moment.
#[derive(Debug, Default)]
pub(crate) struct View {
    revision: i64,
    served: HashMap<u32, Arc<Served>>,
    /// Targets that somebody asked for and that do not exist.
    absent: BTreeSet<u32>,
    suspended: BTreeMap<u32, Instant>,
}

impl View {
    /// Rises with every change of a webhook or of its secrets.
    pub(crate) fn revision(&self) -> i64 {
        self.revision
    }

    /// The webhook that a target number means.
    pub(crate) fn served(&self, target: u32) -> Option<&Arc<Served>> {
        self.served.get(&registered_webhook(target)?)
    }

    /// Whether anything may be sent to a target. `None` = the view does not know it yet.
    pub(crate) fn standing(&self, target: u32, event: u32) -> Option<Standing> {
        if target < REGISTERED_TARGET_BASE {
            return Some(Standing::Live);
        }
        let deleted = Standing::Ended(DeliveryState::Cancelled, "webhook_deleted");
        let Some(served) = self.served(target) else {
            return self.absent.contains(&target).then_some(deleted);
        };
        // A person wants to see whether it works.
        let test = event == EventType::WebhookTest.code();
        Some(if served.expired {
            Standing::Ended(DeliveryState::Cancelled, "webhook_expired")
        } else if served.webhook.url.is_none() {
            Standing::Ended(DeliveryState::Cancelled, "no_url_read_from_the_feed")
        } else if test {
            Standing::Live
        } else if served.webhook.disabled {
            Standing::Ended(DeliveryState::Dead, "webhook_disabled")
        } else if served.webhook.paused || self.is_suspended(target) {
            Standing::Held
        } else {
            Standing::Live
        })
    }

    /// Webhooks that take nothing now.
    pub(crate) fn held(&self) -> Vec<u32> {
        let held = self.served.values().map(|served| REGISTERED_TARGET_BASE + served.webhook.id);
        held.filter(|target| self.standing(*target, u32::MAX) == Some(Standing::Held)).collect()
    }

    fn is_suspended(&self, target: u32) -> bool {
        self.suspended.get(&target).is_some_and(|until| *until > Instant::now())
    }

    /// Targets that are served otherwise than in `before`.
    pub(crate) fn changed_since(&self, before: &Self) -> Vec<u32> {
        let same = |id: &u32| match (self.served.get(id), before.served.get(id)) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (a, b) => a.is_none() && b.is_none(),
        };
        let ids: BTreeSet<u32> = self.served.keys().chain(before.served.keys()).copied().collect();
        let mut targets: BTreeSet<u32> =
            ids.iter().filter(|id| !same(id)).map(|id| REGISTERED_TARGET_BASE + id).collect();
        targets.extend(self.absent.symmetric_difference(&before.absent));
        let (now, then) = (self.suspended.keys(), before.suspended.keys());
        targets.extend(now.chain(then).filter(|t| self.suspended.get(t) != before.suspended.get(t)));
        targets.into_iter().collect()
    }
}

/// Keeps the view.
pub(crate) struct Directory {
    store: Store,
    key: SecretKey,
    operator: Profile,
    clock: Arc<Clock>,
    view: watch::Sender<Arc<View>>,
    asked: Mutex<BTreeSet<u32>>,
    wake: Notify,
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Directory(..)")
    }
}

impl Directory {
    pub(crate) fn new(store: Store, key: SecretKey, operator: Profile, clock: Arc<Clock>) -> Self {
        Self {
            store,
            key,
            operator,
            clock,
            view: watch::Sender::new(Arc::default()),
            asked: Mutex::default(),
            wake: Notify::new(),
        }
    }

    pub(crate) fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    /// Somebody is owed something for a target that the view does not know.
    pub(crate) fn ask(&self, target: u32) {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(target);
        self.wake.notify_one();
    }

    /// Something was changed by this process.
    pub(crate) fn changed(&self) {
        self.wake.notify_one();
    }

    /// Sends nothing more to a webhook until SQL says what it is now.
    pub(crate) fn suspend(&self, target: u32) {
        self.view.send_modify(|view| {
            let mut suspended = view.suspended.clone();
            suspended.insert(target, Instant::now() + SUSPENDED);
            *view = Arc::new(View {
                revision: view.revision,
                served: view.served.clone(),
                absent: view.absent.clone(),
                suspended,
            });
        });
    }

    /// Keeps the view until the process wants to end.
    pub(crate) async fn run(&self, shutdown: Shutdown) {
        loop {
            if let Err(error) = self.refresh().await {
                tracing::warn!(%error, "registered webhooks cannot be read");
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = self.wake.notified() => {}
                () = shutdown.triggered() => return,
            }
        }
    }

    async fn refresh(&self) -> Result<(), StoreError> {
        // Taken first: what was asked for afterwards is looked for in the next reading.
        let asked = std::mem::take(&mut *self.asked.lock().unwrap_or_else(PoisonError::into_inner));
        let registry = match self.store.registry().await {
            Ok(registry) => registry,
            Err(error) => {
                self.asked.lock().unwrap_or_else(PoisonError::into_inner).extend(asked);
                return Err(error);
            }
        };
        let before = self.view();
        let now = self.clock.now_ms();
        let over = |w: &Webhook| w.is_expired(now);
        let aged = before.served.values().any(|served| served.expired != over(&served.webhook));
        let unsuspend = before.suspended.values().any(|until| *until <= Instant::now());
        let newer = registry.revision() != before.revision || before.revision == 0;
        if !newer && !aged && !unsuspend && asked.is_empty() {
            return Ok(());
        }
        let next = Arc::new(self.next(&before, &registry, asked, newer, now));
        if !next.changed_since(&before).is_empty() || next.revision != before.revision {
            self.view.send_replace(next);
        }
        Ok(())
    }

    fn next(
        &self,
        before: &View,
        registry: &Registry,
        asked: BTreeSet<u32>,
        newer: bool,
        now_ms: i64,
    ) -> View {
        let served: HashMap<u32, Arc<Served>> = registry
            .webhooks()
            .map(|webhook| {
                let expired = webhook.is_expired(now_ms);
                let known = before
                    .served
                    .get(&webhook.id)
                    .filter(|served| served.expired == expired && same_service(&served.webhook, webhook));
                let served = known.map_or_else(|| Arc::new(self.serve(webhook, expired)), Arc::clone);
                (webhook.id, served)
            })
            .collect();
        let gone = |id: &u32| !served.contains_key(id);
        let mut absent: BTreeSet<u32> = before.absent.iter().copied().chain(asked).collect();
        absent.extend(before.served.keys().filter(|id| gone(id)).map(|id| REGISTERED_TARGET_BASE + id));
        absent.retain(|target| registered_webhook(*target).is_some_and(|id| gone(&id)));
        let mut suspended = before.suspended.clone();
        // What was written down meanwhile is in the registry.
        suspended.retain(|target, until| {
            let disabled = registered_webhook(*target)
                .and_then(|id| served.get(&id))
                .is_none_or(|served| served.webhook.disabled);
            *until > Instant::now() && !(newer && disabled)
        });
        View { revision: registry.revision(), served, absent, suspended }
    }

    fn serve(&self, webhook: &Arc<Webhook>, expired: bool) -> Served {
        let id = webhook.public_id.as_str();
        let (profile, schedule) = webhook
            .retry
            .as_deref()
            .and_then(|text| match serde_json::from_str::<RetryPolicy>(text) {
                Ok(policy) => Some(policy),
                Err(error) => {
                    tracing::error!(webhook = id, %error, "the retry policy of a webhook cannot be read");
                    None
                }
            })
            .unwrap_or_default()
            .resolve(self.operator)
            .unwrap_or_else(|error| {
                tracing::error!(webhook = id, %error, "the retry policy of a webhook cannot be meant");
                (self.operator, ringback_domain::webhook::schedule::Schedule::of(self.operator))
            });
        Served {
            rules: Arc::new(Rules { profile, schedule, strict_order: webhook.strict_order }),
            headers: self.headers(webhook),
            deadline: webhook.deadline_ms.map(Duration::from_millis),
            webhook: Arc::clone(webhook),
            expired,
        }
    }

    fn headers(&self, webhook: &Webhook) -> HeaderMap {
        let Some(sealed) = &webhook.headers_encrypted else { return HeaderMap::new() };
        match open_headers(&self.key, &webhook.public_id, sealed) {
            Ok(headers) => headers
                .expose()
                .iter()
                .filter_map(|(name, value)| {
                    let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
                    let mut value = HeaderValue::from_str(value).ok()?;
                    value.set_sensitive(true);
                    (!RESERVED.contains(&name.as_str())).then_some((name, value))
                })
                .collect(),
            Err(error) => {
                tracing::error!(webhook = webhook.public_id, %error, "headers of a webhook cannot be read");
                HeaderMap::new()
            }
        }
    }
}

/// Whether a webhook is sent to in the same way. How it fares makes no difference.
fn same_service(a: &Webhook, b: &Webhook) -> bool {
    let way =
        |w: &Webhook| Webhook { failing_since_ms: None, last_success_at_ms: None, filter: None, ..w.clone() };
    way(a) == way(b)
}
