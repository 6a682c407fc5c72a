//! `[projects.<name>]`: API keys and webhook secrets.

use super::problems::{NAME_RULE, Problems, is_name};
use super::secrets::{SecretError, SecretSource};
use super::section::section;
use crate::Redacted;
use ringback_domain::usage::Period;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::PathBuf;

/// What a key may do (DESIGN 5, Access).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Submit, cancel and retry jobs and batches.
    Submit,
    /// Read jobs, batches, deliveries and streams.
    Read,
    /// Manage: endpoints, secrets, purges. Includes every other scope.
    Admin,
    /// Take jobs as a worker elsewhere.
    Worker,
    /// Read metrics.
    Metrics,
}

section! {
    /// One project: its keys and secrets. The project `default` always exists.
    ProjectConfig {
        /// API keys of the project.
        api_keys: Vec<ApiKeyConfig> = Vec::new(),
        /// Secrets that sign this project's job webhooks, newest first; each body is signed with all of them. Empty: one is generated at first start and kept encrypted in SQL.
        webhook_secrets: Vec<WebhookSecretConfig> = Vec::new(),
        /// Submits this project may make in any 10 seconds; 0 means no limit. Unset: `server.submits_per_10s`.
        submits_per_10s: Option<u64> = None,
        /// How much the project may use per period, see below. Unset: no limit.
        quota: Option<QuotaConfig> = None,
    }
}

section! {
    /// How much a project may use per period. Beyond it submits get 429; webhooks hear of 80 %, 95 % and the limit.
    QuotaConfig {
        /// When counting begins anew, in UTC: "hour", "day" or "month".
        period: Period = Period::Month,
        /// Jobs that may be submitted per period; those of batches count. Unset: no limit.
        jobs: Option<u64> = None,
        /// Tokens that completions may read and write per period, counted when they end. Unset: no limit.
        tokens: Option<u64> = None,
    }
}

section! {
    /// One API key. Give exactly one of `key`, `key_env`, `key_sha256`.
    ApiKeyConfig {
        /// Name shown in lists and audit entries.
        name: String = String::new(),
        /// The key itself.
        key: Option<Redacted<String>> = None,
        /// Name of an environment variable that holds the key.
        key_env: Option<String> = None,
        /// SHA-256 of the key, 64 hex digits.
        key_sha256: Option<String> = None,
        /// What the key may do: submit, read, admin, worker, metrics.
        scopes: Vec<Scope> = vec![Scope::Submit, Scope::Read],
    }
}

section! {
    /// One webhook secret. Give exactly one of `secret`, `secret_env`, `secret_file`.
    WebhookSecretConfig {
        /// `whsec_` and base64 (Standard Webhooks); any other text is taken as raw bytes.
        secret: Option<Redacted<String>> = None,
        /// Name of an environment variable that holds the secret.
        secret_env: Option<String> = None,
        /// File that holds the secret.
        secret_file: Option<PathBuf> = None,
    }
}

/// Largest limit: counts stay inside 63 bits.
const QUOTA_MAX: u64 = 1 << 53;

/// Shortest key we accept: shorter ones can be guessed over the network.
const MIN_KEY_CHARS: usize = 16;

impl ApiKeyConfig {
    /// SHA-256 of the key: what is stored and compared.
    ///
    /// # Errors
    /// When the environment variable is unset, the key is shorter than 16 characters, or the digest is not 64 hex digits.
    pub fn resolve_sha256(&self, key: &str) -> Result<[u8; 32], SecretError> {
        let form = |detail: &str| SecretError::Form { key: key.to_owned(), detail: detail.to_owned() };
        if let Some(hex) = &self.key_sha256 {
            return parse_sha256(hex).ok_or_else(|| form("key_sha256 must be 64 hex digits"));
        }
        let plain = SecretSource { value: self.key.as_ref(), env: self.key_env.as_deref(), file: None }
            .resolve(key)?
            .ok_or_else(|| form("needs one of key, key_env, key_sha256"))?;
        if plain.expose().len() < MIN_KEY_CHARS {
            return Err(form("the key is shorter than 16 characters"));
        }
        Ok(Sha256::digest(plain.expose().as_bytes()).into())
    }

    fn validate(&self, at: &str, p: &mut Problems) {
        if !is_name(&self.name) {
            p.add(format!("{at}.name"), NAME_RULE);
        }
        let given = [
            ("key", self.key.is_some()),
            ("key_env", self.key_env.is_some()),
            ("key_sha256", self.key_sha256.is_some()),
        ];
        p.at_most_one(at, &given);
        if given.iter().all(|(_, set)| !set) {
            p.add(at, "needs one of key, key_env, key_sha256");
        }
        if self.key.as_ref().is_some_and(|key| key.expose().len() < MIN_KEY_CHARS) {
            p.add(format!("{at}.key"), "is shorter than 16 characters");
        }
        if self.key_sha256.as_deref().is_some_and(|hex| parse_sha256(hex).is_none()) {
            p.add(format!("{at}.key_sha256"), "must be 64 hex digits");
        }
        if self.scopes.is_empty() {
            p.add(format!("{at}.scopes"), "is empty: such a key may do nothing");
        }
    }
}

impl WebhookSecretConfig {
    /// The secret's text, `whsec_…` or raw.
    ///
    /// # Errors
    /// When it cannot be read or none is given.
    pub fn resolve(&self, key: &str) -> Result<Redacted<String>, SecretError> {
        SecretSource {
            value: self.secret.as_ref(),
            env: self.secret_env.as_deref(),
            file: self.secret_file.as_deref(),
        }
        .resolve(key)?
        .ok_or_else(|| SecretError::Form {
            key: key.to_owned(),
            detail: "needs one of secret, secret_env, secret_file".to_owned(),
        })
    }

    fn validate(&self, at: &str, p: &mut Problems) {
        let given = [
            ("secret", self.secret.is_some()),
            ("secret_env", self.secret_env.is_some()),
            ("secret_file", self.secret_file.is_some()),
        ];
        p.at_most_one(at, &given);
        if given.iter().all(|(_, set)| !set) {
            p.add(at, "needs one of secret, secret_env, secret_file");
        }
        if self.secret.as_ref().is_some_and(|secret| secret.expose().is_empty()) {
            p.add(format!("{at}.secret"), "is empty");
        }
    }
}

impl ProjectConfig {
    pub(super) fn validate(&self, name: &str, p: &mut Problems) {
        let at = format!("projects.{name}");
        if !is_name(name) {
            p.add(&at, format!("the project name {NAME_RULE}"));
        }
        for (n, key) in self.api_keys.iter().enumerate() {
            key.validate(&format!("{at}.api_keys[{n}]"), p);
            if self.api_keys[..n].iter().any(|other| other.name == key.name) {
                p.add(format!("{at}.api_keys[{n}].name"), format!("`{}` is used twice", key.name));
            }
        }
        if let Some(quota) = &self.quota {
            for (key, limit) in [("jobs", quota.jobs), ("tokens", quota.tokens)] {
                if let Some(limit) = limit {
                    p.within(&format!("{at}.quota.{key}"), limit, 0, QUOTA_MAX);
                }
            }
            if quota.jobs.is_none() && quota.tokens.is_none() {
                p.add(format!("{at}.quota"), "limits nothing: set jobs or tokens");
            }
        }
        for (n, secret) in self.webhook_secrets.iter().enumerate() {
            secret.validate(&format!("{at}.webhook_secrets[{n}]"), p);
        }
    }
}

fn parse_sha256(hex: &str) -> Option<[u8; 32]> {
    if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut out = [0u8; 32];
    for (n, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * n..2 * n + 2], 16).ok()?;
    }
    Some(out)
}
