//! Everything at random.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

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
                    Offered { owed, standing: Standing::Live, overtaken: false, attempts: 0, due_at_ms: NOW, source: Source::Announced { run } }, now);
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
                        book.offer(Offered { owed, standing: Standing::Live, overtaken: false, attempts, due_at_ms, source: Source::Read }, now);
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
