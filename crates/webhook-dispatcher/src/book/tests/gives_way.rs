//! What is superseded, and by what.

use ringback_domain::event::EventType;

use super::*;

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

/// Progress of a job: an event of its own.
fn progress(owner: u128) -> Owed {
    Owed { event: EventType::JobProgress.code(), ..owed(owner, 1, false, 1) }
}

fn read_overtaken(book: &mut Book, owed: Owed, attempts: u32, now: i64) -> Offer {
    let (standing, source) = (Standing::Live, Source::Read);
    book.offer(Offered { owed, standing, overtaken: true, attempts, due_at_ms: now, source }, now)
}

#[test]
fn progress_of_an_attempt_that_is_over_is_superseded_wherever_it_waits() {
    let mut book = book_of(BookLimits { gates: GateLimits { target: 1, ..GATES }, ..limits() });
    let key = |owner| progress(owner).key;
    // One flies, one waits for its turn.
    announce(&mut book, progress(1));
    announce(&mut book, progress(2));
    let flight = book.begin(NOW).unwrap();
    assert_eq!(flight.owed.key, key(1));
    book.overtake(key(1), 1, NOW);
    book.overtake(key(2), 1, NOW);
    assert_eq!(states(&mut book), [(1, DeliveryState::Superseded)], "the one that was not tried");
    // What is on its way may arrive; where it does not, it is not sent again.
    book.land(&flight.owed, bad(), NOW, 0.0);
    let change = book.take_changes().remove(0);
    assert_eq!(
        (change.state, change.attempts, change.failed.is_some()),
        (DeliveryState::Superseded, 1, true)
    );
    // One that waits for its retry.
    announce(&mut book, progress(3));
    let flight = book.begin(NOW).unwrap();
    book.land(&flight.owed, bad(), NOW, 0.0);
    book.take_changes();
    book.overtake(key(3), 1, NOW);
    assert_eq!(states(&mut book), [(1, DeliveryState::Superseded)]);
    // Nobody here knows of it.
    book.overtake(key(9), 1, NOW);
    assert_eq!((book.held(), book.bytes, book.begin(NOW + 60_000).is_none()), (0, 0, true));
}

#[test]
fn a_missed_word_is_found_in_sql_before_progress_is_tried_again() {
    let mut book = book_of(limits());
    for owner in [1, 2] {
        announce(&mut book, progress(owner));
        let flight = book.begin(NOW).unwrap();
        book.land(&flight.owed, bad(), NOW, 0.0);
    }
    let due = book.next_wake_ms().unwrap();
    assert!(book.take_checks().is_empty(), "nothing is asked before its time");
    book.wake(due);
    assert!(book.begin(due).is_none(), "SQL is asked first");
    let mut asked = book.take_checks();
    asked.sort_unstable();
    assert_eq!(asked, [Uuid::from_u128(1), Uuid::from_u128(2)]);
    assert_eq!(read_overtaken(&mut book, progress(1), 1, due), Offer::Known);
    assert_eq!(read(&mut book, progress(2), 1, due), Offer::Known);
    book.take_changes();
    book.checked(&asked, due);
    assert_eq!(book.begin(due).unwrap().owed.key.owner, Uuid::from_u128(2), "the other job goes on");
    assert!(book.begin(due).is_none());
    // A new owner of the partition reads the note with the row.
    let mut book = book_of(limits());
    assert_eq!(read_overtaken(&mut book, progress(4), 1, NOW), Offer::Taken);
    let change = book.take_changes().remove(0);
    assert_eq!((change.state, change.attempts), (DeliveryState::Superseded, 1));
    // A replay was asked for by a person.
    assert_eq!(read_overtaken(&mut book, Owed { replays: 1, ..progress(5) }, 0, NOW), Offer::Taken);
    assert_eq!(book.begin(NOW).unwrap().owed.key.owner, Uuid::from_u128(5));
}
