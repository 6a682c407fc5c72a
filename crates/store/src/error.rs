//! Why SQL did not do what it was asked.

use ringback_contracts::ContractError;
use sea_orm::{DbErr, RuntimeErr};
use thiserror::Error;

/// A failed question or command.
#[derive(Clone, Debug, Error)]
pub enum StoreError {
    /// The database is away, busy or broke off; the same command may succeed later. Nothing was committed.
    #[error("the database is not available: {detail}")]
    Transient {
        /// What it said.
        detail: String,
    },
    /// The commit was sent and its answer is missing: read back before you tell anybody.
    #[error("it is unknown whether the transaction was committed: {detail}")]
    CommitUnknown {
        /// What it said.
        detail: String,
    },
    /// A unique key exists already.
    #[error("a row with this key exists already: {detail}")]
    Duplicate {
        /// What it said.
        detail: String,
    },
    /// Refused by the database or unreadable; repeating does not help.
    #[error("the database refused: {detail}")]
    Permanent {
        /// What it said.
        detail: String,
    },
}

impl StoreError {
    /// Whether the same call may succeed later.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        match self {
            Self::Transient { .. } | Self::CommitUnknown { .. } => true,
            Self::Duplicate { .. } | Self::Permanent { .. } => false,
        }
    }

    /// A row holds what no writer of ours wrote.
    #[must_use]
    pub fn corrupt(what: &'static str) -> Self {
        Self::Permanent { detail: format!("a stored value cannot be read: {what}") }
    }

    /// The same failure for another waiter of the same transaction.
    pub(crate) fn transient(detail: impl Into<String>) -> Self {
        Self::Transient { detail: detail.into() }
    }
}

impl From<ContractError> for StoreError {
    fn from(e: ContractError) -> Self {
        Self::Permanent { detail: e.to_string() }
    }
}

impl From<DbErr> for StoreError {
    fn from(e: DbErr) -> Self {
        let detail = e.to_string();
        if matches!(e.sql_err(), Some(sea_orm::SqlErr::UniqueConstraintViolation(_))) {
            return Self::Duplicate { detail };
        }
        match e {
            DbErr::ConnectionAcquire(_) | DbErr::Conn(_) => Self::Transient { detail },
            DbErr::Exec(RuntimeErr::SqlxError(inner)) | DbErr::Query(RuntimeErr::SqlxError(inner)) => {
                if is_passing(&inner) {
                    Self::Transient { detail }
                } else {
                    Self::Permanent { detail }
                }
            }
            _ => Self::Permanent { detail },
        }
    }
}

/// Faults of the moment: connection trouble, locks, serialisation, a server that starts or stops, a full disk.
fn is_passing(e: &sea_orm::SqlxError) -> bool {
    use sea_orm::SqlxError as S;
    match e {
        S::Io(_) | S::PoolTimedOut | S::PoolClosed | S::WorkerCrashed | S::Tls(_) | S::Protocol(_) => true,
        S::Database(db) => db.code().is_some_and(|code| {
            // PostgreSQL: connection (08), rollback (40), resources (53), operator intervention (57), system (58);
            // 55P03 lock not available; 25006 read only: a standby that is not promoted yet. SQLite: primary codes
            // BUSY 5, LOCKED 6, IOERR 10, FULL 13.
            let pg = code.len() == 5
                && (["08", "40", "53", "57", "58"].iter().any(|c| code.starts_with(c))
                    || matches!(code.as_ref(), "55P03" | "25006"));
            let sqlite =
                code.parse::<i32>().is_ok_and(|c| code.len() < 5 && matches!(c & 0xff, 5 | 6 | 10 | 13));
            pg || sqlite
        }),
        _ => false,
    }
}
