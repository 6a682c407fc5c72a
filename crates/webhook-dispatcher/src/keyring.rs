//! The signing keys of projects, read from SQL and kept for a few seconds.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ringback_domain::ProjectId;
use ringback_domain::webhook::signature::SigningKey;
use ringback_store::secrets::{SecretKey, ensure_secret, signing_keys};
use ringback_store::{Store, StoreError, Urgency};

/// A new secret signs, and a disabled one stops signing, within this time.
const FRESH: Duration = Duration::from_secs(5);
/// Projects remembered.
const REMEMBERED: usize = 10_000;

type Keys = Arc<[SigningKey]>;

struct Cached {
    keys: Keys,
    read_at: Instant,
    refreshing: bool,
}

/// All live keys of each project.
pub(crate) struct Keyring {
    store: Store,
    key: SecretKey,
    cache: Mutex<HashMap<ProjectId, Cached>>,
    first: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keyring(..)")
    }
}

enum Found {
    Fresh(Keys),
    /// Usable, and this caller is the one to read them again.
    Stale(Keys),
    Missing,
}

impl Keyring {
    pub(crate) fn new(store: Store, key: SecretKey) -> Self {
        Self { store, key, cache: Mutex::default(), first: tokio::sync::Mutex::default() }
    }

    /// The keys of a project, newest first, at least one: a project without a secret gets one now, because nothing
    /// is sent unsigned.
    ///
    /// # Errors
    /// SQL is away and the keys were never read, or they cannot be decrypted.
    pub(crate) async fn keys(&self, project: ProjectId) -> Result<Keys, StoreError> {
        match self.find(project) {
            Found::Fresh(keys) => Ok(keys),
            Found::Stale(old) => match self.read(project).await {
                Ok(keys) => Ok(self.keep(project, keys)),
                Err(error) => {
                    tracing::warn!(project = project.0, %error, "webhook secrets cannot be read again");
                    Ok(self.keep(project, old))
                }
            },
            Found::Missing => {
                // One reader for all who wait; the others find what it kept.
                let _one = self.first.lock().await;
                if let Found::Fresh(keys) | Found::Stale(keys) = self.find(project) {
                    return Ok(keys);
                }
                let keys = self.read(project).await?;
                Ok(self.keep(project, keys))
            }
        }
    }

    fn find(&self, project: ProjectId) -> Found {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        match cache.get_mut(&project) {
            None => Found::Missing,
            Some(cached) if cached.read_at.elapsed() < FRESH || cached.refreshing => {
                Found::Fresh(Arc::clone(&cached.keys))
            }
            Some(cached) => {
                cached.refreshing = true;
                Found::Stale(Arc::clone(&cached.keys))
            }
        }
    }

    fn keep(&self, project: ProjectId, keys: Keys) -> Keys {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= REMEMBERED {
            cache.clear();
        }
        let cached = Cached { keys: Arc::clone(&keys), read_at: Instant::now(), refreshing: false };
        cache.insert(project, cached);
        keys
    }

    async fn read(&self, project: ProjectId) -> Result<Keys, StoreError> {
        let keys = signing_keys(self.store.read(), &self.key, project).await?;
        if !keys.is_empty() {
            return Ok(keys.into());
        }
        let key = self.key.clone();
        self.store
            .write(Urgency::Now, move |tx| {
                let key = key.clone();
                Box::pin(async move { ensure_secret(tx, &key, project).await })
            })
            .await?;
        let keys = signing_keys(self.store.read(), &self.key, project).await?;
        if keys.is_empty() {
            return Err(StoreError::Transient { detail: "no webhook secret can be read yet".to_owned() });
        }
        Ok(keys.into())
    }
}
