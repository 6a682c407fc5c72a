//! Ids made by us and names from outside.

use std::fmt;

use thiserror::Error;
use uuid::Uuid;

/// An id could not be read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum IdError {
    /// Not a hyphenated UUID, with or without `sync-` in front.
    #[error(
        "not a job id: expected a UUID such as 018f3a5e-0000-7000-8000-000000000000, or sync- and a UUID"
    )]
    NotAJobId,
    /// Not a hyphenated UUID.
    #[error("not an id: expected a UUID such as 018f3a5e-0000-7000-8000-000000000000")]
    NotAnId,
}

const SYNC_PREFIX: &str = "sync-";

/// Strict: only the hyphenated lower- or upper-case form, so that one job has one spelling in URLs and logs.
fn parse_hyphenated(text: &str) -> Option<Uuid> {
    if text.len() == uuid::fmt::Hyphenated::LENGTH { Uuid::try_parse(text).ok() } else { None }
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            /// A UUIDv7 of that moment; `random` fills the rest.
            #[must_use]
            pub fn from_parts(unix_ms: u64, random: [u8; 10]) -> Self {
                Self(uuid::Builder::from_unix_timestamp_millis(unix_ms, &random).into_uuid())
            }

            /// The 16-byte key used in SQL and protobuf.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }

            /// Reads the 16-byte key.
            pub fn from_slice(bytes: &[u8]) -> Result<Self, IdError> {
                Uuid::from_slice(bytes).map(Self).map_err(|_| IdError::NotAnId)
            }

            /// From a UUID.
            #[must_use]
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// 32 hex digits without hyphens: the form used in subjects, file names and webhook ids.
            #[must_use]
            pub fn simple(&self) -> String {
                self.0.simple().to_string()
            }

            /// Reads [`Self::simple`] back.
            pub fn parse_simple(text: &str) -> Result<Self, IdError> {
                if text.len() == uuid::fmt::Simple::LENGTH {
                    Uuid::try_parse(text).map(Self).map_err(|_| IdError::NotAnId)
                } else {
                    Err(IdError::NotAnId)
                }
            }

            /// Reads the hyphenated form.
            pub fn parse(text: &str) -> Result<Self, IdError> {
                parse_hyphenated(text).map(Self).ok_or(IdError::NotAnId)
            }

            /// Which of `partitions` this id's webhooks belong to. `partitions` of 0 counts as 1.
            #[must_use]
            pub fn partition(&self, partitions: u16) -> u16 {
                u16::from(self.0.as_bytes()[15]) % partitions.max(1)
            }

            /// The moment inside the UUIDv7, ms since the Unix epoch.
            #[must_use]
            pub fn unix_ms(&self) -> u64 {
                let b = self.0.as_bytes();
                u64::from_be_bytes([0, 0, b[0], b[1], b[2], b[3], b[4], b[5]])
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }
    };
}

uuid_id! {
    /// Id of a job: a UUIDv7, so ids sort by the moment of submission.
    JobId
}
uuid_id! {
    /// Id of a batch: a UUIDv7.
    BatchId
}
uuid_id! {
    /// Id of an artefact: a UUIDv7 that ends like the id of its job, so that both share a partition.
    ArtifactId
}

impl ArtifactId {
    /// A new id for an artefact of `job`.
    #[must_use]
    pub fn of_job(job: &JobId, unix_ms: u64, random: [u8; 10]) -> Self {
        let mut bytes = *Self::from_parts(unix_ms, random).as_bytes();
        bytes[15] = job.as_bytes()[15];
        Self(Uuid::from_bytes(bytes))
    }
}

impl JobId {
    /// The id as clients see it: jobs made by `/runsync` carry the prefix `sync-`, as RunPod's do.
    #[must_use]
    pub fn public(&self, sync: bool) -> String {
        if sync { format!("{SYNC_PREFIX}{self}") } else { self.to_string() }
    }

    /// Reads a public id: the key, and whether it carried `sync-`. The caller compares that with the job.
    pub fn parse_public(text: &str) -> Result<(Self, bool), IdError> {
        let (bare, sync) = text.strip_prefix(SYNC_PREFIX).map_or((text, false), |rest| (rest, true));
        parse_hyphenated(bare).map(|u| (Self(u), sync)).ok_or(IdError::NotAJobId)
    }
}

/// Key of a project, made by the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProjectId(pub i64);

/// Key of an endpoint, made by the store; it is the token in subjects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId(pub i64);

impl fmt::Display for ProjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Random per attempt; tells two holders of one attempt number apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Nonce(pub u64);

/// What fences everything a worker says about a job: run, attempt and nonce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttemptRef {
    /// 1 at submit, +1 at each explicit retry.
    pub run: u32,
    /// Execution of the run, from 1. Attempt 1 needs no grant; every later one was granted.
    pub attempt: u32,
    /// Random number of that execution.
    pub nonce: Nonce,
}

/// A name from outside was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NameError {
    /// Empty.
    #[error("must not be empty")]
    Empty,
    /// Over 64 characters.
    #[error("must be at most {max} characters, got {got}", max = Name::MAX_CHARS)]
    TooLong {
        /// Length found.
        got: usize,
    },
    /// A character outside `[A-Za-z0-9_-]`.
    #[error("may hold only letters, digits, `_` and `-`; found {found:?} at position {position}")]
    BadCharacter {
        /// The character.
        found: char,
        /// Its position, from 0.
        position: usize,
    },
}

/// A name from outside (endpoint, worker, project): `[A-Za-z0-9_-]{1,64}`.
///
/// Names never become subjects, file names or object keys; those use ids made by us.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    /// Longest name in characters.
    pub const MAX_CHARS: usize = 64;

    /// Reads a name.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if let Some((position, found)) =
            text.chars().enumerate().find(|(_, c)| !(c.is_ascii_alphanumeric() || *c == '_' || *c == '-'))
        {
            return Err(NameError::BadCharacter { found, position });
        }
        if text.len() > Self::MAX_CHARS {
            return Err(NameError::TooLong { got: text.len() });
        }
        Ok(Self(text.to_owned()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_ids_read_back_and_keep_their_kind() {
        let id = JobId::from_parts(1_700_000_000_000, [7; 10]);
        assert_eq!(JobId::parse_public(&id.public(false)), Ok((id, false)));
        assert_eq!(JobId::parse_public(&id.public(true)), Ok((id, true)));
        assert_eq!(id.unix_ms(), 1_700_000_000_000);
        assert_eq!(JobId::parse_simple(&id.simple()), Ok(id));
        for bad in ["", "sync-", "*", "../x", &id.simple(), &format!("{{{id}}}"), &format!("sync-sync-{id}")]
        {
            assert_eq!(JobId::parse_public(bad), Err(IdError::NotAJobId), "{bad}");
        }
    }

    #[test]
    fn names_refuse_what_could_leave_its_place() {
        assert!(Name::parse("a-B_9").is_ok());
        assert!(Name::parse(&"x".repeat(64)).is_ok());
        assert_eq!(Name::parse(&"x".repeat(65)), Err(NameError::TooLong { got: 65 }));
        assert_eq!(Name::parse(""), Err(NameError::Empty));
        for bad in ["a.b", "*", ">", "../x", "a b", "é", "a\0"] {
            assert!(matches!(Name::parse(bad), Err(NameError::BadCharacter { .. })), "{bad}");
        }
    }
}
