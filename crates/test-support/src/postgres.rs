//! A real PostgreSQL cluster in a temporary folder, one per test, with a database per test.
//!
//! PostgreSQL's programs refuse to run as root, so a root test runs them as another user. The cluster is made once
//! per machine with `initdb` and copied for each test, which is much faster. `fsync` stays on: the tests kill.

mod standby;

use crate::files::{Folder, free_port};
use crate::process::{Process, Spec};
use crate::tools;
use crate::wait::until;
use sea_orm::{ConnectOptions, ConnectionTrait as _, Database, DatabaseConnection, DbErr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const USER: &str = "ringback";
const PASSWORD: &str = "not-a-secret-on-loopback";
/// Oldest major version that Ringback supports.
const OLDEST: u32 = 15;

/// A running cluster; stays on its port over restarts.
#[derive(Debug)]
pub struct Postgres {
    // First, so that the server is gone before its folder is removed.
    process: Option<Process>,
    programs: PathBuf,
    folder: Folder,
    port: u16,
    run_as: Option<RunAs>,
}

/// Longest time until a cluster takes connections on a busy machine.
const START_WITHIN: Duration = Duration::from_secs(90);
/// Longest time for one connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// The user that the server runs as when the test is root.
#[derive(Debug, Clone, Copy)]
struct RunAs {
    uid: u32,
    gid: u32,
}

impl Postgres {
    /// Starts an empty cluster; `None` (said loudly) where PostgreSQL 15 or newer is missing.
    pub async fn start() -> Option<Self> {
        let programs = tools::need(find_programs(), "PostgreSQL 15 or newer", "apt-get install postgresql")?;
        let run_as = rustix::process::getuid().is_root().then(unprivileged_user);
        let folder = Folder::new("postgres");
        if let Some(user) = run_as {
            give_to(folder.path(), user);
        }
        let data = folder.path().join("data");
        copy(&template(&programs, run_as), &data, run_as);
        let mut server = Self { process: None, programs, folder, port: free_port(), run_as };
        server.start_again().await;
        Some(server)
    }

    /// Makes a database and gives its URL.
    pub async fn database(&self, name: &str) -> String {
        let url = self.url("postgres");
        let connection =
            until("PostgreSQL to take a connection", START_WITHIN, || async { connect(&url).await.ok() })
                .await;
        connection
            .execute_unprepared(&format!("CREATE DATABASE \"{name}\""))
            .await
            .expect("create a database");
        connection.close().await.expect("close");
        self.url(name)
    }

    fn url(&self, database: &str) -> String {
        self.url_at(self.port, database)
    }

    /// The URL of a database through another port, behind which this cluster stands.
    #[must_use]
    pub fn url_at(&self, port: u16, database: &str) -> String {
        format!("postgres://{USER}:{PASSWORD}@127.0.0.1:{port}/{database}")
    }

    /// Port on loopback.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Starts it on the same port with the data as they are, and waits until it takes connections.
    pub async fn start_again(&mut self) {
        assert!(self.process.is_none(), "PostgreSQL runs already");
        let data = self.folder.path().join("data");
        let mut words: Vec<String> = vec![self.programs.join("postgres").display().to_string()];
        words.extend(["-D".to_owned(), data.display().to_string()]);
        for setting in [
            format!("port={}", self.port),
            "listen_addresses=127.0.0.1".to_owned(),
            format!("unix_socket_directories={}", self.folder.path().display()),
            "max_connections=200".to_owned(),
            "shared_buffers=32MB".to_owned(),
            // In its folder, which goes with it; elsewhere a killed server would leave it behind.
            "dynamic_shared_memory_type=mmap".to_owned(),
        ] {
            words.extend(["-c".to_owned(), setting]);
        }
        let words = with_user(words, self.run_as);
        let spec = Spec::new("postgres", &words[0], self.folder.path()).args(&words[1..]);
        self.process = Some(Process::spawn(spec));
        let url = self.url("postgres");
        until("PostgreSQL to take connections", START_WITHIN, || async {
            connect(&url).await.ok()?.execute_unprepared("SELECT 1").await.ok()
        })
        .await;
    }

    /// Ends it at once as a crash would (`immediate`); recovery happens at the next start.
    pub fn crash(&mut self) {
        self.end(rustix::process::Signal::QUIT);
    }

    /// Ends it in order, breaking off its connections (`fast`).
    pub fn stop(&mut self) {
        self.end(rustix::process::Signal::INT);
    }

    fn end(&mut self, signal: rustix::process::Signal) {
        if let Some(mut process) = self.process.take() {
            process.signal(signal);
            let begun = std::time::Instant::now();
            while process.is_running() && begun.elapsed() < Duration::from_secs(20) {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // SIGKILL would leave its shared memory and its children behind.
        self.crash();
    }
}

/// A connection that gives up soon: the default keeps trying for half a minute.
async fn connect(url: &str) -> Result<DatabaseConnection, DbErr> {
    let mut options = ConnectOptions::new(url.to_owned());
    options.max_connections(1).acquire_timeout(CONNECT_WITHIN).connect_timeout(CONNECT_WITHIN);
    options.sqlx_logging(false);
    Database::connect(options).await
}

fn find_programs() -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .collect();
    folders.extend(
        tools::on_path("postgres").and_then(|path| Some(path.canonicalize().ok()?.parent()?.to_owned())),
    );
    folders
        .into_iter()
        .filter(|folder| folder.join("initdb").exists())
        .filter_map(|folder| Some((version(&folder)?, folder)))
        .filter(|(version, _)| *version >= OLDEST)
        .max()
        .map(|(_, folder)| folder)
}

fn version(folder: &Path) -> Option<u32> {
    let output = Command::new(folder.join("postgres")).arg("--version").output().ok()?;
    // "postgres (PostgreSQL) 15.18 (Debian ...)"
    let text = String::from_utf8(output.stdout).ok()?;
    text.split(' ').nth(2)?.split('.').next()?.trim().parse().ok()
}

fn unprivileged_user() -> RunAs {
    let users = std::fs::read_to_string("/etc/passwd").expect("read /etc/passwd");
    let find = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut parts = line.split(':').skip(2);
        Some(RunAs { uid: parts.next()?.parse().ok()?, gid: parts.next()?.parse().ok()? })
    };
    find("postgres").or_else(|| find("nobody")).expect("a user `postgres` or `nobody` to run PostgreSQL as")
}

fn give_to(path: &Path, user: RunAs) {
    std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)).expect("chown");
}

/// The command, run as another user where needed; `setpriv` replaces itself, so signals reach the server.
fn with_user(words: Vec<String>, user: Option<RunAs>) -> Vec<String> {
    let Some(user) = user else { return words };
    let mut all =
        vec!["setpriv".to_owned(), format!("--reuid={}", user.uid), format!("--regid={}", user.gid)];
    all.push("--clear-groups".to_owned());
    all.extend(words);
    all
}

fn run(words: &[String]) {
    let output = Command::new(&words[0])
        .args(&words[1..])
        .current_dir("/")
        .output()
        .unwrap_or_else(|error| panic!("{} does not start: {error}", words[0]));
    assert!(output.status.success(), "{words:?} failed: {}", String::from_utf8_lossy(&output.stderr));
}

/// The cluster to copy from, made on first use and shared by all tests of this machine.
fn template(programs: &Path, user: Option<RunAs>) -> PathBuf {
    let major = version(programs).expect("asked before");
    let uid = user.map_or_else(|| rustix::process::getuid().as_raw(), |user| user.uid);
    let folder = std::env::temp_dir().join(format!("ringback-postgres-template-{major}-{uid}"));
    if folder.is_dir() {
        return folder;
    }
    let made = Folder::new("initdb");
    if let Some(user) = user {
        give_to(made.path(), user);
    }
    let (data, password) = (made.path().join("data"), made.path().join("password"));
    std::fs::write(&password, PASSWORD).expect("write the password file");
    if let Some(user) = user {
        give_to(&password, user);
    }
    let words = [
        programs.join("initdb").display().to_string(),
        "-D".to_owned(),
        data.display().to_string(),
        format!("--username={USER}"),
        format!("--pwfile={}", password.display()),
        "--auth=scram-sha-256".to_owned(),
        "--encoding=UTF8".to_owned(),
        "--locale=C".to_owned(),
        "--no-sync".to_owned(),
    ];
    run(&with_user(words.to_vec(), user));
    // Another test may have been faster; a rename onto a filled folder fails, and then its copy is as good.
    if std::fs::rename(&data, &folder).is_err() {
        assert!(folder.is_dir(), "the template {} cannot be put in place", folder.display());
    }
    folder
}

fn copy(from: &Path, to: &Path, user: Option<RunAs>) {
    let words = ["cp".to_owned(), "-a".to_owned(), from.display().to_string(), to.display().to_string()];
    run(&with_user(words.to_vec(), user));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn data_survive_a_crash_and_a_restart() {
        let Some(mut server) = Postgres::start().await else { return };
        let url = server.database("one").await;
        let write = connect(&url).await.unwrap();
        write.execute_unprepared("CREATE TABLE t (n int); INSERT INTO t VALUES (7)").await.unwrap();
        server.crash();
        assert!(write.execute_unprepared("SELECT 1").await.is_err());
        server.start_again().await;
        let again = connect(&url).await.unwrap();
        let done = again.execute_unprepared("DELETE FROM t WHERE n = 7").await.unwrap();
        assert_eq!(done.rows_affected(), 1);
    }
}
