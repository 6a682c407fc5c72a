//! The registry of children.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use subtle::ConstantTimeEq;
use tokio::sync::mpsc;

use crate::child::{Child, ChildHandle};
use crate::event::ChildEvent;

/// Times and sizes of a hub.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// How long a take or stop poll is held before it is answered 204. The SDK gives up after 90 s.
    pub hold: Duration,
    /// The same while a child drains: short, so that it ends soon, and not zero, so that it does not spin.
    pub drain_hold: Duration,
    /// Largest body of a result or chunk. A larger one is read, dropped, and fails its job with a reason.
    pub max_body_bytes: usize,
    /// Bytes of chunks per child that may wait to be passed on; then the generator waits.
    pub chunk_budget_bytes: usize,
    /// For SDKs before 1.7.9, which have several takes open at once: how long after a job was handed out
    /// a take with `job_in_progress=0` is not yet believed.
    pub overlap_grace: Duration,
}

impl Default for HubConfig {
    fn default() -> Self {
        Self {
            hold: Duration::from_secs(20),
            drain_hold: Duration::from_millis(300),
            max_body_bytes: 64 * 1024 * 1024,
            chunk_budget_bytes: 8 * 1024 * 1024,
            overlap_grace: Duration::from_secs(5),
        }
    }
}

/// Who a child is.
pub struct Registration {
    /// Worker id, unique among live children.
    pub worker_id: String,
    /// Endpoint name in the child's URLs.
    pub endpoint: String,
    /// Secret that the child sends as `Authorization`.
    pub token: String,
    /// Most jobs that this child may hold at once.
    pub max_jobs: usize,
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("worker_id", &self.worker_id)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

/// Why a child was not registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// Two live processes must never share a worker id.
    #[error("a child with this worker id is already registered")]
    Duplicate,
    /// An empty token would let anybody in.
    #[error("the token of a child must not be empty")]
    EmptyToken,
}

/// Who asks, as the routes see it.
pub(crate) enum Caller {
    /// Known and authorised.
    Child(Arc<Child>),
    /// Unknown worker, wrong endpoint or wrong key.
    Refused,
}

/// All children of one worker process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Hub {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: HubConfig,
    children: Mutex<HashMap<String, Arc<Child>>>,
}

impl Hub {
    /// A hub without children.
    pub fn new(config: HubConfig) -> Self {
        Self { inner: Arc::new(Inner { config, children: Mutex::default() }) }
    }

    /// The hub's times and sizes.
    pub fn config(&self) -> &HubConfig {
        &self.inner.config
    }

    /// Lets a child in. The handle gives it jobs, the receiver tells what it does. Dropping the handle
    /// removes the child.
    ///
    /// # Errors
    /// [`RegisterError`].
    pub fn register(
        &self,
        registration: Registration,
    ) -> Result<(ChildHandle, mpsc::UnboundedReceiver<ChildEvent>), RegisterError> {
        if registration.token.is_empty() {
            return Err(RegisterError::EmptyToken);
        }
        let mut children = self.children();
        if children.contains_key(&registration.worker_id) {
            return Err(RegisterError::Duplicate);
        }
        let (events, receiver) = mpsc::unbounded_channel();
        let child = Arc::new(Child::new(registration, &self.inner.config, events));
        children.insert(child.worker_id().to_owned(), Arc::clone(&child));
        Ok((ChildHandle::new(self.clone(), child), receiver))
    }

    pub(crate) fn remove(&self, worker_id: &str) {
        self.children().remove(worker_id);
    }

    /// Finds the child that a request names and compares its key in constant time.
    pub(crate) fn authenticate(&self, endpoint: &str, worker_id: &str, key: Option<&[u8]>) -> Caller {
        let child = self.children().get(worker_id).cloned();
        // An unknown worker costs one comparison as well, so that the time tells nothing about ids.
        let expected: &[u8] = child.as_ref().map_or(b"-", |child| child.token());
        let sent = key.unwrap_or_default();
        let sent = sent.strip_prefix(b"Bearer ").unwrap_or(sent);
        let matches = bool::from(expected.ct_eq(sent));
        match child {
            Some(child) if child.endpoint() == endpoint => {
                if matches {
                    return Caller::Child(child);
                }
                child.wrong_key();
                Caller::Refused
            }
            Some(_) | None => Caller::Refused,
        }
    }

    fn children(&self) -> MutexGuard<'_, HashMap<String, Arc<Child>>> {
        // A panic while the map is locked leaves it whole: every change is one insert or remove.
        self.inner.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
