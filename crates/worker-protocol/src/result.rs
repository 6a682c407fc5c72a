//! What a child posts to `job-done` and `job-stream`, as typed values.

use std::borrow::Cow;
use std::collections::HashMap;

use bytes::Bytes;
use serde_json::value::RawValue;

/// A body posted to `job-done`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DoneBody {
    /// `{"status":"IN_PROGRESS","output":any}`: the handler called `progress_update`.
    Progress(Bytes),
    /// The result of the job.
    Final(HandlerResult),
}

/// The result of one job as its handler gave it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HandlerResult {
    /// Raw JSON of `output`; absent when the handler returned `{}`.
    pub output: Option<Bytes>,
    /// Present when the job failed.
    pub error: Option<HandlerError>,
    /// The handler asks for a fresh process (`refresh_worker`).
    pub stop_pod: bool,
}

/// Why a job failed, as the child told it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandlerError {
    /// Text for the job's `error` field. For an exception this is the SDK's JSON string, as on RunPod.
    pub text: String,
    /// What sort of failure it is.
    pub kind: ErrorKind,
}

/// The sort of a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The handler returned or yielded an `error`.
    Returned,
    /// The handler raised.
    Exception {
        /// Python's class, for example `<class 'ValueError'>`.
        error_type: String,
        /// The exception's text.
        message: String,
    },
    /// The body is not what the protocol allows (for example `NaN`, which is not JSON).
    Unreadable,
    /// The body is larger than the configured limit.
    TooLarge,
}

impl HandlerResult {
    /// A result that failed with `text`.
    pub fn failed(text: impl Into<String>, kind: ErrorKind) -> Self {
        Self { output: None, error: Some(HandlerError { text: text.into(), kind }), stop_pod: false }
    }
}

/// Reads a `job-done` body. It never fails: a body that cannot be read is a failed result that says why,
/// because the SDK posts a result once and drops it when the answer is not 200.
pub fn parse_done(body: &Bytes) -> DoneBody {
    let fields = match object(body) {
        Ok(fields) => fields,
        Err(reason) => return DoneBody::Final(HandlerResult::failed(reason, ErrorKind::Unreadable)),
    };
    let output = fields.get("output").map(|raw| body.slice_ref(raw.get().as_bytes()));
    if fields.get("status").and_then(|raw| string(raw)).as_deref() == Some("IN_PROGRESS") {
        return DoneBody::Progress(output.unwrap_or_else(|| Bytes::from_static(b"null")));
    }
    let error = fields.get("error").and_then(|raw| handler_error(raw));
    let stop_pod = fields.get("stopPod").is_some_and(|raw| raw.get() == "true");
    DoneBody::Final(HandlerResult { output, error, stop_pod })
}

/// Reads a `job-stream` body `{"output":any}`.
///
/// # Errors
/// A text that names what is wrong with the body.
pub fn parse_chunk(body: &Bytes) -> Result<Bytes, String> {
    let fields = object(body)?;
    match fields.get("output") {
        Some(raw) => Ok(body.slice_ref(raw.get().as_bytes())),
        None => Err("the posted chunk has no key \"output\"".to_owned()),
    }
}

/// The top-level keys of a JSON object with their raw values.
fn object(body: &Bytes) -> Result<HashMap<Cow<'_, str>, &RawValue>, String> {
    serde_json::from_slice::<HashMap<Cow<'_, str>, &RawValue>>(body).map_err(|err| {
        let at = if err.line() == 1 { err.column().saturating_sub(41) } else { 0 };
        let near = body.get(at..body.len().min(at + 80)).unwrap_or_default();
        let near = String::from_utf8_lossy(near);
        format!(
            "the handler's result is not a valid JSON object ({err}); a float NaN or Infinity is not JSON. \
             Near the fault: {near}"
        )
    })
}

fn string(raw: &RawValue) -> Option<String> {
    serde_json::from_str(raw.get()).ok()
}

/// `null` is no error; a string is taken as it is; anything else is shown as JSON.
fn handler_error(raw: &RawValue) -> Option<HandlerError> {
    if raw.get() == "null" {
        return None;
    }
    let Some(text) = string(raw) else {
        return Some(HandlerError { text: raw.get().to_owned(), kind: ErrorKind::Returned });
    };
    let kind = exception(&text).unwrap_or(ErrorKind::Returned);
    Some(HandlerError { text, kind })
}

/// A raised exception comes as a JSON string inside the JSON string.
fn exception(text: &str) -> Option<ErrorKind> {
    #[derive(serde::Deserialize)]
    struct Raised {
        error_type: String,
        error_message: String,
    }
    let raised: Raised = serde_json::from_str(text).ok()?;
    Some(ErrorKind::Exception { error_type: raised.error_type, message: raised.error_message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn done(text: &str) -> HandlerResult {
        match parse_done(&Bytes::copy_from_slice(text.as_bytes())) {
            DoneBody::Final(result) => result,
            DoneBody::Progress(output) => panic!("progress {output:?}"),
        }
    }

    fn output(result: &HandlerResult) -> Option<&str> {
        result.output.as_ref().map(|raw| std::str::from_utf8(raw).expect("utf-8"))
    }

    #[test]
    fn every_result_body_of_the_sdk() {
        assert_eq!(output(&done(r#"{"output": {"a": 1.0}}"#)), Some(r#"{"a": 1.0}"#));
        assert_eq!(output(&done(r#"{"output":null}"#)), Some("null"));
        assert_eq!(done("{}"), HandlerResult::default());
        assert_eq!(output(&done(r#"{"output":[]}"#)), Some("[]"));

        let plain = done(r#"{"error":"no such voice"}"#);
        assert_eq!(
            plain.error.map(|e| (e.text, e.kind)),
            Some(("no such voice".into(), ErrorKind::Returned))
        );

        let beside = done(r#"{"output":{"rest":1},"error":"half"}"#);
        assert_eq!(output(&beside), Some(r#"{"rest":1}"#));
        assert!(beside.error.is_some());

        let dict = done(r#"{"error":{"message":"m","code":4}}"#);
        assert_eq!(dict.error.map(|e| e.text).as_deref(), Some(r#"{"message":"m","code":4}"#));

        assert!(done(r#"{"error":null,"output":1}"#).error.is_none());
        assert!(done(r#"{"output":1,"stopPod":true}"#).stop_pod);
        assert!(!done(r#"{"output":1,"stopPod":false}"#).stop_pod);
    }

    #[test]
    fn an_exception_keeps_its_text_and_gets_a_type() {
        let result = done(
            r#"{"error":"{\"error_type\":\"<class 'ValueError'>\",\"error_message\":\"bad\",\"error_traceback\":\"T\"}"}"#,
        );
        let error = result.error.expect("failed");
        assert!(error.text.starts_with(r#"{"error_type""#));
        assert_eq!(
            error.kind,
            ErrorKind::Exception { error_type: "<class 'ValueError'>".into(), message: "bad".into() }
        );
    }

    #[test]
    fn unreadable_bodies_fail_the_job_and_say_why() {
        for body in [r#"{"output": NaN}"#, "[1]", "", "output=1", "{\"output\":\"\u{1}\"}"] {
            let error = done(body).error.expect("failed");
            assert_eq!(error.kind, ErrorKind::Unreadable, "{body}");
        }
        let DoneBody::Final(result) = parse_done(&Bytes::from_static(b"{\"output\":\"\xff\"}")) else {
            panic!("progress")
        };
        assert_eq!(result.error.map(|e| e.kind), Some(ErrorKind::Unreadable));
        assert!(done(r#"{"output": NaN}"#).error.expect("failed").text.contains("NaN"));
    }

    #[test]
    fn progress_is_not_a_result() {
        let body = Bytes::from_static(br#"{"status": "IN_PROGRESS", "output": "50 %"}"#);
        assert_eq!(parse_done(&body), DoneBody::Progress(Bytes::from_static(b"\"50 %\"")));
        let other = Bytes::from_static(br#"{"status": "COMPLETED", "output": 1}"#);
        assert!(matches!(parse_done(&other), DoneBody::Final(_)));
    }

    #[test]
    fn chunks() {
        assert_eq!(
            parse_chunk(&Bytes::from_static(b"{\"output\": \"a\"}")),
            Ok(Bytes::from_static(b"\"a\""))
        );
        assert!(parse_chunk(&Bytes::from_static(b"{}")).is_err());
    }

    proptest! {
        #[test]
        fn never_panics_and_never_loses_a_valid_output(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_done(&Bytes::from(bytes.clone()));
            let _ = parse_chunk(&Bytes::from(bytes));
        }

        #[test]
        fn a_valid_output_comes_back_verbatim(text in ".*", number in any::<f64>()) {
            let value = serde_json::json!({"t": text, "n": number});
            let raw = value.to_string();
            let result = done(&format!("{{\"output\": {raw}}}"));
            prop_assert_eq!(output(&result), Some(raw.as_str()));
        }
    }
}
