//! `[[batch_templates]]`: a route with its own item shape, mapped onto batches (DESIGN 5, MISSION A1).

use super::problems::{Problems, is_name};
use super::section::section;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

section! {
    /// One batch template: POST on its route makes a batch, GET on `<route>/{id}` shows it.
    BatchTemplateConfig {
        /// A shipped template to start from: "tts". Other keys override it.
        preset: Option<TemplatePreset> = None,
        /// Path of the route, for example "/tts/batch".
        route: Option<String> = None,
        /// Endpoint that runs the jobs.
        endpoint: String = String::new(),
        /// Project of the endpoint.
        project: String = "default".to_owned(),
        /// Field of the body with the list of items.
        items_field: Option<String> = None,
        /// Integer field of an item that orders the items and becomes their `client_ref`. Unset: order of the list.
        order_field: Option<String> = None,
        /// Fields of each job's input: `{ const = 3 }`, or `{ item = "text", body = "text", missing = "error" }`.
        input: BTreeMap<String, FieldRule> = BTreeMap::new(),
    }
}

/// Shipped templates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TemplatePreset {
    /// `/tts/batch` of MISSION A1: chunks with text, index and a voice.
    Tts,
}

/// Where one field of a job's input comes from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FieldRule {
    /// A constant.
    #[serde(rename = "const", skip_serializing_if = "Option::is_none")]
    pub constant: Option<Value>,
    /// Field of the item; it wins over `body`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub item: Option<String>,
    /// Field of the body beside the items.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// What to do when neither is there (absent or null).
    pub missing: Missing,
}

/// What a missing source field means.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Missing {
    /// The request is refused, naming the field.
    #[default]
    Error,
    /// The input field is null.
    Null,
    /// The input field is left out.
    Omit,
}

/// A template ready for use: route, endpoint and rules are all set.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchTemplate {
    /// Path of the route, without trailing slash.
    pub route: String,
    /// Project of the endpoint.
    pub project: String,
    /// Endpoint name.
    pub endpoint: String,
    /// Field of the body with the items.
    pub items_field: String,
    /// Integer field that orders the items.
    pub order_field: Option<String>,
    /// Rules for the input's fields.
    pub input: BTreeMap<String, FieldRule>,
}

/// One job made from an item.
#[derive(Debug, Clone, PartialEq)]
pub struct TemplateItem {
    /// Text of the order field, or the position in the list.
    pub client_ref: String,
    /// The job's input.
    pub input: Map<String, Value>,
}

/// Why a body does not fit the template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{pointer}: {detail}")]
pub struct TemplateError {
    /// JSON pointer of the field.
    pub pointer: String,
    /// What is wrong.
    pub detail: String,
}

impl BatchTemplateConfig {
    /// The template in effect: the keys given over those of the preset.
    #[must_use]
    pub fn resolve(&self) -> BatchTemplate {
        let mut input = match self.preset {
            Some(TemplatePreset::Tts) => tts_input(),
            None => BTreeMap::new(),
        };
        input.extend(self.input.clone());
        let from_preset = |text: &str| self.preset.map(|_| text.to_owned());
        let route = self.route.clone().or_else(|| from_preset("/tts/batch")).unwrap_or_default();
        BatchTemplate {
            route: route.trim_end_matches('/').to_owned(),
            project: self.project.clone(),
            endpoint: self.endpoint.clone(),
            items_field: self.items_field.clone().or_else(|| from_preset("chunks")).unwrap_or_default(),
            order_field: self.order_field.clone().or_else(|| from_preset("index")),
            input,
        }
    }

    pub(super) fn validate(&self, n: usize, p: &mut Problems) {
        let at = |field: &str| format!("batch_templates[{n}].{field}");
        let template = self.resolve();
        let segments: Vec<&str> = template.route.split('/').skip(1).collect();
        if !template.route.starts_with('/') || segments.is_empty() || !segments.iter().all(|s| is_name(s)) {
            p.add(at("route"), "must be a path such as \"/tts/batch\" of plain names");
        } else if matches!(segments[0], "v1" | "v2" | "healthz" | "metrics" | "callbacks") {
            p.add(at("route"), format!("lies under /{}, which the API itself uses", segments[0]));
        }
        if template.items_field.is_empty() {
            p.add(at("items_field"), "is missing");
        }
        if template.input.is_empty() {
            p.add(at("input"), "is empty: jobs would have no input");
        }
        for (field, rule) in &template.input {
            let sourced = rule.item.is_some() || rule.body.is_some();
            if rule.constant.is_some() == sourced {
                p.add(at(&format!("input.{field}")), "needs either const, or item and/or body");
            }
        }
    }
}

impl BatchTemplate {
    /// Maps a request body onto jobs, ordered by the order field.
    ///
    /// # Errors
    /// Names the first field that is missing or has the wrong type.
    pub fn map(&self, body: &Map<String, Value>) -> Result<Vec<TemplateItem>, TemplateError> {
        let fail = |pointer: String, detail: &str| TemplateError { pointer, detail: detail.to_owned() };
        let items_at = format!("/{}", self.items_field);
        let items = match body.get(&self.items_field) {
            Some(Value::Array(items)) if !items.is_empty() => items,
            Some(Value::Array(_)) => return Err(fail(items_at, "must not be empty")),
            Some(_) => return Err(fail(items_at, "must be a list")),
            None => return Err(fail(items_at, "is missing")),
        };
        let mut ordered = Vec::with_capacity(items.len());
        for (n, item) in items.iter().enumerate() {
            let at = format!("{items_at}/{n}");
            let Value::Object(item) = item else { return Err(fail(at, "must be an object")) };
            let position = i64::try_from(n).unwrap_or(i64::MAX);
            let order = match self.order_field.as_deref().map(|name| (name, item.get(name))) {
                None | Some((_, None | Some(Value::Null))) => position,
                Some((name, Some(value))) => {
                    value.as_i64().ok_or_else(|| fail(format!("{at}/{name}"), "must be an integer"))?
                }
            };
            ordered.push((
                order,
                TemplateItem { client_ref: order.to_string(), input: self.input_of(item, body, &at)? },
            ));
        }
        // Stable: items with the same number keep the order of the list.
        ordered.sort_by_key(|(order, _)| *order);
        Ok(ordered.into_iter().map(|(_, item)| item).collect())
    }

    fn input_of(
        &self,
        item: &Map<String, Value>,
        body: &Map<String, Value>,
        at: &str,
    ) -> Result<Map<String, Value>, TemplateError> {
        let found = |source: &Map<String, Value>, name: &Option<String>| {
            name.as_ref().and_then(|name| source.get(name)).filter(|value| !value.is_null()).cloned()
        };
        let mut input = Map::new();
        for (field, rule) in &self.input {
            let value =
                rule.constant.clone().or_else(|| found(item, &rule.item)).or_else(|| found(body, &rule.body));
            match (value, rule.missing) {
                (Some(value), _) => {
                    input.insert(field.clone(), value);
                }
                (None, Missing::Null) => {
                    input.insert(field.clone(), Value::Null);
                }
                (None, Missing::Omit) => {}
                (None, Missing::Error) => {
                    let name = rule.item.as_ref().or(rule.body.as_ref()).unwrap_or(field);
                    return Err(TemplateError {
                        pointer: format!("{at}/{name}"),
                        detail: "is missing".to_owned(),
                    });
                }
            }
        }
        Ok(input)
    }
}

/// MISSION A1: input `{text, audio_prompt_url, n_candidates: 3, whisper_threshold: 85}`; the chunk's voice wins.
fn tts_input() -> BTreeMap<String, FieldRule> {
    let constant = |value: i64| FieldRule { constant: Some(Value::from(value)), ..FieldRule::default() };
    BTreeMap::from([
        ("text".to_owned(), FieldRule { item: Some("text".to_owned()), ..FieldRule::default() }),
        (
            "audio_prompt_url".to_owned(),
            FieldRule {
                item: Some("voice_url".to_owned()),
                body: Some("voice_url".to_owned()),
                missing: Missing::Null,
                ..FieldRule::default()
            },
        ),
        ("n_candidates".to_owned(), constant(3)),
        ("whisper_threshold".to_owned(), constant(85)),
    ])
}
