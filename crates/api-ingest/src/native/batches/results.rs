//! What a batch leaves, as JSON lines.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, HeaderValue, header},
    response::Response,
};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use ringback_domain::{
    BatchId,
    batch::{BatchFile, BatchStatus},
    webhook::body::Part,
};
use ringback_store::{
    auth::ScopeSet,
    batches::{BatchItem, BatchRow, batch_items},
};

use super::{find, item_json};
use crate::{
    error::{ApiError, NativeError},
    render::pieces,
    state::Api,
};

/// Items of a result file that are read at once.
const RESULT_PAGE: u32 = 20;

/// `GET /v1/batches/{id}/results`: one JSON line per item, in order, once the batch has ended.
pub(crate) async fn results(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, NativeError> {
    let who = api.auth.authorize(&headers, ScopeSet::READ).await?;
    let row = find(&api, &who, &id).await?;
    check_ended(&row)?;
    Ok(item_lines(&api, row.id, BatchFile::Results))
}

/// The files of a batch come with its end.
pub(crate) fn check_ended(row: &BatchRow) -> Result<(), ApiError> {
    if row.status != BatchStatus::InProgress {
        return Ok(());
    }
    Err(ApiError::conflict(format!(
        "the batch is IN_PROGRESS ({} of {} jobs have ended); its results come with its end",
        row.counts.ended(),
        row.counts.total
    )))
}

/// JSON lines of a batch's items, in order, read page by page while they are sent.
pub(crate) fn item_lines(api: &Arc<Api>, batch: BatchId, file: BatchFile) -> Response {
    let (api, blobs) = (Arc::clone(api), api.blobs.clone());
    let pages = stream::try_unfold(Some(0), move |from| {
        let api = Arc::clone(&api);
        async move {
            let Some(from) = from else { return Ok::<_, Broken>(None) };
            let items = batch_items(api.store.read(), batch, from, RESULT_PAGE, true).await?;
            let next =
                if items.len() < RESULT_PAGE as usize { None } else { items.last().map(|i| i.index + 1) };
            let shown = items.into_iter().filter(|item| file.has(item.status)).flat_map(result_line);
            Ok(Some((shown.collect::<Vec<Part>>(), next)))
        }
    });
    let lines = pages.map_ok(move |parts| pieces(blobs.clone(), parts).map_err(Broken::from)).try_flatten();
    let mut response = Response::new(Body::from_stream(lines.boxed()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    response
}

/// A result file that broke off in the middle.
type Broken = Box<dyn std::error::Error + Send + Sync>;

/// The line of an item: what `items` shows, and its output.
fn result_line(item: BatchItem) -> Vec<Part> {
    let mut head = item_json(&item).to_string().into_bytes();
    let result = item.result;
    head.pop();
    match result {
        Some(r) if r.output_blob_key.is_some() => {
            head.extend_from_slice(b",\"output\":");
            let blob = Part::Blob { key: r.output_blob_key.unwrap_or_default(), size_bytes: r.output_bytes };
            vec![Part::Inline(head), blob, Part::Inline(b"}\n".to_vec())]
        }
        other => {
            if let Some(output) = other.and_then(|r| r.output) {
                head.extend_from_slice(b",\"output\":");
                // A line break inside of a verbatim output would split the line; between tokens it means nothing.
                head.extend(output.into_iter().map(|b| if matches!(b, b'\n' | b'\r') { b' ' } else { b }));
            }
            head.extend_from_slice(b"}\n");
            vec![Part::Inline(head)]
        }
    }
}
