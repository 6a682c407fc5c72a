//! The product as a document for people.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{cells::cell, product};

const HEAD: &str = "# Job state table

What each event does to a job in each situation, computed from `ringback_domain::job::apply` and checked against a
table written by hand (`crates/domain/tests/table/rules.txt`). This file is generated:
`UPDATE_DOCS=1 cargo test -p ringback-domain --test job_table` rewrites it, and a test fails when it is out of step.

A cell names the next state and what follows from the transition. Deliveries are left out: each transition owes one to
every target that wants the state (P4). `same`: a repetition of what is known. `renewed`: the state stays, its lease or
its message number is new. `no: …`: the event changes nothing, and why.

| word | meaning |
|---|---|
| `result` | the immutable result row of the run is written |
| `count` | the first end of the job counts in its batch |
| `close(n reason)` | attempt n goes to the history |
| `stop(n reason)` | the worker of attempt n is told to stop |
| `publish(n)`, `publish(n ask)` | message n of the run is sent; with `ask` its holder needs a grant before it runs it |
| `drop(n)` | message n is void and is deleted from the work queue |
";

/// The whole document.
pub(crate) fn document() -> String {
    let situations = product::situations();
    let mut text = HEAD.to_owned();
    section(&mut text, "Situations", situations.iter().map(|s| (s.name, s.about)));
    section(&mut text, "Variants of events", product::VARIANTS.iter().copied());
    let names: Vec<&str> = situations.iter().map(|s| s.name).collect();
    let mut events: Vec<&str> = Vec::new();
    let mut rows: BTreeMap<&str, Vec<(&str, Vec<String>)>> = BTreeMap::new();
    for (n, s) in situations.iter().enumerate() {
        for c in product::cases(&s.job) {
            if !events.contains(&c.event) {
                events.push(c.event);
            }
            let of_event = rows.entry(c.event).or_default();
            if n == 0 {
                of_event.push((c.variant, Vec::new()));
            }
            if let Some((_, cells)) = of_event.iter_mut().find(|(v, _)| *v == c.variant) {
                cells.push(cell(&s.job, &c));
            }
        }
    }
    for event in events {
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "\n## {event}\n\n| | {} |\n|---|{}\n",
            names.join(" | "),
            "---|".repeat(names.len())
        );
        for (variant, cells) in &rows[event] {
            let _ = writeln!(text, "| {variant} | {} |", cells.join(" | "));
        }
    }
    text
}

fn section<'a>(text: &mut String, title: &str, rows: impl Iterator<Item = (&'a str, &'a str)>) {
    let _ = write!(text, "\n## {title}\n\n| name | meaning |\n|---|---|\n");
    for (name, about) in rows {
        let _ = writeln!(text, "| `{name}` | {about} |");
    }
}
