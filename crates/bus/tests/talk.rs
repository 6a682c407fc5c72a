//! Requests and announcements against a real nats-server.

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

mod support;

use bytes::Bytes;
use ringback_bus::{
    Bus, BusError, DeliveryAnnouncer, GapTracker, Lane, PublishFailure, PublishOutcome, Seen, Verb,
};
use ringback_service_runtime::config::NatsConfig;
use std::time::{Duration, Instant};
use support::{Rig, SOON, publication};
use tokio::time::timeout;

#[tokio::test]
async fn a_request_without_a_tracker_fails_at_once() {
    let rig = Rig::start().await;
    let since = Instant::now();
    let error = rig.bus.request(Verb::Grant, Bytes::from_static(b"?"), SOON).await.unwrap_err();
    assert_eq!(error, BusError::NoResponders { subject: "rb.test.tracker.grant".to_owned() });
    assert!(error.is_transient());
    assert!(since.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn requests_are_shared_and_answered() {
    let rig = Rig::start().await;
    let mut a = rig.bus.serve(Verb::Outcomes, 4).await.unwrap();
    let mut b = rig.bus.serve(Verb::Outcomes, 4).await.unwrap();
    rig.bus.flush().await.unwrap();
    let served = tokio::spawn(async move {
        let (mut by_a, mut by_b) = (0, 0);
        while by_a + by_b < 100 {
            let request = tokio::select! {
                request = a.next() => { by_a += 1; request.unwrap() }
                request = b.next() => { by_b += 1; request.unwrap() }
            };
            let answer = [b"re: ", &request.payload[..]].concat();
            request.respond(answer.into()).await.unwrap();
        }
        (by_a, by_b)
    });
    for n in 0..100 {
        let answer = rig.bus.request(Verb::Outcomes, Bytes::from(n.to_string()), SOON).await.unwrap();
        assert_eq!(answer, format!("re: {n}"));
    }
    let (by_a, by_b) = served.await.unwrap();
    assert!(by_a > 10 && by_b > 10, "{by_a} and {by_b}");
}

#[tokio::test]
async fn concurrency_is_bounded_and_silence_times_out() {
    let rig = Rig::start().await;
    let mut requests = rig.bus.serve(Verb::Beat, 2).await.unwrap();
    rig.bus.flush().await.unwrap();
    let ask = |n: u8| {
        let bus = rig.bus.clone();
        tokio::spawn(async move {
            bus.request(Verb::Beat, Bytes::from(vec![n]), Duration::from_millis(1500)).await
        })
    };
    let asked: Vec<_> = (0..3).map(ask).collect();
    let first = timeout(SOON, requests.next()).await.unwrap().unwrap();
    let second = timeout(SOON, requests.next()).await.unwrap().unwrap();
    assert!(timeout(Duration::from_millis(200), requests.next()).await.is_err(), "two are out already");
    first.respond(Bytes::from_static(b"1")).await.unwrap();
    let third = timeout(SOON, requests.next()).await.unwrap().unwrap();
    drop(second);
    third.respond(Bytes::from_static(b"3")).await.unwrap();
    let mut answers = Vec::new();
    for request in asked {
        answers.push(request.await.unwrap());
    }
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 2);
    assert_eq!(
        answers
            .iter()
            .filter(|answer| matches!(answer, Err(BusError::Timeout { timeout_ms: 1500, .. })))
            .count(),
        1
    );
}

#[tokio::test]
async fn requests_flow_again_after_the_kill_of_the_server() {
    let rig = Rig::start().await;
    let mut requests = rig.bus.serve(Verb::Command, 2).await.unwrap();
    let server = tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            let payload = request.payload.clone();
            request.respond(payload).await.unwrap();
        }
    });
    rig.kill_server().await;
    let deadline = Instant::now() + SOON;
    loop {
        match rig.bus.request(Verb::Command, Bytes::from_static(b"x"), Duration::from_secs(1)).await {
            Ok(answer) => break assert_eq!(answer, "x"),
            Err(error) => assert!(error.is_transient() && Instant::now() < deadline, "{error}"),
        }
    }
    server.abort();
}

#[tokio::test]
async fn announcements_arrive_and_losses_show_as_gaps() {
    let rig = Rig::start().await;
    let mut deliveries = rig.bus.subscribe_deliveries(3).await.unwrap();
    let mut transitions = rig.bus.subscribe_transitions().await.unwrap();
    let mut stops = rig.bus.subscribe_stop("w-1").await.unwrap();
    let mut chunks = rig.bus.subscribe_chunks(None).await.unwrap();
    rig.bus.flush().await.unwrap();
    assert!(rig.bus.announce_transitions(Bytes::from_static(b"t")).await);
    assert!(rig.bus.announce_stop("w-2", Bytes::from_static(b"not for us")).await);
    assert!(rig.bus.announce_stop("w-1", Bytes::from_static(b"s")).await);
    assert!(rig.bus.announce_chunks(support::ENDPOINT, Bytes::from_static(b"c")).await);
    assert_eq!(timeout(SOON, transitions.next()).await.unwrap().unwrap().payload, "t");
    assert_eq!(timeout(SOON, stops.next()).await.unwrap().unwrap().payload, "s");
    let chunk = timeout(SOON, chunks.next()).await.unwrap().unwrap();
    assert_eq!((chunk.payload, chunk.subject.as_str()), (Bytes::from_static(b"c"), "rb.test.chunk.9"));

    let announcer = DeliveryAnnouncer::new(rig.bus.clone(), 8);
    let encode = |publisher: u64, counter: u64| Bytes::from(format!("{publisher} {counter}"));
    assert!(announcer.announce(3, encode).await);
    assert!(announcer.announce(4, encode).await, "another partition counts for itself");
    assert!(!announcer.announce(8, encode).await, "there is no such partition");
    assert!(announcer.announce(3, encode).await);
    let mut gaps = GapTracker::new();
    for expected in 1..=2u64 {
        let text =
            String::from_utf8(timeout(SOON, deliveries.next()).await.unwrap().unwrap().payload.to_vec())
                .unwrap();
        let (publisher, counter) = text.split_once(' ').unwrap();
        assert_eq!(
            (publisher, counter),
            (announcer.publisher().to_string().as_str(), expected.to_string().as_str())
        );
        assert_eq!(gaps.observe(announcer.publisher(), expected), Seen::InOrder);
    }
    assert_eq!(gaps.observe(announcer.publisher(), 4), Seen::Gap);
}

#[tokio::test]
async fn without_a_server_nothing_hangs() {
    ringback_service_runtime::crypto_provider::install();
    // A port that nobody listens on: bound, then let go.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = NatsConfig { url: Some(format!("nats://127.0.0.1:{port}")), ..NatsConfig::default() };
    let bus = Bus::connect(&config, "test").await.unwrap();
    assert!(!bus.is_connected());
    assert_eq!(bus.connectivity().borrow().epoch, 0);
    let short = Duration::from_millis(200);
    assert_eq!(bus.request(Verb::Beat, Bytes::new(), short).await, Err(BusError::Disconnected));
    assert!(!bus.announce_transitions(Bytes::new()).await);
    let outcome = bus.job_publisher().publish(publication(1, Lane::Hi)).await;
    assert_eq!(outcome, PublishOutcome::Failed(PublishFailure::NotSent));
    assert!(!PublishFailure::NotSent.may_be_stored());
    let error = Bus::connect(&NatsConfig::default(), "test").await.unwrap_err();
    assert_eq!(error, BusError::Permanent("nats.url is not set".to_owned()));
}
