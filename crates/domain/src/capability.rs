//! The capability in a link: derived from what the link opens, so that every body and every retry carries the same.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use crate::{ArtifactId, BatchId};

/// 192 bits: not to be guessed, and 32 characters without padding.
const TOKEN_BYTES: usize = 24;

/// What a link opens. A token for one kind of thing opens nothing of another kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opens<'a> {
    /// The bytes of an artefact, and its confirmation.
    Artifact(&'a ArtifactId),
    /// The files that a batch leaves.
    Batch(&'a BatchId),
}

impl Opens<'_> {
    fn mac(self, key: &[u8; 32]) -> Option<Hmac<Sha256>> {
        // Ids are of one length: words that do not end in each other give different bytes.
        let (kind, id): (&[u8], &[u8; 16]) = match self {
            Self::Artifact(id) => (b"artifact", id.as_bytes()),
            Self::Batch(id) => (b"batch", id.as_bytes()),
        };
        let mut mac = Hmac::<Sha256>::new_from_slice(key).ok()?;
        mac.update(kind);
        mac.update(id);
        Some(mac)
    }
}

/// The token of a thing under the key of the installation.
#[must_use]
pub fn capability(key: &[u8; 32], opens: Opens<'_>) -> String {
    let tag = opens.mac(key).map(|mac| mac.finalize().into_bytes().to_vec()).unwrap_or_default();
    URL_SAFE_NO_PAD.encode(tag.get(..TOKEN_BYTES).unwrap_or_default())
}

/// Whether a token from outside is the thing's, in a time that does not tell how much of it was right.
#[must_use]
pub fn capability_matches(key: &[u8; 32], opens: Opens<'_>, token: &str) -> bool {
    let Ok(tag) = URL_SAFE_NO_PAD.decode(token) else { return false };
    tag.len() == TOKEN_BYTES && opens.mac(key).is_some_and(|mac| mac.verify_truncated_left(&tag).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_opens_one_thing_only() {
        let (a, b) = (ArtifactId::from_parts(1, [1; 10]), ArtifactId::from_parts(1, [2; 10]));
        let batch = BatchId::from_parts(1, [1; 10]);
        assert_eq!(a.as_bytes(), batch.as_bytes(), "the same number, another kind");
        let all = [Opens::Artifact(&a), Opens::Artifact(&b), Opens::Batch(&batch)];
        for (n, opens) in all.iter().enumerate() {
            let token = capability(&[7; 32], *opens);
            assert_eq!(token.len(), 32);
            for (m, other) in all.iter().enumerate() {
                assert_eq!(capability_matches(&[7; 32], *other, &token), n == m, "{opens:?} at {other:?}");
            }
            assert!(!capability_matches(&[8; 32], *opens, &token));
            for wrong in ["", "x", &token[..31], &format!("{token}A"), &token.to_ascii_lowercase(), "é"] {
                assert!(!capability_matches(&[7; 32], *opens, wrong), "{wrong}");
            }
        }
    }
}
