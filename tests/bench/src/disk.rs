//! What one durable write costs on the disk that holds the data folder.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use crate::error::BenchError;
use crate::stats::Spread;

/// 4 KiB append + fdatasync, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Fsync {
    /// Median.
    pub p50_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
    /// The folder lies in memory: durable figures mean nothing there.
    pub in_memory: bool,
}

/// Appends and syncs `rounds` times to a new file in `folder`, then removes it.
pub fn fsync(folder: &Path, rounds: u32) -> Result<Fsync, BenchError> {
    let path = folder.join("fsync-probe");
    let wrap = |source| BenchError::file(&path, source);
    let mut file = OpenOptions::new().create(true).append(true).open(&path).map_err(wrap)?;
    let mut spread = Spread::new();
    for _ in 0..rounds {
        let start = Instant::now();
        file.write_all(&[0x5a; 4096]).map_err(wrap)?;
        file.sync_data().map_err(wrap)?;
        spread.add_us(u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX));
    }
    std::fs::remove_file(&path).map_err(wrap)?;
    const TMPFS_MAGIC: i128 = 0x0102_1994;
    let in_memory = rustix::fs::statfs(folder).is_ok_and(|fs| fs.f_type as i128 == TMPFS_MAGIC);
    let quantiles = spread.quantiles();
    Ok(Fsync { p50_ms: quantiles.p50_ms, p99_ms: quantiles.p99_ms, in_memory })
}
