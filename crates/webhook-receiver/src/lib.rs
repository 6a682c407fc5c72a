//! The receiving side of webhooks: verify, route, remember, download, confirm.
//!
//! - [`verify`]: whether a request is to be trusted, over its raw bytes, before anything reads it. Pure.
//! - [`event`]: what a trusted body says, typed. Pure.
//! - [`http`]: the axum extractor [`http::Verified`] and the tower layer [`http::VerifyLayer`] around both.
//! - [`router`]: handlers by type, and what is counted.
//! - [`store`], [`intake`], [`worker`]: an event is on disk before its sender is answered; the work comes after.
//! - [`tracker`], [`poll`]: jobs whose webhook does not come are polled.
//! - [`folder`], [`fetch`], [`save`]: files come into a folder whole and under safe names; their senders are told.
//! - [`app`]: all of it as a ready receiver, what `ringback receive` runs.

pub mod app;
pub mod event;
pub mod explain;
pub mod fetch;
pub mod folder;
pub mod http;
pub mod intake;
pub mod observe;
pub mod poll;
pub mod router;
pub mod save;
pub mod secret;
pub mod store;
pub mod tracker;
pub mod verify;
pub mod worker;

pub use app::{App, AppError, Config, Tracking};
pub use event::{Event, ParseError};
pub use folder::{Folder, FolderError};
pub use intake::Intake;
pub use observe::{Observer, Step};
pub use poll::{StatusPoll, StatusUrl, StatusUrlError};
pub use ringback_domain::artifact::SafeName;
pub use router::{Handled, HandlerError, Metrics, Received, Router};
pub use secret::{Secrets, SecretsError};
pub use tracker::{Poll, Polled, Tracker, Waits};
pub use verify::{HostList, HostListError, Proof, Refusal, Trust};
