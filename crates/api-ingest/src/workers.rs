//! Workers as the state-tracker keeps them.

use ringback_domain::EndpointId;
use ringback_store::views::{WorkerView, list_workers};
use serde::Deserialize;

use crate::{error::ApiError, state::Api};

/// One entry of `workers.slots`, as the state-tracker writes it.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Slots {
    pub(crate) endpoint_id: i64,
    #[serde(default)]
    pub(crate) total: u32,
    #[serde(default)]
    pub(crate) busy: u32,
    /// Why no slot takes jobs; empty if they do.
    #[serde(default)]
    pub(crate) unavailable: String,
}

/// A worker with its slots read.
pub(crate) struct Worker {
    pub(crate) row: WorkerView,
    pub(crate) slots: Vec<Slots>,
}

/// RunPod's counts of an endpoint's workers.
#[derive(Debug, Default)]
pub(crate) struct WorkerCounts {
    pub(crate) idle: u32,
    pub(crate) running: u32,
    pub(crate) initializing: u32,
    pub(crate) unhealthy: u32,
}

/// Workers that were heard of lately.
pub(crate) async fn live_workers(api: &Api) -> Result<Vec<Worker>, ApiError> {
    let now = api.store.now_ms().await?;
    let since = now.saturating_sub_unsigned(api.worker_silence_ms);
    let rows = list_workers(api.store.read(), since).await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let slots = serde_json::from_str(&row.slots).unwrap_or_else(|error| {
                tracing::warn!(worker = row.id, %error, "the slots of a worker cannot be read");
                Vec::new()
            });
            Worker { row, slots }
        })
        .collect())
}

/// Counts the workers that serve an endpoint.
pub(crate) async fn worker_counts(api: &Api, endpoint: EndpointId) -> Result<WorkerCounts, ApiError> {
    let mut counts = WorkerCounts::default();
    for worker in live_workers(api).await? {
        for slots in worker.slots.iter().filter(|s| s.endpoint_id == endpoint.0) {
            if slots.busy > 0 {
                counts.running += 1;
            } else if slots.unavailable == "starting" {
                counts.initializing += 1;
            } else if !slots.unavailable.is_empty() {
                counts.unhealthy += 1;
            } else if !worker.row.draining {
                counts.idle += 1;
            }
        }
    }
    Ok(counts)
}
