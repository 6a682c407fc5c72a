//! The core of the store on a real SQLite file: what is written reads back, guards hold, one bad command does not
//! fail its neighbours, and hot statements use their keys.
#![allow(clippy::unwrap_used, reason = "a failed step of a test is its report")]

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use ringback_domain::{
    AttemptRef, BatchId, EndpointId, JobId, Nonce, ProjectId, TimestampMs,
    job::{Applied, JobEvent, apply, submit},
    policy::Policy,
    target::Target,
};
use ringback_store::{
    CounterDelta, JobRow, Open, Store, StoreError, Urgency, add_counters, endpoint_counts, fold_counters,
    insert_jobs, lock_jobs, select_jobs, sql, update_jobs,
};
use tempfile::TempDir;

async fn store() -> (Store, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let open = Open::url(format!("sqlite://{}/t.db", dir.path().display()));
    Store::migrate(&open).await.unwrap();
    Store::migrate(&open).await.unwrap();
    (Store::open(&open).await.unwrap(), dir)
}

fn row(n: u8, now: i64) -> JobRow {
    let targets = Target::of_submit(Some("https://a.example/x"), Some("https://b.example/"), false);
    let id = JobId::from_parts(now.unsigned_abs(), [n; 10]);
    let scopes = targets.iter().map(|t| t.scope).collect();
    let (job, _) = submit(id, scopes, Some(1_000), 5_000, TimestampMs(now));
    let mut row = JobRow {
        job,
        revision: 1,
        project: ProjectId(1),
        endpoint: EndpointId(7),
        low_priority: n % 2 == 1,
        sync_id: n.is_multiple_of(3),
        policy: Policy { max_attempts: 2, retry_errors: true },
        submitted_at: TimestampMs(now),
        retain_completed_ms: 10,
        retain_failed_ms: 20,
        targets,
        history: Vec::new(),
        batch: (n > 200).then(|| (BatchId::from_parts(5, [1; 10]), u32::from(n))),
        client_ref: Some("r".to_owned()),
        idempotency_key: Some(format!("k{n}")),
        request_hash: Some(vec![n]),
        traceparent: None,
        metadata: None,
        request_id: None,
    };
    row.log_transition(TimestampMs(now));
    row
}

async fn insert(store: &Store, rows: Vec<JobRow>) -> Result<(), StoreError> {
    let rows = Arc::new(rows);
    store
        .write(Urgency::Now, move |tx| {
            let rows = Arc::clone(&rows);
            Box::pin(async move { insert_jobs(tx, &rows, 0).await })
        })
        .await
}

#[tokio::test]
async fn jobs_read_back_through_every_state_and_updates_are_guarded() {
    let (store, _dir) = store().await;
    let rows: Vec<JobRow> = (0..=255).map(|n| row(n, 1_000_000)).collect();
    let mut ids: Vec<JobId> = rows.iter().map(|r| r.job.id).collect();
    ids.sort();
    insert(&store, rows.clone()).await.unwrap();
    let read = select_jobs(store.read(), &ids).await.unwrap();
    assert_eq!(read.len(), 256);
    for r in &rows {
        assert_eq!(read[&r.job.id], *r);
    }

    let attempt = AttemptRef { run: 1, attempt: 1, nonce: Nonce(u64::MAX - 3) };
    let t = TimestampMs(1_000_100);
    let events = [
        JobEvent::Started { attempt, worker: "w".into(), started_at: t, lease_until: t.plus_ms(9) },
        JobEvent::Failed { attempt, execution_ms: 3 },
        JobEvent::Cancel { reason: ringback_domain::job::CancelReason::Requested },
    ];
    for event in events {
        let (ids_, event) = (ids.clone(), event.clone());
        let written = store
            .write(Urgency::Now, move |tx| {
                let (ids, event) = (ids_.clone(), event.clone());
                Box::pin(async move {
                    let mut next = Vec::new();
                    for (_, mut r) in lock_jobs(tx, &ids).await? {
                        let applied = apply(&r.job, &event, TimestampMs(1_000_200), &r.policy);
                        let Ok(Applied::Changed { next: job, .. }) = applied else { panic!("{applied:?}") };
                        r.job = job;
                        r.log_transition(TimestampMs(1_000_200));
                        next.push(r);
                    }
                    assert!(update_jobs(tx, &next, 0).await?);
                    // The same rows once more: their revision has moved on.
                    assert!(!update_jobs(tx, &next, 0).await?);
                    Ok(next)
                })
            })
            .await
            .unwrap();
        let read = select_jobs(store.read(), &ids).await.unwrap();
        for mut r in written {
            r.revision += 1;
            assert_eq!(read[&r.job.id], r);
        }
    }
}

#[tokio::test]
async fn one_bad_command_does_not_fail_its_neighbours() {
    let (store, _dir) = store().await;
    insert(&store, vec![row(1, 5)]).await.unwrap();
    let all = (1..=40_u8).map(|n| {
        let store = store.clone();
        tokio::spawn(async move { (n, insert(&store, vec![row(n, 5)]).await) })
    });
    for done in futures::future::join_all(all).await {
        let (n, result) = done.unwrap();
        match result {
            Ok(()) => assert_ne!(n, 1, "the known row was inserted twice"),
            Err(StoreError::Duplicate { .. }) => assert_eq!(n, 1),
            Err(e) => panic!("{n}: {e}"),
        }
    }
    let panicked =
        store.write(Urgency::Now, |_| Box::pin(async { if true { panic!("poison") } else { Ok(()) } })).await;
    assert!(matches!(panicked, Err(StoreError::Permanent { ref detail }) if detail.contains("poison")));
    insert(&store, vec![row(41, 5)]).await.unwrap();
}

#[tokio::test]
async fn commands_that_wait_share_a_transaction() {
    let (store, _dir) = store().await;
    // The first command holds the writer until all others wait behind it.
    let arrived = Arc::new(AtomicU32::new(0));
    let gate = Arc::clone(&arrived);
    let holder = tokio::spawn({
        let store = store.clone();
        async move {
            store
                .write(Urgency::Now, move |_| {
                    let gate = Arc::clone(&gate);
                    Box::pin(async move {
                        while gate.load(Ordering::SeqCst) < 50 {
                            tokio::task::yield_now().await;
                        }
                        Ok(())
                    })
                })
                .await
        }
    });
    let all = (0..50).map(|_| {
        let (store, arrived) = (store.clone(), Arc::clone(&arrived));
        async move {
            let write = store.write(Urgency::Now, |tx| {
                Box::pin(async move { Ok(format!("{:p}", std::ptr::from_ref(tx.conn()))) })
            });
            let mut write = Box::pin(write);
            let first = futures::poll!(&mut write);
            arrived.fetch_add(1, Ordering::SeqCst);
            match first {
                std::task::Poll::Ready(r) => r,
                std::task::Poll::Pending => write.await,
            }
        }
    });
    let places = futures::future::join_all(all).await;
    holder.await.unwrap().unwrap();
    let mut places: Vec<String> = places.into_iter().map(Result::unwrap).collect();
    places.sort();
    places.dedup();
    assert!(places.len() <= 2, "{} transactions for 50 waiting commands", places.len());
}

#[tokio::test]
async fn counters_add_up_before_and_after_folding() {
    let (store, _dir) = store().await;
    for writer in [11_i64, 12, 13] {
        store
            .write(Urgency::Now, move |tx| {
                Box::pin(async move {
                    let d = CounterDelta { queued: 2, completed: writer, ..CounterDelta::default() };
                    add_counters(tx, writer, &BTreeMap::from([(EndpointId(3), d)])).await
                })
            })
            .await
            .unwrap();
    }
    let before = endpoint_counts(store.read(), EndpointId(3)).await.unwrap();
    assert_eq!((before.queued, before.completed), (6, 36));
    let folded = store.write(Urgency::Now, |tx| Box::pin(fold_counters(tx, EndpointId(3)))).await.unwrap();
    assert_eq!(folded, 3);
    assert_eq!(endpoint_counts(store.read(), EndpointId(3)).await.unwrap(), before);
}

#[tokio::test]
async fn hot_statements_find_their_rows_by_key() {
    let (store, _dir) = store().await;
    let plans = [
        "UPDATE jobs SET state = v.column2 FROM (VALUES ($1, $2), ($1, $2)) AS v WHERE jobs.id = v.column1",
        "SELECT state FROM jobs WHERE id IN ($1, $2)",
        "SELECT id FROM jobs WHERE next_check_at_ms <= $1 ORDER BY next_check_at_ms LIMIT 10",
        "SELECT id FROM jobs WHERE endpoint_id = $1 AND state < 2 ORDER BY id LIMIT 10",
        "SELECT seq FROM deliveries WHERE partition = $1 AND state = 0 AND next_attempt_at_ms <= $2",
    ];
    for plan in plans {
        let rows = sql::query(store.read(), &format!("EXPLAIN QUERY PLAN {plan}"), []).await.unwrap();
        let text: Vec<String> = rows.iter().map(|r| r.try_get_by_index::<String>(3).unwrap()).collect();
        assert!(text.iter().any(|t| t.contains("SEARCH")), "{plan}: {text:?}");
        assert!(
            !text.iter().any(|t| t.starts_with("SCAN jobs") || t.starts_with("SCAN deliveries")),
            "{text:?}"
        );
    }
}
