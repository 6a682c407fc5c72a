//! One owned partition: its announcements, its pages from SQL, its flights, its outcomes.

mod reader;
mod recorder;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};
use ringback_bus::{Announcement, Announcements, BusError, GapTracker, Seen};
use ringback_contracts::{Message as _, v1};
use ringback_domain::target::REGISTERED_TARGET_BASE;
use ringback_domain::webhook::response::{Reason, Verdict};
use ringback_store::deliveries::{Claim, DeliveryState};
use tokio::sync::watch;
use tokio::time::{Sleep, sleep_until};
use uuid::Uuid;

use self::reader::{Page, Reader, Taken};
use self::recorder::{Recorder, Written};
use crate::book::{Book, ChainKey, Change, Flight, Offer, Offered, Source, Standing};
use crate::directory::View;
use crate::lease::{Doubts, Lease, Order};
use crate::send::{Landing, fly};
use crate::shared::Shared;

/// A try that could not begin comes back after this time.
const POSTPONE_MS: i64 = 1_000;
/// Outcomes on their way to SQL beyond which no further try begins: they are what a crash would repeat.
const UNRECORDED: usize = 4_096;
/// Asks for the standing of a webhook whatever the event.
const NO_EVENT: u32 = u32::MAX;
/// Events of one kind worked off before the others are looked at.
const BURST: usize = 64;
/// The loop looks around at least this often.
const IDLE: Duration = Duration::from_secs(1);

/// How a partition ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Everything is written down: the lease may be given back.
    HandedOver,
    /// The lease was lost.
    Lost,
}

type Flights = FuturesUnordered<BoxFuture<'static, (Flight, Landing)>>;

/// A partition at work.
pub(crate) struct Partition {
    shared: Arc<Shared>,
    claim: Claim,
    lease: watch::Receiver<Lease>,
    doubts: Doubts,
    book: Book,
    flights: Flights,
    gaps: GapTracker,
    reader: Reader,
    recorder: Recorder,
    views: watch::Receiver<Arc<View>>,
    view: Arc<View>,
}

enum Event {
    Lease,
    Webhooks,
    News(Announcement),
    Landed(Flight, Landing),
    Page(Result<Page, ringback_store::StoreError>),
    Recorded(Result<Written, ringback_store::StoreError>),
    Reconnected,
    Tick,
}

impl Partition {
    pub(crate) fn new(
        shared: Arc<Shared>,
        claim: Claim,
        lease: watch::Receiver<Lease>,
        doubts: Doubts,
    ) -> Self {
        let book = Book::new(shared.settings.book, claim.partition, Arc::clone(&shared.process));
        let mut views = shared.directory.subscribe();
        let view = Arc::clone(&views.borrow_and_update());
        let mut reader = Reader::new(shared.store.clone(), claim.partition);
        reader.leave_out(view.held());
        let recorder = Recorder::new(Arc::clone(&shared), claim);
        Self {
            shared,
            claim,
            lease,
            doubts,
            book,
            flights: FuturesUnordered::new(),
            gaps: GapTracker::new(),
            reader,
            recorder,
            views,
            view,
        }
    }

    /// Works until the lease says otherwise.
    ///
    /// # Errors
    /// The announcements cannot be subscribed to; the lease is given back and taken anew.
    pub(crate) async fn run(mut self) -> Result<Ended, BusError> {
        // Subscribed first, read afterwards: nothing falls in between.
        let mut news = self.shared.bus.subscribe_deliveries(self.claim.partition).await?;
        let mut connectivity = self.shared.bus.connectivity();
        let mut epoch = connectivity.borrow_and_update().epoch;
        self.reader.want_round();
        let mut timer = Box::pin(sleep_until((Instant::now() + IDLE).into()));
        // Both stay open as long as the process has its connection.
        let (mut listening, mut watching) = (true, true);
        loop {
            // What landed last is written down before anybody asks whether all is.
            self.write_down();
            let order = self.lease.borrow().order;
            match order {
                Order::Lost => return Ok(self.lose()),
                Order::HandOver if self.flights.is_empty() && self.recorder.is_idle() => {
                    return Ok(Ended::HandedOver);
                }
                Order::HandOver | Order::Own => {}
            }
            self.go_on(order);
            self.doubts.set(self.in_doubt());
            self.set(&mut timer);
            let event = tokio::select! {
                changed = self.lease.changed() => match changed {
                    Ok(()) => Event::Lease,
                    // The owner of the lease is gone, and with it whoever would renew it.
                    Err(_) => return Ok(Ended::Lost),
                },
                Ok(()) = self.views.changed() => Event::Webhooks,
                Some((flight, landing)) = self.flights.next(), if !self.flights.is_empty() => {
                    Event::Landed(flight, landing)
                }
                result = self.recorder.done() => Event::Recorded(result),
                page = self.reader.done() => Event::Page(page),
                message = news.next(), if listening => match message {
                    Some(message) => Event::News(message),
                    None => {
                        // Closed for good; what follows is found by sweeps.
                        listening = false;
                        Event::Tick
                    }
                },
                changed = connectivity.changed(), if watching => {
                    watching = changed.is_ok();
                    let now = connectivity.borrow_and_update().epoch;
                    let again = now != epoch;
                    epoch = now;
                    if again { Event::Reconnected } else { Event::Tick }
                }
                () = &mut timer => Event::Tick,
            };
            if self.handle(event, &mut news) == Some(Ended::Lost) {
                return Ok(self.lose());
            }
        }
    }

    /// Tries that are on their way, and outcomes that are not in SQL: what another owner makes again.
    fn in_doubt(&self) -> usize {
        self.flights.len() + self.recorder.waiting()
    }

    /// Somebody else owns the partition: what is in doubt will come to its receivers twice. Said aloud, because
    /// without a crash it is the only cause of copies.
    fn lose(&self) -> Ended {
        let (tries, lease) = (self.in_doubt(), *self.lease.borrow());
        self.shared.meters.partition_lost(tries);
        tracing::warn!(
            partition = self.claim.partition,
            tries,
            renewed_ms_ago = lease.renewed_ms_ago(),
            "lease lapsed with {tries} tries in flight"
        );
        Ended::Lost
    }

    fn handle(&mut self, event: Event, news: &mut Announcements) -> Option<Ended> {
        match event {
            Event::Lease | Event::Tick => {}
            Event::Webhooks => self.look_again(),
            Event::Reconnected => self.reader.want_round(),
            Event::News(message) => {
                self.announced(&message);
                for _ in 0..BURST {
                    let Some(Some(message)) = news.next().now_or_never() else { break };
                    self.announced(&message);
                }
            }
            Event::Landed(flight, landing) => {
                self.landed(&flight, landing);
                for _ in 0..BURST {
                    let Some(Some((flight, landing))) = self.flights.next().now_or_never() else { break };
                    self.landed(&flight, landing);
                }
            }
            Event::Page(Ok(page)) => self.read(page),
            Event::Page(Err(error)) => {
                tracing::warn!(partition = self.claim.partition, %error, "pending deliveries cannot be read");
            }
            Event::Recorded(result) => return self.recorded(result),
        }
        None
    }

    /// Starts whatever may start now.
    fn go_on(&mut self, order: Order) {
        let now = self.shared.clock.now_ms();
        self.book.wake(now);
        self.reader.want_checks(self.book.take_checks());
        if self.book.take_refill() {
            self.reader.want_refill();
        }
        self.write_down();
        if self.may_begin() {
            while self.recorder.waiting() < UNRECORDED
                && let Some(flight) = self.book.begin(now)
            {
                self.flights.push(fly(Arc::clone(&self.shared), flight, self.lease.clone()).boxed());
            }
            if self.reader.sweep_is_due() {
                let (held, flying) = (self.book.held(), self.book.in_flight());
                self.shared.meters.holds(self.claim.partition, held, flying);
                self.shared.meters.breakers(self.shared.process.open_breakers());
            }
            self.reader.start(self.has_room(), now);
        }
        self.recorder.start(order != Order::Own);
    }

    /// Whether the lease allows new tries and reads.
    fn may_begin(&self) -> bool {
        self.lease.borrow().allows()
    }

    /// Room for what is read, and for what becomes of it.
    fn has_room(&self) -> bool {
        self.book.has_room() && self.recorder.waiting() < UNRECORDED
    }

    /// Webhooks were made, changed, paused, disabled or deleted: what is in memory of them is read again.
    fn look_again(&mut self) {
        let view = Arc::clone(&self.views.borrow_and_update());
        for target in view.changed_since(&self.view) {
            self.book.drop_target(target);
            match view.standing(target, NO_EVENT) {
                Some(Standing::Ended(..)) => self.reader.want_clearance(target),
                Some(Standing::Live) => self.reader.want_round(),
                Some(Standing::Held) | None => {}
            }
        }
        self.reader.leave_out(view.held());
        self.view = view;
    }

    fn write_down(&mut self) {
        for change in self.book.take_changes() {
            self.shared.meters.changed(&change);
            tell(&change);
            self.recorder.push(change);
        }
    }

    fn set(&self, timer: &mut std::pin::Pin<Box<Sleep>>) {
        let now = Instant::now();
        let mut next = now + IDLE;
        if let Some(at_ms) = self.book.next_wake_ms() {
            let wait = u64::try_from(at_ms - self.shared.clock.now_ms()).unwrap_or(0);
            next = next.min(now + Duration::from_millis(wait.max(1)));
        }
        // Without a valid lease nothing is read: only its renewal wakes the loop then.
        let read_at = self.may_begin().then(|| self.reader.due_at(self.has_room())).flatten();
        for at in [self.recorder.due_at(), read_at].into_iter().flatten() {
            next = next.min(at);
        }
        if timer.deadline().into_std() != next {
            timer.as_mut().reset(next.into());
        }
    }

    fn announced(&mut self, message: &Announcement) {
        // A partition that is handed over takes nothing more; its next owner reads SQL.
        if self.lease.borrow().order != Order::Own {
            return;
        }
        let events = match v1::DeliveryEvents::decode(message.payload.clone()) {
            Ok(events) => events,
            Err(error) => {
                tracing::warn!(partition = self.claim.partition, %error, "an announcement cannot be read");
                self.reader.want_round();
                return;
            }
        };
        match self.gaps.observe(events.publisher, events.counter) {
            Seen::InOrder => {}
            Seen::Gap => {
                self.shared.meters.announcement_missed();
                self.reader.want_round();
            }
            Seen::Old => return,
        }
        let now = self.shared.clock.now_ms();
        for delivery in events.deliveries {
            if delivery.overtaken {
                if let Ok(owner) = Uuid::from_slice(&delivery.owner_id) {
                    let key = ChainKey { owner, target: delivery.target };
                    self.book.overtake(key, delivery.seq, now);
                }
                continue;
            }
            let (run, created_at_ms) = (delivery.run, delivery.created_at_ms);
            let attempts = delivery.attempts_before;
            let Some((owed, standing)) = self.shared.owed(&self.view, delivery, true) else {
                tracing::warn!(partition = self.claim.partition, "an announced delivery cannot be read");
                self.reader.want_round();
                continue;
            };
            let source = Source::Announced { run };
            let due_at_ms = created_at_ms.min(now);
            let offered = Offered { owed, standing, overtaken: false, attempts, due_at_ms, source };
            match self.book.offer(offered, now) {
                Offer::Taken | Offer::Known | Offer::Deferred => {}
                Offer::Full => self.reader.want_round(),
            }
        }
    }

    fn landed(&mut self, flight: &Flight, landing: Landing) {
        let now = self.shared.clock.now_ms();
        match landing {
            Landing::Tried(tried) => {
                let (key, seq, attempt) = (flight.owed.key, flight.owed.seq, flight.n);
                let job_id = flight.owed.job_id().map(tracing::field::display);
                match &tried.verdict {
                    Verdict::Delivered => {
                        tracing::debug!(
                            webhook_id = key.webhook_id(seq),
                            job_id,
                            attempt,
                            "webhook delivered"
                        );
                    }
                    Verdict::Retry(reason, _) | Verdict::Dead(reason) => {
                        tracing::debug!(webhook_id = key.webhook_id(seq), job_id, attempt, %reason, "webhook not delivered");
                    }
                }
                let target = flight.owed.key.target;
                if tried.verdict == Verdict::Dead(Reason::Gone) && target >= REGISTERED_TARGET_BASE {
                    // No partition sends to it until SQL says that it is disabled.
                    self.shared.directory.suspend(target);
                }
                self.book.land(&flight.owed, tried, now, rand::random::<f64>());
            }
            Landing::NotBegun(why) => {
                let owed = &flight.owed;
                let job_id = owed.job_id().map(tracing::field::display);
                let webhook_id = owed.key.webhook_id(owed.seq);
                if self.may_begin() {
                    tracing::warn!(webhook_id, job_id, why, "webhook not sent yet");
                } else {
                    // One line tells of a lease that lapses, not one for each webhook that waits for it.
                    tracing::debug!(webhook_id, job_id, why, "webhook not sent yet");
                }
                self.book.postpone(&flight.owed, POSTPONE_MS, now);
                match self.view.standing(flight.owed.key.target, flight.owed.event) {
                    Some(Standing::Live) => {}
                    // It changed while this was on its way.
                    Some(Standing::Held) | None => self.book.drop_target(flight.owed.key.target),
                    Some(Standing::Ended(..)) => {
                        self.book.drop_target(flight.owed.key.target);
                        self.reader.want_clearance(flight.owed.key.target);
                    }
                }
            }
        }
    }

    /// Takes what was read: first what has ended, because it decides what may still be sent.
    fn read(&mut self, page: Page) {
        let now = self.shared.clock.now_ms();
        for row in page.stored.iter().filter(|row| row.state != DeliveryState::Pending) {
            if let Some(key) = reader::key_of(row) {
                self.book.note_settled(key, row.delivery.seq, row.delivery.terminal, row.delivery.replays);
                let gone = row.state == DeliveryState::Dead && row.last_status == Some(410);
                if gone && key.target < REGISTERED_TARGET_BASE {
                    self.book.note_gone(key, now);
                }
            }
        }
        let mut taken = Taken::default();
        for row in page.stored {
            if row.state != DeliveryState::Pending {
                continue;
            }
            let due_at_ms = row.next_attempt_at_ms.unwrap_or(now);
            let overtaken = row.delivery.overtaken;
            let Some((owed, standing)) = self.shared.owed(&self.view, row.delivery, false) else {
                tracing::error!(partition = self.claim.partition, "a stored delivery cannot be read");
                continue;
            };
            let (attempts, source) = (row.attempts, Source::Read);
            let offered = Offered { owed, standing, overtaken, attempts, due_at_ms, source };
            match self.book.offer(offered, now) {
                Offer::Taken => taken.taken += 1,
                Offer::Known => {}
                Offer::Deferred => taken.deferred += 1,
                Offer::Full => taken.full = true,
            }
        }
        self.book.checked(&page.checked, now);
        self.reader.finish(page.cursor, taken);
    }

    fn recorded(&mut self, result: Result<Written, ringback_store::StoreError>) -> Option<Ended> {
        match result {
            Ok(Written { lost: false, reopened }) => {
                let now = self.shared.clock.now_ms();
                let written = self.recorder.written();
                self.shared.meters.recorded(written.len());
                for (at, change) in written.iter().enumerate() {
                    if reopened.contains(&at) {
                        self.book.reopened(change);
                    } else {
                        self.book.recorded(change, now);
                    }
                }
                if !reopened.is_empty() {
                    self.reader.want_round();
                }
                None
            }
            Ok(_) => {
                tracing::warn!(
                    partition = self.claim.partition,
                    "the partition belongs to another dispatcher now"
                );
                Some(Ended::Lost)
            }
            Err(error) => {
                self.recorder.failed(&error);
                None
            }
        }
    }
}

/// Ends that somebody may look for are logged; successes are not.
fn tell(change: &Change) {
    if change.state == DeliveryState::Dead {
        tracing::info!(
            webhook_id = change.key.webhook_id(change.seq),
            attempts = change.attempts,
            error = change.last_error.as_deref().unwrap_or_default(),
            "webhook given up"
        );
    }
}
