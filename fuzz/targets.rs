//! What is fuzzed: each function takes any bytes and panics where a promise is broken.

use std::path::{Component, Path};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{HeaderMap, HeaderName, HeaderValue};
use ringback_domain::artifact::{SafeName, file_name, url_segment};
use ringback_webhook_receiver::{Event, Proof, Secrets, Trust};
use sha2::Sha256;

/// The secret, and the moment, of the test vector that Standard Webhooks publishes.
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const NOW_S: i64 = 1_614_265_330;
const RAW_SECRET: &str = "any text, however it looks";

fn mac(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().to_vec()
}

/// The keys of Standard Webhooks, worked out a second time.
fn keys() -> [Vec<u8>; 2] {
    [
        STANDARD.decode(&SECRET["whsec_".len()..]).expect("the published secret is base64"),
        RAW_SECRET.as_bytes().to_vec(),
    ]
}

fn signature(key: &[u8], id: &str, timestamp: &str, body: &[u8]) -> String {
    format!("v1,{}", STANDARD.encode(mac(key, &[id.as_bytes(), b".", timestamp.as_bytes(), b".", body])))
}

/// Lines of `name: value` up to an empty one, then the body.
fn request(data: &[u8]) -> (HeaderMap, &[u8]) {
    let mut headers = HeaderMap::new();
    let mut rest = data;
    while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
        let (line, after) = (&rest[..end], &rest[end + 1..]);
        rest = after;
        if line.is_empty() {
            break;
        }
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let value = line[colon + 1..].trim_ascii();
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(&line[..colon]), HeaderValue::from_bytes(value))
        {
            headers.append(name, value);
        }
    }
    (headers, rest)
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// Nothing is trusted without a signature that fits, and what is signed well is trusted.
pub(crate) fn signature_headers(data: &[u8]) {
    let (headers, body) = request(data);
    let trust = Trust::signed(Secrets::parse(&[SECRET, RAW_SECRET]).expect("both secrets are well formed"));
    match trust.verify(&headers, body, None, NOW_S) {
        Ok(Proof::Standard { id, timestamp_s }) => {
            let family = if headers.contains_key("webhook-id") { "webhook" } else { "svix" };
            let get = |part: &str| text(&headers, &format!("{family}-{part}"));
            assert_eq!((get("id"), get("timestamp").parse()), (id.as_str(), Ok(timestamp_s)));
            assert!((NOW_S - timestamp_s).abs() <= 300, "a timestamp of {timestamp_s}");
            let fits =
                |item: &str| keys().iter().any(|key| item == signature(key, &id, get("timestamp"), body));
            assert!(get("signature").split(' ').any(fits), "no signature fits: {headers:?}");
        }
        Ok(Proof::Runflow) => {
            let given = text(&headers, "runflow-signature");
            let fits = [SECRET, RAW_SECRET].iter().any(|secret| {
                let hex: String =
                    mac(secret.as_bytes(), &[body]).iter().map(|b| format!("{b:02x}")).collect();
                hex == given
            });
            assert!(fits, "Runflow-Signature does not fit: {headers:?}");
        }
        Ok(Proof::Unsigned { .. }) => panic!("nobody may send unsigned requests: {headers:?}"),
        Err(refusal) => assert!(!refusal.code().is_empty() && !refusal.to_string().contains(&SECRET[6..])),
    }
    well_signed(&trust, &headers, body);
}

/// The same id, time and body, signed: trusted, unless the id or the time cannot be; never with another body.
fn well_signed(trust: &Trust, headers: &HeaderMap, body: &[u8]) {
    let (id, timestamp) = (text(headers, "webhook-id"), text(headers, "webhook-timestamp"));
    let sound = !id.is_empty()
        && id.len() <= 256
        && timestamp.parse::<i64>().is_ok_and(|at| at.abs_diff(NOW_S) <= 300);
    for key in keys() {
        let mut signed = HeaderMap::new();
        for name in ["webhook-id", "webhook-timestamp"] {
            if let Some(value) = headers.get(name) {
                signed.insert(HeaderName::from_static(name), value.clone());
            }
        }
        let list = format!("v1a,AAAA v1,AAAA {}", signature(&key, id, timestamp, body));
        signed.insert("webhook-signature", list.parse().expect("base64 and commas may stand in a header"));
        let judged = trust.verify(&signed, body, None, NOW_S);
        assert_eq!(judged.is_ok(), sound, "{judged:?} for {signed:?}");
        let other = [body, b" "].concat();
        assert!(trust.verify(&signed, &other, None, NOW_S).is_err(), "another body under {signed:?}");
    }
}

/// A body is read as an event or refused with a reason; what is read says the same each time.
pub(crate) fn callback_bodies(data: &[u8]) {
    let event = match Event::parse(data) {
        Ok(event) => event,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    assert!(serde_json::from_slice::<serde::de::IgnoredAny>(data).is_ok(), "an event that is no JSON");
    let again = Event::parse(data).expect("the same bytes were an event a moment ago");
    assert_eq!(
        (event.kind(), event.own_key(), event.subject(), event.ended_job()),
        (again.kind(), again.own_key(), again.subject(), again.ended_job())
    );
    assert!(!event.kind().is_empty() && !event.own_key().is_empty());
    assert_eq!(event.payload_keys(), again.payload_keys());
    match &event {
        Event::Runpod(job) => {
            let _ = job.audio_base64();
        }
        Event::Runflow(callback) => {
            for link in callback.links(50).unwrap_or_default() {
                assert!(link.starts_with("https://") || link.starts_with("http://"), "{link:?}");
            }
        }
        Event::Artifact(notice) => safe(SafeName::from_untrusted(&notice.filename).as_str()),
        Event::Standard(_) | Event::Batch(_) => {}
    }
}

fn safe(name: &str) {
    let mut parts = Path::new(name).components();
    assert!(matches!(parts.next(), Some(Component::Normal(part)) if part == name), "{name:?}");
    assert!(parts.next().is_none(), "{name:?} has more than one part");
    assert!(!name.starts_with('.') && !name.contains(['/', '\\', '\0']), "{name:?}");
}

/// Whatever a sender or a handler calls a file: it stays in its folder, of bounded length, and safe when named again.
pub(crate) fn file_names(data: &[u8]) {
    let given = String::from_utf8_lossy(data);
    let name = SafeName::from_untrusted(&given);
    safe(name.as_str());
    assert!(name.as_str().len() <= 200, "{name}");
    assert_eq!(SafeName::from_untrusted(name.as_str()), name, "of {given:?}");
    assert_eq!(SafeName::exactly(name.as_str()).as_ref(), Some(&name));
    let numbered = name.numbered(u32::MAX);
    safe(numbered.as_str());
    assert_eq!(SafeName::exactly(numbered.as_str()).as_ref(), Some(&numbered), "of {given:?}");
    if let Some(exact) = SafeName::exactly(&given) {
        safe(exact.as_str());
    }

    let kept = file_name(&given);
    safe(&kept);
    assert!(kept.len() <= 200 && !kept.contains(|c: char| c.is_control() || c == '"'), "{kept:?}");
    let segment = url_segment(&kept);
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~%".contains(&byte);
    assert!(segment.bytes().all(plain) && segment != "confirm", "{segment:?}");
    assert!(segment != "." && segment != "..", "{segment:?}");
}
