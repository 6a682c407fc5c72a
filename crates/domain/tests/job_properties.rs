//! Random histories of a job, with duplicates, reordering, expiry and words of attempts long closed: the invariants
//! J1 to J5 hold after every step, a repeated event does nothing, and what is owed is what was announced.
#![allow(clippy::unwrap_used, reason = "a failed step of a test is its report")]

use proptest::prelude::*;
use ringback_domain::{
    AttemptRef, JobId, Nonce, TimestampMs,
    job::{
        Applied, CancelReason, Effect, Grant, Job, JobEvent, apply, check, check_step, decide_grant, expand,
        submit,
    },
    policy::Policy,
    target::EventScope,
};

const LEASE_MS: u64 = 100;

/// One thing that happens. Numbers choose among what exists at that moment.
#[derive(Clone, Debug)]
enum Op {
    /// Time passes.
    Wait(u16),
    /// Somebody asks for a grant with the newest or an older message.
    AskGrant {
        older: bool,
    },
    /// A worker says something for one of the attempts it ever had; `kind` chooses what.
    Say {
        who: usize,
        kind: u8,
    },
    /// The first delivery is taken by a further worker that does not ask.
    TakeFirst,
    Lease,
    Ttl,
    Cancel(u8),
    Retry {
        native: bool,
    },
    MessageLost {
        older: bool,
    },
    /// Something that was applied before arrives again.
    Repeat(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..400_u16).prop_map(Op::Wait),
        3 => any::<bool>().prop_map(|older| Op::AskGrant { older }),
        8 => (any::<usize>(), 0..9_u8).prop_map(|(who, kind)| Op::Say { who, kind }),
        3 => Just(Op::TakeFirst),
        2 => Just(Op::Lease),
        1 => Just(Op::Ttl),
        1 => (0..3_u8).prop_map(Op::Cancel),
        2 => any::<bool>().prop_map(|native| Op::Retry { native }),
        1 => any::<bool>().prop_map(|older| Op::MessageLost { older }),
        3 => any::<usize>().prop_map(Op::Repeat),
    ]
}

struct World {
    job: Job,
    policy: Policy,
    now: TimestampMs,
    /// Attempts that some worker holds or held.
    attempts: Vec<AttemptRef>,
    applied: Vec<JobEvent>,
    delivered: Vec<(u16, u32)>,
    results: Vec<u32>,
    counted: u32,
    messages: Vec<(u32, u32)>,
    next_nonce: u64,
}

impl World {
    fn new(policy: Policy, ttl_ms: Option<u64>) -> Self {
        let scopes = vec![EventScope::All, EventScope::Terminal];
        let now = TimestampMs(1_000);
        let (job, effects) = submit(JobId::from_parts(1, [1; 10]), scopes, ttl_ms, 10_000, now);
        check(&job).unwrap();
        let mut world = Self {
            job,
            policy,
            now,
            attempts: Vec::new(),
            applied: Vec::new(),
            delivered: Vec::new(),
            results: Vec::new(),
            counted: 0,
            messages: Vec::new(),
            next_nonce: 1,
        };
        let after = world.job.clone();
        world.record(&after, &effects);
        world
    }

    fn nonce(&mut self) -> Nonce {
        self.next_nonce += 1;
        Nonce(self.next_nonce)
    }

    fn lease(&self) -> TimestampMs {
        self.now.plus_ms(LEASE_MS)
    }

    fn events(&mut self, op: &Op) -> Vec<JobEvent> {
        match op {
            Op::Wait(ms) => {
                self.now = self.now.plus_ms(u64::from(*ms));
                Vec::new()
            }
            Op::AskGrant { older } => self.ask(*older),
            Op::Say { who, kind } => match self.attempts.len() {
                0 => Vec::new(),
                n => vec![self.say(self.attempts[who % n], *kind)],
            },
            Op::TakeFirst => {
                let attempt = AttemptRef { run: self.job.run, attempt: 1, nonce: self.nonce() };
                self.attempts.push(attempt);
                Vec::new()
            }
            Op::Lease => match self.job.state.live() {
                Some(live) => {
                    let (attempt, nonce) = (live.attempt, live.nonce);
                    vec![JobEvent::LeaseExpired { attempt: AttemptRef { run: self.job.run, attempt, nonce } }]
                }
                None => Vec::new(),
            },
            Op::Ttl => vec![JobEvent::TtlExpired],
            Op::Cancel(n) => {
                let reason =
                    [CancelReason::Requested, CancelReason::Purged, CancelReason::Batch][usize::from(*n)];
                vec![JobEvent::Cancel { reason }]
            }
            Op::Retry { native } => vec![JobEvent::Retry { native: *native }],
            Op::MessageLost { older } => {
                vec![JobEvent::MessageLost { publish: self.job.publish.saturating_sub(u32::from(*older)) }]
            }
            // A repeated retry or loss of a message is a new request of somebody, not a repetition.
            Op::Repeat(n) => match self.applied.len() {
                0 => Vec::new(),
                len => match &self.applied[n % len] {
                    JobEvent::Retry { .. } => Vec::new(),
                    other => vec![other.clone()],
                },
            },
        }
    }

    fn ask(&mut self, older: bool) -> Vec<JobEvent> {
        let publish = self.job.publish.saturating_sub(u32::from(older));
        match decide_grant(&self.job, self.job.run, publish, self.now) {
            Grant::Run { attempt } => {
                let attempt = AttemptRef { run: self.job.run, attempt, nonce: self.nonce() };
                self.attempts.push(attempt);
                vec![JobEvent::Granted { attempt, worker: "g".into(), lease_until: self.lease() }]
            }
            Grant::ExpireFirst { attempt } => vec![JobEvent::LeaseExpired { attempt }],
            Grant::Wait { .. } | Grant::Drop => Vec::new(),
        }
    }

    fn say(&self, attempt: AttemptRef, kind: u8) -> JobEvent {
        let (started_at, lease_until, execution_ms) = (self.now, self.lease(), 7);
        match kind {
            0 => JobEvent::Started { attempt, worker: "w".into(), started_at, lease_until },
            1 => JobEvent::Heartbeat { attempt, lease_until },
            2 => JobEvent::Progressed { attempt },
            3 => JobEvent::Chunk { attempt },
            4 => JobEvent::Succeeded { attempt, started_at, execution_ms },
            5 => JobEvent::Failed { attempt, execution_ms },
            6 => JobEvent::Crashed { attempt, execution_ms },
            7 => JobEvent::Overran { attempt, execution_ms },
            _ => JobEvent::HandedBack { attempt },
        }
    }

    fn step(&mut self, event: JobEvent) {
        for event in expand(&self.job, event, "w", self.now, self.lease()) {
            let before = self.job.clone();
            let (next, effects) = match apply(&before, &event, self.now, &self.policy) {
                Ok(Applied::Changed { next, effects } | Applied::Renewed { next, effects }) => {
                    (next, effects)
                }
                Ok(Applied::Unchanged) | Err(_) => continue,
            };
            check_step(&before, &next).unwrap_or_else(|v| panic!("{v:?}: {event:?}\n{before:?}\n{next:?}"));
            self.record(&next, &effects);
            self.job = next;
            // At once again: nothing may happen twice.
            match apply(&self.job, &event, self.now, &self.policy) {
                Ok(Applied::Unchanged) | Err(_) => {}
                Ok(again) => panic!("{event:?} did something twice: {again:?}"),
            }
            self.applied.push(event);
        }
    }

    fn record(&mut self, next: &Job, effects: &[Effect]) {
        for effect in effects {
            match effect {
                Effect::Deliver { target, seq, status } => {
                    assert_eq!((*seq, *status), (next.seq, next.status()));
                    self.delivered.push((*target, *seq));
                }
                Effect::RecordResult { run, status } => {
                    assert!(status.is_terminal());
                    self.results.push(*run);
                }
                Effect::CountInBatch { .. } => self.counted += 1,
                Effect::Publish { run, publish, must_ask } => {
                    assert_eq!((*run, *publish), (next.run, next.publish));
                    assert_eq!(*must_ask, *publish > 0, "only the first message of a run may be run unasked");
                    self.messages.push((*run, *publish));
                }
                Effect::DropMessage { run, publish } => {
                    assert!(next.status().is_terminal());
                    assert_eq!(
                        (*run, *publish),
                        (next.run, next.publish),
                        "only the newest message is dropped"
                    );
                }
                Effect::CloseAttempt(end) => assert!(end.attempt <= next.last_attempt.max(1)),
                Effect::Stop { attempt, .. } => assert!(*attempt <= next.last_attempt),
            }
        }
    }

    fn verify(&self) {
        let unique = |mut all: Vec<(u32, u32)>| {
            let n = all.len();
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), n, "{all:?}");
        };
        // P4 and P5: as many deliveries as are owed, none twice.
        assert_eq!(self.delivered.len(), self.job.owed as usize);
        unique(self.delivered.iter().map(|(t, s)| (u32::from(*t), *s)).collect());
        // P2: one result per ended run, and no run without its end before the next.
        let ended = self.job.run - u32::from(!self.job.status().is_terminal());
        assert_eq!(self.results, (1..=ended).collect::<Vec<_>>());
        assert_eq!(self.counted, ended.min(1), "a job counts once in its batch");
        // No message number is used twice.
        unique(self.messages.clone());
        assert!(self.job.failures <= self.policy.max_attempts);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_500, ..ProptestConfig::default() })]

    #[test]
    fn every_history_keeps_the_invariants(
        ops in prop::collection::vec(op(), 1..60),
        max_attempts in 1..5_u32,
        retry_errors in any::<bool>(),
        ttl in prop::option::of(50..3_000_u64),
    ) {
        let mut world = World::new(Policy { max_attempts, retry_errors }, ttl);
        for op in &ops {
            for event in world.events(op) {
                world.step(event);
            }
            world.verify();
        }
    }

    /// However the words of workers are ordered and repeated, one run ends once and its first success wins.
    #[test]
    fn reordered_outcomes_end_a_run_once(
        kinds in prop::collection::vec((any::<usize>(), 0..9_u8), 1..12),
        swaps in prop::collection::vec((any::<usize>(), any::<usize>()), 0..12),
    ) {
        let mut world = World::new(Policy::default(), None);
        for op in [Op::TakeFirst, Op::TakeFirst] {
            world.events(&op);
        }
        let mut words: Vec<JobEvent> = kinds
            .iter()
            .map(|(who, kind)| world.say(world.attempts[who % 2], *kind))
            .collect();
        words.extend(words.clone());
        let n = words.len();
        for (a, b) in swaps {
            words.swap(a % n, b % n);
        }
        let succeeds = words.iter().any(|w| matches!(w, JobEvent::Succeeded { .. }));
        for word in words {
            world.step(word);
            world.verify();
        }
        prop_assert!(world.results.len() <= 1);
        if succeeds {
            prop_assert_eq!(world.results.len(), 1, "a success ends the run unless something else did before");
        }
    }
}
