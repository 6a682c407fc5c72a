//! Who may fly.

use super::*;

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
fn an_open_breaker_tries_nothing_then_only_the_oldest() {
    let process = Arc::new(Process::new(BreakerLimits { failures: 3, ..BREAKER }, 64));
    let limits = BookLimits { gates: GateLimits { target: 1, ..GATES }, ..limits() };
    let mut book = Book::new(limits, 0, Arc::clone(&process));
    for n in [9, 8, 7, 6, 5, 4] {
        announce(&mut book, owed(n, 1, true, 1));
    }
    for _ in 0..3 {
        let flight = book.begin(NOW).unwrap();
        book.land(&flight.owed, bad(), NOW, 0.0);
    }
    assert!(book.begin(NOW).is_none());
    assert_eq!((process.open_breakers(), book.next_wake_ms()), (1, Some(NOW + 1_000)));
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
    assert_eq!(process.open_breakers(), 0);
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

#[test]
fn a_partition_that_ends_gives_its_places_back() {
    let process = Arc::new(Process::new(BREAKER, 1));
    let mut first = Book::new(limits(), 0, Arc::clone(&process));
    let mut second = Book::new(limits(), 1, process);
    announce(&mut first, owed(1, 1, true, 1));
    announce(&mut second, owed(2, 1, true, 1));
    assert!(first.begin(NOW).is_some());
    assert!(second.begin(NOW).is_none(), "one at a time, in all partitions");
    let again = second.next_wake_ms().unwrap();
    assert!(again - NOW < 1_000, "{again}");
    drop(first);
    second.wake(again);
    assert!(second.begin(again).is_some());
}
