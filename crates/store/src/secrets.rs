//! Secrets at rest: encrypted with a key that lies in a file beside the database, never in it.
//!
//! The form is `1 ‖ 24 random bytes ‖ XChaCha20-Poly1305(plain)`; what a value is for goes in as associated data, so
//! that one row's value cannot be moved into another place.

use std::{
    fmt, fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use chacha20poly1305::{
    Key, KeyInit as _, XChaCha20Poly1305, XNonce,
    aead::{Aead as _, Payload},
};
use ringback_domain::capability::{Opens, capability, capability_matches};
use ringback_domain::webhook::signature::{SecretError, SigningKey, format_secret};
use ringback_domain::{ArtifactId, BatchId, ProjectId};
use ringback_service_runtime::Redacted;
use sea_orm::{ConnectionTrait, Value};
use sha2::{Digest as _, Sha256};

use crate::{StoreError, WriteTx, sql, webhooks::bump_registry};

const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 24;
const VERSION: u8 = 1;

/// The key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be read or made.
    #[error("cannot use the key file {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It is not one of ours.
    #[error("the key file {path} must hold 64 hex digits")]
    Form {
        /// The file.
        path: PathBuf,
    },
}

/// The key that encrypts secrets at rest. Cheap to clone.
#[derive(Clone)]
pub struct SecretKey {
    cipher: Arc<XChaCha20Poly1305>,
    fingerprint_salt: [u8; 32],
    capability_key: [u8; 32],
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(..)")
    }
}

impl SecretKey {
    /// Reads the key file; makes one for its owner only (mode 0600) where there is none. Two processes that start at
    /// once end with the same key.
    ///
    /// # Errors
    /// The file cannot be read or made, or does not hold a key.
    pub fn open(path: &Path) -> Result<Self, KeyFileError> {
        let io = |source| KeyFileError::Io { path: path.to_owned(), source };
        match fs::read_to_string(path) {
            Ok(text) => {
                return Self::parse(&text).ok_or_else(|| KeyFileError::Form { path: path.to_owned() });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io(error)),
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(io)?;
        }
        let mut text = String::with_capacity(2 * KEY_BYTES + 1);
        for byte in rand::random::<[u8; KEY_BYTES]>() {
            text.push_str(&format!("{byte:02x}"));
        }
        text.push('\n');
        // Written beside and linked into place: a reader never sees a part, and the first of two makers wins.
        let draft = path.with_extension(format!("draft-{:016x}", rand::random::<u64>()));
        let mut file =
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft).map_err(io)?;
        let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
        let linked = written.and_then(|()| fs::hard_link(&draft, path));
        let _ = fs::remove_file(&draft);
        match linked {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(io(error)),
        }
        // A key that is lost with the power would make every stored secret unreadable.
        if let Some(folder) = path.parent() {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)?;
        }
        let text = fs::read_to_string(path).map_err(io)?;
        Self::parse(&text).ok_or_else(|| KeyFileError::Form { path: path.to_owned() })
    }

    fn parse(text: &str) -> Option<Self> {
        let text = text.trim_end();
        if text.len() != 2 * KEY_BYTES || !text.is_ascii() {
            return None;
        }
        let mut key = [0; KEY_BYTES];
        for (i, byte) in key.iter_mut().enumerate() {
            *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
        }
        Some(Self::from_bytes(&key))
    }

    /// A key from its bytes.
    #[must_use]
    pub fn from_bytes(key: &[u8; KEY_BYTES]) -> Self {
        let cipher = Arc::new(XChaCha20Poly1305::new(&Key::from(*key)));
        let mut hash = Sha256::new();
        hash.update(b"ringback fingerprint");
        hash.update(key);
        let fingerprint_salt = hash.finalize().into();
        let mut hash = Sha256::new();
        hash.update(b"ringback capability");
        hash.update(key);
        Self { cipher, fingerprint_salt, capability_key: hash.finalize().into() }
    }

    /// Encrypts. `purpose` must be the same when it is read.
    ///
    /// # Errors
    /// The plain text is larger than the cipher takes (256 GiB).
    pub fn seal(&self, plain: &[u8], purpose: &str) -> Result<Vec<u8>, StoreError> {
        let nonce: [u8; NONCE_BYTES] = rand::random();
        let sealed = self
            .cipher
            .encrypt(&XNonce::from(nonce), Payload { msg: plain, aad: purpose.as_bytes() })
            .map_err(|_| StoreError::Permanent { detail: "a secret cannot be encrypted".to_owned() })?;
        let mut out = Vec::with_capacity(1 + NONCE_BYTES + sealed.len());
        out.push(VERSION);
        out.extend_from_slice(&nonce);
        out.extend_from_slice(&sealed);
        Ok(out)
    }

    /// Decrypts what [`Self::seal`] made.
    ///
    /// # Errors
    /// Another key, another purpose, or changed bytes.
    pub fn open_sealed(&self, sealed: &[u8], purpose: &str) -> Result<Redacted<Vec<u8>>, StoreError> {
        let broken = || StoreError::Permanent {
            detail: "a stored secret cannot be decrypted: is this the key file of this database?".to_owned(),
        };
        let (version, rest) = sealed.split_first().ok_or_else(broken)?;
        if *version != VERSION || rest.len() < NONCE_BYTES {
            return Err(broken());
        }
        let (nonce, text) = rest.split_at(NONCE_BYTES);
        let nonce: [u8; NONCE_BYTES] = nonce.try_into().map_err(|_| broken())?;
        self.cipher
            .decrypt(&XNonce::from(nonce), Payload { msg: text, aad: purpose.as_bytes() })
            .map(Redacted::new)
            .map_err(|_| broken())
    }

    /// The capability in the links of an artefact.
    #[must_use]
    pub fn artifact_token(&self, id: &ArtifactId) -> String {
        capability(&self.capability_key, Opens::Artifact(id))
    }

    /// Whether a token from outside is that capability.
    #[must_use]
    pub fn is_artifact_token(&self, id: &ArtifactId, token: &str) -> bool {
        capability_matches(&self.capability_key, Opens::Artifact(id), token)
    }

    /// The capability in the links of a batch's files.
    #[must_use]
    pub fn batch_token(&self, id: &BatchId) -> String {
        capability(&self.capability_key, Opens::Batch(id))
    }

    /// Whether a token from outside is that capability.
    #[must_use]
    pub fn is_batch_token(&self, id: &BatchId, token: &str) -> bool {
        capability_matches(&self.capability_key, Opens::Batch(id), token)
    }

    /// Tells equal secrets apart from different ones without showing them: useless without the key file.
    fn fingerprint(&self, secret: &str) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(self.fingerprint_salt);
        hash.update(secret.as_bytes());
        hash.finalize().into()
    }
}

fn purpose(project: ProjectId) -> String {
    format!("project_secret:{}", project.0)
}

/// A secret that signs a project's webhooks.
#[derive(Clone, Debug)]
pub struct ProjectSecret {
    /// Its key.
    pub id: i64,
    /// The text as its owner knows it.
    pub secret: Redacted<String>,
    /// The owner's name for it.
    pub label: Option<String>,
    /// When it was added, Unix ms.
    pub created_at_ms: i64,
    /// When it stops signing.
    pub expires_at_ms: Option<i64>,
}

/// The live secrets of a project, newest first. All of them sign.
///
/// # Errors
/// The database's, and a secret that this key file cannot decrypt.
pub async fn live_secrets<C: ConnectionTrait>(
    conn: &C,
    key: &SecretKey,
    project: ProjectId,
) -> Result<Vec<ProjectSecret>, StoreError> {
    let now = crate::writer::now_ms(conn).await?;
    let rows = sql::query(
        conn,
        "SELECT id, secret_encrypted, created_at_ms, label, disabled_at_ms FROM project_secrets \
         WHERE project_id = $1 AND (disabled_at_ms IS NULL OR disabled_at_ms > $2) ORDER BY id DESC",
        [Value::from(project.0), Value::from(now)],
    )
    .await?;
    rows.iter()
        .map(|row| {
            let sealed: Vec<u8> = row.try_get_by_index(1)?;
            let plain = key.open_sealed(&sealed, &purpose(project))?.into_inner();
            let secret = String::from_utf8(plain)
                .map_err(|_| StoreError::corrupt("project_secrets.secret_encrypted"))?;
            Ok(ProjectSecret {
                id: row.try_get_by_index(0)?,
                secret: Redacted::new(secret),
                created_at_ms: row.try_get_by_index(2)?,
                label: row.try_get_by_index(3)?,
                expires_at_ms: row.try_get_by_index(4)?,
            })
        })
        .collect()
}

/// The same, ready to sign.
///
/// # Errors
/// As [`live_secrets`].
pub async fn signing_keys<C: ConnectionTrait>(
    conn: &C,
    key: &SecretKey,
    project: ProjectId,
) -> Result<Vec<SigningKey>, StoreError> {
    let secrets = live_secrets(conn, key, project).await?;
    secrets.iter().map(|s| Ok(SigningKey::parse(s.secret.expose()).map_err(refused)?.0)).collect()
}

fn refused(error: SecretError) -> StoreError {
    StoreError::Permanent { detail: error.to_string() }
}

/// Adds a secret, or brings back one that was disabled. Safe to repeat.
///
/// # Errors
/// The database's, and a secret that cannot sign.
pub async fn add_secret(
    tx: &WriteTx,
    key: &SecretKey,
    project: ProjectId,
    secret: &Redacted<String>,
) -> Result<(), StoreError> {
    SigningKey::parse(secret.expose()).map_err(refused)?;
    let sealed = key.seal(secret.expose().as_bytes(), &purpose(project))?;
    sql::execute(
        tx.conn(),
        "INSERT INTO project_secrets (project_id, secret_encrypted, fingerprint, created_at_ms) \
         VALUES ($1, $2, $3, $4) ON CONFLICT (project_id, fingerprint) DO UPDATE SET disabled_at_ms = NULL",
        [
            Value::from(project.0),
            Value::from(sealed),
            Value::from(key.fingerprint(secret.expose()).to_vec()),
            Value::from(tx.now_ms()),
        ],
    )
    .await?;
    // Dispatchers keep keys until this number rises.
    bump_registry(tx).await
}

/// Makes the secrets that sign exactly these, given newest first; others are disabled and kept. With an empty list
/// nothing is disabled, and a project without any gets a random one. Answers whether one was made.
///
/// # Errors
/// The database's, and a secret that cannot sign.
pub async fn set_secrets(
    tx: &WriteTx,
    key: &SecretKey,
    project: ProjectId,
    secrets: &[Redacted<String>],
) -> Result<bool, StoreError> {
    if secrets.is_empty() {
        return ensure_secret(tx, key, project).await;
    }
    let live = live_secrets(tx.conn(), key, project).await?;
    for gone in live.iter().filter(|old| !secrets.contains(&old.secret)) {
        sql::execute(
            tx.conn(),
            "UPDATE project_secrets SET disabled_at_ms = $1 WHERE id = $2",
            [Value::from(tx.now_ms()), Value::from(gone.id)],
        )
        .await?;
        bump_registry(tx).await?;
    }
    // The newest gets the highest id, so it is added last.
    for secret in secrets.iter().rev().filter(|new| live.iter().all(|old| old.secret != **new)) {
        add_secret(tx, key, project, secret).await?;
    }
    Ok(false)
}

/// Gives a project that has no live secret a random one: nothing is ever sent unsigned. Answers whether it did.
///
/// # Errors
/// The database's.
pub async fn ensure_secret(tx: &WriteTx, key: &SecretKey, project: ProjectId) -> Result<bool, StoreError> {
    if tx.is_postgres() {
        // Two processes that ask at once shall not make two.
        sql::execute(tx.conn(), "SELECT id FROM projects WHERE id = $1 FOR UPDATE", [Value::from(project.0)])
            .await?;
    }
    let live = sql::query_one(
        tx.conn(),
        "SELECT id FROM project_secrets WHERE project_id = $1 AND disabled_at_ms IS NULL LIMIT 1",
        [Value::from(project.0)],
    )
    .await?;
    if live.is_some() {
        return Ok(false);
    }
    let random: [u8; 32] = rand::random();
    add_secret(tx, key, project, &Redacted::new(format_secret(&random))).await?;
    Ok(true)
}
