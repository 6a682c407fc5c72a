//! W3C trace context (<https://www.w3.org/TR/trace-context/>) across HTTP, NATS and SQL as the text `traceparent`.

use opentelemetry::Context;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Name of the HTTP and NATS header.
pub const TRACEPARENT: &str = "traceparent";

/// The current span as a `traceparent`. None outside of a span, or where telemetry was not initialised.
#[must_use]
pub fn current_traceparent() -> Option<String> {
    traceparent_of(&Span::current())
}

/// A span as a `traceparent`.
#[must_use]
pub fn traceparent_of(span: &Span) -> Option<String> {
    let context = span.context();
    let span = context.span();
    let context = span.span_context();
    context.is_valid().then(|| render(context.trace_id(), context.span_id(), context.trace_flags()))
}

/// The current span as a `traceparent`, or a fresh unsampled one: a job always has a trace.
#[must_use]
pub fn current_or_new_traceparent() -> String {
    current_traceparent().unwrap_or_else(|| {
        let ids = RandomIdGenerator::default();
        render(ids.new_trace_id(), ids.new_span_id(), TraceFlags::default())
    })
}

/// Makes `span` a child of a remote span. Text that is no valid `traceparent` is ignored, as the standard asks.
pub fn set_parent(span: &Span, traceparent: Option<&str>) {
    if let Some(parent) = traceparent.and_then(parse) {
        // Err means that no OpenTelemetry layer is installed or the span is disabled: there is nothing to parent.
        let _ = span.set_parent(Context::new().with_remote_span_context(parent));
    }
}

/// Links `span` to a remote span: for batches, and for redeliveries of one job.
pub fn add_link(span: &Span, traceparent: Option<&str>) {
    if let Some(linked) = traceparent.and_then(parse) {
        span.add_link(linked);
    }
}

/// The text if it is a valid `traceparent`: what may be stored and passed on.
#[must_use]
pub fn valid(traceparent: &str) -> Option<&str> {
    parse(traceparent).map(|_| traceparent)
}

/// Whether the spans of a valid `traceparent` are recorded: nothing has to be added to one whose are not.
#[must_use]
pub fn is_sampled(traceparent: &str) -> bool {
    let last = traceparent.as_bytes().get(54).and_then(|digit| char::from(*digit).to_digit(16));
    last.is_some_and(|flags| flags & 1 == 1)
}

fn render(trace: TraceId, span: SpanId, flags: TraceFlags) -> String {
    format!("00-{trace:032x}-{span:016x}-{:02x}", flags & TraceFlags::SAMPLED)
}

/// Version 00 strictly; of a later version the first four fields, as the standard asks.
fn parse(text: &str) -> Option<SpanContext> {
    if text.len() < 55 || text.len() > 128 {
        return None;
    }
    let mut fields = text.split('-');
    let (version, trace, span, flags) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let hex = |field: &str, len: usize| {
        field.len() == len && field.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    if !(hex(version, 2) && hex(trace, 32) && hex(span, 16) && hex(flags, 2)) || version == "ff" {
        return None;
    }
    if version == "00" && fields.next().is_some() {
        return None;
    }
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED;
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        flags,
        true,
        TraceState::default(),
    );
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing_subscriber::layer::SubscriberExt;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn the_lowest_flag_says_whether_spans_are_recorded() {
        let with = |flags: &str| format!("{}{flags}", &PARENT[..53]);
        for (flags, sampled) in [("01", true), ("03", true), ("ff", true), ("00", false), ("02", false)] {
            assert_eq!(is_sampled(&with(flags)), sampled, "{flags}");
            assert_eq!(parse(&with(flags)).unwrap().is_sampled(), sampled, "{flags}");
        }
        assert!(!is_sampled("") && !is_sampled("01"));
    }

    #[test]
    fn only_valid_texts_are_read() {
        assert_eq!(valid(PARENT), Some(PARENT));
        assert!(valid("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-later").is_some());
        for bad in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        ] {
            assert_eq!(valid(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_child_keeps_the_trace_and_has_its_own_span() {
        let (layer, _provider) = crate::telemetry::propagation_layer(1.0);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let span = tracing::info_span!("work");
            set_parent(&span, Some(PARENT));
            let child = traceparent_of(&span).unwrap();
            assert_eq!(child[..36], PARENT[..36], "same version and trace");
            assert_ne!(child[36..52], PARENT[36..52], "its own span id");
            assert!(child.ends_with("-01"), "the caller's sampling decision is kept: {child}");

            let root = tracing::info_span!("root");
            let (first, nested) = root.in_scope(|| {
                (current_traceparent().unwrap(), traceparent_of(&tracing::info_span!("inner")).unwrap())
            });
            assert!(valid(&first).is_some());
            assert_eq!(first[..36], nested[..36]);
        });
    }

    #[test]
    fn a_trace_exists_without_telemetry() {
        assert!(valid(&current_or_new_traceparent()).is_some());
    }
}
