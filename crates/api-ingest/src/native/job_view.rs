//! The native job object.

use ringback_contracts::history_of;
use ringback_domain::{
    JobStatus,
    job::{EndReason, JobState},
};
use ringback_store::{
    JobRow,
    deliveries::{DeliveryCounts, delivery_counts_of},
    views::{ResultView, StoredJson, result_of, results_brief},
};
use serde_json::{Value, json};
use uuid::Uuid;

use super::artifacts;
use crate::{error::ApiError, render::rfc3339, state::Api};

pub(crate) fn time(ms: Option<i64>) -> Value {
    ms.map_or(Value::Null, |ms| rfc3339(ms).into())
}

pub(crate) fn counts_json(c: &DeliveryCounts) -> Value {
    json!({
        "pending": c.pending,
        "delivered": c.delivered,
        "dead": c.dead,
        "superseded": c.superseded,
        "cancelled": c.cancelled,
    })
}

/// Everything but the output.
fn object(api: &Api, row: &JobRow, result: Option<&ResultView>, counts: &DeliveryCounts) -> Value {
    let (mut attempt, mut started, mut finished, mut worker) = (None, None, None, None);
    let (mut delay, mut execution, mut reason) = (None, None, None);
    match &row.job.state {
        JobState::InQueue => {}
        JobState::InProgress(live) => {
            (attempt, started, worker) =
                (Some(live.attempt), Some(live.started_at.0), Some(live.worker.clone()));
            delay = Some(live.delay_ms);
        }
        JobState::Completed(end)
        | JobState::Failed(end)
        | JobState::Cancelled(end)
        | JobState::TimedOut(end) => {
            (attempt, finished) = (end.attempt, Some(end.at.0));
            (delay, execution, reason) =
                (Some(end.delay_ms), Some(end.execution_ms), Some(end.reason.as_str()));
            started = result.and_then(|r| r.started_at_ms);
            worker = result.and_then(|r| r.worker.clone());
        }
    }
    json!({
        "id": row.public_id(),
        "endpoint": &*api.catalog.name_of(row.endpoint),
        "status": row.job.status().as_str(),
        "run": row.job.run,
        "seq": row.job.seq,
        "attempt": attempt,
        "submitted_at": rfc3339(row.submitted_at.0),
        "queued_at": rfc3339(row.job.queued_at.0),
        "started_at": time(started),
        "finished_at": time(finished),
        "delay_time_ms": delay,
        "execution_time_ms": execution,
        "worker_id": worker,
        "end_reason": reason,
        "error": result.and_then(|r| r.error.as_deref()),
        "error_type": result.and_then(|r| r.error_type.as_deref()),
        "batch_id": row.batch.map(|(id, _)| id.to_string()),
        "client_ref": row.client_ref,
        "history": history(row),
        "deliveries": counts_json(counts),
    })
}

fn history(row: &JobRow) -> Value {
    let Ok(history) = history_of(&row.history) else {
        tracing::error!(job_id = row.public_id(), "the history cannot be read");
        return Value::Array(Vec::new());
    };
    let entries = history.entries.iter().map(|e| {
        let reason = e.reason.checked_sub(1).and_then(|code| EndReason::from_code(i64::from(code)));
        json!({
            "seq": e.seq,
            "status": JobStatus::from_code(i64::from(e.status)).map_or("UNKNOWN", JobStatus::as_str),
            "run": e.run,
            "attempt": if e.attempt == 0 { Value::Null } else { e.attempt.into() },
            "at": rfc3339(e.at_ms),
            "reason": reason.map(EndReason::as_str),
        })
    });
    entries.collect()
}

/// The job with its output where that is small; else with `output_url`.
pub(crate) async fn job_json(api: &Api, row: &JobRow) -> Result<Vec<u8>, ApiError> {
    let conn = api.store.read();
    let result =
        if row.job.status().is_terminal() { result_of(conn, row.job.id, row.job.run).await? } else { None };
    let owner = Uuid::from_bytes(*row.job.id.as_bytes());
    let counts = delivery_counts_of(conn, &[owner]).await?.remove(&owner).unwrap_or_default();
    let mut value = object(api, row, result.as_ref(), &counts);
    value["artifacts"] = artifacts::of_job(api, row.project, row.job.id, row.job.run).await?.into();
    let output = result.and_then(|r| r.output);
    if let Some(StoredJson::Blob { size_bytes, .. }) = &output {
        value["output_bytes"] = (*size_bytes).into();
        value["output_url"] = format!("{}/v1/jobs/{}/output", api.base_url, row.public_id()).into();
    }
    let mut body = value.to_string().into_bytes();
    if let Some(StoredJson::Inline(bytes)) = output
        && body.pop() == Some(b'}')
    {
        body.extend_from_slice(b",\"output\":");
        body.extend_from_slice(&bytes);
        body.push(b'}');
    }
    Ok(body)
}

/// Jobs of a list, without outputs.
pub(crate) async fn jobs_json(api: &Api, rows: &[JobRow]) -> Result<Vec<Value>, ApiError> {
    let conn = api.store.read();
    let ids: Vec<_> = rows.iter().map(|row| row.job.id).collect();
    let owners: Vec<_> = ids.iter().map(|id| Uuid::from_bytes(*id.as_bytes())).collect();
    let results = results_brief(conn, &ids).await?;
    let counts = delivery_counts_of(conn, &owners).await?;
    Ok(rows
        .iter()
        .zip(&owners)
        .map(|(row, owner)| {
            let result = results.get(&(row.job.id, row.job.run));
            object(api, row, result, &counts.get(owner).copied().unwrap_or_default())
        })
        .collect())
}
