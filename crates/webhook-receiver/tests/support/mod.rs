//! A receiver in this process, and a server of files that behaves as its paths say.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http::{HeaderMap, Method};
use ringback_domain::webhook::runflow;
use ringback_domain::webhook::signature::{self, SigningKey};
use ringback_domain::webhook::url::UrlPolicy;
use ringback_service_runtime::Shutdown;
use ringback_service_runtime::time::now_ms;
use ringback_test_support::client::Client;
use ringback_test_support::wait::until;
use ringback_webhook_receiver::{App, Config, HostList, Observer, Router, Secrets, Trust};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::Notify;

pub(crate) const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
pub(crate) const SOON: Duration = Duration::from_secs(60);

pub(crate) struct Options {
    pub(crate) hosts: Option<&'static str>,
    pub(crate) download_time: Duration,
    pub(crate) max_file_bytes: u64,
    pub(crate) router: Router,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hosts: Some("127.0.0.0/8"),
            download_time: Duration::from_secs(60),
            max_file_bytes: 1 << 20,
            router: Router::new(),
        }
    }
}

pub(crate) struct Served {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

pub(crate) struct Rig {
    dir: Arc<TempDir>,
    client: Client,
    shutdown: Shutdown,
    task: tokio::task::JoinHandle<()>,
    steps: Arc<Mutex<String>>,
}

impl Rig {
    pub(crate) async fn start(options: Options) -> Self {
        // Another test of this process may have installed it before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let trust = Trust {
            unsigned: options.hosts.map(|hosts| HostList::parse(&[hosts]).unwrap()),
            ..Trust::signed(Secrets::parse(&[SECRET]).unwrap())
        };
        let mut config = Config::new("127.0.0.1:0".parse().unwrap(), dir.path().join("out"), trust);
        config.urls = UrlPolicy::development();
        config.download_time = options.download_time;
        config.max_file_bytes = options.max_file_bytes;
        let steps: Arc<Mutex<String>> = Arc::default();
        let told = Arc::clone(&steps);
        let observer = Observer::new(move |step| told.lock().unwrap().push_str(&format!("{step:?}\n")));
        let app = App::build(config, options.router, observer).await.unwrap();
        let client = Client::new(&format!("http://{}", app.local_addr()), "");
        let shutdown = Shutdown::new();
        let end = shutdown.clone();
        let task = tokio::spawn(app.run(end));
        Self { dir, client, shutdown, task, steps }
    }

    pub(crate) fn dir(&self) -> Arc<TempDir> {
        Arc::clone(&self.dir)
    }

    pub(crate) fn parent(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    pub(crate) fn steps(&self) -> String {
        self.steps.lock().unwrap().clone()
    }

    pub(crate) fn file(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dir.path().join("out").join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.dir.path().join("out").join(name).exists()
    }

    /// The visible files.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.dir.path().join("out"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.starts_with('.'))
            .collect();
        names.sort();
        names
    }

    pub(crate) async fn post_with(&self, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, Value) {
        let mut all = vec![("content-type", "application/json")];
        all.extend_from_slice(headers);
        let answer = self.client.send(Method::POST, path, &all, body.to_owned()).await.unwrap();
        (answer.status, answer.json)
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.post_with(path, &[], &body.to_string()).await
    }

    pub(crate) fn posting(
        &self,
        path: &'static str,
        body: &Value,
    ) -> impl Future<Output = (u16, Value)> + use<> {
        let (client, body) = (self.client.clone(), body.to_string());
        async move {
            let headers = [("content-type", "application/json")];
            let answer = client.send(Method::POST, path, &headers, body).await.unwrap();
            (answer.status, answer.json)
        }
    }

    pub(crate) async fn post_as(&self, path: &str, kind: &str, body: &str) -> u16 {
        let headers = [("content-type", kind)];
        self.client.send(Method::POST, path, &headers, body.to_owned()).await.unwrap().status
    }

    pub(crate) async fn post_signed(&self, path: &str, id: &str, body: &Value) -> (u16, Value) {
        let (now, body) = (now_ms() / 1000, body.to_string());
        let id = format!("{id}{}", path.replace('.', "_"));
        let signature = signature::sign(&[SigningKey::parse(SECRET).unwrap().0], &id, now, body.as_bytes());
        let now = now.to_string();
        let headers =
            [("webhook-id", id.as_str()), ("webhook-timestamp", &now), ("webhook-signature", &signature)];
        self.post_with(path, &headers, &body).await
    }

    pub(crate) async fn post_runflow(&self, path: &str, body: &Value) -> (u16, Value) {
        let body = body.to_string();
        let signature = runflow::sign(&runflow::key(SECRET).unwrap(), body.as_bytes());
        self.post_with(path, &[("Runflow-Signature", &signature)], &body).await
    }

    pub(crate) async fn get(&self, path: &str) -> Served {
        let answer = self.client.send(Method::GET, path, &[], String::new()).await.unwrap();
        Served { status: answer.status, headers: answer.headers, body: Bytes::from(answer.text) }
    }

    pub(crate) async fn get_json(&self, path: &str) -> (u16, Value) {
        let served = self.get(path).await;
        (served.status, serde_json::from_slice(&served.body).unwrap_or(Value::Null))
    }

    /// Waits until everything about a subject is worked off.
    pub(crate) async fn settled(&self, subject: &str) {
        until(&format!("{subject} to be worked off"), SOON, || async {
            let about = self.get_json(&format!("/received/{subject}")).await.1;
            assert_ne!(about["status"], "failed", "{about}");
            (about["status"] == "completed").then_some(())
        })
        .await;
    }

    /// Ends it without waiting for anything.
    pub(crate) fn abort(self) {
        self.task.abort();
    }

    pub(crate) fn shutdown(&self) {
        self.shutdown.trigger();
    }

    pub(crate) async fn stop(self) {
        self.shutdown.trigger();
        self.task.await.unwrap();
    }
}

#[derive(Default)]
struct Place {
    base: Mutex<String>,
    confirmations: Mutex<Vec<Value>>,
    refuse: AtomicUsize,
    downloads: AtomicUsize,
    waiting: AtomicBool,
    open: AtomicBool,
    gate: Notify,
}

/// Where artefacts come from.
pub(crate) struct Source {
    place: Arc<Place>,
}

impl Source {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let place = Arc::new(Place::default());
        *place.base.lock().unwrap() = format!("http://{address}");
        let app = axum::Router::new().fallback(answer).with_state(Arc::clone(&place));
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { place }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.place.base.lock().unwrap())
    }

    pub(crate) fn notice(&self, job: &str, path: &str, name: &str) -> Value {
        json!({
            "job_id": job,
            "download_url": self.url(path),
            "confirmation_url": self.url("/confirm"),
            "filename": name,
        })
    }

    pub(crate) fn confirmations(&self) -> Vec<Value> {
        self.place.confirmations.lock().unwrap().clone()
    }

    pub(crate) fn refuse_confirmations(&self, times: usize) {
        self.place.refuse.store(times, Ordering::SeqCst);
    }

    pub(crate) fn downloads(&self) -> usize {
        self.place.downloads.load(Ordering::SeqCst)
    }

    pub(crate) fn is_waiting(&self) -> bool {
        self.place.waiting.load(Ordering::SeqCst)
    }

    pub(crate) fn open_gate(&self) {
        self.place.open.store(true, Ordering::SeqCst);
        self.place.gate.notify_waiters();
    }
}

async fn answer(State(place): State<Arc<Place>>, request: Request) -> Response {
    let query =
        request.uri().query().and_then(|query| query.strip_prefix("n=")).unwrap_or_default().to_owned();
    let path = request.uri().path().to_owned();
    if path != "/confirm" {
        place.downloads.fetch_add(1, Ordering::SeqCst);
    }
    match path.as_str() {
        "/file" => format!("RIFF file{query}").into_response(),
        "/gated" => {
            place.waiting.store(true, Ordering::SeqCst);
            let opened = place.gate.notified();
            if !place.open.load(Ordering::SeqCst) {
                opened.await;
            }
            "RIFF gated".into_response()
        }
        "/drip" => {
            let drops = stream::repeat(()).then(|()| async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Ok::<_, std::io::Error>(Bytes::from_static(b"x"))
            });
            Response::new(Body::from_stream(drops))
        }
        "/silent" => std::future::pending().await,
        "/endless" => {
            let flood = stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from_static(&[b'y'; 16_384])));
            Response::new(Body::from_stream(flood))
        }
        "/cut" => {
            let half = stream::iter([Ok(Bytes::from_static(b"half")), Err(std::io::Error::other("cut"))]);
            Response::new(Body::from_stream(half))
        }
        "/to-metadata" => {
            (http::StatusCode::FOUND, [("location", "http://169.254.169.254/latest")]).into_response()
        }
        "/confirm" => {
            let body = axum::body::to_bytes(request.into_body(), 10_000).await.unwrap();
            let refused = place.refuse.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
            if refused.is_ok() {
                return http::StatusCode::SERVICE_UNAVAILABLE.into_response();
            }
            place.confirmations.lock().unwrap().push(serde_json::from_slice(&body).unwrap());
            "{\"ok\":true}".into_response()
        }
        _ => http::StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
