//! Both databases answer the list of a project's jobs from an index, however many jobs others have.
#![allow(clippy::unwrap_used, reason = "a failed step of a test is its report")]

use ringback_store::{Open, Store, Urgency, sql};
use ringback_test_support::postgres::Postgres;

/// Jobs of other projects: many enough that walking over them would be the worse plan.
const OTHERS: u32 = 3_000;

/// What [`ringback_store::views::list_jobs`] asks for the second page of a project.
const PAGE: &str = "SELECT id FROM jobs WHERE project_id = 7 AND id < {last} AND (batch_id IS NULL OR EXISTS \
    (SELECT 1 FROM batches b WHERE b.id = jobs.batch_id AND b.opened_at_ms IS NOT NULL)) ORDER BY id DESC LIMIT 50";

async fn filled(url: &str) -> Store {
    let open = Open::url(url.to_owned());
    Store::migrate(&open).await.unwrap();
    let store = Store::open(&open).await.unwrap();
    let postgres = store.read().get_database_backend() == sea_orm::DatabaseBackend::Postgres;
    let numbers = if postgres {
        format!("SELECT i FROM generate_series(1, {OTHERS}) AS s(i)")
    } else {
        format!(
            "WITH RECURSIVE s(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM s WHERE i < {OTHERS}) SELECT i FROM s"
        )
    };
    let id = if postgres {
        "decode(lpad(to_hex(n.i), 32, '0'), 'hex')"
    } else {
        "CAST(printf('%016d', n.i) AS BLOB)"
    };
    let history = if postgres { "''::bytea" } else { "X''" };
    // One job in a hundred is the project's.
    let fill = format!(
        "INSERT INTO jobs (id, project_id, endpoint_id, lane, sync_id, state, seq, revision, run, publish, last_attempt, \
         failures, max_attempts, retry_errors, submitted_at_ms, queued_at_ms, execution_timeout_ms, delay_ms, \
         execution_ms, retain_completed_ms, retain_failed_ms, owed, history) \
         SELECT {id}, CASE WHEN n.i % 100 = 0 THEN 7 ELSE n.i END, 1, 0, 0, 2, 3, 1, 1, 0, 1, 0, 3, 0, 0, 0, 1, 0, 0, 1, \
         1, 0, {history} FROM ({numbers}) AS n"
    );
    for text in [fill, "ANALYZE".to_owned()] {
        store
            .write(Urgency::Now, move |tx| {
                let text = text.clone();
                Box::pin(async move { sql::execute(tx.conn(), &text, []).await.map(drop) })
            })
            .await
            .unwrap();
    }
    store
}

async fn plan(store: &Store, explain: &str, last: &str, column: usize) -> String {
    let text = format!("{explain} {}", PAGE.replace("{last}", last));
    let rows = sql::query(store.read(), &text, []).await.unwrap();
    rows.iter().map(|row| row.try_get_by_index::<String>(column).unwrap()).collect::<Vec<_>>().join("\n")
}

#[tokio::test]
async fn a_page_of_jobs_on_sqlite() {
    let dir = tempfile::tempdir().unwrap();
    let store = filled(&format!("sqlite://{}/t.db", dir.path().display())).await;
    let plan = plan(&store, "EXPLAIN QUERY PLAN", "X'ff'", 3).await;
    assert!(plan.contains("jobs_project (project_id=? AND id<?)"), "{plan}");
    assert!(!plan.contains("TEMP B-TREE"), "nothing is sorted: {plan}");
}

#[tokio::test]
async fn a_page_of_jobs_on_postgres() {
    let Some(postgres) = Postgres::start().await else { return };
    let store = filled(&postgres.database("plans").await).await;
    let plan = plan(&store, "EXPLAIN", "'\\xff'::bytea", 0).await;
    assert!(plan.contains("jobs_project on jobs"), "{plan}");
    assert!(!plan.contains("Sort") && !plan.contains("Seq Scan on jobs"), "{plan}");
}
