//! `/v1/stream`: transitions as server-sent events, as they are committed.

use std::{collections::HashMap, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::{Query, State},
    http::HeaderMap,
    response::{
        IntoResponse as _, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures::{Stream, StreamExt as _, stream};
use ringback_contracts::{job_id_of, v1};
use ringback_domain::{BatchId, EndpointId, JobStatus, ProjectId};
use ringback_store::auth::ScopeSet;
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;

use super::parameter;
use crate::{error::NativeError, render::rfc3339, state::Api};

struct Filter {
    project: ProjectId,
    endpoint: Option<EndpointId>,
    batch: Option<BatchId>,
    job: Option<String>,
}

/// `GET /v1/stream?endpoint=&batch=&job=`. A reader that is too slow gets an event `gap` with the number missed and
/// reads the jobs anew.
pub(crate) async fn stream(
    State(api): State<Arc<Api>>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let endpoint = match query.get("endpoint").filter(|name| !name.is_empty()) {
        None => None,
        Some(name) => Some(api.catalog.find(who.project, name)?.id),
    };
    let filter = Filter {
        project: who.project,
        endpoint,
        batch: parameter(&query, "batch", "a batch's id", |text| BatchId::parse(text).ok())?,
        job: query.get("job").filter(|id| !id.is_empty()).cloned(),
    };
    // Subscribed before the answer begins: nothing that follows the answer's head is missed.
    let events = events(api, filter);
    let opened = stream::once(async { Ok::<_, Infallible>(Event::default().comment("open")) });
    let keep_alive = KeepAlive::new().interval(Duration::from_secs(15)).text("alive");
    Ok(Sse::new(opened.chain(events)).keep_alive(keep_alive).into_response())
}

fn events(api: Arc<Api>, filter: Filter) -> impl Stream<Item = Result<Event, Infallible>> + Send {
    let receiver = api.waiters.stream();
    stream::unfold((api, filter, receiver), async |(api, filter, mut receiver)| {
        loop {
            let batch = tokio::select! {
                received = receiver.recv() => match received {
                    Ok(events) => events.events.iter().filter_map(|e| event_of(&api, &filter, e)).collect::<Vec<_>>(),
                    Err(RecvError::Lagged(missed)) => {
                        vec![Event::default().event("gap").data(json!({"missed": missed}).to_string())]
                    }
                    Err(RecvError::Closed) => return None,
                },
                () = api.shutdown.triggered() => return None,
            };
            if !batch.is_empty() {
                return Some((stream::iter(batch.into_iter().map(Ok)), (api, filter, receiver)));
            }
        }
    })
    .flatten()
}

fn event_of(api: &Api, filter: &Filter, e: &v1::TransitionEvent) -> Option<Event> {
    if e.project_id != filter.project.0
        || filter.endpoint.is_some_and(|wanted| wanted.0 != e.endpoint_id)
        || filter.batch.is_some_and(|wanted| wanted.as_bytes().as_slice() != &e.batch_id[..])
    {
        return None;
    }
    let id = job_id_of(&e.job_id).ok()?.public(e.sync_id);
    if filter.job.as_ref().is_some_and(|wanted| *wanted != id) {
        return None;
    }
    let status = JobStatus::from_code(i64::from(e.status))?;
    let batch = BatchId::from_slice(&e.batch_id).ok().map(|id| id.to_string());
    let data = json!({
        "job_id": id,
        "endpoint": &*api.catalog.name_of(EndpointId(e.endpoint_id)),
        "seq": e.seq,
        "status": status.as_str(),
        "run": e.run,
        "attempt": if e.attempt == 0 { None } else { Some(e.attempt) },
        "at": rfc3339(e.at_ms),
        "batch_id": batch,
        "delay_time_ms": e.delay_ms,
        "execution_time_ms": e.execution_ms,
    });
    Some(Event::default().event("transition").data(data.to_string()))
}
