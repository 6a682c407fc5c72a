//! Who hears of an artefact, and in which words: links, the events of registered webhooks, and the classic POST.

use ringback_contracts::v1;
use ringback_domain::{
    artifact::{FORMAT_NOTICE, confirmation_url, download_url, hex},
    event::{Candidates, EventType, event_key},
    webhook::body::Body,
};
use ringback_store::{
    StoreError, WriteTx,
    artifacts::ArtifactRow,
    events::{self, Audience, NewEvent},
    secrets::SecretKey,
    sql,
};
use serde_json::{Value, json};

/// What became of an artefact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    Ready,
    Confirmed,
    GivenUp,
    Expired,
}

/// Makes links and bodies.
pub(crate) struct Teller {
    pub(crate) key: SecretKey,
    pub(crate) public_url: String,
    pub(crate) partitions: u16,
}

impl Teller {
    pub(crate) fn link(&self, row: &ArtifactRow) -> v1::ArtifactLink {
        let token = self.key.artifact_token(&row.id);
        v1::ArtifactLink {
            id: bytes::Bytes::copy_from_slice(row.id.as_bytes()),
            download_url: download_url(&self.public_url, &row.id, &token, &row.name),
            confirmation_url: confirmation_url(&self.public_url, &row.id, &token),
        }
    }

    /// The file can be fetched: registered webhooks hear of it, and the receiver gets its classic POST.
    pub(crate) async fn ready(
        &self,
        tx: &WriteTx,
        row: &ArtifactRow,
        receiver: Option<&str>,
    ) -> Result<Vec<v1::Delivery>, StoreError> {
        let link = self.link(row);
        let mut data = facts(row);
        data["download_url"] = link.download_url.as_str().into();
        data["confirmation_url"] = link.confirmation_url.as_str().into();
        data["confirm_until"] = row.wait_until_ms.into();
        let mut deliveries = self.emit(tx, row, EventType::ArtifactReady, &data).await?;
        if let Some(url) = receiver {
            deliveries.push(self.notice(tx, row, &link, url).await?);
        }
        Ok(deliveries)
    }

    pub(crate) async fn confirmed(
        &self,
        tx: &WriteTx,
        row: &ArtifactRow,
    ) -> Result<Vec<v1::Delivery>, StoreError> {
        let mut data = facts(row);
        data["confirmed_at"] = row.confirmed_at_ms.into();
        data["sha256_confirmed"] = row.confirmed_sha256.into();
        data["in_time"] = row.given_up_at_ms.is_none().into();
        self.emit(tx, row, EventType::ArtifactConfirmed, &data).await
    }

    pub(crate) async fn expired(
        &self,
        tx: &WriteTx,
        row: &ArtifactRow,
        reason: &str,
    ) -> Result<Vec<v1::Delivery>, StoreError> {
        let mut data = facts(row);
        data["reason"] = reason.into();
        data["confirmed"] = row.confirmed_at_ms.is_some().into();
        self.emit(tx, row, EventType::ArtifactExpired, &data).await
    }

    async fn emit(
        &self,
        tx: &WriteTx,
        row: &ArtifactRow,
        name: EventType,
        data: &Value,
    ) -> Result<Vec<v1::Delivery>, StoreError> {
        let (metadata, traceparent) = job_facts(tx, row).await?;
        let now = u64::try_from(tx.now_ms()).unwrap_or(0);
        let event = NewEvent {
            id: event_key(now, rand::random(), Some(row.job.as_bytes())),
            project: row.project,
            names: Candidates::one(name),
            subject: &row.id.to_string(),
            endpoint: Some(row.endpoint),
            metadata: metadata.as_ref(),
            data: Body::of_json(data.to_string().into_bytes()),
            audience: Audience::Matching,
            traceparent: traceparent.as_deref(),
        };
        events::emit(tx, self.partitions, event).await
    }

    /// The classic POST as a delivery of its own; its owner is the artefact.
    async fn notice(
        &self,
        tx: &WriteTx,
        row: &ArtifactRow,
        link: &v1::ArtifactLink,
        url: &str,
    ) -> Result<v1::Delivery, StoreError> {
        let body = json!({
            "job_id": row.public_job_id(),
            "download_url": link.download_url,
            "confirmation_url": link.confirmation_url,
            "filename": row.name,
        });
        let (_, traceparent) = job_facts(tx, row).await?;
        let delivery = v1::Delivery {
            owner_id: bytes::Bytes::copy_from_slice(row.id.as_bytes()),
            seq: 1,
            target: 0,
            project_id: row.project.0,
            url: url.to_owned(),
            terminal: true,
            event: EventType::ArtifactReady.code(),
            body: Some(ringback_store::deliveries::body_to_wire(Body::of_json(
                body.to_string().into_bytes(),
            ))),
            created_at_ms: tx.now_ms(),
            traceparent: traceparent.unwrap_or_default(),
            run: 1,
            format: FORMAT_NOTICE,
            ..v1::Delivery::default()
        };
        let owned = std::slice::from_ref(&delivery);
        events::insert_owned(tx, self.partitions, row.id.as_bytes(), &row.id.to_string(), owned).await?;
        Ok(delivery)
    }
}

/// What every event of an artefact says.
fn facts(row: &ArtifactRow) -> Value {
    json!({
        "artifact_id": row.id.to_string(),
        "job_id": row.public_job_id(),
        "run": row.run,
        "attempt": row.attempt,
        "filename": row.name,
        "content_type": row.content_type,
        "size_bytes": row.size_bytes,
        "sha256": hex(&row.sha256),
    })
}

/// Metadata and trace of the job, where it still exists.
async fn job_facts(tx: &WriteTx, row: &ArtifactRow) -> Result<(Option<Value>, Option<String>), StoreError> {
    let found = sql::query_one(
        tx.conn(),
        "SELECT metadata, traceparent FROM jobs WHERE id = $1",
        [sql::id(row.job.as_bytes())],
    )
    .await?;
    let Some(found) = found else { return Ok((None, None)) };
    let metadata: Option<Vec<u8>> = found.try_get_by_index(0)?;
    let metadata = metadata.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    Ok((metadata, found.try_get_by_index(1)?))
}

/// One line and one count per change.
pub(crate) fn note(row: &ArtifactRow, heard: Heard) {
    let word = match heard {
        Heard::Ready => "ready",
        Heard::Confirmed => "confirmed",
        Heard::GivenUp => "unconfirmed",
        Heard::Expired => "expired",
    };
    metrics::counter!("ringback_artifacts_total", "event" => word).increment(1);
    let since = |at: Option<i64>| Some(at? - row.ready_at_ms?);
    let waited_ms = match heard {
        Heard::Confirmed => since(row.confirmed_at_ms),
        Heard::GivenUp => since(row.given_up_at_ms),
        Heard::Ready | Heard::Expired => None,
    };
    if let Some(ms) = waited_ms {
        let seconds = std::time::Duration::from_millis(u64::try_from(ms).unwrap_or(0)).as_secs_f64();
        metrics::histogram!("ringback_artifact_confirm_seconds", "end" => word).record(seconds);
    }
    let (job_id, size_bytes) = (row.public_job_id(), row.size_bytes);
    match heard {
        Heard::GivenUp => {
            tracing::warn!(artifact_id = %row.id, job_id, waited_ms, "no receiver confirmed the artefact in time");
        }
        Heard::Ready | Heard::Confirmed | Heard::Expired => {
            tracing::info!(artifact_id = %row.id, job_id, size_bytes, waited_ms, "artefact {word}");
        }
    }
}
