//! Replays, and webhooks that change.

use super::*;

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
        book.offer(Offered { owed, standing, overtaken: false, attempts: 0, due_at_ms: NOW, source }, NOW)
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
    book.offer(
        Offered { owed: end, standing: disabled, overtaken: false, attempts: 0, due_at_ms: NOW, source },
        NOW,
    );
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
