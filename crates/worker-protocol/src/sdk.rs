//! Which version of the Python SDK a child runs, as far as its requests tell.

use std::fmt;

/// Version of the Python package `runpod` that a child speaks with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SdkVersion {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub patch: u32,
}

impl SdkVersion {
    /// Reads `RunPod-Python-SDK/1.12.0 (Linux …) Language/Python 3.11`, the `User-Agent` of every request
    /// of the SDK's main process.
    pub fn from_user_agent(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("RunPod-Python-SDK/")?;
        Self::parse(rest.split_whitespace().next()?)
    }

    /// Reads `1.12.0`; what follows the third number (`.dev1`, `rc2`) is ignored.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.').map(|part| {
            let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
            digits.parse::<u32>().ok()
        });
        let major = parts.next()??;
        let minor = parts.next()??;
        let patch = parts.next().flatten().unwrap_or(0);
        Some(Self { major, minor, patch })
    }

    /// True if this SDK never has two takes open at once (1.7.9 and later), so that a take with
    /// `job_in_progress=0` is proof and not just a hint.
    pub fn takes_in_turn(self) -> bool {
        self >= Self { major: 1, minor: 7, patch: 9 }
    }

    /// True if an idle child of this SDK keeps a core busy: from 1.7.1 until 1.9.1 the loop that waits for taken
    /// jobs only yields to the event loop, however long the take is held.
    pub fn spins_while_idle(self) -> bool {
        (Self { major: 1, minor: 7, patch: 1 }..Self { major: 1, minor: 9, patch: 1 }).contains(&self)
    }
}

impl fmt::Display for SdkVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::SdkVersion;

    #[test]
    fn reads_the_user_agent_of_real_sdks() {
        let agent = "RunPod-Python-SDK/1.12.0 (Linux 6.1.0; x86_64) Language/Python 3.11.7";
        assert_eq!(SdkVersion::from_user_agent(agent), Some(SdkVersion { major: 1, minor: 12, patch: 0 }));
        assert_eq!(SdkVersion::parse("1.7.13.dev4").map(|v| v.to_string()).as_deref(), Some("1.7.13"));
        assert_eq!(SdkVersion::from_user_agent("python-requests/2.32"), None);
        assert_eq!(SdkVersion::parse("one.two"), None);
    }

    #[test]
    fn some_versions_spin() {
        let spins = |text| SdkVersion::parse(text).is_some_and(SdkVersion::spins_while_idle);
        assert!(["1.7.1", "1.7.13", "1.8.2", "1.9.0"].into_iter().all(spins));
        assert!(!["1.6.2", "1.7.0", "1.9.1", "1.12.0"].into_iter().any(spins));
    }

    #[test]
    fn takes_are_sequential_since_1_7_9() {
        assert!(!SdkVersion::parse("1.6.2").is_some_and(SdkVersion::takes_in_turn));
        assert!(!SdkVersion::parse("1.7.8").is_some_and(SdkVersion::takes_in_turn));
        assert!(SdkVersion::parse("1.7.9").is_some_and(SdkVersion::takes_in_turn));
        assert!(SdkVersion::parse("1.12.0").is_some_and(SdkVersion::takes_in_turn));
    }
}
