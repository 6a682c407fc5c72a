//! A TCP forwarder: the address that stays while what stands behind it changes, as a Kubernetes service or a virtual
//! IP does.

use std::sync::{Arc, Mutex};

use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// The forwarder. Connections end with it.
#[derive(Debug)]
pub struct Forwarder {
    port: u16,
    target: Arc<Mutex<Target>>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Target {
    port: u16,
    connections: JoinSet<()>,
}

impl Forwarder {
    /// Listens on a free port of loopback, for a port of loopback.
    pub async fn start(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let port = listener.local_addr().expect("an address").port();
        let target = Arc::new(Mutex::new(Target { port: target, connections: JoinSet::new() }));
        let shared = Arc::clone(&target);
        let task = tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { return };
                let mut target = shared.lock().unwrap();
                let port = target.port;
                target.connections.spawn(forward(client, port));
            }
        });
        Self { port, target, task }
    }

    /// The port that stays.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sends connections to another port from now on; those that stand are broken off.
    pub fn turn_to(&self, port: u16) {
        let mut target = self.target.lock().unwrap();
        target.port = port;
        target.connections = JoinSet::new();
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Either end may break off; that is what a forwarder passes on.
async fn forward(mut client: TcpStream, port: u16) {
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
    if client.set_nodelay(true).is_ok() && server.set_nodelay(true).is_ok() {
        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
    }
}
