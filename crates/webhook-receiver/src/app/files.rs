//! Saved files, served as attachments: what came from outside is never shown as a page of ours.

use std::fs::File;
use std::io::Read as _;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, State as Shared};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::stream;
use http::{HeaderValue, StatusCode, header};

use super::routes::Ctx;
use crate::http::problem;

/// Bytes read at a time.
const CHUNK: usize = 64 * 1024;

pub(super) async fn serve(Shared(Ctx(state)): Shared<Ctx>, Path(name): Path<String>) -> Response {
    let folder = Arc::clone(&state.folder);
    let opened = tokio::task::spawn_blocking(move || folder.read(&name)).await;
    let Ok(Ok((file, size))) = opened else {
        return problem(StatusCode::NOT_FOUND, "no_file", "there is no such file");
    };
    let mut response = Body::from_stream(stream::try_unfold(file, next)).into_response();
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, "application/octet-stream"),
        (header::CONTENT_DISPOSITION, "attachment"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CONTENT_SECURITY_POLICY, "sandbox; default-src 'none'"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert(header::CONTENT_LENGTH, size.into());
    response
}

async fn next(file: File) -> std::io::Result<Option<(Bytes, File)>> {
    let read = tokio::task::spawn_blocking(move || {
        let mut file = file;
        let mut buffer = vec![0; CHUNK];
        let n = file.read(&mut buffer)?;
        buffer.truncate(n);
        Ok::<_, std::io::Error>((n > 0).then(|| (Bytes::from(buffer), file)))
    });
    read.await.map_err(std::io::Error::other)?
}
