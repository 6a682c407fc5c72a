//! The proof matrix of receivers that do everything wrong (reference/webhooks.md sections 5 and 8): each test names its
//! row. Counted at the receiver: nothing is lost, and whatever comes twice has the same id and bytes.

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

mod support;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use ringback_contracts::v1;
use ringback_domain::JobId;
use ringback_domain::target::FORMAT_RUNPOD_STRICT;
use ringback_egress::Lookup;
use ringback_service_runtime::time::now_ms;
use ringback_store::deliveries::{DeliveryState, DeliveryView};
use ringback_test_support::hostile::{Habit, Hostile};
use ringback_test_support::receiver::Mode;
use ringback_test_support::wait::{until, until_true};
use support::{Dispatcher, Rig, SOON, end, job, to};

/// The first failed try of a job, once it is written down.
async fn failed_once(rig: &Rig, job: JobId) -> DeliveryView {
    until("a failed try", SOON, || async { rig.view(job).await.pop().filter(|d| d.attempts > 0) }).await
}

/// P1, and the rows "drip body, endless body, TLS stall, half-open connection" and "1 dead endpoint + good ones": more
/// of them than places; attempts end at the deadline, good receivers get each id exactly once.
#[tokio::test(flavor = "multi_thread")]
async fn drips_stalls_and_endless_bodies_end_at_the_deadline_and_cost_the_others_nothing() {
    let few = |config: &mut ringback_service_runtime::RingbackConfig| {
        config.webhooks.max_in_flight = 160;
        config.webhooks.per_target_in_flight = 32;
    };
    let Some(rig) = Rig::start_with(few).await else { return };
    let habits = [Habit::Drips, Habit::NeverEnds, Habit::DripsItsHead, Habit::Silent, Habit::HalfOpen];
    let mut hostile = Vec::new();
    for habit in habits {
        hostile.push((habit, Hostile::start(habit).await));
    }
    let _dispatcher = Dispatcher::start(&rig, true);
    let mut bad: BTreeMap<usize, Vec<JobId>> = BTreeMap::new();
    for (n, (habit, receiver)) in hostile.iter().enumerate() {
        let scheme = if *habit == Habit::Silent { "https" } else { "http" };
        for _ in 0..50 {
            let id = job();
            rig.owe(&[end(id, &receiver.url(scheme))]).await;
            bad.entry(n).or_default().push(id);
        }
    }
    let good: Vec<JobId> = (0..200).map(|_| job()).collect();
    for ids in good.chunks(20) {
        let owed: Vec<v1::Delivery> = ids.iter().map(|id| end(*id, &rig.url("/good"))).collect();
        rig.owe(&owed).await;
    }
    for id in &good {
        rig.receiver.wait_for(&id.to_string(), "COMPLETED", SOON).await;
    }
    for (n, ids) in &bad {
        let (habit, receiver) = &hostile[*n];
        match habit {
            // The verdict is in the head: these have been told.
            Habit::Drips | Habit::NeverEnds => {
                for id in ids {
                    rig.ends(*id, DeliveryState::Delivered).await;
                }
                until_true("their connections to be closed", SOON, || async { receiver.open() == 0 }).await;
            }
            Habit::DripsItsHead | Habit::Silent | Habit::HalfOpen => {
                let seen = failed_once(&rig, ids[0]).await;
                assert_eq!(seen.state, DeliveryState::Pending, "{habit:?}");
                assert!(seen.last_error.as_ref().unwrap().starts_with("timeout"), "{habit:?}: {seen:?}");
                let tried = rig.tries(ids[0]).await.remove(0);
                // The deadline of the rig, and time for a busy machine.
                assert!((1_400..6_000).contains(&tried.duration_ms), "{habit:?}: {} ms", tried.duration_ms);
                assert!(receiver.open() <= 32, "{habit:?} holds {}", receiver.open());
            }
        }
    }
    let counted = rig.receiver.accepted();
    assert_eq!(counted.len(), 200);
    assert!(counted.values().all(|hits| hits.len() == 1), "exactly one copy each");
}

/// P2: one event for one slow and several good webhooks, with a try longer than anybody's patience: the good ones get
/// one copy each.
#[tokio::test(flavor = "multi_thread")]
async fn one_slow_webhook_gives_the_others_no_second_copy() {
    let Some(rig) = Rig::start().await else { return };
    rig.receiver.answer("/slow", Mode::Hang);
    let slow = rig.hook(&rig.url("/slow"), |_| {}).await;
    let mut good = Vec::new();
    for n in 0..4 {
        good.push(rig.hook(&rig.url(&format!("/good{n}")), |_| {}).await);
    }
    let _dispatcher = Dispatcher::start(&rig, true);
    let id = job();
    let all: Vec<v1::Delivery> =
        std::iter::once(&slow).chain(&good).map(|hook| to(hook.target(), end(id, ""))).collect();
    rig.owe(&all).await;
    until_true("two tries of the slow one", SOON, || async {
        rig.receiver.hits().iter().filter(|hit| hit.path == "/slow").count() == 2
    })
    .await;
    for (n, hook) in good.iter().enumerate() {
        let hits = rig.receiver.hits();
        let copies: Vec<_> = hits.iter().filter(|hit| hit.path == format!("/good{n}")).collect();
        assert_eq!(copies.len(), 1);
        assert_eq!(copies[0].signature, Ok(()));
        assert_eq!(copies[0].webhook_id, format!("msg_{}_3_{}", id.simple(), hook.target()));
    }
}

/// P5 and the row "429 + Retry-After": a bare 429 waits longer than a plain failure; a named wait is kept up to the cap.
#[tokio::test(flavor = "multi_thread")]
async fn who_says_slow_down_is_left_alone_for_longer() {
    let capped = |config: &mut ringback_service_runtime::RingbackConfig| {
        config.webhooks.retry_after_max_ms = 120_000;
    };
    let Some(rig) = Rig::start_with(capped).await else { return };
    for (path, mode) in [
        ("/plain", Mode::Status(500)),
        ("/bare", Mode::Status(429)),
        ("/named", Mode::RetryAfter(429, 77)),
        ("/down", Mode::RetryAfter(503, 78)),
        ("/greedy", Mode::RetryAfter(429, 86_400)),
    ] {
        rig.receiver.answer(path, mode);
    }
    let _dispatcher = Dispatcher::start(&rig, true);
    for (path, wait_ms) in
        [("/plain", 10_000), ("/bare", 60_000), ("/named", 77_000), ("/down", 78_000), ("/greedy", 120_000)]
    {
        let (id, began) = (job(), now_ms());
        rig.owe(&[end(id, &rig.url(path))]).await;
        let seen = failed_once(&rig, id).await;
        let wait = seen.next_attempt_at_ms.unwrap() - began;
        assert!((wait_ms..wait_ms + 8_000).contains(&wait), "{path}: {wait} ms");
    }
}

/// P6, second half, and the row "302 to 169.254.169.254": a failure whose target is never contacted.
#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_is_a_failure_and_its_target_never_hears_of_it() {
    let Some(rig) = Rig::start().await else { return };
    let inside = Hostile::start(Habit::Drips).await;
    rig.receiver.answer("/moved", Mode::Redirect(inside.url("http")));
    let hook = rig.hook(&rig.url("/moved"), |_| {}).await;
    let _dispatcher = Dispatcher::start(&rig, true);
    let (a, b) = (job(), job());
    rig.owe(&[end(a, &rig.url("/moved")), to(hook.target(), end(b, ""))]).await;
    for id in [a, b] {
        let seen = failed_once(&rig, id).await;
        assert_eq!(seen.last_error.as_deref(), Some("redirect_302_not_followed"));
    }
    assert_eq!(inside.connections(), 0);
}

/// Answers a public address to whoever asks first and a denied one ever after, and says how often it was asked.
#[derive(Default)]
struct Rebinding {
    asked: AtomicUsize,
    answers: Vec<&'static str>,
}

impl Lookup for Rebinding {
    fn lookup(&self, _: String) -> BoxFuture<'static, std::io::Result<Vec<IpAddr>>> {
        let n = self.asked.fetch_add(1, Ordering::SeqCst).min(self.answers.len() - 1);
        let answer = self.answers[n].parse().unwrap();
        async move { Ok(vec![answer]) }.boxed()
    }
}

/// P10a and the rows "DNS rebinding" and "NAT64 and v4-mapped forms": whatever a name resolves to at the moment of
/// dialling is judged, in every spelling; no name is magic.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_resolves_to_a_denied_address_is_never_dialled() {
    let closed = |config: &mut ringback_service_runtime::RingbackConfig| {
        config.webhooks.allow_loopback = false;
        config.webhooks.allow_http = true;
        config.webhooks.allow_ports = (1..=u16::MAX).collect();
        config.webhooks.breaker_failures = 1_000;
    };
    let Some(rig) = Rig::start_with(closed).await else { return };
    let inside = Hostile::start(Habit::Drips).await;
    let answers =
        vec!["127.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "169.254.169.254", "::1"];
    let lookup = Arc::new(Rebinding { answers: answers.clone(), ..Rebinding::default() });
    let _dispatcher = Dispatcher::start_with(&rig, true, Arc::clone(&lookup) as Arc<dyn Lookup>);
    for _ in &answers {
        let id = job();
        rig.owe(&[end(id, &format!("http://backend:{}/hook", inside.address.port()))]).await;
        let seen = failed_once(&rig, id).await;
        assert!(seen.last_error.as_ref().unwrap().starts_with("blocked_address"), "{seen:?}");
    }
    assert!(lookup.asked.load(Ordering::SeqCst) >= answers.len(), "asked for each connection");
    assert_eq!(inside.connections(), 0);
}

/// P10b: an event that its receiver always refuses is tried at a bounded rate, dies, and is told of; the others go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_poisoned_event_dies_alone_and_its_death_is_told() {
    let Some(rig) = Rig::start().await else { return };
    rig.receiver.answer("/picky", Mode::AcceptOnly("COMPLETED"));
    let quick = |settings: &mut ringback_store::webhooks::crud::Settings| {
        settings.retry = Some(r#"{"waits_ms":[300],"max_attempts":4,"jitter_percent":0}"#.to_owned());
    };
    let hook = rig.hook(&rig.url("/picky"), quick).await;
    rig.hook(&rig.url("/notices"), |s| s.filter = r#"{"events":["delivery.dead"]}"#.to_owned()).await;
    let _dispatcher = Dispatcher::start(&rig, true);
    let poison = job();
    let failed = support::told(poison, 3, ringback_domain::JobStatus::Failed, "");
    rig.owe(&[to(hook.target(), failed)]).await;
    let good: Vec<JobId> = (0..20).map(|_| job()).collect();
    for id in &good {
        rig.owe(&[to(hook.target(), end(*id, ""))]).await;
    }
    for id in &good {
        rig.ends(*id, DeliveryState::Delivered).await;
    }
    let dead = rig.ends(poison, DeliveryState::Dead).await;
    assert_eq!((dead[0].attempts, dead[0].last_status), (4, Some(500)));
    let hits = rig.receiver.hits_of(&poison.to_string());
    assert_eq!(hits.len(), 4);
    assert!(hits.windows(2).all(|w| w[1].at - w[0].at >= Duration::from_millis(290)));
    assert!(hits.windows(2).all(|w| (&w[0].webhook_id, &w[0].body) == (&w[1].webhook_id, &w[1].body)));
    let notice = until("the notice", SOON, || async {
        rig.receiver.hits().into_iter().find(|hit| hit.path == "/notices")
    })
    .await;
    assert_eq!(notice.json["type"], "delivery.dead");
    assert_eq!(notice.json["data"]["delivery_id"], dead[0].id);
    assert_eq!(notice.json["data"]["webhook_id"], hook.public_id);
    assert_eq!(notice.signature, Ok(()));
}

/// `runpod-strict` of one endpoint beside the operator's rules: 202 is no acknowledgement there.
#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_may_want_exactly_200() {
    let Some(rig) = Rig::start().await else { return };
    rig.receiver.answer("/accepted", Mode::Status(202));
    let _dispatcher = Dispatcher::start(&rig, true);
    let (usual, strict) = (job(), job());
    let exactly = v1::Delivery { format: FORMAT_RUNPOD_STRICT, ..end(strict, &rig.url("/accepted")) };
    rig.owe(&[end(usual, &rig.url("/accepted")), exactly]).await;
    rig.ends(usual, DeliveryState::Delivered).await;
    let seen = failed_once(&rig, strict).await;
    assert_eq!((seen.state, seen.last_status), (DeliveryState::Pending, Some(202)));
}

/// The attempts log: address, parts of the duration, and the beginning of the answer, of failures and of successes.
#[tokio::test(flavor = "multi_thread")]
async fn tries_are_written_down_with_address_and_times() {
    let brief = |config: &mut ringback_service_runtime::RingbackConfig| {
        config.webhooks.response_keep_bytes = 5;
    };
    let Some(rig) = Rig::start_with(brief).await else { return };
    rig.receiver.answer("/bad", Mode::Status(500));
    let _dispatcher = Dispatcher::start(&rig, true);
    let (good, bad) = (job(), job());
    // One after the other: the second may use the connection of the first, which then has no time of its own.
    rig.owe(&[end(good, &rig.url("/good"))]).await;
    rig.ends(good, DeliveryState::Delivered).await;
    rig.owe(&[end(bad, &rig.url("/bad"))]).await;
    failed_once(&rig, bad).await;
    let tried = rig.tries(bad).await.remove(0);
    assert_eq!(tried.response.as_deref(), Some(b"{\"ack".as_slice()), "cut off");
    assert!(tried.address.as_ref().is_some_and(|address| address.starts_with("127.0.0.1:")), "{tried:?}");
    let store = &rig.store;
    let one = |text: &'static str| async move {
        let row = ringback_store::sql::query_one(store.read(), text, []).await.unwrap().unwrap();
        row.try_get_by_index::<i64>(0).unwrap()
    };
    let measured = one(
        "SELECT COUNT(*) FROM delivery_attempts WHERE first_byte_ms IS NOT NULL AND first_byte_ms <= duration_ms",
    );
    assert_eq!(measured.await, 1);
    // A success keeps the same in its delivery's row.
    let found = ringback_store::delivery_search::one(
        rig.store.read(),
        support::PROJECT,
        uuid::Uuid::from_bytes(*good.as_bytes()),
        3,
        0,
    );
    let found = found.await.unwrap().unwrap();
    let (took_ms, parts) = (found.duration_ms.unwrap().cast_unsigned(), found.timings);
    assert!(parts.first_byte_ms.is_some_and(|ms| ms <= took_ms), "{parts:?} of {took_ms}");
    assert!(parts.connect_ms.is_some_and(|ms| ms <= took_ms), "a new connection: {parts:?} of {took_ms}");
    assert!(found.address.is_some() && found.response.is_some(), "{found:?}");
}
