//! Order, ladders, and what is known already.

use ringback_domain::target::REGISTERED_TARGET_BASE;
use ringback_domain::webhook::schedule;

use super::super::landings::PARK_AFTER_MS;
use super::*;

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
        overtaken: false,
        attempts: 0,
        due_at_ms: NOW,
        source: Source::Announced { run: 2 },
    };
    book.offer(second, NOW);
    assert!(book.begin(NOW).is_none());
    assert_eq!(book.take_checks(), [Uuid::from_u128(2)]);
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
