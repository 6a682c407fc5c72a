//! Files of handlers: which may be taken, and their way into the blob store.
//!
//! A text in an output is chosen by a handler, perhaps by its client. So only files below one folder are taken, each
//! component is opened without following links, and the file must have been written during the job: an echoed name of
//! another job's file, or of the handler's own code, is just a text.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use bytes::Bytes;
use ringback_service_runtime::blobs::{BlobError, BlobKey, BlobStore};
use rustix::fs::{AtFlags, Mode, OFlags};
use sha2::{Digest as _, Sha256};

/// Bytes read at once.
const PIECE_BYTES: usize = 1024 * 1024;
/// File systems and clocks disagree by less than this.
const CLOCK_SLACK_MS: i64 = 2_000;

/// Where an endpoint's handlers leave their files.
#[derive(Clone, Debug)]
pub(crate) struct Outbox {
    /// The handler's working folder.
    pub(crate) cwd: PathBuf,
    /// The folder below it that files are taken from.
    pub(crate) folder: PathBuf,
}

/// An open file that may be taken.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) file: File,
    pub(crate) size_bytes: u64,
    /// Below the outbox.
    pub(crate) relative: PathBuf,
}

impl Outbox {
    fn root(&self) -> PathBuf {
        self.cwd.join(&self.folder)
    }

    /// Makes the folder. Done before the first child, so that children with folders of their own share it.
    pub(crate) fn prepare(&self) -> std::io::Result<()> {
        std::fs::create_dir_all(self.root())
    }

    /// Opens the file that a text names, if there is one that may be taken. Blocks.
    pub(crate) fn open(&self, text: &str, since_ms: i64) -> Option<Taken> {
        let root = std::fs::canonicalize(self.root()).ok()?;
        let path = Path::new(text);
        // As the handler means it, or as a bare name in the folder.
        [self.cwd.join(path), root.join(path)].iter().find_map(|path| open_below(&root, path, since_ms))
    }

    /// Opens a file directly in the folder, of any age. Blocks.
    pub(crate) fn open_named(&self, name: &str) -> Option<Taken> {
        let root = std::fs::canonicalize(self.root()).ok()?;
        open_below(&root, &root.join(name), 0)
    }

    /// Removes a file that was taken. Blocks.
    pub(crate) fn remove(&self, taken: &Path) {
        let gone = std::fs::canonicalize(self.root())
            .ok()
            .and_then(|root| folder_of(&root, taken))
            .zip(taken.file_name())
            .map(|(folder, name)| rustix::fs::unlinkat(folder, name, AtFlags::empty()));
        if let Some(Err(error)) = gone {
            tracing::debug!(%error, "a file that became an artefact was not removed");
        }
    }
}

/// Opens the folder that holds `relative`, link by link refused.
fn folder_of(root: &Path, relative: &Path) -> Option<rustix::fd::OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut folder = rustix::fs::open(root, flags, Mode::empty()).ok()?;
    for part in relative.parent()?.components() {
        let Component::Normal(name) = part else { return None };
        folder = rustix::fs::openat(&folder, name, flags, Mode::empty()).ok()?;
    }
    Some(folder)
}

fn open_below(root: &Path, path: &Path, since_ms: i64) -> Option<Taken> {
    let name = path.file_name()?;
    // The folder may be reached by a link that we made (a child's own working folder); the file may not.
    let parent = std::fs::canonicalize(path.parent()?).ok()?;
    let relative = parent.strip_prefix(root).ok()?.join(name);
    let folder = folder_of(root, &relative)?;
    // NONBLOCK: a pipe in its place must not hold us.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(folder, name, flags, Mode::empty()).ok()?);
    let metadata = file.metadata().ok()?;
    // The time of the last change of the inode: unlike the time of writing, nobody can set it.
    let changed_ms = metadata.ctime().saturating_mul(1_000) + metadata.ctime_nsec() / 1_000_000;
    (metadata.is_file() && changed_ms >= since_ms - CLOCK_SLACK_MS).then(|| Taken {
        size_bytes: metadata.len(),
        file,
        relative,
    })
}

/// Why a file did not become a blob.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreFileError {
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error("the file cannot be read: {0}")]
    Read(std::io::Error),
    #[error("not base64")]
    NotBase64,
}

/// What was stored.
#[derive(Clone, Debug)]
pub(crate) struct StoredFile {
    pub(crate) size_bytes: u64,
    pub(crate) sha256: Vec<u8>,
}

/// The bytes of a file-to-be, piece by piece.
pub(crate) enum Pieces {
    File(File),
    Base64 { text: String, at: usize },
}

impl Pieces {
    /// Base64 text. A broken one is told by the first piece or a later one.
    pub(crate) fn base64(text: &str) -> Self {
        // Wrapped lines are common; they are no part of the data.
        let text = if text.contains(|c: char| c.is_ascii_whitespace()) {
            text.chars().filter(|c| !c.is_ascii_whitespace()).collect()
        } else {
            text.to_owned()
        };
        Self::Base64 { text, at: 0 }
    }

    /// The next piece; empty at the end.
    pub(crate) async fn next(self) -> Result<(Bytes, Self), StoreFileError> {
        match self {
            Self::File(mut file) => tokio::task::spawn_blocking(move || {
                let mut piece = Vec::new();
                (&mut file).take(PIECE_BYTES as u64).read_to_end(&mut piece).map_err(StoreFileError::Read)?;
                Ok((piece.into(), Self::File(file)))
            })
            .await
            .map_err(|error| StoreFileError::Read(error.into()))?,
            Self::Base64 { text, at } => {
                let end = text.len().min(at + PIECE_BYTES / 3 * 4);
                let part = text.get(at..end).ok_or(StoreFileError::NotBase64)?;
                let decoded = STANDARD
                    .decode(part)
                    .or_else(|_| STANDARD_NO_PAD.decode(part))
                    .map_err(|_| StoreFileError::NotBase64)?;
                Ok((decoded.into(), Self::Base64 { text, at: end }))
            }
        }
    }

    /// How many bytes there are.
    pub(crate) fn length(&self) -> Result<u64, StoreFileError> {
        match self {
            Self::File(file) => Ok(file.metadata().map_err(StoreFileError::Read)?.len()),
            Self::Base64 { text, at } => {
                let left = text.get(*at..).unwrap_or_default().trim_end_matches('=').len() as u64;
                Ok(left / 4 * 3 + (left % 4).saturating_sub(1))
            }
        }
    }

    /// Reads everything only to see that it can be read, and how long it is.
    pub(crate) fn base64_is_valid(text: &str) -> bool {
        let Self::Base64 { text, .. } = Self::base64(text) else { return false };
        if text.is_empty() {
            return false;
        }
        let mut at = 0;
        while at < text.len() {
            let end = text.len().min(at + PIECE_BYTES / 3 * 4);
            let good = text
                .get(at..end)
                .is_some_and(|part| STANDARD.decode(part).is_ok() || STANDARD_NO_PAD.decode(part).is_ok());
            if !good {
                return false;
            }
            at = end;
        }
        true
    }
}

/// Stores pieces as a blob of at most `max_bytes`.
pub(crate) async fn store(
    blobs: &BlobStore,
    key: &BlobKey,
    mut pieces: Pieces,
    max_bytes: u64,
) -> Result<StoredFile, StoreFileError> {
    let mut writer = blobs.writer(key, max_bytes).await?;
    let mut hash = Sha256::new();
    let written = async {
        loop {
            let (piece, rest) = pieces.next().await?;
            if piece.is_empty() {
                return Ok(());
            }
            hash.update(&piece);
            writer.write(piece).await?;
            pieces = rest;
        }
    }
    .await;
    if let Err(error) = written {
        writer.abort().await;
        return Err(error);
    }
    let size_bytes = writer.finish().await?;
    Ok(StoredFile { size_bytes, sha256: hash.finalize().to_vec() })
}

/// A type for a name, where nothing better was told. Only what browsers handle well is named.
pub(crate) fn type_of(name: &str) -> &'static str {
    let extension = name.rsplit_once('.').map(|(_, e)| e.to_ascii_lowercase()).unwrap_or_default();
    match extension.as_str() {
        "wav" => "audio/wav",
        "mp3" => "audio/mpeg",
        "flac" => "audio/flac",
        "ogg" | "opus" => "audio/ogg",
        "m4a" => "audio/mp4",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "webp" => "image/webp",
        "gif" => "image/gif",
        "mp4" => "video/mp4",
        "webm" => "video/webm",
        "json" => "application/json",
        "txt" | "srt" | "vtt" | "log" | "csv" => "text/plain; charset=utf-8",
        "pdf" => "application/pdf",
        "zip" => "application/zip",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringback_service_runtime::config::BlobsConfig;
    use ringback_service_runtime::time::now_ms;

    fn outbox() -> (tempfile::TempDir, Outbox) {
        let cwd = tempfile::tempdir().expect("folder");
        let outbox = Outbox { cwd: cwd.path().to_owned(), folder: "output".into() };
        outbox.prepare().expect("made");
        (cwd, outbox)
    }

    #[test]
    fn only_new_plain_files_below_the_folder_are_taken() {
        let (cwd, outbox) = outbox();
        let at = |path: &str| cwd.path().join(path);
        std::fs::create_dir(at("output/sub")).expect("folder");
        std::fs::write(at("output/a.wav"), "a").expect("file");
        std::fs::write(at("output/sub/b.wav"), "bb").expect("file");
        std::fs::write(at("handler.py"), "secret").expect("file");
        std::os::unix::fs::symlink(at("handler.py"), at("output/link")).expect("link");
        std::os::unix::fs::symlink(cwd.path(), at("output/up")).expect("link");
        let absolute = at("output/a.wav");
        for good in
            ["output/a.wav", "a.wav", "output/sub/b.wav", "sub/b.wav", absolute.to_str().expect("utf-8")]
        {
            assert!(outbox.open(good, now_ms()).is_some(), "{good}");
        }
        for bad in [
            "handler.py",
            "../handler.py",
            "output/../handler.py",
            "output/link",
            "output/up/handler.py",
            "/etc/passwd",
            "output",
            "output/sub",
            "output/missing",
            "..",
            ".",
            "",
        ] {
            assert!(outbox.open(bad, now_ms()).is_none(), "{bad}");
        }
        // Older than the job: another job's, or part of the handler.
        assert!(outbox.open("output/a.wav", now_ms() + 60_000).is_none());
        let taken = outbox.open("sub/b.wav", 0).expect("taken");
        assert_eq!((taken.size_bytes, taken.relative.as_path()), (2, Path::new("sub/b.wav")));
        outbox.remove(&taken.relative);
        assert!(!at("output/sub/b.wav").exists());
        outbox.remove(Path::new("up/handler.py"));
        assert!(at("handler.py").exists());
    }

    #[test]
    fn a_child_with_its_own_folder_reaches_the_same_files() {
        let (cwd, outbox) = outbox();
        let private = tempfile::tempdir().expect("folder");
        std::os::unix::fs::symlink(cwd.path().join("output"), private.path().join("output")).expect("link");
        let told = private.path().join("output/x.bin");
        std::fs::write(&told, "x").expect("file");
        assert!(outbox.open(told.to_str().expect("utf-8"), 0).is_some());
    }

    #[tokio::test]
    async fn files_and_base64_are_stored_with_their_hash() {
        let (cwd, outbox) = outbox();
        let blobs = BlobStore::open(&BlobsConfig::default(), cwd.path()).expect("open");
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        std::fs::write(cwd.path().join("output/big"), &bytes).expect("file");
        let hash = Sha256::digest(&bytes).to_vec();
        let key = BlobKey::new("art/a").expect("key");
        let taken = outbox.open("big", 0).expect("taken");
        let stored = store(&blobs, &key, Pieces::File(taken.file), 1 << 30).await.expect("stored");
        assert_eq!((stored.size_bytes, &stored.sha256), (3_000_000, &hash));
        let text = STANDARD.encode(&bytes);
        let wrapped: String =
            text.as_bytes().chunks(76).flat_map(|l| [std::str::from_utf8(l).unwrap(), "\n"]).collect();
        for text in [&text, &wrapped] {
            assert!(Pieces::base64_is_valid(text));
            let stored = store(&blobs, &key, Pieces::base64(text), 1 << 30).await.expect("stored");
            assert_eq!((stored.size_bytes, &stored.sha256), (3_000_000, &hash));
        }
        assert_eq!(blobs.get(&key, 1 << 30).await.expect("read"), bytes);
        for bad in ["", "a", "äö", "ABC!", "QUJD=QUJD"] {
            assert!(!Pieces::base64_is_valid(bad), "{bad}");
        }
        let small = store(&blobs, &key, Pieces::base64(&text), 10).await;
        assert!(matches!(small, Err(StoreFileError::Blob(BlobError::TooLarge { .. }))), "{small:?}");
    }
}
