//! API keys: only hashes are stored.

use ringback_domain::ProjectId;
use sea_orm::{ConnectionTrait, Value};

use crate::{StoreError, sql};

/// Scopes of a key as the bit set of `api_keys.scopes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScopeSet(pub i64);

impl ScopeSet {
    /// Submit, cancel and retry.
    pub const SUBMIT: Self = Self(1);
    /// Read.
    pub const READ: Self = Self(2);
    /// Manage. Includes every other scope.
    pub const ADMIN: Self = Self(4);
    /// Take jobs as a worker elsewhere.
    pub const WORKER: Self = Self(8);
    /// Read metrics.
    pub const METRICS: Self = Self(16);

    /// Whether this set allows what needs `scope`.
    #[must_use]
    pub const fn allows(self, scope: Self) -> bool {
        self.0 & (scope.0 | Self::ADMIN.0) != 0
    }

    /// Both sets.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A key that may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRow {
    /// The project it belongs to.
    pub project: ProjectId,
    /// The project's name.
    pub project_name: String,
    /// Its name.
    pub name: String,
    /// What it may do.
    pub scopes: ScopeSet,
}

/// The key with this SHA-256, unless it was disabled.
pub async fn find_key<C: ConnectionTrait>(conn: &C, sha256: &[u8; 32]) -> Result<Option<KeyRow>, StoreError> {
    let row = sql::query_one(
        conn,
        "SELECT k.project_id, p.name, k.name, k.scopes FROM api_keys k JOIN projects p ON p.id = k.project_id \
         WHERE k.key_hash = $1 AND k.disabled_at_ms IS NULL",
        [Value::from(sha256.to_vec())],
    )
    .await?;
    row.map(|row| {
        Ok(KeyRow {
            project: ProjectId(row.try_get_by_index(0)?),
            project_name: row.try_get_by_index(1)?,
            name: row.try_get_by_index(2)?,
            scopes: ScopeSet(row.try_get_by_index(3)?),
        })
    })
    .transpose()
}

#[cfg(test)]
mod tests {
    use super::ScopeSet;

    #[test]
    fn admin_includes_the_others_and_nothing_includes_admin() {
        let both = ScopeSet::SUBMIT.with(ScopeSet::READ);
        assert!(both.allows(ScopeSet::SUBMIT) && both.allows(ScopeSet::READ));
        assert!(!both.allows(ScopeSet::ADMIN) && !both.allows(ScopeSet::METRICS));
        for scope in [ScopeSet::SUBMIT, ScopeSet::READ, ScopeSet::WORKER, ScopeSet::METRICS, ScopeSet::ADMIN]
        {
            assert!(ScopeSet::ADMIN.allows(scope));
            assert!(!ScopeSet(0).allows(scope));
        }
    }
}
