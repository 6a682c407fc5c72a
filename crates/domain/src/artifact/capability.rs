//! The capability in an artefact's links: derived from its id, so that every body and every retry carries the same.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use crate::ArtifactId;

/// 192 bits: not to be guessed, and 32 characters without padding.
const TOKEN_BYTES: usize = 24;

fn mac(key: &[u8; 32], id: &ArtifactId) -> Option<Hmac<Sha256>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).ok()?;
    mac.update(b"artifact");
    mac.update(id.as_bytes());
    Some(mac)
}

/// The token of an artefact under the key of the installation.
#[must_use]
pub fn capability(key: &[u8; 32], id: &ArtifactId) -> String {
    let tag = mac(key, id).map(|mac| mac.finalize().into_bytes().to_vec()).unwrap_or_default();
    URL_SAFE_NO_PAD.encode(tag.get(..TOKEN_BYTES).unwrap_or_default())
}

/// Whether a token from outside is the artefact's, in a time that does not tell how much of it was right.
#[must_use]
pub fn capability_matches(key: &[u8; 32], id: &ArtifactId, token: &str) -> bool {
    let Ok(tag) = URL_SAFE_NO_PAD.decode(token) else { return false };
    tag.len() == TOKEN_BYTES && mac(key, id).is_some_and(|mac| mac.verify_truncated_left(&tag).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_opens_its_artefact_only() {
        let (a, b) = (ArtifactId::from_parts(1, [1; 10]), ArtifactId::from_parts(1, [2; 10]));
        let token = capability(&[7; 32], &a);
        assert_eq!(token.len(), 32);
        assert!(capability_matches(&[7; 32], &a, &token));
        assert!(!capability_matches(&[7; 32], &b, &token));
        assert!(!capability_matches(&[8; 32], &a, &token));
        for wrong in ["", "x", &token[..31], &format!("{token}A"), &token.to_ascii_lowercase(), "é"] {
            assert!(!capability_matches(&[7; 32], &a, wrong), "{wrong}");
        }
    }
}
