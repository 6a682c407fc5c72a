//! A real nats-server on its own port with its own store.

use crate::files::free_port;
use crate::process::{Process, Spec};
use crate::tools;
use crate::wait::until;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

/// The server; stays on its port over restarts. Killed when dropped.
#[derive(Debug)]
pub struct NatsServer {
    program: PathBuf,
    folder: PathBuf,
    port: u16,
    password: String,
    process: Option<Process>,
}

impl NatsServer {
    /// The user name that clients give.
    pub const USER: &'static str = "ringback";

    /// Starts a server below `folder`; `None` (said loudly) where the program is missing.
    pub async fn start(folder: &Path) -> Option<Self> {
        let mut server = Self {
            program: tools::nats_server()?,
            folder: folder.to_owned(),
            port: free_port(),
            password: uuid::Uuid::now_v7().simple().to_string(),
            process: None,
        };
        server.start_again().await;
        Some(server)
    }

    /// Another handle of the same server, for talking to it: it neither starts nor ends it.
    #[must_use]
    pub fn guest(&self) -> Self {
        Self {
            program: self.program.clone(),
            folder: self.folder.clone(),
            port: self.port,
            password: self.password.clone(),
            process: None,
        }
    }

    /// Asks a subject and gives the JSON of the answer, as a tool of the server's operator would.
    pub async fn ask(&self, subject: &str, body: &Value) -> Value {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).await.expect("connect to NATS");
        let mut stream = BufReader::new(stream);
        let login = json!({"user": Self::USER, "pass": self.password, "verbose": false, "pedantic": false});
        let inbox = format!("_INBOX.{}", uuid::Uuid::now_v7().simple());
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let words =
            format!("CONNECT {login}\r\nSUB {inbox} 1\r\nPUB {subject} {inbox} {}\r\n{body}\r\n", body.len());
        stream.get_mut().write_all(words.as_bytes()).await.expect("write to NATS");
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).await.expect("read from NATS");
            assert!(!line.is_empty() && !line.starts_with("-ERR"), "{subject}: {line:?}");
            if let Some(head) = line.strip_prefix("MSG ") {
                let bytes = head.trim_end().rsplit(' ').next().and_then(|n| n.parse().ok()).expect("a size");
                let mut answer = vec![0; bytes];
                stream.read_exact(&mut answer).await.expect("read from NATS");
                return serde_json::from_slice(&answer).expect("JSON");
            }
        }
    }

    /// Port on loopback.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// URL without credentials.
    #[must_use]
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Password of [`Self::USER`].
    #[must_use]
    pub fn password(&self) -> &str {
        &self.password
    }

    /// Folder of its store.
    #[must_use]
    pub fn store_dir(&self) -> PathBuf {
        self.folder.join("nats-store")
    }

    /// Starts it on the same port with the store as it is.
    pub async fn start_again(&mut self) {
        let config = self.folder.join("nats.conf");
        let text = format!(
            "listen: \"127.0.0.1:{}\"\nserver_name: \"test-{}\"\nmax_payload: 8MB\nwrite_deadline: \"10s\"\n\
             jetstream {{ store_dir: \"{}\" }}\nauthorization {{ user: \"{}\", password: \"{}\" }}\n",
            self.port,
            self.port,
            self.store_dir().display(),
            Self::USER,
            self.password
        );
        std::fs::write(&config, text).expect("write nats.conf");
        let spec = Spec::new("nats-server", &self.program, &self.folder)
            .args(["-c".into(), config.into_os_string()]);
        self.process = Some(Process::spawn(spec));
        let port = self.port;
        until("nats-server to answer", Duration::from_secs(15), || async move {
            let stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
            let mut line = String::new();
            // The server speaks first: INFO with what it can do; JetStream is on once it says so.
            BufReader::new(stream).read_line(&mut line).await.ok()?;
            line.contains("\"jetstream\":true").then_some(())
        })
        .await;
    }

    /// `kill -9`. The store stays.
    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill9();
        }
    }

    /// Ends it in order. The store stays.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.terminate(Duration::from_secs(10));
        }
    }

    /// Removes everything it has stored; it must not run.
    pub fn delete_store(&self) {
        assert!(self.process.is_none(), "stop nats-server before its store is deleted");
        let store = self.store_dir();
        if store.exists() {
            std::fs::remove_dir_all(store).expect("delete the store");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::Folder;

    #[tokio::test(flavor = "multi_thread")]
    async fn it_comes_back_on_its_port_with_and_without_its_store() {
        let folder = Folder::new("nats");
        let Some(mut server) = NatsServer::start(folder.path()).await else { return };
        let port = server.port();
        server.kill9();
        assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err());
        server.start_again().await;
        server.stop();
        server.delete_store();
        assert!(!server.store_dir().exists());
        server.start_again().await;
        assert_eq!(server.port(), port);
        assert!(TcpStream::connect(("127.0.0.1", port)).await.is_ok());
    }
}
