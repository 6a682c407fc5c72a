//! A temporary PostgreSQL server with the defaults that make commits durable.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::process::Command;

use crate::children::{Running, find, free_port};
use crate::error::BenchError;
use crate::procs::Group;

const USER: &str = "ringback";

/// A running server. Its data folder belongs to the caller.
pub struct Postgres {
    postmaster: Running,
    bin: PathBuf,
    port: u16,
    account: Option<Account>,
}

/// The account that the server runs as when the bench runs as root: PostgreSQL refuses root.
#[derive(Debug, Clone, Copy)]
struct Account {
    uid: u32,
    gid: u32,
}

/// The folder with the server's and the client's programs, from PATH or from where Debian puts them.
pub fn binaries() -> Option<PathBuf> {
    let mut more: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .map(|entries| entries.flatten().map(|entry| entry.path().join("bin")).collect())
        .unwrap_or_default();
    more.sort();
    more.reverse();
    // PATH may hold links to some of them only; all lie together where the links lead.
    let initdb = find("initdb", &more)?.canonicalize().ok()?;
    let folder = initdb.parent()?.to_owned();
    ["postgres", "pg_isready", "createdb"].iter().all(|name| folder.join(name).exists()).then_some(folder)
}

impl Postgres {
    /// Makes a cluster in `folder/pg` and starts it on a free port of loopback.
    pub async fn start(folder: &Path, bin: &Path) -> Result<Self, BenchError> {
        let account = if rustix::process::geteuid().is_root() { Some(other_account()?) } else { None };
        let data = folder.join("pg");
        let wrap = |source| BenchError::file(&data, source);
        std::fs::create_dir_all(&data).map_err(wrap)?;
        std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o700)).map_err(wrap)?;
        if let Some(account) = account {
            std::os::unix::fs::chown(&data, Some(account.uid), Some(account.gid)).map_err(wrap)?;
        }
        let mut initdb = command_as(&bin.join("initdb"), account, &data);
        initdb.args(["-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C", "-D"]).arg(&data);
        run_to_end("initdb", initdb).await?;

        let port = free_port()?;
        let mut command = command_as(&bin.join("postgres"), account, &data);
        command.arg("-D").arg(&data).arg("-k").arg(&data);
        command.args(["-h", "127.0.0.1", "-p", &port.to_string()]);
        let log = folder.join("postgres.log");
        let mut postmaster = Running::start("postgres", command, log, None, "")?;
        let ready = async || {
            let mut probe = command_as(&bin.join("pg_isready"), account, &data);
            probe.args(["-q", "-h", "127.0.0.1", "-p", &port.to_string()]);
            probe.status().await.is_ok_and(|status| status.success())
        };
        postmaster.until_ready("answers to pg_isready", Duration::from_secs(30), ready).await?;
        Ok(Self { postmaster, bin: bin.to_owned(), port, account })
    }

    /// Makes an empty database and gives its URL.
    pub async fn database(&self, name: &str) -> Result<String, BenchError> {
        let mut command = command_as(&self.bin.join("createdb"), self.account, Path::new("/"));
        command.args(["-h", "127.0.0.1", "-p", &self.port.to_string(), "-U", USER, name]);
        run_to_end("createdb", command).await?;
        Ok(format!("postgres://{USER}@127.0.0.1:{}/{name}", self.port))
    }

    /// The postmaster and its backends.
    pub fn group(&self) -> Option<Group> {
        self.postmaster.pid().map(|pid| Group::tree("postgres", pid))
    }

    /// Ends it.
    pub async fn stop(self) {
        self.postmaster.stop(Duration::from_secs(15)).await;
    }
}

fn command_as(program: &Path, account: Option<Account>, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(folder).stdin(std::process::Stdio::null());
    if let Some(account) = account {
        command.uid(account.uid).gid(account.gid);
    }
    command
}

async fn run_to_end(name: &str, mut command: Command) -> Result<(), BenchError> {
    let output = command.output().await.map_err(|source| BenchError::Start {
        program: name.to_owned(),
        source,
        hint: "PostgreSQL's server programs must be readable by the account that runs them",
    })?;
    if output.status.success() {
        return Ok(());
    }
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(BenchError::NotReady { program: name.to_owned(), reason: output.status.to_string(), log })
}

/// The system's `postgres` account, else `nobody`.
fn other_account() -> Result<Account, BenchError> {
    let passwd =
        std::fs::read_to_string("/etc/passwd").map_err(|source| BenchError::file("/etc/passwd", source))?;
    let line_of = |name: &str| {
        let mut fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
        fields.find(|fields| fields.first() == Some(&name) && fields.len() > 3)
    };
    let fields = line_of("postgres").or_else(|| line_of("nobody"));
    let number = |at: usize| fields.as_ref().and_then(|fields| fields[at].parse().ok());
    match (number(2), number(3)) {
        (Some(uid), Some(gid)) => Ok(Account { uid, gid }),
        (None, _) | (_, None) => Err(BenchError::Option {
            option: "--database postgres",
            reason: "PostgreSQL refuses root and there is neither a postgres nor a nobody account".to_owned(),
        }),
    }
}
