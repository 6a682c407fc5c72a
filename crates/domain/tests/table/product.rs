//! The states and events that are combined.

use ringback_domain::{
    AttemptRef, JobId, Nonce, TimestampMs,
    job::{CancelReason, EndReason, Ended, Job, JobEvent, JobState, Live},
    policy::Policy,
    target::EventScope,
};

/// A job in one of the places it can be.
pub(crate) struct Situation {
    /// Short name used by the rules.
    pub(crate) name: &'static str,
    /// For the document.
    pub(crate) about: &'static str,
    pub(crate) job: Job,
}

/// One event as it may come, at a moment and under a policy.
pub(crate) struct Case {
    pub(crate) event: &'static str,
    /// Which attempt it speaks for, or which other turn it takes.
    pub(crate) variant: &'static str,
    pub(crate) what: JobEvent,
    pub(crate) now: TimestampMs,
    pub(crate) policy: Policy,
    /// The job has no time to live.
    pub(crate) without_ttl: bool,
}

const QUEUED: TimestampMs = TimestampMs(1_000);
const STARTED: TimestampMs = TimestampMs(1_100);
const LEASE: TimestampMs = TimestampMs(5_000);
const TTL: TimestampMs = TimestampMs(5_500);
const NOW: TimestampMs = TimestampMs(2_000);
const LATE: TimestampMs = TimestampMs(6_000);

/// What each variant means, for the document.
pub(crate) const VARIANTS: &[(&str, &str)] = &[
    ("a1", "attempt 1 of the current run"),
    ("a1'", "attempt 1 with another nonce: a second holder of the first delivery"),
    ("a2", "attempt 2"),
    ("a2'", "attempt 2 with another nonce"),
    ("a3", "attempt 3, which nobody granted"),
    ("run", "attempt 1 of another run"),
    ("a1 retry, a2 retry", "the endpoint retries handler errors"),
    ("a1 retry-last, a2 retry-last", "and this is the last allowed failure"),
    ("a1 last, a2 last", "the last allowed failure"),
    ("a1 held, a2 held", "the lease still runs"),
    ("passed, early, none", "the time to live has passed, has not, or there is none"),
    ("compatible, native", "the route that asked"),
    ("newest, other", "the publish number that was looked for"),
];

pub(crate) fn situations() -> Vec<Situation> {
    let ended = || Ended {
        attempt: Some(2),
        at: STARTED,
        delay_ms: 100,
        execution_ms: 7,
        reason: EndReason::Succeeded,
    };
    let at = |last_attempt, failures, publish, state| Job { last_attempt, failures, publish, ..job(state) };
    vec![
        Situation { name: "Q", about: "IN_QUEUE, never started", job: job(JobState::InQueue) },
        Situation {
            name: "Q1",
            about: "IN_QUEUE again, attempt 1 was lost",
            job: at(1, 1, 1, JobState::InQueue),
        },
        Situation {
            name: "R",
            about: "IN_QUEUE of run 2",
            job: Job { run: 2, seq: 4, ..job(JobState::InQueue) },
        },
        Situation { name: "P1", about: "IN_PROGRESS, attempt 1", job: at(1, 0, 0, live(1, 11)) },
        Situation {
            name: "P2",
            about: "IN_PROGRESS, attempt 2 after attempt 1 was lost",
            job: at(2, 1, 1, live(2, 22)),
        },
        Situation { name: "C", about: "COMPLETED", job: at(2, 1, 1, JobState::Completed(ended())) },
        Situation { name: "F", about: "FAILED", job: at(2, 1, 1, JobState::Failed(ended())) },
        Situation { name: "X", about: "CANCELLED", job: at(2, 1, 1, JobState::Cancelled(ended())) },
        Situation { name: "T", about: "TIMED_OUT", job: at(2, 1, 1, JobState::TimedOut(ended())) },
    ]
}

fn job(state: JobState) -> Job {
    Job {
        id: JobId::from_parts(1, [1; 10]),
        seq: 3,
        run: 1,
        publish: 0,
        last_attempt: 0,
        failures: 0,
        queued_at: QUEUED,
        ttl_ms: Some(TTL.since_ms(QUEUED)),
        ttl_at: Some(TTL),
        execution_timeout_ms: 10_000,
        scopes: vec![EventScope::Terminal, EventScope::All],
        owed: 5,
        state,
    }
}

fn live(attempt: u32, nonce: u64) -> JobState {
    JobState::InProgress(Live {
        attempt,
        nonce: Nonce(nonce),
        worker: "w".to_owned(),
        started_at: STARTED,
        delay_ms: 100,
        lease_until: LEASE,
    })
}

fn refs(job: &Job) -> [(&'static str, AttemptRef); 6] {
    let r = |attempt, nonce| AttemptRef { run: job.run, attempt, nonce: Nonce(nonce) };
    [
        ("a1", r(1, 11)),
        ("a1'", r(1, 99)),
        ("a2", r(2, 22)),
        ("a2'", r(2, 98)),
        ("a3", r(3, 33)),
        // Run 1 of a job in run 2, run 2 of a job in run 1.
        ("run", AttemptRef { run: 3 - job.run, ..r(1, 11) }),
    ]
}

/// Every event for one job.
pub(crate) fn cases(job: &Job) -> Vec<Case> {
    let last = Policy { max_attempts: job.failures + 1, retry_errors: false };
    let retry = Policy { max_attempts: 3, retry_errors: true };
    let retry_last = Policy { retry_errors: true, ..last };
    let mut all = Vec::new();
    let mut add = |event, variant, what, now, policy| {
        all.push(Case { event, variant, what, now, policy, without_ttl: false });
    };
    let usual = Policy::default();
    for (name, r) in refs(job) {
        let until = NOW.plus_ms(30_000);
        add(
            "started",
            name,
            JobEvent::Started { attempt: r, worker: "w".into(), started_at: NOW, lease_until: until },
            NOW,
            usual,
        );
        add(
            "granted",
            name,
            JobEvent::Granted { attempt: r, worker: "v".into(), lease_until: until },
            NOW,
            usual,
        );
        add("heartbeat", name, JobEvent::Heartbeat { attempt: r, lease_until: until }, NOW, usual);
        add("progressed", name, JobEvent::Progressed { attempt: r }, NOW, usual);
        add("chunk", name, JobEvent::Chunk { attempt: r }, NOW, usual);
        add(
            "succeeded",
            name,
            JobEvent::Succeeded { attempt: r, started_at: NOW, execution_ms: 5 },
            NOW,
            usual,
        );
        add("failed", name, JobEvent::Failed { attempt: r, execution_ms: 5 }, NOW, usual);
        add("crashed", name, JobEvent::Crashed { attempt: r, execution_ms: 5 }, NOW, usual);
        add("overran", name, JobEvent::Overran { attempt: r, execution_ms: 5 }, NOW, usual);
        add("lease_expired", name, JobEvent::LeaseExpired { attempt: r }, LATE, usual);
        add("handed_back", name, JobEvent::HandedBack { attempt: r }, NOW, usual);
    }
    for (n, [retried, retried_last, ended, held]) in [
        (0, ["a1 retry", "a1 retry-last", "a1 last", "a1 held"]),
        (2, ["a2 retry", "a2 retry-last", "a2 last", "a2 held"]),
    ] {
        let attempt = refs(job)[n].1;
        add("failed", retried, JobEvent::Failed { attempt, execution_ms: 5 }, NOW, retry);
        add("failed", retried_last, JobEvent::Failed { attempt, execution_ms: 5 }, NOW, retry_last);
        add("crashed", ended, JobEvent::Crashed { attempt, execution_ms: 5 }, NOW, last);
        add("lease_expired", ended, JobEvent::LeaseExpired { attempt }, LATE, last);
        add("lease_expired", held, JobEvent::LeaseExpired { attempt }, NOW, usual);
    }
    add("ttl_expired", "passed", JobEvent::TtlExpired, LATE, usual);
    add("ttl_expired", "early", JobEvent::TtlExpired, NOW, usual);
    for (name, reason) in [
        ("requested", CancelReason::Requested),
        ("purged", CancelReason::Purged),
        ("batch", CancelReason::Batch),
    ] {
        add("cancel", name, JobEvent::Cancel { reason }, NOW, usual);
    }
    add("retry", "compatible", JobEvent::Retry { native: false }, NOW, usual);
    add("retry", "native", JobEvent::Retry { native: true }, NOW, usual);
    add("message_lost", "newest", JobEvent::MessageLost { publish: job.publish }, NOW, usual);
    add("message_lost", "other", JobEvent::MessageLost { publish: job.publish + 1 }, NOW, usual);
    all.push(Case {
        event: "ttl_expired",
        variant: "none",
        what: JobEvent::TtlExpired,
        now: LATE,
        policy: usual,
        without_ttl: true,
    });
    all
}
