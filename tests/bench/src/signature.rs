//! Checks a webhook the way a receiver would: Standard Webhooks 1.0, symmetric (v1).
//!
//! Written apart from the platform's own signing code on purpose: a shared mistake would check itself.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::HeaderMap;
use sha2::Sha256;

const TOLERANCE_S: u64 = 300;

/// The bytes behind a `whsec_…` secret. None if it is not `whsec_` and base64.
pub fn key_of(secret: &str) -> Option<Vec<u8>> {
    STANDARD.decode(secret.strip_prefix("whsec_")?).ok()
}

/// Verifies headers and body. `now_s` is the receiver's clock in unix seconds. The error says which rule is broken.
pub fn verify(key: &[u8], headers: &HeaderMap, body: &[u8], now_s: u64) -> Result<(), String> {
    let header = |name: &str| {
        headers.get(name).and_then(|value| value.to_str().ok()).ok_or_else(|| format!("no {name} header"))
    };
    let (id, timestamp, list) =
        (header("webhook-id")?, header("webhook-timestamp")?, header("webhook-signature")?);
    let sent_s: u64 = timestamp.parse().map_err(|_| format!("webhook-timestamp {timestamp} is no number"))?;
    if sent_s.abs_diff(now_s) > TOLERANCE_S {
        return Err(format!("webhook-timestamp is {} s off", sent_s.abs_diff(now_s)));
    }
    for item in list.split(' ') {
        let Some(signature) = item.strip_prefix("v1,").and_then(|text| STANDARD.decode(text).ok()) else {
            continue;
        };
        let mut mac = Hmac::<Sha256>::new_from_slice(key).map_err(|error| error.to_string())?;
        for part in [id.as_bytes(), b".", timestamp.as_bytes(), b".", body] {
            mac.update(part);
        }
        if mac.verify_slice(&signature).is_ok() {
            return Ok(());
        }
    }
    Err(format!("no v1 signature in `{list}` fits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    const SENT_S: u64 = 1_614_265_330;

    fn headers(signature: &'static str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("webhook-id", "msg_p5jXN8AQM9LWM0D4loKWxJek".parse().unwrap());
        headers.insert("webhook-timestamp", "1614265330".parse().unwrap());
        headers.insert("webhook-signature", signature.parse().unwrap());
        headers
    }

    #[test]
    fn the_published_vector_verifies_and_a_changed_byte_does_not() {
        let key = key_of(SECRET).unwrap();
        let good = headers("v1a,AAAA v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        assert_eq!(verify(&key, &good, BODY, SENT_S + 10), Ok(()));
        assert!(verify(&key, &good, br#"{"test": 2432232315}"#, SENT_S).is_err());
        assert!(verify(&key[1..], &good, BODY, SENT_S).is_err());
        assert!(verify(&key, &good, BODY, SENT_S + TOLERANCE_S + 1).unwrap_err().contains("301 s off"));
        assert!(verify(&key, &HeaderMap::new(), BODY, SENT_S).unwrap_err().contains("webhook-id"));
        assert_eq!(key_of("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"), None);
    }
}
