//! The output folder: files appear in it whole, under safe names, never over another file.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use ringback_service_runtime::data_dir::{DataDirError, DataDirLock};
use sha2::{Digest as _, Sha256};

use crate::store::SavedFile;
use ringback_domain::artifact::{SafeName, hex};

/// Folder of our own inside the output folder; no safe name begins with a dot.
const STATE: &str = ".ringback-receiver";
/// Names tried when the wanted one is taken by another file, before one that cannot be taken.
const MAX_NUMBER: u32 = 1000;

/// The output folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// Another receiver uses it.
    #[error("the folder {dir} is in use by process {pid}; stop it or choose another folder")]
    InUse {
        /// The folder.
        dir: PathBuf,
        /// Who.
        pid: String,
    },
    /// The file system said no.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The output folder, locked for this process.
#[derive(Debug)]
pub struct Folder {
    dir: PathBuf,
    parts: PathBuf,
    lock: DataDirLock,
}

impl Folder {
    /// Makes the folder if needed, locks it, and removes what a former process did not finish.
    ///
    /// # Errors
    /// [`FolderError`].
    pub fn open(dir: &Path) -> Result<Self, FolderError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| FolderError::Io { path, source }
        };
        std::fs::create_dir_all(dir).map_err(io(dir))?;
        let dir = dir.canonicalize().map_err(io(dir))?;
        let lock = DataDirLock::acquire(&dir.join(STATE)).map_err(|error| match error {
            DataDirError::InUse { pid, .. } => FolderError::InUse { dir: dir.clone(), pid },
            DataDirError::Io { dir, source } => FolderError::Io { path: dir, source },
        })?;
        let parts = dir.join(STATE).join("parts");
        if parts.exists() {
            std::fs::remove_dir_all(&parts).map_err(io(&parts))?;
        }
        std::fs::DirBuilder::new().mode(0o700).create(&parts).map_err(io(&parts))?;
        Ok(Self { dir, parts, lock })
    }

    /// The folder, absolute.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the store's file belongs.
    #[must_use]
    pub fn store_path(&self) -> PathBuf {
        self.lock.dir().join("receiver.db")
    }

    /// Begins a file that nobody sees until it is whole.
    ///
    /// # Errors
    /// The file system's reason.
    pub fn begin(&self) -> io::Result<Part> {
        let path = self.parts.join(uuid::Uuid::now_v7().simple().to_string());
        let file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&path)?;
        Ok(Part { path: Some(path), file, hash: Sha256::new(), size_bytes: 0 })
    }

    /// Makes a finished file visible under `wanted`, or under a numbered name if another file has it. A file with the
    /// same content is taken for this one: the process died between this and writing it down.
    ///
    /// # Errors
    /// The file system's reason.
    pub fn publish(&self, part: Part, wanted: &SafeName) -> io::Result<SavedFile> {
        let mut part = part;
        part.file.sync_all()?;
        let Some(path) = part.path.take() else { return Err(io::Error::other("the part is published")) };
        let sha256 = hex(&std::mem::take(&mut part.hash).finalize());
        let published = self.claim(&path, wanted, &sha256, part.size_bytes);
        // After a link the part is a second name; after a failure it is of no use.
        let _ = std::fs::remove_file(&path);
        let name = published?;
        File::open(&self.dir)?.sync_all()?;
        Ok(SavedFile { name, sha256, size_bytes: part.size_bytes })
    }

    fn claim(&self, part: &Path, wanted: &SafeName, sha256: &str, size_bytes: u64) -> io::Result<String> {
        for number in 1..=MAX_NUMBER {
            let name = if number == 1 { wanted.clone() } else { wanted.numbered(number) };
            let target = self.dir.join(name.as_str());
            match place(part, &target) {
                Ok(()) => return Ok(name.as_str().to_owned()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    if same_content(&target, sha256, size_bytes) {
                        return Ok(name.as_str().to_owned());
                    }
                }
                Err(error) => return Err(error),
            }
        }
        let name = format!("{}-{wanted}", uuid::Uuid::now_v7().simple());
        place(part, &self.dir.join(&name))?;
        Ok(name)
    }

    /// Opens a file of the folder for reading, by its exact name. Links are not followed.
    ///
    /// # Errors
    /// `NotFound` for anything that is no plain file of this folder.
    pub fn read(&self, name: &str) -> io::Result<(File, u64)> {
        let name = SafeName::exactly(name).ok_or(io::ErrorKind::NotFound)?;
        let (file, size) = open_plain(&self.dir.join(name.as_str()))?;
        Ok((file, size))
    }
}

/// Gives `part` the name `target` unless that is taken.
fn place(part: &Path, target: &Path) -> io::Result<()> {
    match std::fs::hard_link(part, target) {
        Err(error)
            if matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied) =>
        {
            // A file system without hard links: take the name first, then put the file in its place.
            drop(OpenOptions::new().write(true).create_new(true).open(target)?);
            std::fs::rename(part, target)
        }
        other => other,
    }
}

fn open_plain(path: &Path) -> io::Result<(File, u64)> {
    let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits();
    let file = OpenOptions::new().read(true).custom_flags(flags.cast_signed()).open(path)?;
    let facts = file.metadata()?;
    if facts.is_file() { Ok((file, facts.len())) } else { Err(io::ErrorKind::NotFound.into()) }
}

fn same_content(path: &Path, sha256: &str, size_bytes: u64) -> bool {
    let read = || -> io::Result<bool> {
        let (mut file, size) = open_plain(path)?;
        if size != size_bytes {
            return Ok(false);
        }
        let (mut hash, mut buffer) = (Sha256::new(), vec![0; 64 * 1024]);
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hex(&hash.finalize()) == sha256),
                n => hash.update(&buffer[..n]),
            }
        }
    };
    read().unwrap_or(false)
}

/// A file on its way. Dropped unpublished, it is removed.
#[derive(Debug)]
pub struct Part {
    path: Option<PathBuf>,
    file: File,
    hash: Sha256,
    size_bytes: u64,
}

impl Part {
    /// Appends bytes.
    ///
    /// # Errors
    /// The file system's reason.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        self.size_bytes += bytes.len() as u64;
        Ok(())
    }

    /// Bytes so far.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The hash of the bytes so far, lower-case hex.
    #[must_use]
    pub fn sha256(&self) -> String {
        hex(&self.hash.clone().finalize())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> (tempfile::TempDir, Folder) {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(&dir.path().join("out")).unwrap();
        (dir, folder)
    }

    fn save(folder: &Folder, name: &str, bytes: &[u8]) -> String {
        let mut part = folder.begin().unwrap();
        part.write(bytes).unwrap();
        folder.publish(part, &SafeName::from_untrusted(name)).unwrap().name
    }

    #[test]
    fn a_taken_name_gets_a_number_and_the_same_content_is_the_same_file() {
        let (_dir, folder) = folder();
        assert_eq!(save(&folder, "a.wav", b"one"), "a.wav");
        assert_eq!(save(&folder, "a.wav", b"two"), "a-2.wav");
        assert_eq!(save(&folder, "../a.wav", b"one"), "a.wav");
        assert_eq!(save(&folder, "a.wav", b"two"), "a-2.wav");
        assert_eq!(std::fs::read(folder.dir().join("a.wav")).unwrap(), b"one");
        let mut names: Vec<String> = std::fs::read_dir(folder.dir())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, [STATE, "a-2.wav", "a.wav"]);
        assert_eq!(std::fs::read_dir(&folder.parts).unwrap().count(), 0);
    }

    #[test]
    fn the_hash_is_of_what_is_on_disk() {
        let (_dir, folder) = folder();
        let mut part = folder.begin().unwrap();
        part.write(b"a").unwrap();
        part.write(b"bc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(part.sha256(), expected);
        let saved = folder.publish(part, &SafeName::from_untrusted("x")).unwrap();
        assert_eq!((saved.sha256.as_str(), saved.size_bytes), (expected, 3));
    }

    #[test]
    fn only_plain_files_of_the_folder_are_read() {
        let (dir, folder) = folder();
        save(&folder, "a.wav", b"one");
        std::fs::write(dir.path().join("outside"), b"secret").unwrap();
        std::os::unix::fs::symlink(dir.path().join("outside"), folder.dir().join("link")).unwrap();
        std::fs::create_dir(folder.dir().join("sub")).unwrap();
        assert_eq!(folder.read("a.wav").unwrap().1, 3);
        for name in ["link", "sub", "..", "../outside", ".ringback-receiver", "", "none", "a.wav/"] {
            assert!(folder.read(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_link_is_never_written_through() {
        let (dir, folder) = folder();
        std::fs::write(dir.path().join("outside"), b"secret").unwrap();
        std::os::unix::fs::symlink(dir.path().join("outside"), folder.dir().join("a.wav")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("new"), folder.dir().join("b.wav")).unwrap();
        assert_eq!(save(&folder, "a.wav", b"one"), "a-2.wav");
        assert_eq!(save(&folder, "b.wav", b"one"), "b-2.wav");
        assert_eq!(std::fs::read(dir.path().join("outside")).unwrap(), b"secret");
        assert!(!dir.path().join("new").exists());
    }

    #[test]
    fn one_process_owns_the_folder_and_leftovers_are_removed() {
        let (dir, folder) = folder();
        assert!(matches!(Folder::open(folder.dir()), Err(FolderError::InUse { .. })));
        let part = folder.begin().unwrap();
        let left = part.path.clone().unwrap();
        std::mem::forget(part);
        drop(folder);
        assert!(left.exists());
        Folder::open(&dir.path().join("out")).unwrap();
        assert!(!left.exists());
    }

    #[test]
    fn a_part_that_is_dropped_is_gone() {
        let (_dir, folder) = folder();
        drop(folder.begin().unwrap());
        assert_eq!(std::fs::read_dir(&folder.parts).unwrap().count(), 0);
    }
}
