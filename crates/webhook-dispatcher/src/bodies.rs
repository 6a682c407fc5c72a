//! The bytes of a body in one piece: inline ones as they are, large parts read from the blob store.

use bytes::{Bytes, BytesMut};
use ringback_contracts::v1::{BodyParts, body_part::Part};
use ringback_service_runtime::blobs::{BlobError, BlobKey, BlobStore};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Memory for bodies that are put together from blobs, all flights together, in KiB. A larger body takes it alone.
const BUDGET_KIB: u32 = 64 * 1024;

/// Puts bodies together.
#[derive(Debug)]
pub(crate) struct Bodies {
    blobs: BlobStore,
    budget: Semaphore,
}

/// A body ready to be signed and sent, with its part of the budget.
pub(crate) struct Whole<'a> {
    pub bytes: Bytes,
    _budget: Option<SemaphorePermit<'a>>,
}

impl Bodies {
    pub(crate) fn new(blobs: BlobStore) -> Self {
        Self { blobs, budget: Semaphore::new(BUDGET_KIB as usize) }
    }

    /// The body in one piece.
    ///
    /// # Errors
    /// The blob store's.
    pub(crate) async fn whole(&self, body: &BodyParts) -> Result<Whole<'_>, BlobError> {
        match body.parts.as_slice() {
            [] => return Ok(Whole { bytes: Bytes::new(), _budget: None }),
            [part] => {
                if let Some(Part::Inline(bytes)) = &part.part {
                    return Ok(Whole { bytes: bytes.clone(), _budget: None });
                }
            }
            _ => {}
        }
        let size: u64 = body.parts.iter().map(|part| part.size_bytes).sum();
        let kib = u32::try_from(size.div_ceil(1024)).unwrap_or(u32::MAX).clamp(1, BUDGET_KIB);
        // The semaphore is never closed; without a permit the body is sent all the same.
        let budget = self.budget.acquire_many(kib).await.ok();
        let mut whole = BytesMut::with_capacity(usize::try_from(size).unwrap_or(0));
        for part in &body.parts {
            match &part.part {
                Some(Part::Inline(bytes)) => whole.extend_from_slice(bytes),
                Some(Part::BlobKey(key)) => {
                    let key = BlobKey::new(key.as_str())?;
                    whole.extend_from_slice(&self.blobs.get(&key, self.blobs.max_blob_bytes()).await?);
                }
                None => {}
            }
        }
        Ok(Whole { bytes: whole.freeze(), _budget: budget })
    }
}
