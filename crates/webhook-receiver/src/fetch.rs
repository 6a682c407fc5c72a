//! Downloads into the folder, and the confirmation that goes back (rows B2, D5).

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use ringback_domain::webhook::url::UrlError;
use ringback_egress::{Client, EgressError, Post};
use ringback_service_runtime::time::now_ms;
use serde_json::json;
use tokio::sync::mpsc;

use crate::folder::{Folder, Part};
use crate::router::HandlerError;
use crate::store::SavedFile;
use ringback_domain::artifact::SafeName;

/// Time for a download unless told otherwise (row B2).
pub const DEFAULT_DOWNLOAD_TIME: Duration = Duration::from_secs(60);
/// Largest file unless told otherwise.
pub const DEFAULT_MAX_FILE_BYTES: u64 = 2 * 1024 * 1024 * 1024;
/// Chunks between the network and the disk.
const CHUNKS_AHEAD: usize = 16;

/// What a file must be, where the sender says so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expected {
    /// Its hash, hex.
    pub sha256: Option<String>,
    /// Its length.
    pub size_bytes: Option<u64>,
}

/// Fetches files into a folder.
#[derive(Debug, Clone)]
pub struct Fetcher {
    folder: Arc<Folder>,
    client: Client,
    time: Duration,
    max_bytes: u64,
}

impl Fetcher {
    /// Downloads go through `client`, each within `time` and `max_bytes`.
    #[must_use]
    pub fn new(folder: Arc<Folder>, client: Client, time: Duration, max_bytes: u64) -> Self {
        Self { folder, client, time, max_bytes }
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Arc<Folder> {
        &self.folder
    }

    /// Downloads a file, checks it, and makes it visible.
    ///
    /// # Errors
    /// Permanent where the URL is refused, the file is too large or the server says that it is gone; else transient.
    pub async fn fetch(
        &self,
        url: &str,
        name: &SafeName,
        expected: &Expected,
    ) -> Result<SavedFile, HandlerError> {
        let checked = self.client.check(url).map_err(|error| refused("download", &error))?;
        let begun = Instant::now();
        let mut download = self
            .client
            .download(checked, self.time, self.max_bytes)
            .await
            .map_err(|error| failed("download", error))?;
        match download.status() {
            200 => {}
            status @ (401 | 403 | 410) => {
                return Err(HandlerError::Permanent(format!("download: the server answered {status}")));
            }
            status => return Err(HandlerError::Transient(format!("download: the server answered {status}"))),
        }
        let part = self.folder.begin().map_err(|error| disk(&error))?;
        let (chunks, waiting) = mpsc::channel::<Bytes>(CHUNKS_AHEAD);
        let writer = tokio::task::spawn_blocking(move || write_all(part, waiting));
        while let Some(chunk) = download.chunk().await.map_err(|error| failed("download", error))? {
            if chunks.send(chunk).await.is_err() {
                // The disk failed; the writer says why.
                break;
            }
        }
        drop(chunks);
        let part = writer
            .await
            .map_err(|error| HandlerError::Transient(error.to_string()))?
            .map_err(|error| disk(&error))?;
        tracing::debug!(took_ms = begun.elapsed().as_millis(), size_bytes = part.size_bytes(), "downloaded");
        check(&part, expected)?;
        self.publish(part, name).await
    }

    /// Saves bytes that are already here.
    ///
    /// # Errors
    /// The disk failed.
    pub async fn save(&self, bytes: Bytes, name: &SafeName) -> Result<SavedFile, HandlerError> {
        let folder = Arc::clone(&self.folder);
        let part = tokio::task::spawn_blocking(move || {
            let mut part = folder.begin()?;
            part.write(&bytes)?;
            Ok::<_, std::io::Error>(part)
        });
        let part = part.await.map_err(|error| HandlerError::Transient(error.to_string()))?;
        self.publish(part.map_err(|error| disk(&error))?, name).await
    }

    async fn publish(&self, part: Part, name: &SafeName) -> Result<SavedFile, HandlerError> {
        let (folder, name) = (Arc::clone(&self.folder), name.clone());
        let published = tokio::task::spawn_blocking(move || folder.publish(part, &name));
        published
            .await
            .map_err(|error| HandlerError::Transient(error.to_string()))?
            .map_err(|error| disk(&error))
    }

    /// Tells the sender that its file is here.
    ///
    /// # Errors
    /// The URL is refused, nobody answers, or the answer is no success.
    pub async fn confirm(&self, url: &str, job_id: &str, file: &SavedFile) -> Result<(), HandlerError> {
        let checked = self.client.check(url).map_err(|error| refused("confirmation", &error))?;
        let body = json!({
            "job_id": job_id,
            "status": "downloaded",
            "timestamp": now_ms(),
            "sha256": file.sha256,
        });
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let post = Post { url: checked, headers, body: Bytes::from(body.to_string()), deadline: None };
        let answer = self.client.post(post).await.result.map_err(|error| failed("confirmation", error))?;
        match answer.status {
            200..300 => Ok(()),
            // The sender knows nothing of the job any more: asking again changes nothing.
            status @ (404 | 410) => {
                Err(HandlerError::Permanent(format!("confirmation: the sender answered {status}")))
            }
            status => Err(HandlerError::Transient(format!("confirmation: the sender answered {status}"))),
        }
    }
}

fn write_all(part: Part, mut chunks: mpsc::Receiver<Bytes>) -> std::io::Result<Part> {
    let mut part = part;
    while let Some(chunk) = chunks.blocking_recv() {
        part.write(&chunk)?;
    }
    Ok(part)
}

/// A wrong hash or length may be a broken transfer, so it is tried again; nothing wrong ever becomes visible.
fn check(part: &Part, expected: &Expected) -> Result<(), HandlerError> {
    if let Some(size) = expected.size_bytes
        && size != part.size_bytes()
    {
        let text = format!("download: {} bytes came, {size} were announced", part.size_bytes());
        return Err(HandlerError::Transient(text));
    }
    if let Some(sha256) = &expected.sha256
        && !sha256.eq_ignore_ascii_case(&part.sha256())
    {
        let text = format!("download: the file's sha256 is {}, {sha256} was announced", part.sha256());
        return Err(HandlerError::Transient(text));
    }
    Ok(())
}

fn disk(error: &std::io::Error) -> HandlerError {
    HandlerError::Transient(format!("the file cannot be saved: {error}"))
}

fn refused(what: &str, error: &UrlError) -> HandlerError {
    HandlerError::Permanent(format!("{what}: URL refused: {error}"))
}

fn failed(what: &str, error: EgressError) -> HandlerError {
    let text = format!("{what}: {error}");
    match error {
        EgressError::Url(_)
        | EgressError::Blocked(_)
        | EgressError::TooLarge(_)
        | EgressError::Redirect(_) => HandlerError::Permanent(text),
        EgressError::Dns(_)
        | EgressError::Tls(_)
        | EgressError::Connect(_)
        | EgressError::Timeout(_)
        | EgressError::Closed(_)
        | EgressError::Withdrawn
        | EgressError::Protocol(_) => HandlerError::Transient(text),
    }
}
