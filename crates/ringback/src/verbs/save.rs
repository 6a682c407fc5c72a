//! `ringback get --save`: the files of a job, each checked against its SHA-256 before it gets its name.

use super::{Context, job_path};
use crate::error::CliError;
use crate::ui::out;
use futures::StreamExt as _;
use ringback_domain::artifact::{file_name, hex, numbered};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use tokio::io::AsyncWriteExt as _;

#[derive(Debug, Deserialize)]
struct Listed {
    artifacts: Vec<Artifact>,
}

#[derive(Clone, Debug, Deserialize)]
struct Artifact {
    id: String,
    run: u32,
    attempt: u32,
    filename: String,
    size_bytes: u64,
    sha256: String,
    state: String,
}

/// Saves the files of the newest attempt of the newest run into a folder, which is made if needed.
///
/// # Errors
/// The server's refusal, a file that cannot be written, or bytes that are not the artefact's.
pub(super) async fn save(ctx: &Context, job: &str, folder: &Path) -> Result<(), CliError> {
    let listed: Listed = ctx.api.get(&format!("{}/artifacts", job_path(job))).await?.read()?;
    let newest = listed.artifacts.iter().map(|a| (a.run, a.attempt)).max();
    let artifacts: Vec<Artifact> =
        listed.artifacts.into_iter().filter(|a| Some((a.run, a.attempt)) == newest).collect();
    std::fs::create_dir_all(folder).map_err(|source| write_error(folder, source))?;
    let mut used = BTreeSet::new();
    let mut saved = Vec::new();
    for artifact in artifacts {
        if artifact.state == "expired" {
            return Err(CliError::Service(format!(
                "the time of {} is over: its bytes are gone",
                artifact.filename
            )));
        }
        let path = folder.join(free_name(&artifact.filename, &mut used));
        fetch(ctx, &artifact, &path).await?;
        if !ctx.json {
            out(&format!("{}  {} bytes  sha256 {}", path.display(), artifact.size_bytes, artifact.sha256))?;
        }
        saved.push(serde_json::json!({
            "path": path, "artifact_id": artifact.id, "size_bytes": artifact.size_bytes, "sha256": artifact.sha256,
        }));
    }
    if ctx.json {
        out(&serde_json::json!({"saved": saved}).to_string())?;
    } else if saved.is_empty() {
        out("the job has no artefacts")?;
    }
    Ok(())
}

/// The name below the folder, harmless whatever the server says; a second file of one name gets a number.
fn free_name(told: &str, used: &mut BTreeSet<String>) -> String {
    let name = file_name(told);
    let mut candidate = name.clone();
    let mut n = 1;
    while !used.insert(candidate.clone()) {
        n += 1;
        candidate = numbered(&name, n);
    }
    candidate
}

fn write_error(path: &Path, source: std::io::Error) -> CliError {
    CliError::File { action: "write", path: path.to_owned(), source }
}

async fn fetch(ctx: &Context, artifact: &Artifact, path: &Path) -> Result<(), CliError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let part: PathBuf = path.with_file_name(format!(".{name}.part"));
    let fetched = fetch_into(ctx, artifact, &part).await;
    match fetched {
        Ok(()) => tokio::fs::rename(&part, path).await.map_err(|source| write_error(path, source)),
        Err(error) => {
            let _ = tokio::fs::remove_file(&part).await;
            Err(error)
        }
    }
}

async fn fetch_into(ctx: &Context, artifact: &Artifact, part: &Path) -> Result<(), CliError> {
    let id = crate::client::encode(&artifact.id);
    let response = ctx.api.open(&format!("/v1/artifacts/{id}/content")).await?;
    let mut file = tokio::fs::File::create(part).await.map_err(|source| write_error(part, source))?;
    let (mut hash, mut size) = (Sha256::new(), 0_u64);
    let mut pieces = response.bytes_stream();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| ctx.api.unreachable(&error))?;
        hash.update(&piece);
        size += piece.len() as u64;
        file.write_all(&piece).await.map_err(|source| write_error(part, source))?;
    }
    file.sync_all().await.map_err(|source| write_error(part, source))?;
    let sha256 = hex(&hash.finalize());
    if (size, sha256.as_str()) == (artifact.size_bytes, artifact.sha256.as_str()) {
        return Ok(());
    }
    Err(CliError::Service(format!(
        "{}: {size} bytes with sha256 {sha256} came, expected {} bytes with {}; try again",
        artifact.filename, artifact.size_bytes, artifact.sha256
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_in_the_folder_and_apart() {
        let mut used = BTreeSet::new();
        assert_eq!(free_name("../../x.wav", &mut used), "x.wav");
        assert_eq!(free_name("x.wav", &mut used), "x-2.wav");
        assert_eq!(free_name("/a/x.wav", &mut used), "x-3.wav");
        assert_eq!(free_name("x", &mut used), "x");
        assert_eq!(free_name("x", &mut used), "x-2");
    }
}
