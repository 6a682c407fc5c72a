//! `async fn hook(Verified { event, .. }: Verified<Event>)`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{FromRef, FromRequest};
use bytes::Bytes;
use http::Request;

use super::{Rejection, judge};
use crate::event::{ArtifactNotice, Event, ParseError, RunflowCallback, RunpodJob, StandardEvent};
use crate::verify::{Proof, Trust};

/// What can be read from a trusted body.
pub trait FromBody: Sized {
    /// Reads it.
    ///
    /// # Errors
    /// The body is something else.
    fn from_body(body: &Bytes) -> Result<Self, ParseError>;
}

impl FromBody for Bytes {
    fn from_body(body: &Bytes) -> Result<Self, ParseError> {
        Ok(body.clone())
    }
}

impl FromBody for Event {
    fn from_body(body: &Bytes) -> Result<Self, ParseError> {
        Self::parse(body)
    }
}

macro_rules! one_shape {
    ($($shape:ty, $pattern:pat => $value:expr, $name:literal;)*) => {$(
        impl FromBody for $shape {
            fn from_body(body: &Bytes) -> Result<Self, ParseError> {
                match Event::parse(body)? {
                    $pattern => Ok($value),
                    other => Err(ParseError::Field {
                        shape: $name,
                        reason: format!("the body is another event ({})", other.kind()),
                    }),
                }
            }
        }
    )*};
}

one_shape! {
    StandardEvent, Event::Standard(event) => *event, "event";
    RunpodJob, Event::Runpod(job) => *job, "job";
    RunflowCallback, Event::Runflow(callback) => *callback, "Runflow callback";
    ArtifactNotice, Event::Artifact(notice) => notice, "artefact notice";
}

/// A trusted request. The router's state must give an `Arc<Trust>`, and the service must be made with
/// `into_make_service_with_connect_info::<SocketAddr>()` if unsigned requests are taken.
#[derive(Debug, Clone)]
pub struct Verified<T> {
    /// What the body says.
    pub event: T,
    /// Why it is trusted.
    pub proof: Proof,
    /// The raw body.
    pub body: Bytes,
}

impl<S, T> FromRequest<S> for Verified<T>
where
    S: Send + Sync,
    T: FromBody,
    Arc<Trust>: FromRef<S>,
{
    type Rejection = Rejection;

    async fn from_request(request: Request<Body>, state: &S) -> Result<Self, Rejection> {
        let trust = Arc::<Trust>::from_ref(state);
        let (_, body, proof) = judge(&trust, request).await?;
        Ok(Self { event: T::from_body(&body)?, proof, body })
    }
}
