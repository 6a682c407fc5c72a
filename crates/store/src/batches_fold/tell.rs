//! What receivers are told of a batch.

use bytes::Bytes;
use ringback_contracts::v1;
use ringback_domain::{
    BatchId, TimestampMs,
    batch::{BatchFile, BatchStatus},
    event::{EventType, event_id},
    target::{FORMAT_RUNFLOW, WebhookFormat},
    webhook::runflow_body::{BatchItem as RunflowItem, batch_event},
    webhook::{
        body::Body,
        envelope::{self, BatchFacts},
    },
};

use super::row::{Row, lock, write};
use super::{BatchEnv, Counted};
use crate::{
    StoreError, WriteTx,
    deliveries::body_to_wire,
    webhooks::{EventFacts, Registry, registry::parse_metadata},
};

/// What telling of batches needs.
pub(super) struct Telling<'a> {
    pub(super) registry: &'a Registry,
    pub(super) now: TimestampMs,
    /// None while the batch cannot end: then nothing names a link.
    pub(super) env: Option<&'a BatchEnv>,
}

impl Telling<'_> {
    pub(super) fn link(&self, file: BatchFile, row: &Row) -> Option<String> {
        let env = self.env.filter(|_| row.status != BatchStatus::InProgress)?;
        Some(env.link(file, &row.id))
    }
}

pub(super) fn tell_processing(row: &mut Row, telling: &Telling<'_>, counted: &mut Counted) {
    if row.processing_told || row.status != BatchStatus::InProgress {
        return;
    }
    row.processing_told = true;
    let seq = row.seq + 1;
    let told = registered(row, seq, EventType::BatchProcessing, telling);
    if !told.is_empty() {
        row.seq = seq;
        row.owed += count(&told);
        counted.deliveries.extend(told);
    }
}

pub(super) fn count(deliveries: &[v1::Delivery]) -> u32 {
    u32::try_from(deliveries.len()).unwrap_or(u32::MAX)
}

/// What registered webhooks are owed for an event of a batch.
pub(super) fn registered(row: &Row, seq: u32, event: EventType, telling: &Telling<'_>) -> Vec<v1::Delivery> {
    let Telling { registry, now, .. } = telling;
    if !registry.listens(row.project) {
        return Vec::new();
    }
    let metadata = parse_metadata(row.metadata.as_deref());
    let facts = EventFacts {
        names: event.into(),
        runflow: event.is_terminal().then(|| batch_event(row.status, &row.counts)).flatten(),
        endpoint: Some(row.endpoint),
        metadata: metadata.as_ref(),
        now_ms: now.0,
    };
    let mut bodies: [Option<v1::BodyParts>; 2] = [None, None];
    registry
        .matching(row.project, facts)
        .map(|(target, webhook, name)| {
            let runflow = webhook.format == WebhookFormat::Runflow;
            let body = bodies[usize::from(runflow)].get_or_insert_with(|| {
                body_to_wire(if runflow {
                    runflow_body(row, telling)
                } else {
                    standard_body(row, seq, name, telling)
                })
            });
            v1::Delivery {
                owner_id: Bytes::copy_from_slice(row.id.as_bytes()),
                seq,
                target,
                project_id: row.project.0,
                url: webhook.url.clone().unwrap_or_default(),
                terminal: EventType::is_terminal(name),
                event: name.code(),
                body: Some(body.clone()),
                created_at_ms: now.0,
                traceparent: row.traceparent.clone().unwrap_or_default(),
                run: 1,
                format: if runflow { FORMAT_RUNFLOW } else { 0 },
                ..v1::Delivery::default()
            }
        })
        .collect()
}

fn standard_body(row: &Row, seq: u32, event: EventType, telling: &Telling<'_>) -> Body {
    let ended = row.status != BatchStatus::InProgress;
    let (output, errors) = (FileKind::Output.id(row.id), FileKind::Errors.id(row.id));
    let (output_url, errors_url) =
        (telling.link(BatchFile::Output, row), telling.link(BatchFile::Errors, row));
    let since = TimestampMs(row.opened_at_ms.unwrap_or(row.created_at_ms));
    let data = envelope::batch(&BatchFacts {
        batch_id: &row.id.to_string(),
        endpoint: telling.registry.endpoint(row.endpoint).map_or("", |e| &e.name),
        status: row.status,
        counts: row.counts,
        processing_ms: telling.now.since_ms(since),
        output_file_id: ended.then_some(&output),
        error_file_id: ended.then_some(&errors),
        output_file_url: output_url.as_deref(),
        error_file_url: errors_url.as_deref(),
        metadata: row.metadata.as_deref(),
    });
    let id = event_id(uuid::Uuid::from_bytes(*row.id.as_bytes()), seq);
    envelope::standard(&id, event, telling.now, data)
}

/// Most runs that Runflow's body of a batch tells one by one; the others are behind its `result_url`.
const RUNFLOW_ITEMS_MAX: u32 = 1_000;

/// The runs of a batch that has ended.
pub(super) async fn runflow_items(tx: &WriteTx, row: &Row) -> Result<Option<Vec<RunflowItem>>, StoreError> {
    if row.counts.total > RUNFLOW_ITEMS_MAX {
        return Ok(None);
    }
    let items = crate::batches::batch_items(tx.conn(), row.id, 0, RUNFLOW_ITEMS_MAX, false).await?;
    let item = |i: crate::batches::BatchItem| RunflowItem {
        index: i.index,
        run_id: i.job.to_string(),
        status: i.status,
        client_ref: i.client_ref,
    };
    Ok(Some(items.into_iter().map(item).collect()))
}

pub(super) fn runflow_body(row: &Row, telling: &Telling<'_>) -> Body {
    ringback_domain::webhook::runflow_body::batch_end(&ringback_domain::webhook::runflow_body::BatchEnd {
        batch_id: &row.id.to_string(),
        status: row.status,
        counts: row.counts,
        items: row.items.as_deref(),
        result_url: &telling.link(BatchFile::Results, row).unwrap_or_default(),
        created_at: TimestampMs(row.created_at_ms),
        completed_at: telling.now,
        metadata: row.metadata.as_deref(),
    })
}

/// A file that a batch leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// The jobs that completed, one line each.
    Output,
    /// The jobs that did not, one line each.
    Errors,
}

impl FileKind {
    const fn word(self) -> &'static str {
        match self {
            Self::Output => "output",
            Self::Errors => "errors",
        }
    }

    /// The file's id: `file_<batch>_output`.
    #[must_use]
    pub fn id(self, batch: BatchId) -> String {
        format!("file_{}_{}", batch.simple(), self.word())
    }

    /// Reads [`Self::id`] back.
    #[must_use]
    pub fn parse(id: &str) -> Option<(BatchId, Self)> {
        let (batch, word) = id.strip_prefix("file_")?.split_once('_')?;
        let kind = [Self::Output, Self::Errors].into_iter().find(|kind| kind.word() == word)?;
        Some((BatchId::parse_simple(batch).ok()?, kind))
    }
}

/// Tells registered webhooks that a batch was accepted, in the transaction that opens it.
pub(crate) async fn tell_created(
    tx: &WriteTx,
    partitions: u16,
    id: BatchId,
) -> Result<Vec<v1::Delivery>, StoreError> {
    let registry = tx.registry().await?;
    let Some(mut row) = lock(tx, &[id]).await?.pop() else { return Ok(Vec::new()) };
    let telling = Telling { registry: &registry, now: TimestampMs(tx.now_ms()), env: None };
    let seq = row.seq + 1;
    let told = registered(&row, seq, EventType::BatchCreated, &telling);
    if told.is_empty() {
        return Ok(told);
    }
    row.seq = seq;
    row.owed += count(&told);
    let counted = Counted { deliveries: told, ..Counted::default() };
    write(tx, &[row], partitions, &counted).await?;
    Ok(counted.deliveries)
}
