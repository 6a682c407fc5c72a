//! The signing keys of projects and webhooks, read from SQL and kept for a few seconds.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ringback_domain::ProjectId;
use ringback_domain::webhook::runflow;
use ringback_domain::webhook::signature::SigningKey;
use ringback_service_runtime::Redacted;
use ringback_store::secrets::{SecretKey, ensure_secret, live_secrets};
use ringback_store::webhooks::Webhook;
use ringback_store::webhooks::secrets::live;
use ringback_store::{Store, StoreError, Urgency};

use crate::clock::Clock;

/// A new secret of a project signs, and one that has run out stops signing, within this time.
const FRESH: Duration = Duration::from_secs(5);
/// Owners remembered.
const REMEMBERED: usize = 10_000;

/// Whose keys sign.
#[derive(Debug, Clone)]
pub(crate) enum Signer {
    /// A project's: for the targets of its jobs.
    Project(ProjectId),
    /// A webhook's own. With the number of the registry in which it was seen: keys read before that are stale.
    Webhook(Arc<Webhook>, i64),
}

impl Signer {
    fn name(&self) -> (bool, i64) {
        match self {
            Self::Project(project) => (false, project.0),
            Self::Webhook(webhook, _) => (true, i64::from(webhook.id)),
        }
    }

    fn revision(&self) -> i64 {
        match self {
            Self::Project(_) => 0,
            Self::Webhook(_, revision) => *revision,
        }
    }
}

/// The live keys of one owner.
#[derive(Debug)]
pub(crate) struct Keys {
    /// By Standard Webhooks, newest first.
    pub standard: Vec<SigningKey>,
    /// The newest, as Runflow reads it.
    pub runflow: SigningKey,
}

struct Cached {
    keys: Arc<Keys>,
    read_at: Instant,
    revision: i64,
    refreshing: bool,
}

/// All live keys of each owner.
pub(crate) struct Keyring {
    store: Store,
    key: SecretKey,
    clock: Arc<Clock>,
    cache: Mutex<HashMap<(bool, i64), Cached>>,
    first: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keyring(..)")
    }
}

enum Found {
    Fresh(Arc<Keys>),
    /// Usable, and this caller is the one to read them again.
    Stale(Arc<Keys>),
    Missing,
}

impl Keyring {
    pub(crate) fn new(store: Store, key: SecretKey, clock: Arc<Clock>) -> Self {
        Self { store, key, clock, cache: Mutex::default(), first: tokio::sync::Mutex::default() }
    }

    /// The keys of an owner, at least one: nothing is sent unsigned.
    ///
    /// # Errors
    /// SQL is away and the keys were never read, they cannot be decrypted, or a webhook has none.
    pub(crate) async fn keys(&self, signer: &Signer) -> Result<Arc<Keys>, StoreError> {
        match self.find(signer) {
            Found::Fresh(keys) => Ok(keys),
            Found::Stale(old) => match self.read(signer).await {
                Ok(keys) => Ok(self.keep(signer, keys)),
                Err(error) => {
                    tracing::warn!(?signer, %error, "webhook secrets cannot be read again");
                    Ok(self.keep(signer, old))
                }
            },
            Found::Missing => {
                // One reader for all who wait; the others find what it kept.
                let _one = self.first.lock().await;
                if let Found::Fresh(keys) | Found::Stale(keys) = self.find(signer) {
                    return Ok(keys);
                }
                let keys = self.read(signer).await?;
                Ok(self.keep(signer, keys))
            }
        }
    }

    fn find(&self, signer: &Signer) -> Found {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        match cache.get_mut(&signer.name()) {
            Some(cached) if cached.revision >= signer.revision() => {
                if cached.read_at.elapsed() < FRESH || cached.refreshing {
                    return Found::Fresh(Arc::clone(&cached.keys));
                }
                cached.refreshing = true;
                Found::Stale(Arc::clone(&cached.keys))
            }
            Some(_) | None => Found::Missing,
        }
    }

    fn keep(&self, signer: &Signer, keys: Arc<Keys>) -> Arc<Keys> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= REMEMBERED {
            cache.clear();
        }
        let (read_at, revision) = (Instant::now(), signer.revision());
        let cached = Cached { keys: Arc::clone(&keys), read_at, revision, refreshing: false };
        cache.insert(signer.name(), cached);
        keys
    }

    async fn read(&self, signer: &Signer) -> Result<Arc<Keys>, StoreError> {
        let mut secrets = self.secrets(signer).await?;
        if secrets.is_empty()
            && let Signer::Project(project) = *signer
        {
            // A project without a secret gets one now.
            let key = self.key.clone();
            self.store
                .write(Urgency::Now, move |tx| {
                    let key = key.clone();
                    Box::pin(async move { ensure_secret(tx, &key, project).await })
                })
                .await?;
            secrets = self.secrets(signer).await?;
        }
        let Some(newest) = secrets.first() else {
            return Err(StoreError::Transient { detail: "no webhook secret can be read yet".to_owned() });
        };
        let refused = |error: ringback_domain::webhook::signature::SecretError| StoreError::Permanent {
            detail: error.to_string(),
        };
        let runflow = runflow::key(newest.expose()).map_err(refused)?;
        let standard = secrets
            .iter()
            .map(|secret| Ok(SigningKey::parse(secret.expose()).map_err(refused)?.0))
            .collect::<Result<Vec<_>, StoreError>>()?;
        Ok(Arc::new(Keys { standard, runflow }))
    }

    async fn secrets(&self, signer: &Signer) -> Result<Vec<Redacted<String>>, StoreError> {
        match signer {
            Signer::Project(project) => {
                let live = live_secrets(self.store.read(), &self.key, *project).await?;
                Ok(live.into_iter().map(|secret| secret.secret).collect())
            }
            Signer::Webhook(webhook, _) => {
                let (id, name) = (i64::from(webhook.id), webhook.public_id.as_str());
                let live = live(self.store.read(), &self.key, id, name, self.clock.now_ms()).await?;
                Ok(live.into_iter().map(|secret| secret.secret).collect())
            }
        }
    }
}
