//! One Prometheus recorder per process.
//!
//! Record with the macros of the crate `metrics` anywhere; what is recorded before [`install`] is dropped.

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::sync::OnceLock;
use std::time::Duration;

static HANDLE: OnceLock<Option<PrometheusHandle>> = OnceLock::new();

/// Seconds, from half a millisecond (a job on an idle machine) to ten minutes (a long inference).
const SECONDS: [f64; 18] = [
    0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0,
    180.0, 600.0,
];
/// Rows or messages in one commit or batch.
const SIZES: [f64; 12] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0];

/// How often samples of histograms are folded into their buckets when nobody scrapes: their memory stays bounded.
const UPKEEP: Duration = Duration::from_secs(5);

/// Installs the recorder. Further calls do nothing. Histograms named `*_seconds` and `*_size` get fixed buckets.
pub fn install() {
    HANDLE.get_or_init(|| {
        let built = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
            .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_size".to_owned()), &SIZES))
            .and_then(|builder| builder.install_recorder());
        match built {
            Ok(handle) => {
                spawn_upkeep(handle.clone());
                Some(handle)
            }
            Err(error) => {
                tracing::error!(%error, "metrics are off: the recorder cannot be installed");
                None
            }
        }
    });
}

fn spawn_upkeep(handle: PrometheusHandle) {
    let spawned = std::thread::Builder::new().name("metrics-upkeep".to_owned()).spawn(move || {
        loop {
            std::thread::sleep(UPKEEP);
            handle.run_upkeep();
        }
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "metrics are folded only when scraped: no thread for the upkeep");
    }
}

/// All metrics in Prometheus' text format; empty before [`install`].
#[must_use]
pub fn render() -> String {
    HANDLE.get().and_then(Option::as_ref).map(PrometheusHandle::render).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_recorded_is_rendered() {
        super::install();
        super::install();
        ::metrics::counter!("test_jobs_total", "status" => "COMPLETED").increment(3);
        ::metrics::histogram!("test_wait_seconds").record(0.003);
        let text = super::render();
        assert!(text.contains("test_jobs_total{status=\"COMPLETED\"} 3"), "{text}");
        assert!(text.contains("test_wait_seconds_bucket{le=\"0.004\"} 1"), "{text}");
        assert!(text.contains("test_wait_seconds_bucket{le=\"0.002\"} 0"), "{text}");
    }
}
