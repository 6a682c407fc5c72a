//! An OTLP collector that keeps what is exported to it.

use bytes::Bytes;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use prost::Message as _;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

/// Takes spans over gRPC.
#[derive(Debug)]
pub struct Collector {
    /// Where processes send to: `telemetry.otlp_endpoint`.
    pub address: String,
    taken: Arc<Mutex<Vec<u8>>>,
    task: tokio::task::JoinHandle<()>,
}

/// An exported span, its ids in lower-case hex.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// `service.name` of the process.
    pub service: String,
    /// The span's name.
    pub name: String,
    /// Its trace.
    pub trace: String,
    /// Its own id.
    pub id: String,
    /// Its parent's id; empty for a root.
    pub parent: String,
}

impl Collector {
    /// Starts one on a port of its own.
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let taken: Arc<Mutex<Vec<u8>>> = Arc::default();
        let kept = Arc::clone(&taken);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let kept = Arc::clone(&kept);
                let service = service_fn(move |request| take(request, Arc::clone(&kept)));
                let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(http.serve_connection(TokioIo::new(stream), service));
            }
        });
        Self { address, taken, task }
    }

    /// The bytes of all requests so far, one after the other.
    #[must_use]
    pub fn taken(&self) -> Vec<u8> {
        self.taken.lock().expect("not poisoned").clone()
    }

    /// Whether the bytes hold a text.
    #[must_use]
    pub fn holds(&self, text: &str) -> bool {
        self.taken().windows(text.len()).any(|bytes| bytes == text.as_bytes())
    }

    /// All spans so far.
    #[must_use]
    pub fn spans(&self) -> Vec<Exported> {
        let taken = self.taken();
        let (mut rest, mut spans) = (taken.as_slice(), Vec::new());
        // gRPC frames: a byte for compression, four for the length, the message.
        while let Some((head, after)) = rest.split_first_chunk::<5>() {
            assert_eq!(head[0], 0, "a compressed message");
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            let (message, next) = after.split_at(length);
            rest = next;
            for of_process in ExportTraceServiceRequest::decode(message).expect("an export").resource_spans {
                let attributes = of_process.resource.map(|r| r.attributes).unwrap_or_default();
                let named = attributes.into_iter().find(|kv| kv.key == "service.name");
                let service = match named.and_then(|kv| kv.value).and_then(|value| value.value) {
                    Some(Value::StringValue(name)) => name,
                    _ => String::new(),
                };
                let all = of_process.scope_spans.into_iter().flat_map(|scope| scope.spans);
                spans.extend(all.map(|span| Exported {
                    service: service.clone(),
                    name: span.name,
                    trace: hex(&span.trace_id),
                    id: hex(&span.span_id),
                    parent: hex(&span.parent_span_id),
                }));
            }
        }
        spans
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn take(
    request: http::Request<hyper::body::Incoming>,
    kept: Arc<Mutex<Vec<u8>>>,
) -> Result<http::Response<http_body_util::Empty<Bytes>>, Infallible> {
    use http_body_util::BodyExt as _;
    if let Ok(body) = request.into_body().collect().await {
        kept.lock().expect("not poisoned").extend_from_slice(&body.to_bytes());
    }
    let answer = http::Response::builder().header("content-type", "application/grpc");
    Ok(answer.header("grpc-status", "0").body(http_body_util::Empty::new()).expect("an answer"))
}
