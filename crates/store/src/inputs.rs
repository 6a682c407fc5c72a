//! What the handler gets: rows of `job_inputs`, immutable, inserted with the job.

use std::collections::HashMap;

use bytes::Bytes;
use ringback_contracts::{VERSION, job_id_of, v1};
use ringback_domain::JobId;
use sea_orm::{ConnectionTrait, QueryResult};

use crate::{
    JobRow, StoreError,
    secrets::SecretKey,
    sql::{self, LIST, Rows, get_u64},
    submit::{InputAt, merge_extra, secret_purpose},
};

/// The input of a job.
#[derive(Clone, Debug)]
pub struct StoredInput {
    /// The client's `input`.
    pub input: InputAt,
    /// Further members of the job object as one JSON object; no secrets.
    pub extra: Option<Bytes>,
    /// Further members that are secret, encrypted with the key file.
    pub secret_extra_encrypted: Option<Vec<u8>>,
}

const SELECT: Rows = Rows {
    name: "job_inputs.select",
    before: "SELECT job_id, input, input_blob_key, input_bytes, extra, secret_extra_encrypted FROM job_inputs \
             WHERE job_id IN (",
    casts: LIST,
    after: ")",
};

/// Reads the inputs of jobs; absent ones are missing from the map.
///
/// # Errors
/// The database's, and a corrupt row.
pub async fn select_inputs<C: ConnectionTrait>(
    conn: &C,
    ids: &[JobId],
) -> Result<HashMap<JobId, StoredInput>, StoreError> {
    let rows = SELECT.query(conn, ids, |id, v| v.push(sql::id(id.as_bytes()))).await?;
    rows.iter().map(read).collect()
}

fn read(row: &QueryResult) -> Result<(JobId, StoredInput), StoreError> {
    let inline: Option<Vec<u8>> = row.try_get_by_index(1)?;
    let blob: Option<String> = row.try_get_by_index(2)?;
    let input = match (inline, blob) {
        (Some(bytes), None) => InputAt::Inline(bytes.into()),
        (None, Some(key)) => InputAt::Blob { key, size_bytes: get_u64(row, 3, "job_inputs.input_bytes")? },
        (Some(_), Some(_)) | (None, None) => return Err(StoreError::corrupt("job_inputs.input")),
    };
    let stored = StoredInput {
        input,
        extra: row.try_get_by_index::<Option<Vec<u8>>>(4)?.map(Bytes::from),
        secret_extra_encrypted: row.try_get_by_index(5)?,
    };
    Ok((job_id_of(&row.try_get_by_index::<Vec<u8>>(0)?)?, stored))
}

/// The message of a job's newest publish, for whoever publishes it: api-ingest after a submit, the state-tracker
/// later. `endpoint` is the endpoint's name; `secret` the secret members in the clear, one JSON object.
#[must_use]
pub fn job_message(
    row: &JobRow,
    endpoint: &str,
    input: &InputAt,
    extra: Option<&Bytes>,
    secret: Option<&[u8]>,
    must_ask: bool,
    db_epoch: &str,
) -> v1::JobMessage {
    let (at, size_bytes) = match input {
        InputAt::Inline(bytes) => (v1::payload::At::Inline(bytes.clone()), bytes.len() as u64),
        InputAt::Blob { key, size_bytes } => (v1::payload::At::BlobKey(key.clone()), *size_bytes),
    };
    v1::JobMessage {
        version: VERSION,
        job_id: Bytes::copy_from_slice(row.job.id.as_bytes()),
        run: row.job.run,
        publish: row.job.publish,
        project_id: row.project.0,
        endpoint_id: row.endpoint.0,
        endpoint: endpoint.to_owned(),
        sync_id: row.sync_id,
        must_ask,
        input: Some(v1::Payload { at: Some(at), size_bytes }),
        extra_json: merge_extra(extra.map(|b| b.as_ref()), secret),
        execution_timeout_ms: row.job.execution_timeout_ms,
        ttl_at_ms: row.job.ttl_at.map_or(0, |t| t.0),
        queued_at_ms: row.job.queued_at.0,
        traceparent: row.traceparent.clone().unwrap_or_default(),
        db_epoch: db_epoch.to_owned(),
    }
}

/// Opens the secret members of a stored input.
///
/// # Errors
/// The key file is not the one they were sealed with.
pub fn open_secret_extra(
    key: &SecretKey,
    job: JobId,
    input: &StoredInput,
) -> Result<Option<ringback_service_runtime::Redacted<Vec<u8>>>, StoreError> {
    input
        .secret_extra_encrypted
        .as_ref()
        .map(|sealed| key.open_sealed(sealed, &secret_purpose(job)))
        .transpose()
}
