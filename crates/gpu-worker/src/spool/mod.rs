//! Outcomes on disk until the tracker has committed them (P3: a finished result is not lost with the
//! worker).
//!
//! Append-only segment files hold records, each with its length and checksum. An outcome is one record;
//! another record says that it is done. A segment whose outcomes are all done is removed. Done records are
//! not synced: losing one means that an outcome is sent again, which the tracker answers as obsolete.

mod record;
mod segment;
mod writer;

use std::path::{Path, PathBuf};

pub use record::{Record, RecordError};
pub use segment::{Segment, read_segment};
pub(crate) use writer::SpoolWriter;

/// A segment is closed when it reaches this size.
const SEGMENT_BYTES: u64 = 64 * 1024 * 1024;

/// Why the spool cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The file system said no.
    #[error("spool {path}: {source}")]
    Io {
        /// File or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl SpoolError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

/// An outcome found at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replayed {
    /// Its number in this spool.
    pub id: u64,
    /// The bytes given to [`Spool::append`].
    pub payload: Vec<u8>,
}

/// The spool of one worker. Not shared: [`SpoolWriter`] runs it on its own thread.
#[derive(Debug)]
pub struct Spool {
    folder: PathBuf,
    closed: Vec<Segment>,
    open: Segment,
    next_id: u64,
    segment_bytes: u64,
    dirty: bool,
}

impl Spool {
    /// Opens or makes the spool and reads what it holds. A torn end of a segment (the process died while
    /// writing) ends that segment; a record with a wrong checksum is skipped and counted in the log.
    ///
    /// # Errors
    /// [`SpoolError::Io`].
    pub fn open(folder: &Path) -> Result<(Self, Vec<Replayed>), SpoolError> {
        Self::open_with(folder, SEGMENT_BYTES)
    }

    /// As [`Spool::open`], with another segment size (for tests).
    ///
    /// # Errors
    /// [`SpoolError::Io`].
    pub fn open_with(folder: &Path, segment_bytes: u64) -> Result<(Self, Vec<Replayed>), SpoolError> {
        std::fs::create_dir_all(folder).map_err(SpoolError::io(folder))?;
        let mut closed = Vec::new();
        let mut live: std::collections::BTreeMap<u64, Vec<u8>> = std::collections::BTreeMap::new();
        let mut next_id = 1;
        let mut next_number = 1;
        for (number, path) in segment::list(folder)? {
            next_number = next_number.max(number + 1);
            let read = read_segment(&path)?;
            if read.skipped > 0 {
                tracing::error!(path = %path.display(), skipped = read.skipped, "spool records with a wrong checksum");
            }
            let mut found = Segment::existing(path, number, read.bytes);
            for record in read.records {
                match record {
                    Record::Outcome { id, payload } => {
                        next_id = next_id.max(id + 1);
                        found.live.insert(id);
                        live.insert(id, payload);
                    }
                    Record::Done { id } => {
                        next_id = next_id.max(id + 1);
                        found.live.remove(&id);
                        live.remove(&id);
                        for earlier in &mut closed {
                            let earlier: &mut Segment = earlier;
                            earlier.live.remove(&id);
                        }
                    }
                }
            }
            closed.push(found);
        }
        let open = Segment::create(folder, next_number)?;
        let mut spool =
            Self { folder: folder.to_owned(), closed, open, next_id, segment_bytes, dirty: false };
        spool.remove_finished()?;
        let replayed = live.into_iter().map(|(id, payload)| Replayed { id, payload }).collect();
        Ok((spool, replayed))
    }

    /// A number for the next outcome. Numbers are never used twice in one spool.
    pub fn next_id(&self) -> u64 {
        self.next_id
    }

    /// Appends an outcome under a number from outside, which must be new. It is safe after
    /// [`Spool::sync`].
    ///
    /// # Errors
    /// [`SpoolError::Io`]; the outcome may be on disk or not.
    pub fn append(&mut self, id: u64, payload: &[u8]) -> Result<(), SpoolError> {
        self.next_id = self.next_id.max(id + 1);
        self.roll()?;
        self.open.write(&Record::encode_outcome(id, payload))?;
        self.open.live.insert(id);
        self.dirty = true;
        Ok(())
    }

    /// Marks an outcome as done. Unknown numbers are ignored.
    ///
    /// # Errors
    /// [`SpoolError::Io`].
    pub fn done(&mut self, id: u64) -> Result<(), SpoolError> {
        if !self.forget(id) {
            return Ok(());
        }
        // The record matters only as long as the outcome's own segment lives on.
        self.open.write(&Record::encode_done(id))?;
        self.remove_finished()
    }

    fn forget(&mut self, id: u64) -> bool {
        self.open.live.remove(&id) || self.closed.iter_mut().any(|segment| segment.live.remove(&id))
    }

    /// Makes everything appended so far durable.
    ///
    /// # Errors
    /// [`SpoolError::Io`].
    pub fn sync(&mut self) -> Result<(), SpoolError> {
        if std::mem::take(&mut self.dirty) {
            self.open.sync()?;
        }
        Ok(())
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.closed.iter().map(|segment| segment.bytes).sum::<u64>() + self.open.bytes
    }

    /// Outcomes that are not done.
    pub fn depth(&self) -> usize {
        self.closed.iter().map(|segment| segment.live.len()).sum::<usize>() + self.open.live.len()
    }

    fn roll(&mut self) -> Result<(), SpoolError> {
        if self.open.bytes < self.segment_bytes {
            return Ok(());
        }
        self.sync()?;
        let next = Segment::create(&self.folder, self.open.number + 1)?;
        self.closed.push(std::mem::replace(&mut self.open, next));
        self.remove_finished()
    }

    /// Removes closed segments from the oldest on, as long as they hold nothing live. A younger one may
    /// hold the done records of an older one, so order matters.
    fn remove_finished(&mut self) -> Result<(), SpoolError> {
        let finished = self.closed.iter().take_while(|segment| segment.live.is_empty()).count();
        for segment in self.closed.drain(..finished) {
            segment.remove()?;
        }
        // Everything is done and only the open segment is left: start it anew instead of letting it grow.
        if self.closed.is_empty() && self.open.live.is_empty() && self.open.bytes >= self.segment_bytes {
            let next = Segment::create(&self.folder, self.open.number + 1)?;
            std::mem::replace(&mut self.open, next).remove()?;
            self.dirty = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
