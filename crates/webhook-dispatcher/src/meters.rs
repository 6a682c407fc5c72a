//! Metrics of the dispatcher. Handles are kept, so that recording one costs no look-up.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use ringback_domain::webhook::response::{Reason, TransportFault, Verdict};
use ringback_store::deliveries::DeliveryState;

use crate::book::Change;

pub(crate) struct Meters {
    delivered: Counter,
    retried: Counter,
    dead: Counter,
    superseded: Counter,
    cancelled: Counter,
    ok: Counter,
    seconds: Histogram,
    latency: Histogram,
    records: Histogram,
    lost: Counter,
    taken_over: Counter,
    in_doubt: Counter,
    gaps: Counter,
    owned: Gauge,
}

impl std::fmt::Debug for Meters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Meters")
    }
}

impl Meters {
    pub(crate) fn new() -> Self {
        let changed = |state: &'static str| counter!("ringback_deliveries_total", "state" => state);
        Self {
            delivered: changed("delivered"),
            retried: changed("retry"),
            dead: changed("dead"),
            superseded: changed("superseded"),
            cancelled: changed("cancelled"),
            ok: counter!("ringback_delivery_attempts_total", "result" => "ok"),
            seconds: histogram!("ringback_delivery_attempt_seconds"),
            latency: histogram!("ringback_delivery_latency_seconds"),
            records: histogram!("ringback_delivery_record_size"),
            lost: counter!("ringback_partitions_lost_total"),
            taken_over: counter!("ringback_partitions_taken_over_total"),
            in_doubt: counter!("ringback_delivery_tries_in_doubt_total"),
            gaps: counter!("ringback_delivery_announcements_missed_total"),
            owned: gauge!("ringback_partitions_owned"),
        }
    }

    pub(crate) fn tried(&self, verdict: &Verdict, duration_ms: u64) {
        self.seconds.record(Duration::from_millis(duration_ms).as_secs_f64());
        match verdict {
            Verdict::Delivered => self.ok.increment(1),
            Verdict::Retry(reason, _) | Verdict::Dead(reason) => {
                counter!("ringback_delivery_attempts_total", "result" => class(*reason)).increment(1);
            }
        }
    }

    pub(crate) fn changed(&self, change: &Change) {
        match change.state {
            DeliveryState::Pending => self.retried.increment(1),
            DeliveryState::Dead => self.dead.increment(1),
            DeliveryState::Superseded => self.superseded.increment(1),
            DeliveryState::Cancelled => self.cancelled.increment(1),
            DeliveryState::Delivered => {
                self.delivered.increment(1);
                let ms = change.ended_at_ms.unwrap_or(change.created_at_ms) - change.created_at_ms;
                self.latency.record(Duration::from_millis(ms.max(0).cast_unsigned()).as_secs_f64());
            }
        }
    }

    pub(crate) fn recorded(&self, rows: usize) {
        self.records.record(rows as f64);
    }

    /// A partition was lost with so many tries in flight or not written down.
    pub(crate) fn partition_lost(&self, tries: usize) {
        self.lost.increment(1);
        self.cut_off(tries);
    }

    /// Tries whose outcome will not be written down: they are made again.
    pub(crate) fn cut_off(&self, tries: usize) {
        self.in_doubt.increment(tries as u64);
    }

    /// A partition was taken whose owner had let its lease lapse.
    pub(crate) fn partition_taken_over(&self) {
        self.taken_over.increment(1);
    }

    pub(crate) fn announcement_missed(&self) {
        self.gaps.increment(1);
    }

    pub(crate) fn owns(&self, partitions: usize) {
        self.owned.set(partitions as f64);
    }

    pub(crate) fn holds(&self, partition: u16, held: usize, in_flight: u32) {
        let label = partition.to_string();
        gauge!("ringback_deliveries_held", "partition" => label.clone()).set(held as f64);
        gauge!("ringback_deliveries_in_flight", "partition" => label).set(f64::from(in_flight));
    }

    /// Targets that this process leaves alone.
    pub(crate) fn breakers(&self, open: usize) {
        gauge!("ringback_delivery_breakers_open").set(open as f64);
    }
}

/// A class of reasons with few values, fit for a label.
fn class(reason: Reason) -> &'static str {
    match reason {
        Reason::Status(429) => "http_429",
        Reason::Status(400..=499) => "http_4xx",
        Reason::Status(500..=599) => "http_5xx",
        Reason::Status(_) => "http_other",
        Reason::Redirect(_) => "redirect",
        Reason::Gone => "gone",
        Reason::Transport(fault) => match fault {
            TransportFault::Dns => "dns",
            TransportFault::Tls => "tls",
            TransportFault::Blocked => "blocked",
            TransportFault::Connect => "connect",
            TransportFault::Timeout => "timeout",
            TransportFault::Closed => "closed",
            TransportFault::Protocol => "protocol",
            TransportFault::Url => "url",
            TransportFault::Body => "body",
        },
    }
}
