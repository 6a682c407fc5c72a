//! P5: what is owed equals what was delivered, is pending, dead, superseded or cancelled, and what was purged.
//!
//! The pass walks through time in windows of ids, from the oldest to a moment ago, and begins again. Each window is
//! one statement, so a window balances at any moment, closed or not; those that do not are named.

use ringback_store::books::{Books, Window, books_of, offenders, oldest_from_ms, purged_totals};
use serde::Serialize;
use uuid::Uuid;

use crate::context::{Context, PassError};

/// Length of a window.
const WINDOW_MS: u64 = 60_000;
/// Deliveries and jobs looked at in one pass; the next one goes on.
const BUDGET: i64 = 50_000;
/// Offenders named in one pass.
const NAMED: u32 = 20;
/// Ids of this last stretch are left to the next pass: clocks of several hosts make them.
const LEAVE_MS: u64 = 2_000;

/// What the pass found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Windows compared.
    pub windows: u64,
    /// Owed according to jobs and batches, in these windows.
    pub owed: i64,
    /// Deliveries that exist, in these windows.
    pub deliveries: i64,
    /// Jobs and batches whose two sides differ: id, owed (none where the row is gone), deliveries.
    pub offenders: Vec<(Uuid, Option<i64>, i64)>,
    /// Whether the pass reached the present.
    pub complete: bool,
}

/// Where the walk is, and the sums of the walk so far.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    next_ms: u64,
    sums: Books,
    unbalanced: u64,
}

pub(crate) async fn run(context: &Context, memory: &mut Memory) -> Result<Report, PassError> {
    let mut report = Report::default();
    let now_ms = u64::try_from(context.store.now_ms().await?).unwrap_or(0);
    let until_ms = now_ms.saturating_sub(LEAVE_MS);
    let mut budget = BUDGET;
    while budget > 0 {
        let oldest = oldest_from_ms(context.store.read(), memory.next_ms).await?;
        let Some(from_ms) = oldest.filter(|ms| *ms < until_ms) else {
            complete(context, memory).await?;
            report.complete = true;
            break;
        };
        let window = Window { from_ms, to_ms: (from_ms + WINDOW_MS).min(until_ms) };
        let books = books_of(context.store.read(), window).await?;
        if !books.balance() {
            memory.unbalanced += 1;
            for o in offenders(context.store.read(), window, NAMED).await? {
                tracing::error!(
                    owner = %o.owner, owed = ?o.owed, deliveries = o.deliveries,
                    "P5 is broken: what is owed and what exists differ"
                );
                report.offenders.push((o.owner, o.owed, o.deliveries));
            }
        }
        memory.sums.add(&books);
        report.windows += 1;
        report.owed += books.owed;
        report.deliveries += books.deliveries();
        budget -= books.deliveries().max(1_000);
        memory.next_ms = window.to_ms;
        tokio::task::yield_now().await;
    }
    Ok(report)
}

/// Publishes the sums of a walk that reached the present, and begins again.
async fn complete(context: &Context, memory: &mut Memory) -> Result<(), PassError> {
    let (purged_owed, purged_deliveries) = purged_totals(context.store.read()).await?;
    let sums = std::mem::take(memory);
    let owed = sums.sums.owed + purged_owed;
    let accounted = sums.sums.deliveries() + purged_deliveries;
    metrics::gauge!("ringback_p5_owed").set(owed as f64);
    metrics::gauge!("ringback_p5_accounted").set(accounted as f64);
    metrics::gauge!("ringback_p5_unbalanced_windows").set(sums.unbalanced as f64);
    for (state, n) in
        ["pending", "delivered", "dead", "superseded", "cancelled"].iter().zip(sums.sums.by_state)
    {
        metrics::gauge!("ringback_deliveries", "state" => *state).set(n as f64);
    }
    metrics::gauge!("ringback_deliveries", "state" => "purged").set(purged_deliveries as f64);
    if purged_owed != purged_deliveries {
        tracing::error!(
            purged_owed,
            purged_deliveries,
            "P5 is broken: retention removed something else than was owed"
        );
    }
    Ok(())
}
