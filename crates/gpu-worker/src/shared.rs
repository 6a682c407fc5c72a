//! What the parts of a worker share.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ringback_bus::Bus;
use ringback_contracts::{attempt_of, v1};
use ringback_domain::EndpointId;
use ringback_service_runtime::blobs::BlobStore;
use tokio::sync::mpsc;

use crate::artifacts::Waits;
use crate::attempts::Attempts;
use crate::chunks::Item;
use crate::executor::JobKey;
use crate::message::Streams;
use crate::outcome::Outcomes;

/// Times of a worker.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) request_timeout: Duration,
    pub(crate) started_report: Duration,
    pub(crate) extend_every: Duration,
    pub(crate) ack_wait: Duration,
    pub(crate) drain_grace: Duration,
}

/// What others see of an endpoint's loop.
#[derive(Debug)]
pub(crate) struct EndpointLink {
    pub(crate) id: EndpointId,
    pub(crate) stops: mpsc::UnboundedSender<JobKey>,
    pub(crate) total: usize,
    pub(crate) busy: AtomicUsize,
    pub(crate) trouble: Mutex<String>,
}

/// Shared by all loops of a worker.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) bus: Bus,
    pub(crate) blobs: BlobStore,
    pub(crate) streams: Arc<Streams>,
    pub(crate) attempts: Attempts,
    pub(crate) outcomes: Outcomes,
    pub(crate) chunks: mpsc::UnboundedSender<Item>,
    pub(crate) reports: mpsc::UnboundedSender<(Instant, JobKey)>,
    pub(crate) endpoints: Vec<EndpointLink>,
    pub(crate) worker_id: String,
    pub(crate) device: String,
    pub(crate) settings: Settings,
    pub(crate) ids_file: PathBuf,
    pub(crate) draining: AtomicBool,
    /// Artefacts whose receivers are waited for.
    pub(crate) artifact_waits: Waits,
}

impl Shared {
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Passes stop orders to the loops of their endpoints. Orders for unknown attempts have been obeyed.
    pub(crate) fn stop_all(&self, orders: &[v1::StopOrder]) {
        for order in orders {
            let Ok((job, attempt)) = attempt_of(order.attempt.as_ref()) else { continue };
            let key = JobKey { job, attempt };
            let endpoint = self.attempts.with(&key, |held| {
                held.stop_reason.get_or_insert_with(|| order.reason.clone());
                held.endpoint
            });
            if let Some(link) = endpoint.and_then(|index| self.endpoints.get(index)) {
                tracing::info!(job_id = %job, reason = order.reason, "ordered to stop");
                // A loop that has ended has stopped everything.
                let _ = link.stops.send(key);
            }
        }
    }

    /// Has the attempt reported after `delay` if it still runs then.
    pub(crate) fn report_after(&self, key: JobKey, delay: Duration) {
        let _ = self.reports.send((Instant::now() + delay, key));
    }

    pub(crate) fn slots(&self) -> Vec<v1::WorkerSlots> {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        self.endpoints
            .iter()
            .map(|link| v1::WorkerSlots {
                endpoint_id: link.id.0,
                total: count(link.total),
                busy: count(link.busy.load(Ordering::Relaxed)),
                unavailable: link.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            })
            .collect()
    }

    /// The tracker knows that this worker stands for its former ids.
    pub(crate) fn forget_former_ids(&self) {
        if let Err(error) = std::fs::write(&self.ids_file, format!("{}\n", self.worker_id)) {
            // They are told again after the next start, which does no harm.
            tracing::warn!(%error, file = %self.ids_file.display(), "cannot shorten the list of worker ids");
        }
    }
}
