//! The members of a registered webhook as a client sends them: at its making all of them, in a PATCH those that
//! change (null = back to the default, as RFC 7396 has it).

mod headers;

use std::collections::BTreeMap;

use ringback_domain::{
    event::{EventType, Filter, RUNFLOW_NAMES},
    target::WebhookFormat,
    webhook::{response::Profile, schedule::RetryPolicy, url::check_url},
};
use ringback_service_runtime::{Redacted, json::check_text};
use ringback_store::webhooks::registry::can_say;
use serde_json::{Map, Value};

use self::headers::headers_of;
use crate::{error::ApiError, submit::parse::Rules};

/// Longest label.
const LABEL_MAX_BYTES: usize = 255;
const RATE_MAX: u64 = 10_000;
const DEADLINE_MIN_MS: u64 = 1_000;
const DEADLINE_MAX_MS: u64 = 120_000;
const EXPIRES_MIN_S: u64 = 10;
const EXPIRES_MAX_S: u64 = 31 * 86_400;

/// Members that a request may have.
const KNOWN: [&str; 14] = [
    "url",
    "events",
    "secret",
    "label",
    "format",
    "endpoints",
    "metadata",
    "headers",
    "retry",
    "rate_per_second",
    "deadline_ms",
    "strict_order",
    "paused",
    "expires_in_seconds",
];

/// A webhook's settings in the clear.
#[derive(Clone, Debug)]
pub(crate) struct Fields {
    pub(crate) label: String,
    pub(crate) url: Option<String>,
    pub(crate) format: WebhookFormat,
    /// The JSON object that [`Filter::parse`] reads.
    pub(crate) filter: Map<String, Value>,
    pub(crate) headers: Redacted<BTreeMap<String, String>>,
    /// A [`RetryPolicy`] as JSON.
    pub(crate) retry: Option<String>,
    pub(crate) rate_per_second: Option<u32>,
    pub(crate) deadline_ms: Option<u64>,
    pub(crate) strict_order: bool,
    pub(crate) paused: bool,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            label: String::new(),
            url: None,
            format: WebhookFormat::Standard,
            filter: Map::new(),
            headers: Redacted::default(),
            retry: None,
            rate_per_second: None,
            deadline_ms: None,
            strict_order: false,
            paused: false,
        }
    }
}

impl Fields {
    /// Reads all members of a new webhook but `secret` and `expires_in_seconds`.
    pub(crate) fn of_new(object: &Map<String, Value>, rules: &Rules) -> Result<Self, ApiError> {
        if !object.contains_key("url") {
            return Err(ApiError::field(
                "/url",
                "is missing: give the address that gets the events, or null for a webhook that is only read from \
                 /v1/events",
            ));
        }
        if !object.contains_key("events") {
            return Err(ApiError::field(
                "/events",
                "is missing: list event types such as \"job.completed\", families such as \"job.*\", or \"*\"; \
                 /v1/webhooks/event-types has all of them",
            ));
        }
        let mut fields = Self::default();
        fields.change(object, rules)?;
        Ok(fields)
    }

    /// Changes what `object` names.
    pub(crate) fn change(&mut self, object: &Map<String, Value>, rules: &Rules) -> Result<(), ApiError> {
        if let Some(unknown) = object.keys().find(|name| !KNOWN.contains(&name.as_str())) {
            return Err(ApiError::field(
                format!("/{}", unknown.replace('~', "~0").replace('/', "~1")),
                format!("is not a member of a webhook; known are {}", KNOWN.join(", ")),
            ));
        }
        if let Some(value) = object.get("label") {
            self.label = label_of(value, "/label")?.unwrap_or_default();
        }
        if let Some(value) = object.get("url") {
            self.url = url_of(value, rules)?;
        }
        if let Some(value) = object.get("format") {
            self.format = format_of(value)?;
        }
        for name in ["events", "endpoints", "metadata"] {
            match object.get(name) {
                None => {}
                Some(Value::Null) => drop(self.filter.remove(name)),
                Some(value) => drop(self.filter.insert(name.to_owned(), value.clone())),
            }
        }
        self.check_filter()?;
        if let Some(value) = object.get("headers") {
            self.headers = headers_of(value, &self.headers)?;
        }
        if let Some(value) = object.get("retry") {
            self.retry = retry_of(value)?;
        }
        if let Some(value) = object.get("rate_per_second") {
            let rate = number(value, "/rate_per_second", (1, RATE_MAX), "events per second")?;
            self.rate_per_second = rate.and_then(|n| u32::try_from(n).ok());
        }
        if let Some(value) = object.get("deadline_ms") {
            self.deadline_ms =
                number(value, "/deadline_ms", (DEADLINE_MIN_MS, DEADLINE_MAX_MS), "milliseconds")?;
        }
        if let Some(value) = object.get("strict_order") {
            self.strict_order = truth(value, "/strict_order")?;
        }
        if let Some(value) = object.get("paused") {
            self.paused = truth(value, "/paused")?;
        }
        Ok(())
    }

    fn check_filter(&mut self) -> Result<(), ApiError> {
        for (name, list) in [("events", true), ("endpoints", true), ("metadata", false)] {
            let fits = self.filter.get(name).is_none_or(|v| match v {
                Value::Array(all) => list && all.iter().all(Value::is_string),
                Value::Object(_) => !list,
                _ => false,
            });
            if !fits {
                let expected = if list { "must be a list of texts" } else { "must be an object" };
                return Err(ApiError::field(format!("/{name}"), expected));
            }
        }
        if self.format == WebhookFormat::Runflow
            && let Some(Value::Array(events)) = self.filter.get_mut("events")
        {
            let mut timed_out = false;
            for event in events.iter_mut() {
                timed_out |= event == "run.failed";
                if let Some(ours) = event.as_str().and_then(runflow_event) {
                    *event = ours.into();
                }
            }
            // Runflow's run that ran out of time has failed. At the end, so that errors name the entries as given.
            if timed_out && !events.iter().any(|event| event == "job.timed_out") {
                events.push("job.timed_out".into());
            }
        }
        let runflow = self.format == WebhookFormat::Runflow;
        let text = Value::Object(self.filter.clone()).to_string();
        let filter = if runflow { Filter::parse(&text) } else { Filter::parse_native(&text) }
            .map_err(|e| ApiError::field(e.pointer(), e.to_string()))?;
        let hears = |t: &EventType| {
            let named = |told: &&str| {
                told.starts_with("batch.") && filter.choose_runflow((*t).into(), told).is_some()
            };
            let batch = runflow && t.family() == "batch" && RUNFLOW_NAMES.iter().any(named);
            (batch || filter.choose((*t).into()).is_some()) && can_say(self.format, *t)
        };
        if !EventType::ALL.iter().any(hears) {
            return Err(ApiError::field(
                "/events",
                format!(
                    "name nothing that a body of format {} can tell: runpod tells of jobs, runflow of the ends of runs \
                     and batches, standard of everything",
                    self.format.as_str()
                ),
            ));
        }
        // Stored in the one form that the filter itself writes.
        if let Ok(Value::Object(written)) = serde_json::from_str(&filter.to_json()) {
            self.filter = written;
        }
        Ok(())
    }
}

/// What Runflow's names of runs' ends mean, for webhooks of its format. Those of batches stand for themselves: which
/// one an end gets depends on what of the batch succeeded.
fn runflow_event(name: &str) -> Option<&'static str> {
    Some(match name {
        "run.*" => "job.*",
        "run.completed" => "job.completed",
        "run.failed" => "job.failed",
        "run.cancelled" => "job.cancelled",
        _ => return None,
    })
}

/// `expires_in_seconds` in ms; the outer `None` where it is absent, the inner one where it is null.
pub(crate) fn expires_in_ms(object: &Map<String, Value>) -> Result<Option<Option<u64>>, ApiError> {
    let Some(value) = object.get("expires_in_seconds") else { return Ok(None) };
    let seconds = number(value, "/expires_in_seconds", (EXPIRES_MIN_S, EXPIRES_MAX_S), "seconds")?;
    Ok(Some(seconds.map(|s| s * 1000)))
}

/// A text of at most 255 bytes, or null.
pub(crate) fn label_of(value: &Value, pointer: &str) -> Result<Option<String>, ApiError> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) if text.is_empty() => Ok(None),
        Value::String(text) => {
            check_text(text, LABEL_MAX_BYTES).map_err(|e| ApiError::field(pointer, e.to_string()))?;
            Ok(Some(text.clone()))
        }
        _ => Err(ApiError::field(pointer, "must be a text")),
    }
}

fn url_of(value: &Value, rules: &Rules) -> Result<Option<String>, ApiError> {
    match value {
        Value::Null => Ok(None),
        Value::String(url) => {
            check_url(url, &rules.urls).map_err(|e| ApiError::field("/url", format!("is refused: {e}")))?;
            Ok(Some(url.clone()))
        }
        _ => Err(ApiError::field(
            "/url",
            "must be a text, or null for a webhook that is only read from /v1/events",
        )),
    }
}

fn format_of(value: &Value) -> Result<WebhookFormat, ApiError> {
    let word = match value {
        Value::Null => return Ok(WebhookFormat::Standard),
        Value::String(word) => word.as_str(),
        _ => "",
    };
    WebhookFormat::parse(word)
        .ok_or_else(|| ApiError::field("/format", "must be \"standard\", \"runflow\" or \"runpod\""))
}

fn truth(value: &Value, pointer: &str) -> Result<bool, ApiError> {
    match value {
        Value::Null => Ok(false),
        Value::Bool(yes) => Ok(*yes),
        _ => Err(ApiError::field(pointer, "must be true or false")),
    }
}

fn number(value: &Value, pointer: &str, (min, max): (u64, u64), unit: &str) -> Result<Option<u64>, ApiError> {
    if value.is_null() {
        return Ok(None);
    }
    value.as_u64().filter(|n| (min..=max).contains(n)).map(Some).ok_or_else(|| {
        ApiError::field(pointer, format!("must be a whole number of {unit} from {min} to {max}"))
    })
}

/// `{"profile": …}` or waits of its own; `"custom"` beside waits says the same as no profile.
fn retry_of(value: &Value) -> Result<Option<String>, ApiError> {
    let mut object = match value {
        Value::Null => return Ok(None),
        Value::Object(object) => object.clone(),
        _ => {
            return Err(ApiError::field(
                "/retry",
                "must be an object such as {\"profile\": \"runpod-strict\"} or {\"waits_ms\": [5000, 60000]}",
            ));
        }
    };
    if object.get("profile").and_then(Value::as_str) == Some("custom") {
        object.remove("profile");
        if object.get("waits_ms").is_none_or(Value::is_null) {
            return Err(ApiError::field(
                "/retry/waits_ms",
                "is missing: the profile \"custom\" needs a list of waits in ms, one after each failed try",
            ));
        }
    }
    let wrong = |reason: String| {
        // The reason begins with the field that it is about: `retry.waits_ms[1]: …`.
        let name = reason.strip_prefix("retry.").and_then(|rest| rest.split([':', '[', ' ']).next());
        ApiError::field(name.map_or("/retry".to_owned(), |n| format!("/retry/{n}")), reason.clone())
    };
    let policy: RetryPolicy =
        serde_json::from_value(Value::Object(object)).map_err(|e| wrong(e.to_string()))?;
    policy.resolve(Profile::Standard).map_err(|e| wrong(e.to_string()))?;
    serde_json::to_string(&policy).map(Some).map_err(|e| wrong(e.to_string()))
}

#[cfg(test)]
mod tests {
    use ringback_domain::webhook::url::UrlPolicy;
    use ringback_service_runtime::config::ServerConfig;

    use serde_json::json;

    use super::*;

    fn new(value: Value) -> Result<Fields, ApiError> {
        let rules = Rules::new(&ServerConfig::default(), UrlPolicy::default());
        Fields::of_new(value.as_object().unwrap(), &rules)
    }

    fn with(name: &str, value: Value) -> Result<Fields, ApiError> {
        let mut object = json!({"url": "https://hooks.example.com/x", "events": ["job.*"]});
        object[name] = value;
        new(object)
    }

    #[test]
    fn each_mistake_names_its_field_and_says_what_to_do() {
        let long = "x".repeat(2000);
        let many: Map<String, Value> = (0..21).map(|n| (format!("x-{n}"), json!("v"))).collect();
        let big: Map<String, Value> = (0..10).map(|n| (format!("x-{n}"), json!("v".repeat(1000)))).collect();
        for (name, value, pointer, text) in [
            ("url", json!(5), "/url", "must be a text"),
            ("url", json!("http://example.com/"), "/url", "webhooks.allow_http"),
            ("url", json!("https://169.254.169.254/"), "/url", "webhooks.allow_private"),
            ("events", json!("job.*"), "/events", "list of texts"),
            ("events", json!([1]), "/events", "list of texts"),
            ("events", json!([]), "/events", "at least one"),
            ("events", json!(["job.done"]), "/events/0", "job.done"),
            ("event", json!([]), "/event", "is not a member"),
            ("label", json!(long), "/label", "255"),
            ("label", json!(1), "/label", "must be a text"),
            ("format", json!("xml"), "/format", "runpod"),
            ("endpoints", json!({}), "/endpoints", "list of texts"),
            ("metadata", json!([]), "/metadata", "an object"),
            ("metadata", json!({"a": {}}), "/metadata/a", "a text"),
            ("headers", json!([]), "/headers", "an object"),
            ("headers", json!({"Host": "x"}), "/headers/Host", "cannot be set"),
            ("headers", json!({"Webhook-Id": "x"}), "/headers/Webhook-Id", "cannot be set"),
            ("headers", json!({"Transfer-Encoding": "x"}), "/headers/Transfer-Encoding", "cannot be set"),
            ("headers", json!({"a b": "x"}), "/headers/a b", "not a header name"),
            ("headers", json!({"x-a": "a\r\nb: c"}), "/headers/x-a", "visible ASCII"),
            ("headers", json!({"x-a": long}), "/headers/x-a", "at most 1024"),
            ("headers", json!({"x-a": 7}), "/headers/x-a", "must be a text"),
            ("headers", many.into(), "/headers", "at most 20"),
            ("headers", big.into(), "/headers", "at most 8192"),
            ("retry", json!("soon"), "/retry", "an object"),
            ("retry", json!({"profile": "mine"}), "/retry", "runpod-strict"),
            ("retry", json!({"profile": "custom"}), "/retry/waits_ms", "needs a list"),
            ("retry", json!({"profile": "default", "waits_ms": [1000]}), "/retry", "exclude"),
            ("retry", json!({"waits_ms": [1]}), "/retry/waits_ms", "between 100"),
            ("retry", json!({"wait": 1}), "/retry", "unknown field"),
            ("rate_per_second", json!(0), "/rate_per_second", "from 1"),
            ("deadline_ms", json!(1.5), "/deadline_ms", "from 1000"),
            ("paused", json!("no"), "/paused", "true or false"),
            ("strict_order", json!(1), "/strict_order", "true or false"),
        ] {
            let error = with(name, value).expect_err(pointer);
            assert_eq!(error.fields[0].0, pointer, "{}", error.detail);
            assert!(error.detail.contains(text), "{pointer}: {}", error.detail);
        }
        assert_eq!(new(json!({"events": ["*"]})).unwrap_err().fields[0].0, "/url");
        assert_eq!(new(json!({"url": null})).unwrap_err().fields[0].0, "/events");
    }

    #[test]
    fn a_patch_changes_what_it_names_and_null_is_the_default() {
        let rules = Rules::new(&ServerConfig::default(), UrlPolicy::default());
        let mut fields = with("headers", json!({"X-Key": "k", "X-Team": "a"})).unwrap();
        let patch = json!({"headers": {"x-key": "[redacted]", "X-Team": null, "x-new": "n"}, "label": "L",
                           "retry": {"waits_ms": [1000, 2000]}, "metadata": {"team": "a"}});
        fields.change(patch.as_object().unwrap(), &rules).unwrap();
        assert_eq!(
            *fields.headers.expose(),
            BTreeMap::from([("x-key".to_owned(), "k".to_owned()), ("x-new".to_owned(), "n".to_owned())])
        );
        assert_eq!(fields.retry.as_deref(), Some(r#"{"waits_ms":[1000,2000]}"#));
        let patch = json!({"retry": null, "metadata": null, "label": null, "headers": null, "url": null});
        fields.change(patch.as_object().unwrap(), &rules).unwrap();
        assert_eq!((fields.retry, fields.url, fields.label.as_str()), (None, None, ""));
        assert_eq!(Value::Object(fields.filter), json!({"events": ["job.*"]}));
        assert!(fields.headers.expose().is_empty());
    }

    #[test]
    fn runflows_names_are_taken_for_its_format_only() {
        let object =
            json!({"url": null, "format": "runflow", "events": ["run.completed", "batch.succeeded"]});
        assert_eq!(new(object).unwrap().filter["events"], json!(["job.completed", "batch.succeeded"]));
        let failed = ["run.failed", "run.partial_succeeded", "batch.failed", "batch.partial_succeeded"];
        let mut fields = new(json!({"url": null, "format": "runflow", "events": failed})).unwrap();
        let stored = ["job.failed", "run.partial_succeeded", "batch.failed", "batch.partial_succeeded"];
        let stored: Vec<&str> = stored.into_iter().chain(["job.timed_out"]).collect();
        assert_eq!(fields.filter["events"], json!(stored));
        let rules = Rules::new(&ServerConfig::default(), UrlPolicy::default());
        fields.change(json!({"label": "x"}).as_object().unwrap(), &rules).unwrap();
        assert_eq!(fields.filter["events"], json!(stored), "said again it is the same");
        let error = fields.change(json!({"format": "standard"}).as_object().unwrap(), &rules).unwrap_err();
        assert_eq!(error.fields[0].0, "/events/1", "{}", error.detail);
        let wrong = json!({"url": null, "format": "runflow", "events": ["run.failed", "run.nope"]});
        assert_eq!(new(wrong).unwrap_err().fields[0].0, "/events/1");
        assert!(with("events", json!(["run.completed"])).is_err());
        for (format, events) in [
            ("runpod", "batch.*"),
            ("runflow", "job.queued"),
            ("runflow", "usage.*"),
            ("runflow", "run.partial_succeeded"),
        ] {
            let error = new(json!({"url": null, "format": format, "events": [events]})).unwrap_err();
            assert_eq!(error.fields[0].0, "/events", "{format}: {}", error.detail);
        }
    }
}
