//! Standard Webhooks signatures, scheme `v1` (HMAC-SHA256), both sides.
//!
//! Wire facts: <https://www.standardwebhooks.com>, specification 1.0.0, and reference/webhooks.md section 1.
//! Signed bytes are `{id}.{timestamp}.{raw body}`. One header carries one signature per live secret, joined by
//! single spaces: the Python verifier refuses two spaces in a row or an item without a comma.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// Name of the header with the id of the message.
pub const ID_HEADER: &str = "webhook-id";
/// Name of the header with the unix seconds of this attempt.
pub const TIMESTAMP_HEADER: &str = "webhook-timestamp";
/// Name of the header with the signatures.
pub const SIGNATURE_HEADER: &str = "webhook-signature";
/// How far a receiver lets the timestamp be off, in seconds; fixed in the official libraries.
pub const TOLERANCE_S: i64 = 300;
/// What a Standard Webhooks secret begins with.
pub const SECRET_PREFIX: &str = "whsec_";
/// Fewest random bytes of a secret made by us, by the specification.
pub const SECRET_MIN_BYTES: usize = 24;
/// Most bytes of a secret, by the specification for `whsec_` and by us for raw ones.
pub const SECRET_MAX_BYTES: usize = 512;

/// How a secret given by a user was read. The reply to whoever set it says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretForm {
    /// `whsec_` followed by base64: the key is the decoded rest, as the specification says.
    Standard,
    /// Anything else: the key is the bytes of the text as they are.
    Raw,
}

/// A secret that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// Nothing to sign with.
    #[error("the secret is empty")]
    Empty,
    /// Longer than [`SECRET_MAX_BYTES`].
    #[error("the secret has {0} bytes; at most {SECRET_MAX_BYTES} are allowed")]
    TooLong(usize),
}

/// A key ready to sign: the HMAC state after the key block, so that a signature costs no key schedule.
#[derive(Clone)]
pub struct SigningKey {
    state: Hmac<Sha256>,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningKey(..)")
    }
}

impl SigningKey {
    /// Reads a secret as its owner wrote it.
    ///
    /// # Errors
    /// The secret is empty or too long.
    pub fn parse(secret: &str) -> Result<(Self, SecretForm), SecretError> {
        let standard = secret.strip_prefix(SECRET_PREFIX).and_then(|rest| STANDARD.decode(rest).ok());
        match standard {
            Some(key) if !key.is_empty() => Ok((Self::from_bytes(&key)?, SecretForm::Standard)),
            Some(_) => Err(SecretError::Empty),
            None => Ok((Self::from_bytes(secret.as_bytes())?, SecretForm::Raw)),
        }
    }

    /// Takes the key bytes themselves.
    ///
    /// # Errors
    /// The key is empty or too long.
    pub fn from_bytes(key: &[u8]) -> Result<Self, SecretError> {
        if key.is_empty() {
            return Err(SecretError::Empty);
        }
        if key.len() > SECRET_MAX_BYTES {
            return Err(SecretError::TooLong(key.len()));
        }
        // HMAC takes keys of any length, so the error of the trait cannot occur.
        let state = Hmac::<Sha256>::new_from_slice(key).map_err(|_| SecretError::Empty)?;
        Ok(Self { state })
    }

    /// The HMAC of a body alone, for schemes that sign nothing else ([`super::runflow`]).
    pub(super) fn body_mac(&self, body: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.state.clone();
        mac.update(body);
        mac
    }

    fn mac(&self, id: &str, timestamp: &str, body: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.state.clone();
        mac.update(id.as_bytes());
        mac.update(b".");
        mac.update(timestamp.as_bytes());
        mac.update(b".");
        mac.update(body);
        mac
    }
}

/// Writes random bytes as a secret that every Standard Webhooks library takes.
#[must_use]
pub fn format_secret(random: &[u8]) -> String {
    format!("{SECRET_PREFIX}{}", STANDARD.encode(random))
}

/// The value of `webhook-signature`: one `v1` item per key, in the order of the keys, newest first by habit.
#[must_use]
pub fn sign(keys: &[SigningKey], id: &str, timestamp_s: i64, body: &[u8]) -> String {
    let timestamp = timestamp_s.to_string();
    let mut header = String::with_capacity(keys.len() * 48);
    for key in keys {
        if !header.is_empty() {
            header.push(' ');
        }
        header.push_str("v1,");
        STANDARD.encode_string(key.mac(id, &timestamp, body).finalize().into_bytes(), &mut header);
    }
    header
}

/// Why a message is not to be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// The timestamp header is not a number of seconds.
    #[error("webhook-timestamp is not a number of seconds")]
    BadTimestamp,
    /// The message was signed too long ago.
    #[error("webhook-timestamp is more than {TOLERANCE_S} s in the past")]
    TooOld,
    /// The message claims to come from the future.
    #[error("webhook-timestamp is more than {TOLERANCE_S} s in the future")]
    TooNew,
    /// No signature of the header fits any of the keys.
    #[error("no v1 signature in webhook-signature fits")]
    NoMatch,
}

/// Checks a received message over its raw body.
///
/// # Errors
/// The timestamp is unreadable or off by more than [`TOLERANCE_S`], or no `v1` signature fits any key.
pub fn verify(
    keys: &[SigningKey],
    id: &str,
    timestamp: &str,
    signatures: &str,
    body: &[u8],
    now_s: i64,
) -> Result<(), VerifyError> {
    let stamp: i64 = timestamp.parse().map_err(|_| VerifyError::BadTimestamp)?;
    if stamp < now_s.saturating_sub(TOLERANCE_S) {
        return Err(VerifyError::TooOld);
    }
    if stamp > now_s.saturating_add(TOLERANCE_S) {
        return Err(VerifyError::TooNew);
    }
    let fits = signatures.split(' ').filter_map(|item| item.strip_prefix("v1,")).any(|item| {
        // `verify_slice` compares in constant time.
        STANDARD
            .decode(item)
            .is_ok_and(|given| keys.iter().any(|k| k.mac(id, timestamp, body).verify_slice(&given).is_ok()))
    });
    if fits { Ok(()) } else { Err(VerifyError::NoMatch) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    const STAMP: i64 = 1_614_265_330;
    const EXPECTED: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

    fn key(secret: &str) -> SigningKey {
        SigningKey::parse(secret).unwrap().0
    }

    #[test]
    fn the_vector_of_the_specification() {
        assert_eq!(sign(&[key(SECRET)], ID, STAMP, BODY), EXPECTED);
        assert_eq!(verify(&[key(SECRET)], ID, "1614265330", EXPECTED, BODY, STAMP + 300), Ok(()));
    }

    #[test]
    fn both_keys_of_a_rotation_sign_and_either_verifies() {
        let (old, new) = (key(SECRET), key("whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"));
        let header = sign(&[new.clone(), old.clone()], ID, STAMP, BODY);
        assert_eq!(header.split(' ').count(), 2);
        assert!(header.split(' ').all(|item| item.starts_with("v1,")));
        for live in [old, new] {
            assert_eq!(verify(&[live], ID, "1614265330", &header, BODY, STAMP), Ok(()));
        }
    }

    #[test]
    fn secrets_are_read_as_documented() {
        assert_eq!(SigningKey::parse(SECRET).unwrap().1, SecretForm::Standard);
        assert_eq!(SigningKey::parse("my own words").unwrap().1, SecretForm::Raw);
        assert_eq!(SigningKey::parse("whsec_not*base64").unwrap().1, SecretForm::Raw);
        assert_eq!(SigningKey::parse("").unwrap_err(), SecretError::Empty);
        assert_eq!(SigningKey::parse("whsec_").unwrap_err(), SecretError::Empty);
        assert_eq!(SigningKey::parse(&"x".repeat(513)).unwrap_err(), SecretError::TooLong(513));
        assert_eq!(format_secret(&[0; 24]), "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA");
        assert_eq!(format!("{:?}", key(SECRET)), "SigningKey(..)");
    }

    #[test]
    fn age_is_checked_in_both_directions() {
        let keys = [key(SECRET)];
        assert_eq!(verify(&keys, ID, "1614265330", EXPECTED, BODY, STAMP + 301), Err(VerifyError::TooOld));
        assert_eq!(verify(&keys, ID, "1614265330", EXPECTED, BODY, STAMP - 301), Err(VerifyError::TooNew));
        assert_eq!(verify(&keys, ID, "soon", EXPECTED, BODY, STAMP), Err(VerifyError::BadTimestamp));
    }

    #[test]
    fn other_versions_beside_v1_are_skipped_and_alone_they_fail() {
        let keys = [key(SECRET)];
        let with_other = format!("v1a,AAAA {EXPECTED}");
        assert_eq!(verify(&keys, ID, "1614265330", &with_other, BODY, STAMP), Ok(()));
        assert_eq!(verify(&keys, ID, "1614265330", "v1a,AAAA", BODY, STAMP), Err(VerifyError::NoMatch));
        assert_eq!(verify(&keys, ID, "1614265330", "", BODY, STAMP), Err(VerifyError::NoMatch));
    }

    proptest! {
        #[test]
        fn what_was_signed_verifies_and_nothing_else(
            secret in proptest::collection::vec(any::<u8>(), 24..64),
            body in proptest::collection::vec(any::<u8>(), 1..200),
            flip in any::<prop::sample::Index>(),
        ) {
            let keys = [SigningKey::from_bytes(&secret).unwrap()];
            let header = sign(&keys, ID, STAMP, &body);
            prop_assert_eq!(verify(&keys, ID, "1614265330", &header, &body, STAMP), Ok(()));
            let mut other = body.clone();
            let at = flip.index(other.len());
            other[at] ^= 1;
            prop_assert_eq!(verify(&keys, ID, "1614265330", &header, &other, STAMP), Err(VerifyError::NoMatch));
            prop_assert_eq!(verify(&keys, "msg_x", "1614265330", &header, &body, STAMP), Err(VerifyError::NoMatch));
            prop_assert_eq!(verify(&keys, ID, "1614265331", &header, &body, STAMP), Err(VerifyError::NoMatch));
        }
    }
}
