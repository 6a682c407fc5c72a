//! Standard Webhooks verification, written a second time from the specification, so that the product's own code is
//! not its own judge. The official Python package is a third opinion in tests/tests/webhooks_e2e.rs.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::HeaderMap;
use sha2::Sha256;

/// A fresh secret in the form `whsec_` + base64.
#[must_use]
pub fn new_secret() -> String {
    let mut bytes = uuid::Uuid::now_v7().into_bytes().to_vec();
    bytes.extend_from_slice(&uuid::Uuid::now_v7().into_bytes());
    format!("whsec_{}", STANDARD.encode(bytes))
}

/// Checks the three headers over the raw body; the age of the timestamp may be at most five minutes.
///
/// # Errors
/// What does not hold, as a text for the test's report.
pub fn verify(secret: &str, headers: &HeaderMap, body: &[u8]) -> Result<(), String> {
    let get = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .ok_or_else(|| format!("header {name} is missing"))
    };
    let (id, timestamp, signature) =
        (get("webhook-id")?, get("webhook-timestamp")?, get("webhook-signature")?);
    let sent: i64 =
        timestamp.parse().map_err(|_| format!("webhook-timestamp is not an integer: {timestamp}"))?;
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
    let age = i64::try_from(now).expect("fits").abs_diff(sent);
    if age > 300 {
        return Err(format!("webhook-timestamp is {age} s away"));
    }
    let expected = item(secret, id, timestamp, body)?;
    if signature.split(' ').any(|one| one == expected) {
        Ok(())
    } else {
        Err(format!("no signature fits: {signature}"))
    }
}

/// The value of `webhook-signature` for a message.
#[must_use]
pub fn sign(secret: &str, id: &str, timestamp: &str, body: &[u8]) -> String {
    item(secret, id, timestamp, body).expect("a secret in the form whsec_ + base64")
}

fn item(secret: &str, id: &str, timestamp: &str, body: &[u8]) -> Result<String, String> {
    let key = STANDARD
        .decode(secret.strip_prefix("whsec_").ok_or("the secret does not start with whsec_")?)
        .map_err(|error| format!("the secret is not base64: {error}"))?;
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).expect("any length");
    mac.update(format!("{id}.{timestamp}.").as_bytes());
    mac.update(body);
    Ok(format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_body_or_an_old_timestamp_does_not_verify() {
        let secret = new_secret();
        let key = STANDARD.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
        let sign = |timestamp: i64, body: &[u8]| {
            let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
            mac.update(format!("msg_1.{timestamp}.").as_bytes());
            mac.update(body);
            let mut headers = HeaderMap::new();
            headers.insert("webhook-id", "msg_1".parse().unwrap());
            headers.insert("webhook-timestamp", timestamp.to_string().parse().unwrap());
            let value = format!("v1,AAAA v1,{}", STANDARD.encode(mac.finalize().into_bytes()));
            headers.insert("webhook-signature", value.parse().unwrap());
            headers
        };
        let now =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
        assert_eq!(verify(&secret, &sign(now, b"{}"), b"{}"), Ok(()));
        assert!(verify(&secret, &sign(now, b"{}"), b"{ }").is_err());
        assert!(verify(&secret, &sign(now - 301, b"{}"), b"{}").unwrap_err().contains("301 s"));
        assert!(verify(&secret, &HeaderMap::new(), b"{}").unwrap_err().contains("webhook-id"));
    }
}
