//! The further headers of a webhook: which its owner may set, and which are ours or the transport's.

use std::collections::BTreeMap;

use axum::http::{HeaderName, HeaderValue};
use ringback_service_runtime::{REDACTED, Redacted};
use serde_json::Value;

use crate::error::ApiError;

/// Most further headers, and the longest name, value and sum.
const HEADERS_MAX: usize = 20;
const HEADER_NAME_MAX_BYTES: usize = 128;
const HEADER_VALUE_MAX_BYTES: usize = 1024;
const HEADERS_MAX_BYTES: usize = 8 * 1024;

/// Headers that belong to the connection, to the body, or to us.
const DENIED: [&str; 23] = [
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "http2-settings",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "runflow-request-id",
    "runflow-signature",
    "te",
    "trailer",
    "trailers",
    "transfer-encoding",
    "traceparent",
    "tracestate",
    "upgrade",
    "user-agent",
    "via",
];

const DENIED_PREFIXES: [&str; 2] = ["webhook-", "svix-"];

/// Further headers. A name with null is removed; one with `[redacted]`, as it was shown, keeps its value.
pub(super) fn headers_of(
    value: &Value,
    current: &Redacted<BTreeMap<String, String>>,
) -> Result<Redacted<BTreeMap<String, String>>, ApiError> {
    let given = match value {
        Value::Null => return Ok(Redacted::default()),
        Value::Object(given) => given,
        _ => return Err(ApiError::field("/headers", "must be an object of header names and texts")),
    };
    let mut headers = current.expose().clone();
    for (name, value) in given {
        let pointer = format!("/headers/{}", name.replace('~', "~0").replace('/', "~1"));
        let lower = check_header_name(name, &pointer)?;
        match value {
            Value::Null => drop(headers.remove(&lower)),
            Value::String(text) if text == REDACTED && headers.contains_key(&lower) => {}
            Value::String(text) => {
                check_header_value(text, &pointer)?;
                headers.insert(lower, text.clone());
            }
            _ => return Err(ApiError::field(pointer, "must be a text, or null to remove it")),
        }
    }
    if headers.len() > HEADERS_MAX {
        return Err(ApiError::field(
            "/headers",
            format!("has {} headers, at most {HEADERS_MAX} are allowed", headers.len()),
        ));
    }
    let bytes: usize = headers.iter().map(|(name, value)| name.len() + value.len()).sum();
    if bytes > HEADERS_MAX_BYTES {
        return Err(ApiError::field(
            "/headers",
            format!("has {bytes} bytes, at most {HEADERS_MAX_BYTES} are allowed"),
        ));
    }
    Ok(Redacted::new(headers))
}

fn check_header_name(name: &str, pointer: &str) -> Result<String, ApiError> {
    if name.is_empty() || name.len() > HEADER_NAME_MAX_BYTES || HeaderName::try_from(name).is_err() {
        return Err(ApiError::field(
            pointer,
            format!("is not a header name (letters, digits and -, at most {HEADER_NAME_MAX_BYTES})"),
        ));
    }
    let lower = name.to_ascii_lowercase();
    if DENIED.contains(&lower.as_str()) || DENIED_PREFIXES.iter().any(|p| lower.starts_with(p)) {
        return Err(ApiError::field(
            pointer,
            "cannot be set: it belongs to the connection, to the body, or to Ringback's own headers",
        ));
    }
    Ok(lower)
}

fn check_header_value(text: &str, pointer: &str) -> Result<(), ApiError> {
    if text.len() > HEADER_VALUE_MAX_BYTES {
        return Err(ApiError::field(
            pointer,
            format!("has {} bytes, at most {HEADER_VALUE_MAX_BYTES} are allowed", text.len()),
        ));
    }
    // The value may be a credential: the error does not quote it.
    let plain = HeaderValue::from_str(text).is_ok() && text.is_ascii() && text.trim() == text;
    if plain {
        Ok(())
    } else {
        Err(ApiError::field(pointer, "must be visible ASCII without spaces at its ends"))
    }
}
