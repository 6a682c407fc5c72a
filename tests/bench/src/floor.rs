//! The floor: what the same machine does when nothing is kept but the queue.
//!
//! One pipeline in one server process: a bare HTTP POST in (an axum handler that reads the body and answers a job
//! id), one JetStream publish with its acknowledgement, a batched fetch, one HTTP POST out to the same receiver, one
//! ack. No SQL, no states, no signature, no retry. The answer does not wait for the publish: that is the cheapest
//! there can be. Generator, connections, receiver and backlog cap are those of the measurement beside it.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;
use axum::extract::State;
use axum::routing::post;
use axum::serve::ListenerExt as _;
use bytes::{BufMut as _, Bytes, BytesMut};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use http::{Method, Uri};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::children::{Running, free_port};
use crate::client::Connection;
use crate::error::BenchError;
use crate::procs::Group;
use crate::receiver::FLOOR_PATH;

const SUBJECT: &str = "floor.jobs";
const PUBLISH_WINDOW: usize = 4096;
const ID_LEN: usize = 36;

/// Arguments of the floor's server process, which the bench starts by itself.
#[derive(Debug, clap::Args)]
pub struct ServerArgs {
    /// URL of the broker
    #[arg(long)]
    nats: String,
    /// host:port of the receiver
    #[arg(long)]
    receiver: String,
    /// Bytes that make the POST out as long as Ringback's
    #[arg(long, default_value_t = 0)]
    pad: usize,
    /// Connections for the POSTs out
    #[arg(long, default_value_t = 32)]
    posters: usize,
    /// Messages per fetch
    #[arg(long, default_value_t = 500)]
    batch: usize,
}

/// A running floor: broker and server.
pub struct Floor {
    /// Where jobs go.
    pub address: String,
    nats: Running,
    server: Running,
}

impl Floor {
    /// Starts a broker with its data in `folder`, and the server.
    pub async fn start(
        folder: &Path,
        nats_server: &Path,
        receiver: &str,
        pad: usize,
    ) -> Result<Self, BenchError> {
        let port = free_port()?;
        let config = folder.join("floor-nats.conf");
        let text = format!(
            "listen: \"127.0.0.1:{port}\"\njetstream {{\n  store_dir: \"{}\"\n}}\n",
            folder.join("floor-nats").display()
        );
        std::fs::write(&config, text).map_err(|source| BenchError::file(&config, source))?;
        let mut command = Command::new(nats_server);
        command.arg("-c").arg(&config);
        let hint = "name it with --nats-server or put it on PATH";
        let mut nats = Running::start("nats-server", command, folder.join("floor-nats.log"), None, hint)?;
        let connect = async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok();
        nats.until_ready("a listening port", Duration::from_secs(20), connect).await?;

        let program = std::env::current_exe()?;
        let mut command = Command::new(program);
        command.args(["floor-server", "--nats", &format!("nats://127.0.0.1:{port}"), "--receiver", receiver]);
        command.args(["--pad", &pad.to_string()]);
        let log = folder.join("floor-server.log");
        let mut server = Running::start("floor-server", command, log, Some(Stdio::piped()), "")?;
        let mut line = String::new();
        if let Some(stdout) = server.stdout() {
            let read = BufReader::new(stdout).read_line(&mut line).await;
            read.map_err(|source| BenchError::file("floor-server", source))?;
        }
        let address = line.trim().to_owned();
        if address.is_empty() {
            return Err(server.not_ready("it did not say where it listens".to_owned()));
        }
        Ok(Self { address, nats, server })
    }

    /// Its processes.
    pub fn groups(&self) -> Vec<Group> {
        let group = |name, running: &Running| running.pid().map(|pid| Group::single(name, pid));
        [group("floor", &self.server), group("nats-server", &self.nats)].into_iter().flatten().collect()
    }

    /// Ends both.
    pub async fn stop(self) {
        self.server.stop(Duration::from_secs(5)).await;
        self.nats.stop(Duration::from_secs(10)).await;
    }
}

/// The server process: prints its address and serves until it is killed.
pub async fn serve(args: ServerArgs) -> Result<(), BenchError> {
    let nats = |error: &dyn std::fmt::Display| BenchError::Nats(error.to_string());
    let client = async_nats::connect(&args.nats).await.map_err(|error| nats(&error))?;
    let context = jetstream::new(client);
    let stream = context
        .create_stream(jetstream::stream::Config {
            name: "FLOOR".to_owned(),
            subjects: vec![SUBJECT.to_owned()],
            retention: jetstream::stream::RetentionPolicy::WorkQueue,
            discard: jetstream::stream::DiscardPolicy::New,
            storage: jetstream::stream::StorageType::File,
            ..Default::default()
        })
        .await
        .map_err(|error| nats(&error))?;
    let consumer = stream
        .create_consumer(jetstream::consumer::pull::Config {
            durable_name: Some("floor".to_owned()),
            ack_policy: jetstream::consumer::AckPolicy::Explicit,
            max_ack_pending: 100_000,
            ..Default::default()
        })
        .await
        .map_err(|error| nats(&error))?;
    let messages = consumer.stream().max_messages_per_batch(args.batch).messages().await;
    let messages = messages.map_err(|error| nats(&error))?;

    let (jobs, incoming) = mpsc::channel::<Bytes>(PUBLISH_WINDOW);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    let listener = listener.tap_io(|stream| {
        stream.set_nodelay(true).ok();
    });
    let app = axum::Router::new().route("/v2/{endpoint}/run", post(take)).with_state(jobs);
    tokio::try_join!(publish(context, incoming), deliver(messages, &args), async {
        axum::serve(listener, app).await.map_err(BenchError::from)
    },)?;
    Ok(())
}

/// One bare POST in: reads the body, makes an id, answers like a submit.
async fn take(State(jobs): State<mpsc::Sender<Bytes>>, body: Bytes) -> Result<String, http::StatusCode> {
    let id = Uuid::now_v7();
    let mut message = BytesMut::with_capacity(ID_LEN + body.len());
    message.put_slice(id.hyphenated().encode_lower(&mut [0; ID_LEN]).as_bytes());
    message.put_slice(&body);
    jobs.send(message.freeze()).await.map_err(|_| http::StatusCode::SERVICE_UNAVAILABLE)?;
    Ok(format!(r#"{{"id":"{}","status":"IN_QUEUE"}}"#, id.hyphenated()))
}

/// One publish per job, with many acknowledgements outstanding.
async fn publish(context: jetstream::Context, mut incoming: mpsc::Receiver<Bytes>) -> Result<(), BenchError> {
    let mut acks = FuturesUnordered::new();
    loop {
        tokio::select! {
            Some(ack) = acks.next(), if !acks.is_empty() => {
                let ack: Result<_, jetstream::context::PublishError> = ack;
                ack.map_err(|error| BenchError::Nats(error.to_string()))?;
            }
            message = incoming.recv(), if acks.len() < PUBLISH_WINDOW => {
                let Some(message) = message else { return Ok(()) };
                let sent = context.publish(SUBJECT, message).await;
                acks.push(sent.map_err(|error| BenchError::Nats(error.to_string()))?.into_future());
            }
        }
    }
}

/// One POST out and one ack per job; messages take turns over the connections.
async fn deliver(
    mut messages: jetstream::consumer::pull::Stream,
    args: &ServerArgs,
) -> Result<(), BenchError> {
    let pad: Arc<str> = "x".repeat(args.pad).into();
    let mut posters = Vec::new();
    for _ in 0..args.posters.max(1) {
        let (messages, queue) = mpsc::channel(64);
        let connection = Connection::open(&args.receiver, None).await?;
        tokio::spawn(send_out(connection, queue, Arc::clone(&pad)));
        posters.push(messages);
    }
    for turn in (0..posters.len()).cycle() {
        let Some(message) = messages.next().await else { break };
        let message = message.map_err(|error| BenchError::Nats(error.to_string()))?;
        posters[turn].send(message).await.map_err(|_| BenchError::Nats("a poster ended".to_owned()))?;
    }
    Ok(())
}

/// Posts in order over one connection. A failed POST or ack leaves the message to its redelivery after 30 s.
async fn send_out(mut connection: Connection, mut queue: mpsc::Receiver<jetstream::Message>, pad: Arc<str>) {
    let path = Uri::from_static(FLOOR_PATH);
    while let Some(message) = queue.recv().await {
        let Some((id, job)) = message.payload.split_at_checked(ID_LEN) else { continue };
        let mut body = BytesMut::with_capacity(job.len() + pad.len() + 160);
        body.put_slice(br#"{"delayTime":0,"executionTime":0,"id":""#);
        body.put_slice(id);
        body.put_slice(br#"","output":"#);
        body.put_slice(job);
        body.put_slice(br#","status":"COMPLETED","pad":""#);
        body.put_slice(pad.as_bytes());
        body.put_slice(br#""}"#);
        match connection.send(Method::POST, &path, body.freeze()).await {
            Ok((status, _)) if status.is_success() => {
                if let Err(error) = message.ack().await {
                    eprintln!("ack: {error}");
                }
            }
            Ok((status, _)) => eprintln!("POST out: {status}"),
            Err(error) => eprintln!("POST out: {error}"),
        }
    }
}
