//! The secrets that a receiver trusts.

use std::fmt;

use ringback_domain::webhook::runflow;
use ringback_domain::webhook::signature::{SecretError, SecretForm, SigningKey};

/// Most secrets at once: two of a rotation, for a few senders.
pub const MAX_SECRETS: usize = 32;

/// Why a list of secrets cannot be used. The number counts from 1; no text holds the secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SecretsError {
    /// One of them is no key.
    #[error("secret {number}: {reason}")]
    Bad {
        /// Which one.
        number: usize,
        /// Why.
        reason: SecretError,
    },
    /// More than [`MAX_SECRETS`].
    #[error("{0} secrets are given; at most {MAX_SECRETS} are checked")]
    TooMany(usize),
}

/// Live secrets. Each is a key under both schemes, which read the same text differently: Standard Webhooks decodes
/// what follows `whsec_`, Runflow takes the text as it is.
#[derive(Clone, Default)]
pub struct Secrets {
    standard: Vec<SigningKey>,
    runflow: Vec<SigningKey>,
    forms: Vec<SecretForm>,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secrets({})", self.standard.len())
    }
}

impl Secrets {
    /// Reads the secrets as their owners wrote them, `whsec_` and base64 or any other text.
    ///
    /// # Errors
    /// [`SecretsError`].
    pub fn parse<S: AsRef<str>>(texts: &[S]) -> Result<Self, SecretsError> {
        if texts.len() > MAX_SECRETS {
            return Err(SecretsError::TooMany(texts.len()));
        }
        let mut secrets = Self::default();
        for (index, text) in texts.iter().enumerate() {
            let bad = |reason| SecretsError::Bad { number: index + 1, reason };
            let (key, form) = SigningKey::parse(text.as_ref()).map_err(bad)?;
            secrets.standard.push(key);
            secrets.runflow.push(runflow::key(text.as_ref()).map_err(bad)?);
            secrets.forms.push(form);
        }
        Ok(secrets)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.standard.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.standard.is_empty()
    }

    /// How each text was read, in order.
    #[must_use]
    pub fn forms(&self) -> &[SecretForm] {
        &self.forms
    }

    /// The keys of Standard Webhooks.
    #[must_use]
    pub fn standard(&self) -> &[SigningKey] {
        &self.standard
    }

    /// The keys of `Runflow-Signature`.
    #[must_use]
    pub fn runflow(&self) -> &[SigningKey] {
        &self.runflow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_secret_is_named_by_its_number_only() {
        let error = Secrets::parse(&["fine", "whsec_"]).unwrap_err();
        assert_eq!(error, SecretsError::Bad { number: 2, reason: SecretError::Empty });
        let long = "canary-5f1c".repeat(60);
        let error = Secrets::parse(&[&long]).unwrap_err().to_string();
        assert!(error.contains("660 bytes") && !error.contains("canary"), "{error}");
        assert_eq!(Secrets::parse(&["x"; 33]).unwrap_err(), SecretsError::TooMany(33));
        assert_eq!(format!("{:?}", Secrets::parse(&["canary-5f1c"]).unwrap()), "Secrets(1)");
    }
}
