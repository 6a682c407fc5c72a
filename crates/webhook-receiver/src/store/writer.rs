//! One writer: the changes that wait share a transaction, so that one sync serves them all.

use std::path::{Path, PathBuf};

use futures::future::BoxFuture;
use sea_orm::{DatabaseConnection, DatabaseTransaction, DbErr, TransactionTrait as _};
use tokio::sync::{mpsc, oneshot};

use super::StoreError;

/// Most changes of one transaction.
const MAX_SHARED: usize = 256;

/// Says to whoever waits whether the commit took place.
type Tell = Box<dyn FnOnce(Result<(), StoreError>) + Send>;
type Change = Box<dyn for<'t> FnOnce(&'t DatabaseTransaction) -> BoxFuture<'t, Result<Tell, DbErr>> + Send>;

/// What a change answers once it is committed.
pub(super) type Answer<'t, T> = BoxFuture<'t, Result<T, DbErr>>;

struct Queued {
    change: Change,
    /// For a change that is never run: an earlier one of its transaction failed.
    lost: oneshot::Sender<StoreError>,
}

#[derive(Debug, Clone)]
pub(super) struct Writer {
    queue: mpsc::Sender<Queued>,
}

impl Writer {
    pub(super) fn start(db: DatabaseConnection, path: PathBuf) -> Self {
        let (queue, waiting) = mpsc::channel(1024);
        tokio::spawn(run(db, path, waiting));
        Self { queue }
    }

    /// Runs `change` in a transaction and answers after its commit.
    pub(super) async fn write<T, F>(&self, change: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: for<'t> FnOnce(&'t DatabaseTransaction) -> Answer<'t, T> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let (lost, was_lost) = oneshot::channel();
        let change: Change = Box::new(move |tx| {
            let running = change(tx);
            Box::pin(async move {
                let value = running.await?;
                let tell: Tell = Box::new(move |committed| {
                    // Nobody may wait any more.
                    let _ = answer.send(committed.map(|()| value));
                });
                Ok(tell)
            })
        });
        self.queue.send(Queued { change, lost }).await.map_err(|_| StoreError::Closed)?;
        match answered.await {
            Ok(result) => result,
            Err(_) => Err(was_lost.await.unwrap_or(StoreError::Closed)),
        }
    }
}

async fn run(db: DatabaseConnection, path: PathBuf, mut waiting: mpsc::Receiver<Queued>) {
    let mut group = Vec::with_capacity(MAX_SHARED);
    while waiting.recv_many(&mut group, MAX_SHARED).await > 0 {
        commit(&db, &path, &mut group).await;
    }
    if let Err(error) = db.close().await {
        tracing::warn!(%error, "the receiver's store was not closed cleanly");
    }
}

async fn commit(db: &DatabaseConnection, path: &Path, group: &mut Vec<Queued>) {
    let failed = |error: &DbErr| StoreError::Database { path: path.to_owned(), reason: error.to_string() };
    let tx = match db.begin().await {
        Ok(tx) => tx,
        Err(error) => {
            for queued in group.drain(..) {
                let _ = queued.lost.send(failed(&error));
            }
            return;
        }
    };
    let mut tells: Vec<Tell> = Vec::with_capacity(group.len());
    let mut fault = None;
    for queued in group.drain(..) {
        if let Some(fault) = &fault {
            let _ = queued.lost.send(StoreError::clone(fault));
            continue;
        }
        match (queued.change)(&tx).await {
            Ok(tell) => tells.push(tell),
            Err(error) => {
                let error = failed(&error);
                let _ = queued.lost.send(error.clone());
                fault = Some(error);
            }
        }
    }
    let committed = match fault {
        Some(fault) => {
            // Dropping the transaction would roll back as well; this waits for it.
            let _ = tx.rollback().await;
            Err(fault)
        }
        None => tx.commit().await.map_err(|error| failed(&error)),
    };
    for tell in tells {
        tell(committed.clone());
    }
}
