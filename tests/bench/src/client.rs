//! One keep-alive HTTP/1.1 connection. Generator and floor use the same one.

use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::error::BenchError;

/// A connection and the header fields that each of its requests carries.
pub struct Connection {
    address: String,
    authorization: Option<http::HeaderValue>,
    sender: SendRequest<Full<Bytes>>,
}

impl Connection {
    /// Connects to `host:port`.
    pub async fn open(address: &str, key: Option<&str>) -> Result<Self, BenchError> {
        let authorization = match key {
            Some(key) => Some(http::HeaderValue::try_from(format!("Bearer {key}")).map_err(|_| {
                BenchError::Option {
                    option: "--api-key",
                    reason: "holds bytes that no header can".to_owned(),
                }
            })?),
            None => None,
        };
        let sender = connect(address).await?;
        Ok(Self { address: address.to_owned(), authorization, sender })
    }

    /// Sends a request and reads the whole answer. After an error the connection is opened anew at the next call.
    pub async fn send(
        &mut self,
        method: Method,
        path: &Uri,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), BenchError> {
        if self.sender.is_closed() {
            self.sender = connect(&self.address).await?;
        }
        let http = |reason: String| BenchError::Http { address: self.address.clone(), reason };
        self.sender.ready().await.map_err(|error| http(error.to_string()))?;
        let mut request = Request::builder()
            .method(method)
            .uri(path.clone())
            .header(http::header::HOST, &self.address)
            .header(http::header::CONTENT_TYPE, "application/json");
        if let Some(value) = &self.authorization {
            request = request.header(http::header::AUTHORIZATION, value.clone());
        }
        let request = request.body(Full::new(body)).map_err(|error| http(error.to_string()))?;
        let response = self.sender.send_request(request).await.map_err(|error| http(error.to_string()))?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|error| http(error.to_string()))?;
        Ok((status, body.to_bytes()))
    }
}

async fn connect(address: &str) -> Result<SendRequest<Full<Bytes>>, BenchError> {
    let http = |reason: String| BenchError::Http { address: address.to_owned(), reason };
    let stream = TcpStream::connect(address).await.map_err(|error| http(error.to_string()))?;
    stream.set_nodelay(true)?;
    let (sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| http(error.to_string()))?;
    // Ends when the sender is dropped or the peer closes; either shows at the next send.
    tokio::spawn(async move { connection.await.ok() });
    Ok(sender)
}
