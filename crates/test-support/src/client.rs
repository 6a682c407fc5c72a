//! A plain HTTP client for the RunPod routes and the native routes.

use crate::wait::until;
use http::{HeaderMap, Method};
use serde_json::{Value, json};
use std::time::Duration;

/// States in which a job stays.
pub const TERMINAL: [&str; 4] = ["COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"];

/// An answer, whatever its status.
#[derive(Debug, Clone)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Headers.
    pub headers: HeaderMap,
    /// The body's text.
    pub text: String,
    /// The body as JSON, null if it is none.
    pub json: Value,
}

impl Reply {
    /// The JSON of an answer that must have this status.
    pub fn expect(self, status: u16) -> Value {
        assert_eq!(self.status, status, "unexpected answer: {}", self.text);
        self.json
    }

    /// A text field of the JSON, empty if it is none.
    #[must_use]
    pub fn field(&self, name: &str) -> &str {
        self.json[name].as_str().unwrap_or_default()
    }
}

/// A client with one API key.
#[derive(Debug, Clone)]
pub struct Client {
    base: String,
    key: String,
    http: reqwest::Client,
}

impl Client {
    /// A client of the API at `base` (no trailing slash).
    #[must_use]
    pub fn new(base: &str, key: &str) -> Self {
        // Two crypto providers are compiled into some test binaries; the choice is made once per process.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(120))
            .build()
            .expect("a client");
        Self { base: base.to_owned(), key: key.to_owned(), http }
    }

    /// The same API with another key.
    #[must_use]
    pub fn with_key(&self, key: &str) -> Self {
        Self { key: key.to_owned(), ..self.clone() }
    }

    /// The API's base URL.
    #[must_use]
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The key in use.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Sends bytes with headers.
    ///
    /// # Errors
    /// When no answer came: refused, broken off, timed out.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<reqwest::Body>,
    ) -> Result<Reply, reqwest::Error> {
        let mut request = self.http.request(method, format!("{}{path}", self.base)).body(body);
        if !self.key.is_empty() {
            request = request.header("authorization", format!("Bearer {}", self.key));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await?;
        Ok(Reply { status, headers, json: serde_json::from_str(&text).unwrap_or(Value::Null), text })
    }

    /// Sends JSON; panics when no answer comes.
    pub async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Reply {
        self.try_call(method, path, body).await.unwrap_or_else(|error| panic!("{path}: no answer: {error:?}"))
    }

    /// Sends JSON.
    ///
    /// # Errors
    /// When no answer came.
    pub async fn try_call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Reply, reqwest::Error> {
        let headers: &[(&str, &str)] =
            if body.is_some() { &[("content-type", "application/json")] } else { &[] };
        self.send(method, path, headers, body.map(ToString::to_string).unwrap_or_default()).await
    }

    /// GET.
    pub async fn get(&self, path: &str) -> Reply {
        self.call(Method::GET, path, None).await
    }

    /// POST of JSON.
    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.call(Method::POST, path, Some(body)).await
    }

    /// `POST /v2/{endpoint}/run` with the whole body; gives the job's id.
    pub async fn run(&self, endpoint: &str, body: &Value) -> String {
        let reply = self.post(&format!("/v2/{endpoint}/run"), body).await.expect(200);
        assert_eq!(reply["status"], "IN_QUEUE", "{reply}");
        reply["id"].as_str().expect("an id").to_owned()
    }

    /// Submits until an answer comes, as a client with an idempotency key may: for tests that kill the API.
    pub async fn submit_surely(&self, endpoint: &str, key: &str, body: &Value, within: Duration) -> String {
        let path = format!("/v2/{endpoint}/run");
        let text = body.to_string();
        until(&format!("{key} to be accepted"), within, || async {
            let headers = [("content-type", "application/json"), ("idempotency-key", key)];
            let reply = self.send(Method::POST, &path, &headers, text.clone()).await.ok()?;
            match reply.status {
                200 => Some(reply.field("id").to_owned()),
                // The server may be starting or its database be away.
                500..=599 => None,
                other => panic!("{key}: {other} {}", reply.text),
            }
        })
        .await
    }

    /// `GET /v2/{endpoint}/status/{id}`.
    pub async fn status(&self, endpoint: &str, id: &str) -> Reply {
        self.get(&format!("/v2/{endpoint}/status/{id}")).await
    }

    /// Waits for a state; another terminal state is a failure.
    pub async fn wait_status(&self, endpoint: &str, id: &str, wanted: &str, within: Duration) -> Value {
        let path = format!("/v2/{endpoint}/status/{id}");
        until(&format!("{id} to be {wanted}"), within, || async {
            // While a test restarts the API there may be no answer for a moment.
            let reply = self.try_call(Method::GET, &path, None).await.ok()?;
            if reply.status != 200 {
                return None;
            }
            let now = reply.field("status").to_owned();
            if now == wanted {
                return Some(reply.json);
            }
            assert!(!TERMINAL.contains(&now.as_str()), "{id} is {now} instead of {wanted}: {}", reply.text);
            None
        })
        .await
    }

    /// Waits for any terminal state.
    pub async fn wait_end(&self, endpoint: &str, id: &str, within: Duration) -> Value {
        let path = format!("/v2/{endpoint}/status/{id}");
        until(&format!("{id} to end"), within, || async {
            let reply = self.try_call(Method::GET, &path, None).await.ok()?;
            (reply.status == 200 && TERMINAL.contains(&reply.field("status"))).then_some(reply.json)
        })
        .await
    }

    /// `GET /v1/jobs/{id}`.
    pub async fn job(&self, id: &str) -> Value {
        self.get(&format!("/v1/jobs/{id}")).await.expect(200)
    }

    /// `POST /v1/jobs`; gives the job's id.
    pub async fn create(&self, body: &Value) -> String {
        let job = self.post("/v1/jobs", body).await.expect(201);
        job["id"].as_str().expect("an id").to_owned()
    }

    /// `GET /v1/jobs/{id}/deliveries`.
    pub async fn deliveries(&self, id: &str) -> Vec<Value> {
        let mut reply = self.get(&format!("/v1/jobs/{id}/deliveries")).await.expect(200);
        match reply["deliveries"].take() {
            Value::Array(all) => all,
            other => panic!("no list of deliveries: {other}"),
        }
    }

    /// Waits until no delivery of a job is pending.
    pub async fn wait_settled(&self, id: &str, within: Duration) {
        let path = format!("/v1/jobs/{id}");
        until(&format!("the deliveries of {id} to settle"), within, || async {
            let reply = self.try_call(Method::GET, &path, None).await.ok()?;
            (reply.status == 200 && reply.json["deliveries"]["pending"] == json!(0)).then_some(())
        })
        .await;
    }

    /// Whether `/healthz/ready` says yes.
    pub async fn is_ready(&self) -> bool {
        matches!(self.try_call(Method::GET, "/healthz/ready", None).await, Ok(reply) if reply.status == 200)
    }
}
