//! The deliveries that registered webhooks are owed for a transition of a job, with their bytes.

use bytes::Bytes;
use ringback_contracts::v1;
use ringback_domain::{
    JobStatus, TimestampMs,
    event::{Completion, EndpointKind, EventType, event_id, of_transition},
    target::{BodyFormat, FORMAT_RUNFLOW, WebhookFormat},
    webhook::{
        body::{self, Echo, Json},
        envelope::{self, CompletionFacts, JobFacts},
        runflow_body::{self, RunEnd},
    },
};
use uuid::Uuid;

use super::{EventFacts, Registry, Webhook};
use crate::{JobRow, deliveries::body_to_wire};

/// A transition, as events tell it.
#[derive(Clone, Copy, Debug)]
pub struct Transition<'a> {
    /// The job. Its state may be a later one already.
    pub row: &'a JobRow,
    /// `jobs.seq` after the transition.
    pub seq: u32,
    /// Its run.
    pub run: u32,
    /// The attempt, 0 where none began.
    pub attempt: u32,
    /// The state that was entered.
    pub status: JobStatus,
    /// Whether the job was in the queue before it entered it.
    pub again: bool,
    /// From (re)queueing to start.
    pub delay_ms: u64,
    /// Of the recorded attempt.
    pub execution_ms: u64,
    /// When, on the database's clock.
    pub at: TimestampMs,
    /// The trace that the POSTs belong to.
    pub traceparent: Option<&'a str>,
}

/// What a run's end brought.
#[derive(Clone, Copy, Debug, Default)]
pub struct End<'a> {
    /// What the handler gave back.
    pub output: Option<Json<'a>>,
    /// What an output in a blob says of a completion.
    pub said: Option<&'a Completion>,
    /// Why the run did not complete.
    pub error: Option<&'a str>,
    /// Class of the error.
    pub error_type: Option<&'a str>,
    /// The job's input, where [`wants_input`] said so.
    pub input: Option<Json<'a>>,
}

/// Somebody who is owed a fact: the target's number, the webhook, and the name that its filter chose.
pub type OwedTo<'r> = (u32, &'r std::sync::Arc<Webhook>, EventType);

/// Who is owed the transition.
#[must_use]
pub fn owed<'r>(
    registry: &'r Registry,
    of: &Transition<'_>,
    metadata: Option<&'r serde_json::Value>,
) -> Vec<OwedTo<'r>> {
    let kind = registry.endpoint(of.row.endpoint).map_or(EndpointKind::Job, |e| e.kind);
    let facts = EventFacts {
        names: of_transition(kind, of.status, of.again),
        runflow: None,
        endpoint: Some(of.row.endpoint),
        metadata,
        now_ms: of.at.0,
    };
    registry.matching(of.row.project, facts).collect()
}

/// Whether a body repeats the job's input: RunPod's of a run's end.
#[must_use]
pub fn wants_input(of: &Transition<'_>, owed: &[OwedTo<'_>]) -> bool {
    of.status.is_terminal() && owed.iter().any(|(_, w, _)| w.format == WebhookFormat::Runpod)
}

/// The deliveries, in the order of `owed`.
#[must_use]
pub fn deliveries(
    registry: &Registry,
    of: &Transition<'_>,
    end: &End<'_>,
    owed: &[OwedTo<'_>],
) -> Vec<v1::Delivery> {
    // Each distinct body is made once; its copies share the bytes.
    let mut standard: Vec<(EventType, v1::BodyParts)> = Vec::new();
    let mut runflow: Option<v1::BodyParts> = None;
    let mut all = Vec::with_capacity(owed.len());
    for (target, webhook, event) in owed {
        let body = match webhook.format {
            WebhookFormat::Standard => match standard.iter().find(|(e, _)| e == event) {
                Some((_, made)) => made.clone(),
                None => {
                    let made = body_to_wire(standard_body(registry, of, end, *event));
                    standard.push((*event, made.clone()));
                    made
                }
            },
            WebhookFormat::Runflow => {
                runflow.get_or_insert_with(|| body_to_wire(runflow_of(of, end))).clone()
            }
            // RunPod's body names the URL that it goes to.
            WebhookFormat::Runpod => body_to_wire(runpod_of(of, end, webhook)),
        };
        all.push(v1::Delivery {
            owner_id: Bytes::copy_from_slice(of.row.job.id.as_bytes()),
            seq: of.seq,
            target: *target,
            project_id: of.row.project.0,
            url: webhook.url.clone().unwrap_or_default(),
            terminal: of.status.is_terminal(),
            event: event.code(),
            body: Some(body),
            created_at_ms: of.at.0,
            traceparent: of.traceparent.unwrap_or_default().to_owned(),
            run: of.run,
            format: if webhook.format == WebhookFormat::Runflow { FORMAT_RUNFLOW } else { 0 },
            ..v1::Delivery::default()
        });
    }
    all
}

/// What every event about a job tells of it.
#[must_use]
pub fn facts<'a>(registry: &'a Registry, of: &Transition<'a>, ids: &'a Ids, end: &End<'a>) -> JobFacts<'a> {
    JobFacts {
        job_id: &ids.job,
        endpoint: registry.endpoint(of.row.endpoint).map_or("", |e| &e.name),
        status: of.status,
        run: of.run,
        attempt: of.attempt,
        sequence: of.seq,
        delay_ms: of.delay_ms,
        execution_ms: of.execution_ms,
        output: end.output,
        error: end.error,
        error_type: end.error_type,
        batch_id: ids.batch.as_deref(),
        client_ref: of.row.client_ref.as_deref(),
        metadata: of.row.metadata.as_deref(),
    }
}

/// Ids of a job as clients know them.
#[derive(Clone, Debug)]
pub struct Ids {
    job: String,
    batch: Option<String>,
}

impl Ids {
    /// Of a row.
    #[must_use]
    pub fn of(row: &JobRow) -> Self {
        Self { job: row.public_id(), batch: row.batch.map(|(id, _)| id.to_string()) }
    }
}

fn standard_body(registry: &Registry, of: &Transition<'_>, end: &End<'_>, event: EventType) -> body::Body {
    let ids = Ids::of(of.row);
    let facts = facts(registry, of, &ids, end);
    let data = match event.family() {
        "completion" => completion_data(registry, of, end, &facts),
        _ => envelope::job(&facts),
    };
    let id = event_id(Uuid::from_bytes(*of.row.job.id.as_bytes()), of.seq);
    envelope::standard(&id, event, of.at, data)
}

fn completion_data(
    registry: &Registry,
    of: &Transition<'_>,
    end: &End<'_>,
    facts: &JobFacts<'_>,
) -> body::Body {
    let said = match (end.output, end.said) {
        (Some(Json::Inline(output)), _) if of.status.is_terminal() => Completion::read(output),
        (Some(Json::Blob { .. }), Some(said)) if of.status.is_terminal() => said.clone(),
        (Some(Json::Inline(_) | Json::Blob { .. }) | None, _) => Completion::default(),
    };
    let configured = registry.endpoint(of.row.endpoint).and_then(|e| e.model.as_deref());
    let ended_otherwise = match of.status {
        JobStatus::InQueue | JobStatus::InProgress | JobStatus::Completed => None,
        JobStatus::Failed => Some("error"),
        JobStatus::Cancelled => Some("cancelled"),
        JobStatus::TimedOut => Some("timeout"),
    };
    envelope::completion(
        facts,
        &CompletionFacts {
            model: said.model.as_deref().or(configured),
            request_id: of.row.request_id.as_deref(),
            prompt_tokens: said.prompt_tokens,
            completion_tokens: said.completion_tokens,
            total_tokens: said.total_tokens,
            finish_reason: ended_otherwise.or(said.finish_reason.as_deref()),
            content: said.content.as_deref(),
            content_cut: said.content_cut,
        },
    )
}

fn runflow_of(of: &Transition<'_>, end: &End<'_>) -> body::Body {
    runflow_body::run_end(&RunEnd {
        run_id: &of.row.public_id(),
        status: of.status,
        output: end.output,
        error: end.error,
        error_type: end.error_type,
        duration_ms: of.execution_ms,
        created_at: of.row.submitted_at,
        completed_at: of.at,
        metadata: of.row.metadata.as_deref(),
    })
}

fn runpod_of(of: &Transition<'_>, end: &End<'_>, webhook: &Webhook) -> body::Body {
    body::of_transition(
        BodyFormat::RunpodWebhook,
        &body::Terminal {
            id: &of.row.public_id(),
            status: of.status,
            delay_time_ms: of.delay_ms,
            execution_time_ms: of.execution_ms,
            output: end.output,
            error: end.error,
            echo: end.input.map(|input| Echo { input, webhook: webhook.url.as_deref().unwrap_or_default() }),
        },
    )
}
