//! What the encoder measures, in the words of text-embeddings-inference (`te_…`) with our prefix and in seconds.

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use ringback_inference::{BatchReport, Observer, Outcome, Timings};

/// The metrics of one endpoint, looked up once.
pub(super) struct EncoderMetrics {
    batch_tokens: Histogram,
    batch_size: Histogram,
    batch_inference: Histogram,
    batches_failed: Counter,
    queue_size: Gauge,
    queue_tokens: Gauge,
    tokenization: Histogram,
    queue: Histogram,
    inference: Histogram,
    total: Histogram,
    input_length: Histogram,
    tokens: Counter,
    truncated: Counter,
    inputs: Counter,
    outcomes: [Counter; 5],
}

impl EncoderMetrics {
    pub(super) fn of(endpoint: &str) -> Self {
        let name = || endpoint.to_owned();
        let outcome = |word: &'static str| counter!("ringback_encoder_requests_total", "endpoint" => name(), "outcome" => word);
        Self {
            batch_tokens: histogram!("ringback_encoder_batch_tokens_size", "endpoint" => name()),
            batch_size: histogram!("ringback_encoder_batch_size", "endpoint" => name()),
            batch_inference: histogram!("ringback_encoder_batch_inference_seconds", "endpoint" => name()),
            batches_failed: counter!("ringback_encoder_batches_failed_total", "endpoint" => name()),
            queue_size: gauge!("ringback_encoder_queue_inputs", "endpoint" => name()),
            queue_tokens: gauge!("ringback_encoder_queue_tokens", "endpoint" => name()),
            tokenization: histogram!("ringback_encoder_request_tokenization_seconds", "endpoint" => name()),
            queue: histogram!("ringback_encoder_request_queue_seconds", "endpoint" => name()),
            inference: histogram!("ringback_encoder_request_inference_seconds", "endpoint" => name()),
            total: histogram!("ringback_encoder_request_seconds", "endpoint" => name()),
            input_length: histogram!("ringback_encoder_request_input_length_size", "endpoint" => name()),
            tokens: counter!("ringback_encoder_tokens_total", "endpoint" => name()),
            truncated: counter!("ringback_encoder_inputs_truncated_total", "endpoint" => name()),
            inputs: counter!("ringback_encoder_inputs_total", "endpoint" => name()),
            outcomes: ["succeeded", "refused", "cancelled", "expired", "failed"].map(outcome),
        }
    }
}

impl Observer for EncoderMetrics {
    fn batch(&self, report: &BatchReport) {
        self.batch_tokens.record(report.tokens as f64);
        self.batch_size.record(report.sequences as f64);
        self.batch_inference.record(report.inference);
        if !report.succeeded {
            self.batches_failed.increment(1);
        }
    }

    fn queue(&self, entries: usize, tokens: usize) {
        self.queue_size.set(entries as f64);
        self.queue_tokens.set(tokens as f64);
    }

    fn request(&self, outcome: Outcome, inputs: usize, timings: &Timings) {
        let index = match outcome {
            Outcome::Succeeded => 0,
            Outcome::Refused => 1,
            Outcome::Cancelled => 2,
            Outcome::Expired => 3,
            Outcome::Failed => 4,
        };
        self.outcomes[index].increment(1);
        if outcome == Outcome::Succeeded {
            self.inputs.increment(inputs as u64);
            self.tokenization.record(timings.tokenization);
            self.queue.record(timings.queue);
            self.inference.record(timings.inference);
            self.total.record(timings.total);
        }
    }

    fn input(&self, tokens: usize, truncated: bool) {
        self.input_length.record(tokens as f64);
        self.tokens.increment(tokens as u64);
        if truncated {
            self.truncated.increment(1);
        }
    }
}
