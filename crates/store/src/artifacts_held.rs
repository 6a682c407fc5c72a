//! Artefacts whose bytes a delivery still needs: links to them are in its body.

use std::collections::HashMap;

use ringback_domain::ArtifactId;
use sea_orm::{QueryResult, Value};
use uuid::Uuid;

use crate::{
    StoreError, WriteTx,
    artifacts::ArtifactRow,
    retention::held,
    sql::{self, LIST, Rows},
};

/// Events that are no transition have a UUIDv7 of the moment in which the artefact's row changed, so their keys are
/// found by range; the join keeps its order, with the range scan inside.
const EVENTS: Rows = Rows {
    name: "artifacts.events",
    before: "WITH v (id, subject, low, high) AS (VALUES ",
    casts: &["bytea", "text", "bytea", "bytea"],
    after: ") SELECT v.id, e.id FROM v CROSS JOIN events e WHERE e.id >= v.low AND e.id < v.high \
            AND e.subject = v.subject",
};

const BATCHES: Rows = Rows {
    name: "artifacts.batches",
    before: "SELECT id, batch_id FROM jobs WHERE batch_id IS NOT NULL AND id IN (",
    casts: LIST,
    after: ")",
};

/// Those of `rows` that must stay, and until when: they, their job, its batch or their events have a delivery that is
/// pending or died lately, as in [`crate::retention`].
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn held_artifacts(
    tx: &WriteTx,
    rows: &[ArtifactRow],
) -> Result<HashMap<ArtifactId, i64>, StoreError> {
    // Who owns deliveries that need which artefact.
    let mut owners: Vec<([u8; 16], ArtifactId)> = Vec::with_capacity(rows.len() * 3);
    let mut of_job: HashMap<[u8; 16], Vec<ArtifactId>> = HashMap::new();
    let mut moments: Vec<(&ArtifactRow, i64)> = Vec::with_capacity(rows.len());
    for row in rows {
        owners.push((*row.id.as_bytes(), row.id));
        of_job.entry(*row.job.as_bytes()).or_default().push(row.id);
        moments.extend([row.ready_at_ms, row.confirmed_at_ms].into_iter().flatten().map(|at| (row, at)));
    }
    let events = EVENTS
        .query(tx.conn(), &moments, |(row, at_ms), v| {
            v.extend([
                sql::id(row.id.as_bytes()),
                Value::from(row.id.to_string()),
                sql::id(&first_key(*at_ms)),
                sql::id(&first_key(at_ms.saturating_add(1))),
            ]);
        })
        .await?;
    for row in &events {
        let id = ArtifactId::from_uuid(Uuid::from_bytes(key(row, 0, "artifacts.id")?));
        owners.push((key(row, 1, "events.id")?, id));
    }
    let jobs: Vec<[u8; 16]> = of_job.keys().copied().collect();
    for row in &BATCHES.query(tx.conn(), &jobs, |id, v| v.push(sql::id(id))).await? {
        let batch = key(row, 1, "jobs.batch_id")?;
        let ids = of_job.get(&key(row, 0, "jobs.id")?);
        owners.extend(ids.into_iter().flatten().map(|id| (batch, *id)));
    }
    owners.extend(of_job.into_iter().flat_map(|(job, ids)| ids.into_iter().map(move |id| (job, id))));
    let mut until = HashMap::new();
    let all = held(tx, owners.iter().map(|(owner, _)| owner)).await?;
    for (owner, id) in &owners {
        if let Some(at) = all.get(owner) {
            let entry = until.entry(*id).or_insert(*at);
            *entry = (*entry).min(*at);
        }
    }
    Ok(until)
}

fn key(row: &QueryResult, index: usize, column: &'static str) -> Result<[u8; 16], StoreError> {
    row.try_get_by_index::<Vec<u8>>(index)?.try_into().map_err(|_| StoreError::corrupt(column))
}

/// The lowest UUIDv7 of a moment.
fn first_key(at_ms: i64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..6].copy_from_slice(&at_ms.to_be_bytes()[2..]);
    bytes
}
