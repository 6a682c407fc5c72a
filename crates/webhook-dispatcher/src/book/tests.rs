//! The rules of the book, one by one and at random.

use std::collections::BTreeMap;

use proptest::prelude::*;
use ringback_domain::webhook::response::TransportFault;
use ringback_domain::webhook::schedule::SlowDown;

use super::*;

const NOW: i64 = 1_800_000_000_000;

const GATES: GateLimits = GateLimits {
    in_flight: 100,
    target: 8,
    host: 32,
    project: 75,
    quota: 100,
    project_quota: 350,
    breaker: BreakerLimits { failures: 10, percent: 90, open_ms: 1_000, open_max_ms: 60_000 },
};

fn book_of(limits: BookLimits) -> Book {
    Book::new(limits, Arc::new(Rates::default()))
}

fn limits() -> BookLimits {
    BookLimits { gates: GATES, held: 400, bytes: 1 << 20, retry_after_cap_ms: 3_600_000 }
}

fn owed(owner: u128, seq: u32, terminal: bool, gate: u64) -> Owed {
    Owed {
        key: ChainKey { owner: Uuid::from_u128(owner), target: 0 },
        seq,
        terminal,
        event: 0,
        format: 0,
        url: "https://x.example/".into(),
        body: v1::BodyParts::default(),
        traceparent: String::new(),
        created_at_ms: NOW,
        replays: 0,
        attempts_before: 0,
        place: Place { project: 1, target: gate, host: gate / 10, rate: None },
        rules: Arc::new(Rules::default()),
    }
}

fn announce(book: &mut Book, owed: Owed) -> Offer {
    book.offer(
        Offered {
            owed,
            standing: Standing::Live,
            attempts: 0,
            due_at_ms: NOW,
            source: Source::Announced { run: 1 },
        },
        NOW,
    )
}

fn read(book: &mut Book, owed: Owed, attempts: u32, due_at_ms: i64) -> Offer {
    book.offer(Offered { owed, standing: Standing::Live, attempts, due_at_ms, source: Source::Read }, NOW)
}

fn tried(verdict: Verdict) -> Tried {
    let flow = match verdict {
        Verdict::Delivered => Flow::Good,
        Verdict::Retry(Reason::Transport(_), _) => Flow::Dead,
        Verdict::Retry(..) | Verdict::Dead(_) => Flow::Bad,
    };
    Tried {
        verdict,
        flow,
        began_at_ms: NOW,
        duration_ms: 1,
        status: None,
        detail: None,
        address: None,
        response: None,
        dns_ms: None,
        connect_ms: None,
        first_byte_ms: None,
    }
}

fn good() -> Tried {
    tried(Verdict::Delivered)
}

fn bad() -> Tried {
    tried(Verdict::Retry(Reason::Status(500), SlowDown::No))
}

fn states(book: &mut Book) -> Vec<(u32, DeliveryState)> {
    book.take_changes().iter().map(|c| (c.seq, c.state)).collect()
}

#[test]
fn a_quick_job_tells_all_its_states_in_order() {
    let mut book = book_of(limits());
    for (seq, terminal) in [(1, false), (2, false), (3, true)] {
        assert_eq!(announce(&mut book, owed(1, seq, terminal, 1)), Offer::Taken);
    }
    for seq in 1..=3 {
        let flight = book.begin(NOW).unwrap();
        assert_eq!((flight.owed.seq, flight.n), (seq, 1));
        assert!(book.begin(NOW).is_none(), "one at a time");
        book.land(&flight.owed, good(), NOW, 0.0);
    }
    assert_eq!(
        states(&mut book),
        [(1, DeliveryState::Delivered), (2, DeliveryState::Delivered), (3, DeliveryState::Delivered)]
    );
    assert_eq!((book.held(), book.bytes), (0, 0));
}

#[test]
fn a_notice_that_failed_does_not_hold_back_the_result() {
    let mut book = book_of(limits());
    announce(&mut book, owed(1, 1, false, 1));
    let flight = book.begin(NOW).unwrap();
    announce(&mut book, owed(1, 2, false, 1));
    announce(&mut book, owed(1, 3, true, 1));
    book.land(&flight.owed, bad(), NOW, 0.0);
    let changes = book.take_changes();
    assert_eq!(
        changes.iter().map(|c| (c.seq, c.state, c.attempts, c.failed.is_some())).collect::<Vec<_>>(),
        [(1, DeliveryState::Superseded, 1, true), (2, DeliveryState::Superseded, 0, false)]
    );
    assert_eq!(book.begin(NOW).unwrap().owed.seq, 3, "at once");
}

#[test]
fn a_result_that_comes_while_a_notice_waits_for_its_retry_supersedes_it() {
    let mut book = book_of(limits());
    announce(&mut book, owed(1, 1, false, 1));
    let flight = book.begin(NOW).unwrap();
    book.land(&flight.owed, bad(), NOW, 0.0);
    assert_eq!(states(&mut book), [(1, DeliveryState::Pending)]);
    assert_eq!(book.next_wake_ms(), Some(NOW + 10_000));
    announce(&mut book, owed(1, 2, true, 1));
    assert_eq!(states(&mut book), [(1, DeliveryState::Superseded)]);
    assert_eq!(book.begin(NOW).unwrap().owed.seq, 2);
}

#[test]
fn a_terminal_delivery_is_retried_on_its_ladder_and_then_dies() {
    let mut book = book_of(limits());
    announce(&mut book, owed(1, 2, true, 1));
    let mut now = NOW;
    for n in 1..=10 {
        book.wake(now);
        let Some(flight) = book.begin(now) else { panic!("try {n} is due") };
        assert_eq!(flight.n, n);
        book.land(&flight.owed, bad(), now, 0.0);
        let change = book.take_changes().remove(0);
        if n == 10 {
            assert_eq!((change.state, change.attempts), (DeliveryState::Dead, 10));
            break;
        }
        let next = change.next_attempt_at_ms.unwrap();
        assert_eq!(next - now, i64::try_from(schedule::LADDER_MS[n as usize - 1]).unwrap());
        book.recorded(&change, now);
        if next - now > PARK_AFTER_MS {
            assert_eq!(book.held(), 0, "long waits are spent in SQL");
            read(&mut book, owed(1, 2, true, 1), n, next);
        }
        now = next;
    }
    assert_eq!(book.held(), 0);
}

#[test]
fn gone_ends_everything_for_that_target_and_nothing_else() {
    let mut book = book_of(limits());
    announce(&mut book, owed(1, 1, false, 1));
    let flight = book.begin(NOW).unwrap();
    announce(&mut book, owed(1, 2, true, 1));
    announce(&mut book, owed(2, 1, true, 1));
    book.land(&flight.owed, tried(Verdict::Dead(Reason::Gone)), NOW, 0.0);
    assert_eq!(states(&mut book), [(1, DeliveryState::Dead), (2, DeliveryState::Dead)]);
    assert_eq!(announce(&mut book, owed(1, 3, false, 1)), Offer::Taken);
    assert_eq!(states(&mut book), [(3, DeliveryState::Dead)]);
    assert_eq!(book.begin(NOW).unwrap().owed.key.owner, Uuid::from_u128(2));
}

#[test]
fn a_target_that_was_gone_before_the_restart_stays_gone() {
    let mut book = book_of(limits());
    announce(&mut book, owed(1, 2, false, 1));
    announce(&mut book, owed(2, 1, false, 1));
    announce(&mut book, owed(2, 2, true, 1));
    let asked = book.take_checks();
    for owner in [1, 2] {
        book.note_gone(ChainKey { owner: Uuid::from_u128(owner), target: 0 }, NOW);
    }
    book.checked(&asked, NOW);
    assert!(book.begin(NOW).is_none());
    let dead = (DeliveryState::Dead, Some("target_gone".to_owned()));
    let ends: Vec<_> = book.take_changes().into_iter().map(|c| (c.state, c.last_error)).collect();
    assert_eq!(ends, vec![dead; 3]);
    assert_eq!(book.held(), 0);
}

#[test]
fn repeated_announcements_and_rows_on_their_way_are_known() {
    let mut book = book_of(limits());
    assert_eq!(announce(&mut book, owed(1, 1, false, 1)), Offer::Taken);
    assert_eq!(announce(&mut book, owed(1, 1, false, 1)), Offer::Known);
    let flight = book.begin(NOW).unwrap();
    assert_eq!(read(&mut book, owed(1, 1, false, 1), 0, NOW), Offer::Known);
    book.land(&flight.owed, good(), NOW, 0.0);
    // The outcome is not in SQL yet, so a sweep still finds it pending.
    assert_eq!(read(&mut book, owed(1, 1, false, 1), 0, NOW), Offer::Known);
    assert!(book.begin(NOW).is_none());
}

#[test]
fn a_gap_in_the_numbers_is_looked_up_before_the_chain_goes_on() {
    let mut book = book_of(limits());
    announce(&mut book, owed(1, 2, false, 1));
    announce(&mut book, owed(1, 3, true, 1));
    assert!(book.begin(NOW).is_none());
    let asked = book.take_checks();
    assert_eq!(asked, [Uuid::from_u128(1)]);
    read(&mut book, owed(1, 1, false, 1), 0, NOW);
    assert!(book.begin(NOW).is_none(), "only after the answer is complete");
    book.checked(&asked, NOW);
    for seq in 1..=3 {
        let flight = book.begin(NOW).unwrap();
        assert_eq!(flight.owed.seq, seq);
        book.land(&flight.owed, good(), NOW, 0.0);
    }
}

#[test]
fn ends_alone_need_no_look_up_in_the_first_run_only() {
    let mut book = book_of(limits());
    announce(&mut book, owed(1, 7, true, 1));
    assert_eq!(book.begin(NOW).unwrap().owed.seq, 7);
    let second = Offered {
        owed: owed(2, 7, true, 1),
        standing: Standing::Live,
        attempts: 0,
        due_at_ms: NOW,
        source: Source::Announced { run: 2 },
    };
    book.offer(second, NOW);
    assert!(book.begin(NOW).is_none());
    assert_eq!(book.take_checks(), [Uuid::from_u128(2)]);
}

#[test]
fn a_notice_that_arrives_after_the_end_was_told_is_superseded() {
    let mut book = book_of(limits());
    announce(&mut book, owed(1, 2, true, 1));
    let flight = book.begin(NOW).unwrap();
    assert_eq!(read(&mut book, owed(1, 1, false, 1), 0, NOW), Offer::Taken);
    book.land(&flight.owed, good(), NOW, 0.0);
    assert_eq!(states(&mut book), [(2, DeliveryState::Delivered), (1, DeliveryState::Superseded)]);
    announce(&mut book, owed(2, 2, true, 1));
    let flight = book.begin(NOW).unwrap();
    book.land(&flight.owed, good(), NOW, 0.0);
    announce(&mut book, owed(2, 1, false, 1));
    assert_eq!(states(&mut book), [(2, DeliveryState::Delivered), (1, DeliveryState::Superseded)]);
    assert_eq!(book.held(), 0);
}

#[test]
fn the_end_of_a_second_run_waits_for_the_end_of_the_first() {
    let mut book = book_of(limits());
    announce(&mut book, owed(1, 3, true, 1));
    let flight = book.begin(NOW).unwrap();
    announce(&mut book, owed(1, 4, false, 1));
    book.land(&flight.owed, bad(), NOW, 0.0);
    announce(&mut book, owed(1, 5, false, 1));
    announce(&mut book, owed(1, 6, true, 1));
    assert_eq!(
        states(&mut book),
        [(3, DeliveryState::Pending), (4, DeliveryState::Superseded), (5, DeliveryState::Superseded)]
    );
    assert!(book.begin(NOW).is_none());
    book.wake(NOW + 10_000);
    for seq in [3, 6] {
        let flight = book.begin(NOW + 10_000).unwrap();
        assert_eq!(flight.owed.seq, seq);
        book.land(&flight.owed, good(), NOW + 10_000, 0.0);
    }
}

#[test]
fn a_dead_target_keeps_few_places_and_the_others_go_on() {
    let mut book = book_of(limits());
    for n in 0..100 {
        announce(&mut book, owed(n, 1, true, 1));
    }
    assert_eq!(announce(&mut book, owed(999, 1, true, 1)), Offer::Deferred);
    let mut now = NOW;
    for _ in 0..40 {
        while let Some(flight) = book.begin(now) {
            let timeout = Verdict::Retry(Reason::Transport(TransportFault::Timeout), SlowDown::No);
            book.land(&flight.owed, tried(timeout), now, 0.0);
        }
        now += 5;
        book.wake(now);
    }
    assert!(book.held() <= 33, "{}", book.held());
    for n in 1_000..1_100 {
        assert_eq!(announce(&mut book, owed(n, 1, true, 900)), Offer::Taken);
    }
    let mut flying = Vec::new();
    while let Some(flight) = book.begin(now) {
        assert_eq!(flight.owed.place.target, 900);
        flying.push(flight);
    }
    assert_eq!(flying.len(), 8, "the cap of one target");
    for flight in flying {
        book.land(&flight.owed, good(), now, 0.0);
    }
    assert!(!book.take_refill());
}

#[test]
fn a_target_that_recovers_asks_for_what_was_left_in_sql() {
    let mut book = book_of(limits());
    for n in 0..=100 {
        announce(&mut book, owed(n, 1, true, 1));
    }
    while let Some(flight) = book.begin(NOW) {
        book.land(&flight.owed, good(), NOW, 0.0);
    }
    assert!(book.take_refill());
    assert!(!book.take_refill());
}

#[test]
fn turns_are_fair_between_targets() {
    let mut book = book_of(BookLimits {
        gates: GateLimits { in_flight: 4, target: 4, host: 4, project: 4, ..GATES },
        ..limits()
    });
    for n in 0..50 {
        announce(&mut book, owed(n, 1, true, 10));
    }
    announce(&mut book, owed(100, 1, true, 20));
    let first: Vec<u64> = (0..2).map(|_| book.begin(NOW).unwrap().owed.place.target).collect();
    assert_eq!(first, [10, 20]);
}

#[test]
fn one_host_cannot_take_all_places() {
    let mut book = book_of(limits());
    for n in 0..64 {
        // Every delivery has a path of its own on one host.
        announce(&mut book, owed(n, 1, true, 100 + u64::try_from(n % 10).unwrap()));
    }
    let mut flying = Vec::new();
    while let Some(flight) = book.begin(NOW) {
        flying.push(flight);
    }
    assert_eq!(flying.len(), 32);
    for flight in flying {
        book.land(&flight.owed, good(), NOW, 0.0);
    }
    let mut rest = 0;
    while let Some(flight) = book.begin(NOW) {
        book.land(&flight.owed, good(), NOW, 0.0);
        rest += 1;
    }
    assert_eq!(rest, 32, "the blocked ones had their turn");
}

#[test]
fn memory_is_bounded() {
    let mut book = book_of(BookLimits { held: 10, ..limits() });
    for n in 0..10 {
        assert_eq!(announce(&mut book, owed(n, 1, true, 1)), Offer::Taken);
    }
    assert_eq!(announce(&mut book, owed(11, 1, true, 1)), Offer::Full);
    assert_eq!(announce(&mut book, owed(9, 2, false, 1)), Offer::Taken, "a chain takes all of its own");
    assert!(!book.has_room());
}

#[test]
fn an_announcement_releases_what_was_held_back() {
    let mut book = book_of(limits());
    read(&mut book, owed(1, 1, false, 1), 0, NOW + 900_000);
    assert!(book.begin(NOW).is_none());
    assert_eq!(announce(&mut book, owed(1, 1, false, 1)), Offer::Known);
    assert_eq!(book.begin(NOW).unwrap().n, 1);
    // A retry is not hurried by a repeated announcement.
    read(&mut book, owed(2, 1, true, 1), 1, NOW + 9_000);
    assert_eq!(announce(&mut book, owed(2, 1, true, 1)), Offer::Known);
    assert!(book.begin(NOW).is_none());
}

#[test]
fn what_could_not_begin_is_no_try() {
    let mut book = book_of(limits());
    announce(&mut book, owed(1, 1, true, 1));
    let flight = book.begin(NOW).unwrap();
    book.postpone(&flight.owed, 1_000, NOW);
    assert!(book.begin(NOW).is_none());
    book.wake(NOW + 1_000);
    assert_eq!(book.begin(NOW + 1_000).unwrap().n, 1);
    assert!(book.take_changes().is_empty());
}

#[test]
fn sql_releases_what_was_held_back_even_without_an_announcement() {
    let mut book = book_of(limits());
    read(&mut book, owed(1, 1, false, 1), 0, NOW + 900_000);
    assert_eq!(read(&mut book, owed(1, 1, false, 1), 0, NOW), Offer::Known);
    assert_eq!(book.begin(NOW).unwrap().n, 1);
    // What SQL does not know yet is not undone by it: the try of a moment ago counts.
    let mut book = book_of(limits());
    announce(&mut book, owed(2, 1, true, 1));
    let flight = book.begin(NOW).unwrap();
    book.land(&flight.owed, bad(), NOW, 0.0);
    assert_eq!(read(&mut book, owed(2, 1, true, 1), 0, NOW), Offer::Known);
    assert!(book.begin(NOW).is_none());
}

#[test]
fn checks_go_on_for_any_target() {
    let mut book = book_of(limits());
    let registered = |seq| Owed {
        key: ChainKey { owner: Uuid::from_u128(1), target: REGISTERED_TARGET_BASE + 7 },
        ..owed(1, seq, false, 1)
    };
    announce(&mut book, registered(2));
    assert!(book.begin(NOW).is_none());
    let asked = book.take_checks();
    book.checked(&asked, NOW);
    assert_eq!(book.begin(NOW).unwrap().owed.key.target, REGISTERED_TARGET_BASE + 7);
}

fn strict(owner: u128, seq: u32, terminal: bool) -> Owed {
    let rules = Arc::new(Rules { strict_order: true, ..Rules::default() });
    Owed { rules, ..owed(owner, seq, terminal, 1) }
}

#[test]
fn strict_order_supersedes_nothing_and_waits() {
    let mut book = book_of(limits());
    announce(&mut book, strict(1, 1, false));
    announce(&mut book, strict(1, 2, true));
    let mut now = NOW;
    for n in 1..=10 {
        book.wake(now);
        let flight = book.begin(now).unwrap();
        assert_eq!((flight.owed.seq, flight.n), (1, n), "the whole ladder");
        assert!(book.begin(now).is_none(), "the end waits");
        book.land(&flight.owed, bad(), now, 0.0);
        let change = book.take_changes().remove(0);
        now = change.next_attempt_at_ms.unwrap_or(now);
    }
    // Ten failures in a row have opened the breaker.
    assert!(book.begin(now).is_none());
    now += 1_000;
    book.wake(now);
    let end = book.begin(now).unwrap();
    assert_eq!(end.owed.seq, 2, "after the first was given up");
    book.land(&end.owed, good(), now, 0.0);
    // One that comes after the end is told all the same.
    announce(&mut book, strict(2, 3, true));
    let asked = book.take_checks();
    assert!(book.begin(now).is_none(), "a gap is looked up first");
    book.checked(&asked, now);
    let end = book.begin(now).unwrap();
    book.land(&end.owed, good(), now, 0.0);
    book.take_changes();
    announce(&mut book, strict(2, 1, false));
    assert_eq!(book.begin(now).unwrap().owed.seq, 1);
}

fn replay(owner: u128, seq: u32, terminal: bool, replays: u32, attempts_before: u32) -> Owed {
    Owed { replays, attempts_before, ..owed(owner, seq, terminal, 1) }
}

#[test]
fn a_replay_is_sent_again_and_climbs_anew() {
    let mut book = book_of(limits());
    announce(&mut book, owed(1, 2, true, 1));
    let flight = book.begin(NOW).unwrap();
    book.land(&flight.owed, good(), NOW, 0.0);
    assert_eq!(announce(&mut book, owed(1, 2, true, 1)), Offer::Known);
    assert_eq!(read(&mut book, replay(1, 2, true, 1, 1), 1, NOW), Offer::Taken);
    let flight = book.begin(NOW).unwrap();
    assert_eq!((flight.n, flight.owed.replays), (2, 1));
    book.land(&flight.owed, bad(), NOW, 0.0);
    let change = book.take_changes().pop().unwrap();
    assert_eq!((change.state, change.attempts, change.replays), (DeliveryState::Pending, 2, 1));
    assert_eq!(change.next_attempt_at_ms, Some(NOW + 10_000), "the first wait");
    book.wake(NOW + 10_000);
    let flight = book.begin(NOW + 10_000).unwrap();
    book.land(&flight.owed, good(), NOW + 10_000, 0.0);
    assert_eq!(read(&mut book, replay(1, 2, true, 1, 1), 1, NOW), Offer::Known, "the row of before");
    assert_eq!(read(&mut book, replay(1, 2, true, 2, 3), 3, NOW), Offer::Taken, "asked for once more");
}

#[test]
fn nothing_overtakes_a_replay_and_gone_is_tried_again() {
    let mut book = book_of(limits());
    announce(&mut book, owed(1, 3, true, 1));
    let flight = book.begin(NOW).unwrap();
    book.land(&flight.owed, tried(Verdict::Dead(Reason::Gone)), NOW, 0.0);
    book.take_changes();
    read(&mut book, replay(1, 1, false, 1, 0), 0, NOW);
    read(&mut book, replay(1, 3, true, 1, 1), 1, NOW);
    for seq in [1, 3] {
        let flight = book.begin(NOW).unwrap();
        assert_eq!(flight.owed.seq, seq);
        book.land(&flight.owed, good(), NOW, 0.0);
    }
    assert_eq!(states(&mut book), [(1, DeliveryState::Delivered), (3, DeliveryState::Delivered)]);
}

#[test]
fn what_is_held_stays_in_sql_and_what_has_ended_ends() {
    let mut book = book_of(limits());
    let offer = |book: &mut Book, n, standing| {
        let (owed, source) = (owed(n, 1, true, 1), Source::Announced { run: 1 });
        book.offer(Offered { owed, standing, attempts: 0, due_at_ms: NOW, source }, NOW)
    };
    assert_eq!(offer(&mut book, 1, Standing::Held), Offer::Deferred);
    let deleted = Standing::Ended(DeliveryState::Cancelled, "webhook_deleted");
    assert_eq!(offer(&mut book, 2, deleted), Offer::Taken);
    assert_eq!((book.held(), book.begin(NOW).is_none()), (0, true));
    let change = book.take_changes().remove(0);
    assert_eq!(
        (change.state, change.last_error.as_deref()),
        (DeliveryState::Cancelled, Some("webhook_deleted"))
    );
    assert_eq!(offer(&mut book, 2, deleted), Offer::Known);
}

#[test]
fn what_was_to_end_by_mistake_is_taken_up_again() {
    let mut book = book_of(limits());
    let disabled = Standing::Ended(DeliveryState::Dead, "webhook_disabled");
    let source = Source::Announced { run: 1 };
    let end = owed(1, 2, true, 1);
    book.offer(Offered { owed: end, standing: disabled, attempts: 0, due_at_ms: NOW, source }, NOW);
    let change = book.take_changes().remove(0);
    assert!(change.by_standing);
    assert_eq!(read(&mut book, owed(1, 2, true, 1), 0, NOW), Offer::Known, "its end is on the way");
    // SQL says that the webhook works.
    book.reopened(&change);
    assert_eq!(read(&mut book, owed(1, 2, true, 1), 0, NOW), Offer::Taken);
    // Its end was never told, so a notice before it is not overtaken.
    assert_eq!(read(&mut book, owed(1, 1, false, 1), 0, NOW), Offer::Taken);
    assert_eq!(book.begin(NOW).unwrap().owed.seq, 1);
}

#[test]
fn a_webhook_that_changes_leaves_memory_but_for_what_flies() {
    let mut book = book_of(limits());
    for n in 1..=4 {
        announce(&mut book, owed(n, 1, true, 1));
    }
    let flight = book.begin(NOW).unwrap();
    book.drop_target(0);
    assert_eq!(book.held(), 1);
    assert!(book.begin(NOW).is_none());
    book.land(&flight.owed, good(), NOW, 0.0);
    assert_eq!((book.held(), book.bytes, book.in_flight()), (0, 0, 0));
}

#[test]
fn an_open_breaker_tries_nothing_then_only_the_oldest() {
    let mut book = book_of(BookLimits {
        gates: GateLimits { target: 1, breaker: BreakerLimits { failures: 3, ..GATES.breaker }, ..GATES },
        ..limits()
    });
    for n in [9, 8, 7, 6, 5, 4] {
        announce(&mut book, owed(n, 1, true, 1));
    }
    for _ in 0..3 {
        let flight = book.begin(NOW).unwrap();
        book.land(&flight.owed, bad(), NOW, 0.0);
    }
    assert!(book.begin(NOW).is_none());
    assert_eq!((book.open_breakers(), book.next_wake_ms()), (1, Some(NOW + 1_000)));
    book.wake(NOW + 999);
    assert!(book.begin(NOW + 999).is_none());
    book.wake(NOW + 1_000);
    let probe = book.begin(NOW + 1_000).unwrap();
    assert_eq!(probe.owed.key.owner, Uuid::from_u128(4), "the oldest, though it came last");
    assert!(book.begin(NOW + 1_000).is_none(), "one probe");
    book.land(&probe.owed, bad(), NOW + 1_000, 0.0);
    book.wake(NOW + 2_999);
    assert!(book.begin(NOW + 2_999).is_none(), "twice as long");
    book.wake(NOW + 3_000);
    let probe = book.begin(NOW + 3_000).unwrap();
    book.land(&probe.owed, good(), NOW + 3_000, 0.0);
    assert_eq!(book.open_breakers(), 0);
    assert!(book.begin(NOW + 3_000).is_some());
}

#[test]
fn a_rate_holds_and_loses_nothing() {
    let mut book = book_of(limits());
    for n in 0..40 {
        let place = Place { rate: Some(10), ..owed(n, 1, true, 1).place };
        announce(&mut book, Owed { place, ..owed(n, 1, true, 1) });
    }
    let mut sent = Vec::new();
    let mut now = NOW;
    while sent.len() < 40 {
        while let Some(flight) = book.begin(now) {
            sent.push(now);
            book.land(&flight.owed, good(), now, 0.0);
        }
        let Some(at) = book.next_wake_ms() else { break };
        now = at.max(now);
        book.wake(now);
    }
    assert_eq!(sent.len(), 40);
    for second in sent.windows(12) {
        assert!(second[11] - second[0] >= 1_000, "{second:?}");
    }
    assert!(now - NOW <= 4_000);
}

#[test]
fn turns_are_fair_between_projects_and_one_cannot_take_all_places() {
    let mut book = book_of(BookLimits {
        gates: GateLimits { in_flight: 8, target: 8, host: 8, project: 6, ..GATES },
        ..limits()
    });
    let of = |project: i64, n: u128, gate: u64| {
        let place = Place { project, target: gate, host: gate, rate: None };
        Owed { place, ..owed(n, 1, true, 1) }
    };
    // A flood of one project over many targets, then one delivery of another.
    for n in 0..40 {
        announce(&mut book, of(1, n, 100 + u64::try_from(n).unwrap()));
    }
    announce(&mut book, of(2, 900, 900));
    let mut flying: Vec<Flight> = Vec::new();
    while let Some(flight) = book.begin(NOW) {
        flying.push(flight);
    }
    let at = flying.iter().position(|f| f.owed.place.project == 2);
    assert_eq!((at, flying.len()), (Some(1), 7), "second in turn, and two places are left for others");
    let mut rest = 0;
    while let Some(flight) = flying.pop().or_else(|| book.begin(NOW)) {
        book.land(&flight.owed, good(), NOW, 0.0);
        rest += 1;
    }
    assert_eq!(rest, 41);
    assert_eq!((book.held(), book.in_flight()), (0, 0));
}

/// What the random test lets happen to a flight.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Good,
    Bad,
    Postponed,
}

proptest! {
    /// Whatever order announcements come in, however tries end: every delivery ends exactly once, no chain has two
    /// in flight, numbers of a chain never go back, and an end of a job is never superseded.
    #[test]
    fn every_delivery_ends_once_and_in_order(
        order in Just((1..=5_u32).flat_map(|seq| (0..6_u128).map(move |job| (job, seq))).collect::<Vec<_>>())
            .prop_shuffle(),
        fates in proptest::collection::vec(
            prop_oneof![3 => Just(Fate::Good), 2 => Just(Fate::Bad), 1 => Just(Fate::Postponed)], 1..60),
        batch in 1..8_usize,
    ) {
        let terminal = |seq: u32| seq == 3 || seq == 5;
        let mut book = book_of(BookLimits { held: 12, ..limits() });
        // At least one try in each turn of the wheel gets through.
        let mut fates = fates.into_iter().chain([Fate::Good]).collect::<Vec<_>>().into_iter().cycle();
        let mut ended: BTreeMap<(Uuid, u32), DeliveryState> = BTreeMap::new();
        let mut pending: BTreeMap<(u128, u32), (u32, i64)> =
            order.iter().map(|&(job, seq)| ((job, seq), (0, NOW))).collect();
        let mut delivered_up_to: BTreeMap<Uuid, u32> = BTreeMap::new();
        let mut flying: Vec<Flight> = Vec::new();
        let mut now = NOW;
        let mut announcements = order.into_iter();
        let mut log: Vec<String> = Vec::new();
        for round in 0.. {
            prop_assert!(round < 3_000, "it never ends: {pending:?}");
            for (job, seq) in announcements.by_ref().take(batch) {
                let run = if seq > 3 { 2 } else { 1 };
                let owed = owed(job, seq, terminal(seq), u64::try_from(job).unwrap());
                book.offer(
                    Offered { owed, standing: Standing::Live, attempts: 0, due_at_ms: NOW, source: Source::Announced { run } }, now);
            }
            let mut read: Vec<Uuid> = book.take_checks();
            if round % 7 == 6 && book.has_room() {
                read.extend((0..6).map(Uuid::from_u128));
            }
            for &owner in &read {
                for (&(job, seq), &(attempts, due_at_ms)) in &pending {
                    // A job is read with all of its deliveries, also those that are due later.
                    if Uuid::from_u128(job) == owner {
                        let owed = owed(job, seq, terminal(seq), u64::try_from(job).unwrap());
                        book.offer(Offered { owed, standing: Standing::Live, attempts, due_at_ms, source: Source::Read }, now);
                    }
                }
            }
            book.checked(&read, now);
            book.wake(now);
            while let Some(flight) = book.begin(now) {
                log.push(format!("{round} {} {} flies", flight.owed.key.owner, flight.owed.seq));
                prop_assert!(flying.iter().all(|f| f.owed.key != flight.owed.key), "two of a chain");
                flying.push(flight);
            }
            if let Some(flight) = (!flying.is_empty()).then(|| flying.remove(round % flying.len())) {
                match fates.next().unwrap_or(Fate::Good) {
                    Fate::Good => {
                        let last = delivered_up_to.entry(flight.owed.key.owner).or_default();
                        prop_assert!(flight.owed.seq > *last, "{} went back to {}: {log:#?}", flight.owed.key.owner, flight.owed.seq);
                        *last = flight.owed.seq;
                        book.land(&flight.owed, good(), now, 0.5);
                    }
                    Fate::Bad => book.land(&flight.owed, bad(), now, 0.5),
                    Fate::Postponed => book.postpone(&flight.owed, 10, now),
                }
            }
            for change in book.take_changes() {
                log.push(format!("{round} {} {} {:?}", change.key.owner, change.seq, change.state));
                let key = (change.key.owner.as_u128(), change.seq);
                if change.state == DeliveryState::Pending {
                    pending.insert(key, (change.attempts, change.next_attempt_at_ms.unwrap_or(now)));
                } else {
                    prop_assert!(change.state != DeliveryState::Superseded || !terminal(change.seq));
                    prop_assert!(pending.remove(&key).is_some(), "ended twice: {change:?}");
                    ended.insert((change.key.owner, change.seq), change.state);
                }
                book.recorded(&change, now);
            }
            if pending.is_empty() {
                break;
            }
            if flying.is_empty() {
                now = book.next_wake_ms().unwrap_or(now + 60_000).max(now + 1);
            }
        }
        prop_assert_eq!(ended.len(), 30);
        prop_assert_eq!((book.held(), book.bytes, book.in_flight()), (0, 0, 0));
    }
}
