//! Logs and traces of a process.

use crate::config::{LogFormat, TelemetryConfig};
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};
use std::io::IsTerminal;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use tracing::Subscriber;
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::filter::{EnvFilter, FilterFn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// Why telemetry cannot start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter cannot be read.
    #[error("telemetry.log_level or RUST_LOG: {0}")]
    Filter(String),
    /// The exporter cannot be built.
    #[error("telemetry.otlp_endpoint: {0}")]
    Exporter(String),
}

/// Flushes spans when the process ends. Keep it until the end of `main`.
#[derive(Debug)]
#[must_use = "dropping the guard ends the export of spans"]
pub struct TelemetryGuard {
    provider: Option<SdkTracerProvider>,
}

impl Drop for TelemetryGuard {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take()
            && let Err(error) = provider.shutdown()
        {
            tracing::warn!(%error, "some spans were not exported");
        }
    }
}

static INITIALISED: OnceLock<()> = OnceLock::new();
static EXPORTING: AtomicBool = AtomicBool::new(false);

/// Whether [`init`] was given a collector. Without one, a span that no log line is written in serves nobody.
#[must_use]
pub fn is_exporting() -> bool {
    EXPORTING.load(Relaxed)
}

/// Installs logs (stderr) and traces for the process. The first call wins; a later one changes nothing and returns
/// an empty guard, so that tests and the all-in-one may call it freely. With OTLP it must run inside a tokio runtime.
///
/// Without a collector spans get no ids: a caller's `traceparent` is handed on as it is, and jobs without one get a new
/// one (see [`crate::trace_context`]).
///
/// # Errors
/// [`TelemetryError`].
pub fn init(service_name: &str, config: &TelemetryConfig) -> Result<TelemetryGuard, TelemetryError> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => text,
        _ => config.log_level.clone(),
    };
    let filter: EnvFilter = filter.parse().map_err(|error| TelemetryError::Filter(format!("{error}")))?;
    let (layer, provider) = match &config.otlp_endpoint {
        None => (None, None),
        Some(endpoint) => {
            let (layer, provider) = exporting_layer(service_name, endpoint, config.sampling_ratio)?;
            (Some(layer), Some(provider))
        }
    };
    if INITIALISED.set(()).is_err() {
        return Ok(TelemetryGuard { provider: None });
    }
    let json = match config.log_format {
        LogFormat::Json => true,
        LogFormat::Pretty => false,
        LogFormat::Auto => !std::io::stderr().is_terminal(),
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = if json {
        lines.json().flatten_event(true).with_span_list(false).with_filter(filter).boxed()
    } else {
        lines.with_ansi(std::io::stderr().is_terminal()).with_filter(filter).boxed()
    };
    EXPORTING.store(provider.is_some(), Relaxed);
    // Err means that the program has its own subscriber (a test): logs go there.
    let _ = tracing_subscriber::registry().with(lines).with(layer).try_init();
    Ok(TelemetryGuard { provider })
}

/// A layer that gives every span ids and exports nothing.
#[cfg(test)]
pub(crate) fn propagation_layer<S>(ratio: f64) -> (BoxedLayer<S>, SdkTracerProvider)
where
    S: Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
{
    let provider = SdkTracerProvider::builder().with_sampler(sampler(ratio)).build();
    (otel_layer(&provider), provider)
}

pub(crate) type BoxedLayer<S> = Box<dyn Layer<S> + Send + Sync + 'static>;

fn exporting_layer<S>(
    service_name: &str,
    endpoint: &str,
    ratio: f64,
) -> Result<(BoxedLayer<S>, SdkTracerProvider), TelemetryError>
where
    S: Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
{
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()
        .map_err(|error| TelemetryError::Exporter(error.to_string()))?;
    let provider = SdkTracerProvider::builder()
        .with_sampler(sampler(ratio))
        .with_resource(Resource::builder().with_service_name(service_name.to_owned()).build())
        .with_batch_exporter(exporter)
        .build();
    Ok((otel_layer(&provider), provider))
}

fn sampler(ratio: f64) -> Sampler {
    // A caller's decision is kept; only new traces are drawn.
    Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio)))
}

fn otel_layer<S>(provider: &SdkTracerProvider) -> BoxedLayer<S>
where
    S: Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
{
    let layer: OpenTelemetryLayer<S, SdkTracer> = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("ringback"))
        // What these add per span is not worth its cost at thousands of jobs per second.
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false);
    // Spans of our own code only: the exporter's own HTTP/2 spans would feed themselves. Log lines stay logs.
    let ours = FilterFn::new(|meta| {
        meta.is_span() && meta.target().starts_with("ringback") && *meta.level() <= tracing::Level::INFO
    });
    layer.with_filter(ours).boxed()
}
