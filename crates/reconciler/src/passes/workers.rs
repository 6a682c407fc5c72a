//! Rows of workers that were not heard of for long. Their jobs are judged by their leases, not by these rows.

use ringback_store::{
    Urgency,
    workers::{forget_workers, living_workers},
};
use serde::Serialize;

use crate::context::{Context, PassError};

/// A silent worker stays in the lists for this long.
const REMEMBER_MS: u64 = 3_600_000;

/// What the pass found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Workers heard of within a lease.
    pub living: u64,
    /// Rows removed.
    pub forgotten: u64,
}

pub(crate) async fn run(context: &Context) -> Result<Report, PassError> {
    let now_ms = context.store.now_ms().await?;
    let since_ms = now_ms.saturating_sub_unsigned(context.lease_ms);
    let living = living_workers(context.store.read(), since_ms).await?;
    let before_ms = now_ms.saturating_sub_unsigned(REMEMBER_MS.max(context.lease_ms));
    let forgotten =
        context.store.write(Urgency::Lazy, move |tx| Box::pin(forget_workers(tx, before_ms))).await?;
    metrics::gauge!("ringback_workers_living").set(living as f64);
    Ok(Report { living, forgotten })
}
