//! The body of a submit. `input` is never parsed and printed again: it stays the bytes that came.

use std::borrow::Cow;

use bytes::Bytes;
use ringback_domain::artifact::{CONFIRM_MEMBER, ConfirmWish};
use ringback_domain::webhook::url::{UrlPolicy, check_url};
use ringback_service_runtime::{config::ServerConfig, json::check_depth};
use ringback_store::submit::METADATA_MAX_BYTES;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::error::ApiError;

/// The rules that a submit is checked against.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub(crate) max_json_depth: u32,
    pub(crate) execution_timeout_ms: (u64, u64),
    pub(crate) ttl_ms: (u64, u64),
    pub(crate) urls: UrlPolicy,
}

impl Rules {
    pub(crate) fn new(config: &ServerConfig, urls: UrlPolicy) -> Self {
        Self {
            max_json_depth: config.max_json_depth,
            execution_timeout_ms: (config.min_execution_timeout_ms, config.max_execution_timeout_ms),
            ttl_ms: (config.min_ttl_ms, config.max_ttl_ms),
            urls,
        }
    }
}

/// The members that we read. Unknown ones are ignored, as RunPod does. Each is taken raw first, so that an error
/// names its member.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct RawJob<'a> {
    #[serde(borrow)]
    pub(crate) endpoint: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(crate) input: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(crate) webhook: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(crate) webhookv2: Option<&'a RawValue>,
    #[serde(borrow, rename = "webhookV2")]
    pub(crate) webhook_v2: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(crate) callback_url: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(crate) policy: Option<&'a RawValue>,
    #[serde(borrow, rename = "s3Config")]
    pub(crate) s3_config: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(crate) metadata: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(crate) client_ref: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(crate) artifact_confirm: Option<&'a RawValue>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawPolicy<'a> {
    #[serde(borrow, rename = "executionTimeout")]
    execution_timeout: Option<&'a RawValue>,
    #[serde(borrow)]
    ttl: Option<&'a RawValue>,
    #[serde(borrow, rename = "lowPriority")]
    low_priority: Option<&'a RawValue>,
}

/// A checked request for one job.
#[derive(Debug)]
pub(crate) struct JobRequest<'a> {
    pub(crate) input: &'a str,
    pub(crate) webhook: Option<Cow<'a, str>>,
    pub(crate) webhook_v2: Option<Cow<'a, str>>,
    /// Gets Runflow's body.
    pub(crate) callback_url: Option<Cow<'a, str>>,
    pub(crate) execution_timeout_ms: Option<u64>,
    pub(crate) ttl_ms: Option<u64>,
    pub(crate) low_priority: bool,
    /// A JSON object, for filters and events. Anything else is the handler's business only.
    pub(crate) metadata: Option<&'a str>,
    /// Its own word on the confirm handshake, to be held against its endpoint.
    pub(crate) confirm: Option<ConfirmWish>,
    /// Members that the handler gets beside `input`, without secrets.
    pub(crate) extra: Option<Bytes>,
    /// The secret ones.
    pub(crate) secret_extra: Option<Bytes>,
}

/// Parses an object, with the depth counted first.
pub(crate) fn parse_object<'a, T: Deserialize<'a>>(body: &'a [u8], rules: &Rules) -> Result<T, ApiError> {
    match body.trim_ascii_start().first() {
        None => {
            return Err(ApiError::bad_request(
                "the request body is empty; send a JSON object such as {\"input\": 1}",
            ));
        }
        Some(b'{') => {}
        Some(_) => {
            // A list would be taken for the members in order; anything else is told what it is not.
            serde_json::from_slice::<serde::de::IgnoredAny>(body).map_err(|e| not_json(&e))?;
            return Err(ApiError::bad_request("the request body must be a JSON object"));
        }
    }
    check_depth(body, rules.max_json_depth).map_err(|e| {
        ApiError::bad_request(format!("the request body {e} (setting server.max_json_depth)"))
    })?;
    serde_json::from_slice(body).map_err(|e| match std::str::from_utf8(body) {
        Ok(_) => not_json(&e),
        Err(e) => ApiError::bad_request(format!("the request body is not JSON: {e}; JSON is UTF-8")),
    })
}

pub(crate) fn not_json(error: &serde_json::Error) -> ApiError {
    ApiError::bad_request(format!("the request body is not valid JSON: {error}"))
}

/// Checks the members of one job. `inherited` gives what an item of a batch takes from the batch.
pub(crate) fn check_job<'a>(raw: &RawJob<'a>, rules: &Rules) -> Result<JobRequest<'a>, ApiError> {
    let input = raw.input.map(RawValue::get).ok_or_else(|| {
        ApiError::field("/input", "is missing: send {\"input\": ...} with any JSON value but null")
    })?;
    let webhook = url_member("/webhook", raw.webhook, rules)?;
    let lower = url_member("/webhookv2", raw.webhookv2, rules)?;
    let upper = url_member("/webhookV2", raw.webhook_v2, rules)?;
    let webhook_v2 = match (lower, upper) {
        (Some(a), Some(b)) if a != b => {
            return Err(ApiError::field(
                "/webhookV2",
                "differs from `webhookv2`: both name the same setting",
            ));
        }
        (a, b) => a.or(b),
    };
    let callback_url = url_member("/callback_url", raw.callback_url, rules)?;
    let policy = match raw.policy {
        None => RawPolicy::default(),
        Some(raw) if raw.get().starts_with('{') => member("/policy", raw, "an object")?,
        Some(_) => return Err(ApiError::field("/policy", "must be an object")),
    };
    let time = |pointer: &str, raw: Option<&RawValue>, (min, max): (u64, u64), keys: &str| {
        let Some(raw) = raw else { return Ok(None) };
        let value: u64 = member(pointer, raw, "a whole number of milliseconds")?;
        if value < min || value > max {
            return Err(ApiError::field(
                pointer,
                format!("is {value} ms, must be between {min} and {max} (settings {keys})"),
            ));
        }
        Ok(Some(value))
    };
    let execution_timeout_ms = time(
        "/policy/executionTimeout",
        policy.execution_timeout,
        rules.execution_timeout_ms,
        "server.min_execution_timeout_ms, server.max_execution_timeout_ms",
    )?;
    let ttl_ms = time("/policy/ttl", policy.ttl, rules.ttl_ms, "server.min_ttl_ms, server.max_ttl_ms")?;
    let low_priority = match policy.low_priority {
        None => false,
        Some(raw) => member("/policy/lowPriority", raw, "true or false")?,
    };
    if let Some(raw) = raw.s3_config
        && !raw.get().starts_with('{')
    {
        // Its value is a secret and is not quoted.
        return Err(ApiError::field("/s3Config", "must be an object"));
    }
    let metadata = metadata_member(raw.metadata)?;
    let confirm = raw
        .artifact_confirm
        .map(|raw| ConfirmWish::parse(raw.get()))
        .transpose()
        .map_err(|(at, why)| ApiError::field(format!("/{CONFIRM_MEMBER}{at}"), why))?;
    let extra = object_of(&[
        ("webhook", raw.webhook),
        ("webhookv2", raw.webhookv2),
        ("webhookV2", raw.webhook_v2),
        ("policy", raw.policy),
        ("metadata", raw.metadata),
        (CONFIRM_MEMBER, raw.artifact_confirm),
    ]);
    let secret_extra = object_of(&[("s3Config", raw.s3_config)]);
    Ok(JobRequest {
        input,
        webhook,
        webhook_v2,
        callback_url,
        execution_timeout_ms,
        ttl_ms,
        low_priority,
        metadata,
        confirm,
        extra,
        secret_extra,
    })
}

/// Reads a member as `T`, or says what it must be.
pub(crate) fn member<'a, T: Deserialize<'a>>(
    pointer: &str,
    raw: &'a RawValue,
    expected: &str,
) -> Result<T, ApiError> {
    serde_json::from_str(raw.get()).map_err(|_| ApiError::field(pointer, format!("must be {expected}")))
}

/// A webhook URL. An empty text counts as absent: forms of users send it so.
pub(crate) fn url_member<'a>(
    pointer: &str,
    raw: Option<&'a RawValue>,
    rules: &Rules,
) -> Result<Option<Cow<'a, str>>, ApiError> {
    let Some(raw) = raw else { return Ok(None) };
    let url: Cow<'a, str> = text_member(pointer, raw)?;
    if url.is_empty() {
        return Ok(None);
    }
    check_url(&url, &rules.urls).map_err(|e| ApiError::field(pointer, format!("is refused: {e}")))?;
    Ok(Some(url))
}

/// A text, borrowed where it holds no escapes.
pub(crate) fn text_member<'a>(pointer: &str, raw: &'a RawValue) -> Result<Cow<'a, str>, ApiError> {
    #[derive(Deserialize)]
    struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
    member::<Text<'a>>(pointer, raw, "a text").map(|t| t.0)
}

/// Metadata for filters and events: a JSON object of a limited size. Anything else is nobody's but the handler's.
pub(crate) fn metadata_member(raw: Option<&RawValue>) -> Result<Option<&str>, ApiError> {
    match raw.map(RawValue::get).filter(|text| text.starts_with('{')) {
        Some(text) if text.len() > METADATA_MAX_BYTES => Err(ApiError::field(
            "/metadata",
            format!(
                "has {} bytes, at most {METADATA_MAX_BYTES} are allowed: it is repeated in every event",
                text.len()
            ),
        )),
        metadata => Ok(metadata),
    }
}

/// The members that are there, as one JSON object of the same bytes.
fn object_of(members: &[(&str, Option<&RawValue>)]) -> Option<Bytes> {
    let mut object = Vec::new();
    for (name, raw) in members.iter().filter_map(|(name, raw)| Some((name, (*raw)?))) {
        object.push(if object.is_empty() { b'{' } else { b',' });
        object.push(b'"');
        object.extend_from_slice(name.as_bytes());
        object.extend_from_slice(b"\":");
        object.extend_from_slice(raw.get().as_bytes());
    }
    if object.is_empty() {
        return None;
    }
    object.push(b'}');
    Some(object.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules::new(&ServerConfig::default(), UrlPolicy::default())
    }

    fn check(body: &str) -> Result<String, String> {
        let rules = rules();
        let raw: RawJob<'_> = parse_object(body.as_bytes(), &rules).map_err(|e| e.detail)?;
        let job = check_job(&raw, &rules).map_err(|e| e.detail)?;
        Ok(format!("{} {:?}", job.input, job.extra))
    }

    #[test]
    fn input_stays_as_it_came() {
        let kept =
            check(r#" {"x":1,"input" : {"b": 1e400, "a":0.10, "n":"\u0000"} , "timeout": 3}"#).unwrap();
        assert_eq!(kept, r#"{"b": 1e400, "a":0.10, "n":"\u0000"} None"#);
        let kept = check(r#"{"input":[1],"policy":{"ttl": 10000},"s3Config":{"accessSecret":"k"}}"#).unwrap();
        assert_eq!(kept, r#"[1] Some(b"{\"policy\":{\"ttl\": 10000}}")"#);
    }

    #[test]
    fn metadata_are_a_small_object_or_the_handlers_business() {
        let rules = rules();
        let metadata = |json: &str| {
            let body = format!("{{\"input\":1,\"metadata\":{json}}}");
            let raw: RawJob<'_> = parse_object(body.as_bytes(), &rules).unwrap();
            check_job(&raw, &rules).map(|job| job.metadata.map(str::to_owned)).map_err(|e| e.detail)
        };
        assert_eq!(metadata("{\"a\": 1e400}").unwrap().as_deref(), Some("{\"a\": 1e400}"));
        for other in ["null", "3", "\"text\"", "[1]"] {
            assert_eq!(metadata(other).unwrap(), None, "{other}");
        }
        let sized = |n: usize| format!("{{\"a\":\"{}\"}}", "x".repeat(n - 8));
        assert!(metadata(&sized(METADATA_MAX_BYTES)).is_ok());
        let error = metadata(&sized(METADATA_MAX_BYTES + 1)).unwrap_err();
        assert!(error.contains("`metadata` has 4097 bytes, at most 4096"), "{error}");
    }

    #[test]
    fn each_mistake_has_its_text() {
        for (body, wanted) in [
            ("", "empty"),
            ("hello", "not valid JSON"),
            ("{\"input\":1", "not valid JSON"),
            ("{\"input\":\"a\0b\"}", "control character"),
            ("[1]", "must be a JSON object"),
            ("\"x\"", "must be a JSON object"),
            ("{}", "`input` is missing"),
            (r#"{"input":null}"#, "`input` is missing"),
            (r#"{"input":1,"input":2}"#, "duplicate field `input`"),
            (r#"{"input":1,"webhook":5}"#, "`webhook` must be a text"),
            (
                r#"{"input":1,"webhook":"http://10.0.0.1/"}"#,
                "`webhook` is refused: address 10.0.0.1 is not allowed",
            ),
            (r#"{"input":1,"webhook":"nonsense"}"#, "`webhook` is refused: not an absolute URL"),
            (r#"{"input":1,"webhookv2":"ftp://example.com/"}"#, "`webhookv2` is refused: scheme ftp"),
            (r#"{"input":1,"webhook":"https://example.com/\u0000"}"#, "control character"),
            (
                r#"{"input":1,"webhookv2":"https://a.example/","webhookV2":"https://b.example/"}"#,
                "`webhookV2` differs from `webhookv2`",
            ),
            (r#"{"input":1,"policy":[]}"#, "`policy` must be an object"),
            (r#"{"input":1,"policy":{"ttl":9999}}"#, "`policy.ttl` is 9999 ms, must be between 10000"),
            (r#"{"input":1,"policy":{"ttl":-1}}"#, "`policy.ttl` must be a whole number"),
            (r#"{"input":1,"policy":{"executionTimeout":4999}}"#, "`policy.executionTimeout` is 4999 ms"),
            (r#"{"input":1,"policy":{"lowPriority":"yes"}}"#, "`policy.lowPriority` must be true or false"),
            (r#"{"input":1,"artifact_confirm":"yes"}"#, "`artifact_confirm` must be true, false or"),
            (
                r#"{"input":1,"artifact_confirm":{"timeout_ms":"1"}}"#,
                "`artifact_confirm.timeout_ms` must be a whole",
            ),
            (r#"{"input":1,"s3Config":"secret-canary"}"#, "`s3Config` must be an object"),
        ] {
            let error = check(body).unwrap_err();
            assert!(error.contains(wanted), "{body:?}: {error}");
            assert!(!error.contains("canary"), "{error}");
        }
        let deep = format!("{{\"input\":{}1{}}}", "[".repeat(128), "]".repeat(128));
        assert!(check(&deep).unwrap_err().contains("server.max_json_depth"));
        let not_so_deep = format!("{{\"input\":{}1{}}}", "[".repeat(127), "]".repeat(127));
        assert!(check(&not_so_deep).is_ok());
    }
}
