//! `/v2/{endpoint}`: RunPod's client surface, for its unmodified SDKs (reference/runpod-protocol.md section 1).
//! Success is exactly 200; errors are `{"error": "..."}`.

pub(crate) mod control;
pub(crate) mod hand_over;
pub(crate) mod queue;
pub(crate) mod run;
pub(crate) mod status;
pub(crate) mod stream;

use std::{collections::HashMap, sync::Arc};

use ringback_domain::JobId;
use ringback_store::{JobRow, views::visible_job};

use crate::{auth::Principal, catalog::Endpoint, error::ApiError, state::Api};

/// A job by its public id, if the asker's project owns it, it belongs to that endpoint, and the id is spelt as it
/// was given out. Anything else is the same 404.
pub(crate) async fn find_job(
    api: &Api,
    who: &Principal,
    endpoint: &Endpoint,
    id: &str,
) -> Result<JobRow, ApiError> {
    let (job, sync) = JobId::parse_public(id).map_err(|_| ApiError::no_job())?;
    visible_job(api.store.read(), who.project, job)
        .await?
        .filter(|row| row.endpoint == endpoint.id && row.sync_id == sync)
        .ok_or_else(ApiError::no_job)
}

/// The endpoint of a path, for the key's project.
pub(crate) fn find_endpoint<'a>(
    api: &'a Api,
    who: &Principal,
    name: &str,
) -> Result<&'a Arc<Endpoint>, ApiError> {
    api.catalog.find(who.project, name)
}

/// `?wait=` in ms, brought between RunPod's bounds.
pub(crate) fn wait_ms(query: &HashMap<String, String>, default: u64, max: u64) -> Result<u64, ApiError> {
    match query.get("wait") {
        None => Ok(default),
        Some(text) => text.parse::<u64>().map(|ms| ms.min(max)).map_err(|_| {
            ApiError::bad_request("the query parameter `wait` must be a number of milliseconds")
        }),
    }
}
