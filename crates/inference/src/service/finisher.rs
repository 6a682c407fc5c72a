//! The thread that splits batches into rows and wakes whoever waits, so that the engine does not wait for that.

use super::{Entry, request::EncodeError};
use crate::batch::Outputs;
use std::{
    sync::mpsc::Receiver,
    time::{Duration, Instant},
};

/// What the engine's thread hands over.
pub(super) enum Result {
    /// A batch gave rows.
    Rows { entries: Vec<Entry>, outputs: Outputs, number: u64, begun: Instant, inference: Duration },
    /// Entries that have no rows.
    Failed { entries: Vec<Entry>, error: EncodeError },
}

pub(super) fn run(results: &Receiver<Result>) {
    while let Ok(result) = results.recv() {
        match result {
            Result::Rows { entries, outputs, number, begun, inference } => {
                for (entry, row) in entries.iter().zip(outputs.rows()) {
                    let sequence = &entry.payload;
                    let waited = begun.saturating_duration_since(sequence.queued_at);
                    sequence.request.row(sequence.index, row, waited, number, inference);
                }
            }
            Result::Failed { entries, error } => {
                for entry in entries {
                    entry.payload.request.fail(error.clone());
                }
            }
        }
    }
}
