//! Artefacts: files made by jobs, their names, their states, and where they hide in a handler's output.

mod confirm;
mod name;
mod safe_name;
mod scan;
mod shape;

pub use confirm::{CONFIRM_MEMBER, ConfirmWish, MIN_WAIT_MS};
pub use name::{MAX_NAME_BYTES, file_name, numbered, percent_encoded, url_segment};
pub use safe_name::SafeName;
pub use scan::{Found, MAX_PATH_BYTES, Source, Wanted, replace, scan};
pub use shape::{Shape, Shown, render};

use std::fmt;

/// Where an artefact stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ArtifactState {
    /// It can be fetched; nobody has confirmed it.
    Ready,
    /// Its receiver said that it has it.
    Confirmed,
    /// Its receiver said nothing in time. It can still be fetched and confirmed.
    Unconfirmed,
    /// Its time is over: the bytes are gone or about to be.
    Expired,
    /// The worker has announced it and has not stored it yet.
    Uploading,
}

impl ArtifactState {
    /// Every state, in the order of [`Self::code`].
    pub const ALL: [Self; 5] =
        [Self::Ready, Self::Confirmed, Self::Unconfirmed, Self::Expired, Self::Uploading];

    /// Number used in SQL and on the wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Ready => 0,
            Self::Confirmed => 1,
            Self::Unconfirmed => 2,
            Self::Expired => 3,
            Self::Uploading => 4,
        }
    }

    /// Reads [`Self::code`] back.
    #[must_use]
    pub fn from_code(code: i64) -> Option<Self> {
        usize::try_from(code).ok().and_then(|i| Self::ALL.get(i).copied())
    }

    /// The word in views, metrics and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Confirmed => "confirmed",
            Self::Unconfirmed => "unconfirmed",
            Self::Expired => "expired",
            Self::Uploading => "uploading",
        }
    }
}

impl fmt::Display for ArtifactState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where an artefact is fetched. `token` is the capability: who has the link may fetch and confirm.
#[must_use]
pub fn download_url(public_url: &str, id: &crate::ArtifactId, token: &str, name: &str) -> String {
    format!("{}/artifacts/{id}/{token}/{}", public_url.trim_end_matches('/'), url_segment(name))
}

/// Where its receipt is confirmed.
#[must_use]
pub fn confirmation_url(public_url: &str, id: &crate::ArtifactId, token: &str) -> String {
    format!("{}/artifacts/{id}/{token}/confirm", public_url.trim_end_matches('/'))
}

/// Bit of `deliveries.format` that marks the classic POST (`job_id, download_url, confirmation_url, filename`) to the
/// receiver of a file; see [`crate::target`] for the other bits.
pub const FORMAT_NOTICE: u32 = 8;
/// How long its answer may take: the receiver may be downloading meanwhile.
pub const NOTICE_DEADLINE_MS: u64 = 5_000;

/// Lower-case hex of bytes.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |n: u8| char::from(DIGITS[usize::from(n & 15)]);
    bytes.iter().flat_map(|b| [digit(b >> 4), digit(*b)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_read_back() {
        for state in ArtifactState::ALL {
            assert_eq!(ArtifactState::from_code(i64::from(state.code())), Some(state));
        }
        assert_eq!(ArtifactState::from_code(5), None);
        assert_eq!(ArtifactState::from_code(-1), None);
    }

    #[test]
    fn links_hold_one_clean_segment() {
        let id = crate::ArtifactId::from_parts(0, [0; 10]);
        let link = download_url("https://x.test/", &id, "tok", "my song/é.wav");
        assert_eq!(link, format!("https://x.test/artifacts/{id}/tok/my%20song%2F%C3%A9.wav"));
        // The name `confirm` belongs to the other route.
        assert!(download_url("https://x.test", &id, "tok", "confirm").ends_with("/tok/_confirm"));
        assert_eq!(hex(&[0, 0xab, 15]), "00ab0f");
    }
}
