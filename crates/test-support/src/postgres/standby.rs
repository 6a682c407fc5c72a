//! A streaming standby of a cluster, and what a failover does with both.

use super::{PASSWORD, Postgres, START_WITHIN, USER, connect, give_to, run, with_user};
use crate::files::{Folder, free_port};
use crate::wait::until;
use sea_orm::{ConnectionTrait as _, Statement};
use std::process::Command;

/// Its name in `synchronous_standby_names`.
const NAME: &str = "standby";

impl Postgres {
    /// Starts a hot standby of this cluster and makes it synchronous: from now on an acknowledged commit is on both.
    pub async fn synchronous_standby(&self) -> Self {
        let standby = self.standby().await;
        // Not before the copy: alone after its promotion, it must not wait for a standby of its own.
        let primary = self.admin().await;
        for statement in [
            format!("ALTER SYSTEM SET synchronous_standby_names = '{NAME}'"),
            "SELECT pg_reload_conf()".into(),
        ] {
            primary.execute_unprepared(&statement).await.expect("set the standby's name");
        }
        let asked = "SELECT 1 FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = 'sync'";
        until("the standby to be synchronous", START_WITHIN, || async {
            let statement = Statement::from_string(primary.get_database_backend(), asked);
            primary.query_one_raw(statement).await.expect("pg_stat_replication").map(drop)
        })
        .await;
        primary.close().await.expect("close");
        standby
    }

    async fn standby(&self) -> Self {
        let folder = Folder::new("standby");
        if let Some(user) = self.run_as {
            give_to(folder.path(), user);
        }
        let from = format!(
            "host=127.0.0.1 port={} user={USER} password={PASSWORD} application_name={NAME}",
            self.port
        );
        let words = [
            self.programs.join("pg_basebackup").display().to_string(),
            format!("--dbname={from}"),
            format!("--pgdata={}", folder.path().join("data").display()),
            "--wal-method=stream".to_owned(),
            "--checkpoint=fast".to_owned(),
            "--write-recovery-conf".to_owned(),
            "--no-sync".to_owned(),
        ];
        run(&with_user(words.to_vec(), self.run_as));
        let programs = self.programs.clone();
        let mut standby = Self { process: None, programs, folder, port: free_port(), run_as: self.run_as };
        standby.start_again().await;
        standby
    }

    /// Makes a primary of a standby, and waits until it takes writes.
    pub async fn promote(&self) {
        let standby = self.admin().await;
        standby.execute_unprepared("SELECT pg_promote(true, 60)").await.expect("promote");
        until("the standby to take writes", START_WITHIN, || async {
            standby.execute_unprepared("SELECT pg_current_xact_id()").await.ok()
        })
        .await;
        standby.close().await.expect("close");
    }

    /// `kill -9` of the server and of all its processes, as when its machine dies.
    pub fn kill9(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        // Stopped, it neither starts others nor takes away the dead, whose numbers therefore stay theirs.
        process.signal(rustix::process::Signal::STOP);
        let pid = process.pid();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("children");
        for child in children.split_whitespace().filter_map(|text| text.parse().ok()) {
            if let Some(child) = rustix::process::Pid::from_raw(child) {
                let _ = rustix::process::kill_process(child, rustix::process::Signal::KILL);
            }
        }
        process.kill9();
        self.forget_shared_memory();
    }

    /// The small segment that a server holds against a second one on its data, which a killed one leaves behind.
    fn forget_shared_memory(&self) {
        let lock =
            std::fs::read_to_string(self.folder.path().join("data/postmaster.pid")).unwrap_or_default();
        // The seventh line is its key and its id.
        if let Some(id) = lock.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)) {
            let _ = Command::new("ipcrm").args(["-m", id]).output();
        }
    }

    async fn admin(&self) -> sea_orm::DatabaseConnection {
        connect(&self.url("postgres")).await.expect("connect to PostgreSQL")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn what_was_acknowledged_is_on_the_standby() {
        let Some(mut primary) = Postgres::start().await else { return };
        let old = primary.database("one").await;
        let standby = primary.synchronous_standby().await;
        let write = connect(&old).await.unwrap();
        write.execute_unprepared("CREATE TABLE t (n int)").await.unwrap();
        write.execute_unprepared("INSERT INTO t SELECT generate_series(1, 1000)").await.unwrap();
        primary.kill9();
        assert!(write.execute_unprepared("SELECT 1").await.is_err());
        let new = connect(&standby.url("one")).await.unwrap();
        assert!(new.execute_unprepared("DELETE FROM t").await.is_err(), "a standby takes no writes");
        standby.promote().await;
        assert_eq!(new.execute_unprepared("DELETE FROM t").await.unwrap().rows_affected(), 1000);
    }
}
