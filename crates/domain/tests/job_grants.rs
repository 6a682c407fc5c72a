//! Who may run a redelivered message, and how an outcome brings its start along.

use ringback_domain::{
    AttemptRef, JobId, Nonce, TimestampMs,
    job::{
        Applied, EndReason, Ended, Grant, Job, JobEvent, JobState, Live, apply, decide_grant, expand, submit,
    },
    policy::Policy,
};

const NOW: TimestampMs = TimestampMs(10_000);
const FIRST: AttemptRef = AttemptRef { run: 1, attempt: 1, nonce: Nonce(1) };

fn queued() -> Job {
    submit(JobId::from_parts(1, [2; 10]), Vec::new(), None, 1_000, TimestampMs(9_000)).0
}

fn running(lease_until: i64) -> Job {
    let live = Live {
        attempt: 1,
        nonce: Nonce(1),
        worker: "w".to_owned(),
        started_at: TimestampMs(9_500),
        delay_ms: 500,
        lease_until: TimestampMs(lease_until),
    };
    Job { last_attempt: 1, state: JobState::InProgress(live), ..queued() }
}

fn ended() -> Ended {
    Ended { attempt: Some(1), at: NOW, delay_ms: 0, execution_ms: 0, reason: EndReason::Succeeded }
}

#[test]
fn a_grant_follows_the_table() {
    let terminal = [JobState::Completed, JobState::Failed, JobState::Cancelled, JobState::TimedOut]
        .map(|s| Job { state: s(ended()), ..queued() });
    let wait = |after_ms| Grant::Wait { after_ms };
    let cases = [
        // Attempt 1 may run unreported on the worker that got the first delivery.
        (queued(), 1, 0, Grant::Run { attempt: 2 }),
        (Job { last_attempt: 1, ..queued() }, 1, 0, Grant::Run { attempt: 2 }),
        (Job { last_attempt: 4, ..queued() }, 1, 0, Grant::Run { attempt: 5 }),
        (Job { publish: 1, ..queued() }, 1, 0, Grant::Drop),
        (queued(), 1, 1, Grant::Drop),
        (Job { run: 2, ..queued() }, 1, 0, Grant::Drop),
        (queued(), 2, 0, Grant::Drop),
        (running(10_001), 1, 0, wait(1)),
        (running(12_000), 1, 0, wait(2_000)),
        (running(90_000), 1, 0, wait(5_000)),
        (running(10_000), 1, 0, Grant::ExpireFirst { attempt: FIRST }),
        (running(12_000), 1, 1, Grant::Drop),
    ];
    for (job, run, publish, want) in cases {
        assert_eq!(decide_grant(&job, run, publish, NOW), want, "{job:?} {run} {publish}");
    }
    for job in terminal {
        assert_eq!(decide_grant(&job, 1, 0, NOW), Grant::Drop);
    }
}

#[test]
fn an_outcome_brings_the_start_that_was_never_told() {
    let lease = NOW.plus_ms(30_000);
    let told = |job: &Job, event: JobEvent| expand(job, event, "w", TimestampMs(9_700), lease);
    for outcome in [
        JobEvent::Succeeded { attempt: FIRST, started_at: TimestampMs(9_700), execution_ms: 3 },
        JobEvent::Failed { attempt: FIRST, execution_ms: 3 },
        JobEvent::Crashed { attempt: FIRST, execution_ms: 3 },
        JobEvent::Overran { attempt: FIRST, execution_ms: 3 },
        JobEvent::Chunk { attempt: FIRST },
        JobEvent::Progressed { attempt: FIRST },
    ] {
        let events = told(&queued(), outcome.clone());
        assert_eq!(events.len(), 2, "{outcome:?}");
        let mut job = queued();
        for event in &events {
            match apply(&job, event, NOW, &Policy::default()).unwrap() {
                Applied::Changed { next, .. } | Applied::Renewed { next, .. } => job = next,
                Applied::Unchanged => {}
            }
        }
        assert!(job.seq >= 2, "the job passes through IN_PROGRESS: {outcome:?}");
        // A job that was opened before, another number and another run come alone.
        for (other, event) in [
            (running(12_000), outcome.clone()),
            (Job { last_attempt: 1, ..queued() }, outcome.clone()),
            (Job { run: 2, ..queued() }, outcome.clone()),
        ] {
            assert_eq!(told(&other, event.clone()), vec![event]);
        }
    }
    for alone in [
        JobEvent::HandedBack { attempt: FIRST },
        JobEvent::Heartbeat { attempt: FIRST, lease_until: lease },
        JobEvent::LeaseExpired { attempt: FIRST },
        JobEvent::TtlExpired,
        JobEvent::Retry { native: true },
        JobEvent::MessageLost { publish: 0 },
    ] {
        assert_eq!(told(&queued(), alone.clone()), vec![alone]);
    }
}

#[test]
fn a_start_told_by_the_worker_is_kept_between_queueing_and_now() {
    for (told, want) in [(0, 9_000_i64), (9_400, 9_400), (99_000, 10_000)] {
        let event = JobEvent::Started {
            attempt: FIRST,
            worker: "w".into(),
            started_at: TimestampMs(told),
            lease_until: NOW.plus_ms(1),
        };
        let Ok(Applied::Changed { next, .. }) = apply(&queued(), &event, NOW, &Policy::default()) else {
            panic!("a fresh job starts")
        };
        let live = next.state.live().unwrap();
        assert_eq!((live.started_at.0, live.delay_ms), (want, want.abs_diff(9_000)));
    }
}
