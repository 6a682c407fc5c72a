//! The full product of states and events against a second, hand-written table (`table/rules.txt`), and its
//! rendering in docs/job-state-table.md.
//!
//! `UPDATE_DOCS=1 cargo test -p ringback-domain --test job_table` rewrites the document.
#![allow(clippy::unwrap_used, reason = "a failed step of a test is its report")]

mod table {
    pub(crate) mod cells;
    pub(crate) mod product;
    pub(crate) mod render;
    pub(crate) mod rules;
}

use std::collections::BTreeSet;

use ringback_domain::job::EventKind;
use table::{cells::cell, product, render, rules};

#[test]
fn every_event_in_every_state_does_what_the_hand_written_table_says() {
    let rules = rules::read();
    let mut used = BTreeSet::new();
    let mut wrong = Vec::new();
    for s in product::situations() {
        for c in product::cases(&s.job) {
            let got = cell(&s.job, &c);
            let hits: Vec<(usize, &rules::Rule)> =
                rules.iter().enumerate().filter(|(_, r)| r.matches(c.event, c.variant, s.name)).collect();
            match hits.as_slice() {
                [(n, rule)] => {
                    used.insert(*n);
                    if rule.what != got {
                        wrong.push(format!(
                            "{} {} in {}: table `{}`, code `{got}`",
                            c.event, c.variant, s.name, rule.what
                        ));
                    }
                }
                [] => wrong.push(format!("{} {} in {}: no rule; code `{got}`", c.event, c.variant, s.name)),
                many => wrong.push(format!(
                    "{} {} in {}: {} rules, lines {:?}",
                    c.event,
                    c.variant,
                    s.name,
                    many.len(),
                    many.iter().map(|(_, r)| r.line).collect::<Vec<_>>()
                )),
            }
        }
    }
    for (n, rule) in rules.iter().enumerate() {
        if !used.contains(&n) {
            wrong.push(format!("line {}: a rule for nothing", rule.line));
        }
    }
    assert!(wrong.is_empty(), "{} points differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn the_product_has_every_kind_of_event_and_every_state() {
    let situations = product::situations();
    let states: BTreeSet<_> = situations.iter().map(|s| s.job.status()).collect();
    assert_eq!(states.len(), 6);
    for s in &situations {
        let kinds: BTreeSet<EventKind> = product::cases(&s.job).iter().map(|c| c.what.kind()).collect();
        assert_eq!(kinds, EventKind::ALL.into_iter().collect::<BTreeSet<_>>(), "{}", s.name);
    }
}

#[test]
fn the_document_is_in_step_with_the_code() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/job-state-table.md");
    let text = render::document();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    let stored = std::fs::read_to_string(path).unwrap_or_default();
    assert!(stored == text, "docs/job-state-table.md is out of step: run this test with UPDATE_DOCS=1");
}
