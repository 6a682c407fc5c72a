//! Schema of Ringback's SQL store: one set of migrations for SQLite and PostgreSQL, applied before a roll-out.
//!
//! Statements are written once, in `sql/`, with a few markers for what the two databases spell differently (see
//! [`dialect`]). Changes expand first and contract a release later, so that the previous release keeps working on
//! the new schema.

mod dialect;

use sea_orm_migration::prelude::*;

/// The migrations, oldest first.
#[derive(Debug)]
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(Step { name: "m0001_main_job", up: include_str!("../sql/m0001_main_job.sql") }),
            Box::new(Step { name: "m0002_blob_trash", up: include_str!("../sql/m0002_blob_trash.sql") }),
            Box::new(Step {
                name: "m0003_registered_webhooks",
                up: include_str!("../sql/m0003_registered_webhooks.sql"),
            }),
            Box::new(Step { name: "m0004_artifacts", up: include_str!("../sql/m0004_artifacts.sql") }),
            Box::new(Step { name: "m0005_usage", up: include_str!("../sql/m0005_usage.sql") }),
            Box::new(Step { name: "m0006_webhooks", up: include_str!("../sql/m0006_webhooks.sql") }),
            Box::new(Step {
                name: "m0007_delivery_timings",
                up: include_str!("../sql/m0007_delivery_timings.sql"),
            }),
        ]
    }
}

/// Brings the schema up to date. Safe to run twice; two processes that run it at once both end well on
/// PostgreSQL (advisory lock held by the caller's transaction) and on SQLite (one writer).
pub async fn up(db: &sea_orm_migration::sea_orm::DatabaseConnection) -> Result<(), DbErr> {
    Migrator::up(db, None).await
}

/// Whether every migration of this release is applied.
pub async fn is_current(db: &sea_orm_migration::sea_orm::DatabaseConnection) -> Result<bool, DbErr> {
    Ok(Migrator::get_pending_migrations(db).await?.is_empty())
}

struct Step {
    name: &'static str,
    up: &'static str,
}

impl MigrationName for Step {
    fn name(&self) -> &str {
        self.name
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Step {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        for statement in dialect::statements(self.up, manager.get_database_backend()) {
            db.execute_unprepared(&statement).await?;
        }
        Ok(())
    }
}
