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

/// A secret that has run out stops signing within this time. Whatever somebody changes is seen at once: it raises the
/// number of the registry.
const FRESH: Duration = Duration::from_secs(5);
/// Owners remembered.
const REMEMBERED: usize = 10_000;

/// Whose keys sign, with the number of the registry at that moment: keys read before it are stale.
#[derive(Debug, Clone)]
pub(crate) enum Signer {
    /// A project's: for the targets of its jobs.
    Project(ProjectId, i64),
    /// A webhook's own.
    Webhook(Arc<Webhook>, i64),
}

impl Signer {
    fn name(&self) -> (bool, i64) {
        match self {
            Self::Project(project, _) => (false, project.0),
            Self::Webhook(webhook, _) => (true, i64::from(webhook.id)),
        }
    }

    fn revision(&self) -> i64 {
        match self {
            Self::Project(_, revision) | Self::Webhook(_, revision) => *revision,
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
            && let Signer::Project(project, _) = *signer
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
            Signer::Project(project, _) => {
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

#[cfg(test)]
mod tests {
    use ringback_store::Open;
    use ringback_store::project_secrets::remove;
    use ringback_store::secrets::add_secret;
    use ringback_test_support::files::Folder;
    use ringback_test_support::signature::new_secret;

    use super::*;

    const PROJECT: ProjectId = ProjectId(1);

    #[tokio::test(flavor = "multi_thread")]
    async fn a_rotated_secret_of_a_project_is_seen_at_once() {
        let folder = Folder::new("keyring");
        let open = Open::url(format!("sqlite://{}/t.db", folder.path().display()));
        Store::migrate(&open).await.unwrap();
        let store = Store::open(&open).await.unwrap();
        let key = SecretKey::from_bytes(&[7; 32]);
        let add = async || {
            let (key, secret) = (key.clone(), Redacted::new(new_secret()));
            store
                .write(Urgency::Now, move |tx| {
                    let (key, secret) = (key.clone(), secret.clone());
                    Box::pin(async move { add_secret(tx, &key, PROJECT, &secret).await })
                })
                .await
                .unwrap();
        };
        add().await;
        let keyring = Keyring::new(store.clone(), key.clone(), Arc::new(Clock::new()));
        let signing = async || {
            let revision = store.registry().await.unwrap().revision();
            keyring.keys(&Signer::Project(PROJECT, revision)).await.unwrap()
        };
        let first = signing().await;
        assert_eq!(first.standard.len(), 1);
        assert!(Arc::ptr_eq(&first, &signing().await), "kept while nothing changes");
        add().await;
        assert_eq!(signing().await.standard.len(), 2, "both sign");
        let oldest = live_secrets(store.read(), &key, PROJECT).await.unwrap().pop().unwrap().id;
        let sealing = key.clone();
        store
            .write(Urgency::Now, move |tx| {
                let key = sealing.clone();
                Box::pin(async move { remove(tx, &key, PROJECT, oldest).await })
            })
            .await
            .unwrap();
        assert_eq!(signing().await.standard.len(), 1, "the removed one signs no more");
    }
}
