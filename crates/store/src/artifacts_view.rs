//! What clients see of artefacts. Every question of a client names the project; the holder of a link has its
//! capability instead.

use std::collections::HashMap;

use ringback_domain::{ArtifactId, JobId, ProjectId};
use sea_orm::{ConnectionTrait, Value};

use crate::{
    StoreError,
    artifacts::{ArtifactRow, COLUMNS, row_of},
    sql::{self, LIST, Rows},
};

/// An artefact by its id, for somebody whose capability was checked.
///
/// # Errors
/// The database's.
pub async fn artifact_by_id<C: ConnectionTrait>(
    conn: &C,
    id: ArtifactId,
) -> Result<Option<ArtifactRow>, StoreError> {
    let row = sql::query_one(
        conn,
        &format!("SELECT {COLUMNS} FROM artifacts WHERE id = $1"),
        [sql::id(id.as_bytes())],
    )
    .await?;
    row.as_ref().map(row_of).transpose()
}

/// An artefact of a project.
///
/// # Errors
/// The database's.
pub async fn artifact<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    id: ArtifactId,
) -> Result<Option<ArtifactRow>, StoreError> {
    Ok(artifact_by_id(conn, id).await?.filter(|row| row.project == project))
}

/// The artefacts of a job, oldest first.
///
/// # Errors
/// The database's.
pub async fn artifacts_of_job<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    job: JobId,
) -> Result<Vec<ArtifactRow>, StoreError> {
    let rows = sql::query(
        conn,
        &format!("SELECT {COLUMNS} FROM artifacts WHERE job_id = $1 AND project_id = $2 ORDER BY id"),
        [sql::id(job.as_bytes()), Value::from(project.0)],
    )
    .await?;
    rows.iter().map(row_of).collect()
}

const OF_JOBS: Rows = Rows {
    name: "artifacts.of_jobs",
    before: "SELECT id, project_id, job_id, sync_id, run, attempt, worker_id, name, content_type, size_bytes, sha256, \
             blob_key, state, created_at_ms, ready_at_ms, wait_until_ms, given_up_at_ms, confirmed_at_ms, \
             confirmed_sha256, expires_at_ms, endpoint_id FROM artifacts WHERE job_id IN (",
    casts: LIST,
    after: ") ORDER BY id",
};

/// The artefacts of jobs that were read for their project.
///
/// # Errors
/// The database's.
pub async fn artifacts_of_jobs<C: ConnectionTrait>(
    conn: &C,
    jobs: &[JobId],
) -> Result<HashMap<JobId, Vec<ArtifactRow>>, StoreError> {
    let mut all: HashMap<JobId, Vec<ArtifactRow>> = HashMap::new();
    for row in OF_JOBS.query(conn, jobs, |id, v| v.push(sql::id(id.as_bytes()))).await? {
        let row = row_of(&row)?;
        all.entry(row.job).or_default().push(row);
    }
    Ok(all)
}
