//! Which events a registered webhook wants.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::{Candidates, EventType};

/// Most patterns, endpoints or metadata fields of a filter.
pub const MAX_ENTRIES: usize = 64;
/// Longest endpoint name, metadata field name or metadata text, in bytes.
pub const MAX_TEXT_BYTES: usize = 256;

/// Types that a filter names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pattern {
    /// `*`.
    All,
    /// `job.*`: all of a family, told by one of its types.
    Family(&'static str),
    /// One type.
    One(EventType),
    /// A name that only bodies of format `runflow` carry: [`RUNFLOW_NAMES`].
    Runflow(&'static str),
}

/// Runflow's names of ends that no event type is called by. Runs never end in the last one here.
pub const RUNFLOW_NAMES: [&str; 3] = ["batch.succeeded", "batch.partial_succeeded", "run.partial_succeeded"];

impl Pattern {
    fn parse(text: &str, runflow: bool) -> Option<Self> {
        if runflow && let Some(name) = RUNFLOW_NAMES.iter().find(|name| **name == text) {
            return Some(Self::Runflow(name));
        }
        if text == "*" {
            return Some(Self::All);
        }
        match text.strip_suffix(".*") {
            Some(family) => {
                EventType::ALL.iter().map(|t| t.family()).find(|f| *f == family).map(Self::Family)
            }
            None => EventType::parse(text).map(Self::One),
        }
    }

    /// Whether it names the type.
    #[must_use]
    pub fn matches(self, event: EventType) -> bool {
        match self {
            Self::All => true,
            Self::Family(family) => event.family() == family,
            Self::One(one) => one == event,
            Self::Runflow(_) => false,
        }
    }

    /// Whether it names the end of a batch that Runflow calls `told`. `batch.failed` and `batch.cancelled` mean
    /// Runflow's then.
    fn matches_runflow(self, event: EventType, told: &str) -> bool {
        match self {
            Self::Runflow(name) => name == told,
            Self::One(one @ (EventType::BatchFailed | EventType::BatchCancelled)) => one.name() == told,
            Self::All | Self::Family(_) | Self::One(_) => self.matches(event),
        }
    }
}

/// Why a filter is refused. [`Self::pointer`] names the field, the text does not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// It is not the JSON that a filter is.
    #[error("not a filter: {0}")]
    Json(String),
    /// Nothing would ever match.
    #[error("must name at least one type; `*` means all")]
    NoEvents,
    /// A list is too long.
    #[error("may have at most {MAX_ENTRIES} entries, got {got}")]
    TooMany {
        /// Which list.
        field: &'static str,
        /// Its length.
        got: usize,
    },
    /// A text is empty or too long.
    #[error("must have 1 to {MAX_TEXT_BYTES} bytes, got {got}")]
    Length {
        /// Which list.
        field: &'static str,
        /// Place in it, from 0.
        index: usize,
        /// Length found.
        got: usize,
    },
    /// No event has that name.
    #[error("names no event: nothing is called {name:?}; known are *, {known}", known = known())]
    UnknownEvent {
        /// Place in the list, from 0.
        index: usize,
        /// What stood there.
        name: String,
    },
    /// Metadata is compared with texts, numbers and truth values only.
    #[error("must be a text, a number, true, false or null")]
    MetadataValue {
        /// The field.
        key: String,
    },
}

impl FilterError {
    /// The field at fault, as a JSON pointer.
    #[must_use]
    pub fn pointer(&self) -> String {
        match self {
            Self::Json(_) => String::new(),
            Self::NoEvents => "/events".to_owned(),
            Self::TooMany { field, .. } => format!("/{field}"),
            Self::Length { field, index, .. } => format!("/{field}/{index}"),
            Self::UnknownEvent { index, .. } => format!("/events/{index}"),
            Self::MetadataValue { key } => {
                format!("/metadata/{}", key.replace('~', "~0").replace('/', "~1"))
            }
        }
    }
}

fn known() -> String {
    let mut all: Vec<String> = Vec::new();
    for t in EventType::ALL {
        let family = format!("{}.*", t.family());
        if !all.contains(&family) {
            all.push(family);
        }
    }
    all.extend(EventType::ALL.iter().map(|t| t.name().to_owned()));
    all.join(", ")
}

/// Which events a webhook wants: those of a named type, of a named endpoint (any, where none is named), about a job or
/// batch with these metadata (any, where none are named). An event without an endpoint or without metadata does not
/// match a filter that asks for one.
#[derive(Clone, Debug, PartialEq)]
pub struct Filter {
    events: Vec<Pattern>,
    endpoints: Vec<String>,
    metadata: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    #[serde(default)]
    events: Vec<String>,
    #[serde(default)]
    endpoints: Vec<String>,
    #[serde(default)]
    metadata: BTreeMap<String, Value>,
}

impl Filter {
    /// Makes a filter of its parts; its events are event types.
    ///
    /// # Errors
    /// The first part that is wrong.
    pub fn new(
        events: &[String],
        endpoints: Vec<String>,
        metadata: BTreeMap<String, Value>,
    ) -> Result<Self, FilterError> {
        Self::of(events, endpoints, metadata, false)
    }

    fn of(
        events: &[String],
        endpoints: Vec<String>,
        metadata: BTreeMap<String, Value>,
        runflow: bool,
    ) -> Result<Self, FilterError> {
        if events.is_empty() {
            return Err(FilterError::NoEvents);
        }
        let lists = [("events", events.len()), ("endpoints", endpoints.len()), ("metadata", metadata.len())];
        if let Some((field, got)) = lists.into_iter().find(|(_, n)| *n > MAX_ENTRIES) {
            return Err(FilterError::TooMany { field, got });
        }
        let patterns = events
            .iter()
            .enumerate()
            .map(|(index, name)| {
                let unknown = || FilterError::UnknownEvent { index, name: name.chars().take(64).collect() };
                Pattern::parse(name, runflow).ok_or_else(unknown)
            })
            .collect::<Result<Vec<_>, _>>()?;
        check_lengths("endpoints", endpoints.iter().map(String::len))?;
        check_lengths("metadata", metadata.keys().map(String::len))?;
        for (key, value) in &metadata {
            let fits = match value {
                Value::Null | Value::Bool(_) | Value::Number(_) => true,
                Value::String(text) => text.len() <= MAX_TEXT_BYTES,
                Value::Array(_) | Value::Object(_) => false,
            };
            if !fits {
                return Err(FilterError::MetadataValue { key: key.clone() });
            }
        }
        Ok(Self { events: patterns, endpoints, metadata })
    }

    /// Reads `{"events":[…],"endpoints":[…],"metadata":{…}}`; events may be [`RUNFLOW_NAMES`] too.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(json: &str) -> Result<Self, FilterError> {
        Self::read(json, true)
    }

    /// [`Self::parse`] for bodies of a format that knows event types only.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse_native(json: &str) -> Result<Self, FilterError> {
        Self::read(json, false)
    }

    fn read(json: &str, runflow: bool) -> Result<Self, FilterError> {
        // A list would be taken for the fields in their order.
        if !json.trim_start().starts_with('{') {
            return Err(FilterError::Json("expected an object".to_owned()));
        }
        let raw: Raw = serde_json::from_str(json).map_err(|e| FilterError::Json(e.to_string()))?;
        Self::of(&raw.events, raw.endpoints, raw.metadata, runflow)
    }

    /// What [`Self::parse`] reads.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut object = serde_json::Map::new();
        object.insert("events".to_owned(), self.event_names().into());
        if !self.endpoints.is_empty() {
            object.insert("endpoints".to_owned(), self.endpoints.clone().into());
        }
        if !self.metadata.is_empty() {
            object.insert(
                "metadata".to_owned(),
                Value::Object(self.metadata.iter().map(|(k, v)| (k.clone(), v.clone())).collect()),
            );
        }
        Value::Object(object).to_string()
    }

    /// The patterns as they were given.
    #[must_use]
    pub fn event_names(&self) -> Vec<String> {
        self.events
            .iter()
            .map(|p| match p {
                Pattern::All => "*".to_owned(),
                Pattern::Family(family) => format!("{family}.*"),
                Pattern::One(one) => one.name().to_owned(),
                Pattern::Runflow(name) => (*name).to_owned(),
            })
            .collect()
    }

    /// The endpoints, by name or alias; empty = any.
    #[must_use]
    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    /// The metadata that must be there; empty = any.
    #[must_use]
    pub const fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The first of a fact's names that this filter names: so a wildcard never gives two events for one fact.
    #[must_use]
    pub fn choose(&self, names: Candidates) -> Option<EventType> {
        names.iter().find(|name| self.events.iter().any(|p| p.matches(*name)))
    }

    /// The same for the end of a batch whose body of format `runflow` is called `told`.
    #[must_use]
    pub fn choose_runflow(&self, names: Candidates, told: &str) -> Option<EventType> {
        names.iter().find(|name| self.events.iter().any(|p| p.matches_runflow(*name, told)))
    }

    /// Whether an endpoint known under these names is wanted.
    #[must_use]
    pub fn wants_endpoint(&self, names: &[&str]) -> bool {
        self.endpoints.is_empty() || self.endpoints.iter().any(|e| names.contains(&e.as_str()))
    }

    /// Whether metadata (an object, if there are any) are wanted.
    #[must_use]
    pub fn wants_metadata(&self, given: Option<&Value>) -> bool {
        self.metadata.iter().all(|(key, value)| given.and_then(|g| g.get(key)) == Some(value))
    }
}

fn check_lengths(field: &'static str, lengths: impl Iterator<Item = usize>) -> Result<(), FilterError> {
    for (index, got) in lengths.enumerate() {
        if got == 0 || got > MAX_TEXT_BYTES {
            return Err(FilterError::Length { field, index, got });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::{EndpointKind, of_transition};
    use super::*;
    use crate::status::JobStatus;

    fn filter(json: &str) -> Filter {
        Filter::parse(json).unwrap()
    }

    #[test]
    fn runflows_names_mean_what_its_bodies_say() {
        let of = |events: &str| Filter::parse(&format!(r#"{{"events":{events}}}"#)).unwrap();
        let completed: Candidates = EventType::BatchCompleted.into();
        for (events, told, wanted) in [
            (r#"["batch.succeeded"]"#, "batch.succeeded", true),
            (r#"["batch.succeeded"]"#, "batch.failed", false),
            (r#"["batch.partial_succeeded"]"#, "batch.partial_succeeded", true),
            (r#"["batch.failed"]"#, "batch.failed", true),
            (r#"["batch.failed"]"#, "batch.partial_succeeded", false),
            (r#"["batch.completed"]"#, "batch.failed", true),
            (r#"["batch.*"]"#, "batch.partial_succeeded", true),
            (r#"["*"]"#, "batch.succeeded", true),
            (r#"["job.*", "run.partial_succeeded"]"#, "batch.succeeded", false),
        ] {
            assert_eq!(of(events).choose_runflow(completed, told).is_some(), wanted, "{events} {told}");
        }
        // One that was stopped may have done a part.
        let stopped: Candidates = EventType::BatchFailed.into();
        assert_eq!(of(r#"["batch.failed"]"#).choose_runflow(stopped, "batch.partial_succeeded"), None);
        let partial = of(r#"["batch.partial_succeeded"]"#);
        assert_eq!(partial.choose_runflow(stopped, "batch.partial_succeeded"), Some(EventType::BatchFailed));
        assert_eq!(partial.choose(stopped), None);
        assert_eq!(Filter::parse(&partial.to_json()), Ok(partial.clone()));
        assert!(Filter::parse_native(&partial.to_json()).is_err());
        assert!(Filter::new(&partial.event_names(), Vec::new(), BTreeMap::new()).is_err());
    }

    #[test]
    fn wildcards_give_one_event_per_fact() {
        let names = of_transition(EndpointKind::Completion, JobStatus::Completed, false);
        let choose = |events: &str| filter(&format!(r#"{{"events":{events}}}"#)).choose(names);
        assert_eq!(choose(r#"["*"]"#), Some(EventType::CompletionFinished));
        assert_eq!(choose(r#"["job.*","completion.*"]"#), Some(EventType::CompletionFinished));
        assert_eq!(choose(r#"["job.*"]"#), Some(EventType::JobCompleted));
        assert_eq!(choose(r#"["job.completed","completion.failed"]"#), Some(EventType::JobCompleted));
        assert_eq!(choose(r#"["completion.failed"]"#), None);
        let again = of_transition(EndpointKind::Job, JobStatus::InQueue, true);
        assert_eq!(filter(r#"{"events":["job.*"]}"#).choose(again), Some(EventType::JobRetried));
        assert_eq!(filter(r#"{"events":["job.queued"]}"#).choose(again), Some(EventType::JobQueued));
    }

    #[test]
    fn errors_name_the_field() {
        let refused = |json: &str| Filter::parse(json).unwrap_err();
        assert_eq!(refused(r#"{"events":[]}"#), FilterError::NoEvents);
        assert_eq!(refused("{}"), FilterError::NoEvents);
        let unknown = refused(r#"{"events":["job.*","job.done"]}"#);
        assert_eq!(unknown.pointer(), "/events/1");
        assert!(unknown.to_string().contains("\"job.done\""), "{unknown}");
        assert!(unknown.to_string().contains("completion.*"), "{unknown}");
        for family in ["jobs.*", ".*", "*.*", "job.", "JOB.*", ""] {
            let json = json!({"events": [family]}).to_string();
            assert!(matches!(refused(&json), FilterError::UnknownEvent { .. }), "{family}");
        }
        assert_eq!(refused(r#"{"events":["*"],"endpoints":["a",""]}"#).pointer(), "/endpoints/1");
        assert_eq!(refused(r#"{"events":["*"],"metadata":{"a/b":[1]}}"#).pointer(), "/metadata/a~1b");
        let many = json!({"events": vec!["*"; 65]}).to_string();
        assert_eq!(refused(&many), FilterError::TooMany { field: "events", got: 65 });
        assert!(matches!(refused(r#"{"events":["*"],"event":1}"#), FilterError::Json(_)));
        assert!(matches!(refused("[]"), FilterError::Json(_)));
    }

    #[test]
    fn endpoints_and_metadata_narrow() {
        let f = filter(r#"{"events":["*"],"endpoints":["chat","me/llama"],"metadata":{"tenant":"a","n":1}}"#);
        assert!(f.wants_endpoint(&["chat"]));
        assert!(f.wants_endpoint(&["other", "me/llama"]));
        assert!(!f.wants_endpoint(&["other"]));
        assert!(!f.wants_endpoint(&[]));
        assert!(f.wants_metadata(Some(&json!({"tenant":"a","n":1,"more":[]}))));
        assert!(!f.wants_metadata(Some(&json!({"tenant":"a","n":2}))));
        assert!(!f.wants_metadata(Some(&json!({"tenant":"a"}))));
        assert!(!f.wants_metadata(None));
        let any = filter(r#"{"events":["*"]}"#);
        assert!(any.wants_endpoint(&[]) && any.wants_metadata(None));
        // Null asks for null, not for an absent field.
        let null = filter(r#"{"events":["*"],"metadata":{"a":null}}"#);
        assert!(null.wants_metadata(Some(&json!({"a":null}))) && !null.wants_metadata(Some(&json!({}))));
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(
            picks in proptest::collection::vec(0..EventType::ALL.len() * 2 + 1, 1..8),
            endpoints in proptest::collection::vec("[a-z/]{1,8}", 0..3),
            metadata in proptest::collection::btree_map("[a-z.]{1,5}", "[ -~]{0,9}", 0..3),
        ) {
            let n = EventType::ALL.len();
            let events: Vec<String> = picks.iter().map(|p| match p {
                p if *p < n => EventType::ALL[*p].name().to_owned(),
                p if *p < 2 * n => format!("{}.*", EventType::ALL[*p - n].family()),
                _ => "*".to_owned(),
            }).collect();
            let metadata = metadata.into_iter().map(|(k, v)| (k, Value::from(v))).collect();
            let f = Filter::new(&events, endpoints, metadata).unwrap();
            prop_assert_eq!(f.event_names(), events);
            prop_assert_eq!(Filter::parse(&f.to_json()).unwrap(), f);
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,60}") {
            let _ = Filter::parse(&text);
            let _ = Filter::new(&[text], Vec::new(), BTreeMap::new());
        }
    }
}
