//! Quotas are counted once, told once and never overrun; model changes are told once.

#![allow(clippy::unwrap_used, reason = "a failed set-up shall fail the test")]

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::on_both;
use ringback_domain::{BatchId, EndpointId, JobId, ProjectId, event::EventType};
use ringback_service_runtime::RingbackConfig;
use ringback_store::{
    Store, StoreError, Urgency,
    batches::{BatchStart, NewBatch, insert_batch},
    books::{Window, books_of},
    endpoints,
    retention::remove_unopened,
    sea_orm::Value,
    secrets::SecretKey,
    sql,
    submit::{Admission, InputAt, Submit, insert_submits},
    usage::usage_of,
    webhooks::bump_registry,
};

on_both!(
    a_quota_is_never_overrun_and_told_once,
    a_batch_takes_all_of_its_room_or_none,
    a_project_without_a_quota_counts_nothing,
    a_roll_out_tells_of_its_models_once,
);

/// A configuration of one project and endpoint.
fn config(text: &str) -> RingbackConfig {
    let base = "[[endpoints]]\nname = \"chat\"\nexecutor = { builtin = \"echo\" }\n";
    RingbackConfig::from_toml(&format!("{base}{text}")).unwrap()
}

async fn roll_out(store: &Store, text: &str) -> (ProjectId, EndpointId) {
    let rows = endpoints::sync(store, &config(text), &SecretKey::from_bytes(&[7; 32])).await.unwrap();
    (rows[0].project, rows[0].id)
}

async fn listen(store: &Store, project: ProjectId) {
    store
        .write(Urgency::Now, move |tx| {
            Box::pin(async move {
                sql::execute(
                    tx.conn(),
                    "INSERT INTO webhooks (public_id, project_id, label, url, format, filter, strict_order, paused, \
                     enable_epoch, created_at_ms, updated_at_ms) \
                     VALUES ('wh_1', $1, '', 'https://hooks.example/x', 0, '{\"events\":[\"usage.*\",\"model.*\"]}', \
                     0, 0, 1, 0, 0)",
                    [Value::from(project.0)],
                )
                .await?;
                bump_registry(tx).await
            })
        })
        .await
        .unwrap();
}

/// Events that were told, by name.
async fn told(store: &Store) -> Vec<&'static str> {
    let rows = sql::query(store.read(), "SELECT type FROM events ORDER BY id", []).await.unwrap();
    let mut names: Vec<&str> = rows
        .iter()
        .map(|r| {
            let code = u32::try_from(r.try_get_by_index::<i64>(0).unwrap()).unwrap();
            EventType::from_code(code).unwrap().name()
        })
        .collect();
    names.sort_unstable();
    names
}

fn job(n: u8, project: ProjectId, endpoint: EndpointId) -> Submit {
    let id = JobId::from_parts(1_800_000_000_000, [n; 10]);
    Submit::new(id, project, endpoint, InputAt::Inline(Bytes::from_static(b"1")))
}

async fn submit(store: &Store, jobs: Vec<Submit>) -> Vec<Admission> {
    let jobs = Arc::new(jobs);
    let (row, partitions) = (store.counter_row(), store.facts().partitions);
    loop {
        let jobs = Arc::clone(&jobs);
        let done = store
            .write(Urgency::Now, move |tx| {
                let jobs = Arc::clone(&jobs);
                Box::pin(async move {
                    insert_submits(tx, row, partitions, &jobs.iter().collect::<Vec<_>>()).await
                })
            })
            .await;
        match done {
            Err(StoreError::Transient { .. }) => {}
            done => return done.unwrap(),
        }
    }
}

fn taken(admissions: &[Admission]) -> usize {
    admissions.iter().filter(|a| matches!(a, Admission::Inserted(_))).count()
}

async fn used(store: &Store, project: ProjectId) -> u64 {
    let registry = store.registry().await.unwrap();
    let now = ringback_domain::TimestampMs(store.now_ms().await.unwrap());
    usage_of(store.read(), project, registry.quota(project).unwrap(), now).await.unwrap()[0].used
}

async fn a_quota_is_never_overrun_and_told_once((a, b): (Store, Store)) {
    let (project, endpoint) = roll_out(&a, "[projects.default.quota]\nperiod = \"month\"\njobs = 20\n").await;
    listen(&a, project).await;
    // Two processes at once: 40 jobs want in, 20 may.
    let all = |from: u8, store: Store| async move {
        let mut n = 0;
        for i in from..from + 5 {
            let four = (0..4).map(|k| job(i * 4 + k, project, endpoint)).collect();
            n += taken(&submit(&store, four).await);
        }
        n
    };
    let (one, other) = tokio::join!(all(0, a.clone()), all(5, b.clone()));
    assert_eq!(one + other, 20);
    assert_eq!(used(&b, project).await, 20);
    assert_eq!(told(&a).await, ["usage.limit_exceeded", "usage.limit_warning", "usage.limit_warning"]);
    let refused = submit(&a, vec![job(200, project, endpoint)]).await;
    let Admission::Refused(refused) = &refused[0] else { panic!("{refused:?}") };
    assert_eq!((refused.over.used, refused.over.limit), (20, 20));
    assert!(
        refused.over.reset_at > refused.over.now && refused.deliveries.is_empty(),
        "told once per period"
    );
    // A raised limit takes effect at once, in the other process too.
    roll_out(&a, "[projects.default.quota]\nperiod = \"month\"\njobs = 21\n").await;
    assert_eq!(taken(&submit(&b, vec![job(201, project, endpoint), job(202, project, endpoint)]).await), 1);
    // The key of a job that is there is answered whatever the quota says.
    let keyed = |n| Submit { idempotency_key: Some("k".into()), ..job(n, project, endpoint) };
    assert!(matches!(submit(&b, vec![keyed(203)]).await[0], Admission::Refused(_)));
    roll_out(&a, "[projects.default.quota]\nperiod = \"month\"\njobs = 22\n").await;
    assert_eq!(taken(&submit(&b, vec![keyed(204)]).await), 1);
    assert!(matches!(submit(&b, vec![keyed(205)]).await[0], Admission::Existing(_)));
    let books = books_of(a.read(), Window { from_ms: 0, to_ms: 1 << 47 }).await.unwrap();
    assert!(books.balance() && books.owed == 3, "{books:?}");
}

async fn a_batch_takes_all_of_its_room_or_none((a, _): (Store, Store)) {
    let (project, endpoint) = roll_out(&a, "[projects.default.quota]\nperiod = \"day\"\njobs = 10\n").await;
    listen(&a, project).await;
    let begin = async |n: u8, total: u32| {
        let new = NewBatch {
            id: BatchId::from_parts(1_800_000_000_000, [n; 10]),
            project,
            endpoint,
            total,
            cancel_rest: false,
            callback_url: None,
            callback_runflow: false,
            template: None,
            metadata: None,
            idempotency_key: None,
            request_hash: None,
            traceparent: None,
        };
        let id = new.id;
        let partitions = a.facts().partitions;
        let started = a
            .write(Urgency::Now, move |tx| {
                let new = new.clone();
                Box::pin(async move { insert_batch(tx, partitions, &new).await })
            })
            .await
            .unwrap();
        (id, started)
    };
    let (id, first) = begin(1, 8).await;
    assert!(matches!(&first, BatchStart::Made(told) if told.len() == 1), "80 % is told: {first:?}");
    assert!(
        matches!(begin(2, 3).await.1, BatchStart::Refused(r) if r.over.used == 8 && r.deliveries.len() == 1)
    );
    // Its jobs were counted with it.
    let item = Submit { batch: Some((id, 0)), ..job(1, project, endpoint) };
    assert_eq!((taken(&submit(&a, vec![item]).await), used(&a, project).await), (1, 8));
    assert_eq!(taken(&submit(&a, vec![job(2, project, endpoint)]).await), 1);
    // A batch that never opened gives its room back.
    a.write(Urgency::Now, |tx| {
        Box::pin(async move {
            sql::execute(tx.conn(), "UPDATE batches SET next_check_at_ms = 0", []).await.map(drop)
        })
    })
    .await
    .unwrap();
    a.write(Urgency::Now, move |tx| Box::pin(remove_unopened(tx, id, 100))).await.unwrap();
    assert_eq!(used(&a, project).await, 1);
    assert!(matches!(begin(3, 9).await.1, BatchStart::Made(_)));
}

async fn a_project_without_a_quota_counts_nothing((a, _): (Store, Store)) {
    let (project, endpoint) = roll_out(&a, "").await;
    listen(&a, project).await;
    assert_eq!(taken(&submit(&a, (0..50).map(|n| job(n, project, endpoint)).collect()).await), 50);
    let rows = sql::query(a.read(), "SELECT used FROM usage_counters", []).await.unwrap();
    assert!(rows.is_empty());
    // A quota that is taken away limits no more.
    roll_out(&a, "[projects.default.quota]\njobs = 0\n").await;
    assert_eq!(taken(&submit(&a, vec![job(100, project, endpoint)]).await), 0);
    roll_out(&a, "").await;
    assert_eq!(taken(&submit(&a, vec![job(101, project, endpoint)]).await), 1);
}

async fn a_roll_out_tells_of_its_models_once((a, b): (Store, Store)) {
    let (project, _) = roll_out(&a, "model = \"one\"\nkind = \"completion\"\n").await;
    listen(&a, project).await;
    assert_eq!(told(&a).await, [""; 0], "a new endpoint is no change");
    // Two processes of the same roll-out.
    let two = "model = \"two\"\nkind = \"completion\"\n";
    tokio::join!(roll_out(&a, two), roll_out(&b, two));
    roll_out(&b, two).await;
    assert_eq!(told(&a).await, ["model.updated"]);
    roll_out(&a, &format!("{two}deprecated_at = \"2026-12-31\"\nsuccessor = \"three\"\n")).await;
    assert_eq!(told(&a).await, ["model.deprecated", "model.updated"]);
    roll_out(&a, two).await;
    assert_eq!(told(&a).await.len(), 2, "it stays after all");
    let info = b.registry().await.unwrap();
    let endpoint = info.endpoint(EndpointId(1)).unwrap();
    assert_eq!((endpoint.model.as_deref(), endpoint.kind.as_str()), (Some("two"), "completion"));
    let books = books_of(a.read(), Window { from_ms: 0, to_ms: 1 << 47 }).await.unwrap();
    assert!(books.balance() && books.owed == 2, "{books:?}");
}
