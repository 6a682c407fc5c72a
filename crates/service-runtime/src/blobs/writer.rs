//! Blobs written piece by piece, so that a large file takes no more memory than a small one.

use super::{BlobError, BlobKey, BlobStore};
use bytes::Bytes;
use object_store::{ObjectStoreExt, WriteMultipart};

/// Size of a part; stores ask for at least 5 MiB.
const PART_BYTES: usize = 8 * 1024 * 1024;
/// Parts on their way at once.
const PARTS_AT_ONCE: usize = 2;

/// A blob on its way. It exists only after [`BlobWriter::finish`]; dropped before, it leaves nothing that a reader sees.
#[derive(Debug)]
pub struct BlobWriter {
    key: BlobKey,
    upload: WriteMultipart,
    written_bytes: u64,
    max_bytes: u64,
}

impl BlobStore {
    /// Begins a blob of at most `max_bytes`. Writing the same key again replaces it.
    ///
    /// # Errors
    /// [`BlobError::Transient`].
    pub async fn writer(&self, key: &BlobKey, max_bytes: u64) -> Result<BlobWriter, BlobError> {
        let upload = self.store.put_multipart(&key.path()).await.map_err(BlobError::Transient)?;
        let upload = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        Ok(BlobWriter { key: key.clone(), upload, written_bytes: 0, max_bytes })
    }
}

impl BlobWriter {
    /// Appends bytes; waits while earlier ones are on their way.
    ///
    /// # Errors
    /// [`BlobError::TooLarge`], [`BlobError::Transient`].
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), BlobError> {
        let size_bytes = self.written_bytes.saturating_add(bytes.len() as u64);
        if size_bytes > self.max_bytes {
            let (key, max_bytes) = (self.key.clone(), self.max_bytes);
            return Err(BlobError::TooLarge { key, size_bytes, max_bytes });
        }
        self.upload.wait_for_capacity(PARTS_AT_ONCE).await.map_err(BlobError::Transient)?;
        self.written_bytes = size_bytes;
        self.upload.put(bytes);
        Ok(())
    }

    /// Makes the blob visible, whole and durable; answers its size.
    ///
    /// # Errors
    /// [`BlobError::Transient`].
    pub async fn finish(self) -> Result<u64, BlobError> {
        self.upload.finish().await.map_err(BlobError::Transient)?;
        Ok(self.written_bytes)
    }

    /// Gives the blob up; what was written so far is removed.
    pub async fn abort(self) {
        // Err: the store keeps parts until its own clean-up; no reader sees them.
        let _ = self.upload.abort().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BlobsConfig;

    #[tokio::test]
    async fn a_blob_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(&BlobsConfig::default(), dir.path()).unwrap();
        let key = BlobKey::new("art/1/a").unwrap();
        let piece = Bytes::from(vec![7; 1024 * 1024]);
        let mut writer = store.writer(&key, 100 << 20).await.unwrap();
        for _ in 0..20 {
            writer.write(piece.clone()).await.unwrap();
        }
        assert!(matches!(store.size(&key).await, Err(BlobError::NotFound(_))));
        assert_eq!(writer.finish().await.unwrap(), 20 << 20);
        assert_eq!(store.size(&key).await.unwrap(), 20 << 20);
        assert_eq!(store.get_range(&key, (20 << 20) - 2..u64::MAX).await.unwrap(), [7, 7][..]);

        let other = BlobKey::new("art/1/b").unwrap();
        let mut writer = store.writer(&other, 1024 * 1024).await.unwrap();
        writer.write(piece.clone()).await.unwrap();
        assert!(matches!(writer.write(piece).await, Err(BlobError::TooLarge { .. })));
        writer.abort().await;
        assert!(matches!(store.size(&other).await, Err(BlobError::NotFound(_))));
        let empty = store.writer(&other, 0).await.unwrap();
        assert_eq!(empty.finish().await.unwrap(), 0);
        assert_eq!(store.size(&other).await.unwrap(), 0);
    }
}
