//! Where nats-server is, and whether it is new enough.

use super::BrokerError;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Oldest version with what the streams need: metadata, direct gets by subject, consumer names in subjects.
pub const MIN_VERSION: (u32, u32) = (2, 10);

const PROGRAM: &str = "nats-server";

/// Finds nats-server: `RINGBACK_NATS_SERVER`, then PATH, then `.tools/` of the current folder, of the program's
/// folder, and of their parents. A program found on the way that is too old is passed over.
///
/// # Errors
/// [`BrokerError::NotFound`], or [`BrokerError::Version`] when only unusable ones were found.
pub fn find_nats_server() -> Result<PathBuf, BrokerError> {
    if let Some(path) = std::env::var_os("RINGBACK_NATS_SERVER").filter(|path| !path.is_empty()) {
        // Named explicitly: no other one is taken instead.
        let path = PathBuf::from(path);
        return check_version(&path).map(|()| path);
    }
    let mut refused = None;
    for path in candidates() {
        match check_version(&path) {
            Ok(()) => return Ok(path),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    Err(refused.unwrap_or(BrokerError::NotFound))
}

fn candidates() -> Vec<PathBuf> {
    let mut found = Vec::new();
    if let Some(path) = std::env::var_os("PATH") {
        found.extend(std::env::split_paths(&path).map(|dir| dir.join(PROGRAM)));
    }
    let starts = [std::env::current_dir().ok(), std::env::current_exe().ok()];
    for start in starts.into_iter().flatten() {
        for dir in start.ancestors() {
            let tools = dir.join(".tools");
            found.push(tools.join("bin").join(PROGRAM));
            found.push(tools.join(PROGRAM));
            // One folder per tool, for example a Python environment.
            for entry in std::fs::read_dir(&tools).into_iter().flatten().flatten() {
                found.push(entry.path().join("bin").join(PROGRAM));
                found.push(entry.path().join(PROGRAM));
            }
        }
    }
    found.retain(|path| path.is_file());
    found
}

fn check_version(path: &Path) -> Result<(), BrokerError> {
    let refused = |found: String| BrokerError::Version { path: path.to_owned(), found };
    let output = Command::new(path).arg("-v").output().map_err(|error| refused(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match parse_version(&text) {
        Some(version) if version >= MIN_VERSION => Ok(()),
        _ => Err(refused(if text.is_empty() { "it says nothing".to_owned() } else { text })),
    }
}

/// `nats-server: v2.15.1`
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.strip_prefix("nats-server: v")?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(parse_version("nats-server: v2.15.1"), Some((2, 15)));
        assert_eq!(parse_version("nats-server: v2.9.10"), Some((2, 9)));
        assert!(parse_version("nats-server: v2.9.10") < Some(MIN_VERSION));
        assert_eq!(parse_version("something else"), None);
    }
}
