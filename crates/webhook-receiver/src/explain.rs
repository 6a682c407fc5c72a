//! Verification told step by step, for `ringback verify`. Pure. No text holds the secret.

use std::collections::BTreeMap;

use http::{HeaderMap, HeaderName, HeaderValue};
use ringback_domain::webhook::runflow;
use ringback_domain::webhook::signature::{self, SecretForm, SigningKey, TOLERANCE_S};

use crate::secret::Secrets;
use crate::verify::{Refusal, StandardHeaders, standard_headers};

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// Whether it holds.
    pub passed: bool,
    /// What was found.
    pub detail: String,
}

/// All steps, and what may help where one failed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The scheme that was checked, if one was found.
    pub scheme: Option<&'static str>,
    /// The steps in order.
    pub checks: Vec<Check>,
    /// Causes that fit what was found.
    pub hints: Vec<String>,
}

impl Report {
    /// Whether the message is to be trusted.
    #[must_use]
    pub fn verified(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(|check| check.passed)
    }

    fn check(&mut self, name: &'static str, passed: bool, detail: impl Into<String>) -> bool {
        self.checks.push(Check { name, passed, detail: detail.into() });
        passed
    }
}

/// Checks a message against secrets as their owner wrote them. `now_s` `None` leaves the age out.
#[must_use]
pub fn explain(texts: &[String], headers: &HeaderMap, body: &[u8], now_s: Option<i64>) -> Report {
    let mut report = Report::default();
    let secrets = match Secrets::parse(texts) {
        Ok(secrets) if secrets.is_empty() => {
            report.check("secret", false, "no secret is given");
            return report;
        }
        Ok(secrets) => secrets,
        Err(error) => {
            report.check("secret", false, error.to_string());
            return report;
        }
    };
    report.check("secret", true, described(&secrets));
    match standard_headers(headers) {
        Err(refusal) => {
            report.check("headers", false, refusal.to_string());
        }
        Ok(Some(given)) => standard(&mut report, &secrets, texts, given, body, now_s),
        Ok(None) => match headers.get(runflow::SIGNATURE_HEADER) {
            Some(value) => {
                report.scheme = Some("Runflow-Signature");
                report.check("headers", true, "Runflow-Signature is there");
                of_runflow(&mut report, &secrets, texts, value.to_str().unwrap_or_default(), body);
            }
            None => {
                report.check("headers", false, Refusal::Unsigned.to_string());
                report.hints.push(
                    "give the headers as they arrived, with --headers FILE or --header NAME:VALUE".to_owned(),
                );
            }
        },
    }
    report
}

fn described(secrets: &Secrets) -> String {
    let forms: Vec<&str> = secrets
        .forms()
        .iter()
        .map(|form| match form {
            SecretForm::Standard => "whsec_ and base64",
            SecretForm::Raw => "raw text",
        })
        .collect();
    format!("{} secret(s): {}", secrets.len(), forms.join(", "))
}

fn standard(
    report: &mut Report,
    secrets: &Secrets,
    texts: &[String],
    given: StandardHeaders<'_>,
    body: &[u8],
    now_s: Option<i64>,
) {
    report.scheme = Some("Standard Webhooks");
    report.check("headers", true, format!("webhook-id {}", printable(given.id)));
    let stamp = match given.timestamp.parse::<i64>() {
        Ok(stamp) => stamp,
        Err(_) => {
            report.check("timestamp", false, Refusal::BadTimestamp.to_string());
            return;
        }
    };
    match now_s {
        None => {
            report.check("timestamp", true, "its age is not checked");
        }
        Some(now) => {
            let age = now.saturating_sub(stamp);
            let told = if age >= 0 { format!("{age} s old") } else { format!("{} s in the future", -age) };
            if !report.check(
                "timestamp",
                age.abs() <= TOLERANCE_S,
                format!("{told}, at most {TOLERANCE_S} s"),
            ) {
                report.hints.push(
                    "a capture ages: --ignore-age checks the signature alone; otherwise compare the clocks"
                        .to_owned(),
                );
            }
        }
    }
    let v1 = given.signatures.split(' ').filter(|item| item.starts_with("v1,")).count();
    let all = given.signatures.split(' ').filter(|item| !item.is_empty()).count();
    if !report.check("signature items", v1 > 0, format!("{v1} of {all} are v1")) {
        return;
    }
    let fits = |keys: &[SigningKey], body: &[u8]| {
        signature::verify(keys, given.id, given.timestamp, given.signatures, body, stamp).is_ok()
    };
    let number = secrets.standard().iter().position(|key| fits(std::slice::from_ref(key), body));
    match number {
        Some(index) => {
            report.check("signature", true, format!("secret {} fits", index + 1));
        }
        None => {
            report.check("signature", false, Refusal::NoMatch { secrets: secrets.len() }.to_string());
            hint(report, texts, secrets.standard(), body, fits);
        }
    }
}

fn of_runflow(report: &mut Report, secrets: &Secrets, texts: &[String], given: &str, body: &[u8]) {
    let fits = |keys: &[SigningKey], body: &[u8]| runflow::verify(keys, given, body).is_ok();
    let number = secrets.runflow().iter().position(|key| fits(std::slice::from_ref(key), body));
    match (number, runflow::verify(secrets.runflow(), given, body)) {
        (Some(index), _) => {
            report.check("signature", true, format!("secret {} fits", index + 1));
        }
        (None, Ok(())) => {}
        (None, Err(reason)) => {
            report.check("signature", false, format!("{reason} ({} secret(s) tried)", secrets.len()));
            if reason == runflow::VerifyError::NoMatch {
                hint(report, texts, secrets.runflow(), body, fits);
            }
        }
    }
}

/// Tries the usual causes of a signature that does not fit.
fn hint(
    report: &mut Report,
    texts: &[String],
    keys: &[SigningKey],
    body: &[u8],
    fits: impl Fn(&[SigningKey], &[u8]) -> bool,
) {
    let mut bodies: Vec<(&str, Vec<u8>)> = Vec::new();
    if let Some(rest) = body.strip_suffix(b"\n") {
        bodies.push((
            "the body got a line end when it was saved",
            rest.strip_suffix(b"\r").unwrap_or(rest).to_vec(),
        ));
    }
    bodies.push(("the body lost its line end when it was saved", [body, b"\n"].concat()));
    if let Some(rest) = body.strip_prefix(b"\xef\xbb\xbf") {
        bodies.push(("the body got a byte order mark when it was saved", rest.to_vec()));
    }
    if let Ok(value) = serde_json::from_slice::<serde_json::Value>(body) {
        bodies.push((
            "the body was parsed and written again: the raw bytes are signed",
            value.to_string().into_bytes(),
        ));
    }
    let other_keys = |read: fn(&str) -> Option<SigningKey>| -> Vec<SigningKey> {
        texts.iter().filter_map(|text| read(text)).collect()
    };
    let as_it_is = other_keys(|text| runflow::key(text).ok());
    let decoded = other_keys(|text| SigningKey::parse(text).ok().map(|(key, _)| key));
    let trimmed = other_keys(|text| SigningKey::parse(text.trim()).ok().map(|(key, _)| key));
    let prefixed = other_keys(|text| SigningKey::parse(&format!("whsec_{text}")).ok().map(|(key, _)| key));
    let secrets = [
        ("the sender takes the secret's text as it is, with whsec_, instead of decoding it", as_it_is),
        ("the sender decodes the secret after whsec_ instead of taking its text", decoded),
        ("the secret has spaces or a line end around it", trimmed),
        ("the secret lacks its whsec_ in front", prefixed),
    ];
    for (cause, changed) in bodies {
        if fits(keys, &changed) {
            report.hints.push(cause.to_owned());
        }
    }
    for (cause, keys) in secrets {
        if fits(&keys, body) {
            report.hints.push(cause.to_owned());
        }
    }
    if report.hints.is_empty() {
        report.hints.push(
            "compare the secret with the sender's, and give the body as raw bytes, before any framework reads it".to_owned(),
        );
    }
}

/// Headers that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeadersError {
    /// A line is no header.
    #[error("line {0} is no header: expected NAME: VALUE")]
    Line(usize),
    /// A name or value that HTTP does not allow.
    #[error("{0} is not allowed in HTTP")]
    NotHttp(String),
    /// JSON, but no object of texts.
    #[error("the headers are JSON, but no object of texts: {0}")]
    Json(String),
}

/// Reads headers as tools write them: lines `NAME: VALUE` (a request or status line before them is passed over), or a
/// JSON object of texts.
///
/// # Errors
/// [`HeadersError`].
pub fn parse_headers(text: &str) -> Result<HeaderMap, HeadersError> {
    let mut headers = HeaderMap::new();
    if text.trim_start().starts_with('{') {
        let object: BTreeMap<String, String> =
            serde_json::from_str(text).map_err(|error| HeadersError::Json(error.to_string()))?;
        for (name, value) in &object {
            append(&mut headers, name, value)?;
        }
        return Ok(headers);
    }
    for (index, line) in text.lines().enumerate() {
        let line = line.trim_end_matches('\r');
        if line.trim().is_empty() || (index == 0 && line.contains("HTTP/")) {
            continue;
        }
        let (name, value) = line.split_once(':').ok_or(HeadersError::Line(index + 1))?;
        append(&mut headers, name, value)?;
    }
    Ok(headers)
}

fn append(headers: &mut HeaderMap, name: &str, value: &str) -> Result<(), HeadersError> {
    let not_http = || HeadersError::NotHttp(format!("the header {}", printable(name.trim())));
    let name: HeaderName = name.trim().parse().map_err(|_| not_http())?;
    let value = HeaderValue::from_str(value.trim()).map_err(|_| not_http())?;
    headers.append(name, value);
    Ok(())
}

fn printable(text: &str) -> String {
    text.chars().take(80).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    const STAMP: i64 = 1_614_265_330;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap()))
            .collect()
    }

    fn vector() -> HeaderMap {
        signed(SECRET, BODY)
    }

    fn signed(secret: &str, body: &[u8]) -> HeaderMap {
        let key = SigningKey::parse(secret).unwrap().0;
        let id = "msg_p5jXN8AQM9LWM0D4loKWxJek";
        let list = signature::sign(&[key], id, STAMP, body);
        headers(&[("webhook-id", id), ("webhook-timestamp", "1614265330"), ("webhook-signature", &list)])
    }

    fn told(secret: &str, headers: &HeaderMap, body: &[u8]) -> Report {
        explain(&[secret.to_owned()], headers, body, Some(STAMP + 10))
    }

    #[test]
    fn a_good_message_passes_each_step() {
        let report = told(SECRET, &vector(), BODY);
        assert!(report.verified(), "{report:?}");
        let names: Vec<&str> = report.checks.iter().map(|check| check.name).collect();
        assert_eq!(names, ["secret", "headers", "timestamp", "signature items", "signature"]);
        assert!(report.checks[2].detail.contains("10 s old"));
    }

    #[test]
    fn causes_are_found() {
        let with_end = [BODY, b"\n"].concat();
        for (report, cause) in [
            (told(SECRET, &vector(), &with_end), "got a line end"),
            (told(SECRET, &signed(SECRET, &with_end), BODY), "lost its line end"),
            (told(SECRET, &signed(SECRET, b"{\"test\":2432232314}"), BODY), "written again"),
            (told(&format!("{SECRET}\n"), &vector(), BODY), "line end around it"),
            (told(&SECRET[6..], &vector(), BODY), "lacks its whsec_"),
            (told("another", &vector(), BODY), "compare the secret"),
        ] {
            assert!(!report.verified());
            assert!(report.hints.iter().any(|hint| hint.contains(cause)), "{cause}: {report:?}");
            assert!(!format!("{report:?}").contains(&SECRET[6..]));
        }
    }

    #[test]
    fn an_old_message_fails_unless_its_age_is_left_out() {
        let texts = [SECRET.to_owned()];
        let report = explain(&texts, &vector(), BODY, Some(STAMP + 301));
        assert!(!report.verified() && report.hints[0].contains("--ignore-age"));
        assert!(explain(&texts, &vector(), BODY, None).verified());
    }

    #[test]
    fn runflow_is_explained_too() {
        let key = runflow::key(SECRET).unwrap();
        let good = headers(&[("runflow-signature", &runflow::sign(&key, BODY))]);
        assert!(told(SECRET, &good, BODY).verified());
        let decoded = SigningKey::parse(SECRET).unwrap().0;
        let wrong = headers(&[("runflow-signature", &runflow::sign(&decoded, BODY))]);
        let report = told(SECRET, &wrong, BODY);
        assert!(report.hints.iter().any(|hint| hint.contains("decodes the secret")), "{report:?}");
        assert!(!told(SECRET, &headers(&[("runflow-signature", "xyz")]), BODY).verified());
    }

    #[test]
    fn nothing_to_check_is_not_verified() {
        assert!(!told(SECRET, &HeaderMap::new(), BODY).verified());
        assert!(!explain(&[], &vector(), BODY, None).verified());
        assert!(!explain(&["whsec_".to_owned()], &vector(), BODY, None).verified());
        assert!(!Report::default().verified());
    }

    #[test]
    fn headers_are_read_as_tools_write_them() {
        let lines = "POST /hook HTTP/1.1\r\nWebhook-Id: a\r\nwebhook-timestamp:1\r\n\r\n";
        let json = r#"{"Webhook-Id": "a", "webhook-timestamp": "1"}"#;
        for text in [lines, json] {
            let headers = parse_headers(text).unwrap();
            assert_eq!(
                (&headers["webhook-id"], &headers["webhook-timestamp"]),
                (&"a".parse().unwrap(), &"1".parse().unwrap())
            );
        }
        assert_eq!(parse_headers("a: b\nnothing"), Err(HeadersError::Line(2)));
        assert!(matches!(parse_headers("a b: c"), Err(HeadersError::NotHttp(_))));
        assert!(matches!(parse_headers("{\"a\": 1}"), Err(HeadersError::Json(_))));
    }

    proptest! {
        #[test]
        fn any_header_text_is_read_or_refused(text in any::<String>()) {
            let _ = parse_headers(&text);
        }

        #[test]
        fn what_is_written_is_read(pairs in proptest::collection::vec(("[a-z][a-z0-9-]{0,20}", "[!-9;-~]{1,30}"), 0..8)) {
            let text: String = pairs.iter().map(|(name, value)| format!("{name}: {value}\n")).collect();
            let headers = parse_headers(&text).unwrap();
            prop_assert_eq!(headers.len(), pairs.len());
            for (name, value) in &pairs {
                prop_assert!(headers.get_all(name.as_str()).iter().any(|found| found == value.as_str()));
            }
        }
    }
}
