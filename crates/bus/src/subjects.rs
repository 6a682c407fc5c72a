//! Every name on the wire, in one place. Names hold ids made by us only, never names from outside.

use ringback_domain::{EndpointId, JobId};
use std::fmt;

/// Which of an endpoint's two queues a job is in (`policy.lowPriority`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// Normal jobs; taken first.
    Hi,
    /// Low priority.
    Lo,
}

impl Lane {
    /// Both lanes in the order in which they are served.
    pub const ALL: [Self; 2] = [Self::Hi, Self::Lo];

    /// The lane of a job.
    #[must_use]
    pub const fn of(low_priority: bool) -> Self {
        if low_priority { Self::Lo } else { Self::Hi }
    }

    /// The token in subjects and consumer names.
    #[must_use]
    pub const fn token(self) -> &'static str {
        match self {
            Self::Hi => "hi",
            Self::Lo => "lo",
        }
    }

    fn parse(token: &str) -> Option<Self> {
        match token {
            "hi" => Some(Self::Hi),
            "lo" => Some(Self::Lo),
            _ => None,
        }
    }
}

/// What the tracker can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verb {
    /// `OutcomeBatch` → `OutcomeReply`
    Outcomes,
    /// `Heartbeat` → `HeartbeatReply`
    Beat,
    /// `GrantRequest` → `GrantReply`
    Grant,
    /// `ChunkBatch` → `ChunkReply`
    Chunks,
    /// `Command` → `CommandReply`
    Command,
    /// `ArtifactRequest` → `ArtifactReply`
    Artifacts,
    /// `EndpointsRequest` → `EndpointsReply`
    Endpoints,
}

impl Verb {
    /// All verbs, for a server of every one.
    pub const ALL: [Self; 7] = [
        Self::Outcomes,
        Self::Beat,
        Self::Grant,
        Self::Chunks,
        Self::Command,
        Self::Artifacts,
        Self::Endpoints,
    ];

    /// The token in the subject.
    #[must_use]
    pub const fn token(self) -> &'static str {
        match self {
            Self::Outcomes => "outcomes",
            Self::Beat => "beat",
            Self::Grant => "grant",
            Self::Chunks => "chunks",
            Self::Command => "command",
            Self::Artifacts => "artifacts",
            Self::Endpoints => "endpoints",
        }
    }
}

/// One publish of one run of a job: the whole identity of a work queue message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct JobSubject {
    /// `endpoint % shards`
    pub shard: u32,
    /// The endpoint.
    pub endpoint: EndpointId,
    /// The lane.
    pub lane: Lane,
    /// The job.
    pub job: JobId,
    /// Run of the job, from 1.
    pub run: u32,
    /// Publish of the run, from 1.
    pub publish: u32,
}

/// The names of one installation: prefix `rb.<install>` and streams `RB_<install>_JOBS_<shard>`.
#[derive(Clone, PartialEq, Eq)]
pub struct Subjects {
    install: String,
}

impl fmt::Debug for Subjects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rb.{}", self.install)
    }
}

impl Subjects {
    /// Names of the installation `install`, a name that `nats.install` has validated.
    pub fn new(install: impl Into<String>) -> Self {
        Self { install: install.into() }
    }

    /// The installation's name.
    #[must_use]
    pub fn install(&self) -> &str {
        &self.install
    }

    /// The shard whose stream holds an endpoint's jobs. `shards` of 0 counts as 1.
    #[must_use]
    pub fn shard_of(endpoint: EndpointId, shards: u32) -> u32 {
        // The remainder of a division by a u32 fits a u32.
        u32::try_from(endpoint.0.rem_euclid(i64::from(shards.max(1)))).unwrap_or(0)
    }

    /// Name of a shard's stream.
    #[must_use]
    pub fn stream(&self, shard: u32) -> String {
        format!("RB_{}_JOBS_{shard}", self.install)
    }

    /// Shard of a stream of ours; none for any other stream.
    #[must_use]
    pub fn parse_stream(&self, name: &str) -> Option<u32> {
        let shard = name.strip_prefix("RB_")?.strip_prefix(self.install.as_str())?.strip_prefix("_JOBS_")?;
        canonical(shard)
    }

    /// Every job subject of a shard.
    #[must_use]
    pub fn shard_jobs(&self, shard: u32) -> String {
        format!("rb.{}.jobs.{shard}.>", self.install)
    }

    /// Name of the durable consumer of an endpoint's lane.
    #[must_use]
    pub fn consumer(endpoint: EndpointId, lane: Lane) -> String {
        format!("e{}-{}", endpoint.0, lane.token())
    }

    /// Reads a consumer's name back.
    #[must_use]
    pub fn parse_consumer(name: &str) -> Option<(EndpointId, Lane)> {
        let (endpoint, lane) = name.strip_prefix('e')?.rsplit_once('-')?;
        Some((EndpointId(canonical(endpoint)?), Lane::parse(lane)?))
    }

    /// Every job subject of an endpoint's lane: the consumer's filter.
    #[must_use]
    pub fn lane_jobs(&self, shard: u32, endpoint: EndpointId, lane: Lane) -> String {
        format!("rb.{}.jobs.{shard}.{}.{}.>", self.install, endpoint.0, lane.token())
    }

    /// Every job subject of an endpoint, both lanes.
    #[must_use]
    pub fn endpoint_jobs(&self, shard: u32, endpoint: EndpointId) -> String {
        format!("rb.{}.jobs.{shard}.{}.>", self.install, endpoint.0)
    }

    /// The subject of one publish of a job.
    #[must_use]
    pub fn job(&self, job: &JobSubject) -> String {
        format!(
            "rb.{}.jobs.{}.{}.{}.{}.{}.{}",
            self.install,
            job.shard,
            job.endpoint.0,
            job.lane.token(),
            job.job.simple(),
            job.run,
            job.publish
        )
    }

    /// Reads a job subject back; none for anything that [`Subjects::job`] does not make.
    #[must_use]
    pub fn parse_job(&self, subject: &str) -> Option<JobSubject> {
        let rest =
            subject.strip_prefix("rb.")?.strip_prefix(self.install.as_str())?.strip_prefix(".jobs.")?;
        let mut tokens = rest.split('.');
        let parsed = JobSubject {
            shard: canonical(tokens.next()?)?,
            endpoint: EndpointId(canonical(tokens.next()?)?),
            lane: Lane::parse(tokens.next()?)?,
            job: JobId::parse_simple(tokens.next()?).ok()?,
            run: canonical(tokens.next()?)?,
            publish: canonical(tokens.next()?)?,
        };
        (tokens.next().is_none() && self.job(&parsed) == subject).then_some(parsed)
    }

    /// Requests to the tracker.
    #[must_use]
    pub fn tracker(&self, verb: Verb) -> String {
        format!("rb.{}.tracker.{}", self.install, verb.token())
    }

    /// `TransitionEvents`, one message per commit.
    #[must_use]
    pub fn transitions(&self) -> String {
        format!("rb.{}.ev", self.install)
    }

    /// `DeliveryEvents` of a partition.
    #[must_use]
    pub fn deliveries(&self, partition: u16) -> String {
        format!("rb.{}.dl.{partition}", self.install)
    }

    /// `DeliveryEvents` of every partition.
    #[must_use]
    pub fn all_deliveries(&self) -> String {
        format!("rb.{}.dl.*", self.install)
    }

    /// Replays were made or cancelled.
    #[must_use]
    pub fn replays(&self) -> String {
        format!("rb.{}.replays", self.install)
    }

    /// `StopOrders` for a worker. The id is made by us: `[A-Za-z0-9_-]{1,64}`.
    #[must_use]
    pub fn stop(&self, worker_id: &str) -> String {
        format!("rb.{}.stop.{worker_id}", self.install)
    }

    /// `ChunkEvents` of an endpoint.
    #[must_use]
    pub fn chunks(&self, endpoint: EndpointId) -> String {
        format!("rb.{}.chunk.{}", self.install, endpoint.0)
    }

    /// `ChunkEvents` of every endpoint.
    #[must_use]
    pub fn all_chunks(&self) -> String {
        format!("rb.{}.chunk.*", self.install)
    }
}

/// A number as we write it: no sign, no leading zero.
fn canonical<T: std::str::FromStr + fmt::Display>(token: &str) -> Option<T> {
    let value: T = token.parse().ok()?;
    (value.to_string() == token).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_job_subject_reads_back(
            install in "[A-Za-z0-9_-]{1,64}",
            shard in 0u32..64,
            endpoint in 1i64..i64::MAX,
            low in any::<bool>(),
            random in any::<[u8; 10]>(),
            ms in 0u64..(1 << 47),
            run in 1u32..,
            publish in 1u32..,
        ) {
            let subjects = Subjects::new(install);
            let lane = Lane::of(low);
            let job = JobSubject { shard, endpoint: EndpointId(endpoint), lane, job: JobId::from_parts(ms, random), run, publish };
            let text = subjects.job(&job);
            prop_assert_eq!(subjects.parse_job(&text), Some(job));
            let filter = subjects.lane_jobs(shard, EndpointId(endpoint), lane);
            prop_assert!(text.starts_with(filter.trim_end_matches('>')));
            prop_assert_eq!(subjects.parse_stream(&subjects.stream(shard)), Some(shard));
            let consumer = Subjects::consumer(EndpointId(endpoint), lane);
            prop_assert_eq!(Subjects::parse_consumer(&consumer), Some((EndpointId(endpoint), lane)));
        }

        #[test]
        fn any_text_is_read_or_refused_without_a_panic(text in "rb\\.dev\\.jobs\\.[0-9a-z.]{0,80}") {
            let subjects = Subjects::new("dev");
            if let Some(job) = subjects.parse_job(&text) {
                prop_assert_eq!(subjects.job(&job), text);
            }
        }
    }

    #[test]
    fn foreign_and_malformed_subjects_are_refused() {
        let subjects = Subjects::new("dev");
        let id = "0193a5b0c1d27e3f8a4b5c6d7e8f9a0b";
        assert!(subjects.parse_job(&format!("rb.dev.jobs.1.7.hi.{id}.1.1")).is_some());
        for bad in [
            format!("rb.devil.jobs.1.7.hi.{id}.1.1"),
            format!("rb.dev.jobs.1.7.mid.{id}.1.1"),
            format!("rb.dev.jobs.01.7.hi.{id}.1.1"),
            format!("rb.dev.jobs.1.7.hi.{id}.1"),
            format!("rb.dev.jobs.1.7.hi.{id}.1.1.1"),
            format!("rb.dev.jobs.1.7.hi.{}.1.1", id.to_uppercase()),
            format!("rb.dev.jobs.1.7.hi.{id}.+1.1"),
            "rb.dev.ev".to_owned(),
        ] {
            assert_eq!(subjects.parse_job(&bad), None, "{bad}");
        }
        assert_eq!(subjects.parse_stream("RB_dev_JOBS_07"), None);
        assert_eq!(subjects.parse_stream("RB_devil_JOBS_7"), None);
        assert_eq!(Subjects::shard_of(EndpointId(10), 8), 2);
        assert_eq!(Subjects::shard_of(EndpointId(10), 0), 0);
    }
}
