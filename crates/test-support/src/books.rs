//! The books: what was accepted, what ended, what was owed, what arrived.
//!
//! This is the test's own count, made from the outside: from submits it made, from POSTs it received, and from rows.
//! It checks P1 (every accepted job is there), P2 (one ending), P4 (one id and one body per delivery) and P5.

use crate::receiver::Hit;
use crate::stack::Stack;
use crate::wait::until;
use futures::{StreamExt as _, stream};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A job that was accepted, and the paths of the receiver that must hear of it.
#[derive(Debug, Clone)]
pub struct Accepted {
    /// Its id as the API gave it.
    pub id: String,
    /// Its endpoint.
    pub endpoint: String,
    /// Whether its `webhook` is the receiver: terminal states only.
    pub webhook: bool,
    /// Whether its `webhookv2` is the receiver: every transition.
    pub webhookv2: bool,
}

/// Jobs whose rows are read at the same time.
const READS_AT_ONCE: usize = 8;

/// Waits until every accepted job has ended and nothing is pending, then checks all books. Gives the jobs.
pub async fn assert_books_balance(stack: &Stack, accepted: &[Accepted], within: Duration) -> Vec<Value> {
    let rows: Vec<(Value, Vec<Value>)> = stream::iter(accepted)
        .map(|job| async move {
            stack.api.wait_end(&job.endpoint, &job.id, within).await;
            stack.api.wait_settled(&job.id, within).await;
            (stack.api.job(&job.id).await, stack.api.deliveries(&job.id).await)
        })
        .buffered(READS_AT_ONCE)
        .collect()
        .await;
    let hits = stack.receiver.hits();
    let mut owed_ids = BTreeSet::new();
    for (job, (row, deliveries)) in accepted.iter().zip(&rows) {
        check_job(job, row, deliveries, &hits, &mut owed_ids);
    }
    check_nothing_else(accepted, &hits, &owed_ids);
    assert_identity(stack, within).await;
    rows.into_iter().map(|(row, _)| row).collect()
}

fn check_job(
    job: &Accepted,
    row: &Value,
    deliveries: &[Value],
    hits: &[Hit],
    owed_ids: &mut BTreeSet<String>,
) {
    let history = row["history"].as_array().unwrap_or_else(|| panic!("no history: {row}"));
    let ends: BTreeMap<u64, usize> =
        history.iter().filter(|entry| is_end(entry)).fold(BTreeMap::new(), |mut ends, entry| {
            *ends.entry(entry["run"].as_u64().expect("a run")).or_default() += 1;
            ends
        });
    assert!(ends.values().all(|count| *count == 1), "P2: a run ended more than once: {row}");
    assert_eq!(Some(ends.len() as u64), row["run"].as_u64(), "P2: a run without an end: {row}");
    // What is owed, counted from transitions × targets.
    let owed = history
        .iter()
        .map(|entry| usize::from(job.webhookv2) + usize::from(job.webhook && is_end(entry)))
        .sum::<usize>();
    assert_eq!(owed, deliveries.len(), "P5: owed and recorded deliveries of {row} differ: {deliveries:?}");
    for delivery in deliveries {
        let told = history.iter().find(|entry| entry["seq"] == delivery["seq"]);
        let told = told.unwrap_or_else(|| panic!("P4: a delivery of no transition of {row}: {delivery}"));
        let id = check_delivery(delivery, told, hits);
        assert!(owed_ids.insert(id.to_owned()), "P4: two deliveries have the id {id}");
    }
    let last = history.last().expect("a history");
    assert_eq!(last["status"], row["status"], "history and state differ: {row}");
    if job.webhook || job.webhookv2 {
        let told = deliveries.iter().any(|d| d["seq"] == last["seq"] && d["state"] == "delivered");
        assert!(told, "the end of {} was not delivered: {deliveries:?}", job.id);
    }
}

/// One delivery against the POSTs with its id: it arrived, at its target, with one body, and told its transition.
fn check_delivery<'a>(delivery: &'a Value, transition: &Value, hits: &[Hit]) -> &'a str {
    let id = delivery["id"].as_str().expect("an id");
    let mine: Vec<&Hit> = hits.iter().filter(|hit| hit.webhook_id == id).collect();
    let taken = mine.iter().filter(|hit| (200..300).contains(&hit.answered)).count();
    match delivery["state"].as_str().expect("a state") {
        "delivered" => assert!(taken >= 1, "P4: {id} is recorded as delivered and never arrived"),
        // A terminal delivery is never passed over; one of these would be a lost webhook.
        state @ ("superseded" | "cancelled" | "dead") => {
            assert!(!is_end(transition), "{id} tells an end and is {state}: {delivery}");
        }
        other => panic!("{id} is {other} after everything settled"),
    }
    for hit in &mine {
        assert_eq!(hit.body, mine[0].body, "P4: {id} came with different bodies");
        assert_eq!(hit.signature, Ok(()), "signature of {id}");
        assert_eq!(Some(hit.sequence), transition["seq"].as_u64(), "sequence of {id}");
        assert_eq!(hit.status(), transition["status"], "what {id} tells");
        let url = delivery["url"].as_str().expect("a URL");
        assert!(url.ends_with(&hit.path), "{id} is for {url} and went to {}", hit.path);
    }
    id
}

fn is_end(entry: &Value) -> bool {
    crate::client::TERMINAL.contains(&entry["status"].as_str().unwrap_or_default())
}

/// Nothing arrived that is not owed.
fn check_nothing_else(accepted: &[Accepted], hits: &[Hit], owed_ids: &BTreeSet<String>) {
    let known: BTreeSet<&str> = accepted.iter().map(|job| job.id.as_str()).collect();
    for hit in hits.iter().filter(|hit| known.contains(hit.job())) {
        assert!(
            owed_ids.contains(&hit.webhook_id),
            "{} arrived and is not owed: {:?}",
            hit.webhook_id,
            hit.json
        );
    }
}

/// P5 over the whole database: owed (counted on jobs and batches) equals the rows of deliveries, purged ones included.
pub async fn assert_identity(stack: &Stack, within: Duration) {
    let sql = stack.sql().await;
    until("P5 to hold in SQL", within, || async {
        let owed = sql
            .count(
                "SELECT CAST((SELECT COALESCE(SUM(owed), 0) FROM jobs) + (SELECT COALESCE(SUM(owed), 0) FROM batches) \
                 + (SELECT COALESCE(SUM(owed), 0) FROM events) \
                 + (SELECT COALESCE(SUM(owed), 0) FROM purged_totals) AS BIGINT)",
            )
            .await;
        let recorded = sql
            .count(
                "SELECT CAST((SELECT COUNT(*) FROM deliveries) \
                 + (SELECT COALESCE(SUM(deliveries), 0) FROM purged_totals) AS BIGINT)",
            )
            .await;
        (owed == recorded).then_some(())
    })
    .await;
    let ended_twice =
        sql.count("SELECT COUNT(*) FROM results r JOIN jobs j ON j.id = r.job_id WHERE r.run > j.run").await;
    assert_eq!(ended_twice, 0, "P2: results of runs that do not exist");
    let endless = sql
        .count(
            "SELECT COUNT(*) FROM jobs j WHERE j.state >= 2 \
             AND NOT EXISTS (SELECT 1 FROM results r WHERE r.job_id = j.id AND r.run = j.run)",
        )
        .await;
    assert_eq!(endless, 0, "ended jobs without a result row");
    assert_eq!(sql.count("SELECT COUNT(*) FROM quarantine").await, 0, "quarantined messages");
}
