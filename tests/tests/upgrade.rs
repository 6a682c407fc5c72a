//! What an older release left behind when it was killed is worked off by this one: `ringback migrate`, then the
//! services, on a database that the older program really wrote (tests/fixtures/upgrade, made by `make.py` there).

use ringback_test_support::books::{Accepted, assert_books_balance, assert_identity};
use ringback_test_support::client::TERMINAL;
use ringback_test_support::receiver::Hit;
use ringback_test_support::sql::Sql;
use ringback_test_support::stack::{Backend, Options, Stack};
use ringback_test_support::tools::root;
use ringback_test_support::wait::until;
use ringback_tests::LATER;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};

/// The old program is taken to have died so long ago: its leases and the waits of its tries are over.
const DOWN_MS: i64 = 120_000;
/// Columns that name a moment, told by their last words; other `_ms` are durations.
const MOMENTS: [&str; 5] = ["at_ms", "until_ms", "since_ms", "beat_ms", "start_ms"];

/// What the maker of the fixture saw.
#[derive(Debug, Deserialize)]
struct Facts {
    port: u16,
    killed_at_ms: i64,
    secret: String,
    secret_key: String,
    jobs: BTreeMap<String, String>,
    states: BTreeMap<String, String>,
    batch: String,
    registered: Option<String>,
    hits: Vec<Seen>,
}

/// A POST that the old program made.
#[derive(Debug, Deserialize)]
struct Seen {
    path: String,
    id: String,
    answered: u16,
    body: String,
}

/// A delivery as the old program left it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Left {
    state: i64,
    attempts: i64,
    terminal: bool,
}

struct Fixture {
    facts: Facts,
    dump: String,
}

impl Fixture {
    fn read(schema: &str, backend: Backend) -> Self {
        let backend = if backend == Backend::Sqlite { "sqlite" } else { "postgres" };
        let folder = root().join(format!("tests/fixtures/upgrade/{schema}-{backend}"));
        let text = |name: &str| std::fs::read_to_string(folder.join(name)).expect("the fixture");
        Self { facts: serde_json::from_str(&text("facts.json")).expect("facts"), dump: text("dump.sql") }
    }

    /// The receiver of today instead of the one of then. Addresses lie in binary columns too, whose lengths must stay.
    fn at_port(mut self, port: u16) -> Self {
        let (old, new) = (format!("127.0.0.1:{}", self.facts.port), format!("127.0.0.1:{port}"));
        assert_eq!(old.len(), new.len(), "{new} does not fit into the place of {old}");
        let hex = |text: &str| text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
        let (old_hex, new_hex) = (hex(&old), hex(&new));
        self.dump = self
            .dump
            .replace(&old, &new)
            .replace(&old_hex, &new_hex)
            .replace(&old_hex.to_uppercase(), &new_hex);
        for hit in &mut self.facts.hits {
            hit.body = hit.body.replace(&old, &new);
        }
        self
    }

    /// Puts database and key file in their places, as if the old program had died [`DOWN_MS`] ago.
    async fn install(&self, stack: &Stack) {
        std::fs::write(stack.folder().join("secret.key"), &self.facts.secret_key).expect("the key file");
        if stack.backend() == Backend::Sqlite {
            std::fs::write(stack.folder().join("ringback.db"), []).expect("an empty database");
        }
        let sql = stack.sql().await;
        sql.execute(&self.dump).await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis();
        let by = i64::try_from(now).expect("64 bit") - DOWN_MS - self.facts.killed_at_ms;
        let columns = match stack.backend() {
            Backend::Sqlite => {
                "SELECT m.name, p.name FROM sqlite_master m, pragma_table_info(m.name) p WHERE m.type = 'table'"
            }
            Backend::Postgres => {
                "SELECT table_name::text, column_name::text FROM information_schema.columns \
                 WHERE table_schema = 'public'"
            }
        };
        let mut moved = 0;
        for row in sql.texts(columns, 2).await {
            let (table, column) = (&row[0], &row[1]);
            if MOMENTS.iter().any(|end| column.ends_with(end)) {
                sql.execute(&format!("UPDATE {table} SET {column} = {column} + {by}")).await;
                moved += 1;
            }
        }
        assert!(moved > 20, "only {moved} columns were moved in time");
    }

    fn job(&self, name: &str, endpoint: &str) -> Accepted {
        Accepted {
            id: self.facts.jobs[name].clone(),
            endpoint: endpoint.to_owned(),
            webhook: true,
            webhookv2: true,
        }
    }
}

/// Every delivery by its webhook-id.
async fn deliveries(stack: &Stack, sql: &Sql) -> BTreeMap<String, Left> {
    let owner = match stack.backend() {
        Backend::Sqlite => "lower(hex(owner_id))",
        Backend::Postgres => "encode(owner_id, 'hex')",
    };
    let query = format!(
        "SELECT 'msg_' || {owner} || '_' || seq || '_' || target, CAST(state AS TEXT), CAST(attempts AS TEXT), \
         CAST(terminal AS TEXT) FROM deliveries"
    );
    let number = |text: &str| text.parse::<i64>().expect("a number");
    let rows = sql.texts(&query, 4).await;
    rows.into_iter()
        .map(|row| {
            let left =
                Left { state: number(&row[1]), attempts: number(&row[2]), terminal: number(&row[3]) == 1 };
            (row[0].clone(), left)
        })
        .collect()
}

const PENDING: i64 = 0;
const DELIVERED: i64 = 1;
const SUPERSEDED: i64 = 3;

async fn what_is_owed_survives(schema: &str, backend: Backend) {
    let fixture = Fixture::read(schema, backend);
    let mut options = Options::new(backend);
    options.secret = Some(fixture.facts.secret.clone());
    let Some(mut stack) = Stack::prepare(options).await else { return };
    let fixture = fixture.at_port(stack.receiver.port());
    fixture.install(&stack).await;
    let sql = stack.sql().await;
    let before = deliveries(&stack, &sql).await;
    let failed_tries = sql.count("SELECT COUNT(*) FROM delivery_attempts").await;
    let pending: BTreeMap<&String, &Left> = before.iter().filter(|(_, left)| left.state == PENDING).collect();
    assert!(pending.values().filter(|left| left.terminal && left.attempts > 0).count() >= 5, "{before:?}");
    assert_eq!(before.values().filter(|left| left.state == DELIVERED).count(), 1, "{before:?}");
    assert_eq!(fixture.facts.states["running"], "IN_PROGRESS");
    assert_eq!(fixture.facts.states["queued"], "IN_QUEUE");

    stack.start_apart().await;
    let accepted = [
        fixture.job("ended", "echo"),
        fixture.job("running", "sleep"),
        fixture.job("queued", "sleep"),
        fixture.job("cancelled", "sleep"),
    ];
    if fixture.facts.registered.is_none() {
        // This count knows of no targets but the jobs' own.
        assert_books_balance(&stack, &accepted, LATER).await;
    }
    let mut statuses = Vec::new();
    for job in &accepted {
        stack.api.wait_end(&job.endpoint, &job.id, LATER).await;
        let row = stack.api.job(&job.id).await;
        let told = row["history"].as_array().expect("a history").iter();
        let ends = told.filter(|entry| TERMINAL.contains(&entry["status"].as_str().unwrap_or_default()));
        assert_eq!(ends.count(), 1, "P2: {row}");
        statuses.push(row["status"].as_str().unwrap_or_default().to_owned());
    }
    assert_eq!(statuses, ["COMPLETED", "COMPLETED", "COMPLETED", "CANCELLED"]);
    let done = stack.api.job(&fixture.facts.jobs["done"]).await;
    assert_eq!(done["status"], "COMPLETED", "{done}");
    let batch = stack.api.get(&format!("/v1/batches/{}", fixture.facts.batch)).await.expect(200);
    assert_eq!((&batch["status"], &batch["completed"]), (&"COMPLETED".into(), &3.into()), "{batch}");
    until("every delivery to end", LATER, || async {
        let left = sql.count("SELECT COUNT(*) FROM deliveries WHERE state = 0").await;
        (left == 0).then_some(())
    })
    .await;

    assert_identity(&stack, LATER).await;
    let after = deliveries(&stack, &sql).await;
    let mut hits: BTreeMap<String, Vec<Hit>> = BTreeMap::new();
    for hit in stack.receiver.hits() {
        hits.entry(hit.webhook_id.clone()).or_default().push(hit);
    }
    let of = |id: &str| hits.get(id).map_or(&[][..], Vec::as_slice);
    for (id, left) in &before {
        let now = after.get(id).unwrap_or_else(|| panic!("{id} is gone: {left:?}"));
        match left.state {
            PENDING if now.state == DELIVERED => {
                assert_eq!(of(id).len(), 1, "{id} was owed once more: {left:?}");
                assert_eq!(now.attempts, left.attempts + 1, "{id} forgot its tries");
            }
            PENDING => {
                assert!(now.state == SUPERSEDED && !left.terminal, "{id} was owed and is {now:?}: {left:?}");
                assert_eq!(of(id).len(), 0, "{id} arrived and is {now:?}");
            }
            _ => {
                assert_eq!(now, left, "{id} had ended");
                assert_eq!(of(id).len(), 0, "{id} had ended and came again: {left:?}");
            }
        }
    }
    let kept = sql.count("SELECT COUNT(*) FROM delivery_attempts").await;
    assert!(kept >= failed_tries, "failed tries are gone from the log: {kept} of {failed_tries}");
    // What its receiver has seen of it before, it sees again.
    let mut again = BTreeSet::new();
    for seen in &fixture.facts.hits {
        assert!(before.contains_key(&seen.id), "{} was sent by the old program and is in no row", seen.id);
        for hit in of(&seen.id) {
            assert_eq!(seen.answered, 500, "{} had been taken", seen.id);
            assert_eq!(String::from_utf8_lossy(&hit.body), seen.body, "the bytes of {}", seen.id);
            assert_eq!(hit.path, seen.path, "the target of {}", seen.id);
            assert_eq!(hit.signature, Ok(()), "the signature of {}", seen.id);
            again.insert(&seen.id);
        }
    }
    assert!(again.len() >= 5, "only {again:?} came again");
    if let Some(id) = &fixture.facts.registered {
        let webhooks = stack.api.get("/v1/webhooks").await.expect(200);
        let there = webhooks["webhooks"].as_array().expect("a list").iter().any(|w| w["id"] == id.as_str());
        assert!(there, "{webhooks}");
        assert!(again.iter().any(|id| id.ends_with("_65537")), "no registered webhook came again: {again:?}");
    }
}

macro_rules! from_each_release {
    ($($schema:ident),* $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $schema() {
                    super::what_is_owed_survives(stringify!($schema), super::Backend::Sqlite).await;
                }
            )*
        }
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $schema() {
                    super::what_is_owed_survives(stringify!($schema), super::Backend::Postgres).await;
                }
            )*
        }
    };
}

// Named by the last migration of the release. m0001: before registered webhooks; m0005: with them.
from_each_release! {
    m0001,
    m0005,
}
