//! The RunPod worker protocol, server side: the HTTP calls that a handler written with the Python
//! package `runpod` makes, so that an unmodified handler image runs under Ringback.
//!
//! The crate knows nothing of queues, SQL or processes. A [`Hub`] holds registered children (worker id
//! and token); whoever supervises a child gives it jobs through its [`ChildHandle`] and hears of it
//! through [`ChildEvent`]s. [`router`] turns a hub into axum routes:
//!
//! | call | meaning |
//! |---|---|
//! | `GET /v2/{endpoint}/job-take/{worker}` and `job-take-batch` | long poll for jobs |
//! | `GET /v2/{endpoint}/job-stop/{worker}` | long poll for job ids to stop |
//! | `POST /v2/{endpoint}/job-done/{worker}/{job}` | result or progress |
//! | `POST /v2/{endpoint}/job-stream/{worker}/{job}` | one chunk of a generator |
//! | `GET /v2/{endpoint}/ping/{worker}` | heartbeat from the SDK's separate process |
//!
//! Wire facts come from the Python package `runpod` 1.6.2, 1.7.13 and 1.12.0. Three of them shape the
//! code: a result answered with anything but 200 is dropped by the SDK, so every readable result is
//! answered 200 and judged later; any take answered with something else than 200, 204, 400 or 429 makes
//! the SDK spin, so every refusal is 429; and a take with `job_in_progress=0` proves that the child
//! holds nothing, which is how a lost job is found without waiting for a time limit.

mod body;
mod child;
mod environment;
mod event;
mod hub;
mod job_json;
mod reply;
mod result;
mod routes;
mod sdk;

pub use child::{AssignError, ChildHandle, Idle, Offer, StopOutcome, Unfinished};
pub use environment::{ChildIdentity, environment};
pub use event::{ChildEvent, ChunkPermit, Unhealthy};
pub use hub::{Hub, HubConfig, RegisterError, Registration};
pub use job_json::job_json;
pub use result::{DoneBody, ErrorKind, HandlerError, HandlerResult, parse_chunk, parse_done};
pub use routes::router;
pub use sdk::SdkVersion;
