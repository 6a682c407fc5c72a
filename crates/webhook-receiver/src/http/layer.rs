//! The same as a layer: what is behind it sees trusted requests only.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use http::Request;
use tower::{Layer, Service, ServiceExt as _};

use super::judge;
use crate::event::Event;
use crate::verify::Trust;

/// Verifies each request. The service behind it finds the [`Event`] and the [`crate::Proof`] among the request's
/// extensions, and the body as it came.
#[derive(Debug, Clone)]
pub struct VerifyLayer {
    trust: Arc<Trust>,
}

impl VerifyLayer {
    /// Judges by `trust`.
    #[must_use]
    pub fn new(trust: Arc<Trust>) -> Self {
        Self { trust }
    }
}

impl<S> Layer<S> for VerifyLayer {
    type Service = VerifyService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        VerifyService { inner, trust: Arc::clone(&self.trust) }
    }
}

/// What [`VerifyLayer`] makes.
#[derive(Debug, Clone)]
pub struct VerifyService<S> {
    inner: S,
    trust: Arc<Trust>,
}

impl<S> Service<Request<Body>> for VerifyService<S>
where
    S: Service<Request<Body>, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // The service behind is asked when the request has been judged.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (inner, trust) = (self.inner.clone(), Arc::clone(&self.trust));
        async move {
            let (mut parts, body, proof) = match judge(&trust, request).await {
                Ok(judged) => judged,
                Err(rejection) => return Ok(rejection.into_response()),
            };
            match Event::parse(&body) {
                Ok(event) => {
                    parts.extensions.insert(event);
                    parts.extensions.insert(proof);
                    inner.oneshot(Request::from_parts(parts, Body::from(body))).await
                }
                Err(error) => Ok(super::Rejection::from(error).into_response()),
            }
        }
        .boxed()
    }
}
