//! Deliveries that nobody sends: partitions without an owner are an alarm, owners that may have missed some are told
//! to read them again.

use ringback_store::due::owing_partitions;
use serde::Serialize;

use crate::context::{Context, PassError};

/// A due delivery is left to its dispatcher for this long; after that it is worth an alarm or a reminder.
const LEAVE_MS: u64 = 15_000;

/// What the pass found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Partitions that owe something and have no owner.
    pub unowned: u64,
    /// Partitions whose owner was told to read them again.
    pub reminded: u64,
    /// Age of the oldest due delivery, in milliseconds.
    pub oldest_due_ms: u64,
}

pub(crate) async fn run(context: &Context) -> Result<Report, PassError> {
    let mut report = Report::default();
    let now_ms = context.store.now_ms().await?;
    let partitions = context.store.facts().partitions;
    let due_before_ms = now_ms.saturating_sub_unsigned(LEAVE_MS);
    for owing in owing_partitions(context.store.read(), partitions, now_ms, due_before_ms).await? {
        let age_ms = now_ms.abs_diff(owing.oldest_due_ms);
        report.oldest_due_ms = report.oldest_due_ms.max(age_ms);
        if owing.owned {
            report.reminded += 1;
        } else {
            report.unowned += 1;
            tracing::error!(
                partition = owing.partition,
                age_ms,
                "webhooks are due and no dispatcher owns their partition: is a webhook-dispatcher running?"
            );
        }
        // A dispatcher that takes the partition meanwhile hears it as well.
        context.poke(owing.partition).await;
    }
    metrics::gauge!("ringback_delivery_partitions_unowned").set(report.unowned as f64);
    metrics::gauge!("ringback_delivery_oldest_due_seconds").set(report.oldest_due_ms as f64 / 1_000.0);
    Ok(report)
}
