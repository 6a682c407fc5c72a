//! Fresh databases of each kind, for checks that hold on both.

use ringback_store::{Open, Store};

/// What a check works with: one store, or two as two processes would have them.
pub(crate) trait Opened {
    /// Makes the schema and opens it.
    async fn opened(url: String) -> Self;
}

impl Opened for Store {
    async fn opened(url: String) -> Self {
        let open = Open::url(url);
        Self::migrate(&open).await.unwrap();
        Self::open(&open).await.unwrap()
    }
}

impl Opened for (Store, Store) {
    async fn opened(url: String) -> Self {
        let first = Store::opened(url.clone()).await;
        (first, Store::open(&Open::url(url)).await.unwrap())
    }
}

/// Runs a check on the database at `url`.
pub(crate) async fn check<S: Opened>(url: String, check: impl AsyncFnOnce(S)) {
    check(S::opened(url).await).await;
}

/// Runs each check on a database of its own, on SQLite and on PostgreSQL.
macro_rules! on_both {
    ($($check:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $check() {
                let dir = tempfile::tempdir().unwrap();
                let url = format!("sqlite://{}/t.db", dir.path().display());
                crate::common::check(url, super::$check).await;
            })+
        }
        #[tokio::test]
        async fn the_same_on_postgresql() {
            let Some(server) = ringback_test_support::postgres::Postgres::start().await else { return };
            $(crate::common::check(server.database(stringify!($check)).await, $check).await;)+
        }
    };
}
pub(crate) use on_both;
