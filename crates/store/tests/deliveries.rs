//! Deliveries, leases and secrets on real databases: SQLite always, PostgreSQL where it is installed.

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

mod common;

use std::sync::Arc;

use common::{Opened as _, on_both};
use ringback_contracts::{Message as _, v1};
use ringback_domain::target::Target;
use ringback_domain::webhook::body;
use ringback_domain::{BatchId, JobId, JobStatus, ProjectId, TimestampMs, batch::BatchStatus};
use ringback_service_runtime::Redacted;
use ringback_store::deliveries::{
    Claim, DeliveryCounts, DeliveryState, DueAfter, FailedAttempt, JobTransition, Outcome, Recorded, Stored,
    Timings, attempts_of, batch_delivery, deliveries_of, delivery_counts, delivery_counts_between,
    delivery_counts_of, due_page, insert_deliveries, job_delivery, pending_age_ms, record_outcomes,
    stored_of,
};
use ringback_store::delivery_search::one;
use ringback_store::partitions::{Membership, Take, acquire, depart, keep_alive, leases, release, renew};
use ringback_store::secrets::{
    SecretKey, add_secret, ensure_secret, live_secrets, set_secrets, signing_keys,
};
use ringback_store::{Store, StoreError, Urgency, sql};
use uuid::Uuid;

const PROJECT: ProjectId = ProjectId(3);
const NOW: i64 = 1_800_000_000_000;
const TIMINGS: Timings = Timings { dns_ms: Some(1), connect_ms: Some(2), first_byte_ms: Some(6) };

on_both!(
    a_delivery_keeps_its_first_bytes,
    a_partition_is_read_page_by_page,
    only_the_owner_of_the_partition_records,
    failed_tries_are_logged_once,
    counts_follow_the_states,
    leases_change_hands_in_order,
    members_are_counted_while_they_live,
    secrets_are_kept_encrypted_and_rotate,
);

fn job(n: u8) -> JobId {
    JobId::from_parts(NOW.unsigned_abs() + u64::from(n), [n; 10])
}

fn uuid(job: JobId) -> Uuid {
    Uuid::from_bytes(*job.as_bytes())
}

fn delivery(job: JobId, seq: u32, status: JobStatus) -> v1::Delivery {
    let target = &Target::of_submit(None, Some("https://hooks.example/x"), false)[0];
    let of = JobTransition {
        job,
        project: PROJECT,
        seq,
        run: 1,
        status,
        at: TimestampMs(NOW + i64::from(seq)),
        traceparent: None,
    };
    job_delivery(&of, 0, target, body::in_progress(&job.to_string(), u64::from(seq)))
}

async fn insert(store: &Store, deliveries: Vec<v1::Delivery>) -> u64 {
    let (partitions, deliveries) = (store.facts().partitions, Arc::new(deliveries));
    store
        .write(Urgency::Now, move |tx| {
            let deliveries = Arc::clone(&deliveries);
            Box::pin(async move { insert_deliveries(tx, partitions, &deliveries).await })
        })
        .await
        .unwrap()
}

async fn take(store: &Store, me: &'static str, partition: u16, lease_ms: u64, take: Take) -> Option<Claim> {
    store.write(Urgency::Now, move |tx| Box::pin(acquire(tx, me, partition, lease_ms, take))).await.unwrap()
}

async fn record(store: &Store, outcomes: Vec<Outcome>) -> Recorded {
    let outcomes = Arc::new(outcomes);
    store
        .write(Urgency::Lazy, move |tx| {
            let outcomes = Arc::clone(&outcomes);
            Box::pin(async move { record_outcomes(tx, &outcomes).await })
        })
        .await
        .unwrap()
}

fn delivered(claim: Claim, job: JobId, seq: u32) -> Outcome {
    Outcome {
        claim,
        owner: uuid(job),
        seq,
        target: 0,
        state: DeliveryState::Delivered,
        attempts: 1,
        next_attempt_at_ms: None,
        ended_at_ms: Some(NOW + 50),
        last_status: Some(200),
        last_error: None,
        failed: None,
        duration_ms: Some(7),
        timings: TIMINGS,
        address: Some("127.0.0.1:9".into()),
        response: Some(b"ok".to_vec()),
        replays: 0,
    }
}

async fn a_delivery_keeps_its_first_bytes(store: Store) {
    let first = delivery(job(1), 1, JobStatus::InQueue);
    assert_eq!(insert(&store, vec![first.clone()]).await, 1);
    let mut second = delivery(job(1), 1, JobStatus::Completed);
    second.url = "https://elsewhere.example/".into();
    assert_eq!(insert(&store, vec![second, delivery(job(1), 2, JobStatus::Completed)]).await, 1);
    let stored = stored_of(store.read(), &[uuid(job(1))]).await.unwrap();
    assert_eq!(stored.len(), 2);
    let pending = |delivery, at| Stored {
        delivery,
        state: DeliveryState::Pending,
        attempts: 0,
        next_attempt_at_ms: Some(at),
        last_status: None,
    };
    assert_eq!(stored[0], pending(first, NOW + 1));
    assert!(stored[1].delivery.terminal);
    let broken = v1::Delivery { owner_id: vec![1, 2].into(), ..delivery(job(2), 1, JobStatus::InQueue) };
    let refused = store
        .write(Urgency::Now, move |tx| {
            let broken = broken.clone();
            Box::pin(async move { insert_deliveries(tx, 8, &[broken]).await })
        })
        .await;
    assert!(matches!(refused, Err(StoreError::Permanent { .. })));
}

async fn a_partition_is_read_page_by_page(store: Store) {
    // Job ids end in `n`, so job(8) and job(16) … share partition 0 of 8.
    let jobs: Vec<JobId> = (1..=20).map(|n| job(n * 8)).collect();
    let mut all: Vec<v1::Delivery> = jobs.iter().map(|&j| delivery(j, 1, JobStatus::InQueue)).collect();
    all.extend(jobs.iter().map(|&j| delivery(j, 2, JobStatus::Completed)));
    all.push(delivery(job(9), 1, JobStatus::InQueue));
    insert(&store, all).await;
    let (mut found, mut after, mut pages) = (Vec::new(), DueAfter::START, 0);
    loop {
        let page = due_page(store.read(), 0, NOW + 2, after, 7).await.unwrap();
        found.extend(page.owners);
        pages += 1;
        match page.next {
            Some(next) => after = next,
            None => break,
        }
    }
    assert_eq!(pages, 6);
    let expected: Vec<Uuid> = jobs.iter().chain(&jobs).map(|&j| uuid(j)).collect();
    assert_eq!(found, expected, "in the order in which they are due");
    let early = due_page(store.read(), 0, NOW + 1, DueAfter::START, 100).await.unwrap();
    assert_eq!((early.owners.len(), early.next), (20, None), "what is due later stays away");
    let stored = stored_of(store.read(), &expected[..20]).await.unwrap();
    assert_eq!(stored.len(), 40);
    let order: Vec<_> = stored.iter().map(|s| (s.delivery.owner_id.clone(), s.delivery.seq)).collect();
    assert!(order.is_sorted());
    assert!(pending_age_ms(store.read(), 8, NOW + 1_001).await.unwrap() == Some(1_000));
}

async fn only_the_owner_of_the_partition_records(store: Store) {
    insert(&store, vec![delivery(job(8), 1, JobStatus::InQueue), delivery(job(9), 1, JobStatus::InQueue)])
        .await;
    let old = take(&store, "a", 0, 1, Take::Expired).await.unwrap();
    let other = take(&store, "a", 1, 60_000, Take::Expired).await.unwrap();
    let new = take(&store, "b", 0, 60_000, Take::Always).await.unwrap();
    assert_eq!(new.epoch, old.epoch + 1);
    let done = record(&store, vec![delivered(old, job(8), 1), delivered(other, job(9), 1)]).await;
    assert_eq!(done, Recorded { changed: 1, lost: vec![old], died: Vec::new() });
    let stored = stored_of(store.read(), &[uuid(job(8)), uuid(job(9))]).await.unwrap();
    assert_eq!([stored[0].state, stored[1].state], [DeliveryState::Pending, DeliveryState::Delivered]);
    assert_eq!(record(&store, vec![delivered(new, job(8), 1)]).await.changed, 1);
    // An end stays an end, whoever repeats or contradicts it.
    let again = Outcome { state: DeliveryState::Dead, ..delivered(new, job(8), 1) };
    assert_eq!(record(&store, vec![again]).await.changed, 0);
    let seen = deliveries_of(store.read(), PROJECT, uuid(job(8))).await.unwrap();
    assert_eq!((seen[0].state, seen[0].last_status), (DeliveryState::Delivered, Some(200)));
    assert_eq!(seen[0].delivered_at_ms(), Some(NOW + 50));
    let found = one(store.read(), PROJECT, uuid(job(8)), 1, 0).await.unwrap().unwrap();
    assert_eq!((found.duration_ms, found.response.as_deref()), (Some(7), Some(&b"ok"[..])));
    assert_eq!(found.timings, TIMINGS);
    assert_eq!(seen[0].id, format!("msg_{}_1_0", job(8).simple()));
    assert!(deliveries_of(store.read(), ProjectId(4), uuid(job(8))).await.unwrap().is_empty());
}

async fn failed_tries_are_logged_once(store: Store) {
    insert(&store, vec![delivery(job(8), 1, JobStatus::Completed)]).await;
    let claim = take(&store, "a", 0, 60_000, Take::Expired).await.unwrap();
    let failed = Outcome {
        state: DeliveryState::Pending,
        next_attempt_at_ms: Some(NOW + 10_000),
        ended_at_ms: None,
        last_status: Some(500),
        last_error: Some("http_500".into()),
        failed: Some(FailedAttempt {
            at_ms: NOW + 5,
            duration_ms: 7,
            status: Some(500),
            error: Some("http_500".into()),
            address: Some("127.0.0.1:9".into()),
            response: Some(b"oh".to_vec()),
            timings: TIMINGS,
        }),
        ..delivered(claim, job(8), 1)
    };
    // A write whose answer was lost is repeated.
    for _ in 0..2 {
        assert_eq!(record(&store, vec![failed.clone()]).await.changed, 1);
    }
    let tries = attempts_of(store.read(), PROJECT, uuid(job(8))).await.unwrap();
    assert_eq!(tries.len(), 1);
    assert_eq!((tries[0].n, tries[0].status, tries[0].duration_ms), (1, Some(500), 7));
    assert_eq!(tries[0].response.as_deref(), Some(&b"oh"[..]));
    assert_eq!(tries[0].timings, TIMINGS);
    let stored = &stored_of(store.read(), &[uuid(job(8))]).await.unwrap()[0];
    assert_eq!((stored.attempts, stored.next_attempt_at_ms), (1, Some(NOW + 10_000)));
    assert!(stored.delivery.body.as_ref().unwrap().encoded_len() > 0);
    assert_eq!(
        stored.delivery.body,
        delivery(job(8), 1, JobStatus::Completed).body,
        "the same bytes every time"
    );
}

async fn counts_follow_the_states(store: Store) {
    let batch = BatchId::from_parts(NOW.unsigned_abs(), [0; 10]);
    let end = body::batch_end(&body::BatchEnd {
        batch_id: "b",
        status: BatchStatus::Failed,
        counts: Default::default(),
        result_url: "https://x.example/",
    });
    let ended = batch_delivery(
        batch,
        PROJECT,
        1,
        BatchStatus::Failed,
        "https://hooks.example/b",
        end,
        TimestampMs(NOW),
        Some("tp"),
    );
    let mut all = vec![ended];
    all.extend((1..=100).map(|n| delivery(job(n), 1, JobStatus::InQueue)));
    insert(&store, all).await;
    let mut outcomes = Vec::new();
    for n in 1..=90_u8 {
        let partition = u16::from(n % 8);
        let claim = take(&store, "a", partition, 60_000, Take::Expired).await;
        let epoch =
            leases(store.read()).await.unwrap().iter().find(|l| l.partition == partition).unwrap().epoch;
        let state = DeliveryState::ALL[1 + usize::from(n % 4)];
        let claim = claim.unwrap_or(Claim { partition, epoch });
        outcomes.push(Outcome { state, ..delivered(claim, job(n), 1) });
    }
    assert_eq!(record(&store, outcomes).await.changed, 90);
    let counts = delivery_counts(store.read()).await.unwrap();
    assert_eq!(
        counts,
        DeliveryCounts { pending: 11, delivered: 22, dead: 23, superseded: 23, cancelled: 22 }
    );
    assert_eq!(counts.total(), 101);
    let window = delivery_counts_between(store.read(), uuid(job(1)), uuid(job(11))).await.unwrap();
    assert_eq!(window.total(), 10);
    let of = delivery_counts_of(store.read(), &[uuid(job(1)), uuid(job(100)), uuid(job(101))]).await.unwrap();
    assert_eq!(of.len(), 2);
    assert_eq!(of[&uuid(job(100))].pending, 1);
    let seen = deliveries_of(store.read(), PROJECT, Uuid::from_bytes(*batch.as_bytes())).await.unwrap();
    assert_eq!(seen[0].event, "batch.failed");
}

async fn leases_change_hands_in_order(store: Store) {
    let first = take(&store, "a", 5, 60_000, Take::GivenBack).await.unwrap();
    assert_eq!(first, Claim { partition: 5, epoch: 1 });
    assert_eq!(take(&store, "b", 5, 60_000, Take::Expired).await, None, "held");
    let held = |claims: Vec<Claim>, me: &'static str| {
        let store = store.clone();
        async move {
            let claims = Arc::new(claims);
            store
                .write(Urgency::Now, move |tx| {
                    let claims = Arc::clone(&claims);
                    Box::pin(async move { renew(tx, me, &claims, 60_000).await })
                })
                .await
                .unwrap()
        }
    };
    assert_eq!(held(vec![first], "a").await, vec![first]);
    assert_eq!(held(vec![first], "b").await, vec![], "only the owner renews");
    let (not_mine, back) = (Claim { epoch: 7, ..first }, first);
    for claim in [not_mine, back] {
        store.write(Urgency::Now, move |tx| Box::pin(release(tx, "a", claim))).await.unwrap();
    }
    let second = take(&store, "b", 5, 0, Take::Expired).await.unwrap();
    assert_eq!(second.epoch, 2, "given back, so nobody waits");
    assert_eq!(take(&store, "a", 5, 60_000, Take::GivenBack).await, None, "run out is not given back");
    let third = take(&store, "a", 5, 60_000, Take::Expired).await.unwrap();
    assert_eq!(third.epoch, 3, "run out");
    assert_eq!(held(vec![second, third], "a").await, vec![third]);
    assert_eq!(held(vec![second], "b").await, vec![]);
    let all = leases(store.read()).await.unwrap();
    assert_eq!((all.len(), all[0].owner.as_str(), all[0].epoch), (1, "a", 3));
}

async fn members_are_counted_while_they_live(store: Store) {
    let claim = take(&store, "a", 2, 60_000, Take::Expired).await.unwrap();
    let alive = |me: &'static str, claims: Vec<Claim>, lease_ms: u64| {
        let store = store.clone();
        async move {
            let claims = Arc::new(claims);
            store
                .write(Urgency::Now, move |tx| {
                    let claims = Arc::clone(&claims);
                    Box::pin(async move { keep_alive(tx, me, &claims, lease_ms).await })
                })
                .await
                .unwrap()
        }
    };
    let seen = alive("a", vec![claim], 60_000).await;
    assert_eq!(seen, Membership { held: vec![claim], taken: vec![2], lapsed: vec![], members: 1 });
    let seen = alive("b", vec![], 60_000).await;
    assert_eq!(seen, Membership { held: vec![], taken: vec![2], lapsed: vec![], members: 2 });
    // What ran out is told apart from what was given back.
    take(&store, "dead", 3, 0, Take::GivenBack).await.unwrap();
    let back = take(&store, "b", 4, 0, Take::GivenBack).await.unwrap();
    store.write(Urgency::Now, move |tx| Box::pin(release(tx, "b", back))).await.unwrap();
    let seen = alive("b", vec![], 60_000).await;
    assert_eq!((seen.taken, seen.lapsed), (vec![2], vec![3]));
    // One that does not renew, and one that says that it leaves.
    alive("c", vec![], 0).await;
    assert_eq!(alive("a", vec![claim], 60_000).await.members, 2);
    store.write(Urgency::Now, move |tx| Box::pin(depart(tx, "b"))).await.unwrap();
    assert_eq!(alive("a", vec![claim], 60_000).await.members, 1);
    assert_eq!(leases(store.read()).await.unwrap().len(), 3, "members are no leases");
}

async fn secrets_are_kept_encrypted_and_rotate(store: Store) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/secret.key");
    let key = SecretKey::open(&path).unwrap();
    let again = SecretKey::open(&path).unwrap();
    let sealed = key.seal(b"words", "p").unwrap();
    assert_eq!(again.open_sealed(&sealed, "p").unwrap().expose(), b"words");
    assert!(again.open_sealed(&sealed, "q").is_err());
    assert!(SecretKey::from_bytes(&[0; 32]).open_sealed(&sealed, "p").is_err());
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);

    let ensured = |key: SecretKey| {
        let store = store.clone();
        async move {
            store
                .write(Urgency::Now, move |tx| {
                    let key = key.clone();
                    Box::pin(async move { ensure_secret(tx, &key, PROJECT).await })
                })
                .await
                .unwrap()
        }
    };
    assert!(ensured(key.clone()).await);
    assert!(!ensured(key.clone()).await);
    let made = live_secrets(store.read(), &key, PROJECT).await.unwrap();
    assert_eq!(made.len(), 1);
    assert!(made[0].secret.expose().starts_with("whsec_"));
    assert!(live_secrets(store.read(), &SecretKey::from_bytes(&[9; 32]), PROJECT).await.is_err());

    let texts = |texts: &[&str]| texts.iter().map(|t| Redacted::new((*t).to_owned())).collect::<Vec<_>>();
    for (given, live) in [
        (texts(&["new", "old"]), vec!["new", "old"]),
        (texts(&["newest", "new"]), vec!["newest", "new"]),
        (texts(&[]), vec!["newest", "new"]),
        (texts(&["newest", "new"]), vec!["newest", "new"]),
    ] {
        let (key2, given) = (key.clone(), Arc::new(given));
        store
            .write(Urgency::Now, move |tx| {
                let (key, given) = (key2.clone(), Arc::clone(&given));
                Box::pin(async move { set_secrets(tx, &key, PROJECT, &given).await })
            })
            .await
            .unwrap();
        let now = live_secrets(store.read(), &key, PROJECT).await.unwrap();
        assert_eq!(now.iter().map(|s| s.secret.expose().as_str()).collect::<Vec<_>>(), live);
    }
    assert_eq!(signing_keys(store.read(), &key, PROJECT).await.unwrap().len(), 2);
    let (key2, canary) = (key.clone(), Redacted::new("canary-77f1".to_owned()));
    store
        .write(Urgency::Now, move |tx| {
            let (key, canary) = (key2.clone(), canary.clone());
            Box::pin(async move { add_secret(tx, &key, PROJECT, &canary).await })
        })
        .await
        .unwrap();
    let rows = sql::query(store.read(), "SELECT secret_encrypted FROM project_secrets", []).await.unwrap();
    for row in rows {
        let stored: Vec<u8> = row.try_get_by_index(0).unwrap();
        assert!(!stored.windows(6).any(|w| w == b"canary"), "encrypted at rest");
    }
}

#[tokio::test]
async fn hot_statements_look_up_their_keys_on_sqlite() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::opened(format!("sqlite://{}/t.db", dir.path().display())).await;
    for plan in [
        "WITH v (owner_id, seq, target, state) AS (VALUES (x'00', 1, 0, 1), (x'01', 1, 0, 1)) \
         UPDATE deliveries SET state = v.state FROM v WHERE deliveries.owner_id = v.owner_id \
         AND deliveries.seq = v.seq AND deliveries.target = v.target AND +deliveries.state = 0",
        "SELECT next_attempt_at_ms, owner_id FROM deliveries WHERE partition = 1 AND state = 0 \
         AND next_attempt_at_ms <= 9 AND (next_attempt_at_ms > 3 OR (next_attempt_at_ms = 3 AND owner_id > x'00')) \
         AND next_attempt_at_ms >= 3 ORDER BY next_attempt_at_ms, owner_id LIMIT 5",
        "SELECT MIN(next_attempt_at_ms) FROM deliveries WHERE partition = 1 AND state = 0",
        "SELECT state, COUNT(*) FROM deliveries WHERE owner_id >= x'00' AND owner_id < x'01' GROUP BY state",
    ] {
        let rows = sql::query(store.read(), &format!("EXPLAIN QUERY PLAN {plan}"), []).await.unwrap();
        let text: Vec<String> = rows.iter().map(|r| r.try_get_by_index::<String>(3).unwrap()).collect();
        assert!(text.iter().any(|t| t.contains("SEARCH")), "{plan}: {text:?}");
        assert!(!text.iter().any(|t| t.starts_with("SCAN deliveries")), "{plan}: {text:?}");
        // The page comes out of the index in order, without sorting all that waits.
        assert!(
            !(plan.contains("LIMIT") && text.iter().any(|t| t.contains("TEMP B-TREE"))),
            "{plan}: {text:?}"
        );
    }
}
