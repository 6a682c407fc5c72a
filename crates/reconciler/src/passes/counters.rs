//! Counters: the rows of former processes are folded into one, so that reading them stays cheap.

use ringback_store::{Urgency, due::scattered_counters, fold_counters};
use serde::Serialize;

use crate::context::{Context, PassError};

/// Rows per endpoint that are left alone: living processes have one each.
const LEAVE_ROWS: u32 = 8;

/// What the pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Rows folded.
    pub folded: u64,
}

pub(crate) async fn run(context: &Context) -> Result<Report, PassError> {
    let mut report = Report::default();
    for endpoint in scattered_counters(context.store.read(), LEAVE_ROWS).await? {
        report.folded +=
            context.store.write(Urgency::Lazy, move |tx| Box::pin(fold_counters(tx, endpoint))).await?;
    }
    Ok(report)
}
