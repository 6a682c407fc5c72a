//! From the output of a handler to the output of its job: find, announce, store, tell, wait, replace.

use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ringback_contracts::{attempt_to_wire, v1};
use ringback_domain::ArtifactId;
use ringback_domain::artifact::{
    ArtifactState, Found, Shape, Shown, Source, Wanted, file_name, hex, render, replace, scan,
};
use ringback_service_runtime::blobs::{BlobError, BlobKey};
use ringback_service_runtime::fault;
use ringback_service_runtime::time::now_ms;
use v1::artifact_reply::Reply;
use v1::artifact_request::Request;

use super::ask::{Refused, Wait, ask, wire};
use super::files::{Pieces, StoreFileError, StoredFile, store, type_of};
use super::{Keeper, Work, comfyui};
use crate::executor::End;

/// A look at the tracker's rows, in case an announcement was lost.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// A blob store that is away is asked again after this time.
const STORE_AGAIN: Duration = Duration::from_secs(1);
const STORE_TRIES: u32 = 5;

/// A value of the output that becomes a file.
pub(super) struct Item {
    span: Range<usize>,
    from: From,
    pub(super) name: String,
    pub(super) content_type: String,
    shape: Shape,
}

enum From {
    /// A path, as told, and below the outbox.
    File {
        told: String,
        relative: PathBuf,
    },
    Base64(String),
}

/// An item that became an artefact.
struct Artifact {
    item: Item,
    id: ArtifactId,
    key: BlobKey,
    stored: Option<StoredFile>,
    url: String,
    confirmed: Option<bool>,
}

/// Deals with all files of an output; answers the end of the job.
pub(super) async fn run(keeper: &Keeper, work: Work) -> End {
    let began = Instant::now();
    match try_run(keeper, &work, began).await {
        Ok(output) => End::Success(Some(output.into())),
        Err(end) => end,
    }
}

async fn try_run(keeper: &Keeper, work: &Work, began: Instant) -> Result<Vec<u8>, End> {
    let items = items_of(keeper, work).await;
    if items.is_empty() {
        return Ok(work.output.to_vec());
    }
    if items.len() > keeper.config.max_files as usize {
        let max = keeper.config.max_files;
        return Err(failure(
            "TooManyArtifacts",
            format!("the output names {} files; artifacts.max_files is {max}", items.len()),
        ));
    }
    let uploads =
        comfyui::Uploads::of(keeper, &work.input).map_err(|error| failure("BadUploadUrls", error))?;
    let (mut places, mut images, mut rest, mut taken) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for item in items {
        if let From::File { relative, .. } = &item.from {
            taken.push(relative.clone());
        }
        match uploads.url_for(&item.name, images.len()) {
            Some(url) => {
                let shown = uploads.put(keeper, work, &item, url).await?;
                let told = render(
                    Shape::Uploaded,
                    &Shown {
                        url: &shown,
                        filename: &item.name,
                        content_type: &item.content_type,
                        size_bytes: 0,
                        sha256: "",
                        confirmed: None,
                    },
                );
                images.push(told.to_string());
                places.push((item.span, told.to_string()));
            }
            None => rest.push(item),
        }
    }
    let artifacts = if rest.is_empty() { Vec::new() } else { make(keeper, work, rest).await? };
    let size_bytes: u64 = artifacts.iter().filter_map(|a| a.stored.as_ref()).map(|s| s.size_bytes).sum();
    tracing::info!(
        job_id = %work.key.job, files = artifacts.len() + images.len(), size_bytes, ms = millis(began),
        "the job's files are dealt with"
    );
    places.extend(artifacts.iter().map(|a| (a.item.span.clone(), shown(a))));
    places.sort_by_key(|(span, _)| span.start);
    let output = replace(&work.output, &places);
    let output = if images.is_empty() { output } else { comfyui::list_images(output, &images) };
    if !keeper.config.keep_files
        && let Some(outbox) = keeper.outbox.clone()
    {
        let _ = tokio::task::spawn_blocking(move || taken.iter().for_each(|file| outbox.remove(file))).await;
    }
    Ok(output)
}

fn shown(a: &Artifact) -> String {
    let (size_bytes, sha256) =
        a.stored.as_ref().map_or((0, String::new()), |s| (s.size_bytes, hex(&s.sha256)));
    let shown = Shown {
        url: &a.url,
        filename: &a.item.name,
        content_type: &a.item.content_type,
        size_bytes,
        sha256: &sha256,
        confirmed: a.confirmed,
    };
    render(a.item.shape, &shown).to_string()
}

/// The values that are files.
async fn items_of(keeper: &Keeper, work: &Work) -> Vec<Item> {
    let wanted = Wanted {
        paths: (keeper.config.paths || keeper.config.comfyui) && keeper.outbox.is_some(),
        base64: keeper.config.base64 || keeper.config.comfyui,
    };
    let (output, outbox, since_ms) = (work.output.clone(), keeper.outbox.clone(), work.started_at_ms);
    // File systems may be slow, and base64 long.
    let found = tokio::task::spawn_blocking(move || {
        scan(&output, wanted)
            .into_iter()
            .filter_map(|found| {
                let from = match &found.source {
                    Source::Path(told) => {
                        let taken = outbox.as_ref()?.open(told, since_ms)?;
                        From::File { told: told.to_string(), relative: taken.relative }
                    }
                    Source::Base64(text) if Pieces::base64_is_valid(text) => From::Base64(text.to_string()),
                    Source::Base64(_) => return None,
                };
                Some(item_of(found, from))
            })
            .collect()
    });
    found.await.unwrap_or_default()
}

fn item_of(found: Found<'_>, from: From) -> Item {
    let name = match (&from, &found.name) {
        (_, Some(name)) => file_name(name),
        (From::File { told, .. }, None) => file_name(told),
        (From::Base64(_), None) => {
            let kind = found.content_type.as_deref().unwrap_or_default();
            let extension = kind.rsplit_once('/').map_or("bin", |(_, e)| e);
            let plain = extension.chars().all(|c| c.is_ascii_alphanumeric()) && extension.len() <= 8;
            format!("file.{}", if plain && !extension.is_empty() { extension } else { "bin" })
        }
    };
    let content_type = found
        .content_type
        .filter(|kind| kind.len() <= 100 && kind.bytes().all(|b| b.is_ascii_graphic() || b == b' '))
        .unwrap_or_else(|| type_of(&name).to_owned());
    let shape = if found.comfyui { Shape::ComfyUi } else { Shape::Native };
    Item { span: found.span, from, name, content_type, shape }
}

/// The bytes of an item. None: its file has vanished.
pub(super) async fn pieces_of(keeper: &Keeper, work: &Work, item: &Item) -> Option<Pieces> {
    match &item.from {
        From::Base64(text) => Some(Pieces::base64(text)),
        From::File { told, .. } => {
            let (outbox, told, since_ms) = (keeper.outbox.clone()?, told.clone(), work.started_at_ms);
            let opened = tokio::task::spawn_blocking(move || outbox.open(&told, since_ms)).await;
            opened.ok().flatten().map(|taken| Pieces::File(taken.file))
        }
    }
}

/// Announces, stores and tells; waits where it is asked for.
async fn make(keeper: &Keeper, work: &Work, items: Vec<Item>) -> Result<Vec<Artifact>, End> {
    let mut artifacts = items.into_iter().map(|item| named(work, item)).collect::<Result<Vec<_>, _>>()?;
    let attempt = attempt_to_wire(&work.key.job, &work.key.attempt);
    let keep_ms = keeper.config.keep_ms;
    let reserve = v1::ReserveArtifacts {
        worker_id: keeper.shared.worker_id.clone(),
        attempt: Some(attempt.clone()),
        started_at_ms: work.started_at_ms,
        artifacts: artifacts
            .iter()
            .map(|a| v1::NewArtifact {
                id: wire(&a.id),
                name: a.item.name.clone(),
                content_type: a.item.content_type.clone(),
                blob_key: a.key.as_str().to_owned(),
            })
            .collect(),
        keep_ms,
    };
    tell(keeper, Request::Reserve(reserve)).await?;
    for artifact in &mut artifacts {
        let stored = store_one(keeper, work, artifact).await?;
        artifact.stored = Some(stored);
    }
    fault::point("worker.artifact.stored");
    let confirmation = keeper.confirmation_of(work);
    // Before anybody hears of them: the confirmation may be quicker than the answer.
    let wait = keeper.shared.artifact_waits.begin(artifacts.iter().map(|a| a.id).collect());
    let ready = v1::ReadyArtifacts {
        worker_id: keeper.shared.worker_id.clone(),
        attempt: Some(attempt),
        artifacts: artifacts
            .iter()
            .filter_map(|a| {
                let stored = a.stored.as_ref()?;
                let (size_bytes, sha256) = (stored.size_bytes, stored.sha256.clone().into());
                Some(v1::StoredArtifact { id: wire(&a.id), size_bytes, sha256 })
            })
            .collect(),
        keep_ms,
        confirm: confirmation.map(|(platform, wait_ms)| v1::ConfirmWish {
            receiver_url: platform.receiver_url.clone(),
            wait_ms,
        }),
    };
    let Reply::Links(links) = tell(keeper, Request::Ready(ready)).await? else {
        return Err(failure("ArtifactRefused", "the tracker gave no links for the job's files".to_owned()));
    };
    for link in links.links {
        if let Some(artifact) = artifacts.iter_mut().find(|a| a.id.as_bytes()[..] == link.id[..]) {
            artifact.url = link.download_url;
        }
    }
    fault::point("worker.artifact.ready");
    if let Some((_, wait_ms)) = confirmation {
        confirmed(keeper, work, Duration::from_millis(wait_ms), &wait, &mut artifacts).await?;
    }
    Ok(artifacts)
}

fn named(work: &Work, item: Item) -> Result<Artifact, End> {
    let now = u64::try_from(now_ms()).unwrap_or(0);
    let id = ArtifactId::of_job(&work.key.job, now, rand::random());
    let key = BlobKey::new(format!("art/{}/{}", work.key.job.simple(), id.simple()))
        .map_err(|error| failure("ArtifactRefused", error.to_string()))?;
    Ok(Artifact { item, id, key, stored: None, url: String::new(), confirmed: None })
}

async fn tell(keeper: &Keeper, request: Request) -> Result<Reply, End> {
    let timeout = keeper.shared.settings.request_timeout;
    ask(&keeper.shared.bus, timeout, request).await.map_err(|refused| match refused {
        Refused::Obsolete => End::Stopped,
        Refused::Otherwise => failure(
            "ArtifactRefused",
            "the job's files were refused; the worker's log has the reason".to_owned(),
        ),
    })
}

async fn store_one(keeper: &Keeper, work: &Work, artifact: &Artifact) -> Result<StoredFile, End> {
    let mut tries = 0;
    loop {
        let pieces = pieces_of(keeper, work, &artifact.item).await.ok_or_else(vanished)?;
        let began = Instant::now();
        match store(&keeper.shared.blobs, &artifact.key, pieces, keeper.config.max_bytes).await {
            Ok(stored) => {
                tracing::debug!(
                    job_id = %work.key.job, artifact_id = %artifact.id, size_bytes = stored.size_bytes, ms = millis(began),
                    "file stored"
                );
                return Ok(stored);
            }
            Err(StoreFileError::Blob(BlobError::Transient(error))) => {
                tries += 1;
                tracing::warn!(%error, tries, "a job's file cannot be stored now");
                if tries >= STORE_TRIES {
                    return Err(End::HandBack { reason: "the job's files cannot be stored now" });
                }
                tokio::time::sleep(STORE_AGAIN).await;
            }
            Err(StoreFileError::Blob(BlobError::TooLarge { max_bytes, .. })) => {
                let name = &artifact.item.name;
                return Err(failure(
                    "ArtifactTooLarge",
                    format!("the file {name} is larger than {max_bytes} bytes (artifacts.max_bytes)"),
                ));
            }
            Err(error) => {
                let name = &artifact.item.name;
                return Err(failure("ArtifactUnreadable", format!("the file {name}: {error}")));
            }
        }
    }
}

/// Waits until every receiver has its file, and no longer. What is not confirmed in time is told so.
async fn confirmed(
    keeper: &Keeper,
    work: &Work,
    longest: Duration,
    wait: &Wait,
    artifacts: &mut [Artifact],
) -> Result<(), End> {
    let began = Instant::now();
    let until = (began + longest).min(work.limit);
    let ids: Vec<_> = wait.ids.iter().map(wire).collect();
    let mut open = true;
    while open && Instant::now() < until && !keeper.cut.is_cancelled() {
        let look = Request::Look(v1::LookAtArtifacts { ids: ids.clone() });
        let looked = tokio::time::timeout_at(until.into(), tell(keeper, look)).await;
        if let Ok(reply) = looked {
            open = note(artifacts, &reply?);
        }
        if open {
            let pause = until.min(Instant::now() + LOOK_EVERY);
            tokio::select! {
                () = wait.woken() => {}
                () = tokio::time::sleep_until(pause.into()) => {}
                () = keeper.cut.cancelled() => {}
            }
        }
    }
    if open {
        let close = Request::Close(v1::CloseArtifacts { ids });
        note(artifacts, &tell(keeper, close).await?);
    }
    let all = artifacts.iter().all(|a| a.confirmed == Some(true));
    let end = if all { "confirmed" } else { "unconfirmed" };
    let endpoint = keeper.endpoint.clone();
    metrics::counter!("ringback_worker_confirmations_total", "endpoint" => endpoint, "mode" => "platform", "end" => end)
        .increment(1);
    metrics::histogram!("ringback_worker_confirmation_seconds", "mode" => "platform", "end" => end)
        .record(began.elapsed());
    let ms = millis(began);
    if all {
        tracing::info!(job_id = %work.key.job, ms, "the receiver confirmed the job's files");
    } else {
        tracing::warn!(job_id = %work.key.job, ms, "the job ends without its receiver's confirmation");
    }
    Ok(())
}

/// Notes what the tracker says; answers whether anything is still waited for.
fn note(artifacts: &mut [Artifact], reply: &Reply) -> bool {
    let Reply::States(states) = reply else { return true };
    let mut open = false;
    for artifact in artifacts {
        let told = states.states.iter().find(|s| s.id[..] == artifact.id.as_bytes()[..]);
        let state = told.and_then(|s| ArtifactState::from_code(i64::from(s.state)));
        artifact.confirmed = Some(state == Some(ArtifactState::Confirmed));
        open |= matches!(state, Some(ArtifactState::Ready | ArtifactState::Uploading));
    }
    open
}

pub(super) fn failure(kind: &str, error: String) -> End {
    End::Failure { error, error_type: kind.to_owned(), output: None }
}

pub(super) fn vanished() -> End {
    failure("ArtifactUnreadable", "a file that the output names has vanished before it was stored".to_owned())
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
