//! `Runflow-Signature`: lower-case hex HMAC-SHA256 of the raw body, both sides (reference/webhooks.md section 2).
//!
//! The key is the secret's whole text as it is, prefix `whsec_` included: the same secret gives another key than
//! under Standard Webhooks. Neither a time nor an id is signed, so a receiver needs an idempotency key of its own.

use hmac::Mac as _;

use super::signature::{SecretError, SigningKey};

/// Name of the header.
pub const SIGNATURE_HEADER: &str = "runflow-signature";

/// Reads a secret as this scheme does: its bytes as they are.
///
/// # Errors
/// The secret is empty or too long.
pub fn key(secret: &str) -> Result<SigningKey, SecretError> {
    SigningKey::from_bytes(secret.as_bytes())
}

/// The value of `Runflow-Signature`.
#[must_use]
pub fn sign(key: &SigningKey, body: &[u8]) -> String {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mac = key.body_mac(body).finalize().into_bytes();
    let mut hex = String::with_capacity(64);
    for byte in mac {
        hex.push(char::from(HEX[usize::from(byte >> 4)]));
        hex.push(char::from(HEX[usize::from(byte & 15)]));
    }
    hex
}

/// Why a body is not to be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Not 64 lower-case hex digits.
    #[error("Runflow-Signature is not 64 lower-case hex digits")]
    BadSignature,
    /// The signature fits none of the keys.
    #[error("Runflow-Signature does not fit")]
    NoMatch,
}

/// Checks a received body.
///
/// # Errors
/// The signature is malformed or fits no key.
pub fn verify(keys: &[SigningKey], signature: &str, body: &[u8]) -> Result<(), VerifyError> {
    let given = digits(signature).ok_or(VerifyError::BadSignature)?;
    // `verify_slice` compares in constant time.
    if keys.iter().any(|key| key.body_mac(body).verify_slice(&given).is_ok()) {
        Ok(())
    } else {
        Err(VerifyError::NoMatch)
    }
}

fn digits(hex: &str) -> Option<[u8; 32]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; 32];
    if hex.len() != 64 {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        *byte = (digit(pair[0])? << 4) | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    const EXPECTED: &str = "80ec8a89ce3cd22133a1066caecb4d04fea7467657c8514d717ec42c38a5c94c";

    #[test]
    fn the_vector_of_the_reference() {
        let key = key(SECRET).unwrap();
        assert_eq!(sign(&key, BODY), EXPECTED);
        assert_eq!(verify(&[key], EXPECTED, BODY), Ok(()));
    }

    #[test]
    fn the_key_keeps_its_prefix() {
        let decoded = SigningKey::parse(SECRET).unwrap().0;
        assert_eq!(verify(&[decoded], EXPECTED, BODY), Err(VerifyError::NoMatch));
    }

    #[test]
    fn anything_but_64_lower_case_digits_is_malformed() {
        let keys = [key(SECRET).unwrap()];
        for bad in [
            "",
            "sha256=",
            &EXPECTED[1..],
            &EXPECTED.to_uppercase(),
            &format!("{EXPECTED} "),
            &"g".repeat(64),
        ] {
            assert_eq!(verify(&keys, bad, BODY), Err(VerifyError::BadSignature), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_live_key_fits_and_an_altered_body_does_not(
            body in proptest::collection::vec(any::<u8>(), 1..200),
            flip in any::<prop::sample::Index>(),
        ) {
            let (old, new) = (key("old secret").unwrap(), key("new secret").unwrap());
            let signature = sign(&old, &body);
            prop_assert_eq!(verify(&[new.clone(), old.clone()], &signature, &body), Ok(()));
            prop_assert_eq!(verify(&[new], &signature, &body), Err(VerifyError::NoMatch));
            let mut other = body.clone();
            let at = flip.index(other.len());
            other[at] ^= 1;
            prop_assert_eq!(verify(&[old], &signature, &other), Err(VerifyError::NoMatch));
        }
    }
}
