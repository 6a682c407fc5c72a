//! One file of the spool.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::SpoolError;
use super::record::{Record, RecordError};

const PREFIX: &str = "outcomes-";
const SUFFIX: &str = ".spool";

/// A segment file and what is live in it.
#[derive(Debug)]
pub struct Segment {
    path: PathBuf,
    pub(crate) number: u64,
    pub(crate) bytes: u64,
    pub(crate) live: BTreeSet<u64>,
    file: Option<File>,
}

/// What a segment file holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ReadSegment {
    /// Its whole records, in order.
    pub records: Vec<Record>,
    /// Damaged records that were passed over.
    pub skipped: usize,
    /// Size of the file.
    pub bytes: u64,
}

impl Segment {
    pub(crate) fn existing(path: PathBuf, number: u64, bytes: u64) -> Self {
        Self { path, number, bytes, live: BTreeSet::new(), file: None }
    }

    /// Makes an empty segment, durable together with its name.
    pub(crate) fn create(folder: &Path, number: u64) -> Result<Self, SpoolError> {
        let path = folder.join(format!("{PREFIX}{number:016}{SUFFIX}"));
        let file =
            OpenOptions::new().create_new(true).append(true).open(&path).map_err(SpoolError::io(&path))?;
        File::open(folder).and_then(|dir| dir.sync_all()).map_err(SpoolError::io(folder))?;
        Ok(Self { path, number, bytes: 0, live: BTreeSet::new(), file: Some(file) })
    }

    /// Appends bytes. After a failed write the file is cut back to what it was, so that a later record does
    /// not follow half of this one.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), SpoolError> {
        let Some(file) = self.file.as_mut() else { return Ok(()) };
        match file.write_all(bytes) {
            Ok(()) => {
                self.bytes += bytes.len() as u64;
                Ok(())
            }
            Err(source) => {
                let _ = file.set_len(self.bytes);
                Err(SpoolError::Io { path: self.path.clone(), source })
            }
        }
    }

    pub(crate) fn sync(&self) -> Result<(), SpoolError> {
        self.file.as_ref().map_or(Ok(()), File::sync_data).map_err(SpoolError::io(&self.path))
    }

    pub(crate) fn remove(self) -> Result<(), SpoolError> {
        std::fs::remove_file(&self.path).map_err(SpoolError::io(&self.path))
    }
}

/// All segment files with their numbers, oldest first.
pub(crate) fn list(folder: &Path) -> Result<Vec<(u64, PathBuf)>, SpoolError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(SpoolError::io(folder))? {
        let entry = entry.map_err(SpoolError::io(folder))?;
        let name = entry.file_name();
        let number =
            name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse().ok());
        if let Some(number) = number {
            found.push((number, entry.path()));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Reads a segment to its end or to the first record that the process did not finish writing.
///
/// # Errors
/// [`SpoolError::Io`].
pub fn read_segment(path: &Path) -> Result<ReadSegment, SpoolError> {
    let bytes = std::fs::read(path).map_err(SpoolError::io(path))?;
    let mut read = ReadSegment { bytes: bytes.len() as u64, ..ReadSegment::default() };
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let next = match Record::decode(rest) {
            Ok((record, length)) => {
                read.records.push(record);
                Some(length)
            }
            Err(RecordError::Damaged { skip }) => {
                read.skipped += 1;
                skip
            }
            Err(RecordError::Torn) => None,
        };
        let Some(next) = next else { break };
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(read)
}
