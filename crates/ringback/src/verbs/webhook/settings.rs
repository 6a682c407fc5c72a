//! Settings of a webhook as flags.

use serde_json::{Map, Value, json};

use crate::ui::when;

pub(super) fn overlap(text: &str) -> Result<u64, String> {
    if text.trim() == "0" { Ok(0) } else { when::parse_span_ms(text) }
}

/// What a webhook listens to and how it is sent to.
#[derive(Debug, Default, clap::Args)]
pub(super) struct Settings {
    /// Event type, family such as 'job.*', or '*'; repeatable [default on create: '*']
    #[arg(short, long = "event", value_name = "TYPE")]
    pub(super) events: Vec<String>,
    /// Only events of this endpoint; repeatable
    #[arg(long = "endpoint", value_name = "NAME")]
    endpoints: Vec<String>,
    /// Only events about jobs with this metadata; repeatable
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// A name for people
    #[arg(long)]
    label: Option<String>,
    /// Body: standard, runflow or runpod
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// A further header, 'Name: value'; repeatable
    #[arg(long = "header", value_name = "HEADER", value_parser = header)]
    headers: Vec<(String, String)>,
    /// default, runpod-strict, or own waits such as 5s,1m,10m
    #[arg(long, value_name = "RETRY", value_parser = retry)]
    retry: Option<Value>,
    /// Most POSTs per second
    #[arg(long, value_name = "N")]
    rate: Option<u64>,
    /// Longest POST, for example 10s
    #[arg(long, value_name = "SPAN", value_parser = when::parse_span_ms)]
    deadline: Option<u64>,
    /// An event waits until the earlier ones of its job have ended
    #[arg(long)]
    strict_order: bool,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("write 'Name: value'")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

fn retry(text: &str) -> Result<Value, String> {
    if matches!(text, "default" | "runpod-strict") {
        return Ok(json!({"profile": text}));
    }
    let waits = text.split(',').map(when::parse_span_ms).collect::<Result<Vec<_>, _>>();
    waits
        .map(|waits| json!({"waits_ms": waits}))
        .map_err(|e| format!("{e}; or write default or runpod-strict"))
}

impl Settings {
    pub(super) fn object(&self) -> Map<String, Value> {
        let mut object = Map::new();
        let mut put = |name: &str, value: Value| drop(object.insert(name.to_owned(), value));
        if !self.events.is_empty() {
            put("events", self.events.clone().into());
        }
        if !self.endpoints.is_empty() {
            put("endpoints", self.endpoints.clone().into());
        }
        if !self.metadata.is_empty() {
            let all: Map<String, Value> =
                self.metadata.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
            put("metadata", all.into());
        }
        if !self.headers.is_empty() {
            let all: Map<String, Value> =
                self.headers.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
            put("headers", all.into());
        }
        for (name, value) in [("label", &self.label), ("format", &self.format)] {
            if let Some(text) = value {
                put(name, text.clone().into());
            }
        }
        if let Some(retry) = &self.retry {
            put("retry", retry.clone());
        }
        for (name, value) in [("rate_per_second", self.rate), ("deadline_ms", self.deadline)] {
            if let Some(n) = value {
                put(name, n.into());
            }
        }
        if self.strict_order {
            put("strict_order", true.into());
        }
        object
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_named_is_sent() {
        assert!(Settings::default().object().is_empty());
        let settings = Settings {
            retry: Some(retry("5s,1m").unwrap()),
            metadata: vec![pair("team=a=b").unwrap()],
            headers: vec![header("X-A: b:c").unwrap()],
            rate: Some(3),
            ..Settings::default()
        };
        assert_eq!(
            Value::Object(settings.object()),
            json!({"retry": {"waits_ms": [5000, 60000]}, "metadata": {"team": "a=b"}, "headers": {"X-A": "b:c"},
                   "rate_per_second": 3})
        );
        assert!(retry("soon").unwrap_err().contains("runpod-strict"));
        assert_eq!(overlap("0"), Ok(0));
    }
}
