//! Large payloads beside the database. Keys are made by us and hold ids made by us, never names from outside.

mod writer;

pub use writer::BlobWriter;

use crate::config::BlobsConfig;
use bytes::Bytes;
use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path as StorePath;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Why a blob operation failed.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The blob does not exist.
    #[error("blob {0} does not exist")]
    NotFound(BlobKey),
    /// Larger than allowed.
    #[error("blob {key} has {size_bytes} bytes, at most {max_bytes} are allowed")]
    TooLarge {
        /// The key.
        key: BlobKey,
        /// Its size.
        size_bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// Not a key that we make: a programming error or a corrupt row.
    #[error("`{0}` is not a valid blob key")]
    BadKey(String),
    /// The folder cannot be opened.
    #[error("blobs.url: {0}")]
    Open(String),
    /// The store failed; trying again may help.
    #[error("blob store: {0}")]
    Transient(#[source] object_store::Error),
}

/// A checked key: 1 to 12 segments of `[A-Za-z0-9._-]{1,128}` joined by `/`; no segment starts with a dot.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobKey(String);

impl BlobKey {
    /// Checks a key.
    ///
    /// # Errors
    /// [`BlobError::BadKey`].
    pub fn new(text: impl Into<String>) -> Result<Self, BlobError> {
        let text = text.into();
        let segment_ok = |segment: &str| {
            (1..=128).contains(&segment.len())
                && !segment.starts_with('.')
                && segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        };
        let ok = text.split('/').count() <= 12 && text.split('/').all(segment_ok);
        if ok { Ok(Self(text)) } else { Err(BlobError::BadKey(text)) }
    }

    /// The key as text, as stored in SQL and sent in messages.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn path(&self) -> StorePath {
        StorePath::from(self.0.as_str())
    }
}

impl fmt::Display for BlobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BlobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One blob in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its key.
    pub key: BlobKey,
    /// Its size.
    pub size_bytes: u64,
    /// Last change, milliseconds since 1970.
    pub modified_ms: i64,
}

/// The store (cheap to clone).
#[derive(Clone)]
pub struct BlobStore {
    store: Arc<dyn ObjectStore>,
    max_blob_bytes: u64,
    inline_max_bytes: u64,
}

impl fmt::Debug for BlobStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobStore({})", self.store)
    }
}

impl BlobStore {
    /// Opens the configured folder, making it if needed.
    ///
    /// # Errors
    /// [`BlobError::Open`].
    pub fn open(config: &BlobsConfig, data_dir: &Path) -> Result<Self, BlobError> {
        let dir = config.resolve_dir(data_dir).map_err(BlobError::Open)?;
        std::fs::create_dir_all(&dir)
            .map_err(|e| BlobError::Open(format!("cannot make {}: {e}", dir.display())))?;
        // A put returns only when the file and its folder entry are on disk: a committed row may name it then.
        let local = LocalFileSystem::new_with_prefix(&dir)
            .map_err(|e| BlobError::Open(format!("{}: {e}", dir.display())))?
            .with_automatic_cleanup(true)
            .with_fsync(true);
        Ok(Self {
            store: Arc::new(local),
            max_blob_bytes: config.max_blob_bytes,
            inline_max_bytes: config.inline_max_bytes,
        })
    }

    /// Payloads above this size belong here, in bytes.
    #[must_use]
    pub fn inline_max_bytes(&self) -> u64 {
        self.inline_max_bytes
    }

    /// Largest blob accepted, in bytes.
    #[must_use]
    pub fn max_blob_bytes(&self) -> u64 {
        self.max_blob_bytes
    }

    /// Writes a blob whole and durably; readers see the old bytes or the new, never a part. Writing the same key
    /// again replaces it.
    ///
    /// # Errors
    /// [`BlobError::TooLarge`], [`BlobError::Transient`].
    pub async fn put(&self, key: &BlobKey, bytes: Bytes) -> Result<(), BlobError> {
        let size_bytes = bytes.len() as u64;
        if size_bytes > self.max_blob_bytes {
            return Err(BlobError::TooLarge { key: key.clone(), size_bytes, max_bytes: self.max_blob_bytes });
        }
        self.store
            .put(&key.path(), PutPayload::from_bytes(bytes))
            .await
            .map(drop)
            .map_err(BlobError::Transient)
    }

    /// Reads a blob of at most `max_bytes`.
    ///
    /// # Errors
    /// [`BlobError::NotFound`], [`BlobError::TooLarge`], [`BlobError::Transient`].
    pub async fn get(&self, key: &BlobKey, max_bytes: u64) -> Result<Bytes, BlobError> {
        let found = self.store.get(&key.path()).await.map_err(|e| failed(key, e))?;
        if found.meta.size > max_bytes {
            return Err(BlobError::TooLarge { key: key.clone(), size_bytes: found.meta.size, max_bytes });
        }
        found.bytes().await.map_err(|e| failed(key, e))
    }

    /// Reads a part; `range` is cut at the end of the blob.
    ///
    /// # Errors
    /// [`BlobError::NotFound`], [`BlobError::Transient`].
    pub async fn get_range(&self, key: &BlobKey, range: Range<u64>) -> Result<Bytes, BlobError> {
        let size_bytes = self.size(key).await?;
        let range = range.start.min(size_bytes)..range.end.min(size_bytes);
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        self.store.get_range(&key.path(), range).await.map_err(|e| failed(key, e))
    }

    /// Size of a blob, in bytes.
    ///
    /// # Errors
    /// [`BlobError::NotFound`], [`BlobError::Transient`].
    pub async fn size(&self, key: &BlobKey) -> Result<u64, BlobError> {
        self.store.head(&key.path()).await.map(|meta| meta.size).map_err(|e| failed(key, e))
    }

    /// Removes a blob; one that is already gone is fine.
    ///
    /// # Errors
    /// [`BlobError::Transient`].
    pub async fn delete(&self, key: &BlobKey) -> Result<(), BlobError> {
        match self.store.delete(&key.path()).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(BlobError::Transient(error)),
        }
    }

    /// Lists the blobs below a prefix of whole segments, at most `limit`, in no particular order.
    ///
    /// # Errors
    /// [`BlobError::Transient`].
    pub async fn list(&self, prefix: &BlobKey, limit: usize) -> Result<Vec<BlobInfo>, BlobError> {
        let mut found = self.store.list(Some(&prefix.path()));
        let mut out = Vec::new();
        while out.len() < limit {
            let Some(meta) = found.try_next().await.map_err(BlobError::Transient)? else { break };
            // A file that somebody else put there is not ours to list or to delete.
            if let Ok(key) = BlobKey::new(meta.location.as_ref()) {
                let modified_ms = meta.last_modified.timestamp_millis();
                out.push(BlobInfo { key, size_bytes: meta.size, modified_ms });
            }
        }
        Ok(out)
    }
}

fn failed(key: &BlobKey, error: object_store::Error) -> BlobError {
    match error {
        object_store::Error::NotFound { .. } => BlobError::NotFound(key.clone()),
        other => BlobError::Transient(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> BlobStore {
        let config = BlobsConfig { max_blob_bytes: 1000, ..BlobsConfig::default() };
        BlobStore::open(&config, dir).unwrap()
    }

    #[test]
    fn keys_cannot_leave_the_folder() {
        for good in ["in/0193", "out/0193/1-1-77.json", "a"] {
            assert!(BlobKey::new(good).is_ok(), "{good}");
        }
        let long = "x".repeat(129);
        for bad in ["", "/a", "a/", "a//b", "../a", "a/../b", "a/.hidden", "a b", "a\\b", "a\0b", "é", &long]
        {
            assert!(BlobKey::new(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn put_get_range_list_delete() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let key = BlobKey::new("out/job-1/1-1-9").unwrap();
        assert!(matches!(store.get(&key, 10).await, Err(BlobError::NotFound(_))));
        store.put(&key, Bytes::from_static(b"first")).await.unwrap();
        store.put(&key, Bytes::from_static(b"hello world")).await.unwrap();
        assert_eq!(store.get(&key, 100).await.unwrap(), "hello world");
        assert!(matches!(
            store.get(&key, 10).await,
            Err(BlobError::TooLarge { size_bytes: 11, max_bytes: 10, .. })
        ));
        assert_eq!(store.get_range(&key, 6..100).await.unwrap(), "world");
        assert_eq!(store.get_range(&key, 50..100).await.unwrap(), "");
        let other = BlobKey::new("out/job-2/x").unwrap();
        store.put(&other, Bytes::from_static(b"z")).await.unwrap();
        let listed = store.list(&BlobKey::new("out/job-1").unwrap(), 10).await.unwrap();
        assert_eq!(
            listed.iter().map(|blob| (blob.key.as_str(), blob.size_bytes)).collect::<Vec<_>>(),
            [("out/job-1/1-1-9", 11)]
        );
        assert_eq!(store.list(&BlobKey::new("out").unwrap(), 1).await.unwrap().len(), 1);
        store.delete(&key).await.unwrap();
        store.delete(&key).await.unwrap();
        assert!(matches!(store.size(&key).await, Err(BlobError::NotFound(_))));
        let big = Bytes::from(vec![0; 1001]);
        assert!(matches!(store.put(&other, big).await, Err(BlobError::TooLarge { max_bytes: 1000, .. })));
        // Bytes survive a new opening of the folder.
        assert_eq!(open(dir.path()).get(&other, 10).await.unwrap(), "z");
    }
}
