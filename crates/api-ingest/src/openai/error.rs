//! Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

use axum::{
    http::{HeaderValue, StatusCode},
    response::{IntoResponse, Response},
};
use ringback_domain::JobStatus;
use ringback_store::views::ResultView;
use serde_json::{Value, json};

use crate::{error::ApiError, render::json_value, state::Api};

/// Longest message: a handler may put a whole log into its error.
const MESSAGE_MAX_BYTES: usize = 8 * 1024;

/// An error on a route of OpenAI's surface.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OpenAiError {
    api: Box<ApiError>,
    kind: String,
    param: Value,
    code: Value,
    /// OpenAI's clients send a failed request again unless they are told not to: a job that ended would run twice.
    job_ended: bool,
}

impl<E: Into<ApiError>> From<E> for OpenAiError {
    fn from(error: E) -> Self {
        let api = error.into();
        let code =
            if api.status == StatusCode::UNAUTHORIZED { json!("invalid_api_key") } else { Value::Null };
        let param = match api.fields.first() {
            Some((pointer, _)) => json!(pointer.trim_start_matches('/').replace('/', ".")),
            None => Value::Null,
        };
        Self { kind: kind_of(api.status).to_owned(), api: Box::new(api), param, code, job_ended: false }
    }
}

impl IntoResponse for OpenAiError {
    fn into_response(self) -> Response {
        let mut response = json_value(self.api.status, &self.body());
        self.api.headers(&mut response);
        if self.job_ended {
            response.headers_mut().insert("x-should-retry", HeaderValue::from_static("false"));
        }
        response
    }
}

/// An error of a route that could not be found.
pub(crate) fn respond(error: ApiError) -> Response {
    OpenAiError::from(error).into_response()
}

/// OpenAI's word for a class of errors.
fn kind_of(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        408 | 504 => "timeout_error",
        409 => "conflict_error",
        429 => "rate_limit_error",
        400..=499 => "invalid_request_error",
        _ => "server_error",
    }
}

impl OpenAiError {
    pub(super) fn body(&self) -> Value {
        json!({"error": {"message": self.api.detail, "type": self.kind, "param": self.param, "code": self.code}})
    }

    /// This process ends; another takes the request.
    pub(super) fn shutting_down() -> Self {
        ApiError::unavailable("the server shuts down; the job was cancelled: send the request again").into()
    }

    pub(super) fn too_long(api: &Api) -> Self {
        let detail = format!(
            "the job did not end within {} ms (setting server.openai_timeout_ms) and was cancelled; send long work to \
             /run and take its webhook",
            api.limits.openai_timeout_ms
        );
        Self { job_ended: true, ..ApiError::new(StatusCode::GATEWAY_TIMEOUT, detail).into() }
    }

    /// A new attempt cannot take back what was sent.
    pub(super) fn begun_again() -> Self {
        let detail = "the worker was lost in the middle of this answer; send the request again";
        ApiError::new(StatusCode::BAD_GATEWAY, detail).into()
    }

    pub(super) fn nothing_returned() -> Self {
        let detail = "the job completed, but its handler returned nothing";
        Self { job_ended: true, ..ApiError::new(StatusCode::BAD_GATEWAY, detail).into() }
    }

    /// What a job that did not complete tells.
    pub(super) fn of_job(status: JobStatus, result: Option<&ResultView>) -> Self {
        let text = result.and_then(|r| r.error.as_deref()).unwrap_or_default();
        let error_type = result.and_then(|r| r.error_type.as_deref()).unwrap_or_default();
        let told = |http: StatusCode, fallback: &str| {
            let detail = if text.is_empty() { fallback } else { text };
            Self::from(ApiError::new(http, fit(detail)))
        };
        let error = match status {
            JobStatus::TimedOut => told(StatusCode::GATEWAY_TIMEOUT, "the job ran out of time"),
            JobStatus::Cancelled => told(StatusCode::CONFLICT, "the job was cancelled"),
            JobStatus::Failed | JobStatus::InQueue | JobStatus::InProgress | JobStatus::Completed => {
                match object_of(text) {
                    Some(object) => Self::of_object(&object),
                    // What the built-in engines say of an input that they cannot take.
                    None if error_type == "BadInput" => told(StatusCode::BAD_REQUEST, ""),
                    None => told(StatusCode::INTERNAL_SERVER_ERROR, "the job failed without a reason"),
                }
            }
        };
        Self { job_ended: true, ..error }
    }

    /// An error as vLLM tells it, or as RunPod's SDK tells of an exception.
    fn of_object(object: &Value) -> Self {
        let text = |keys: [&str; 2]| keys.iter().find_map(|key| object[*key].as_str());
        let code = &object["code"];
        let told = match code {
            Value::String(code) => code.parse().ok(),
            code => code.as_u64().and_then(|code| u16::try_from(code).ok()),
        };
        let status = told
            .filter(|code| (400..=599).contains(code))
            .and_then(|code| StatusCode::from_u16(code).ok())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let message = text(["message", "error_message"]).map_or_else(|| object.to_string(), str::to_owned);
        let error = Self::from(ApiError::new(status, fit(&message)));
        Self {
            kind: text(["type", "error_type"]).map_or(error.kind, str::to_owned),
            param: object["param"].clone(),
            code: code.clone(),
            ..error
        }
    }

    /// A completed job whose output says that it failed, as older handlers do: `{"object": "error", …}` or
    /// `{"error": {…}}`.
    pub(super) fn of_output(output: &[u8]) -> Option<Self> {
        #[derive(serde::Deserialize)]
        struct Told {
            #[serde(default)]
            error: Value,
            #[serde(default)]
            object: Value,
        }
        let told: Told = serde_json::from_slice(output).ok()?;
        let error = match (&told.error, &told.object) {
            (Value::Object(_), _) => Self::of_object(&told.error),
            (Value::String(text), _) => match object_of(text) {
                Some(object) => Self::of_object(&object),
                None => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, fit(text)).into(),
            },
            (_, Value::String(object)) if object == "error" => {
                Self::of_object(&serde_json::from_slice(output).ok()?)
            }
            _ => return None,
        };
        Some(Self { job_ended: true, ..error })
    }
}

fn fit(text: &str) -> String {
    ringback_service_runtime::json::fit_text(text, MESSAGE_MAX_BYTES)
}

/// The object that a job's error is: JSON, or what Python prints of a dictionary, which is how RunPod's SDK passes on
/// an error that a generator yielded.
fn object_of(text: &str) -> Option<Value> {
    let text = text.trim();
    if !text.starts_with('{') {
        return None;
    }
    let value = serde_json::from_str(text).ok().or_else(|| python::dictionary(text))?;
    // Some handlers put OpenAI's whole body there.
    Some(match value {
        Value::Object(mut object) => match object.remove("error") {
            Some(inner @ Value::Object(_)) => inner,
            Some(other) => {
                object.insert("error".to_owned(), other);
                Value::Object(object)
            }
            None => Value::Object(object),
        },
        other => other,
    })
}

/// Python's `repr` of a dictionary of texts, numbers, `None`, `True`, `False` and further dictionaries.
mod python {
    use serde_json::{Map, Number, Value};

    /// Deepest nesting read.
    const DEPTH_MAX: u32 = 8;

    pub(super) fn dictionary(text: &str) -> Option<Value> {
        let mut rest = text;
        let value = value(&mut rest, 0)?;
        rest.trim().is_empty().then_some(value)
    }

    fn eat(rest: &mut &str, token: &str) -> bool {
        let trimmed = rest.trim_start();
        match trimmed.strip_prefix(token) {
            Some(after) => {
                *rest = after;
                true
            }
            None => false,
        }
    }

    fn value(rest: &mut &str, depth: u32) -> Option<Value> {
        if depth > DEPTH_MAX {
            return None;
        }
        for (word, value) in
            [("None", Value::Null), ("True", Value::Bool(true)), ("False", Value::Bool(false))]
        {
            if eat(rest, word) {
                return Some(value);
            }
        }
        let trimmed = rest.trim_start();
        match trimmed.chars().next()? {
            '{' => members(rest, depth),
            '\'' | '"' => text(rest).map(Value::String),
            _ => {
                let end = trimmed
                    .find(|c: char| !(c.is_ascii_digit() || "+-.eE".contains(c)))
                    .unwrap_or(trimmed.len());
                let number: Number = serde_json::from_str(&trimmed[..end]).ok()?;
                *rest = &trimmed[end..];
                Some(Value::Number(number))
            }
        }
    }

    fn members(rest: &mut &str, depth: u32) -> Option<Value> {
        let mut members = Map::new();
        if !eat(rest, "{") {
            return None;
        }
        while !eat(rest, "}") {
            let key = text(rest)?;
            if !eat(rest, ":") {
                return None;
            }
            members.insert(key, value(rest, depth + 1)?);
            if !eat(rest, ",") && !rest.trim_start().starts_with('}') {
                return None;
            }
        }
        Some(Value::Object(members))
    }

    fn text(rest: &mut &str) -> Option<String> {
        let trimmed = rest.trim_start();
        let quote = trimmed.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
        let mut out = String::new();
        let mut chars = trimmed[1..].char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    *rest = &trimmed[1 + at + 1..];
                    return Some(out);
                }
                '\\' => match chars.next()?.1 {
                    'n' => out.push('\n'),
                    'r' => out.push('\r'),
                    't' => out.push('\t'),
                    kind @ ('x' | 'u' | 'U') => {
                        let digits = match kind {
                            'x' => 2,
                            'u' => 4,
                            _ => 8,
                        };
                        let code = (0..digits)
                            .map(|_| chars.next()?.1.to_digit(16))
                            .try_fold(0, |n, d| Some(n * 16 + d?))?;
                        out.push(char::from_u32(code)?);
                    }
                    other => out.push(other),
                },
                c => out.push(c),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(error: &str, error_type: Option<&str>) -> OpenAiError {
        let result = ResultView {
            output: None,
            error: Some(error.to_owned()),
            error_type: error_type.map(str::to_owned),
            worker: None,
            started_at_ms: None,
        };
        OpenAiError::of_job(JobStatus::Failed, Some(&result))
    }

    #[test]
    fn an_error_of_a_generator_keeps_its_code_and_type() {
        let text = r#"{'message': "it's too long: \n 5 \xfc \u4e2d", 'type': 'BadRequestError', 'param': None, 'code': 400}"#;
        let error = failed(text, None);
        assert_eq!(error.api.status, 400);
        assert_eq!(
            error.body(),
            json!({"error": {"message": "it's too long: \n 5 ü 中", "type": "BadRequestError", "param": null, "code": 400}})
        );
        assert_eq!(error.into_response().headers()["x-should-retry"], "false");
    }

    #[test]
    fn every_kind_of_error_text_has_a_status_and_a_message() {
        for (text, error_type, status, message) in [
            ("no such voice", None, 500, "no such voice"),
            ("`texts[3]` is a number", Some("BadInput"), 400, "`texts[3]` is a number"),
            (
                r#"{"error_type":"<class 'ValueError'>","error_message":"bad","error_traceback":"T"}"#,
                None,
                500,
                "bad",
            ),
            (r#"{"message":"slow down","code":"429"}"#, None, 429, "slow down"),
            (r#"{"error":{"message":"inner","code":404}}"#, None, 404, "inner"),
            ("{'message': 'x', 'code': 200}", None, 500, "x"),
            ("{'a': [1]}", None, 500, "{'a': [1]}"),
            ("{'a", None, 500, "{'a"),
            ("", None, 500, "the job failed without a reason"),
        ] {
            let error = failed(text, error_type);
            assert_eq!((error.api.status.as_u16(), error.api.detail.as_str()), (status, message), "{text}");
        }
        assert_eq!(OpenAiError::of_job(JobStatus::TimedOut, None).api.status, 504);
        assert_eq!(OpenAiError::of_job(JobStatus::Cancelled, None).body()["error"]["type"], "conflict_error");
    }

    #[test]
    fn an_output_that_is_an_error_is_one() {
        let of = |text: &str| {
            OpenAiError::of_output(text.as_bytes()).map(|e| (e.api.status.as_u16(), e.api.detail))
        };
        assert_eq!(
            of(r#"{"object":"error","message":"m","type":"t","code":404}"#),
            Some((404, "m".to_owned()))
        );
        assert_eq!(of(r#"{"error":{"message":"m","code":400}}"#), Some((400, "m".to_owned())));
        assert_eq!(of(r#"{"error":"m"}"#), Some((500, "m".to_owned())));
        assert_eq!(of(r#"{"object":"chat.completion","error":null}"#), None);
        assert_eq!(of("[1]"), None);
    }

    #[test]
    fn our_own_errors_have_the_words_of_the_field() {
        let field = OpenAiError::from(ApiError::field("/input", "is missing"));
        assert_eq!(
            field.body(),
            json!({"error": {"message": "`input` is missing", "type": "invalid_request_error", "param": "input", "code": null}})
        );
        let key = OpenAiError::from(ApiError::new(StatusCode::UNAUTHORIZED, "no"));
        assert_eq!(key.body()["error"]["code"], "invalid_api_key");
        let response = key.into_response();
        assert!(!response.headers().contains_key("x-should-retry"));
    }
}
