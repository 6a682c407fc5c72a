//! Who asks: API keys and what they may do.

use std::{
    collections::HashMap,
    sync::{Arc, RwLock},
    time::{Duration, Instant},
};

use axum::http::{HeaderMap, StatusCode, header};
use ringback_domain::ProjectId;
use ringback_service_runtime::RingbackConfig;
use ringback_store::{
    Store,
    auth::{ScopeSet, find_key},
};
use sha2::{Digest as _, Sha256};

use crate::{error::ApiError, rate::Rate};

/// A key that was accepted.
#[derive(Debug)]
pub(crate) struct Principal {
    pub(crate) project: ProjectId,
    pub(crate) scopes: ScopeSet,
    /// Submits of the whole project.
    pub(crate) rate: Arc<Rate>,
}

/// A disabled key works at most this much longer; an unknown one is asked for again after it.
const TTL: Duration = Duration::from_secs(5);
/// Unknown keys are remembered too, so that guessing costs no SQL each; beyond this many the memory is emptied.
const REMEMBERED_MAX: usize = 10_000;

struct Remembered {
    principal: Option<Arc<Principal>>,
    at: Instant,
}

/// Keys as SQL knows them, remembered for a few seconds.
pub(crate) struct Auth {
    store: Store,
    remembered: RwLock<HashMap<[u8; 32], Remembered>>,
    rates: RwLock<HashMap<ProjectId, Arc<Rate>>>,
    default_per_10s: u64,
    per_10s: HashMap<String, u64>,
}

impl Auth {
    pub(crate) fn new(store: Store, config: &RingbackConfig) -> Self {
        let per_10s =
            config.projects.iter().filter_map(|(name, p)| Some((name.clone(), p.submits_per_10s?))).collect();
        Self {
            store,
            remembered: RwLock::default(),
            rates: RwLock::default(),
            default_per_10s: config.server.submits_per_10s,
            per_10s,
        }
    }

    /// The key of a request, if it may do what needs `scope`.
    pub(crate) async fn authorize(
        &self,
        headers: &HeaderMap,
        scope: ScopeSet,
    ) -> Result<Arc<Principal>, ApiError> {
        let key = key_of(headers)?;
        let hash: [u8; 32] = Sha256::digest(key).into();
        let principal = match self.recall(&hash) {
            Some(known) => known,
            None => self.look_up(hash).await?,
        };
        let principal = principal.ok_or_else(|| {
            ApiError::new(
                StatusCode::UNAUTHORIZED,
                "the API key is not known; send it as `Authorization: Bearer KEY`",
            )
        })?;
        if !principal.scopes.allows(scope) {
            return Err(ApiError::new(
                StatusCode::FORBIDDEN,
                format!("this API key lacks the scope `{}` that the request needs", scope_word(scope)),
            ));
        }
        Ok(principal)
    }

    fn recall(&self, hash: &[u8; 32]) -> Option<Option<Arc<Principal>>> {
        // A panic while it is held leaves a map that is still right.
        let remembered = self.remembered.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        remembered.get(hash).filter(|r| r.at.elapsed() < TTL).map(|r| r.principal.clone())
    }

    async fn look_up(&self, hash: [u8; 32]) -> Result<Option<Arc<Principal>>, ApiError> {
        let found = find_key(self.store.read(), &hash).await?;
        let principal = found.map(|key| {
            let rate = self.rate_of(key.project, &key.project_name);
            Arc::new(Principal { project: key.project, scopes: key.scopes, rate })
        });
        let mut remembered = self.remembered.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if remembered.len() >= REMEMBERED_MAX {
            remembered.clear();
        }
        remembered.insert(hash, Remembered { principal: principal.clone(), at: Instant::now() });
        Ok(principal)
    }

    fn rate_of(&self, project: ProjectId, name: &str) -> Arc<Rate> {
        let mut rates = self.rates.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let per_10s = self.per_10s.get(name).copied().unwrap_or(self.default_per_10s);
        Arc::clone(rates.entry(project).or_insert_with(|| Arc::new(Rate::per_10s(per_10s))))
    }
}

/// `Authorization: Bearer KEY` or the bare key, as RunPod's clients send it.
fn key_of(headers: &HeaderMap) -> Result<&[u8], ApiError> {
    let missing = || {
        ApiError::new(
            StatusCode::UNAUTHORIZED,
            "an API key is needed; send it as `Authorization: Bearer KEY`",
        )
    };
    let value = headers.get(header::AUTHORIZATION).ok_or_else(missing)?.as_bytes().trim_ascii();
    let key = match value.get(..7) {
        Some(scheme) if scheme.eq_ignore_ascii_case(b"bearer ") => value[7..].trim_ascii(),
        _ if value.eq_ignore_ascii_case(b"bearer") => b"",
        _ => value,
    };
    if key.is_empty() { Err(missing()) } else { Ok(key) }
}

const fn scope_word(scope: ScopeSet) -> &'static str {
    match scope {
        ScopeSet::SUBMIT => "submit",
        ScopeSet::READ => "read",
        ScopeSet::WORKER => "worker",
        ScopeSet::METRICS => "metrics",
        _ => "admin",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_comes_bearer_or_bare() {
        let with = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, text.parse().unwrap());
            key_of(&headers).map(<[u8]>::to_vec).map_err(|e| e.status)
        };
        for text in ["Bearer rb_1234", "bearer  rb_1234 ", "rb_1234", "BEARER rb_1234"] {
            assert_eq!(with(text), Ok(b"rb_1234".to_vec()), "{text}");
        }
        for text in ["", "Bearer ", " "] {
            assert_eq!(with(text), Err(StatusCode::UNAUTHORIZED), "{text:?}");
        }
        assert!(key_of(&HeaderMap::new()).is_err());
    }
}
