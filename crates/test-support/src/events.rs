//! The events that came in, held against the catalogue that the API publishes.

use crate::schema::faults;
use crate::stack::Stack;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Checks the body of each typed event that the stack's receiver has got so far. Gives their types.
pub async fn assert_events_fit(stack: &Stack) -> BTreeSet<String> {
    let published = stack.api.get("/v1/webhooks/event-types").await.expect(200);
    let schemas: BTreeMap<&str, &Value> = published["event_types"]
        .as_array()
        .expect("a list of types")
        .iter()
        .map(|entry| (entry["type"].as_str().expect("a name"), &entry["schema"]))
        .collect();
    let mut seen = BTreeSet::new();
    // Bodies in the formats of others have no version.
    for hit in stack.receiver.hits().iter().filter(|hit| hit.json.get("api_version").is_some()) {
        let name = hit.json["type"].as_str().unwrap_or_default();
        let schema = schemas.get(name).unwrap_or_else(|| panic!("no type is called {name}: {}", hit.json));
        assert_eq!(faults(schema, &hit.json), [""; 0], "{name}: {:#}", hit.json);
        seen.insert(name.to_owned());
    }
    seen
}
