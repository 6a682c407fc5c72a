//! A strict reading of the JSON schemas of the event catalogue: of what JSON Schema can say, the part that they use.
//!
//! Stricter than the standard where a catalogue should be complete: a field that the schema does not name is a
//! fault, unless the schema names none at all.

use serde_json::Value;

/// Keywords that are read or only describe. Anything else is a fault of the schema: it would be ignored silently.
const KNOWN: &[&str] = &[
    "$schema",
    "title",
    "description",
    "type",
    "required",
    "properties",
    "items",
    "enum",
    "const",
    "format",
    "minimum",
];

/// What of `value` does not fit `schema`, each with its place.
#[must_use]
pub fn faults(schema: &Value, value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    check(schema, value, "", &mut found);
    found
}

fn check(schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
    let Some(rules) = schema.as_object() else {
        found.push(format!("{at}: the schema is no object"));
        return;
    };
    for keyword in rules.keys().filter(|k| !KNOWN.contains(&k.as_str())) {
        found.push(format!("{at}: the checker does not know the keyword {keyword}"));
    }
    if let Some(types) = rules.get("type") {
        let allowed: Vec<&str> = match types {
            Value::String(one) => vec![one],
            Value::Array(many) => many.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        if !allowed.iter().any(|t| is_of(t, value)) {
            found.push(format!("{at}: {value} is not of type {types}"));
        }
    }
    if rules.get("const").is_some_and(|wanted| wanted != value) {
        found.push(format!("{at}: {value} is not {}", rules["const"]));
    }
    if rules.get("enum").and_then(Value::as_array).is_some_and(|all| !all.contains(value)) {
        found.push(format!("{at}: {value} is none of {}", rules["enum"]));
    }
    if let (Some(least), Some(n)) = (rules.get("minimum").and_then(Value::as_f64), value.as_f64())
        && n < least
    {
        found.push(format!("{at}: {n} is below {least}"));
    }
    if let (Some("date-time"), Some(text)) = (rules.get("format").and_then(Value::as_str), value.as_str())
        && !is_time(text)
    {
        found.push(format!("{at}: {text} is no date-time"));
    }
    if let (Some(items), Some(list)) = (rules.get("items"), value.as_array()) {
        for (n, item) in list.iter().enumerate() {
            check(items, item, &format!("{at}/{n}"), found);
        }
    }
    if let Some(object) = value.as_object() {
        for name in rules.get("required").and_then(Value::as_array).into_iter().flatten() {
            if name.as_str().is_none_or(|name| !object.contains_key(name)) {
                found.push(format!("{at}: {name} is missing"));
            }
        }
        if let Some(properties) = rules.get("properties").and_then(Value::as_object) {
            for (name, inner) in object {
                match properties.get(name) {
                    Some(schema) => check(schema, inner, &format!("{at}/{name}"), found),
                    None => found.push(format!("{at}: the schema does not name {name}")),
                }
            }
        }
    }
}

fn is_of(name: &str, value: &Value) -> bool {
    match name {
        "string" => value.is_string(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}

/// `2026-11-21T12:00:00.000Z`: what we write.
fn is_time(text: &str) -> bool {
    text.len() == 24
        && text.bytes().zip("dddd-dd-ddTdd:dd:dd.dddZ".bytes()).all(|(found, wanted)| match wanted {
            b'd' => found.is_ascii_digit(),
            other => found == other,
        })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_rule_can_fail() {
        let schema = json!({"type": "object", "required": ["a"], "properties": {
            "a": {"type": ["integer", "null"], "minimum": 1}, "t": {"type": "string", "format": "date-time"},
            "e": {"enum": ["x"]}, "c": {"const": 1}, "l": {"type": "array", "items": {"type": "string"}}}});
        let good = json!({"a": null, "t": "2026-11-21T12:00:00.000Z", "e": "x", "c": 1, "l": ["s"]});
        assert_eq!(faults(&schema, &good), Vec::<String>::new());
        for bad in [
            json!({}),
            json!({"a": "1"}),
            json!({"a": 0}),
            json!({"a": 1, "t": "today"}),
            json!({"a": 1, "e": "y"}),
            json!({"a": 1, "c": 2}),
            json!({"a": 1, "l": [1]}),
            json!({"a": 1, "more": 1}),
            json!([]),
        ] {
            assert_eq!(faults(&schema, &bad).len(), 1, "{bad}");
        }
        assert_eq!(faults(&json!({"pattern": "x"}), &json!(1)).len(), 1);
    }
}
