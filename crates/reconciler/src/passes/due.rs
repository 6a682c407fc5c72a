//! Live jobs whose time came: time to live, lease, execution limit. The tracker judges each again in its commit.

use bytes::Bytes;
use ringback_contracts::v1;
use ringback_store::due::{DueJob, due_jobs};
use serde::Serialize;

use crate::context::{Context, PassError};

/// What the pass found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Jobs that were due.
    pub due: u64,
    /// Running jobs left alone because this observer has not seen their whole lease.
    pub not_judged: u64,
    /// Jobs whose state changed.
    pub changed: u64,
}

pub(crate) async fn run(context: &Context) -> Result<Report, PassError> {
    let mut report = Report::default();
    let now_ms = context.store.now_ms().await?;
    let mut after: Option<DueJob> = None;
    loop {
        let page = due_jobs(context.store.read(), now_ms, after, context.chunk()).await?;
        after = page.last().copied();
        let last = page.len() < context.chunk() as usize;
        // Each judges for itself: this observer may have been cut off while the tracker was not.
        let steady = context.observer.is_steady();
        let job_ids: Vec<Bytes> = page
            .iter()
            .filter(|job| steady || !job.running)
            .map(|job| Bytes::copy_from_slice(job.id.as_bytes()))
            .collect();
        report.due += page.len() as u64;
        report.not_judged += (page.len() - job_ids.len()) as u64;
        if !job_ids.is_empty() {
            let due = v1::command::Command::CheckDue(v1::CheckDue { job_ids });
            report.changed += u64::from(context.command(due).await?.changed);
        }
        if last {
            return Ok(report);
        }
    }
}
