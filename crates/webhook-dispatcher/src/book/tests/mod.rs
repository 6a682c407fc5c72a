//! The rules of the book, one by one and at random.

mod gates;
mod gives_way;
mod lives;
mod order;
mod random;

use ringback_contracts::v1;
use ringback_domain::webhook::response::{Reason, TransportFault, Verdict};
use ringback_domain::webhook::schedule::SlowDown;
use ringback_store::deliveries::{DeliveryState, Timings};

use super::*;

const NOW: i64 = 1_800_000_000_000;

const GATES: GateLimits =
    GateLimits { in_flight: 100, target: 8, host: 32, project: 75, quota: 100, project_quota: 350 };

const BREAKER: BreakerLimits =
    BreakerLimits { failures: 10, percent: 90, open_ms: 1_000, open_max_ms: 60_000 };

fn book_of(limits: BookLimits) -> Book {
    Book::new(limits, 0, Arc::new(Process::new(BREAKER, 1_000)))
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
            overtaken: false,
            attempts: 0,
            due_at_ms: NOW,
            source: Source::Announced { run: 1 },
        },
        NOW,
    )
}

fn read(book: &mut Book, owed: Owed, attempts: u32, due_at_ms: i64) -> Offer {
    book.offer(
        Offered {
            owed,
            standing: Standing::Live,
            overtaken: false,
            attempts,
            due_at_ms,
            source: Source::Read,
        },
        NOW,
    )
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
        timings: Timings::default(),
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

fn strict(owner: u128, seq: u32, terminal: bool) -> Owed {
    let rules = Arc::new(Rules { strict_order: true, ..Rules::default() });
    Owed { rules, ..owed(owner, seq, terminal, 1) }
}

fn replay(owner: u128, seq: u32, terminal: bool, replays: u32, attempts_before: u32) -> Owed {
    Owed { replays, attempts_before, ..owed(owner, seq, terminal, 1) }
}
