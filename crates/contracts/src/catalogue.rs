//! The catalogue of events as data: a JSON schema and an example for each type, one file per type in `catalogue/`.

use ringback_domain::event::EventType;

/// `{type, description, schema, example}` of a type, as JSON text. The schema is of the whole envelope.
#[must_use]
pub const fn describe(event: EventType) -> &'static str {
    use EventType as E;
    match event {
        E::JobQueued => include_str!("catalogue/job.queued.json"),
        E::JobStarted => include_str!("catalogue/job.started.json"),
        E::JobCompleted => include_str!("catalogue/job.completed.json"),
        E::JobFailed => include_str!("catalogue/job.failed.json"),
        E::JobCancelled => include_str!("catalogue/job.cancelled.json"),
        E::JobTimedOut => include_str!("catalogue/job.timed_out.json"),
        E::JobRetried => include_str!("catalogue/job.retried.json"),
        E::JobProgress => include_str!("catalogue/job.progress.json"),
        E::CompletionStarted => include_str!("catalogue/completion.started.json"),
        E::CompletionStreaming => include_str!("catalogue/completion.streaming.json"),
        E::CompletionFinished => include_str!("catalogue/completion.finished.json"),
        E::CompletionFailed => include_str!("catalogue/completion.failed.json"),
        E::BatchProcessing => include_str!("catalogue/batch.processing.json"),
        E::BatchCompleted => include_str!("catalogue/batch.completed.json"),
        E::BatchFailed => include_str!("catalogue/batch.failed.json"),
        E::BatchCancelled => include_str!("catalogue/batch.cancelled.json"),
        E::BatchCreated => include_str!("catalogue/batch.created.json"),
        E::ArtifactReady => include_str!("catalogue/artifact.ready.json"),
        E::ArtifactConfirmed => include_str!("catalogue/artifact.confirmed.json"),
        E::ArtifactExpired => include_str!("catalogue/artifact.expired.json"),
        E::UsageLimitWarning => include_str!("catalogue/usage.limit_warning.json"),
        E::UsageLimitExceeded => include_str!("catalogue/usage.limit_exceeded.json"),
        E::ModelUpdated => include_str!("catalogue/model.updated.json"),
        E::ModelDeprecated => include_str!("catalogue/model.deprecated.json"),
        E::WorkerLost => include_str!("catalogue/worker.lost.json"),
        E::WebhookDisabled => include_str!("catalogue/webhook.disabled.json"),
        E::DeliveryDead => include_str!("catalogue/delivery.dead.json"),
        E::WebhookTest => include_str!("catalogue/webhook.test.json"),
    }
}

/// Every type with its text, by code.
pub fn catalogue() -> impl Iterator<Item = (EventType, &'static str)> {
    EventType::ALL.iter().map(|event| (*event, describe(*event)))
}
