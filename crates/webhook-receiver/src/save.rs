//! Ready handlers: they save what events bring into a folder.

use std::sync::Arc;
use std::time::Instant;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _, stream};
use ringback_service_runtime::redact_url;
use url::Url;

use crate::event::{ArtifactNotice, Event, EventData, RunflowCallback, RunpodJob};
use crate::fetch::{Expected, Fetcher};
use crate::observe::{Observer, Step};
use crate::router::{HandlerError, Received, Router};
use crate::store::{Journal, SavedFile, StoreError};
use ringback_domain::artifact::SafeName;

/// Most links of one output that are copied.
pub const MAX_LINKS: usize = 200;
/// Links of one output copied at the same time.
const LINKS_AT_ONCE: usize = 4;

/// Saves artefacts and results.
#[derive(Debug, Clone)]
pub struct Saver {
    fetcher: Fetcher,
    journal: Arc<dyn Journal>,
    observer: Observer,
}

impl From<StoreError> for HandlerError {
    fn from(error: StoreError) -> Self {
        Self::Transient(error.to_string())
    }
}

impl Saver {
    /// Saves through `fetcher` and writes down in `journal` what was saved.
    #[must_use]
    pub fn new(fetcher: Fetcher, journal: Arc<dyn Journal>, observer: Observer) -> Self {
        Self { fetcher, journal, observer }
    }

    /// Registers the handlers: artefacts are downloaded and confirmed, results of jobs, runs and batches are saved as
    /// JSON together with their audio or their linked files, other known events are noted. A pattern that has a handler
    /// keeps it.
    #[must_use]
    pub fn register(self, router: Router) -> Router {
        let mut router = router;
        for pattern in ["artifact.*", "runpod.*", "runflow.*", "ringback.batch.*", "job.*"] {
            if router.has(pattern) {
                continue;
            }
            let saver = self.clone();
            router = router.on(pattern, move |received| {
                let saver = saver.clone();
                async move { saver.handle(&received).await }
            });
        }
        for pattern in
            ["completion.*", "batch.*", "usage.*", "model.*", "worker.*", "webhook.*", "delivery.*"]
        {
            if !router.has(pattern) {
                router = router.on(pattern, |_| async { Ok(()) });
            }
        }
        router
    }

    async fn handle(&self, received: &Received) -> Result<(), HandlerError> {
        match &received.event {
            Event::Artifact(notice) => self.artifact(received, notice).await,
            Event::Runpod(job) if job.status.is_terminal() => self.job(received, job).await,
            Event::Runflow(callback) => self.run(received, callback).await,
            Event::Batch(batch) => self.json(received, &batch.batch_id).await.map(|_| ()),
            Event::Standard(event) => match &event.data {
                EventData::Artifact(data) => {
                    let Some(download_url) = data.download_url.clone() else { return Ok(()) };
                    let notice = ArtifactNotice {
                        job_id: data.job_id.clone(),
                        filename: data.filename.clone().unwrap_or_else(|| data.job_id.clone()),
                        download_url,
                        confirmation_url: data.confirmation_url.clone().unwrap_or_default(),
                        sha256: data.sha256.clone(),
                        size_bytes: data.size_bytes,
                    };
                    self.artifact(received, &notice).await
                }
                EventData::Job(data) if received.event.ended_job().is_some() => {
                    self.json(received, &data.job_id).await.map(|_| ())
                }
                _ => Ok(()),
            },
            Event::Runpod(_) => Ok(()),
        }
    }

    /// Row B2: download, write down, confirm. A second try after the download only confirms.
    async fn artifact(&self, received: &Received, notice: &ArtifactNotice) -> Result<(), HandlerError> {
        let name = SafeName::from_untrusted(&notice.filename);
        let expected = Expected { sha256: notice.sha256.clone(), size_bytes: notice.size_bytes };
        let file = self.item(received, &notice.job_id, 0, &notice.download_url, &name, &expected).await?;
        if notice.confirmation_url.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        let confirmed = self.fetcher.confirm(&notice.confirmation_url, &notice.job_id, &file).await;
        let detail = match &confirmed {
            Ok(()) => redact_url(&notice.confirmation_url),
            Err(error) => error.to_string(),
        };
        self.tell(received, &notice.job_id, "confirmed", "confirm failed", detail, begun, confirmed.is_ok());
        confirmed
    }

    /// Row A3: the body as it came, and the audio inside.
    async fn job(&self, received: &Received, job: &RunpodJob) -> Result<(), HandlerError> {
        self.json(received, &job.id).await?;
        if let Some(error) = &job.error {
            let detail = error.chars().take(500).collect();
            self.tell(received, &job.id, "", "job failed", detail, Instant::now(), false);
        }
        let Some(text) = job.audio_base64() else { return Ok(()) };
        if self.journal.file(&received.key, 1).await?.is_some() {
            return Ok(());
        }
        let begun = Instant::now();
        let audio = decode(&text).map_err(|error| {
            HandlerError::Permanent(format!("output.audio_base64 is not base64: {error}"))
        })?;
        let name = SafeName::from_untrusted(&format!("{}.{}", job.id, extension(&audio)));
        self.keep(received, &job.id, 1, Bytes::from(audio), &name, begun).await.map(|_| ())
    }

    /// Row D5: the body as it came, and a copy of each linked file, whose links are short-lived.
    async fn run(&self, received: &Received, callback: &RunflowCallback) -> Result<(), HandlerError> {
        let subject = callback.run_id.as_deref().or(callback.batch_id.as_deref()).unwrap_or_default();
        self.json(received, subject).await?;
        let links = callback.links(MAX_LINKS).map_err(|error| HandlerError::Permanent(error.to_string()))?;
        let copies: Vec<BoxFuture<'_, Result<(), HandlerError>>> = links
            .iter()
            .zip(1_u32..)
            .map(|(link, item)| self.copy(received, subject, item, link).boxed())
            .collect();
        let results: Vec<Result<(), HandlerError>> =
            stream::iter(copies).buffer_unordered(LINKS_AT_ONCE).collect().await;
        // One that may work later keeps the event alive, whatever became of the others.
        let mut failures: Vec<HandlerError> = results.into_iter().filter_map(Result::err).collect();
        failures.sort_by_key(|error| matches!(error, HandlerError::Permanent(_)));
        failures.into_iter().next().map_or(Ok(()), Err)
    }

    async fn copy(
        &self,
        received: &Received,
        subject: &str,
        item: u32,
        link: &str,
    ) -> Result<(), HandlerError> {
        let name = link_name(subject, item, link);
        self.item(received, subject, item, link, &name, &Expected::default()).await.map(|_| ())
    }

    async fn json(&self, received: &Received, subject: &str) -> Result<SavedFile, HandlerError> {
        if let Some(file) = self.journal.file(&received.key, 0).await? {
            return Ok(file);
        }
        let name = SafeName::from_untrusted(&format!("{subject}.json"));
        self.keep(received, subject, 0, received.body.clone(), &name, Instant::now()).await
    }

    async fn keep(
        &self,
        received: &Received,
        subject: &str,
        item: u32,
        bytes: Bytes,
        name: &SafeName,
        begun: Instant,
    ) -> Result<SavedFile, HandlerError> {
        let file = self.fetcher.save(bytes, name).await?;
        self.journal.saved(&received.key, item, file.clone()).await?;
        let detail = format!("{} ({} bytes)", file.name, file.size_bytes);
        self.tell(received, subject, "saved", "", detail, begun, true);
        Ok(file)
    }

    /// A downloaded file of an event, fetched only if it is not there yet.
    async fn item(
        &self,
        received: &Received,
        subject: &str,
        item: u32,
        url: &str,
        name: &SafeName,
        expected: &Expected,
    ) -> Result<SavedFile, HandlerError> {
        if let Some(file) = self.journal.file(&received.key, item).await? {
            return Ok(file);
        }
        let begun = Instant::now();
        let fetched = self.fetcher.fetch(url, name, expected).await;
        let detail = match &fetched {
            Ok(file) => format!("{} ({} bytes)", file.name, file.size_bytes),
            Err(error) => format!("{} from {}", error, redact_url(url)),
        };
        self.tell(received, subject, "downloaded", "download failed", detail, begun, fetched.is_ok());
        let file = fetched?;
        ringback_service_runtime::fault::point("receiver.saved.before");
        self.journal.saved(&received.key, item, file.clone()).await?;
        Ok(file)
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one line")]
    fn tell(
        &self,
        received: &Received,
        subject: &str,
        done: &'static str,
        failed: &'static str,
        detail: String,
        begun: Instant,
        ok: bool,
    ) {
        self.observer.tell(&Step {
            name: if ok { done } else { failed },
            kind: received.kind.clone(),
            subject: subject.to_owned(),
            detail,
            took: Some(begun.elapsed()),
            failed: !ok,
        });
    }
}

/// Base64 as senders write it: with or without padding, broken into lines, or as a `data:` URL.
fn decode(text: &str) -> Result<Vec<u8>, base64::DecodeError> {
    const LENIENT: GeneralPurpose = GeneralPurpose::new(
        &alphabet::STANDARD,
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
    );
    let data = text
        .strip_prefix("data:")
        .and_then(|rest| rest.split_once(";base64,"))
        .map_or(text, |(_, data)| data);
    if data.bytes().any(|b| b.is_ascii_whitespace()) {
        let joined: Vec<u8> = data.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
        return LENIENT.decode(joined);
    }
    LENIENT.decode(data)
}

/// The usual extension of an audio file, by its first bytes.
fn extension(bytes: &[u8]) -> &'static str {
    match bytes {
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'A', b'V', b'E', ..] => "wav",
        [b'I', b'D', b'3', ..] | [0xff, 0xe2..=0xff, ..] => "mp3",
        [b'O', b'g', b'g', b'S', ..] => "ogg",
        [b'f', b'L', b'a', b'C', ..] => "flac",
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => "m4a",
        [0x1a, 0x45, 0xdf, 0xa3, ..] => "webm",
        _ => "bin",
    }
}

/// A copy is called after its run, its number, and the last part of its path.
fn link_name(subject: &str, item: u32, link: &str) -> SafeName {
    let path = Url::parse(link).ok();
    let last = path.as_ref().and_then(|url| url.path_segments()?.rfind(|part| !part.is_empty()));
    SafeName::from_untrusted(&format!("{subject}-{item}-{}", last.unwrap_or("file")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read_as_senders_write_it() {
        for text in ["UklGRg==", "UklGRg", "Ukl\nGRg==\r\n", "data:audio/wav;base64,UklGRg=="] {
            assert_eq!(decode(text).unwrap(), b"RIFF", "{text}");
        }
        for text in ["U*", "data:audio/wav;base64,%%%"] {
            assert!(decode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn audio_is_known_by_its_first_bytes() {
        for (bytes, expected) in [
            (b"RIFF\0\0\0\0WAVEfmt ".as_slice(), "wav"),
            (b"ID3\x04", "mp3"),
            (b"\xff\xfb\x90", "mp3"),
            (b"OggS", "ogg"),
            (b"fLaC", "flac"),
            (b"\0\0\0\x20ftypM4A ", "m4a"),
            (b"", "bin"),
            (b"text", "bin"),
        ] {
            assert_eq!(extension(bytes), expected);
        }
    }

    #[test]
    fn a_copy_is_called_after_run_number_and_path() {
        for (link, expected) in [
            ("https://cdn.example/a/b/out.png?X-Sig=1#f", "r1-2-out.png"),
            ("https://cdn.example/", "r1-2-file"),
            ("https://cdn.example/a/..%2f..%2fx", "r1-2-.._2f.._2fx"),
            ("https://cdn.example/a/%2e%2e/x/", "r1-2-x"),
        ] {
            assert_eq!(link_name("r1", 2, link).as_str(), expected);
        }
    }
}
