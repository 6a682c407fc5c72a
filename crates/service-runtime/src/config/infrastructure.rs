//! `[data]`, `[database]`, `[nats]`, `[blobs]`: where state lives and how it is reached.

use super::problems::{NAME_RULE, Problems, is_name};
use super::secrets::{SecretError, SecretSource};
use super::section::section;
use crate::Redacted;
use std::path::{Path, PathBuf};

section! {
    /// The data folder of this installation.
    DataConfig {
        /// Folder of the embedded database, the embedded broker, blobs, spool and key file.
        dir: PathBuf = PathBuf::from("./ringback-data"),
        /// File with the key that encrypts secrets at rest; made on first start. Unset: `<dir>/secret.key`.
        secret_key_file: Option<PathBuf> = None,
    }
}

impl DataConfig {
    /// The secret key file in effect.
    #[must_use]
    pub fn secret_key_path(&self) -> PathBuf {
        self.secret_key_file.clone().unwrap_or_else(|| self.dir.join("secret.key"))
    }

    /// Folder of the worker's spool of outcomes.
    #[must_use]
    pub fn spool_dir(&self) -> PathBuf {
        self.dir.join("spool")
    }

    /// Folder of the embedded broker.
    #[must_use]
    pub fn nats_dir(&self) -> PathBuf {
        self.dir.join("nats")
    }
}

section! {
    /// The SQL database. SQLite is embedded; PostgreSQL is for production.
    DatabaseConfig {
        /// `sqlite:<path>` or `postgres://user:password@host/name`. Unset: `sqlite:<data.dir>/ringback.db`.
        url: Option<Redacted<String>> = None,
        /// Name of an environment variable that holds the URL.
        url_env: Option<String> = None,
        /// File that holds the URL.
        url_file: Option<PathBuf> = None,
        /// Connections for reading.
        max_read_connections: u32 = 4,
        /// Longest wait for a connection or a lock, in milliseconds.
        acquire_timeout_ms: u64 = 5_000,
    }
}

impl DatabaseConfig {
    /// The database URL in effect: the one given, else SQLite in the data folder.
    ///
    /// # Errors
    /// When the environment variable or the file cannot be read.
    pub fn resolve_url(&self, data_dir: &Path) -> Result<Redacted<String>, SecretError> {
        let given = SecretSource {
            value: self.url.as_ref(),
            env: self.url_env.as_deref(),
            file: self.url_file.as_deref(),
        }
        .resolve("database.url")?;
        Ok(given
            .unwrap_or_else(|| Redacted::new(format!("sqlite:{}", data_dir.join("ringback.db").display()))))
    }

    pub(super) fn validate(&self, p: &mut Problems) {
        p.at_most_one(
            "database",
            &[
                ("url", self.url.is_some()),
                ("url_env", self.url_env.is_some()),
                ("url_file", self.url_file.is_some()),
            ],
        );
        if let Some(url) = &self.url {
            let known = ["sqlite:", "postgres://", "postgresql://"];
            if !known.iter().any(|scheme| url.expose().starts_with(scheme)) {
                p.add("database.url", "must start with sqlite: or postgres://");
            }
        }
        p.within("database.max_read_connections", u64::from(self.max_read_connections), 1, 1_000);
        p.within("database.acquire_timeout_ms", self.acquire_timeout_ms, 100, 600_000);
    }
}

section! {
    /// The NATS server (2.10 or newer, JetStream on).
    NatsConfig {
        /// `nats://host:port` or `tls://host:port`, several separated by commas. Unset: `ringback dev` starts its own server; every other command needs it.
        url: Option<String> = None,
        /// Prefix of all subjects and streams, so that installations can share a server.
        install: String = "default".to_owned(),
        /// User name.
        user: Option<String> = None,
        /// Password of the user.
        password: Option<Redacted<String>> = None,
        /// Name of an environment variable that holds the password.
        password_env: Option<String> = None,
        /// File that holds the password.
        password_file: Option<PathBuf> = None,
        /// Credentials file (`.creds`) with a user JWT and its key.
        creds_file: Option<PathBuf> = None,
        /// File with the certificate authorities to trust, in PEM; only for `tls://`.
        ca_file: Option<PathBuf> = None,
        /// Copies of each stream in a cluster: 1, 3 or 5.
        replicas: u32 = 1,
        /// Longest wait for one connection attempt, in milliseconds. Attempts never end.
        connect_timeout_ms: u64 = 5_000,
        /// Longest wait for an answer of another service or of JetStream's API, in milliseconds.
        request_timeout_ms: u64 = 5_000,
        /// Publishes to a work queue that may await their answer at once, per process.
        max_publishes_in_flight: u32 = 1_024,
    }
}

impl NatsConfig {
    /// The password in effect, if any.
    ///
    /// # Errors
    /// When the environment variable or the file cannot be read.
    pub fn resolve_password(&self) -> Result<Option<Redacted<String>>, SecretError> {
        SecretSource {
            value: self.password.as_ref(),
            env: self.password_env.as_deref(),
            file: self.password_file.as_deref(),
        }
        .resolve("nats.password")
    }

    pub(super) fn validate(&self, p: &mut Problems) {
        if !is_name(&self.install) {
            p.add("nats.install", NAME_RULE);
        }
        p.at_most_one(
            "nats",
            &[
                ("password", self.password.is_some()),
                ("password_env", self.password_env.is_some()),
                ("password_file", self.password_file.is_some()),
                ("creds_file", self.creds_file.is_some()),
            ],
        );
        let has_password =
            self.password.is_some() || self.password_env.is_some() || self.password_file.is_some();
        if has_password && self.user.is_none() {
            p.add("nats.user", "is missing beside a password");
        }
        if self.user.is_some() && !has_password {
            p.add("nats.password", "is missing beside nats.user; use password_env or password_file");
        }
        if let Some(url) = &self.url {
            for part in url.split(',') {
                match url::Url::parse(part.trim()) {
                    Ok(parsed) if !matches!(parsed.scheme(), "nats" | "tls") => {
                        p.add("nats.url", "must start with nats:// or tls://");
                    }
                    Ok(parsed) if parsed.password().is_some() => {
                        p.add(
                            "nats.url",
                            "carries a password; use nats.user and nats.password_env or nats.password_file",
                        );
                    }
                    Ok(_) => {}
                    Err(_) => p.add("nats.url", "is not a URL such as nats://127.0.0.1:4222"),
                }
            }
        }
        if !matches!(self.replicas, 1 | 3 | 5) {
            p.add("nats.replicas", format!("is {}, must be 1, 3 or 5", self.replicas));
        }
        p.within("nats.connect_timeout_ms", self.connect_timeout_ms, 100, 60_000);
        p.within("nats.request_timeout_ms", self.request_timeout_ms, 100, 60_000);
        p.within("nats.max_publishes_in_flight", u64::from(self.max_publishes_in_flight), 1, 65_536);
    }
}

section! {
    /// Large payloads: inputs and outputs beside the database.
    BlobsConfig {
        /// Folder, as a path or a `file:///` URL. Unset: `<data.dir>/blobs`.
        url: Option<String> = None,
        /// Payloads above this size are stored as blobs, in bytes.
        inline_max_bytes: u64 = 256 * 1024,
        /// Largest blob accepted, in bytes.
        max_blob_bytes: u64 = 512 * 1024 * 1024,
    }
}

impl BlobsConfig {
    /// The folder in effect.
    ///
    /// # Errors
    /// When `url` is not a path or a `file:` URL; `validate` refuses that earlier.
    pub fn resolve_dir(&self, data_dir: &Path) -> Result<PathBuf, String> {
        match self.url.as_deref() {
            None => Ok(data_dir.join("blobs")),
            Some(text) if text.starts_with("file:") => url::Url::parse(text)
                .ok()
                .and_then(|url| url.to_file_path().ok())
                .ok_or_else(|| "is not a valid file: URL; write file:///absolute/path".to_owned()),
            Some(text) if text.contains("://") => {
                Err("names a scheme that is not supported; use a folder or file:///path".to_owned())
            }
            Some(text) => Ok(PathBuf::from(text)),
        }
    }

    pub(super) fn validate(&self, p: &mut Problems) {
        if let Err(detail) = self.resolve_dir(Path::new(".")) {
            p.add("blobs.url", detail);
        }
        // A NATS message carries the payload inline; beyond 1 MiB servers refuse it by default.
        p.within("blobs.inline_max_bytes", self.inline_max_bytes, 1024, 768 * 1024);
        if self.max_blob_bytes < self.inline_max_bytes {
            p.add("blobs.max_blob_bytes", "is smaller than blobs.inline_max_bytes");
        }
    }
}
