//! Which server a verb talks to: flags, environment, or the file that `ringback dev` leaves in its data folder.

use crate::error::CliError;
use ringback_service_runtime::Redacted;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// File in the data folder of `ringback dev`, readable by its owner only.
pub(crate) const FILE_NAME: &str = "connection.json";
/// Default data folder, looked for in the current folder and those above it.
const DATA_DIR: &str = "ringback-data";
const DEFAULT_URL: &str = "http://127.0.0.1:8080";

/// Flags of every client verb.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Server")]
pub(crate) struct ServerArgs {
    /// Base address of the server [default: that of `ringback dev` in this folder, else http://127.0.0.1:8080]
    #[arg(long, env = "RINGBACK_URL", value_name = "URL")]
    pub(crate) url: Option<String>,
    /// API key [default: that of `ringback dev` in this folder]
    #[arg(long, env = "RINGBACK_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
}

/// A server and a key.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// Base address without a slash at its end.
    pub(crate) url: String,
    /// The key, if any is known.
    pub(crate) key: Option<Redacted<String>>,
    source: Source,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    Given,
    File(PathBuf),
    Default,
}

/// What `ringback dev` leaves for verbs on the same host.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Connection {
    /// Base address.
    pub(crate) url: String,
    /// A key of the project `default`; absent where only its hash is configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) api_key: Option<String>,
    /// Process id of the server.
    pub(crate) pid: u32,
}

impl Connection {
    /// Reads the file of a data folder; `None` where there is none or it cannot be read.
    pub(crate) fn read(data_dir: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(data_dir.join(FILE_NAME)).ok()?).ok()
    }

    /// Says that no server runs there any more; the key stays for the next start.
    pub(crate) fn retire(data_dir: &Path) {
        if let Some(mut last) = Self::read(data_dir) {
            last.pid = 0;
            // A file that cannot be written misleads nobody for long: the address does not answer.
            let _ = last.write(data_dir);
        }
    }

    /// Writes the file, for its owner only, at once or not at all.
    pub(crate) fn write(&self, data_dir: &Path) -> Result<(), CliError> {
        crate::private_file::write(&data_dir.join(FILE_NAME), self)
    }
}

impl Target {
    /// The target of a verb.
    ///
    /// # Errors
    /// The URL is none.
    pub(crate) fn resolve(args: &ServerArgs) -> Result<Self, CliError> {
        let found = std::env::current_dir().ok().and_then(|dir| find(&dir));
        Self::choose(args, found)
    }

    fn choose(args: &ServerArgs, found: Option<(PathBuf, Connection)>) -> Result<Self, CliError> {
        let given_key = args.api_key.clone().filter(|key| !key.is_empty()).map(Redacted::new);
        if let Some(url) = args.url.as_deref().filter(|url| !url.is_empty()) {
            let url = base(url)?;
            // The key in the file belongs to the server in the file and goes nowhere else.
            let key = given_key.or_else(|| {
                found
                    .filter(|(_, file)| file.url == url)
                    .and_then(|(_, file)| file.api_key)
                    .map(Redacted::new)
            });
            return Ok(Self { url, key, source: Source::Given });
        }
        Ok(match found {
            Some((path, file)) => Self {
                url: base(&file.url)?,
                key: given_key.or_else(|| file.api_key.map(Redacted::new)),
                source: Source::File(path),
            },
            None => Self { url: DEFAULT_URL.to_owned(), key: given_key, source: Source::Default },
        })
    }

    /// Whether the server is on this host's loopback.
    pub(crate) fn is_loopback(&self) -> bool {
        url::Url::parse(&self.url).is_ok_and(|url| match url.host() {
            Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
            Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
            Some(url::Host::Domain(name)) => name == "localhost",
            None => false,
        })
    }

    /// What to do when nobody answers.
    pub(crate) fn unreachable_hint(&self) -> String {
        match &self.source {
            Source::Given => "is the server running, and is --url (or RINGBACK_URL) right?".to_owned(),
            Source::File(path) => {
                format!(
                    "the address is from {}; start it again with `ringback dev`, or give --url",
                    path.display()
                )
            }
            Source::Default => "start one with `ringback dev`, or give --url and --api-key".to_owned(),
        }
    }
}

fn base(url: &str) -> Result<String, CliError> {
    let ok = url::Url::parse(url).is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    if ok {
        return Ok(url.trim_end_matches('/').to_owned());
    }
    Err(CliError::usage(
        "--url is no address",
        format!("write for example --url {DEFAULT_URL} (got {})", ringback_service_runtime::redact_url(url)),
    ))
}

/// The file that verbs in a folder use.
pub(crate) fn find(from: &Path) -> Option<(PathBuf, Connection)> {
    from.ancestors().find_map(|dir| {
        let data = dir.join(DATA_DIR);
        Connection::read(&data).map(|file| (data.join(FILE_NAME), file))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Option<(PathBuf, Connection)> {
        let file = Connection { url: "http://127.0.0.1:9".into(), api_key: Some("file-key".into()), pid: 1 };
        Some((PathBuf::from("x"), file))
    }

    fn args(url: Option<&str>, key: Option<&str>) -> ServerArgs {
        ServerArgs { url: url.map(Into::into), api_key: key.map(Into::into) }
    }

    #[test]
    fn flags_win_over_the_file_and_its_key_stays_with_its_server() {
        let key = |target: Target| target.key.map(Redacted::into_inner);
        assert_eq!(key(Target::choose(&args(None, None), file()).unwrap()).as_deref(), Some("file-key"));
        assert_eq!(key(Target::choose(&args(None, Some("k")), file()).unwrap()).as_deref(), Some("k"));
        let other = Target::choose(&args(Some("https://else.example/"), None), file()).unwrap();
        assert_eq!(other.url, "https://else.example");
        assert_eq!(key(other), None);
        let same = Target::choose(&args(Some("http://127.0.0.1:9/"), None), file()).unwrap();
        assert_eq!(key(same).as_deref(), Some("file-key"));
        assert!(Target::choose(&args(Some("localhost:8080"), None), None).is_err());
    }

    #[test]
    fn the_file_is_found_from_a_folder_below_and_is_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let (data, below) = (dir.path().join(DATA_DIR), dir.path().join("a/b"));
        std::fs::create_dir_all(&data).unwrap();
        std::fs::create_dir_all(&below).unwrap();
        Connection { url: "http://127.0.0.1:9".into(), api_key: None, pid: 7 }.write(&data).unwrap();
        let (path, read) = find(&below).unwrap();
        assert_eq!((read.pid, read.api_key), (7, None));
        assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
