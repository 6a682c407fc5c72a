//! Files that jobs make: what becomes an artefact, and who confirms that it has arrived.

use super::problems::Problems;
use super::section::section;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

section! {
    /// Which values of a handler's output become artefacts. All off: the output stays as it is.
    ArtifactsConfig {
        /// Whether a text that names a file in `folder`, written during the job, becomes an artefact.
        paths: bool = false,
        /// Whether base64 becomes an artefact: keys that end in `_base64`, `{base64, filename}`, `{type: "base64", data}` and data URLs.
        base64: bool = false,
        /// Jobs with `workflow`, `download_urls` and `upload_urls`: what is listed is fetched into `input_folder` first, and outputs are put where the client wants them.
        comfyui: bool = false,
        /// Folder of the handler's files, below its working folder; no other file is ever taken.
        folder: PathBuf = PathBuf::from("output"),
        /// Folder for files of `download_urls`, below the handler's working folder.
        input_folder: PathBuf = PathBuf::from("input"),
        /// Whether files stay in `folder` after they became artefacts.
        keep_files: bool = false,
        /// Largest file, in bytes.
        max_bytes: u64 = 1024 * 1024 * 1024,
        /// Most files of one job.
        max_files: u32 = 100,
        /// Time for one file of `download_urls` or `upload_urls`, in milliseconds.
        transfer_timeout_ms: u64 = 300_000,
        /// How long artefacts can be fetched, in milliseconds; longer than webhooks are tried again.
        keep_ms: u64 = 7 * 86_400_000,
    }
}

/// Who tells a receiver of a file and waits for its confirmation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConfirmMode {
    /// Ringback: it stores the file, tells the receiver and waits.
    Platform,
    /// The same, for jobs that ask for it.
    #[serde(rename = "on_request")]
    OnRequest,
    /// The handler itself: it gets the variables and the routes that it expects.
    Handler,
}

section! {
    /// The confirm handshake: the job ends once its receiver has the file, or after the time limit.
    ConfirmConfig {
        /// "platform", "on_request" (the same, only for jobs that ask with `artifact_confirm`) or "handler". Unset: nobody waits.
        mode: Option<ConfirmMode> = None,
        /// Who is told, with `job_id, download_url, confirmation_url, filename`. Unset: the handler's variable NEXTJS_WEBHOOK_URL, else only registered webhooks hear of it.
        receiver_url: Option<String> = None,
        /// Longest wait, in milliseconds. Unset: the handler's variable DOWNLOAD_CONFIRMATION_TIMEOUT (seconds), else 60 s.
        timeout_ms: Option<u64> = None,
        /// Mode "handler": where `/output/{file}`, `/confirm-download/{job_id}` and `/check-download/{job_id}` are served. A second child gets the next port.
        listen: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8000),
    }
}

/// Name of the variable with the receiver's URL.
pub const RECEIVER_VARIABLE: &str = "NEXTJS_WEBHOOK_URL";
/// Name of the variable with the longest wait, in seconds.
pub const TIMEOUT_VARIABLE: &str = "DOWNLOAD_CONFIRMATION_TIMEOUT";
const DEFAULT_TIMEOUT_MS: u64 = 60_000;
/// Nobody waits longer: the slot of a lost receiver must not be kept for ever.
const MAX_TIMEOUT_MS: u64 = 3_600_000;

impl ConfirmMode {
    /// Whether Ringback tells the receiver, for all jobs or for those that ask.
    #[must_use]
    pub const fn is_platform(self) -> bool {
        matches!(self, Self::Platform | Self::OnRequest)
    }
}

impl ArtifactsConfig {
    /// Whether anything in an output may become an artefact.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.paths || self.base64 || self.comfyui
    }

    pub(super) fn validate(&self, at: &str, p: &mut Problems) {
        for (key, folder) in [("folder", &self.folder), ("input_folder", &self.input_folder)] {
            let plain = folder.components().all(|c| matches!(c, std::path::Component::Normal(_)));
            if !plain || folder.as_os_str().is_empty() {
                p.add(format!("{at}.{key}"), "must be a folder below the working folder, such as \"output\"");
            }
        }
        p.within(&format!("{at}.max_bytes"), self.max_bytes, 1, 1 << 40);
        p.within(&format!("{at}.max_files"), u64::from(self.max_files), 1, 10_000);
        p.within(&format!("{at}.transfer_timeout_ms"), self.transfer_timeout_ms, 1_000, 86_400_000);
        p.within(&format!("{at}.keep_ms"), self.keep_ms, 1_000, 3_660 * 86_400_000);
    }
}

impl ConfirmConfig {
    /// Who is told: the key, else the handler's variable.
    #[must_use]
    pub fn receiver(&self, env: &BTreeMap<String, String>) -> Option<String> {
        self.receiver_url
            .clone()
            .or_else(|| env.get(RECEIVER_VARIABLE).cloned())
            .filter(|url| !url.is_empty())
    }

    /// The longest wait in milliseconds: the key, else the handler's variable, else 60 s.
    #[must_use]
    pub fn wait_ms(&self, env: &BTreeMap<String, String>) -> u64 {
        let told = || env.get(TIMEOUT_VARIABLE)?.trim().parse::<u64>().ok()?.checked_mul(1_000);
        self.timeout_ms.or_else(told).unwrap_or(DEFAULT_TIMEOUT_MS).min(MAX_TIMEOUT_MS)
    }

    pub(super) fn validate(&self, at: &str, artifacts: &ArtifactsConfig, p: &mut Problems) {
        if let Some(ms) = self.timeout_ms {
            p.within(&format!("{at}.timeout_ms"), ms, 100, MAX_TIMEOUT_MS);
        }
        if self.mode.is_some_and(ConfirmMode::is_platform) && !artifacts.is_on() {
            p.add(
                format!("{at}.mode"),
                "confirms artefacts, and this endpoint makes none: set artifacts.paths or artifacts.base64",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handlers_variables_fill_what_is_not_set() {
        let env = BTreeMap::from([
            (RECEIVER_VARIABLE.to_owned(), "https://r.test/hook".to_owned()),
            (TIMEOUT_VARIABLE.to_owned(), "7".to_owned()),
        ]);
        let unset = ConfirmConfig::default();
        assert_eq!(unset.receiver(&env).as_deref(), Some("https://r.test/hook"));
        assert_eq!((unset.wait_ms(&env), unset.wait_ms(&BTreeMap::new())), (7_000, 60_000));
        let set = ConfirmConfig { timeout_ms: Some(500), ..ConfirmConfig::default() };
        assert_eq!(set.wait_ms(&env), 500);
    }

    #[test]
    fn folders_stay_below_the_working_folder() {
        for bad in ["/tmp", "..", "a/../b", ""] {
            let mut p = Problems::default();
            ArtifactsConfig { folder: bad.into(), ..ArtifactsConfig::default() }.validate("a", &mut p);
            assert!(format!("{p:?}").contains("a.folder"), "{bad}");
        }
    }
}
