//! A look into the database from outside, in plain SQL.

use sea_orm::{ConnectionTrait as _, Database, DatabaseConnection, Statement};
use std::time::Duration;

/// A connection of its own, opened for looking.
#[derive(Debug)]
pub struct Sql {
    connection: DatabaseConnection,
}

impl Sql {
    /// Opens `sqlite:<path>` or `postgres://…`.
    pub async fn open(url: &str) -> Self {
        let mut options = sea_orm::ConnectOptions::new(url.to_owned());
        options.max_connections(1).acquire_timeout(Duration::from_secs(60)).sqlx_logging(false);
        Self { connection: Database::connect(options).await.expect("open the database") }
    }

    /// The single integer that a query gives.
    pub async fn count(&self, query: &str) -> i64 {
        let statement = Statement::from_string(self.connection.get_database_backend(), query);
        let row =
            self.connection.query_one_raw(statement).await.unwrap_or_else(|error| panic!("{query}: {error}"));
        let row = row.unwrap_or_else(|| panic!("{query}: no row"));
        // COUNT(*) is 64 bit on both; SUM() of bigint is numeric on PostgreSQL, so queries cast.
        row.try_get_by_index::<i64>(0).unwrap_or_else(|error| panic!("{query}: {error}"))
    }

    /// The rows of a query whose columns are all texts.
    pub async fn texts(&self, query: &str, columns: usize) -> Vec<Vec<String>> {
        let statement = Statement::from_string(self.connection.get_database_backend(), query);
        let rows =
            self.connection.query_all_raw(statement).await.unwrap_or_else(|error| panic!("{query}: {error}"));
        rows.iter()
            .map(|row| (0..columns).map(|n| row.try_get_by_index::<String>(n).unwrap_or_default()).collect())
            .collect()
    }

    /// Whether a statement that changes something gets through in time; it does not while another process, for example a
    /// stopped one, holds its locks.
    pub async fn gets_through(&self, statement: &str, within: Duration) -> bool {
        let done = tokio::time::timeout(within, self.connection.execute_unprepared(statement)).await;
        done.is_ok_and(|result| result.is_ok())
    }

    /// Runs a statement that changes something: only for tests that damage data on purpose.
    pub async fn execute(&self, statement: &str) {
        self.connection
            .execute_unprepared(statement)
            .await
            .unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
}
