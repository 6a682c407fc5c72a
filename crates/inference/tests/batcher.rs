//! Which entries share a batch: the rules one by one, then any sequence of calls against a plain model of them.

use proptest::prelude::*;
use ringback_inference::{BatchLimits, Batcher, Entry, Refusal};
use std::time::{Duration, Instant};

const LIMITS: BatchLimits = BatchLimits {
    max_batch_tokens: 10,
    max_batch_sequences: 3,
    max_queued_tokens: 30,
    max_queued_entries: 8,
};

fn batcher(entries: &[(usize, u32)]) -> Batcher<u32> {
    let mut batcher = Batcher::new(LIMITS);
    batcher.admit(entries.len()).expect("room");
    for (tokens, payload) in entries {
        batcher.push(Entry { tokens: *tokens, deadline: None, payload: *payload }).expect("fits");
    }
    batcher
}

fn payloads(entries: &[Entry<u32>]) -> Vec<u32> {
    entries.iter().map(|entry| entry.payload).collect()
}

#[test]
fn a_batch_ends_where_the_next_entry_does_not_fit() {
    let mut batcher = batcher(&[(4, 1), (6, 2), (1, 3), (10, 4), (1, 5), (1, 6), (1, 7), (1, 8)]);
    let now = Instant::now();
    let mut next = || payloads(&batcher.pop(now, |_| false).batch);
    assert_eq!(next(), [1, 2], "4 + 6 tokens are as many as a batch holds");
    // A later, smaller entry does not overtake.
    assert_eq!(next(), [3]);
    assert_eq!(next(), [4]);
    assert_eq!(next(), [5, 6, 7], "three sequences are as many as a batch holds");
    assert_eq!(next(), [8]);
    assert_eq!(next(), Vec::<u32>::new());
}

#[test]
fn cancelled_and_late_entries_are_told_and_cost_no_room() {
    let now = Instant::now();
    let mut batcher = Batcher::new(LIMITS);
    batcher.admit(5).expect("room");
    let late = Some(now - Duration::from_millis(1));
    let soon = Some(now + Duration::from_secs(1));
    for (payload, deadline) in [(1, None), (2, late), (3, soon), (4, Some(now)), (5, None)] {
        batcher.push(Entry { tokens: 5, deadline, payload }).expect("fits");
    }
    let popped = batcher.pop(now, |payload| *payload == 1);
    assert_eq!(payloads(&popped.cancelled), [1]);
    assert_eq!(payloads(&popped.expired), [2, 4]);
    assert_eq!(payloads(&popped.batch), [3, 5]);
    assert!(batcher.is_empty());
    assert_eq!(batcher.queued_tokens(), 0);
}

#[test]
fn an_entry_that_no_batch_holds_is_refused_at_once() {
    let mut batcher = Batcher::new(LIMITS);
    batcher.admit(1).expect("room");
    let (refusal, entry) =
        batcher.push(Entry { tokens: 11, deadline: None, payload: 9 }).expect_err("too long");
    assert_eq!((refusal, entry.payload), (Refusal::TooLong { tokens: 11, limit: 10 }, 9));
    assert_eq!(refusal.to_string(), "an input has 11 tokens; a batch holds at most 10");
    assert_eq!(batcher.waiting(), 0, "its room is free again");
}

#[test]
fn admission_counts_what_is_not_pushed_yet() {
    let mut batcher = Batcher::<u32>::new(LIMITS);
    assert_eq!(batcher.admit(9), Err(Refusal::TooMany { found: 9, limit: 8 }));
    batcher.admit(6).expect("room");
    assert_eq!(batcher.admit(3), Err(Refusal::Full { unit: "inputs", queued: 6, limit: 8 }));
    batcher.release(2);
    batcher.admit(3).expect("room again");
}

#[test]
fn admission_ends_when_enough_tokens_wait() {
    let mut batcher = batcher(&[(10, 1), (10, 2), (10, 3)]);
    assert_eq!(batcher.admit(1), Err(Refusal::Full { unit: "tokens", queued: 30, limit: 30 }));
    batcher.pop(Instant::now(), |_| false);
    batcher.admit(1).expect("room again");
}

#[derive(Clone, Debug)]
enum Call {
    Admit(usize),
    Release(usize),
    Push { tokens: usize, deadline: Option<u64>, cancelled: bool },
    Pop(u64),
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let call = prop_oneof![
        (0_usize..12).prop_map(Call::Admit),
        (0_usize..3).prop_map(Call::Release),
        (1_usize..14, proptest::option::of(0_u64..20), any::<bool>())
            .prop_map(|(tokens, deadline, cancelled)| Call::Push { tokens, deadline, cancelled }),
        (0_u64..20).prop_map(Call::Pop),
    ];
    proptest::collection::vec(call, 0..60)
}

proptest! {
    /// Nothing is lost, doubled or overtaken; no batch is beyond the limits or smaller than it need be.
    #[test]
    fn every_entry_leaves_once_and_in_order(calls in calls()) {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut batcher = Batcher::new(LIMITS);
        let (mut admitted, mut waiting, mut number) = (0_usize, Vec::<(usize, Option<u64>, bool, u32)>::new(), 0);
        for call in calls {
            match call {
                Call::Admit(count) => {
                    let tokens: usize = waiting.iter().map(|entry| entry.0).sum();
                    let room = admitted + waiting.len() + count <= 8 && tokens < 30;
                    prop_assert_eq!(batcher.admit(count).is_ok(), room);
                    admitted += if room { count } else { 0 };
                }
                Call::Release(count) => {
                    let count = count.min(admitted);
                    batcher.release(count);
                    admitted -= count;
                }
                Call::Push { tokens, deadline, cancelled } => {
                    if admitted == 0 {
                        continue;
                    }
                    admitted -= 1;
                    number += 1;
                    let payload = (number, cancelled);
                    let pushed = batcher.push(Entry { tokens, deadline: deadline.map(at), payload });
                    prop_assert_eq!(pushed.is_ok(), tokens <= 10);
                    if tokens <= 10 {
                        waiting.push((tokens, deadline, cancelled, number));
                    }
                }
                Call::Pop(now) => {
                    let popped = batcher.pop(at(now), |payload| payload.1);
                    let (mut batch, mut cancelled, mut expired) = (Vec::new(), Vec::new(), Vec::new());
                    let (mut tokens, mut taken) = (0, 0);
                    for (size, deadline, gone, number) in &waiting {
                        if *gone {
                            cancelled.push(*number);
                        } else if deadline.is_some_and(|deadline| deadline <= now) {
                            expired.push(*number);
                        } else if batch.len() == 3 || tokens + size > 10 {
                            break;
                        } else {
                            tokens += size;
                            batch.push(*number);
                        }
                        taken += 1;
                    }
                    waiting.drain(..taken);
                    let numbers = |entries: &[Entry<(u32, bool)>]| -> Vec<u32> {
                        entries.iter().map(|entry| entry.payload.0).collect()
                    };
                    prop_assert_eq!(numbers(&popped.batch), batch);
                    prop_assert_eq!(numbers(&popped.cancelled), cancelled);
                    prop_assert_eq!(numbers(&popped.expired), expired);
                }
            }
            let tokens: usize = waiting.iter().map(|entry| entry.0).sum();
            prop_assert_eq!(batcher.queued_tokens(), tokens);
            prop_assert_eq!(batcher.waiting(), waiting.len() + admitted);
        }
    }
}
